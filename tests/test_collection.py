"""The rules of the house, read off the sources: headers, sections, imports, twins, requirements, copying out."""

import ast
import importlib.metadata
import re
import shutil
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from tests.helpers import ROOT, run

METHODS = sorted(p for p in (ROOT / "methods").glob("[a-z]*.py"))
FIELDS = ["Paper", "Idea", "Equations", "Read first", "Symbols", "Run", "Data", "Expect", "Differs", "Uses"]
SECTIONS = ["CONFIG", "THE IDEA", "MODULES", "DATA", "EVALUATE", "TRAIN", "MAIN"]
SHARED_NAMES = ("out_dir seed steps batch_size accum lr wd warmup grad_clip ema_decay dtype compile data workers log_every "
                "eval_every save_every resume").split()  # fmt: skip
ALLOWED = {"torch", "torchvision", "numpy", "safetensors", "PIL", "tqdm", "common"}
ids = [p.stem for p in METHODS]


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


@pytest.mark.parametrize("path", METHODS, ids=ids)
def test_header_has_its_fields_in_order(path):
    doc = ast.get_docstring(ast.parse(path.read_text()))
    found = [f for line in doc.splitlines() for f in FIELDS if line.startswith(f + " ")]
    assert found == FIELDS
    assert len(doc.splitlines()) <= 55 and re.match(r"[A-Z].+: .+", doc.splitlines()[0])


@pytest.mark.parametrize("path", METHODS, ids=ids)
def test_sections_in_order_and_the_idea_early(path):
    lines = path.read_text().splitlines()
    banners = [(i + 1, m[1]) for i, line in enumerate(lines) if (m := re.match(r"# \d\. ([A-Z ]+[A-Z])", line))]
    assert [b for _, b in banners] == SECTIONS
    assert dict((b, i) for i, b in banners)["THE IDEA"] <= 120
    assert lines[-2:] == ['if __name__ == "__main__":', "    cli.main(run, Config, PRESETS)"]


@pytest.mark.parametrize("path", METHODS, ids=ids)
def test_shared_field_names(path):
    tree = ast.parse(path.read_text())
    config = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "Config")
    names = [n.target.id for n in config.body if isinstance(n, ast.AnnAssign)]
    assert [n for n in SHARED_NAMES if n not in names] == []
    assert all("  # " in path.read_text().splitlines()[n.lineno - 1] for n in config.body if isinstance(n, ast.AnnAssign))


def test_imports_run_one_way_and_only_allowed_packages():
    for folder, may in (("common", set()), ("methods", {"common"}), ("data_prep", {"common", "data_prep"})):
        for path in (ROOT / folder).glob("*.py"):
            for name in imports(path):
                top = name.split(".")[0]
                assert top in ALLOWED | may | set(sys.stdlib_module_names), f"{path}: {name}"
                assert not (folder == "common" and top == "common" and path.stem != "zoo"), f"{path} imports {name}"


def test_uses_line_is_complete():
    for path in METHODS:
        doc = ast.get_docstring(ast.parse(path.read_text()))
        uses = set(re.findall(r"(\w+)\.py", doc[doc.index("\nUses") :]))
        tree, needed = ast.parse(path.read_text()), set()
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "common":
                needed |= {a.name for a in node.names} if node.module == "common" else {node.module.split(".")[1]}
        if "zoo" in needed:  # the one module of common/ that imports others
            needed |= {a.name for n in ast.walk(ast.parse((ROOT / "common/zoo.py").read_text()))
                       if isinstance(n, ast.ImportFrom) and n.module == "common" for a in n.names}  # fmt: skip
            needed |= {name.split(".")[1] for name in imports(ROOT / "common/zoo.py") if name.startswith("common.")}
        assert uses == needed, path


def test_twins_are_equal():
    twins = defaultdict(list)
    for path in [*METHODS, *(ROOT / "common").glob("*.py"), *(ROOT / "data_prep").glob("*.py")]:
        lines = path.read_text().splitlines()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and (m := re.search(r"# twin: (\w+)", lines[node.lineno - 1])):
                twins[m[1]].append((path.name, ast.dump(node)))
    for name, copies in twins.items():
        assert len({dump for _, dump in copies}) == 1, f"twin {name} differs in {[p for p, _ in copies]}"


