"""python -m methods: the list, the runner, the report, and that the tables of README and RESULTS are those of results.json."""

import importlib
import json
import re

import pytest

from tests.helpers import ROOT, run, user_error

M = importlib.import_module("methods.__main__")


def test_tables_are_those_of_the_results():
    results = json.loads((ROOT / "methods/results.json").read_text())
    assert set(results) <= set(M.TEN) == {p.stem for p in (ROOT / "methods").glob("[a-z]*.py")}
    ten, claims = M.tables(results)
    assert f"<!-- the ten -->\n{ten}\n<!-- end of the ten -->" in (ROOT / "README.md").read_text()
    assert f"<!-- claims -->\n{claims}\n<!-- end of claims -->" in (ROOT / "methods/RESULTS.md").read_text()
    for name, paper in M.TEN.items():
        assert (ROOT / "methods/figures" / paper.figure).exists(), name
        for run_ in results.get(name, {"runs": {}})["runs"].values():
            assert set(run_) == {k for c in paper.claims for k in (c.method, c.base) if k}, name


def test_measured_by_hand():
    claim = M.Claim("x", "a", "b", +1)
    assert M.measured(claim, {}) == ("", "not run")
    assert M.measured(claim, {"0": {"a": 3.0, "b": 1.0}}) == ("+2.0 (1 seed)", "one seed")
    runs = {"0": {"a": 3.0, "b": 1.0}, "1": {"a": 4.0, "b": 1.0}, "2": {"a": 2.0, "b": 1.0}}
    assert M.measured(claim, runs) == ("+2.0 ± 2.5 (3 seeds)", "not clear")  # 4.303 x 1 / sqrt(3)
    clear = {k: {"a": v["a"] + 1, "b": 1.0} for k, v in runs.items()}  # +3.0 ± 2.5
    for expects, status in ((+1, "seen"), (-1, "opposite"), (0, "an effect"), (None, "")):
        assert M.measured(M.Claim("x", "a", "b", expects), clear)[1] == status
    assert M.measured(M.Claim("x", "a", "b", 0), runs)[1] == "no effect seen"
    assert M.measured(M.Claim("x", "a", "b", None), runs)[1] == "not clear"
    nothing = {"0": {"a": 0.0, "b": 0.1}, "1": {"a": 0.06, "b": 0.0}}
    assert M.measured(M.Claim("x", "a", "b", None), nothing)[0] == "+0.0 ± 1.0 (2 seeds)"  # not -0.0
    assert M.measured(M.Claim("x", "a", "", +1, digits=2), runs) == ("+3.00 ± 2.48 (3 seeds)", "seen")


def test_marks():
    assert M.replaced("a\n<!-- t -->\nold\n<!-- end of t -->\nb", "t", "new") == "a\n<!-- t -->\nnew\n<!-- end of t -->\nb"
    with pytest.raises(ValueError, match="marks"):
        M.replaced("nothing", "t", "new")


def test_all_runs_resumes_and_reports(tmp_path):
    before = [(ROOT / p).read_bytes() for p in ("README.md", "methods/RESULTS.md", "methods/results.json")]
    args = ["-m", "methods", "all", "--preset", "smoke", "--seeds", "2", "--only", "dp_rdm", "--out", tmp_path]
    first = run(*args)
    assert first.returncode == 0, first.stderr
    times = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("printed.txt")}
    assert len(times) == 2 and not list(tmp_path.rglob("*.tmp"))
    again = run(*args)
    assert again.returncode == 0 and times == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("printed.txt")}
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") >= 3 and "seed 1," in page and str(tmp_path) not in page
    assert not re.search(r"(src|href)\s*=\s*['\"]?(https?:|/|\.)", page)  # everything is in the page
    assert before == [(ROOT / p).read_bytes() for p in ("README.md", "methods/RESULTS.md", "methods/results.json")]


def test_a_failure_is_named(tmp_path):
    (tmp_path / "smoke_vlm_0").mkdir()
    (tmp_path / "smoke_vlm_0/infonce").write_text("in the way")
    done = run("-m", "methods", "all", "--preset", "smoke", "--seeds", "1", "--only", "vlm", "--out", tmp_path)
    user_error(done, "1 of 1 runs failed", "vlm, seed 0", "infonce")


def test_seeds_that_were_not_run_again_stay(tmp_path, monkeypatch):
    kept = {"dci": {"commit": "a", "runs": {"0": {"dense SCM": 1.0}, "1": {"dense SCM": 2.0}}}}
    (tmp_path / "methods").mkdir()
    (tmp_path / "methods/results.json").write_text(json.dumps(kept))
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.json").write_text(json.dumps({"dense SCM": 5.0, "clip SCM": 1.0}))
    monkeypatch.setattr(M, "ROOT", tmp_path)
    monkeypatch.setattr(M, "rewrite", lambda results: None)
    M.collect({("dci", 0): tmp_path / "run"})
    found = json.loads((tmp_path / "methods/results.json").read_text())["dci"]
    assert found == {"commit": "a", "runs": {"0": {"dense SCM": 5.0, "clip SCM": 1.0}, "1": {"dense SCM": 2.0}}}
    M.collect({("dci", s): tmp_path / "run" for s in range(3)})
    found = json.loads((tmp_path / "methods/results.json").read_text())["dci"]
    assert found["commit"] == "" and list(found["runs"]) == ["0", "1", "2"]  # none of them is of the old commit


WRONG = ([["--only", "clip"], ["clip", "vlm"]], [["--seeds", "0"], ["seeds", "1"]], [["--preset", "nope"], ["nope", "smoke"]])


@pytest.mark.parametrize("args, words", WRONG)
def test_wrong_input(args, words, capsys):
    with pytest.raises(SystemExit, match="2"):
        M.main(["all", *args])
    said = capsys.readouterr().err
    assert all(w in said for w in ("error: ", *words))


def test_help_and_unknown(capsys):
    M.main(["--help"])
    assert "python -m methods all" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        M.main(["some"])
    assert "some is unknown" in capsys.readouterr().err
