"""Prompt optimisation: a language model rewrites the prompt until the pictures agree with what was asked for.

Paper      Manas, Astolfi, Hall, Ross, Urbanek, Williams, Agrawal, Romero-Soriano, Drozdzal: Improving Text-to-Image Consistency
           via Automatic Prompt Optimization. TMLR 2024, arXiv 2403.17804
Idea       A text-to-image model ignores parts of a prompt; the same content in other words comes out better. So draw pictures
           for a prompt, score how well they agree with the USER'S prompt, show a language model the best prompts so far with
           their scores, element by element, and ask for better ones. Repeat. Nothing is trained.
Equations  Sec. 3, loop -> optimise()     its message -> meta_prompt()     decomposed CLIPScore -> dcs()     Davidsonian scene
           graph, DSG: yes-or-no questions about a prompt's parts, some of which depend on others -> dsg_score()
Read first section 2, meta_prompt() and ChatClient in section 3, then run()
Symbols    p0 user prompt; f language model, g generator, S score; T iterations, n prompts each, m pictures each, k in history
Run        python methods/opt2i.py [--preset smoke]                         (CPU, no files; 3.2 min on two quiet cores)
           python methods/opt2i.py --llm_url URL --image_url URL --score dcs --prompts prompts.tsv --clip ...
           python methods/opt2i.py --replay RUN/exchanges.jsonl --out_dir AGAIN ...      (same options and machine, no server)
Data       generated prompts (common/scenes.py) with their questions; or PartiPrompts, DrawBench, COCO captions, DSG-1k
Expect     laptop: +21.3 DSG points on fresh seeds (+- 12.0, 95 % over 3 seeds); paraphrasing is as good (+0.9 +- 3.6); 4b02266
Differs    from the paper: all models are small stand-ins, and the language model sees the best prompt and its weakest element,
           no message: nothing reproduces the table. Gains also on fresh seeds: the best of many on m seeds is partly luck.
           Messages worded by us; a model that sends too few prompts is asked again; a search ends at its first perfect prompt;
           noun phrases by rule. From the DSG code: a failed parent fails all descendants; cells without a number are ignored.
Uses       common/ckpt.py cli.py data.py ddp.py dit.py log.py metrics.py plot.py resnet.py scenes.py tokenizer.py vae.py
           vit.py zoo.py and weights/   (copy these with this file)
"""

from __future__ import annotations

import base64
import hashlib
import http.client
import io
import json
import math
import os
import re
import secrets
import shlex
import subprocess
import sys
import tempfile
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]  # so that python, torchrun and python -m all find common/

from common import ckpt, cli, data, ddp, metrics, plot, scenes, zoo
from common.log import table, versions, write_json
from common.tokenizer import Tokenizer
from common.vit import load_clip, trim


# 1. CONFIG (presets stand in section 7) ------------------------------------------------------------------------------
@dataclass(frozen=True)
class Config:
    # run: the same names in all ten files
    out_dir: str = "runs/opt2i"  # one folder a run; one .json and one .png a prompt
    seed: int = 0  # of prompts, proposals and pictures
    steps: int = 8  # T, iterations; the paper: 30
    batch_size: int = 64  # pictures at once, of the stand-in
    accum: int = 1  # not used: nothing is trained
    lr: float = 0.0  # not used
    wd: float = 0.0  # not used
    warmup: int = 0  # not used
    grad_clip: float = 0.0  # not used
    ema_decay: float = 0.0  # not used
    dtype: str = "float32"  # not used
    compile: bool = False  # not used
    data: str = ""  # not used: see --prompts
    workers: int = 0  # not used
    log_every: int = 1  # not used
    eval_every: int = 0  # not used
    save_every: int = 1  # not used: prompts are saved as they finish
    resume: bool = True  # keep finished prompts
    # the method
    candidates: int = 5  # n, new prompts an iteration
    images: int = 4  # m, pictures of each prompt, always from the same seeds (a server may ignore them)
    history: int = 5  # k, best prompts shown to the language model
    target: float = 1.0  # stop when a prompt reaches this score; dCS has no perfect score
    score: str = "dsg"  # dsg or dcs
    lenient: bool = False  # a VQA server's "yes, there is" counts as yes; False: DSG's rule, yes alone
    official_dsg: bool = False  # only the parents' own answers count, as in the DSG code; same on generated prompts
    temperature: float = 1.0  # of the language model
    conciseness: bool = True  # meta-prompt: prefer substitutions and other orders to additions
    prioritise: bool = True  # meta-prompt: the elements with the lowest scores first
    reasoning: bool = False  # meta-prompt: think about the scores first
    structure: bool = False  # meta-prompt: simple words, foreground and background apart
    methods: str = "opt2i,paraphrase,oneshot,seeds"  # comma list, all of equal budget; 20x2: iterations x prompts
    fresh: int = 16  # pictures of new seeds on which first and best prompt are compared
    proposer: str = "lm"  # lm (the stand-in) or grammar (rules), without --llm_url
    llm_url: str = ""  # base url of an OpenAI-compatible server
    llm_model: str = ""  # its name; "" = the server's first
    llm_key: str = "OPENAI_API_KEY"  # NAME of the environment variable with the key
    max_tokens: int = 1024  # of an answer
    token_field: str = "max_tokens"  # newer hosted models want max_completion_tokens
    timeout: float = 120.0  # seconds a request
    replay: str = ""  # exchanges.jsonl of an earlier run: its answers, no request
    painter: str = "painter_middle"  # stand-in text-to-image model: painter_early, painter_middle, painter
    guidance: float = 3.0  # of the stand-in: classifier-free guidance; the paper: 7.5
    sampler_steps: int = 16  # of the stand-in
    image_command: str = ""  # command that writes a picture: {prompt}, {seed} and {out} are filled in, one call a picture
    image_url: str = ""  # base url of an OpenAI-style server with /images/generations; key: IMAGE_API_KEY
    image_model: str = ""  # its name, for servers that have several
    vqa_url: str = ""  # base url of a server that sees pictures and answers DSG's questions; key: VQA_API_KEY
    clip: str = ""  # CLIP weights for dcs; "" = the stand-in
    tokenizer: str = ""  # CLIP's merges file
    prompts: str = "12"  # number of generated prompts, or a file: PartiPrompts tsv, DrawBench or COCO csv, DSG-1k csv
    limit: int = 50  # prompts of a file, from its start, or of each of --challenges
    challenges: str = ""  # comma list of PartiPrompts' challenges; "" = the file as it is
    dry_run: bool = False  # print what would be spent, and end


# 2. THE IDEA (start reading here) ------------------------------------------------------------------------------------
@dataclass
class Scored:
    """A prompt, its score against the user prompt (DSG: in [0, 1]; dCS: a cosine; mean of its pictures), each element's."""

    prompt: str
    score: float
    elements: list[tuple[str, float]] = field(default_factory=list)


