"""The ten files as one collection.

python -m methods                          one line a file
python -m methods all --seeds 3            runs all, one after the other; started again it goes on where it was (a folder
                                           with printed.txt is done: delete it to run it again). Writes
                                           runs/report.html; the preset laptop also rewrites the tables of claims
python -m methods all --only dci,vlm --preset smoke
python -m methods tables                   the tables of README.md and methods/RESULTS.md again, from methods/results.json
"""

from __future__ import annotations

import ast
import base64
import html
import importlib
import io
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from common import cli
from common.log import write_json

STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}  # 95 %, by seeds


@dataclass(frozen=True)
class Claim:
    """method - base of metrics.json, paired by seed; without base the value itself. expects: the sign of the paper's effect, 0:
    none, None: the paper does not say. digits: of the printed numbers."""

    text: str
    method: str
    base: str
    expects: int | None
    paper: str = ""
    digits: int = 1


@dataclass(frozen=True)
class Paper:
    title: str
    arxiv: str
    idea: str
    figure: str
    claims: tuple[Claim, ...]


TEN = {
    "clip_recipe": Paper(
        "Improved baselines for vision-language pre-training", "2305.08675",
        "CLIP with a strong recipe needs no added losses", "clip_recipe_retrieval.png",
        (Claim("the recipe lifts plain CLIP: zero-shot, points", "rocket_none_zero_shot", "plain_none_zero_shot", +1,
               "up to 25 % relative"),
         Claim("an added loss (Barlow) helps the plain recipe", "plain_bar_zero_shot", "plain_none_zero_shot", +1, "it does"),
         Claim("... and no longer the strong one", "rocket_bar_zero_shot", "rocket_none_zero_shot", 0, "it does not"))),
    "lpl_ldm": Paper(
        "Boosting Latent Diffusion with Perceptual Objectives", "2411.04873",
        "a loss on the decoder's own features", "lpl_ldm_samples.png",
        (Claim("LPL against its control: Frechet distance, lower is better", "lpl_fd_16", "control_fd_16", -1,
               "6 to 20 % lower (FID)"),
         Claim("... log power of the high band (control: too little)", "lpl_high_16", "control_high_16", +1, "more detail", 3),
         Claim("... class right, points", "lpl_right_16", "control_right_16", None))),
    "ldm_conditioning": Paper(
        "On Improved Conditioning Mechanisms and Pre-training Strategies for Diffusion Models", "2411.03177",
        "semantics by attention, control by scheduled adaLN", "ldm_conditioning_size.png",
        (Claim("attn+schedule against adaln-sum: change of the content when only a size is asked for (RMS)",
               "attn+schedule_swap", "adaln-sum_swap", -1, "less", 4),
         Claim("... Frechet distance, lower is better", "attn+schedule_fd", "adaln-sum_fd", -1, "7 to 23 % lower (FID)"),
         Claim("... class right, points", "attn+schedule_right", "adaln-sum_right", None))),
    "xsample": Paper(
        "X-Sample Contrastive", "2407.18134",
        "the contrastive target is a soft similarity graph", "xsample_xclr.png",
        (Claim("X-CLR against SimCLR, 300 pictures a class: class by linear probe, points", "xclr_300_probe",
               "simclr_300_probe", +1, "better"),
         Claim("X-CLR against CLIP on the same captions: class", "xclr_300_probe", "clip_300_probe", +1, "better"),
         Claim("... on the background of another class", "xclr_300_mixed_rand", "clip_300_mixed_rand", +1, "better"),
         Claim("X-CLR against SupCon: class", "xclr_300_probe", "supcon_300_probe", +1, "better"),
         Claim("... colour, which is no label", "xclr_300_colour", "supcon_300_colour", +1, "better"))),
    "semisup_cluster": Paper(
        "Semi-supervised learning made simple (Suave, Daino)", "2306.07483",
        "cluster prototypes are class prototypes", "semisup_cluster_prototypes.png",
        (Claim("Suave against supervised only, 2 labels a class: class by prototypes, points", "suave_2_prototypes",
               "sup_2_prototypes", +1, "better"),
         Claim("Suave against SwAV, then fine-tuning", "suave_2_prototypes", "ssl+ft_2_prototypes", +1, "better"),
         Claim("Suave against supervised only, by a probe on the backbone", "suave_2_backbone", "sup_2_backbone", +1,
               "better"))),
    "pareto_eval": Paper(
        "Consistency-diversity-realism Pareto fronts of conditional image generative models", "2406.10429",
        "sweep a generator's knobs, draw the fronts", "pareto_fronts.png",
        (Claim("guidance 8 against 1, late model: diversity inside a prompt", "late_guidance_8_diversity",
               "late_guidance_1_diversity", -1, "falls", 3),
         Claim("... consistency", "late_guidance_8_consistency", "late_guidance_1_consistency", +1, "rises", 3),
         Claim("late model against early, guidance 3: consistency", "late_guidance_3_consistency",
               "early_guidance_3_consistency", +1, "gains", 3),
         Claim("... diversity inside a prompt", "late_guidance_3_diversity", "early_guidance_3_diversity", -1, "falls", 3))),
    "opt2i": Paper(
        "Improving Text-to-Image Consistency via Automatic Prompt Optimization (OPT2I)", "2403.17804",
        "a language model rewrites the prompt until the picture agrees", "opt2i_sheet.png",
        (Claim("OPT2I against the user's prompt, fresh seeds: DSG points", "opt2i_fresh_gain", "", +1,
               "+10.9 to +24.9, its own seeds"),
         Claim("... against paraphrasing", "opt2i_fresh_gain", "paraphrase_fresh_gain", +1, "a little more"))),
    "dp_rdm": Paper(
        "DP-RDM: Adapting Diffusion Models to Private Domains Without Fine-Tuning", "2403.14421",
        "private retrieval with a provable budget", "dp_rdm_budget.png",
        (Claim("epsilon 10, 10,000 queries, against public retrieval: Frechet distance, lower is better",
               "epsilon 10, 10,000 queries fd", "public only fd", -1, "-3.5 (FID, MS-COCO)"),
         Claim("... against public records, as many and as noisy", "epsilon 10, 10,000 queries fd", "public, as noisy fd",
               None),
         Claim("its price: the prompt's colour is right, against no privacy, points", "epsilon 10, 10,000 queries colour",
               "not private colour", None))),
    "dci": Paper(
        "A Picture is Worth More Than 77 Text Tokens", "2312.08578",
        "match sub-crops with dense captions", "dci_crops.png",
        (Claim("dense captions against none: sub-crop matching, points", "dense SCM", "clip SCM", +1, "better"),
         Claim("the negatives loss on top: negatives", "dense+neg Neg", "dense Neg", +1, "better"))),
    "vlm": Paper(
        "An Introduction to Vision-Language Modeling", "2405.17247",
        "four training families on one data set", "vlm_answers.png",
        (Claim("CoCa's open answers against a blind reader, points", "coca VQA, open", "coca VQA blind, open", None),
         Claim("the frozen language model's", "frozen VQA, open", "frozen VQA blind, open", None),
         Claim("hard negatives against InfoNCE: swapped captions, points", "negclip cosine: swap", "infonce cosine: swap",
               None))),
}  # fmt: skip


