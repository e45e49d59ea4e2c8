"""methods/opt2i.py: the loop with made-up models, messages and parsing, DSG, dCS, a client against servers that misbehave."""

import http.server
import json
import re
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from common.log import write_json
from methods import opt2i as M
from tests.helpers import both, inside, user_error

SMALL = ["--preset", "smoke", "--proposer", "grammar"]


# The loop


def made_up(table, calls=None):
    """generate, score, propose over a fixed table of prompts."""
    waiting = iter([["b", "c"], ["c", "d", "B"], ["e", "f", "g", "h", "i", "j"], [], ["k"]])

    def score(p0, pictures):
        assert p0 == "a"  # always against the user prompt
        if calls is not None:
            calls.append(pictures)
        return table[pictures], [("q", table[pictures])]

    def propose(p0, history, n):
        if calls is not None:
            calls.append((p0, [s.prompt for s in history], n))
        return next(waiting)

    return (lambda p: p), score, propose


TABLE = dict(zip("abcdefghijk", (0.3, 0.2, 0.5, 0.4, 0.6, 0.1, 0.9, 0.0, 0.2, 0.2, 1.0)))


def test_the_loop():
    calls = []
    best, trace = M.optimise("a", *made_up(TABLE, calls), iterations=5, candidates=4, history=2)
    assert best.prompt == "k" and [[s.prompt for s in part] for part in trace] == [
        ["a"],
        ["b", "c"],
        ["d"],
        ["e", "f", "g", "h"],
        [],
        ["k"],
    ]
    asked = [c for c in calls if isinstance(c, tuple)]
    assert [h for _, h, _ in asked] == [["a"], ["a", "c"], ["d", "c"], ["e", "g"], ["e", "g"]]  # two best, increasing
    assert sum(isinstance(c, str) for c in calls) == 1 + sum(map(len, trace[1:]))
    running = np.maximum.accumulate([max([s.score for s in part], default=0) for part in trace])
    assert (np.diff(running) >= 0).all()


def test_the_loop_stops():
    perfect = {**TABLE, "a": 1.0}
    calls = []
    best, trace = M.optimise("a", *made_up(perfect, calls), iterations=5)
    assert best.prompt == "a" and trace == [[best]] and calls == ["a"]  # no call of the language model
    best, trace = M.optimise("a", *made_up(TABLE), iterations=5, target=0.45)
    assert best.prompt == "c" and len(trace) == 2
    best, trace = M.optimise("a", *made_up(TABLE), iterations=0)
    assert best.prompt == "a" and len(trace) == 1


def test_ties_keep_the_earlier_prompt():
    same = dict.fromkeys("abcdefghijk", 0.5)
    calls = []
    best, _ = M.optimise("a", *made_up(same, calls), iterations=3, candidates=4, history=2)
    assert best.prompt == "a" and [c for c in calls if isinstance(c, tuple)][-1][1] == ["a", "b"]


# Scores


def test_dsg_variants():
    parents = {1: [], 2: [1], 3: [2]}
    dog = {1: False, 2: True, 3: True}
    assert (M.dsg_score(dog, parents, False), M.dsg_score(dog, parents), M.dsg_score(dog, {})) == (
        pytest.approx(1 / 3), 0, pytest.approx(2 / 3))  # fmt: skip
    yes = ("Yes.", " yes", "YES", "yes!", "**Yes**", '"Yes"', "<think>no, or... yes?</think>\nYes")
    assert all(M.said_words(t) == ["yes"] for t in yes)
    assert not any(M.said_words(t) == ["yes"] for t in ("yes, it is", "no", "", "<think>yes", "yes and no"))


def test_dcs():
    f, t = torch.randn(3, 5), torch.randn(2, 5)
    cos = torch.nn.functional.cosine_similarity
    want = [[cos(a, b, 0).item() for b in t] for a in f]
    np.testing.assert_allclose(M.dcs(f, t).numpy(), want, atol=1e-6)
    assert M.dcs(f, t.flip(0)).mean().item() == pytest.approx(M.dcs(f, t).mean().item())
    assert M.noun_phrases("a photo of a ginger cat sitting by a window") == ["ginger cat", "window"]
    assert M.noun_phrases("Many electronic wires over a road with few cars") == ["Many electronic wires", "road", "few cars"]
    assert M.noun_phrases("a built-in oven at 12:30, 3.5 m above a half-open door") == [
        "built-in oven", "12:30", "3.5 m", "half-open door"]  # fmt: skip
    assert M.noun_phrases("a picture of a dog") == ["dog"] and M.noun_phrases("...") == ["..."]
    assert M.gain(0.0, 0.5, "dsg") == 50 and M.gain(0.2, 0.25, "dcs") == pytest.approx(25)


def test_selection_after_the_fact():
    scores = [0.1, 0.9, 0.4, 0.4]
    means = [M.top_k_mean(scores, k) for k in (1, 2, 3, 4)]
    assert means == sorted(means, reverse=True) and means[-1] == pytest.approx(np.mean(scores))


# Messages and answers


def test_the_message():
    history = [M.Scored(f"try {i}", i / 10, [("Is it red?", i / 10)]) for i in range(1, 4)]
    system, user = M.meta_prompt("a red cat", history, 5)
    assert "expert" in system and '"a red cat"' in user and "Write 5 paraphrases" in user
    places = [user.index(f"try {i}\nscore: {10 * i}\n- Is it red?: {10 * i}") for i in (1, 2, 3)]
    assert places == sorted(places) and "<PROMPT>paraphrase 1</PROMPT>" in user
    assert "answered with yes" in user and "Rather replace" in user and "explain" not in user
    _, plain = M.meta_prompt("a", history, 5, "dcs", conciseness=False, prioritise=False, reasoning=True, structure=True)
    assert "Rather" not in plain and "explain" in plain and "foreground" in plain and "visual element" in plain
    assert "visual elements with the lowest" in M.meta_prompt("a", history, 5, "dcs")[1]
    system, user = M.paraphrase_prompt("a red cat", 150)
    assert system == "" and "score" not in user and "150" in user
    assert M.as_100(0.666) == 67 and M.as_100(1.4) == 100 and M.as_100(-0.1) == 0


