"""Trains the language model of the generated world (common/zoo.py): it paraphrases captions.

python data_prep/train_rewriter.py --out_dir runs/rewriter                     (about 12 minutes on one core)

It stands where methods/opt2i.py has a language model on a server: it reads the prompt, the best one so far and its weakest
element, and learns from paraphrases by rules that keep the meaning.
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
    out_dir: str = "runs/rewriter"  # folder of the run; model.safetensors holds the weights
    seed: int = 0  # of weights and texts
    steps: int = 1_500  # updates
    batch_size: int = 64  # texts, GLOBAL
    lr: float = 3e-3  # peak, AdamW; warm-up, then cosine
    warmup: int = 100  # updates
    wd: float = 0.01  # weight decay
    log_every: int = 50  # updates
    save_every: int = 500  # updates
    resume: bool = True  # continue from last.pt, exactly


PRESETS = {"laptop": {}, "smoke": dict(steps=3, batch_size=16, warmup=1, out_dir="runs/rewriter_smoke")}


def text(s: scenes.Scene, order: int) -> str:
    """A caption, or one in a user's order."""
    return zoo.ground_first(scenes.caption(s)) if order else scenes.caption(s)


def pair(index: int, seed: int, tok) -> tuple[list[int], list[int]]:
    """One training text: context and target ids. The history is drawn: a best prompt, and a weak element that the target puts
    first or says in other words."""
    rng = np.random.default_rng((seed, index))
    s = scenes.scene(index, seed * 7 + 31, (1, 3), grid=2)
    source, rules = text(s, rng.integers(2)), np.random.default_rng(int(rng.integers(1 << 31)))
    asked = [q["text"] for q in scenes.questions(s)]
    weak = str(rng.choice(asked)) if rng.random() < 0.8 else ""
    best = zoo.reworded(source, "", rules) if rng.random() < 0.7 else source
    for _ in range(20):
        target = zoo.reworded(source, weak, rules)
        if target != best and zoo.same_meaning(target, source):
            break
    return zoo.rewriter_ids(tok, source, best, weak), [*tok.encode(target), tok.end]


def batch(pairs, context: int) -> tuple[torch.Tensor, torch.Tensor]:
    """-> ids (B, L), mask (B, L): 1 on the target's tokens only."""
    rows = [(c + t)[:context] for c, t in pairs]
    width = max(map(len, rows))
    ids = torch.tensor([r + [0] * (width - len(r)) for r in rows])
    place = torch.arange(width)[None]
    begin, end = torch.tensor([[len(c)] for c, _ in pairs]), torch.tensor([[len(r)] for r in rows])
    return ids, ((place >= begin) & (place < end)).float()


def loss_of(model, ids, mask) -> torch.Tensor:
    """Next-token prediction of the targets alone."""
    losses = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return (losses * mask[:, 1:].flatten()).sum() / mask[:, 1:].sum()


def train(cfg: Config) -> dict:
    cli.within(cfg, "steps batch_size", 1)
    env, tok = ddp.start(cfg.seed), zoo.load_tokenizer()
    ddp.reseed(cfg.seed, 0, 0)
    rewriter = zoo.Rewriter(len(tok)).to(env.device)
    model = ddp.wrap(rewriter, env)
    opt = torch.optim.AdamW(optim.decay_groups(rewriter, cfg.wd), cfg.lr, (0.9, 0.98), fused=True)
    out, share = Path(cfg.out_dir), env.share(cfg.batch_size)
    start, _ = ckpt.resume(out / "last.pt", cfg, model=rewriter, opt=opt)
    log = RunLog(cfg, env, "rewriter", start)
    for step in range(start, cfg.steps):
        optim.set_lr(opt, optim.warmup_cosine(step, cfg.steps, cfg.warmup, cfg.lr))
        first = step * cfg.batch_size + env.rank * share
        ids, mask = batch([pair(i, cfg.seed, tok) for i in range(first, first + share)], rewriter.config["context"])
        loss = loss_of(model, ids.to(env.device), mask.to(env.device))
        opt.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(rewriter.parameters(), 1.0)
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
            ckpt.save(out / "last.pt", done, cfg, model=rewriter, opt=opt)
        if leave:
            log.close()
            raise KeyboardInterrupt
    result = {}
    if env.is_main:
        ckpt.export(out / "model.safetensors", rewriter.state_dict(), lm=rewriter.config)
        result = evaluate(rewriter.cpu().eval(), tok)
        print(table(list(map(list, result.items())), ["new captions", ""]))
    log.finish(result)
    return result


@torch.no_grad()
def evaluate(rewriter, tok, count=40) -> dict:
    """-> loss on new texts, share of what it writes that keeps the meaning, in percent."""
    held = batch([pair(i, 1_000_003, tok) for i in range(64)], rewriter.config["context"])
    kept, g = [], torch.Generator().manual_seed(0)
    for i in range(count):
        source = text(scenes.scene(i, 12345, (1, 3), grid=2), i % 2 == 1)
        rows = rewriter.write(zoo.rewriter_ids(tok, source, source, ""), 5, tok.end, g).tolist()
        kept += [zoo.same_meaning(tok.decode(row), source) for row in rows]
    return {"loss": loss_of(rewriter, *held).item(), "meaning kept, %": 100 * float(np.mean(kept))}


if __name__ == "__main__":
    cli.main(train, Config, PRESETS)