def measured(claim: Claim, runs: dict[str, dict]) -> tuple[str, str]:
    """-> '+4.7 ± 4.5 (3 seeds)', mean and 95 % interval over seeds, '' without runs; whether it is what the paper says."""
    values = [r[claim.method] - (r[claim.base] if claim.base else 0.0) for r in runs.values()
              if {claim.method, claim.base} - {""} <= r.keys()]  # fmt: skip
    if not values:
        return "", "not run"
    mean, many = float(np.mean(values)), len(values) > 1
    text, half = f"{round(mean, claim.digits) + 0.0:+.{claim.digits}f}", 0.0  # + 0.0: no "-0.0"
    if many:
        half = STUDENT[min(len(values), 10)] * float(np.std(values, ddof=1)) / len(values) ** 0.5
        text += f" ± {half:.{claim.digits}f}"
    if not many:
        status = "one seed"
    elif abs(mean) <= half:
        status = "not clear" if claim.expects != 0 else "no effect seen"
    elif not claim.expects:
        status = "" if claim.expects is None else "an effect"
    else:
        status = "seen" if claim.expects * mean > 0 else "opposite"
    return f"{text} ({len(values)} seed{'s' * many})", status


def minutes(name: str) -> str:
    """Of the default run on two quiet CPU cores, as the header's Run lines say."""
    header = ast.get_docstring(ast.parse((ROOT / f"methods/{name}.py").read_text()))
    return re.search(r"([\d.]+) min on two quiet cores", header)[1]