@pytest.mark.parametrize(
    "text, want",
    [
        ("1. <PROMPT>a cat</PROMPT>\n2. <PROMPT>one dog</PROMPT>", ["a cat", "one dog"]),
        ("<prompt>a cat\n2. <Prompt>one dog</prompt>", ["a cat", "one dog"]),
        ("1. <PROMPT>a cat<PROMPT>\n2. <PROMPT>one dog<PROMPT>", ["a cat", "one dog"]),
        ("1. <PROMPT a cat</PROMPT>", ["a cat"]),
        ("Sure! Here:\n1) a cat\n2) 'one dog'\nHope that helps", ["a cat", "one dog"]),
        ("<think>1. <PROMPT>no</PROMPT></think>\n1. <PROMPT>a cat</PROMPT>", ["a cat"]),
        ('1. <PROMPT>"a cat"</PROMPT> 2. <PROMPT>A CAT</PROMPT> <PROMPT>paraphrase 1</PROMPT> <PROMPT> </PROMPT>', ["a cat"]),
        (f"<PROMPT>{'word ' * 90}</PROMPT><PROMPT>a cat</PROMPT>", ["a cat"]),
        ("<PROMPT>3.5 meter of rope</PROMPT>", ["3.5 meter of rope"]),
        ("Each between <PROMPT> tags:\n1. <PROMPT>a cat</PROMPT>", ["a cat"]),
        ("Each between <PROMPT> and </PROMPT>:\n1. <PROMPT>a cat</PROMPT>\n2. <PROMPT>one dog", ["a cat", "one dog"]),
        ("In <PROMPT> tags:\n1. a cat\n2. one dog", ["a cat", "one dog"]),
        ("<think>1. <PROMPT>no</PROMPT> and it never ends", []),
        ("<PROMPT>a \ud800 cat\0</PROMPT>", ["a ? cat"]),
        ("", []),
        ("nothing of use", []),
    ],
)
def test_answers_are_parsed(text, want):
    assert M.parse_candidates(text) == want


def test_hostile_answers_cost_little_time():
    began = time.perf_counter()
    for text in ("<PROMPT>" * 50_000, "1. " * 100_000, "<PROMPT>a</PROMPT>\n" * 20_000, "</think>" * 30_000, "\n" * 200_000,
                 "<PROMPT " * 30_000 + ">", "<prompt>x<" + " " * 199_000, "x" * 5_000_000):  # fmt: skip
        M.parse_candidates(text)
    wrapped = '<prompts><prompt1>a cat</prompt1> <PROMPT id="2">a dog</PROMPT></prompts>'
    assert M.parse_candidates(wrapped) == ["a cat", "a dog"]
    assert len(M.parse_candidates("".join(f"<PROMPT>cat {i}</PROMPT>" for i in range(5000)))) <= 1000
    assert time.perf_counter() - began < 20


# The client


class Server:
    """A local server that plays a list of replies: (status, body) or a function of the handler."""

    def __enter__(self):
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def answer(self):
                length = int(self.headers.get("Content-Length") or 0)
                body = json.loads(self.rfile.read(length)) if length else None
                outer.seen.append((self.command, self.path, dict(self.headers), body))
                step = outer.plan.pop(0) if len(outer.plan) > 1 else outer.plan[0]
                if callable(step):
                    return step(self)
                status, text = step
                blob = text if isinstance(text, bytes) else json.dumps(text).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(blob)))
                self.end_headers()
                self.wfile.write(blob)

            do_GET = do_POST = answer

            def log_message(self, *args):
                pass

        self.seen, self.plan = [], [(200, said("ok"))]
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        return self

    def __exit__(self, *args):
        self.server.shutdown()
        self.server.server_close()


def said(text, **more):
    return {"choices": [{"message": {"content": text}, "finish_reason": "stop"}], "usage": {"prompt_tokens": 3}, **more}


def client(server, **options):
    return M.ChatClient(server.url, "m", "secret", **{"pause": 0.01, "retries": 3, "timeout": 60.0, **options})


def test_a_request_has_the_right_form():
    with Server() as server:
        c = client(server, temperature=0.7, max_tokens=9, token_field="max_completion_tokens")
        assert c.chat("be kind", "héllo ☃") == "ok" and c.usage["prompt_tokens"] == 3
        method, path, headers, body = server.seen[0]
        assert (method, path, headers["Authorization"]) == ("POST", "/v1/chat/completions", "Bearer secret")
        assert body == {"model": "m", "temperature": 0.7, "max_completion_tokens": 9, "stream": False,
                        "messages": [{"role": "system", "content": "be kind"}, {"role": "user", "content": "héllo ☃"}]}  # fmt: skip
        assert c.chat("", "what is it?", [b"png"]) == "ok"
        parts = server.seen[1][3]["messages"][0]["content"]
        assert parts[0]["text"] == "what is it?" and parts[1]["image_url"]["url"].startswith("data:image/png;base64,")
        server.plan[:] = [(200, {"data": [{"id": "first"}]}), (200, said("x"))]
        named = M.ChatClient(server.url)
        named.chat("", "hi")
        assert named.model == "first" and server.seen[-2][:2] == ("GET", "/v1/models")


def drop(handler):
    handler.connection.close()


def cut_short(handler):
    handler.send_response(200)
    handler.send_header("Content-Length", "500")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')


def chunks_cut_short(handler):
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    handler.wfile.write(b"ff\r\nhalf")
    handler.connection.close()


def no_http(handler):
    handler.wfile.write(b"garbage\r\n\r\n")


def silent(handler):
    handler.connection.recv(1)  # until the client has gone


@pytest.mark.parametrize(
    "trouble", [(429, {}), (500, b"oops"), (503, {}), (200, b"not json"), (200, b"[1]"), drop, cut_short, silent]
)
def test_passing_trouble_costs_a_retry(trouble):
    with Server() as server:
        server.plan[:] = [trouble, trouble, (200, said("at last"))]
        patience = 2.0 if trouble is silent else 60.0  # a busy machine may take a second for a good answer
        assert client(server, timeout=patience).chat("s", "u") == "at last" and len(server.seen) == 3


@pytest.mark.parametrize("trouble", [(401, {"error": "who are you"}), (404, b"nothing here"), (400, b"bad")])
def test_lasting_trouble_ends_at_once(trouble):
    with Server() as server:
        server.plan[:] = [trouble]
        with pytest.raises(M.ServerError, match=f"status {trouble[0]}"):
            client(server).chat("s", "u")
        assert len(server.seen) == 1


def test_the_key_stays_with_its_server():
    def elsewhere(handler):
        handler.send_response(307)
        handler.send_header("Location", "http://127.0.0.1:9/steal")
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    with Server() as server:
        server.plan[:] = [elsewhere]
        with pytest.raises(M.ServerError, match="status 307"):
            client(server).chat("s", "u")
    with pytest.raises(ValueError, match="line break") as caught:
        M.ChatClient("http://x", key="secret\nmore")
    assert "secret" not in str(caught.value)


def test_a_refused_picture_costs_a_prompt_not_the_run():
    task, cfg = M.Task("a small red star on a dark background"), M.Config(steps=1, candidates=3, images=2, target=2.0)

    def draw(p, n, seed):
        if p != task.prompt and "big" not in p:
            raise M.Refused("refused")
        return torch.zeros(n, 3, 4, 4)

    def down(p, n, seed):  # a server that is gone is another matter: no candidate is worth 0 for that
        if p != task.prompt:
            raise M.ServerError("failed 6 times")
        return torch.zeros(n, 3, 4, 4)

    with pytest.raises(M.ServerError, match="6 times"):
        M.search("opt2i", task, down, lambda t, x: (0.5, [], [0.5] * len(x)), M.Grammar(0), cfg)
    found = M.search("opt2i", task, draw, lambda t, x: (0.5, [], [0.5] * len(x)), M.Grammar(0), cfg)
    assert found.best.prompt == task.prompt and 0.0 in [s.score for s in found.trace[1]]