def test_requirements_are_exactly_what_is_used_and_pinned():
    lines = (ROOT / "requirements.txt").read_text().split()
    assert [line.split("==")[0] for line in lines] == [
        "torch",
        "torchvision",
        "numpy",
        "safetensors",
        "pillow",
        "tqdm",
        "pytest",
    ]
    assert all(re.fullmatch(r"[a-z]+==[0-9.]+", line) for line in lines)
    assert tuple(map(int, importlib.metadata.version("torch").split("+")[0].split(".")[:2])) >= (2, 11)


def copy_out(path, folder):
    """The method file and what its Uses line names."""
    doc = ast.get_docstring(ast.parse(path.read_text()))
    (folder / "methods").mkdir(parents=True)
    (folder / "common").mkdir()
    shutil.copy(path, folder / "methods")
    for module in re.findall(r"(\w+)\.py", doc[doc.index("\nUses") :]):
        shutil.copy(ROOT / "common" / f"{module}.py", folder / "common")
    if "weights/" in doc[doc.index("\nUses") :]:
        shutil.copytree(ROOT / "common/weights", folder / "common/weights")


IMPORT_EACH = """
import importlib, sys, torch
sys.dont_write_bytecode, paths = True, list(sys.path)
for name in sys.argv[1:]:  # each from its own copy, with what it brought alone
    for module in [m for m in sys.modules if m.split(".")[0] in ("methods", "common")]:
        del sys.modules[module]
    sys.path[:] = [f"../{name}", *paths]
    before = torch.random.get_rng_state(), torch.get_num_threads()
    importlib.import_module(f"methods.{name}")
    same = torch.equal(before[0], torch.random.get_rng_state()) and before[1] == torch.get_num_threads()
    print(name, same and not torch.distributed.is_initialized())
"""


def test_a_method_can_be_copied_out_and_importing_it_does_no_work(tmp_path):
    for path in METHODS:
        copy_out(path, tmp_path / path.stem)
    (tmp_path / "empty").mkdir()
    done = run("-c", IMPORT_EACH, *ids, cwd=tmp_path / "empty")
    assert done.stdout.split() == [word for name in ids for word in (name, "True")], done.stderr
    assert not list((tmp_path / "empty").iterdir())  # nothing written


@pytest.mark.hard
@pytest.mark.parametrize("path", METHODS, ids=ids)
def test_a_copied_method_runs(path, tmp_path):
    copy_out(path, tmp_path)
    done = run(f"methods/{path.name}", "--preset", "smoke", "--out_dir", tmp_path / "r", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_readme_commands_exist():
    text = (ROOT / "README.md").read_text()
    for script in set(re.findall(r"(?:methods|data_prep|tests)/[\w/]+\.py", text)):
        assert (ROOT / script).exists(), script
    fields = re.findall(r"python methods/(\w+)\.py((?: --\w+ [^\s`]+)*)", text)
    for method, flags in fields:
        config = (ROOT / "methods" / f"{method}.py").read_text()
        for flag in re.findall(r"--(\w+)", flags):
            assert flag == "preset" or f"    {flag}: " in config, f"{method} has no --{flag}"


def test_no_unsafe_loading_in_the_sources():
    for folder in ("common", "methods", "data_prep"):
        for path in (ROOT / folder).glob("*.py"):
            text = path.read_text()
            assert all("weights_only=True" in m for m in re.findall(r"torch\.load\([^\n]*", text)), path
            assert not re.search(r"extractall\(|pickle\.loads?\(|(?<![.\w])(eval|exec)\(", text), path


def test_pictures_of_real_data_are_not_in_the_repository():
    assert not list((ROOT / "methods").glob("figures/*flickr*")) and Path(ROOT / ".gitignore").read_text().count("runs/")


def test_the_list_of_methods():
    done = run("-m", "methods")
    assert done.returncode == 0 and [line.split()[0] for line in done.stdout.splitlines()] == ids