def tables(results: dict) -> tuple[str, str]:
    """-> the README's table of ten, RESULTS.md's table of all claims."""
    ten = ["| | file and paper | idea | default run | ours, on the generated world | the paper, on its own data |",
           "|---|---|---|---|---|---|"]  # fmt: skip
    every, commits = ["| file | claim | ours | status | the paper |", "|---|---|---|---|---|"], []
    for name, paper in TEN.items():
        found = results.get(name, {"runs": {}, "commit": ""})
        rows = [(c, *measured(c, found["runs"])) for c in paper.claims]
        picture = f'<img src="methods/figures/{paper.figure}" alt="{name}" width="180">'
        link = f"[`{name}.py`](methods/{name}.py), [{paper.title}](https://arxiv.org/abs/{paper.arxiv})"
        ours = "<br>".join(
            f"{c.text}: **{value or 'not run'}**" + (f", {status}" if status else "") for c, value, status in rows[:2]
        )
        theirs = "<br>".join(c.paper for c in paper.claims[:2] if c.paper)
        ten.append(f"| {picture} | {link} | {paper.idea} | {minutes(name)} min | {ours} | {theirs} |")
        every += [f"| {name} | {c.text} | {value} | {status} | {c.paper} |" for c, value, status in rows]
        commits.append(f"{name} {', '.join(c[:7] + '+' * c.endswith('+') for c in found['commit'].split(', '))}")
    every.append(f"\nCommits of these runs (+: with changes that were not yet committed): {'; '.join(commits)}.")
    return "\n".join(ten), "\n".join(every)


def replaced(text: str, name: str, table: str) -> str:
    """text with what stands between <!-- NAME --> and <!-- end of NAME --> exchanged."""
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(\n<!-- end of {name} -->)", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"the marks <!-- {name} --> and <!-- end of {name} --> are missing")
    return pattern.sub(lambda m: m[1] + table + m[2], text)


def rewrite(results: dict) -> None:
    for path, name, table in zip((ROOT / "README.md", ROOT / "methods/RESULTS.md"), ("the ten", "claims"), tables(results)):
        new = replaced(path.read_text(), name, table)
        if new != path.read_text():
            path.with_suffix(".tmp").write_text(new)
            os.replace(path.with_suffix(".tmp"), path)


# Runs ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class All:
    preset: str = "laptop"  # of every method
    seeds: int = 3  # runs of each method, with seeds 0, 1, ...
    only: str = ""  # comma list of methods; "" = all ten
    out: str = "runs"  # folder of the runs, PRESET_METHOD_SEED, and of report.html


