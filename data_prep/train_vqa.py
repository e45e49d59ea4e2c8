"""Trains the VQA model of the generated world (common/zoo.py): a picture and a question -> yes or no.

python data_prep/train_vqa.py --out_dir runs/vqa                     (6 minutes on a shared H200; a CPU takes hours)

It stands where a text-to-image evaluation asks a vision-language model (DSG). Half of the answers are no, to questions that
differ from a true one in the one thing that is asked for, so that the words alone give nothing away.
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


@dataclass(frozen=True)
class Config:
    out_dir: str = "runs/vqa"  # folder of the run; model.safetensors holds the weights
    seed: int = 0  # of weights, scenes and questions
    steps: int = 20_000  # updates
    batch_size: int = 1_024  # questions, GLOBAL
    pictures: int = 40_000  # seen once before the first update
    questions: int = 500_000  # different ones about them, asked again and again
    lr: float = 1e-3  # peak, AdamW; warm-up, then cosine
    warmup: int = 500  # updates
    wd: float = 0.02  # weight decay
    width: int = 96  # of the transformer
    depth: int = 3  # its blocks
    log_every: int = 50  # updates
    save_every: int = 1_000  # updates
    resume: bool = True  # continue from last.pt, exactly


PRESETS = {
    "laptop": {},
    "smoke": dict(steps=3, batch_size=16, pictures=32, questions=64, warmup=1, out_dir="runs/vqa_smoke"),
}


def world(count: int, seed: int) -> list[scenes.Scene]:
    return [scenes.scene(i, seed, (1, 3), grid=2) for i in range(count)]


def look(vqa, some, device) -> torch.Tensor:
    """What the model's eyes see of scenes (N, 4, D)."""
    parts = []
    for i in range(0, len(some), 128):
        x = torch.from_numpy(scenes.render(some[i : i + 128], 32)).permute(0, 3, 1, 2).to(device)
        parts.append(vqa.see(x.float() / 127.5 - 1))
    return torch.cat(parts)


def asked(some, count: int, seed: int):
    """Questions -> rows of their scenes, texts, answers, kinds."""
    rng, out = np.random.default_rng((seed, 3)), []
    for row in rng.integers(len(some), size=count).tolist():
        text, answer, kind = scenes.ask(some[row], rng, scenes.YES_NO)
        out.append((row, text, float(answer == "yes"), kind))
    return tuple(map(list, zip(*out)))


def train(cfg: Config) -> dict:
    cli.within(cfg, "steps batch_size pictures questions width depth", 1)
    env, some = ddp.start(cfg.seed), world(cfg.pictures, cfg.seed)
    rows, texts, answers, _ = asked(some, cfg.questions, cfg.seed)
    words = sorted({w for q in asked(world(500, 1), 4_000, 1)[1] for w in q.lower().strip("?").split()})
    ddp.reseed(cfg.seed, 0, 0)
    vqa = zoo.Vqa(words, cfg.width, cfg.depth).to(env.device)
    vqa.judge.requires_grad_(False).eval()
    seen = look(vqa, some, env.device)
    vqa.centre.copy_(seen.mean((0, 1)))
    vqa.spread.copy_(seen.std((0, 1)).clamp_min(0.05))
    rows, ids, answers = (x.to(env.device) for x in (torch.tensor(rows), vqa.ids(texts), torch.tensor(answers)))
    model = ddp.wrap(vqa, env)
    opt = torch.optim.AdamW(optim.decay_groups(vqa, cfg.wd), cfg.lr, (0.9, 0.98), fused=True)
    out, share = Path(cfg.out_dir), env.share(cfg.batch_size)
    start, _ = ckpt.resume(out / "last.pt", cfg, model=vqa, opt=opt)
    log = RunLog(cfg, env, "vqa", start)
    for step in range(start, cfg.steps):
        optim.set_lr(opt, optim.warmup_cosine(step, cfg.steps, cfg.warmup, cfg.lr))
        g = torch.Generator(env.device).manual_seed(cfg.seed * 1_000_003 + step)
        these = torch.randint(len(rows), (cfg.batch_size,), generator=g, device=env.device)[env.rank * share :][:share]
        loss = F.binary_cross_entropy_with_logits(model(seen[rows[these]], ids[these]), answers[these])
        opt.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_([p for p in vqa.parameters() if p.requires_grad], 1.0)
        opt.step()
        done, end = step + 1, step + 1 == cfg.steps
        due = done % cfg.log_every == 0 or end
        if due or done % cfg.save_every == 0:
            ddp.check_finite({"loss": loss.item(), "grad_norm": norm.item()}, step)
        if due:
            log.write(step, **ddp.mean({"loss": loss}))
        log.tick(step)
        leave = ddp.interrupted(due)
        if env.is_main and (done % cfg.save_every == 0 or end or leave):
            ckpt.save(out / "last.pt", done, cfg, model=vqa, opt=opt)
        if leave:
            log.close()
            raise KeyboardInterrupt
    result = {}
    if env.is_main:
        result = evaluate(vqa, env.device)
        kept = {k: v for k, v in vqa.state_dict().items() if not k.startswith("judge.")}  # it has a file of its own
        ckpt.export(out / "model.safetensors", kept, vqa=vqa.config)
        print(table(list(map(list, result.items())), ["right on new pictures, %", ""]))
    log.finish(result)
    return result


def evaluate(vqa, device, count=1_000) -> dict:
    """By kind of question; blind: all questions, before a grey picture."""
    some = world(count, 1_000_003)
    rows, texts, answers, kinds = asked(some, 6 * count, 1_000_003)
    seen, truth, ids = look(vqa, some, device), torch.tensor(answers) > 0.5, vqa.ids(texts).to(device)
    grey = vqa.see(torch.zeros(1, 3, 32, 32, device=device)).expand(512, -1, -1)
    with torch.no_grad():
        parts = list(zip(seen[rows].split(512), ids.split(512)))
        right = torch.cat([vqa(f, i).cpu() > 0 for f, i in parts]) == truth
        blind = torch.cat([vqa(grey[: len(i)], i).cpu() > 0 for _, i in parts]) == truth
    out = {k: 100 * right[torch.tensor([k == kind for kind in kinds])].float().mean().item() for k in scenes.YES_NO}
    return out | {"all": 100 * right.float().mean().item(), "blind": 100 * blind.float().mean().item()}


if __name__ == "__main__":
    cli.main(train, Config, PRESETS)