def optimise(prompt, generate, score, propose, iterations=30, candidates=5, history=5, target=1.0):
    """argmax over paraphrases p of p0 of E_{I ~ g(p)} [S(p0, I)], by asking f for better ones.

    generate(p) -> pictures, from the same seeds for every p; score(p0, pictures) -> (score, elements), ALWAYS against the
    user prompt; propose(p0, best k in increasing order, of equal ones the newest last, n) -> n prompts at once; repeats of
    earlier ones are dropped, not replaced. -> (best, trace): the Scored of every iteration, the user prompt alone first.
    Stops at the first prompt that reaches the target, also within an iteration. The user prompt may leave the history."""

    def evaluate(p):
        return Scored(p, *score(prompt, generate(p)))

    first = evaluate(prompt)
    trace, best, top, seen = [[first]], first, [first], {prompt.casefold()}
    for _ in range(iterations):
        if best.score >= target:
            break
        trace.append([])
        for p in propose(prompt, sorted(top, key=lambda s: s.score), candidates):
            if p.casefold() not in seen and len(trace[-1]) < candidates:  # no duplicates of anything in the run
                seen.add(p.casefold())
                trace[-1].append(evaluate(p))
                if trace[-1][-1].score >= target:
                    break
        top = sorted(top + trace[-1], key=lambda s: -s.score)[:history]  # stable: ties keep the earlier one
        best = max([best, *trace[-1]], key=lambda s: s.score)
    return best, trace


def dsg_score(answers, parents, transitive=True):  # twin: dsg_score
    """Share of questions with "yes", where a question counts as failed if one that it depends on failed.

    answers {id: bool}; parents {id: ids}, unknown ids and an id itself are ignored. transitive: a failure reaches all
    descendants, in any order of the file, cycles included; False: the official scorer, which looks at the parents' own
    answers only, so that a grandchild of a failed question may count."""
    if not answers:
        return float("nan")
    failed = {q for q, yes in answers.items() if not yes}
    while True:
        hit = {q for q in answers if q not in failed and any(p in failed and p != q for p in parents.get(q, ()))}
        failed |= hit
        if not (hit and transitive):
            return 1 - len(failed) / len(answers)


def dcs(f_img, f_phrases):
    """Decomposed CLIPScore: pictures (m, d), noun phrases of the user prompt (J, d) -> (m, J) plain cosines; the score is their
    mean, an element's score the mean over pictures."""
    return F.normalize(f_img.double(), dim=1) @ F.normalize(f_phrases.double(), dim=1).T


def noun_phrases(text):
    """The user prompt's noun phrases by rule: cut at commas, "and", prepositions, some verbs; no articles."""
    kinds = "photo|photograph|picture|image|portrait|painting|drawing|sketch|illustration"  # also "an old oil painting of"
    text = re.sub(rf"^\s*(an?|the)?\s*([\w-]+\s+){{0,2}}({kinds})s?\s+of\s+", "", text.strip(), flags=re.I)
    text = re.sub(r"\bblack and white\b", "black-and-white", text, flags=re.I)
    text = re.sub(r"^\s*(there (is|are)|we see)\s+", "", text, flags=re.I)
    cut = (r"[,.;:](?=\s|$)|(?<![\w-])(?:and|with|on top of|to the (?:left|right) of|next to|in front of|on|in|at|of|"
           r"by|above|below|over|under|behind|near|from|into|is|are|sits?|standing|sitting|holding|wearing|riding)"
           r"(?![\w-])")  # fmt: skip
    articles = re.compile(r"^(?:an?|the|some|its|his|her|their)\s+", re.I)
    parts = [articles.sub("", p.strip()) for p in re.split(cut, text, flags=re.I)]
    return list(dict.fromkeys(p for p in parts if re.search(r"\w", p))) or [text]


# 3. MODULES: the message, its answer, the client, the offline proposers ------------------------------------------------------
def as_100(x):
    return max(0, min(100, round(100 * x)))


FORM = ["1. <PROMPT>paraphrase 1</PROMPT>", "2. <PROMPT>paraphrase 2</PROMPT>", "..."]


def meta_prompt(prompt, history, n, kind="dsg", conciseness=True, prioritise=True, reasoning=False, structure=False):
    """-> (system, user) messages. history: Scored in increasing order; scores become whole numbers, 0 to 100."""
    what = "question about the picture" if kind == "dsg" else "visual element"
    system = ("You are an expert in writing prompts for text-to-image models. Such a model draws a picture from a text, and it "
              "often leaves out or confuses parts of it. Answer briefly and to the point.")  # fmt: skip
    lines = [f'The user asked for this picture: "{prompt}"',
             f"Below are prompts that were tried for it. Under each stands its score and the score of every {what}. Scores go "
             "from 0 to 100, higher is better; the prompts are in increasing order of their score.", ""]  # fmt: skip
    for i, s in enumerate(history, 1):
        lines += [f"{i}. {s.prompt}", f"score: {as_100(s.score)}", *(f"- {e}: {as_100(v)}" for e, v in s.elements), ""]
    lines.append(f"Write {n} paraphrases of the user's prompt that keep its meaning and score higher than all of the above.")
    if prioritise:
        lines.append("Give most attention to " + ("the questions that are not yet answered with yes." if kind == "dsg" else
                                                  "the visual elements with the lowest scores."))  # fmt: skip
    if conciseness:
        lines.append("Rather replace and reorder words than add new ones.")
    if structure:
        lines.append("Use simple words, and describe the foreground and the background separately.")
    if reasoning:
        lines.append("First explain in at most two sentences why some elements score high and others low.")
    lines.append(f"{'Then give' if reasoning else 'Give'} all {n} prompts, each on a line of its own and between tags, in this "
                 "form:")  # fmt: skip
    return system, "\n".join([*lines, *FORM])


def paraphrase_prompt(prompt, n):
    """The random-paraphrase baseline's message: no role, no history, no scores."""
    return "", "\n".join([f'Write {n} different paraphrases of this sentence that keep its meaning: "{prompt}"',
                          "Each on a line of its own and between tags, in this form:", *FORM])  # fmt: skip


def without_thoughts(text) -> str:
    """What follows a reasoning model's <think>...</think>; of a thought that never ends, what came before it."""
    close = max((m.end() for m in re.finditer(r"</think(?:ing)?>", text, flags=re.I)), default=0)
    return re.split(r"<think(?:ing)?>", text[close:], maxsplit=1, flags=re.I)[0]


def parse_candidates(text, limit=1000) -> list[str]:
    """The prompts in an answer, whatever it looks like: text between tags, else after broken ones, else numbered lines. Left
    out: reasoning, surrounding quotes, repeats, empty ones, the message's placeholders, prompts of 77 words or more."""
    text = text[:200_000].encode("utf-8", "replace").decode()  # lone surrogates cannot be written to a file
    text = without_thoughts(re.sub(r"[\0-\x08\x0b-\x1f]", " ", text))
    tag = r"<[ \t]{0,3}(/?)[ \t]{0,3}prompt(?![a-z])(?:[ \t]{0,3}\d{1,4}|[ \t]{1,3}[a-z]{1,9}=[^<>\n]{0,60})?[ \t]{0,3}>?"
    tags = list(re.finditer(tag, text, flags=re.I))
    ends = [m.start() for m in tags[1:]] + [len(text)]
    found = [re.split(r"\n[ \t]{0,9}(?:\d{1,4}[.)]|\n)", text[m.end() : end], maxsplit=1)[0]
             for m, end in zip(tags[:limit], ends) if not m[1]]  # fmt: skip
    found = [f for f in found if not re.match(r"[^\n]{0,40}:[ \t]*(\n|$)", f)]  # "between <PROMPT> tags:", which is only talk
    found = [f for f in found if f.strip()] or re.findall(r"^[ \t]{0,9}\d{1,4}[ \t]{0,3}[.):](.+)$", text, flags=re.M)
    out, seen = [], set()
    for raw in found[:limit]:
        p = re.sub(r"^\d{1,4}[.)] ", "", " ".join(raw.split())).strip(" <>")
        p = p[1:-1].strip() if p[:1] + p[-1:] in ('""', "''", "“”", "‘’") and len(p) > 1 else p
        placeholder = re.fullmatch(r"paraphrase \d+|\.+|and", p, flags=re.I)
        if p and p.casefold() not in seen and len(p.split()) < 77 and len(p) < 1000 and not placeholder:
            seen.add(p.casefold())
            out.append(p)
    return out


