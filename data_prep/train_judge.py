"""Trains the judge of the generated world (common/zoo.py): which shape, colour, size, texture and background a cell shows.

python data_prep/train_judge.py --out_dir runs/judge                       (about 10 minutes on one core)

It judges what generators draw, and its features serve Frechet distances between scenes.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

import torch
import torch.nn.functional as F

from common import ckpt, cli, ddp, optim, scenes, zoo
from common.log import RunLog, table


@dataclass(frozen=True)
class Config:
    out_dir: str = "runs/judge"  # folder of the run; model.safetensors holds the weights
    seed: int = 0  # of weights and scenes
    steps: int = 1_500  # updates
    batch_size: int = 128  # cells, GLOBAL
    lr: float = 2e-3  # peak, AdamW; warm-up, then cosine
    warmup: int = 50  # updates
    wd: float = 0.05  # weight decay
    noise: float = 0.05  # standard deviation of pixel noise in training, in [-1, 1]
    blur: float = 1.0  # training pictures are mixed with a blurred copy, up to this share: generators are not razor-sharp
    width: int = 24  # of the ResNet; common/weights holds width 24
    log_every: int = 25  # updates
    save_every: int = 250  # updates
    resume: bool = True  # continue from last.pt, exactly


PRESETS = {"laptop": {}, "smoke": dict(steps=3, batch_size=16, warmup=1, out_dir="runs/judge_smoke")}


def truth(s: scenes.Scene) -> dict[str, list[int]]:
    """What a perfect judge reads: attribute -> index for every cell, -1 where an empty cell has no such attribute."""
    out = {k: [-1] * s.grid**2 for k in zoo.ANSWERS}
    out["shape"] = [zoo.ANSWERS["shape"].index("nothing")] * s.grid**2
    for name in ("tone", "pattern"):
        out[name] = [zoo.ANSWERS[name].index(getattr(s, name))] * s.grid**2
    for t in s.things:
        for name in ("shape", "colour", "size", "texture"):
            out[name][t.cell] = zoo.ANSWERS[name].index(getattr(t, name))
    return out


def blurred(x, share):
    """Mixes x (N, 3, S, S) with its 3 x 3 binomial blur; share (N,)."""
    kernel = torch.tensor([1.0, 2.0, 1.0])
    kernel = (kernel[:, None] * kernel / 16).expand(3, 1, 3, 3)
    soft = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), kernel, groups=3)
    return torch.lerp(x, soft, share.view(-1, 1, 1, 1))


def batch(first: int, count: int, seed: int, grids=(1, 2, 3), blur: float = 0.0):
    """`count` cells, each out of a scene of its own -> pictures (count, 3, 32, 32) in [-1, 1] and the true answers.

    Grids of 1, 2 and 3 cells a side in turn, at 32 px; every fourth scene has private shapes; a third of the cells is empty
    at most, since full ones are drawn first where there is a choice. blur: see Config, the shares by torch's generator."""
    images, answers = [], {k: [] for k in zoo.ANSWERS}
    for grid in grids:
        world = [scenes.scene(i, seed, (1, 3), private=i % 4 == 3, grid=grid) for i in range(first, first + count)
                 if grids[i % len(grids)] == grid]  # fmt: skip
        pictures = torch.from_numpy(scenes.render(world, 32)).permute(0, 3, 1, 2).float() / 127.5 - 1
        pictures = zoo.cells(blurred(pictures, blur * torch.rand(len(world))) if blur else pictures, grid)
        for i, s in enumerate(world):
            full = [t.cell for t in s.things]
            cell = full[i % len(full)] if i % 3 else i % grid**2
            images.append(pictures[i * grid**2 + cell])
            for k, v in truth(s).items():
                answers[k].append(v[cell])
    return torch.stack(images), {k: torch.tensor(v) for k, v in answers.items()}


def train(cfg: Config) -> dict:
    env = ddp.start(cfg.seed)
    cli.within(cfg, "steps batch_size width", 1)
    ddp.reseed(cfg.seed, 0, 0)
    judge = zoo.Judge(cfg.width).to(env.device, memory_format=torch.channels_last)
    model = ddp.wrap(judge, env)
    opt = torch.optim.AdamW(optim.decay_groups(judge, cfg.wd), cfg.lr, fused=True)
    out, share = Path(cfg.out_dir), env.share(cfg.batch_size)
    start, _ = ckpt.resume(out / "last.pt", cfg, model=judge, opt=opt)
    log = RunLog(cfg, env, "judge", start)
    for step in range(start, cfg.steps):
        ddp.reseed(cfg.seed, env.rank, step)
        optim.set_lr(opt, optim.warmup_cosine(step, cfg.steps, cfg.warmup, cfg.lr))
        x, y = batch(step * cfg.batch_size + env.rank * share, share, cfg.seed, blur=cfg.blur)
        x = (x + cfg.noise * torch.randn_like(x)).to(env.device, memory_format=torch.channels_last)
        logits = model(x)
        loss = sum(F.cross_entropy(logits[k], y[k].to(env.device), ignore_index=-1) for k in logits)
        opt.zero_grad(set_to_none=True)
        loss.backward()
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
            ckpt.save(out / "last.pt", done, cfg, model=judge, opt=opt)
        if leave:
            log.close()
            raise KeyboardInterrupt
    result = {}
    if env.is_main:
        result = evaluate(judge.eval(), env.device)
        ckpt.export(out / "model.safetensors", judge.state_dict())
        print(table([[k, *(result[f"grid{g}_{k}"] for g in (1, 2, 3))] for k in zoo.ANSWERS],
                    ["right on new cells, %", "grid 1", "grid 2", "grid 3"]))  # fmt: skip
    log.finish(result)
    return result


@torch.no_grad()
def evaluate(judge, device, count=4_096) -> dict:
    out = {}
    for grid in (1, 2, 3):
        x, y = batch(0, count, 1_000_003, (grid,))
        logits = [judge(part.to(device)) for part in x.split(512)]
        for k, want in y.items():
            got = torch.cat([part[k] for part in logits]).argmax(1).cpu()
            out[f"grid{grid}_{k}"] = 100 * (got == want)[want >= 0].float().mean().item()
    return out


if __name__ == "__main__":
    cli.main(train, Config, PRESETS)