def run_all(cfg: All) -> None:
    names = cfg.only.split(",") if cfg.only else list(TEN)
    for name in names:
        if name not in TEN:
            raise ValueError(f"--only {name} is no method; choose from {', '.join(TEN)}")
        if cfg.preset not in importlib.import_module(f"methods.{name}").PRESETS:
            raise ValueError(f"--preset {cfg.preset} is unknown to {name}; all ten have smoke, laptop, gpu, paper")
    if cfg.seeds < 1:
        raise ValueError(f"--seeds {cfg.seeds} must be at least 1")
    jobs = [(name, seed) for seed in range(cfg.seeds) for name in names]  # a first result of all before a second of any
    out, failed = Path(cfg.out), []
    bar = tqdm(jobs, unit="run", dynamic_ncols=True)
    for name, seed in bar:
        bar.set_description(f"{name}, seed {seed}")
        error = run_one(name, seed, cfg.preset, out / f"{cfg.preset}_{name}_{seed}", bar)
        if error:
            failed.append(f"{name}, seed {seed}: {error}")
            bar.write(f"failed: {failed[-1]}")
    folders = {(n, s): out / f"{cfg.preset}_{n}_{s}" for n, s in jobs if (out / f"{cfg.preset}_{n}_{s}/printed.txt").exists()}
    (out / "report.html").write_text(report(folders, cfg.preset))
    print(f"report: {out / 'report.html'}")
    if cfg.preset == "laptop":
        collect(folders)
    if failed:
        raise ValueError(f"{len(failed)} of {len(jobs)} runs failed: {'; '.join(failed)[:600]}")


def run_one(name, seed, preset, folder, bar) -> str:
    """One method in a process of its own; what it prints goes to printed.txt, which is there when the run is done. -> error."""
    if (folder / "printed.txt").exists():
        return ""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, f"methods/{name}.py", "--preset", preset, "--seed", str(seed), "--out_dir", folder.resolve()]
    began, tail, pipe = time.monotonic(), b"", subprocess.PIPE
    with (open(folder / "printed.tmp", "wb") as printed,
          subprocess.Popen(command, cwd=ROOT, stdout=printed, stderr=pipe) as p):  # fmt: skip
        try:
            while piece := p.stderr.read1(1 << 16):
                tail = (tail + piece)[-4000:]
                line = re.split(rb"[\r\n]", tail.rstrip())[-1].decode(errors="replace")
                bar.set_postfix_str(line.rsplit("|", 1)[-1][-60:])
        except KeyboardInterrupt:  # the method has had it too: it saves and leaves
            p.wait()
            raise
    if p.returncode:
        return re.split(r"[\r\n]", tail.decode(errors="replace").strip())[-1] or f"status {p.returncode}"
    (folder / "seconds.txt").write_text(f"{time.monotonic() - began:.0f}\n")
    os.replace(folder / "printed.tmp", folder / "printed.txt")
    return ""


def collect(folders: dict) -> None:
    """The numbers of the claims go from each run's metrics.json to methods/results.json, and from there into the tables."""
    path = ROOT / "methods/results.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    for name in {n for n, _ in folders}:
        keys = {k for c in TEN[name].claims for k in (c.method, c.base) if k}
        runs, commits = {}, set()
        for (n, seed), folder in folders.items():
            if n == name:
                found = json.loads((folder / "metrics.json").read_text())
                runs[str(seed)] = {k: round(found[k], 6) for k in sorted(keys & found.keys())}
                commits |= {json.loads(p.read_text())["versions"]["commit"] for p in folder.rglob("config.json")}
        old = results.get(name, {"commit": "", "runs": {}})  # seeds that were not run now stay, with their commits
        commits |= set(filter(None, old["commit"].split(", "))) if old["runs"].keys() - runs.keys() else set()
        results[name] = {"commit": ", ".join(sorted(commits)), "runs": {**old["runs"], **runs}}
    write_json(path, {k: results[k] for k in TEN if k in results})
    rewrite(results)


def embedded(path: Path, width: int = 1100) -> str:
    """A picture as part of the page, made smaller if it is wider."""
    img = Image.open(path).convert("RGB")
    if img.width > width:
        img = img.resize((width, round(img.height * width / img.width)), Image.LANCZOS)
    blob = io.BytesIO()
    img.save(blob, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(blob.getvalue()).decode()}"