def test_what_status_refuses_a_prompt_and_what_ends_the_run():
    with Server() as server:
        for status, kind in ((400, True), (422, True), (401, False), (404, False), (503, False)):
            server.plan[:] = [(status, b"no")]
            with pytest.raises(M.ServerError) as caught:  # a language model's: the user's prompt is not to blame
                client(server, retries=0).chat("s", "u")
            assert not isinstance(caught.value, M.Refused)
            server.plan[:] = [(status, b"no")]
            with pytest.raises(M.ServerError) as caught:  # of a generator
                M.by_endpoint(client(server, retries=0), "a cat", 0)
            assert isinstance(caught.value, M.Refused) == kind


def test_a_refused_user_prompt_is_left_out_and_said(tmp_path, monkeypatch, capsys):
    draw = M.make_generator(M.Config(painter="painter_early", sampler_steps=2), "cpu")
    second = M.make_tasks(M.Config(prompts="2"))[1].prompt

    def strict(p, n, seed):
        if p == second:
            raise M.Refused("against the rules")
        return draw(p, n, seed)

    monkeypatch.setattr(M, "make_generator", lambda cfg, device: strict)
    cfg = M.Config(**M.PRESETS["smoke"] | dict(out_dir=str(tmp_path), proposer="grammar"))
    result = M.run(cfg)
    assert "left out: 1 of 2 prompts" in capsys.readouterr().out and result["opt2i_pictures"] > 0
    assert json.loads((tmp_path / "001.json").read_text())["refused"] == "against the rules"
    with pytest.raises(ValueError, match="no prompt could be drawn: against the rules"):
        monkeypatch.setattr(M, "make_generator", lambda cfg, device: lambda p, n, seed: strict(second, n, seed))
        M.run(M.Config(**{**cfg.__dict__, "out_dir": str(tmp_path / "none")}))


def test_the_sheet_shows_what_was_scored_and_a_refusal_with_fresh_seeds_loses_no_search(tmp_path):
    cfg = M.Config(steps=1, candidates=3, images=2, fresh=4, methods="opt2i", proposer="grammar", target=2.0)
    task, drawn = M.Task("a small red star on a dark background"), []

    def draw(p, n, seed):
        if n == cfg.fresh and p != task.prompt:
            raise M.Refused("not with these seeds")
        drawn.append((p, n))
        return torch.full((n, 3, 8, 8), 0.1 * len(drawn))

    def scorer(task, x):
        return float(x.mean()), [("q", 0.5)], x.flatten(1).mean(1).tolist()

    M.solve_task(0, task, draw, scorer, cfg, tmp_path, None)
    got = json.loads((tmp_path / "000.json").read_text())["methods"]["opt2i"]
    assert np.isnan(got["fresh_best"]) and got["best"] > got["first"] and (tmp_path / "000.png").exists()
    assert len(drawn) == 1 + got["prompts"]  # fresh seeds of the user prompt, the search, and nothing for the sheet
    found = M.search("opt2i", task, draw, scorer, M.Grammar(0), cfg)
    assert [float(x.mean()) for x in found.shown] == pytest.approx([found.trace[0][0].score, found.best.score])


def test_a_replay_follows_the_last_attempt(tmp_path):
    """A run that was stopped in its second prompt and went on has asked twice; the answers of the first time count no more."""
    lines = [(0, "a", "k", "one"), (1, "a", "k", "stopped"), (1, "b", "k", "two"), (1, "b", "k", "three")]
    rows = [json.dumps(dict(zip(("task", "attempt", "key", "answer"), line))) for line in lines]
    (tmp_path / "log.jsonl").write_text("\n".join(rows))
    assert M._read_exchanges(tmp_path / "log.jsonl") == {"k": ["one", "two", "three"]}


def test_a_server_that_drips_is_given_up():
    """Each byte comes in time, the answer never ends."""

    def drip(handler):
        handler.send_response(200)
        handler.end_headers()
        try:
            for _ in range(1200):
                handler.wfile.write(b" ")
                time.sleep(0.05)
        except OSError:
            pass  # we have gone

    with Server() as server:
        server.plan[:] = [drip]
        began = time.monotonic()
        with pytest.raises(M.ServerError, match="failed 2 times.*longer than --timeout"):
            client(server, retries=1, timeout=1.5).chat("s", "u")
        assert time.monotonic() - began < 30  # the whole drip would take 60


def test_endless_trouble_ends_with_a_sentence():
    with Server() as server:
        server.plan[:] = [(500, b"oops")]
        with pytest.raises(M.ServerError, match="failed 3 times.*status 500"):
            client(server, retries=2).chat("s", "u")
    with pytest.raises(M.ServerError, match="failed 2 times"):
        M.ChatClient("http://127.0.0.1:9", "m", pause=0.01, retries=1).chat("s", "u")  # nobody listens


def test_a_server_without_system_role_and_odd_answers():
    with Server() as server:
        server.plan[:] = [(400, b"System role not supported"), (200, said("fine")), (200, said("fine"))]
        c = client(server)
        assert c.chat("rules", "question") == "fine" and c.chat("rules", "again") == "fine"
        assert [m["messages"][0]["content"] for *_, m in server.seen[1:]] == ["rules\n\nquestion", "rules\n\nagain"]
        for odd in (
            {},
            {"choices": []},
            {"choices": [{"message": {"content": None}}]},
            {"choices": "x"},
            said(7),
            said("", usage=3),
        ):
            server.plan[:] = [(200, odd)]
            assert c.chat("", "u") == ""


def test_replay(tmp_path):
    with Server() as server:
        server.plan[:] = [(200, said("one")), (200, said("two"))]
        c = client(server, log=tmp_path / "log.jsonl")
        assert [c.chat("s", "u"), c.chat("s", "u")] == ["one", "two"]
    again = M.ChatClient("http://nowhere.invalid", replay=tmp_path / "log.jsonl")
    assert [again.chat("s", "u"), again.chat("s", "u")] == ["one", "two"] and again.usage["requests"] == 0
    with pytest.raises(M.ServerError, match="never sent"):
        again.chat("s", "other")
    (tmp_path / "bad.jsonl").write_text("{")
    with pytest.raises(ValueError, match="exchanges.jsonl"):
        M.ChatClient("", replay=tmp_path / "bad.jsonl")