class ServerError(ValueError):
    """A request that failed for good, with one sentence that says why. status: that of HTTP, or 0."""

    def __init__(self, text, status=0):
        super().__init__(text)
        self.status = status


class Refused(ServerError):
    """This prompt will not be drawn; another may be. Generators raise it."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirected request would take the key to another host."""

    def redirect_request(self, *args):
        return None


class ChatClient:
    """Any OpenAI-compatible server, by the standard library. chat(system, user) -> text. Every exchange is appended to `log`, a
    JSONL file; replay: such a file, whose answers are given again in order, message by message, without a request.

    408, 409, 425, 429, 5xx, timeouts and broken connections are tried again with growing pauses, other statuses are errors. A
    server that refuses the system role gets its text before the user's. What a server says is data, never run."""

    def __init__(self, base_url, model="", key="", timeout=120.0, retries=5, pause=1.0, temperature=1.0, max_tokens=1024,
                 token_field="max_tokens", log=None, replay=None):  # fmt: skip
        if not key.isprintable() or not key.isascii():
            raise ValueError("the key in the environment holds a line break or another character that no header can carry")
        if base_url and not re.fullmatch(r"https?://[!-~]+", base_url):
            raise ValueError(f"{base_url} is no server's address: it begins with http:// or https://, without spaces after it")
        self.base, self.model, self.key, self.timeout = base_url.rstrip("/"), model, key.strip() or "none", timeout
        self.retries, self.pause, self.fold, self.log = retries, pause, False, log
        self.options, self.most = {"temperature": temperature}, {token_field: max_tokens}
        self.usage = {"requests": 0, "prompt_tokens": 0, "completion_tokens": 0}
        self.answers = _read_exchanges(replay) if replay else None
        self.task, self.attempt = 0, secrets.token_hex(4)  # of a run that was stopped and went on, the last attempt counts

    def request(self, path, body=None):
        """One exchange with retries -> parsed JSON object."""
        opener = urllib.request.build_opener(_NoRedirect)
        data_ = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self.key}"}
        for attempt in range(self.retries + 1):
            try:
                self.usage["requests"] += 1
                call = urllib.request.Request(self.base + path, data_, headers)
                until = time.monotonic() + self.timeout
                with opener.open(call, timeout=self.timeout) as r:
                    reply = json.loads(_body(r, until))
                if not isinstance(reply, dict):
                    raise ValueError("its answer is not an object")
                return reply
            except urllib.request.HTTPError as error:
                problem = f"status {error.code}: {_start(error)}"
                if error.code not in (408, 409, 425, 429) and error.code < 500:
                    raise ServerError(f"{self.base}{path} refused the request with {problem}", error.code) from error
            except (OSError, ValueError, http.client.HTTPException, RecursionError) as error:  # down, slow, cut off, not JSON
                problem = f"{type(error).__name__}: {error}"
            if attempt < self.retries:
                time.sleep(self.pause * 2**attempt)
        raise ServerError(f"{self.base}{path} failed {self.retries + 1} times, the last time with {problem}")

    def chat(self, system, user, images=(), room=1) -> str:
        """The answer's text; "" if the server sent none. images: PNG bytes shown beside the question. room: times as many
        tokens, for an answer that was cut off."""
        sent = b"\0".join([system.encode(), user.encode(), f"{len(images)}".encode(), *images])
        key = hashlib.blake2b(sent, digest_size=12).hexdigest()
        if self.answers is not None:
            kept = self.answers.get(key)
            if not kept:
                raise ServerError("the replayed run never sent this message; use its settings, or a server")
            return kept.pop(0) if len(kept) > 1 else kept[0]
        if not self.model:
            names = self.request("/models").get("data")
            if not (isinstance(names, list) and names and isinstance(names[0], dict) and names[0].get("id")):
                raise ServerError(f"{self.base}/models names no model; pass one")
            self.model = names[0]["id"]
        urls = ["data:image/png;base64," + base64.b64encode(i).decode() for i in images]
        shown = [{"type": "image_url", "image_url": {"url": url}} for url in urls]

        def messages():
            text = f"{system}\n\n{user}" if system and self.fold else user
            content = [{"type": "text", "text": text}, *shown] if shown else text
            first = [{"role": "system", "content": system}] if system and not self.fold else []
            return [*first, {"role": "user", "content": content}]

        most = {k: v * room for k, v in self.most.items()}
        body = {"model": self.model, "messages": messages(), **self.options, **most, "stream": False}
        try:
            reply = self.request("/chat/completions", body)
        except ServerError as error:
            if self.fold or not system or error.status != 400 or "system" not in str(error).lower():
                raise
            self.fold = True
            body["messages"] = messages()
            reply = self.request("/chat/completions", body)
        text = _content(reply, whole=bool(images))
        usage = reply.get("usage") if isinstance(reply.get("usage"), dict) else {}
        for name in ("prompt_tokens", "completion_tokens"):
            self.usage[name] += usage[name] if isinstance(usage.get(name), int) else 0
        if self.log:
            with open(self.log, "a", encoding="utf-8") as f:
                sent = {"key": key, "model": self.model, "system": system, "user": user}
                f.write(json.dumps({"task": self.task, "attempt": self.attempt, **sent, "answer": text}) + "\n")
        return text


def _body(answer, until, most=64 << 20) -> bytes:
    """All of an answer, by `until`: a socket's timeout bounds each piece only, a server that drips would keep us for ever."""
    out = b""
    while len(out) < most and (piece := answer.read1(1 << 20)):
        out += piece
        if time.monotonic() > until:
            raise TimeoutError("the answer took longer than --timeout")
    return out


def _start(answer) -> str:
    try:
        return answer.read(300).decode("utf-8", "replace").strip()
    except (OSError, http.client.HTTPException):
        return "no text"


def _content(reply, whole=False) -> str:
    """choices[0].message.content of any answer, "" where it is missing or not a text. An answer that was cut off ends with its
    last whole prompt, or with its last whole line; whole: with what there is, as the yes before a long reason."""
    try:
        text, cut = reply["choices"][0]["message"]["content"], reply["choices"][0].get("finish_reason") == "length"
    except (KeyError, IndexError, TypeError, AttributeError):
        return ""
    if not isinstance(text, str):
        return ""
    last = text.lower().rfind("</prompt>")
    return text if whole or not cut else text[: last + len("</prompt>")] if last >= 0 else text.rpartition("\n")[0]


