"""On a GPU: every method runs, in both precisions and compiled, and what is computed there is what the CPU computes."""

import json

import pytest
import torch

from common import metrics
from methods import dp_rdm
from methods.__main__ import TEN
from tests.helpers import run, torchrun

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU at hand")]


def smoke(name, folder, *args):
    result = run(f"methods/{name}.py", "--preset", "smoke", "--out_dir", folder, *args, timeout=900)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads((folder / "metrics.json").read_text())


@pytest.mark.parametrize("name", TEN)
def test_smoke(name, tmp_path):
    assert smoke(name, tmp_path)


@pytest.mark.parametrize("name", [n for n in TEN if n not in ("opt2i", "pareto_eval")])  # these two train nothing
def test_bfloat16_and_compiled(name, tmp_path):
    assert smoke(name, tmp_path, "--dtype", "bfloat16", "--compile")


def test_resumed_in_bfloat16(tmp_path):
    args = "methods/clip_recipe.py", "--preset", "smoke", "--extra", "none", "--dtype", "bfloat16", "--out_dir", tmp_path
    assert run(*args).returncode == 0
    again = run(*args)  # finished arms are read back
    assert again.returncode == 0, again.stderr[-3000:]


def test_metrics_are_those_of_the_cpu():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(700, 24, generator=g), 1.1 * torch.randn(600, 24, generator=g)
    a, b = x.cuda(), y.cuda()
    assert metrics.prdc(a, b, 5) == metrics.prdc(x, y, 5)
    for f in (metrics.frechet_distance, metrics.kernel_distance, metrics.cmmd, metrics.frechet_infinity):
        assert f(a, b) == pytest.approx(f(x, y), rel=1e-6, abs=1e-9), f.__name__
    assert metrics.vendi(a) == pytest.approx(metrics.vendi(x), rel=1e-9)
    labels = torch.arange(700) % 3
    logits = metrics.linear_probe(a, labels.cuda())(b).cpu()
    torch.testing.assert_close(logits, metrics.linear_probe(x, labels)(y), rtol=0.05, atol=0.05)
    assert metrics.knn_accuracy(a, labels.cuda(), b, labels[:600].cuda()) == metrics.knn_accuracy(x, labels, y, labels[:600])


def test_private_retrieval_is_that_of_the_cpu():
    g = torch.Generator().manual_seed(0)
    bank, query = torch.randn(5_000, 32, generator=g), torch.randn(32, generator=g)
    for q in (1.0, 0.1):
        there, here = (
            dp_rdm.private_retrieve(x, b, 4, 0.1, q, dp_rdm.Random(3)) for x, b in ((query.cuda(), bank.cuda()), (query, bank))
        )
        torch.testing.assert_close(there.cpu(), here, rtol=0, atol=1e-12)


def test_more_processes_than_gpus_are_refused():
    n = torch.cuda.device_count() + 1
    result = torchrun(n, "methods/clip_recipe.py", "--preset", "smoke")
    assert result.returncode and "has no GPU of its own" in result.stderr