def test_an_answer_without_prompts_costs_a_retry_and_repeats_do_not_count(capsys):
    with Server() as server:
        server.plan[:] = [(200, said("I cannot do that.")), (200, said("<PROMPT>A Cat</PROMPT><PROMPT>one cat</PROMPT>")),
                          (200, said("<PROMPT>ONE CAT</PROMPT>"))]  # fmt: skip
        got = M.HttpProposer(client(server), M.Config()).propose("a cat", [M.Scored("a cat", 0.5)], 3)
        assert got == ["one cat"] and len(server.seen) == 3  # the user's prompt and other cases are repeats
        room = [body["max_tokens"] for _, _, _, body in server.seen]
        assert room[1] == 2 * room[0]  # the answer may have been cut off
        assert "no prompt" not in capsys.readouterr().err
    with Server() as server:
        server.plan[:] = [(200, said("no")), (200, said("never"))]
        assert M.HttpProposer(client(server), M.Config()).propose("a cat", [], 3) == [] and len(server.seen) == 2
        assert "no prompt in the language model's answers" in capsys.readouterr().err


def test_too_few_prompts_are_asked_for_until_nothing_new_comes():
    with Server() as server:
        server.plan[:] = [
            (200, said("1. <PROMPT>a cat</PROMPT>")),
            (200, said("<PROMPT>one cat</PROMPT><PROMPT>a cat</PROMPT>")),
        ]
        got = M.HttpProposer(client(server), M.Config()).propose("cat", [M.Scored("cat", 0.5)], 4)
        assert got == ["a cat", "one cat"] and len(server.seen) == 3  # the last one brought nothing new


# Offline proposers


def captions(count, seed=5):
    return [M.scenes.caption(M.scenes.scene(i, seed, (1, 3), grid=2)) for i in range(count)]


def test_grammar_keeps_the_meaning_and_leads_with_the_weak():
    rules, rng = M.Grammar(0), np.random.default_rng(0)
    for text in captions(40):
        assert all(M.zoo.same_meaning(text, M.zoo.reworded(text, "", rng)) for _ in range(5))
    text = "a small red star to the left of a large blue ring on a dark background"
    weak = [M.Scored(text, 0.5, [("Is there a star?", 1.0), ("Is the background dark?", 0.0)])]
    share = np.mean([p.startswith("on a") for p in rules.propose(text, weak, 20)])
    free = np.mean([p.startswith("on a") for p in rules.propose(text, [], 20)])
    assert share > free and len(set(rules.propose(text, weak, 8))) == 8
    for weak, often in (("Is the ring blue?", 0.8), ("Is the star red?", 0.4), ("", 0.4)):  # a weak second object comes first
        first = np.mean([min(p.find("ring") % 99, p.find("hoop") % 99) < p.find("star") for p in
                         (M.zoo.reworded(text, weak, rng) for _ in range(400))])  # fmt: skip
        assert abs(first - often) < 0.08


def test_the_stand_in_writes_what_was_meant():
    lm = M.LmProposer(0)
    for text in captions(3, 77):
        got = lm.propose(text, [M.Scored(text, 0.4, [("Is the background dark?", 0.0)])], 5)
        assert len(got) == 5 and all(M.zoo.same_meaning(p, text) and p != text for p in got)
    again = M.LmProposer(0)
    text = captions(1, 78)[0]
    assert M.LmProposer(0).propose(text, [], 4) == again.propose(text, [], 4)


# Prompts, generators, the whole


