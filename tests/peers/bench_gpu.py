"""Speed on one GPU: images a second, memory, and the share of the matrix-product peak that was measured beside it.

python tests/peers/bench_gpu.py [--only dit,clip,vae,metrics] [--small]

Training steps and decoding in bfloat16 autocast, random weights and data, eager and compiled. Operations are counted by torch's
flop counter on the eager step, whatever the step does: forward, backward, not the optimiser's.
"""

import argparse
import statistics
import sys
import time
from functools import partial
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent.parent)]

import torch
from torch.utils.flop_counter import FlopCounterMode

from common import ddp, metrics
from common.dit import SIZES, DiT
from common.log import table, versions
from common.vae import VAE
from common.vit import CLIP, TextTransformer, ViT
from methods import dp_rdm
from methods.clip_recipe import clip_loss


def seconds(work, repeats: int = 10) -> float:
    """Median of single runs, each synchronised, after three."""
    times = []
    for i in range(3 + repeats):
        torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        torch.cuda.synchronize()
        times += [time.perf_counter() - began] if i >= 3 else []
    return statistics.median(times)


def peak(n: int) -> float:
    """Operations a second of one large bfloat16 matrix product."""
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * n**3 / seconds(lambda: a @ b, 20)


def training_step(model, loss):
    """loss(model) -> scalar; the whole update by fused AdamW."""
    opt = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)

    def step(called=model):
        with torch.autocast("cuda", torch.bfloat16):
            value = loss(called)
        value.backward()
        opt.step()
        opt.zero_grad(set_to_none=True)

    return step


def dit(small):
    name, batch = ("DiT-S/2", 8) if small else ("DiT-XL/2", 128)
    model = DiT(32, channels=4, learn_sigma=True, **SIZES[name]).cuda()
    x, t, y = torch.randn(batch, 4, 32, 32).cuda(), torch.rand(batch).cuda(), torch.randint(0, 1000, (batch,)).cuda()
    step = training_step(model, lambda m: m(x, t, y).float().square().mean())
    return f"{name} training step, 256 px", batch, step, model


def clip(small):
    batch, width, depth = (16, 192, 2) if small else (512, 768, 12)
    visual = ViT(224, 16, width, depth, width // 64, out_dim=512)
    model = CLIP(visual, TextTransformer(width=512, depth=depth, heads=8, out_dim=512)).cuda()
    img, ids = torch.randn(batch, 3, 224, 224).cuda(), torch.randint(1, 49_000, (batch, 77)).cuda()
    ids[:, -1] = 49_407
    return (
        f"CLIP ViT-{'tiny' if small else 'B'}/16 training step",
        batch,
        training_step(model, lambda m: clip_loss(*m(img, ids))),
        model,
    )


def vae(small):
    batch, model = (2, VAE(ch=32)) if small else (32, VAE())
    model = model.cuda().eval().to(memory_format=torch.channels_last)
    z = torch.randn(batch, 4, 32, 32).cuda()

    def decode(called=model.decode):
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            called(z)

    return "Stable Diffusion's decoder, 256 px", batch, decode, model.decode


def evaluation(small):
    """float32 throughout, no share of a peak."""
    n, rows = (2_000 if small else 50_000), (20_000 if small else 1_000_000)
    x, y = (torch.randn(n, 768, device="cuda") for _ in range(2))
    yield f"precision, recall, density, coverage, {n:,} x {n:,} x 768", lambda: metrics.prdc(x, y, 5)
    x, y = (torch.randn(n, 2048, device="cuda") for _ in range(2))
    yield f"Frechet distance, {n:,} x 2,048 features given", lambda: metrics.frechet_distance(x, y)
    bank, query = torch.randn(rows, 512, device="cuda"), dp_rdm.unit(torch.randn(1, 512, device="cuda"))[0]
    norms = bank.norm(dim=1)
    yield f"nearest 20 of {rows:,} x 512, one query", lambda: dp_rdm.nearest(query, bank, 20, norms=norms)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="dit,clip,vae,metrics")
    parser.add_argument("--small", action="store_true", help="tiny models, to see that it runs")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("error: this measures a GPU and there is none; tests/peers/bench.py measures a CPU")
    ddp.start(0)  # what the methods set
    top = peak(2048 if args.small else 8192)
    print(f"{torch.cuda.get_device_name()}, matrix product {top / 1e12:.0f} TFLOP/s in bfloat16; {versions()}", flush=True)
    for job in (j for j in (dit, clip, vae) if j.__name__ in args.only.split(",")):
        rows, (name, batch, step, callee) = [], job(args.small)
        with FlopCounterMode(display=False) as counter:
            step()
        for how, work in (("eager", step), ("compiled", partial(step, torch.compile(callee)))):
            torch.cuda.reset_peak_memory_stats()
            s = seconds(work)
            rows.append([name, batch, how, f"{1000 * s:.1f}", f"{batch / s:,.0f}", f"{torch.cuda.max_memory_allocated() / 2**30:.1f}",
                         f"{counter.get_total_flops() / s / 1e12:.0f}", f"{100 * counter.get_total_flops() / s / top:.0f} %"])  # fmt: skip
        print(table(rows, ["work", "batch", "", "ms", "images/s", "GiB", "TFLOP/s", "of the product's"]), flush=True)
        del step, callee, work
        torch.cuda.empty_cache()
    if "metrics" in args.only:
        rows = []
        for name, work in evaluation(args.small):
            torch.cuda.empty_cache()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            s = seconds(work, 3)
            rows.append([name, f"{1000 * s:.1f}", f"{(torch.cuda.max_memory_allocated() - before) / 2**30:.2f}"])
        print(table(rows, ["work, inputs on the device", "ms", "GiB beside them"]))