def _read_exchanges(path) -> dict[str, list[str]]:
    out: dict[str, list[str]] = {}
    try:
        lines = [json.loads(line) for line in Path(path).read_text("utf-8").splitlines()]
        last = {r["task"]: r["attempt"] for r in lines}
        for r in lines:
            if r["attempt"] == last[r["task"]]:
                out.setdefault(r["key"], []).append(r["answer"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--replay {path} is not the exchanges.jsonl of a run ({type(error).__name__})") from error
    return out


class HttpProposer:
    """f by a server; without a history it paraphrases. If fewer than n prompts come, it is shown what it gave and asked for the
    rest, until an answer brings nothing new; an answer without any is asked for once more, with more room."""

    def __init__(self, client, cfg):
        self.client, self.cfg = client, cfg

    def propose(self, prompt, history, n):
        c = self.cfg
        system, user = (meta_prompt(prompt, history, n, c.score, c.conciseness, c.prioritise, c.reasoning, c.structure)
                        if history else paraphrase_prompt(prompt, n))  # fmt: skip
        out, known, room = [], {prompt.casefold()}, 1
        while len(out) < n and room <= 2:
            given = "".join(f"<PROMPT>{p}</PROMPT>\n" for p in out)
            more = f"\n\nYou gave\n{given}Give {n - len(out)} others, between <PROMPT> and </PROMPT>." if out else ""
            new = [p for p in parse_candidates(self.client.chat(system, user + more, room=room)) if p.casefold() not in known]
            if not new and out:
                break
            room += not new
            out, known = out + new, known | {p.casefold() for p in new}
        if not out:
            print(f"no prompt in the language model's answers for {prompt[:60]!r}; it stays as it is", file=sys.stderr)
        return out[:n]


class Grammar:
    """f by rules, for captions of the generated world: weak elements to the front, other words, another order."""

    def __init__(self, seed=0):
        self.rng = np.random.default_rng(seed)

    def propose(self, prompt, history, n):
        out = []
        for _ in range(20 * n):
            base = history[-1] if history and self.rng.random() < 0.7 else Scored(prompt, 0.0)
            weights = np.array([1.0001 - v for _, v in base.elements])
            weak = str(self.rng.choice([e for e, _ in base.elements], p=weights / weights.sum())) if len(weights) else ""
            p = zoo.reworded(base.prompt, weak, self.rng)
            if p != prompt and p not in out and zoo.same_meaning(p, prompt):
                out.append(p)
            if len(out) == n:
                break
        return out


class LmProposer:
    """f by the small stand-in. What does not keep p0's meaning is thrown away; rules fill up."""

    def __init__(self, seed, temperature=1.0):
        self.net, self.tok, self.temperature = zoo.load_rewriter(), zoo.load_tokenizer(), temperature
        self.generator, self.rules = torch.Generator().manual_seed(seed), Grammar(seed)

    def propose(self, prompt, history, n):
        best = history[-1] if history else Scored(prompt, 0.0)
        weak = min(best.elements, key=lambda e: e[1])[0] if best.elements else ""
        ids, out = zoo.rewriter_ids(self.tok, prompt, best.prompt, weak), []
        for row in self.net.write(ids, 4 * n, self.tok.end, self.generator, self.temperature).tolist():
            p = self.tok.decode(row)
            if p != prompt and p not in out and zoo.same_meaning(p, prompt):
                out.append(p)
        if len(out) < n:
            out += [p for p in self.rules.propose(prompt, history, n) if p not in out]
        return out[:n]


# 4. DATA: prompts with questions, generators, scorers ------------------------------------------------------------------------
@dataclass
class Task:
    """A user prompt and its questions {id: text}, parents {id: ids}."""

    prompt: str
    questions: dict = field(default_factory=dict)
    parents: dict = field(default_factory=dict)


def make_tasks(cfg) -> list[Task]:
    """Two related objects, the background named first: the picture models were trained on captions that end with it and
    follow this order less well, so that a better wording exists. Asked is what the prompt names: not "solid", not places."""
    out = []
    for i in range(int(cfg.prompts)):
        s = scenes.scene(i, cfg.seed * 1000 + 800, (2, 2), grid=2)
        asked = [q for q in scenes.questions(s) if q["kind"] != "place" and "solid" not in q["about"]]
        texts, parents = ({q["id"]: q[k] for q in asked} for k in ("text", "parents"))
        out.append(Task(zoo.ground_first(scenes.caption(s)), texts, parents))
    return out


def read_tasks(path, limit, challenges="") -> list[Task]:
    """PartiPrompts (tsv: Prompt, Challenge), DrawBench (csv: Prompt), COCO (csv: image_id, caption; the first of an image),
    DSG-1k (csv: item_id, text, proposition_id, dependency, question_natural_language); plain or .gz."""
    try:
        rows = data.read_rows(path)
        if "question_natural_language" in rows[0]:
            tasks: dict[str, Task] = {}
            for r in rows:
                task = tasks.setdefault(r["item_id"], Task(r["text"]))
                task.questions[r["proposition_id"]] = r["question_natural_language"]
                numbers = re.findall(r"(?<![\w])\d+(?![\w])", r["dependency"] or "")
                task.parents[r["proposition_id"]] = [n for n in numbers if n != "0"]
            kept = list(tasks.values())[:limit]
            unknown = sum(p not in t.questions for t in kept for ids in t.parents.values() for p in ids)
            if unknown:
                print(f"{path}: {unknown} parents of questions are no questions and are ignored", file=sys.stderr)
            return kept
        name = "Prompt" if "Prompt" in rows[0] else "caption"
        if challenges:
            parts = [[r for r in rows if r["Challenge"] == c][:limit] for c in challenges.split(",")]
            if not all(parts):
                raise ValueError(f"--challenges {challenges} are not all in it")
            rows, limit = [r for part in parts for r in part], None
        group = "image_id" if "image_id" in rows[0] else name
        first: dict[str, str] = {}
        for r in rows:
            if r[name]:
                first.setdefault(r[group], r[name])
        return [Task(t) for t in first.values()][:limit]
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise ValueError(f"--prompts {path} is not a table of PartiPrompts, DrawBench, COCO or DSG-1k "
                         f"({type(error).__name__}: {error})") from error  # fmt: skip


def make_generator(cfg, device):
    """-> draw(prompt, count, seed) -> list of PIL images or a tensor (count, 3, S, S) in [-1, 1]. Picture j of a seed starts
    from the same noise for every prompt, where the generator has seeds."""
    if cfg.image_command:
        return lambda prompt, count, seed: [by_command(cfg, prompt, seed * 1000 + j) for j in range(count)]
    if cfg.image_url:
        client = ChatClient(cfg.image_url, cfg.image_model, os.environ.get("IMAGE_API_KEY", ""), cfg.timeout)
        return lambda prompt, count, seed: [by_endpoint(client, prompt, seed * 1000 + j) for j in range(count)]
    painter = zoo.load_painter(cfg.painter).to(device)
    options = dict(guidance=cfg.guidance, steps=cfg.sampler_steps, part=cfg.batch_size)
    return lambda prompt, count, seed: painter.draw([prompt] * count, seed=seed, **options)


def by_command(cfg, prompt, seed):
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "picture.png")
        values = {"{prompt}": prompt, "{seed}": str(seed), "{out}": str(out)}  # in one pass: a prompt may hold such a word
        filled = [re.sub(r"\{prompt\}|\{seed\}|\{out\}", lambda m: values[m[0]], a) for a in shlex.split(cfg.image_command)]
        for _ in range(2):  # a failure that is not the prompt's may pass
            try:
                done = subprocess.run(filled, capture_output=True, errors="replace", timeout=cfg.timeout)  # no shell
                problem = f"status {done.returncode}: {(done.stderr.strip().splitlines() or [''])[-1][:200]}"
                if not done.returncode and out.exists():
                    break
            except subprocess.TimeoutExpired:
                problem = f"it took longer than --timeout {cfg.timeout:g} s"
            except (OSError, ValueError) as error:
                raise ValueError(f"--image_command {filled[0]} cannot be run ({type(error).__name__})") from error
        else:
            raise Refused(f"--image_command {filled[0]} wrote no picture, {problem}")
        return data.decode_image(out.read_bytes(), str(out))


def by_endpoint(client, prompt, seed):
    """OpenAI-style image endpoint, one picture a request, since not every server knows n; some know a seed."""
    body = {"prompt": prompt, "n": 1, "response_format": "b64_json", "seed": seed}
    body |= {"model": client.model} if client.model else {}
    try:
        reply = client.request("/images/generations", body)
    except ServerError as error:
        if error.status in (400, 413, 422):
            raise Refused(str(error)) from error
        raise
    try:
        blob = base64.b64decode(reply["data"][0]["b64_json"])
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ServerError(f"{client.base}/images/generations sent no data[0].b64_json") from error
    return data.decode_image(blob, "the server's picture")


class Scorer:
    """S(p0, pictures) -> (score, elements, score of each picture) of a task, by DSG or dCS. log: of a VQA server's answers."""

    def __init__(self, cfg, device, log=None):
        self.cfg, self.device = cfg, device
        if cfg.score == "dsg" and not cfg.vqa_url:
            self.reader = zoo.load_vqa().to(device)
        elif cfg.score == "dcs":
            self.clip = (load_clip(cfg.clip) if cfg.clip else zoo.load_clip()).to(device).eval()
            self.tok = Tokenizer.from_clip(cfg.tokenizer) if cfg.clip else zoo.load_tokenizer()
        self.server = ChatClient(cfg.vqa_url, "", os.environ.get("VQA_API_KEY", ""), cfg.timeout, temperature=0.0, log=log,
                                 max_tokens=cfg.max_tokens, token_field=cfg.token_field) if cfg.vqa_url else None  # fmt: skip
        self.asked = self.unclear = 0  # answers of the server; those that are neither yes nor no

    def __call__(self, task, images):
        return self.dsg(task, images) if self.cfg.score == "dsg" else self.dcs(task, images)

    def answers(self, task, images) -> list[dict]:
        """For each picture {question id: bool}: by the server, or by the stand-in for generated prompts."""
        if not self.server:
            said = self.reader.answer(images.to(self.device), [list(task.questions.values())] * len(images))
            return [dict(zip(task.questions, row)) for row in said]
        out = []
        for img in images:
            png = io.BytesIO()
            img.save(png, format="PNG")
            heard = 1 if self.cfg.lenient else None  # words of an answer that count
            said = {i: said_words(self.server.chat("", f"{text} Answer yes or no.", [png.getvalue()]))[:heard]
                    for i, text in task.questions.items()}  # fmt: skip
            self.asked += len(said)
            self.unclear += sum(words not in (["yes"], ["no"]) for words in said.values())
            out.append({i: words == ["yes"] for i, words in said.items()})
        return out

    def dsg(self, task, images):
        answers = self.answers(task, images)
        scores = [dsg_score(a, task.parents, not self.cfg.official_dsg) for a in answers]
        elements = [(t, float(np.mean([a[i] for a in answers]))) for i, t in task.questions.items()]
        return float(np.mean(scores)), elements, scores

    @torch.no_grad()
    def dcs(self, task, images):
        phrases = noun_phrases(task.prompt)
        if isinstance(images, torch.Tensor):
            images = [Image.fromarray(i) for i in to_uint8(images)]
        side = self.clip.visual.image_size
        f_img = self.clip.encode_image(metrics.clip_input(images, side).to(self.device))
        f_txt = self.clip.encode_text(trim(self.tok(phrases, self.clip.text.context)).to(self.device))
        cos = dcs(f_img, f_txt)
        return cos.mean().item(), list(zip(phrases, cos.mean(0).tolist())), cos.mean(1).tolist()


def said_words(text) -> list[str]:
    """An answer's words, without case, punctuation and reasoning. DSG's rule: yes is yes alone; --lenient: what begins so."""
    return re.findall(r"\w+", without_thoughts(text).lower())


def to_uint8(x):
    return ((x.clamp(-1, 1) + 1) * 127.5 + 0.5).to(torch.uint8).permute(0, 2, 3, 1).numpy()


# 5. EVALUATE ---------------------------------------------------------------------------------------------------------------
@dataclass
class Found:
    """What a method found for a prompt: the best, the trace of optimise(), the score of every picture in the order drawn, the
    pictures of the first prompt and of the best, the seconds of the search, and those of it in the generator and the scorer."""

    best: Scored
    trace: list
    pictures: list[float]
    shown: list
    seconds: float
    drawing: float


def iterations_of(method, cfg) -> tuple[int, int]:
    """T, n of a method: iterations and new prompts in each; all methods have the same T x n. Any other method is named TxN,
    like 20x2: a point between exploitation (many iterations) and exploration (many prompts at once), paper Fig. 5."""
    if "x" in method:
        return tuple(map(int, method.split("x")))
    return (cfg.steps, cfg.candidates) if method == "opt2i" else (1, cfg.steps * cfg.candidates)


def search(method, task, draw, scorer, proposer, cfg) -> Found:
    """One method on one prompt. All have the same number of prompts and pictures at most."""
    began, drawing, pictures, shown, top = time.perf_counter(), 0.0, [], [], -math.inf
    worst = 0.0 if cfg.score == "dsg" else -1.0  # a prompt without pictures

    def generate(p, seed=cfg.seed):
        nonlocal drawing
        t = time.perf_counter()
        try:
            return draw(p, cfg.images, seed)
        except (Refused, data.BadSample) as error:  # a bad prompt, not the end of the run
            if p == task.prompt and seed == cfg.seed:
                raise
            print(f"no picture for {p[:60]!r}: {error}", file=sys.stderr)
            return None
        finally:
            drawing += time.perf_counter() - t

    def score(_, images):  # scorers know the user prompt by the task
        nonlocal drawing, shown, top
        t = time.perf_counter()
        mean, elements, each = (worst, [], []) if images is None else scorer(task, images)
        pictures.extend(each)
        if mean > top:
            shown, top = [*shown[:1], images], mean
        drawing += time.perf_counter() - t
        return mean, elements

    iterations, n = iterations_of(method, cfg)
    if method == "seeds":  # the user prompt with as many other seeds: the best m pictures of all
        first = Scored(task.prompt, *score(task.prompt, generate(task.prompt)))
        for i in range(n):
            score(task.prompt, generate(task.prompt, cfg.seed + 1 + i))
        best = Scored(task.prompt, top_k_mean(pictures, cfg.images))
        trace = [[first], [best]]
    else:  # oneshot is one iteration, whose history holds the user prompt alone
        propose = proposer.propose if method != "paraphrase" else lambda p, history, n: proposer.propose(p, [], n)
        best, trace = optimise(task.prompt, generate, score, propose, iterations, n, cfg.history, cfg.target)
    return Found(best, trace, pictures, [shown[0], shown[-1]], time.perf_counter() - began, drawing)


def top_k_mean(scores, k):
    """Post-hoc selection: mean of the k best-scored pictures; falls with k, at k = all it is the mean."""
    return float(np.mean(sorted(scores, reverse=True)[:k]))


def gain(first, best, kind):
    """DSG: points (a prompt may start at 0). dCS: percent of the first score; NaN where that is no positive cosine."""
    if kind == "dsg":
        return 100 * (best - first)
    return 100 * (best / first - 1) if first > 0 else math.nan


def solve_task(i, task, draw, scorer, cfg, out, client) -> dict:
    """All methods on one prompt, with the comparison on fresh seeds; saved as JSON, method by method, and a sheet of pictures.
    -> seconds of each search: (in the generator and the scorer, all)."""
    result, clock, fresh = {"prompt": task.prompt, "methods": stored(out, i).get("methods", {})}, {}, cfg.seed + 500_000

    def begin(part):
        for server in filter(None, (client, getattr(scorer, "server", None))):
            server.task = f"{i} {part}"

    begin("fresh seeds")
    base = scorer(task, draw(task.prompt, cfg.fresh, fresh))[0]

    def with_fresh_seeds(p):
        try:
            return base if p == task.prompt else scorer(task, draw(p, cfg.fresh, fresh))[0]
        except (Refused, data.BadSample):
            return math.nan

    for method in (m for m in cfg.methods.split(",") if m not in result["methods"]):
        begin(method)
        proposer = (HttpProposer(client, cfg) if client else Grammar(cfg.seed + i) if cfg.proposer == "grammar" else
                    LmProposer(cfg.seed + i, cfg.temperature))  # fmt: skip
        found = search(method, task, draw, scorer, proposer, cfg)
        best, trace, clock[method] = found.best, found.trace, (found.drawing, found.seconds)
        result["methods"][method] = {
            "first": trace[0][0].score, "best": best.score, "prompt": best.prompt, "fresh_first": base,
            "fresh_best": math.nan if method == "seeds" else with_fresh_seeds(best.prompt),
            "iterations": len(trace) - 1, "prompts": sum(map(len, trace)), "pictures": len(found.pictures),
            "picture_scores": found.pictures, "curve": [[s.score for s in part] for part in trace],
            "texts": [[s.prompt for s in part] for part in trace],
            "words": len(best.prompt.split()), "elements": best.elements}  # fmt: skip
        if [method] == searched(cfg)[:1]:
            draw_sheet(trace, best, found.shown, out / f"{i:03d}.png")
        write_json(out / f"{i:03d}.json", result)
    return clock


def searched(cfg) -> list[str]:
    """The methods that change the prompt; the first of them is shown."""
    return [m for m in cfg.methods.split(",") if m != "seeds"]


def selections(results, cfg) -> tuple[list[int], dict[str, list[float]]]:
    """Post-hoc selection (paper, Sec. 3.5): -> numbers k, method -> mean score of its k best pictures, DSG in percent, cosines
    times 100; over prompts that were not right at once. Of every search the pictures up to the number that the shortest one
    drew: the best of many are better than the best of few. For searches of full length pass --target 2."""
    some = [r["methods"] for r in results if all(not right_at_once(m, cfg) for m in r["methods"].values())]
    most = min((len(m["picture_scores"]) for s in some for m in s.values()), default=0)
    ks = [k for k in (1, 4, 10, 25, 50, 100, 200, 400, 600) if k < most]
    if most:
        ks.append(most)
    return ks, {name: [100 * float(np.mean([top_k_mean(s[name]["picture_scores"][:most], k) for s in some])) for k in ks]
                for name in cfg.methods.split(",")}  # fmt: skip


def right_at_once(found, cfg) -> bool:
    """The user's prompt has nothing to gain; a cosine always has."""
    return cfg.score == "dsg" and found["first"] >= 1


def mean_error(values) -> tuple[float, float]:
    """Mean and its standard error over prompts, without NaN."""
    v = np.array([x for x in values if not math.isnan(x)])
    return (v.mean() if len(v) else math.nan), (v.std(ddof=1) / math.sqrt(len(v)) if len(v) > 1 else math.nan)


def overlap(a, b) -> float:
    """Share of the words of two prompts that both have: how near the best one stays to the user's."""
    a, b = (set(re.findall(r"\w+", t.lower())) for t in (a, b))
    return len(a & b) / max(1, len(a | b))


def summary(results, cfg) -> tuple[list[list], dict]:
    """Rows: gain on the searched seeds, on fresh ones with its standard error over prompts, without prompts that were right at
    once, iterations, pictures up to the stop. "seeds" selects pictures, so that fresh ones say nothing."""
    rows, out, fresh = [], {}, {}
    for method in cfg.methods.split(","):
        some = [r["methods"][method] for r in results]
        fresh[method] = [gain(s["fresh_first"], s["fresh_best"], cfg.score) for s in some]
        hard = [g for g, s in zip(fresh[method], some) if not right_at_once(s, cfg)]
        searched_hard = [gain(s["first"], s["best"], cfg.score) for s in some if not right_at_once(s, cfg)]
        kept = [overlap(r["prompt"], s["prompt"]) for r, s in zip(results, some)]
        mean, error = mean_error(fresh[method])
        values = {"gain": mean_error([gain(s["first"], s["best"], cfg.score) for s in some])[0], "fresh_gain": mean,
                  "fresh_error": error, "fresh_gain_hard": mean_error(hard)[0], "gain_hard": mean_error(searched_hard)[0],
                  "overlap": 100 * np.mean(kept),
                  **{k: np.mean([s[k] for s in some]) for k in ("iterations", "pictures", "words")}}  # fmt: skip
        out |= {f"{method}_{k}": float(v) for k, v in values.items()}
        rows.append([method, f"{values['gain']:+.1f}", *(["", ""] if method == "seeds" else
                     [f"{mean:+.1f} +- {error:.1f}", f"{values['fresh_gain_hard']:+.1f}"]), f"{values['iterations']:.1f}",
                     f"{values['pictures']:.0f}", f"{values['words']:.0f}", f"{values['overlap']:.0f}"])  # fmt: skip
    if {"opt2i", "paraphrase"} <= fresh.keys():
        mean, error = mean_error([a - b for a, b in zip(fresh["opt2i"], fresh["paraphrase"])])
        rows.append(["opt2i - paraphrase", "", f"{mean:+.1f} +- {error:.1f}", "", "", "", "", ""])
    return rows, out


def set_metrics(tasks, results, draw, judge, cfg) -> dict:
    """Frechet distance, precision, recall and diversity of all pictures of the first prompts, and of the best ones."""
    device, method, n, out = next(judge.parameters()).device, searched(cfg)[0], cfg.fresh, {}
    world = scenes.render([scenes.scene(i, cfg.seed * 1000 + 900, (2, 2), grid=2) for i in range(512)], 32)

    @torch.no_grad()
    def features(images):
        return torch.cat([judge.features(p.to(device), 2).cpu() for p in images.split(256)])

    f_real = features(torch.from_numpy(world).permute(0, 3, 1, 2) / 127.5 - 1)
    for name in ("first", "best"):
        prompts = [t.prompt if name == "first" else r["methods"][method]["prompt"] for t, r in zip(tasks, results)]
        each = [features(draw(p, n, cfg.seed + 500_000)) for p in prompts]
        f = [F.normalize(v.double(), dim=1) for v in each]
        inner = [1 - ((v.sum(0).square().sum() - n) / (n * (n - 1))).item() for v in f] if n > 1 else [math.nan]
        fake = torch.cat(each)
        p = metrics.prdc(f_real, fake, 3)
        out |= {f"{name}_fd": metrics.frechet_distance(f_real, fake), f"{name}_precision": p["precision"],
                f"{name}_recall": p["recall"], f"{name}_diversity": float(np.mean(inner))}  # fmt: skip
    return out


# 6. TRAIN: nothing is; the loop over prompts -----------------------------------------------------------------------------
def check(cfg: Config) -> None:
    """One sentence for what a user can get wrong."""
    if cfg.data:
        raise ValueError("--data is not used here: prompts come by --prompts")
    cli.choose(cfg, score=("dsg", "dcs"), proposer=("lm", "grammar"), painter=("painter_early", "painter_middle", "painter"))
    for method in cfg.methods.split(","):
        if not (method in ("opt2i", "paraphrase", "oneshot", "seeds") or re.fullmatch(r"[1-9]\d{0,5}x[1-9]\d{0,5}", method)):
            raise ValueError(f"--methods {cfg.methods}: {method!r} is unknown; choose from opt2i, paraphrase, oneshot, seeds "
                             "and ITERATIONSxPROMPTS, like 20x2")  # fmt: skip
        if math.prod(iterations_of(method, cfg)) != cfg.steps * cfg.candidates:
            raise ValueError(f"--methods {method}: its prompts must be as many as --steps x --candidates, "
                             f"{cfg.steps * cfg.candidates}, or methods could not be compared")  # fmt: skip
    cli.within(cfg, "steps candidates images history fresh limit", 1)
    if cfg.prompts.isdigit() and int(cfg.prompts) < 1:
        raise ValueError(f"--prompts {cfg.prompts} must be at least 1, or a file")
    if not cfg.temperature > 0 and not (cfg.llm_url or cfg.replay):
        raise ValueError(f"--temperature {cfg.temperature} must be above 0 for the stand-in language model")
    try:
        empty = cfg.image_command and not shlex.split(cfg.image_command)
    except ValueError as error:
        raise ValueError(f"--image_command {cfg.image_command}: {error}") from error
    if empty:
        raise ValueError("--image_command names no program")
    for name, needs, there in (("challenges", "--prompts from a file", not cfg.prompts.isdigit()),
                               ("official_dsg", "--score dsg", cfg.score == "dsg"),
                               ("clip", "--score dcs", cfg.score == "dcs"), ("lenient", "--vqa_url", cfg.vqa_url),
                               ("image_model", "--image_url", cfg.image_url)):  # fmt: skip
        if getattr(cfg, name) and not there:
            raise ValueError(f"--{name} is for {needs}")
    if cfg.clip and not cfg.tokenizer:
        raise ValueError("--clip needs --tokenizer, CLIP's merges file")
    if cfg.score == "dcs" and not cfg.prompts.isdigit() and not cfg.clip:
        raise ValueError("--score dcs on prompts from a file needs --clip: the stand-in knows generated prompts only")
    of_messages = [n for n in ("conciseness", "prioritise", "reasoning", "structure") if getattr(cfg, n) != getattr(Config, n)]
    if of_messages and not (cfg.llm_url or cfg.replay):
        raise ValueError(f"--{of_messages[0]} changes the message to a language model, which the stand-in does not read: give "
                         "--llm_url")  # fmt: skip
    if not cfg.prompts.isdigit() and searched(cfg) and not (cfg.llm_url or cfg.replay):
        raise ValueError("--prompts from a file need a language model: --llm_url or --replay; the stand-in only knows scenes")
    if cfg.prompts.isdigit() == bool(cfg.image_command or cfg.image_url):
        raise ValueError("--prompts from a file need a generator of your own, --image_command or --image_url, and generated "
                         "prompts the stand-in")  # fmt: skip
    if (cfg.score == "dsg" and not cfg.prompts.isdigit()) != bool(cfg.vqa_url):
        raise ValueError("--score dsg on prompts from a file needs --vqa_url, a server that sees pictures, or use --score dcs; "
                         "nothing else uses --vqa_url")  # fmt: skip
    if cfg.replay and Path(cfg.replay).resolve().parent == Path(cfg.out_dir).resolve():
        raise ValueError(f"--replay {cfg.replay} lies in --out_dir, whose results it would replace; choose another --out_dir")


SERVED = {"timeout", "llm_url", "llm_key", "image_url", "vqa_url", "batch_size"}  # how, not what: a run goes on with others


def stored(out, i) -> dict:
    """What a folder has of prompt i, {} if nothing."""
    path = out / f"{i:03d}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def claim_folder(out, tasks, cfg) -> None:
    """Results cost servers' time: those of other settings or prompts are refused, and go with --no-resume alone."""
    config = out / "config.json"
    old = json.loads(config.read_text()) if config.exists() else {}
    if not cfg.resume:
        names = ("[0-9]*.json", "[0-9]*.png", "exchanges.jsonl", "vqa.jsonl", "curves.png", "metrics.json")
        for path in (p for name in names for p in out.glob(name) if old):  # of a run; other folders' files are left alone
            path.unlink()
        return
    differ = ckpt.differences(old, cfg, ckpt.FREE | SERVED) if old else []
    if not differ and any(stored(out, i).get("prompt", t.prompt) != t.prompt for i, t in enumerate(tasks)):
        differ = ["prompts"]
    if differ:
        raise ValueError(f"{out} holds a run with other settings ({', '.join(differ[:3])}); choose another --out_dir, or "
                         "--no-resume, which throws it away")  # fmt: skip


def run(cfg: Config) -> dict:
    """Every prompt by every method. Prints gains on searched and on fresh seeds, set metrics before and after."""
    check(cfg)
    tasks = make_tasks(cfg) if cfg.prompts.isdigit() else read_tasks(cfg.prompts, cfg.limit, cfg.challenges)
    if cfg.score == "dsg" and (bare := [t.prompt for t in tasks if not t.questions]):
        raise ValueError(f"the prompt {bare[0]!r} has no questions; take prompts from DSG-1k, or --score dcs")
    budget = 1 + cfg.steps * cfg.candidates
    methods = cfg.methods.split(",")
    if cfg.dry_run:
        scored = len(methods) * budget * cfg.images + cfg.fresh * (1 + len(methods))  # search, fresh seeds; of one prompt
        shown = 2 * cfg.fresh if cfg.prompts.isdigit() else 0  # set metrics
        asked = max(len(t.questions) for t in tasks) if cfg.vqa_url else 0
        messages = sum(iterations_of(m, cfg)[0] for m in searched(cfg)) if cfg.llm_url else 0
        print(f"{len(tasks)} prompts x {len(methods)} methods: at most {len(tasks) * len(methods) * budget:,} prompts, "
              f"{len(tasks) * (scored + shown):,} pictures, {len(tasks) * scored * asked:,} calls of the VQA server, and "
              f"{len(tasks) * messages:,} calls of the language model, more where it sends too few; none was made")  # fmt: skip
        return {}
    env, out = ddp.start(cfg.seed, timeout_s=7 * 86_400), Path(cfg.out_dir)  # processes wait for the slowest at the end
    out.mkdir(parents=True, exist_ok=True)
    client = None
    if cfg.llm_url or cfg.replay:
        log = out / "exchanges.jsonl"  # of all processes
        client = ChatClient(cfg.llm_url, cfg.llm_model, os.environ.get(cfg.llm_key, ""), cfg.timeout, log=log,
                            temperature=cfg.temperature, max_tokens=cfg.max_tokens, token_field=cfg.token_field,
                            replay=cfg.replay or None)  # fmt: skip
    if env.is_main:
        claim_folder(out, tasks, cfg)
        write_json(out / "config.json", {**cfg.__dict__, "processes": env.world, "versions": versions()})
    draw, scorer, began = make_generator(cfg, env.device), Scorer(cfg, env.device, out / "vqa.jsonl"), time.monotonic()
    if env.world > 1:
        torch.distributed.barrier()
    mine = list(enumerate(tasks))[env.rank :: env.world]
    clocks = []
    for i, task in tqdm(mine, desc="prompts", unit="prompt", disable=not env.is_main, dynamic_ncols=True):
        if not {*methods} <= stored(out, i).get("methods", {}).keys():  # new, cut short, or refused, maybe by an outage
            try:
                clocks.append(solve_task(i, task, draw, scorer, cfg, out, client))
            except (Refused, data.BadSample) as error:  # the user prompt itself
                write_json(out / f"{i:03d}.json", {**stored(out, i), "prompt": task.prompt, "refused": str(error)})
        if ddp.asked_to_stop():
            raise KeyboardInterrupt
    usage = ddp.gather_lists([client.usage] if client else [])  # after it, all results are written
    answers = ddp.gather_lists([(scorer.asked, scorer.unclear)])
    if not env.is_main:
        return {}
    results = [stored(out, i) for i in range(len(tasks))]
    refused = [r for r in results if "refused" in r]
    if len(refused) == len(results):
        raise ValueError(f"no prompt could be drawn: {refused[0]['refused']}")
    if refused:
        print(f"\nleft out: {len(refused)} of {len(results)} prompts, which were refused, the first because: "
              f"{refused[0]['refused']}")  # fmt: skip
    tasks = [t for t, r in zip(tasks, results) if "refused" not in r]
    results = [r for r in results if "refused" not in r]
    rows, result = summary(results, cfg)
    proposer = "replay" if cfg.replay else "http" if cfg.llm_url else cfg.proposer
    print(f"\n{len(tasks)} prompts, {cfg.score}, proposer: {proposer}, {cfg.images} pictures a prompt, {cfg.fresh} fresh ones")
    unit = "points" if cfg.score == "dsg" else "%"
    head = ["method", f"gain, {unit}", "gain on fresh seeds", "... if not right at once", "iterations", "pictures", "words",
            "words in common, %"]  # fmt: skip
    print(table(rows, head))
    paper = {"dsg": "OPT2I +10.9 to +24.9, paraphrasing +10.5 to +22.2",
             "dcs": "OPT2I +9.3 to +12.2, paraphrasing +8.0 to +11.0"}  # fmt: skip
    print(f"the paper, on the searched seeds, {unit}: {paper[cfg.score]}")
    shown = searched(cfg)[:1]
    if shown and cfg.prompts.isdigit() and len(tasks) * cfg.fresh > 3:
        sets = set_metrics(tasks, results, draw, zoo.load_judge().to(env.device), cfg)
        result |= sets
        keys = ("fd", "precision", "recall", "diversity")
        text = [[n, *(f"{sets[f'{n}_{k}']:.3f}" for k in keys)] for n in ("first", "best")]
        head = ["", "Frechet distance", "precision", "recall", "diversity"]
        print(f"\n{len(tasks) * cfg.fresh} pictures of fresh seeds, few for a distance: compare these two lines only\n"
              + table(text, head))  # fmt: skip
    ks, chosen = selections(results, cfg)
    if ks:
        print(f"\nthe k best of the first {ks[-1]} pictures of each search, prompts that were not right at once\n"
              + table([[m, *v] for m, v in chosen.items()], ["method", *(f"best {k}" for k in ks)]))  # fmt: skip
        result |= {f"{m}_best_{k}": x for m, v in chosen.items() for k, x in zip(ks, v)}
    draw_curves(results, ks, chosen, cfg, out)
    if asked := sum(a for a, _ in answers):
        print(f"\nVQA server: {sum(u for _, u in answers)} of {asked} answers were neither yes nor no and count as no")
    if client:
        print(f"\nlanguage model: { {k: sum(u[k] for u in usage) for k in usage[0]} }")
    if timed := [c[shown[0]] for c in clocks if shown and shown[0] in c]:  # searches of this start
        drawing, seconds = np.sum(timed, 0)
        print(f"\n{shown[0]}: {100 * drawing / seconds:.0f} % of {seconds:.0f} s in the generator and the scorer")
    print(f"\nsheets, curves and every prompt: {cfg.out_dir} ({time.monotonic() - began:.0f} s)")
    write_json(out / "metrics.json", result)
    return result


def draw_curves(results, ks, chosen, cfg, out) -> None:
    """Left: best score so far against prompts tried. Middle: an iteration's prompts against the user's, paper Fig. 3. Right:
    the k best pictures, paper Fig. 6. Means over the user prompts, scores x 100; an ended search keeps its last value."""
    budget, best, each, charts = 1 + cfg.steps * cfg.candidates, {}, {}, []
    unit = "points" if cfg.score == "dsg" else "%"

    def padded(line, length):
        return np.pad(line, (0, length - len(line)), mode="edge")

    for m in searched(cfg):
        curves = [r["methods"][m]["curve"] for r in results]
        best[m] = (range(1, budget + 1), 100 * np.mean([padded(np.maximum.accumulate(sum(c, [])), budget) for c in curves], 0))
        if (iterations := iterations_of(m, cfg)[0]) > 1:
            for name, of in (("best", max), ("mean", np.mean)):
                line = np.nanmean([padded(over_iterations(c, of, cfg.score), iterations + 1) for c in curves], 0)
                each[f"{m}, {name}"] = (range(iterations + 1), line)
    if best:
        charts.append(plot.lines(best, "best score so far, searched seeds", x="prompts tried", size=(620, 420)))
    if each:
        charts.append(plot.lines(each, f"gain of an iteration's prompts, {unit}", x="iteration", size=(620, 420)))
    if len(ks) > 1:
        lines = {m: (np.log10(ks), v) for m, v in chosen.items()}
        charts.append(plot.lines(lines, "mean score of the k best pictures", x="log10 k", size=(620, 420)))
    if charts:
        plot.save(plot.row(charts), out / "curves.png")


def over_iterations(curve, of, kind) -> list[float]:
    """Scores by iteration, the user prompt alone first -> gain of of(an iteration's); one without a new prompt repeats the last
    value."""
    out = []
    for part in curve:
        out.append(gain(curve[0][0], of(part), kind) if part else out[-1])
    return out


def draw_sheet(trace, best, shown, path) -> None:
    """The scored pictures of the user's prompt and of the best one side by side, with prompts and the elements' scores; and the
    score of every prompt that was tried."""
    panels = []
    for name, s, images in (("the user's prompt", trace[0][0], shown[0]), ("the best prompt", best, shown[1])):
        images = list(to_uint8(images)) if isinstance(images, torch.Tensor) else images
        title = f"{name}: {100 * s.score:.0f}"
        sheet = plot.grid(images, min(2, len(images)), None, None, title, 400 // min(2, len(images)))
        lines = plot.wrap(s.prompt, sheet.width - 24, plot.font(14))
        panels.append(plot.below(sheet, [*lines, "", *(f"{100 * v:.0f}   {e}" for e, v in s.elements)]))
    scores = [100 * s.score for part in trace for s in part]
    if len(scores) > 2:
        tried = range(len(scores))
        curves = {"this prompt": (tried, scores), "best so far": (tried, np.maximum.accumulate(scores))}
        panels.append(plot.lines(curves, "score, the user's prompt first", x="prompt", size=(420, 420)))
    plot.save(plot.row(panels), path)


# 7. MAIN -----------------------------------------------------------------------------------------------------------------
PRESETS = {
    "smoke": dict(prompts="2", steps=2, candidates=2, images=2, fresh=4, sampler_steps=2, out_dir="runs/opt2i_smoke"),
    "laptop": {},
    # the paper's number of iterations, more prompts
    "gpu": dict(prompts="200", steps=30, images=4, fresh=64, batch_size=1024, out_dir="runs/opt2i_gpu"),
    # PartiPrompts, the first 50 of four challenges: 185 prompts; models come by url
    "paper": dict(prompts="data/partiprompts.tsv", steps=30, llm_url="http://localhost:8000/v1",
                  image_url="http://localhost:9000/v1", score="dcs", clip="data/clip-vit-large-patch14",
                  tokenizer="data/bpe_simple_vocab_16e6.txt.gz", out_dir="runs/opt2i_p2",
                  challenges="Properties & Positioning,Quantity,Fine-grained Detail,Complex"),
}  # fmt: skip

if __name__ == "__main__":
    cli.main(run, Config, PRESETS)