def test_real_prompt_files(shared, tmp_path):
    folder = shared / "prompts"
    parti = M.read_tasks(folder / "partiprompts.tsv", 2000)
    paper = M.Config(**M.PRESETS["paper"])
    assert len(M.read_tasks(folder / "partiprompts.tsv", paper.limit, paper.challenges)) == 185  # the paper's set
    with pytest.raises(ValueError, match="Complx"):
        M.read_tasks(folder / "partiprompts.tsv", 50, "Complx")
    assert len({t.prompt for t in parti}) == len(parti) > 1600 and parti[0].prompt == "bond"
    assert (
        len(M.read_tasks(folder / "drawbench.csv", 500)) >= 190
        and M.read_tasks(folder / "drawbench.csv", 7)[0].prompt == "A red colored car."
    )
    coco = M.read_tasks(shared / "coco_captions_val2017/captions.csv.gz", 10_000)
    assert len(coco) > 4900 and coco[0].prompt == "A woman stands in the dining area at the table."
    dsg = M.read_tasks(folder / "dsg1k_questions.csv.gz", 5000)
    assert len(dsg) == 1060 and sum(len(t.questions) for t in dsg) == 8182
    for t in dsg:  # self-parents and cycles do not hang
        assert 0 <= M.dsg_score(dict.fromkeys(t.questions, True), t.parents) <= 1
    (tmp_path / "x.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="not a table"):
        M.read_tasks(tmp_path / "x.csv", 5)


def test_an_answer_that_was_cut_ends_with_a_whole_prompt():
    text = "1. <PROMPT>a red star</PROMPT>\n2. <PROMPT>a red st"
    for reason, want in (("stop", ["a red star", "a red st"]), ("length", ["a red star"])):
        reply = {"choices": [{"finish_reason": reason, "message": {"content": text}}]}
        assert M.parse_candidates(M._content(reply)) == want
    long = {"choices": [{"finish_reason": "length", "message": {"content": "Yes"}}]}  # a VQA server's answer, cut at 16 tokens
    assert M._content(long, whole=True) == "Yes" and M._content(long) == ""
    assert M._content({"choices": ["x"]}) == "" == M._content({"choices": [{"message": {"content": 3}}]})


def test_pictures_by_command_and_by_endpoint(tmp_path):
    (tmp_path / "draw.py").write_text(
        "import sys; from PIL import Image; p, s, o = sys.argv[1:]; Image.new('RGB', (8, 8), (len(p), int(s) % 256, 0)).save(o)\n"
        "sys.stderr.buffer.write(b'\\xff')"  # no UTF-8, and no matter
    )
    cfg = M.Config(image_command=f"{M.sys.executable} {tmp_path}/draw.py {{prompt}} {{seed}} {{out}}")
    images = M.make_generator(cfg, "cpu")("a; touch cat's `x`", 2, 1)  # no shell reads the prompt
    assert [i.getpixel((0, 0)) for i in images] == [(18, 1000 % 256, 0), (18, 1001 % 256, 0)]
    with pytest.raises(ValueError, match="wrote no picture"):
        M.make_generator(M.Config(image_command=f"{M.sys.executable} -c pass"), "cpu")("x", 1, 0)
    with pytest.raises(ValueError, match="cannot be run"):
        M.make_generator(M.Config(image_command="no-such-program"), "cpu")("x", 1, 0)
    png = M.io.BytesIO()
    Image.new("RGB", (8, 8), (9, 9, 9)).save(png, format="PNG")
    with Server() as server:
        server.plan[:] = [(200, {"data": [{"b64_json": M.base64.b64encode(png.getvalue()).decode()}]})]
        c = client(server)
        assert M.by_endpoint(c, "a cat", 2).getpixel((0, 0)) == (9, 9, 9)
        assert server.seen[0][3]["prompt"] == "a cat" and server.seen[0][3]["seed"] == 2
        server.plan[:] = [(200, {"data": []})]
        with pytest.raises(M.ServerError, match="b64_json"):
            M.by_endpoint(c, "a cat", 1)


def test_questions_of_real_prompts_by_a_server():
    with Server() as server:
        server.plan[:] = [(200, {"data": [{"id": "m"}]}), (200, said("Yes.")), (200, said("no")), (200, said("yes"))]
        scorer = M.Scorer(M.Config(vqa_url=server.url), "cpu")
        task = M.Task("a red dog", {"1": "Is there a dog?", "2": "Is it red?", "3": "Is it big?"}, {"2": ["1"], "3": ["2"]})
        score, elements, each = scorer(task, [Image.new("RGB", (8, 8))])
        assert each == [score]
        assert score == pytest.approx(1 / 3) and dict(elements) == {"Is there a dog?": 1, "Is it red?": 0, "Is it big?": 1}


def test_same_seeds_give_the_same_pictures():
    draw = M.make_generator(M.Config(painter="painter_early", sampler_steps=2), "cpu")
    assert torch.equal(draw("a red star", 2, 5), draw("a red star", 2, 5))
    blind = M.make_generator(M.Config(painter="painter_early", sampler_steps=2, guidance=0.0), "cpu")  # ignores the prompt
    torch.testing.assert_close(blind("a red star", 2, 5), blind("two blue moons", 2, 5))  # the same noise for every prompt
    assert not torch.equal(draw("a red star", 2, 5), draw("a red star", 2, 6))


def test_budgets_are_equal():
    cfg = M.Config(steps=3, candidates=2, images=2, target=2.0)
    task, counts, drawn = M.Task("a small red star to the left of a large blue ring on a dark background"), {}, [0]

    def draw(p, n, seed):
        drawn[0] += n
        return torch.zeros(n, 3, 4, 4)

    def scorer(task, x):
        return 0.5, [("q", 0.5)], [0.5] * len(x)

    for method in [*cfg.methods.split(","), "6x1", "1x6"]:
        drawn[0] = 0
        counts[method] = len(M.search(method, task, draw, scorer, M.Grammar(0), cfg).pictures)
        assert drawn[0] == counts[method]
    assert set(counts.values()) == {2 * (1 + 3 * 2)}


def test_who_sees_the_history_and_which_seeds_are_drawn(tmp_path, monkeypatch):
    cfg = M.Config(steps=2, candidates=2, images=2, fresh=4, target=2.0, seed=3)
    task, drawn, shown = M.Task("a small red star on a dark background"), [], []

    def draw(p, n, seed):
        drawn.append((n, seed))
        return torch.full((n, 3, 4, 4), (seed % 10) / 100)

    def scorer(task, x):
        return float(x.mean()), [("q", 0.5)], x.flatten(1).mean(1).tolist()

    class Seeing(M.Grammar):
        def propose(self, prompt, history, n):
            shown.append([s.prompt for s in history])
            return super().propose(prompt, history, n)

    monkeypatch.setattr(M, "LmProposer", lambda seed, temperature: Seeing(seed))
    histories = {}
    for method in cfg.methods.split(","):
        drawn.clear()
        shown.clear()
        M.search(method, task, draw, scorer, Seeing(0), cfg)
        histories[method] = list(shown)
        seeds = [s for _, s in drawn]
        assert len(set(seeds)) == (5 if method == "seeds" else 1), method
    assert histories["paraphrase"] == [[]] and histories["oneshot"] == [[task.prompt]] and histories["seeds"] == []
    assert histories["opt2i"][0] == [task.prompt] and len(histories["opt2i"][1]) == 3
    drawn.clear()
    M.solve_task(0, task, draw, scorer, replace(cfg, methods="opt2i"), tmp_path, None)
    fresh, searched = {s for n, s in drawn if n == 4}, {s for n, s in drawn if n == 2}
    assert len(fresh) == 1 and not fresh & searched  # the comparison is not on the seeds that were searched


def test_what_was_searched_before_a_server_failed_is_kept(tmp_path):
    cfg = M.Config(steps=1, candidates=2, images=2, fresh=4, methods="opt2i,paraphrase", proposer="grammar", target=2.0)
    task, down = M.Task("a small red star on a dark background"), [7]

    def draw(p, n, seed):
        down[0] -= 1
        if down[0] == 0:
            raise M.ServerError("gone")
        return torch.full((n, 3, 4, 4), len(p) / 100)

    def scorer(task, x):
        return float(x.mean()), [("q", 0.5)], x.flatten(1).mean(1).tolist()

    with pytest.raises(M.ServerError):
        M.solve_task(0, task, draw, scorer, cfg, tmp_path, None)
    assert list(M.stored(tmp_path, 0)["methods"]) == ["opt2i"]
    clock = M.solve_task(0, task, draw, scorer, cfg, tmp_path, None)
    assert list(clock) == ["paraphrase"] and list(M.stored(tmp_path, 0)["methods"]) == ["opt2i", "paraphrase"]


def test_answers_of_a_vqa_server_are_counted():
    task, image = M.Task("a cat", {"1": "Is there a cat?", "2": "Is it red?"}), Image.new("RGB", (8, 8))
    for lenient, want, unclear in ((False, {"1": False, "2": False}, 2), (True, {"1": True, "2": False}, 1)):
        with Server() as server:
            server.plan[:] = [(200, said("Yes, there is.")), (200, said("perhaps"))]
            scorer = M.Scorer(M.Config(vqa_url=server.url, lenient=lenient), "cpu")
            scorer.server.model = "m"
            assert scorer.answers(task, [image]) == [want] and (scorer.asked, scorer.unclear) == (2, unclear)


def test_the_table_of_gains():
    def found(first, best, fresh_first, fresh_best):
        return {"first": first, "best": best, "fresh_first": fresh_first, "fresh_best": fresh_best, "iterations": 2, "pictures": 9,
                "words": 3, "prompt": "a b c"}  # fmt: skip

    results = [{"prompt": "a b d", "methods": {"opt2i": found(0.5, 0.9, 0.5, 0.7), "paraphrase": found(0.5, 0.8, 0.5, 0.6)}},
               {"prompt": "a b c", "methods": {"opt2i": found(1.0, 1.0, 0.9, 0.8), "paraphrase": found(1.0, 1.0, 0.9, 0.9)}}]  # fmt: skip
    rows, out = M.summary(results, M.Config(methods="opt2i,paraphrase"))
    assert out["opt2i_gain"] == pytest.approx(20) and out["opt2i_fresh_gain"] == pytest.approx(5)
    hard = out["opt2i_gain_hard"], out["opt2i_fresh_gain_hard"]  # without the second prompt
    assert hard == pytest.approx((40, 20))
    assert out["opt2i_overlap"] == pytest.approx(75) and out["paraphrase_fresh_gain"] == pytest.approx(5)
    assert rows[-1][0] == "opt2i - paraphrase" and rows[-1][2] == "+0.0 +- 10.0"


def test_dsg_tables_keep_parents_and_say_which_are_unknown(tmp_path, capsys):
    head = "item_id,text,proposition_id,dependency,question_natural_language\n"
    rows = ["x,a red cat,1,0,Is there a cat?", "x,a red cat,2,1,Is it red?", 'x,a red cat,3,"2,9",Q']
    (tmp_path / "dsg.csv").write_text(head + "\n".join(rows))
    (task,) = M.read_tasks(tmp_path / "dsg.csv", 5)
    assert task.parents == {"1": [], "2": ["1"], "3": ["2", "9"]} and "1 parents" in capsys.readouterr().err
    assert M.dsg_score({"1": False, "2": True, "3": True}, task.parents) == 0


def test_the_grid_of_iterations_and_prompts():
    """The same search under its own name, and as many language-model calls as iterations."""
    cfg, task = M.Config(steps=3, candidates=2, images=1, target=2.0), M.Task("a small red star on a dark background")

    class Counting(M.Grammar):
        calls = 0

        def propose(self, prompt, history, n):
            Counting.calls += 1
            return super().propose(prompt, history, n)

    def scorer(task, x):
        return float(x.mean()), [], x.flatten(1).mean(1).tolist()

    def draw(p, n, seed):
        return torch.full((n, 1, 2, 2), len(p) / 100)

    traces = {}
    for method in ("opt2i", "3x2", "6x1", "1x6"):
        Counting.calls = 0
        found = M.search(method, task, draw, scorer, Counting(0), cfg)
        assert Counting.calls == M.iterations_of(method, cfg)[0] == len(found.trace) - 1
        traces[method] = found.trace
        assert found.pictures == pytest.approx([s.score for part in found.trace for s in part])
        assert 0 < found.drawing < found.seconds
    assert traces["opt2i"] == traces["3x2"] != traces["6x1"]


def test_selection_of_the_best_pictures():
    cfg = M.Config(methods="opt2i,seeds")

    def result(first, a, b):
        return {"methods": {"opt2i": {"first": first, "picture_scores": a}, "seeds": {"first": first, "picture_scores": b}}}

    results = [result(0.5, [0.5, 1.0, 0.0, 1.0, 0.25], [0.5] * 6), result(1.0, [1.0], [1.0])]  # the second was right at once
    ks, chosen = M.selections(results, cfg)
    assert ks == [1, 4, 5] and chosen == {"opt2i": pytest.approx([100, 68.75, 55]), "seeds": [50, 50, 50]}  # falls with k
    assert M.selections(results[1:], cfg) == ([], {"opt2i": [], "seeds": []})  # nothing to choose


def test_an_iteration_without_a_new_prompt_repeats_the_last():
    assert M.over_iterations([[0.25], [0.5, 0.75], [], [1.0]], max, "dsg") == [0, 50, 50, 75]
    assert M.over_iterations([[0.25], [0.5, 0.75], [], [1.0]], max, "dcs") == [0, 200, 200, 300]


def test_smoke_resume_and_two_processes(tmp_path, one_thread):
    one = inside(M, *SMALL, "--out_dir", tmp_path / "a")
    assert one.returncode == 0, one.stderr
    for words in ("gain on fresh seeds", "opt2i", "paraphrase", "Frechet distance", "the paper, on the searched seeds"):
        assert words in one.stdout
    assert Image.open(tmp_path / "a/000.png").width > 300 and (tmp_path / "a/curves.png").exists()
    two = both(M, *SMALL, "--out_dir", tmp_path / "b")
    assert two.returncode == 0, two.stderr
    for name in ("000.json", "001.json", "metrics.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    kept = (tmp_path / "a/000.json").stat().st_mtime_ns
    (tmp_path / "a/001.json").unlink()  # killed before the second prompt was done
    assert inside(M, *SMALL, "--out_dir", tmp_path / "a").returncode == 0
    assert (tmp_path / "a/000.json").stat().st_mtime_ns == kept
    assert (tmp_path / "a/001.json").read_bytes() == (tmp_path / "b/001.json").read_bytes()
    other = [M, *SMALL, "--score", "dcs", "--prompts", 1, "--out_dir", tmp_path / "a"]
    user_error(inside(*other), "other settings", "--no-resume")
    assert (tmp_path / "a/001.json").exists()
    assert inside(*other, "--no-resume").returncode == 0 and not (tmp_path / "a/001.json").exists()
    assert inside(*other, "--timeout", "9").returncode == 0  # how long to wait for a server is no setting of the results
    write_json(tmp_path / "a/000.json", {**json.loads((tmp_path / "a/000.json").read_text()), "prompt": "a cat"})
    user_error(inside(*other), "other settings", "prompts")  # an edited file of prompts


def test_a_run_with_a_server_and_its_replay(tmp_path):
    text = "on a dark background, a large red star"
    with Server() as server:
        server.plan[:] = [(200, said(f"1. <PROMPT>{text}</PROMPT>\n2. <PROMPT>{text} please</PROMPT>"))]
        flags = ["--preset", "smoke", "--prompts", 1, "--methods", "opt2i", "--out_dir"]
        done = inside(M, *flags, tmp_path / "a", "--llm_url", server.url, "--llm_model", "m")
        assert done.returncode == 0, done.stderr
        asked = len(server.seen)
    assert asked >= 1 and len((tmp_path / "a/exchanges.jsonl").read_text().splitlines()) == asked
    again = inside(M, *flags, tmp_path / "b", "--replay", tmp_path / "a/exchanges.jsonl")
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "a/000.json").read_bytes() == (tmp_path / "b/000.json").read_bytes()


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--score", "fid"], ["--score fid", "dsg"]),
        (["--methods", "opt2i,luck"], ["'luck'"]),
        (["--methods", "opt2i,3x7"], ["--methods 3x7", "as many"]),
        (["--candidates", "0"], ["--candidates 0"]),
        (["--proposer", "http"], ["lm, grammar"]),
        (["--vqa_url", "http://x"], ["--vqa_url"]),
        (["--prompts", "file.csv"], ["--llm_url"]),
        (["--prompts", "nowhere.csv", "--llm_url", "http://x", "--image_url", "http://y"], ["--vqa_url", "--score dcs"]),
        (
            ["--prompts", "nowhere.csv", "--llm_url", "http://x", "--image_url", "http://y", "--vqa_url", "http://z"],
            ["nowhere.csv"],
        ),
        (["--image_url", "http://y"], ["a generator of your own"]),
        (["--replay", "nowhere.jsonl"], ["nowhere.jsonl"]),
        (["--clip", "x", "--score", "dcs"], ["--tokenizer"]),
        (["--clip", "x"], ["--clip is for --score dcs"]),
        (["--challenges", "Complex"], ["--challenges is for --prompts from a file"]),
        (["--official_dsg", "--score", "dcs"], ["--official_dsg is for --score dsg"]),
        (["--image_command", " "], ["--image_command names no program"]),
        (["--prompts", "x.csv", "--llm_url", "http://x", "--image_url", "http://y", "--score", "dcs"], ["needs --clip"]),
        (["--no-conciseness"], ["--conciseness", "--llm_url"]),
        (["--prompts", "0"], ["--prompts 0"]),
        (["--temperature", "0"], ["--temperature 0"]),
    ],
)
def test_wrong_input_ends_in_one_sentence(flags, words, tmp_path):
    user_error(inside(M, *SMALL, "--out_dir", tmp_path / "r", *flags), *words)


