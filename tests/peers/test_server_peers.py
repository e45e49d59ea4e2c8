"""ChatClient against a real OpenAI-compatible server: `transformers serve` with a tiny random model, made on the spot."""

import json
import os
import subprocess
import sys
import time
import urllib.request

import pytest

import common.vision  # noqa: F401  (first, so that transformers finds a torchvision that can be imported)
from methods import opt2i
from tests.helpers import ROOT, free_port

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
SERVE = "import common.vision; from transformers.cli.transformers import main; main()"  # the command `transformers`
TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}<|assistant|>"


def tiny_model(folder):
    """A Llama of 0.1 million random parameters with a byte-level vocabulary: it says nothing, but by the protocol."""
    special = ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
    tok = tokenizers.Tokenizer(tokenizers.models.BPE())
    tok.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    tok.train_from_iterator(["a red star"], tokenizers.trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet))
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tok, eos_token="<|end|>", pad_token="<|end|>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    config = transformers.LlamaConfig(vocab_size=len(fast), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                      num_attention_heads=2, max_position_embeddings=4096, eos_token_id=fast.eos_token_id,
                                      pad_token_id=fast.pad_token_id)  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    pytest.importorskip("fastapi", reason="needs transformers[serving]")
    folder, port = tmp_path_factory.mktemp("model"), free_port()
    tiny_model(folder)
    command = [sys.executable, "-c", SERVE, "serve", str(folder), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    log = open(folder / "log.txt", "w")
    p = subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT)
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).read()
                break
            except OSError:
                assert p.poll() is None, (folder / "log.txt").read_text()[-2000:]
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1", str(folder)
    finally:
        p.terminate()
        p.wait(30)


def test_a_conversation(server, tmp_path):
    url, name = server
    log = tmp_path / "exchanges.jsonl"
    client = opt2i.ChatClient(url, name, timeout=120, retries=1, pause=0.1, max_tokens=24, log=log)
    history = [opt2i.Scored("a red star", 0.5, [("Is there a star?", 0.75)])]
    text = client.chat(*opt2i.meta_prompt("a red star", history, 5))
    assert client.usage["requests"] == 1 and 0 < client.usage["completion_tokens"] <= 24 and client.usage["prompt_tokens"] > 200
    body = {"model": name, "messages": [{"role": "user", "content": "a red star"}], "max_tokens": 24}
    choice = client.request("/chat/completions", body)["choices"][0]
    assert isinstance(choice["message"]["content"], str) and choice["finish_reason"] in ("length", "stop")
    assert isinstance(text, str)  # an answer cut off after 24 tokens keeps its whole lines, of which random words have none
    kept = json.loads(log.read_text())
    assert kept["answer"] == text and kept["model"] == name
    again = opt2i.ChatClient("http://127.0.0.1:9/v1", replay=log)  # nobody listens there
    assert again.chat(*opt2i.meta_prompt("a red star", history, 5)) == text


def test_the_server_names_its_model(server):
    url, name = server
    client = opt2i.ChatClient(url, timeout=120, retries=0, max_tokens=4)
    assert client.chat("", "a red star") is not None and client.model == name


def test_what_it_refuses_is_one_sentence(server):
    url, name = server
    client = opt2i.ChatClient(url, name, timeout=120, retries=1, pause=0.1)
    with pytest.raises(opt2i.ServerError, match="refused the request with status 404"):
        client.request("/nowhere", {})
    with pytest.raises(opt2i.ServerError, match="failed 2 times, the last time with status 500"):  # its own mistake, not a 400
        client.request("/chat/completions", {"model": name, "messages": "no list"})


def test_a_search_with_its_answers(server, tmp_path):
    """A random model names no prompt: the run goes on and ends with the user's own."""
    url, name = server
    cfg = opt2i.Config(**opt2i.PRESETS["smoke"] | dict(prompts="1", llm_url=url, llm_model=name, max_tokens=8, methods="opt2i",
                                                       target=2.0, out_dir=str(tmp_path)))  # fmt: skip
    result = opt2i.run(cfg)
    assert result["opt2i_pictures"] >= cfg.images
    assert len((tmp_path / "exchanges.jsonl").read_text().splitlines()) >= cfg.steps
