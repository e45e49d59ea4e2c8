"""Trains a small CLIP from scratch: of the generated world (common/zoo.py), or of your own pictures with captions or classes.

python data_prep/train_clip.py --out_dir runs/clip                     (about 30 minutes on one core)
python data_prep/train_clip.py --data data/public --tokenizer bpe_simple_vocab_16e6.txt.gz --out_dir runs/clip_public

Scenes have 4 or 9 cells, captions name neither sizes nor grounds, nobody sees a close-up: room for methods/dci.py, which begins
with this model and fine-tunes it on dense captions. Photographs are cropped and flipped at random; a class gets the data set's
templates. The weights are read by common.vit.load_clip, as published ones are.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

import numpy as np
import torch
import torch.nn.functional as F

from common import augment, ckpt, cli, data, ddp, metrics, optim, scenes, zoo
from common.log import RunLog, table
from common.tokenizer import Tokenizer
from common.vit import CLIP, TextTransformer, ViT, trim


@dataclass(frozen=True)
class Config:
    out_dir: str = "runs/clip"  # folder of the run; model.safetensors holds the weights
    seed: int = 0  # of weights and scenes
    steps: int = 2_500  # updates
    batch_size: int = 128  # pairs, GLOBAL
    data: str = ""  # shards with captions or classes; "" = generated scenes
    tokenizer: str = ""  # CLIP's merges file, for --data
    images: int = 30_000  # generated training pictures
    image_size: int = 32  # pixels; scenes have 32
    patch: int = 4  # pixels
    width: int = 96  # of both transformers, and of their common space
    depth: int = 4  # layers of the ViT, twice those of the text transformer
    memory_gb: float = 8.0  # pictures of --data are held in memory, which they must fit into
    lr: float = 2e-3  # peak, AdamW; warm-up, then linear decay
    warmup: int = 150  # updates
    wd: float = 0.05  # weight decay
    log_every: int = 50  # updates
    save_every: int = 500  # updates
    resume: bool = True  # continue from last.pt, exactly


PRESETS = {"laptop": {}, "smoke": dict(steps=3, batch_size=16, images=64, warmup=1, out_dir="runs/clip_smoke")}
GRIDS = (2, 3)


CONTEXT = 77


def pairs(count: int, seed: int):
    """Half of the scenes on each grid -> images (N, 3, 32, 32) uint8, five captions of each."""
    worlds = [scenes.Source(count // 2, seed * 10 + i, 32, brief=True, grid=grid) for i, grid in enumerate(GRIDS)]
    images = torch.cat([torch.from_numpy(w.images).permute(0, 3, 1, 2) for w in worlds])
    return {"image": images, "row": torch.arange(len(images))}, [texts for w in worlds for texts in w.texts]


def prepared(folder, split: str, cfg, env):
    """Shards -> pictures in memory with their sides and rows, the texts of every row: captions, or templates of its class."""
    source = data.Shards(folder, split)
    templates = source.manifest.get("templates") or ["a photo of a {}."]
    texts = []
    for r in data.records(source):
        label = r.get("label", -1)
        named = [t.format(source.classes[label]) for t in templates] if 0 <= label < len(source.classes) else []
        texts.append(r.get("captions") or named)
    rows = [i for i, some in enumerate(texts) if some]
    if not rows:
        raise ValueError(f"{folder}: no picture of the split {split} has a caption or a class")
    pictures = data.load(source, rows, cfg.image_size, env, cfg.memory_gb)
    if not isinstance(pictures, dict):
        raise ValueError(f"{folder}: {len(rows):,} pictures do not fit into --memory_gb {cfg.memory_gb:g}")
    return pictures, texts


def normalised(images):  # twin: normalised
    """uint8 (B, 3, S, S) -> CLIP's input."""
    mean, std = (torch.tensor(v, device=images.device).view(1, 3, 1, 1) for v in metrics.MEAN_STD["clip"])
    return (images.float() / 255 - mean) / std


def seen(batch, cfg, env, step):
    """Network input of a batch: scenes as they are, since flips would make captions wrong; photographs cropped and flipped."""
    x = batch["image"].to(env.device)
    if not cfg.data:
        return normalised(x)
    g, n = torch.Generator().manual_seed(cfg.seed * 1_000_003 + step), len(x)
    u = torch.rand(n * env.world, augment.NUMBERS, generator=g)[env.rank * n :][:n].to(env.device)
    plain = augment.Colour(jitter_p=0, grey_p=0, blur_p=0)
    return normalised(255 * augment.view(x, batch["side"].to(env.device), u, cfg.image_size, (0.5, 1.0), plain))