def test_dry_run_spends_nothing(tmp_path, capsys):
    M.run(M.Config(prompts="3", dry_run=True, out_dir=str(tmp_path / "r")))
    assert "2,304 pictures" in capsys.readouterr().out and not (tmp_path / "r").exists()


# By hand ---------------------------------------------------------------------------------------------------------------


def test_a_search_ends_at_its_first_perfect_prompt_within_an_iteration():
    best, trace = M.optimise("a", *made_up(TABLE), iterations=5, candidates=4, target=0.55)
    assert best.prompt == "e" and [s.prompt for s in trace[-1]] == ["e"]  # f, g and h were proposed with it


def test_dsg_of_nothing_of_cycles_and_of_parents_that_come_later():
    assert np.isnan(M.dsg_score({}, {}))
    assert M.dsg_score({1: True, 2: True, 3: True}, {1: [1], 2: [3], 3: [2]}) == 1
    assert M.dsg_score({1: True, 2: True, 3: False}, {1: [2], 2: [3]}) == 0
    assert M.dsg_score({1: True, 2: False, 3: True}, {1: [2], 2: [1]}) == pytest.approx(1 / 3)


def test_noun_phrases_of_paintings_and_of_black_and_white():
    text = "An old oil painting of the moon and a black and white cat, with its kitten"
    assert M.noun_phrases(text) == ["moon", "black-and-white cat", "kitten"]
    assert M.noun_phrases("there is a red ring above a ring and a red ring") == ["red ring", "ring"]  # each once


