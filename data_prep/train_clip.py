"""Trains the CLIP of the generated world (common/zoo.py), from scratch, on pairs of scenes and short captions.

python data_prep/train_clip.py --out_dir runs/clip                     (about 30 minutes on one core)

Scenes have 4 or 9 cells, captions name neither sizes nor grounds, nobody sees a close-up: room for methods/dci.py, which begins
with this model and fine-tunes it on dense captions.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

import numpy as np
import torch
import torch.nn.functional as F

from common import ckpt, cli, data, ddp, metrics, optim, scenes, zoo
from common.log import RunLog, table
from common.vit import CLIP, TextTransformer, ViT, trim


@dataclass(frozen=True)
class Config:
    out_dir: str = "runs/clip"  # folder of the run; model.safetensors holds the weights
    seed: int = 0  # of weights and scenes
    steps: int = 2_500  # updates
    batch_size: int = 128  # pairs, GLOBAL
    images: int = 30_000  # generated training pictures
    lr: float = 2e-3  # peak, AdamW; warm-up, then linear decay
    warmup: int = 150  # updates
    wd: float = 0.05  # weight decay
    log_every: int = 50  # updates
    save_every: int = 500  # updates
    resume: bool = True  # continue from last.pt, exactly


PRESETS = {"laptop": {}, "smoke": dict(steps=3, batch_size=16, images=64, warmup=1, out_dir="runs/clip_smoke")}
VISUAL = dict(image_size=32, patch=4, width=96, depth=4, heads=4, norm_pre=True, out_dim=96, patch_bias=False, eps=1e-5)
TEXT = dict(context=77, width=96, depth=2, heads=4, out_dim=96, act="gelu")
GRIDS = (2, 3)


def pairs(count: int, seed: int):
    """Half of the scenes on each grid -> images (N, 3, 32, 32) uint8, five captions of each."""
    worlds = [scenes.Source(count // 2, seed * 10 + i, 32, brief=True, grid=grid) for i, grid in enumerate(GRIDS)]
    images = torch.cat([torch.from_numpy(w.images).permute(0, 3, 1, 2) for w in worlds])
    return images, [texts for w in worlds for texts in w.texts]


def normalised(images):  # twin: normalised
    """uint8 (B, 3, S, S) -> CLIP's input."""
    mean, std = (torch.tensor(v, device=images.device).view(1, 3, 1, 1) for v in metrics.MEAN_STD["clip"])
    return (images.float() / 255 - mean) / std


def train(cfg: Config) -> dict:
    env, tok = ddp.start(cfg.seed), zoo.load_tokenizer()
    cli.within(cfg, "steps batch_size", 1)
    cli.within(cfg, "images", cfg.batch_size)
    images, texts = pairs(cfg.images, cfg.seed)
    ddp.reseed(cfg.seed, 0, 0)
    text = dict(TEXT, vocab=len(tok))
    clip = CLIP(ViT(**VISUAL), TextTransformer(**text)).to(env.device)
    model = ddp.wrap(clip, env)
    opt = torch.optim.AdamW(optim.decay_groups(clip, cfg.wd), cfg.lr, fused=True)
    out, share = Path(cfg.out_dir), env.share(cfg.batch_size)
    start, _ = ckpt.resume(out / "last.pt", cfg, model=clip, opt=opt) if cfg.resume else (0, {})
    rows = {"image": images, "row": torch.arange(len(images))}
    stream = data.InMemory(rows, cfg.batch_size, env, cfg.seed, start)
    own = torch.arange(share, device=env.device) + env.rank * share
    log = RunLog(cfg, env, "clip", start)
    for step in range(start, cfg.steps):
        rate = cfg.lr * (1 - max(0, step - cfg.warmup) / max(1, cfg.steps - cfg.warmup))
        optim.set_lr(opt, rate * min(1.0, (step + 1) / max(1, cfg.warmup)))
        batch = next(stream)
        draw = np.random.default_rng((cfg.seed, 11, step)).integers(5, size=cfg.batch_size)[env.rank * share :]
        ids = trim(tok([texts[r][n] for r, n in zip(batch["row"].tolist(), draw)], TEXT["context"]), 8).to(env.device)
        f_img, f_txt, scale = model(normalised(batch["image"].to(env.device)), ids)
        loss = (F.cross_entropy(scale * f_img @ ddp.gather_rows(f_txt).T, own)
                + F.cross_entropy(scale * f_txt @ ddp.gather_rows(f_img).T, own)) / 2  # fmt: skip
        opt.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(clip.parameters(), 1.0)
        opt.step()
        with torch.no_grad():
            clip.logit_scale.clamp_(max=math.log(100))
        done, end = step + 1, step + 1 == cfg.steps
        due = done % cfg.log_every == 0 or end
        if due or done % cfg.save_every == 0:
            ddp.check_finite({"loss": loss.item()}, step)
        if due:
            log.write(step, **ddp.mean({"loss": loss, "scale": scale}))
        log.tick(step)
        leave = ddp.interrupted(due)
        if env.is_main and (done % cfg.save_every == 0 or end or leave):
            ckpt.save(out / "last.pt", done, cfg, model=clip, opt=opt)
        if leave:
            log.close()
            raise KeyboardInterrupt
    result = {}
    if env.is_main:
        result = evaluate(clip.eval(), env.device, tok)
        ckpt.export(out / "model.safetensors", clip.state_dict(), visual=VISUAL, text=text)
        print(table(list(map(list, result.items())), ["new scenes, %", ""]))
    log.finish(result)
    return result


@torch.no_grad()
def evaluate(clip, device, tok, count=500) -> dict:
    """Retrieval of new scenes by their captions, among all and among eight."""
    out = {}
    for grid in GRIDS:
        world = scenes.Source(count, 90 + grid, 32, brief=True, grid=grid)
        texts = [texts[0] for texts in world.texts]
        x = normalised(torch.from_numpy(world.images).permute(0, 3, 1, 2).to(device))
        ids = trim(tok(texts, TEXT["context"])).to(device)
        f, t = F.normalize(clip.encode_image(x), dim=1), F.normalize(clip.encode_text(ids), dim=1)
        match = torch.tensor([[a == b for b in texts] for a in texts], device=f.device)
        out[f"R@1 of {count}, grid {grid}"] = metrics.retrieval_recall(t, f, match, (1,))[1]
        scores = torch.stack([a @ b.T for a, b in zip(f.split(8), t.split(8)) if len(a) == 8])
        out[f"caption of 8, grid {grid}"] = 100 * (scores.argmax(2) == torch.arange(8, device=device)).float().mean().item()
    return out


if __name__ == "__main__":
    cli.main(train, Config, PRESETS)