def train(cfg: Config) -> dict:
    env = ddp.start(cfg.seed)
    cli.within(cfg, "steps batch_size image_size patch depth", 1)
    cli.within(cfg, "images", cfg.batch_size)
    if cfg.width < 4 or cfg.width % 4 or cfg.image_size % cfg.patch:
        raise ValueError(f"--width {cfg.width} must be a multiple of 4, --image_size {cfg.image_size} of --patch {cfg.patch}")
    if bool(cfg.data) != bool(cfg.tokenizer) or not cfg.data and cfg.image_size != 32:
        raise ValueError("--data and --tokenizer belong together; scenes have 32 pixels and a tokenizer of their own")
    tok = Tokenizer.from_clip(cfg.tokenizer) if cfg.data else zoo.load_tokenizer()
    pictures, texts = prepared(cfg.data, "train", cfg, env) if cfg.data else pairs(cfg.images, cfg.seed)
    test = prepared(cfg.data, data.held_out(cfg.data), cfg, env) if cfg.data else None
    if len(pictures["row"]) < cfg.batch_size:
        raise ValueError(f"{cfg.data}: {len(pictures['row'])} training pictures, fewer than --batch_size {cfg.batch_size}")
    ddp.reseed(cfg.seed, 0, 0)
    visual = dict(image_size=cfg.image_size, patch=cfg.patch, width=cfg.width, depth=cfg.depth, heads=4, norm_pre=True,
                  out_dim=cfg.width, patch_bias=False, eps=1e-5)  # fmt: skip
    text = dict(context=CONTEXT, width=cfg.width, depth=max(1, cfg.depth // 2), heads=4, out_dim=cfg.width, act="gelu",
                vocab=len(tok))  # fmt: skip
    clip = CLIP(ViT(**visual), TextTransformer(**text)).to(env.device)
    model = ddp.wrap(clip, env)
    opt = torch.optim.AdamW(optim.decay_groups(clip, cfg.wd), cfg.lr, fused=True)
    out, share = Path(cfg.out_dir), env.share(cfg.batch_size)
    start, _ = ckpt.resume(out / "last.pt", cfg, model=clip, opt=opt)
    stream = data.InMemory(pictures, cfg.batch_size, env, cfg.seed, start)
    own = torch.arange(share, device=env.device) + env.rank * share
    log = RunLog(cfg, env, "clip", start)
    for step in range(start, cfg.steps):
        rate = cfg.lr * (1 - max(0, step - cfg.warmup) / max(1, cfg.steps - cfg.warmup))
        optim.set_lr(opt, rate * min(1.0, (step + 1) / max(1, cfg.warmup)))
        batch = next(stream)
        draw = np.random.default_rng((cfg.seed, 11, step)).random(cfg.batch_size)[env.rank * share :]
        some = [texts[r][int(u * len(texts[r]))] for r, u in zip(batch["row"].tolist(), draw)]
        ids = trim(tok(some, CONTEXT), 8).to(env.device)
        f_img, f_txt, scale = model(seen(batch, cfg, env, step), ids)
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
        result = evaluate(clip.eval(), tok, env.device, test)
        sizes = dict(act="gelu", heads=dict(visual=4, text=4), visual=visual, text=text)
        ckpt.export(out / "model.safetensors", clip.state_dict(), **sizes)
        print(table(list(map(list, result.items())), ["new pictures, %", ""]))
    log.finish(result)
    return result


@torch.no_grad()
def evaluate(clip, tok, device, test=None, count=500) -> dict:
    """Test pictures: the first text of each among all of these texts. Scenes: retrieval by captions, among all and among 8."""

    def embed(images, texts):
        f = torch.cat([clip.encode_image(normalised(x.to(device))) for x in images.split(256)])
        t = torch.cat([clip.encode_text(trim(tok(texts[i : i + 256], CONTEXT)).to(device)) for i in range(0, len(texts), 256)])
        return F.normalize(f, dim=1), F.normalize(t, dim=1)

    if test:
        own = [test[1][r][0] for r in test[0]["row"].tolist()]
        names = list(dict.fromkeys(own))
        f, t = embed(test[0]["image"], names)
        right = (f @ t.T).argmax(1) == torch.tensor([names.index(n) for n in own], device=device)
        return {f"right one of {len(names):,} texts": 100 * right.float().mean().item()}
    out = {}
    for grid in GRIDS:
        world = scenes.Source(count, 90 + grid, 32, brief=True, grid=grid)
        texts = [texts[0] for texts in world.texts]
        f, t = embed(torch.from_numpy(world.images).permute(0, 3, 1, 2), texts)
        match = torch.tensor([[a == b for b in texts] for a in texts], device=f.device)
        out[f"R@1 of {count}, grid {grid}"] = metrics.retrieval_recall(t, f, match, (1,))[1]
        scores = torch.stack([a @ b.T for a, b in zip(f.split(8), t.split(8)) if len(a) == 8])
        out[f"caption of 8, grid {grid}"] = 100 * (scores.argmax(2) == torch.arange(8, device=device)).float().mean().item()
    return out


if __name__ == "__main__":
    cli.main(train, Config, PRESETS)