def test_options_reach_the_message_and_a_second_one_shows_what_was_given():
    replies, sent = ["<PROMPT>one</PROMPT>", "<PROMPT>two</PROMPT><PROMPT>three</PROMPT><PROMPT>four</PROMPT>"], []
    model = SimpleNamespace(chat=lambda system, user, room=1: sent.append((system, user)) or replies[len(sent) - 1])
    cfg = M.Config(score="dcs", conciseness=False, prioritise=False, reasoning=True, structure=True)
    history = [M.Scored("tried", 0.2, [("cat", 0.2)])]
    assert M.HttpProposer(model, cfg).propose("a cat", history, 3) == ["one", "two", "three"]
    assert sent[0] == M.meta_prompt("a cat", history, 3, "dcs", False, False, True, True) and "visual element" in sent[0][1]
    assert sent[1][0] == sent[0][0] and sent[1][1].startswith(sent[0][1])
    assert "<PROMPT>one</PROMPT>" in sent[1][1] and "Give 2 others" in sent[1][1]
    sent.clear()
    M.HttpProposer(model, cfg).propose("a cat", [], 1)
    assert sent == [M.paraphrase_prompt("a cat", 1)]


def test_offline_proposers_start_from_the_best_prompt_and_its_weakest_element(monkeypatch):
    history = [M.Scored("worst", 0.1, [("E?", 0.0)]), M.Scored("best", 0.6, [("A?", 1.0), ("B?", 0.0), ("C?", 1.0)])]
    calls = []

    def reworded(text, weak, rng):
        calls.append((text, weak))
        return f"{text} {len(calls)}"

    monkeypatch.setattr(M.zoo, "reworded", reworded)
    monkeypatch.setattr(M.zoo, "same_meaning", lambda a, b: True)
    assert len(M.Grammar(0).propose("p0", history, 200)) == 200 and {t for t, _ in calls} == {"best", "p0"}
    assert 0.6 < np.mean([t == "best" for t, _ in calls]) < 0.8
    assert np.mean([w == "B?" for t, w in calls if t == "best"]) > 0.95 and {w for t, w in calls if t == "p0"} == {""}

    class Read(Exception):
        pass

    def ids(tok, *words):
        raise Read(*words)

    monkeypatch.setattr(M.zoo, "rewriter_ids", ids)
    lm = object.__new__(M.LmProposer)
    lm.tok = None
    for some, want in ((history, ("p0", "best", "B?")), ([], ("p0", "p0", ""))):
        with pytest.raises(Read) as caught:
            lm.propose("p0", some, 3)
        assert caught.value.args == want


def test_tables_give_the_first_caption_of_a_picture_and_the_first_prompts_of_each_challenge(tmp_path):
    (tmp_path / "coco.csv").write_text("image_id,caption\n7,a cat\n7,one cat\n5,a dog\n5,one dog\n")
    assert [t.prompt for t in M.read_tasks(tmp_path / "coco.csv", 9)] == ["a cat", "a dog"]
    assert [t.prompt for t in M.read_tasks(tmp_path / "coco.csv", 1)] == ["a cat"]
    rows = ["Prompt\tCategory\tChallenge", "a1\tx\tA", "b1\tx\tB", "a2\tx\tA", "b2\tx\tB", "a3\tx\tA"]
    (tmp_path / "parti.tsv").write_text("\n".join(rows))
    assert [t.prompt for t in M.read_tasks(tmp_path / "parti.tsv", 2, "B,A")] == ["b1", "b2", "a1", "a2"]


def test_generated_prompts_name_what_they_are_asked_for():
    for task in M.make_tasks(M.Config(prompts="20")):
        assert task.prompt.startswith("on a ") and M.zoo.ground_first(task.prompt.split(", ")[0]) != task.prompt
        assert set(task.parents) == set(task.questions) and {p for some in task.parents.values() for p in some} <= set(
            task.questions
        )
        for text in task.questions.values():
            if " background " in text:
                assert text.split()[-1].strip("?") in task.prompt
            elif text.startswith("Is there a "):
                assert text[len("Is there a ") : -1] in task.prompt
            else:
                assert not re.search(r"solid|at the|centre", text) and text.split()[2] in task.prompt


def test_each_picture_of_a_server_or_command_has_a_seed_of_its_own(monkeypatch):
    monkeypatch.setattr(M, "by_endpoint", lambda client, prompt, seed: (prompt, seed))
    monkeypatch.setattr(M, "by_command", lambda cfg, prompt, seed: (prompt, seed))
    for cfg in (M.Config(image_url="http://x"), M.Config(image_command="x")):
        draw = M.make_generator(cfg, "cpu")
        assert draw("p", 3, 2) == [("p", 2000), ("p", 2001), ("p", 2002)] and draw("p", 1, 0) == [("p", 0)]


