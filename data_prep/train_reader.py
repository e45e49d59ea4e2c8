"""Trains the text encoder of the generated world (common/zoo.py): caption -> the objects that it names and their relations.

python data_prep/train_reader.py --out_dir runs/reader                     (about 6 minutes on two cores)

It stands where a text-to-image model has CLIP or T5: read beforehand, frozen afterwards. What a paraphrase leaves out stays
uncertain, and the encoder learns how uncertain.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

import numpy as np
import torch
import torch.nn.functional as F

from common import ckpt, cli, ddp, optim, scenes, zoo
from common.log import RunLog, table
from common.tokenizer import Tokenizer
from common.vit import trim


@dataclass(frozen=True)
class Config:
    out_dir: str = "runs/reader"  # folder of the run; model.safetensors holds the weights, merges.txt the words
    seed: int = 0  # of weights and scenes
    steps: int = 1_500  # updates
    batch_size: int = 128  # captions, GLOBAL
    lr: float = 2e-3  # peak, AdamW; warm-up, then cosine
    warmup: int = 100  # updates
    wd: float = 0.01  # weight decay
    log_every: int = 50  # updates
    save_every: int = 500  # updates
    resume: bool = True  # continue from last.pt, exactly


PRESETS = {"laptop": {}, "smoke": dict(steps=3, batch_size=16, warmup=1, out_dir="runs/reader_smoke")}
GRID, EMPTY = 2, len(zoo.PARTS["shape"]) - 1


def words() -> Tokenizer:
    """Every word of the captions as one token, or nearly."""
    world = [scenes.scene(i, 0, (1, 3), grid=GRID) for i in range(2_000)]
    return Tokenizer.train([scenes.caption(s, v and 3 * i + v) for i, s in enumerate(world) for v in range(3)], 900)


def batch(first: int, count: int, seed: int, tok: Tokenizer, full: bool = False):
    """Captions of `count` scenes, half of them paraphrased (none if full) -> ids (B, L), {part: true indices, -1 if none}."""
    world = [scenes.scene(i, seed, (1, 3), grid=GRID) for i in range(first, first + count)]
    rng = np.random.default_rng((seed, first))
    texts = [scenes.caption(s, 0 if full or rng.random() < 0.5 else int(rng.integers(1, 1 << 30))) for s in world]
    truth = {k: torch.full((count, 3), -1) for k in (*zoo.PARTS, "relation")}
    truth["shape"][:] = EMPTY
    truth["relation"][:] = zoo.RELATIONS.index("nothing")
    for i, s in enumerate(world):
        things = sorted(s.things, key=lambda t: scenes.SHAPES.index(t.shape))
        for j, t in enumerate(things):
            for k, options in zoo.PARTS.items():
                truth[k][i, j] = list(options).index(getattr(t, k))
        pairs = [(a, b) for a in range(3) for b in range(a + 1, 3)]
        for p, (a, b) in enumerate(pairs):
            if b < len(things):
                truth["relation"][i, p] = zoo.RELATIONS.index(scenes.relation(things[a], things[b], GRID))
    for k in ("tone", "pattern"):
        truth[k] = torch.tensor([zoo.ANSWERS[k].index(getattr(s, k)) for s in world])
    return trim(tok(texts, 40)), truth


def train(cfg: Config) -> dict:
    cli.within(cfg, "steps batch_size", 1)
    env, tok = ddp.start(cfg.seed), words()
    ddp.reseed(cfg.seed, 0, 0)
    reader = zoo.Reader(len(tok)).to(env.device)
    model = ddp.wrap(reader, env)
    opt = torch.optim.AdamW(optim.decay_groups(reader, cfg.wd), cfg.lr, (0.9, 0.98), fused=True)
    out, share = Path(cfg.out_dir), env.share(cfg.batch_size)
    start, _ = ckpt.resume(out / "last.pt", cfg, model=reader, opt=opt)
    log = RunLog(cfg, env, "reader", start)
    for step in range(start, cfg.steps):
        optim.set_lr(opt, optim.warmup_cosine(step, cfg.steps, cfg.warmup, cfg.lr))
        ids, truth = batch(step * cfg.batch_size + env.rank * share, share, cfg.seed, tok)
        logits = model(ids.to(env.device))
        loss = sum(
            F.cross_entropy(v.flatten(0, -2), truth[k].flatten().to(env.device), ignore_index=-1) for k, v in logits.items()
        )
        opt.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(reader.parameters(), 1.0)
        opt.step()
        done, end = step + 1, step + 1 == cfg.steps
        due = done % cfg.log_every == 0 or end
        if due or done % cfg.save_every == 0:
            ddp.check_finite({"loss": loss.item()}, step)
        if due:
            log.write(step, **ddp.mean({"loss": loss}))
        log.tick(step)
        leave = ddp.interrupted(due)
        if env.is_main and (done % cfg.save_every == 0 or end or leave):
            ckpt.save(out / "last.pt", done, cfg, model=reader, opt=opt)
        if leave:
            log.close()
            raise KeyboardInterrupt
    result = {}
    if env.is_main:
        result = evaluate(reader.eval(), env.device, tok)
        ckpt.export(out / "model.safetensors", reader.state_dict(), reader=reader.config)
        tok.save(out / "merges.txt")
        print(table(list(map(list, result.items())), ["right on new full captions, %", ""]))
    log.finish(result)
    return result


@torch.no_grad()
def evaluate(reader, device, tok, count=2_048) -> dict:
    """Full captions name everything but the places of two related objects, so "cell" and "relation" cannot reach 100."""
    out = {}
    for first in range(0, count, 256):
        ids, truth = batch(first, 256, 1_000_003, tok, full=True)
        for k, v in reader(ids.to(device)).items():
            right = (v.argmax(-1).cpu() == truth[k])[truth[k] >= 0]
            out.setdefault(k, []).append(right)
    return {k: 100 * torch.cat(v).float().mean().item() for k, v in out.items()}


if __name__ == "__main__":
    cli.main(train, Config, PRESETS)