STYLE = """body{font:16px/1.5 system-ui,sans-serif;margin:0 auto;max-width:72rem;padding:0 1rem;color:#23262d}
h2{margin-top:3rem;border-top:1px solid #dee0e4;padding-top:1rem}
pre{overflow-x:auto;background:#f6f7f8;padding:.8rem;font-size:13px}
table{border-collapse:collapse}td,th{padding:.25rem .6rem;border-bottom:1px solid #dee0e4;text-align:left;vertical-align:top}
.wide{overflow-x:auto}figure{display:inline-block;margin:.5rem 1rem .5rem 0;max-width:100%;vertical-align:top}
figure img{max-width:100%;height:auto}figcaption{font-size:13px;color:#667}
nav{display:flex;flex-wrap:wrap;gap:.3rem 1rem;margin:1rem 0}"""


WIRED = ": a few updates each, which prove that everything is wired; the numbers mean nothing"


def report(folders: dict, preset: str) -> str:
    """One self-contained page: what every run printed, its curves and its pictures."""
    names = list(dict.fromkeys(n for n, _ in folders))
    esc = html.escape
    links = "".join(f"<a href=#{n}>{n}</a>" for n in names)
    page = [f"<!doctype html><html lang='en'><meta charset='utf-8'><meta name='viewport' content='width=device-width'>"
            f"<title>Ten vision papers</title><style>{STYLE}</style><h1>Ten vision papers, ten files</h1>"
            f"<p>Preset {esc(preset)}{WIRED * (preset == 'smoke')}.</p><nav>{links}</nav>"]  # fmt: skip
    rows = []
    for name in names:
        runs = {str(s): json.loads((f / "metrics.json").read_text()) for (n, s), f in folders.items() if n == name}
        cells = [(name, c.text, measured(c, runs)[0], c.paper) for c in TEN[name].claims if measured(c, runs)[0]]
        rows += ["<tr>" + "".join(f"<td>{esc(cell)}" for cell in row) for row in cells]
    page.append(f"<div class=wide><table><tr><th>file<th>claim<th>ours<th>the paper{''.join(rows)}</table></div>")
    for name in names:
        page.append(f"<h2 id={name}>{name}: {esc(TEN[name].title)}</h2><p>{esc(TEN[name].idea)}</p>")
        for (n, seed), folder in folders.items():
            if n != name:
                continue
            seconds = (folder / "seconds.txt").read_text().strip() if (folder / "seconds.txt").exists() else "?"
            text = (folder / "printed.txt").read_text(errors="replace").replace(str(folder.resolve()), folder.name)
            page.append(f"<h3>seed {seed}, {seconds} seconds</h3><pre>{esc(text.strip())}</pre>")
            patterns = ("*.png", "samples/*.png", "*/curves.png", "*/samples/*.png")
            found = [p for pattern in patterns for p in sorted(folder.glob(pattern))]
            shown = found[:12] if seed == 0 else found[:2]  # every picture of every seed would be a heavy page
            page += [f"<figure><img loading=lazy alt='{p.stem}' src='{embedded(p)}'><figcaption>"
                     f"{esc(p.relative_to(folder).as_posix())}</figcaption></figure>" for p in shown]  # fmt: skip
            if len(found) > len(shown):
                page.append(f"<p>{len(found) - len(shown)} more pictures are in the folder {folder.name}.</p>")
    return "\n".join(page)


def main(argv=None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if not argv:
        for path in sorted(Path(__file__).parent.glob("[a-z]*.py")):
            print(f"{path.stem:17} {ast.get_docstring(ast.parse(path.read_text())).splitlines()[0]}")
    elif argv[0] == "all":
        cli.main(run_all, All, argv=argv[1:])
    elif argv[0] == "tables" and len(argv) == 1:
        rewrite(json.loads((ROOT / "methods/results.json").read_text()))
    elif argv[0] in ("-h", "--help"):
        print(__doc__.strip())
    else:
        print(f"error: {argv[0]} is unknown; use: all, tables, or nothing", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