def test_a_command_that_fails_once_is_tried_again(tmp_path):
    Image.new("RGB", (8, 8), (1, 2, 3)).save(tmp_path / "made.png")
    (tmp_path / "draw.sh").write_text(f'cd {tmp_path}\n[ -e tried ] && cp made.png "$1"\ntouch tried\n')
    cfg = M.Config(image_command=f"sh {tmp_path}/draw.sh {{out}}")
    assert M.by_command(cfg, "x", 0).getpixel((0, 0)) == (1, 2, 3)


def test_dsg_scores_each_picture_by_the_rule_and_elements_by_their_own_answers():
    task = M.Task("p", {"1": "A?", "2": "B?", "3": "C?"}, {"2": ["1"], "3": ["2"]})
    scorer = object.__new__(M.Scorer)
    scorer.answers = lambda task, images: [{"1": False, "2": True, "3": True}, {"1": True, "2": True, "3": False}]
    for official, each in ((False, [0, 2 / 3]), (True, [1 / 3, 2 / 3])):
        scorer.cfg = M.Config(official_dsg=official)
        score, elements, got = scorer(task, [None, None])
        assert got == pytest.approx(each) and score == pytest.approx(np.mean(each))
        assert elements == [("A?", 0.5), ("B?", 1.0), ("C?", 0.5)]


def test_dcs_scores_each_picture_over_phrases_and_elements_over_pictures():
    f_img, f_txt = torch.tensor([[1.0, 0.0], [0.6, 0.8]]), torch.tensor([[2.0, 0.0], [0.0, 3.0], [-1.0, 0.0]])
    asked, scorer = [], object.__new__(M.Scorer)
    scorer.cfg, scorer.device, sizes = M.Config(score="dcs"), "cpu", SimpleNamespace(image_size=8, context=9)
    scorer.tok = lambda texts, context: asked.append(texts) or torch.ones(len(texts), 2, dtype=torch.long)
    scorer.clip = SimpleNamespace(
        visual=sizes, text=sizes, encode_image=lambda x: f_img[: len(x)], encode_text=lambda ids: f_txt
    )
    score, elements, each = scorer(M.Task("a cat, the dog and a bird"), torch.zeros(2, 3, 8, 8))
    assert asked == [["cat", "dog", "bird"]]  # the user's phrases
    assert [e for e, _ in elements] == asked[0] and [v for _, v in elements] == pytest.approx([0.8, 0.4, -0.8])
    assert each == pytest.approx([0, 0.8 / 3]) and score == pytest.approx(0.4 / 3)


def test_other_seeds_are_the_best_pictures_of_all_and_a_refusal_among_them_ends_nothing():
    cfg, task = M.Config(steps=1, candidates=2, images=2, target=2.0, seed=4), M.Task("a red star")
    drawn = {4: [0.1, 0.2], 6: [0.9, 0.3]}

    def draw(p, n, seed):
        if seed not in drawn:
            raise M.Refused("no")
        return torch.tensor(drawn[seed])

    def scorer(task, x):
        return float(x.mean()), [], x.tolist()

    found = M.search("seeds", task, draw, scorer, None, cfg)
    assert found.pictures == pytest.approx([0.1, 0.2, 0.9, 0.3]) and found.best.score == pytest.approx(0.6)
    assert found.best.prompt == task.prompt and found.trace[0][0].score == pytest.approx(0.15)
    drawn.pop(4)  # the user's prompt itself
    with pytest.raises(M.Refused):
        M.search("seeds", task, draw, scorer, None, cfg)


def test_a_search_has_the_history_and_the_target_that_were_asked_for():
    task, shown = M.Task("p"), []

    def propose(prompt, history, n):
        shown.append(len(history))
        return [f"{len(shown)} {i}" for i in range(n)]

    def scorer(task, x):
        return 0.5, [], [0.5] * len(x)

    for target, history, want in ((2.0, 1, [1, 1, 1]), (2.0, 3, [1, 3, 3]), (0.5, 3, [])):
        shown.clear()
        cfg = M.Config(steps=3, candidates=2, images=1, history=history, target=target)
        M.search("opt2i", task, lambda p, n, seed: torch.zeros(n), scorer, SimpleNamespace(propose=propose), cfg)
        assert shown == want


def test_prompts_without_a_picture_are_worth_least():
    task, proposer = M.Task("p"), SimpleNamespace(propose=lambda prompt, history, n: ["q"])

    def draw(p, n, seed):
        if p == "q":
            raise M.Refused("no")
        return torch.zeros(n)

    for kind, own in (("dsg", 0.0), ("dcs", -0.5)):
        cfg = M.Config(steps=1, candidates=1, score=kind)
        found = M.search("opt2i", task, draw, lambda task, x, own=own: (own, [], [own] * len(x)), proposer, cfg)
        assert found.best.prompt == "p" and found.trace[1][0].score == (0 if kind == "dsg" else -1)
        assert len(found.pictures) == cfg.images


def test_set_metrics_compare_first_and_best_prompts_on_fresh_seeds():
    cfg, seeds = M.Config(methods="seeds,opt2i", fresh=4, seed=3), set()

    class Judge(torch.nn.Linear):
        def features(self, x, grid):
            return x[:, :, 0, :4].flatten(1)

    def draw(p, n, seed):
        seeds.add(seed)
        out = torch.zeros(n, 3, 32, 32)
        out[range(n), 0, 0, range(n) if p == "best" else [0] * n] = 1.0
        return out

    results = [{"methods": {"opt2i": {"prompt": "best"}}}] * 2
    out = M.set_metrics([M.Task("first")] * 2, results, draw, Judge(1, 1), cfg)
    assert out["first_diversity"] == pytest.approx(0) and out["best_diversity"] == pytest.approx(1)  # 1 - mean cosine of pairs
    assert out["first_fd"] != out["best_fd"] and seeds == {500_003}


def test_busy_and_early_statuses_cost_a_retry():
    with Server() as server:
        server.plan[:] = [(408, {}), (409, {}), (425, {}), (200, said("at last"))]
        assert client(server).chat("s", "u") == "at last" and len(server.seen) == 4


def test_a_prompt_that_lacks_its_last_method_alone_is_finished(tmp_path):
    args = ["--preset", "smoke", "--proposer", "grammar", "--methods", "opt2i,paraphrase", "--out_dir", tmp_path]
    assert inside(M, *args).returncode == 0
    path = sorted(tmp_path.rglob("0*.json"))[0]
    state = json.loads(path.read_text())
    del state["methods"]["paraphrase"]
    path.write_text(json.dumps(state))
    before = json.loads((tmp_path / "metrics.json").read_text())
    (tmp_path / "metrics.json").unlink()
    done = inside(M, *args)
    assert done.returncode == 0 and json.loads((tmp_path / "metrics.json").read_text()) == before, done.stderr


@pytest.mark.parametrize(
    "url, key, words", [("http://a b/v1", "", "no server's address"), ("http://a/v1", "schl\u00fcssel", "no header")]
)
def test_addresses_and_keys_that_cannot_be_sent(url, key, words):
    with pytest.raises(ValueError, match=words):
        M.ChatClient(url, key=key)
