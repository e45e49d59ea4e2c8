"""Trains an autoencoder (common/vae.py): L1 + KL, and optionally a feature term and an adversarial term.

python data_prep/train_vae.py --out_dir runs/vae                            (generated world at 32 px, f4; CPU)
torchrun --nproc_per_node=8 data_prep/train_vae.py --preset f8 --data data/imagenet --vgg vgg16.pth --gan 0.5

The loss of Stable Diffusion's autoencoder is L1 + LPIPS + 1e-6 KL + 0.5 adversarial from step 50,001 on, batch-summed,
with a learned variance. Here all terms are means over pixels, the variance is left out, and --vgg is LPIPS without its
learned channel weights (unit-normalised VGG-16 features). --edges, L1 on differences of neighbouring pixels, and --mse
are ours: without a perceptual term they keep small shapes sharp and coloured. The latent's standard deviation is
measured at the end and stored as scale.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from common import augment, ckpt, cli, data, ddp, optim, plot, scenes
from common.log import RunLog
from common.vae import VAE, load_vae, read_tensors


@dataclass(frozen=True)
class Config:
    out_dir: str = "runs/vae"  # folder of the run; model.safetensors holds weights, sizes and scale
    seed: int = 0  # of weights, data order and crops
    steps: int = 2_500  # updates
    batch_size: int = 64  # GLOBAL
    lr: float = 4e-3  # peak, AdamW; warm-up, then cosine
    warmup: int = 100  # updates
    wd: float = 0.0  # weight decay
    grad_clip: float = 1.0  # largest gradient norm, 0 = off
    dtype: str = "float32"  # float32, or bfloat16 autocast
    data: str = ""  # shards, or a folder of pictures; "" = generated scenes
    workers: int = 0  # loader processes of each rank
    max_bad: float = 0.01  # share of damaged samples at which the run stops
    log_every: int = 25  # updates
    save_every: int = 250  # updates
    resume: bool = True  # continue from last.pt, exactly
    init: str = ""  # autoencoder to start from, in any layout that common/vae.py reads; it brings its sizes
    size: int = 32  # pixels
    ch: int = 16  # width of the first level
    mult: str = "1,2,2"  # width of each level in units of ch; one halving between two levels
    blocks: int = 1  # residual blocks of an encoder level; a decoder level has one more
    z: int = 8  # latent channels; Stable Diffusion's: 4
    groups: int = 8  # of the group norms
    kl: float = 1e-3  # weight of the KL term a pixel; Stable Diffusion's: 1e-6, with sums
    edges: float = 1.0  # weight of L1 on differences of neighbouring pixels
    mse: float = 10.0  # weight of the squared error: L1 alone is content to leave rare colours out for long
    vgg: str = ""  # torchvision's vgg16 weights, for the feature term
    vgg_weight: float = 1.0  # of the feature term
    gan: float = 0.0  # weight of the adversarial term; Stable Diffusion's: 0.5
    gan_start: int = 50_000  # updates before it


PRESETS = {
    "laptop": {},
    "smoke": dict(steps=6, batch_size=8, ch=8, save_every=3, warmup=2, out_dir="runs/vae_smoke"),
    # Stable Diffusion's sizes
    "f8": dict(steps=250_000, batch_size=96, lr=1e-4, warmup=1_000, dtype="bfloat16", workers=12, size=256, ch=128,
               mult="1,2,4,4", blocks=2, z=4, groups=32, kl=1e-6, edges=0.0, mse=0.0, save_every=2_500, out_dir="runs/vae_f8"),
}  # fmt: skip


class Vgg(nn.Module):
    """Distance of unit-normalised VGG-16 features after the five relu stages, mean over pixels, summed over stages."""

    def __init__(self, path):
        super().__init__()
        from common.vision import torchvision

        self.net = torchvision.models.vgg16(weights=None).features
        state = {k.removeprefix("features."): v for k, v in read_tensors(path)[0].items() if k.startswith("features.")}
        if state.keys() != self.net.state_dict().keys():
            raise ValueError(f"--vgg {path} is not torchvision's vgg16: it lacks features.*.weight or has others")
        self.net.load_state_dict(state)
        self.requires_grad_(False)

    def forward(self, a, b):
        mean, std = (torch.tensor(v, device=a.device).view(1, 3, 1, 1) for v in (augment.IMAGENET_MEAN, augment.IMAGENET_STD))
        a, b, total = (a / 2 + 0.5 - mean) / std, (b / 2 + 0.5 - mean) / std, 0.0
        for i, layer in enumerate(self.net):
            a, b = layer(a), layer(b)
            if i in (3, 8, 15, 22, 29):
                total = total + (F.normalize(a, dim=1) - F.normalize(b, dim=1)).square().sum(1).mean()
        return total


class Critic(nn.Sequential):
    """PatchGAN with three layers: images -> a map of scores."""

    def __init__(self, ch=64):
        widths = [3, ch, 2 * ch, 4 * ch, 8 * ch]
        layers = []
        for i in range(4):
            layers += [nn.Conv2d(widths[i], widths[i + 1], 4, 2 if i < 3 else 1, 1, bias=i == 0)]
            layers += [nn.BatchNorm2d(widths[i + 1])] * (i > 0) + [nn.LeakyReLU(0.2)]
        super().__init__(*layers, nn.Conv2d(widths[-1], 1, 4, 1, 1))


class Images:
    """make(sample, rng): a random square crop of at least 60 % of the area, resized and flipped half of the time."""

    def __init__(self, size):
        self.size = size

    def __call__(self, sample, rng):
        img = sample["image"]
        crop = augment.resize_to(img, augment.crop_box(*img.size, (0.6, 1.0), rng, ratio=(1, 1)), self.size)
        return crop[:, ::-1] if rng.random() < 0.5 else crop

    def collate(self, items):
        return torch.from_numpy(np.stack(items))


def kl(mean: torch.Tensor, logvar: torch.Tensor) -> torch.Tensor:
    """KL(N(mean, var) || N(0, 1)), summed over the latent, mean over the batch."""
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).flatten(1).sum(1).mean()


def world(index: int, seed: int) -> scenes.Scene:
    """The stand-in's world: grids of 1, 2, 2 and 3 cells a side in turn, one to three objects."""
    return scenes.scene(index, seed, objects=(1, 3), grid=(1, 2, 2, 3)[index % 4])


def scene_batches(cfg, env, step):
    share = env.share(cfg.batch_size)
    while True:
        first = step * cfg.batch_size + env.rank * share
        yield torch.from_numpy(scenes.render([world(i, cfg.seed) for i in range(first, first + share)], cfg.size))
        step += 1


def edges(x, y):
    """L1 on horizontal and vertical differences."""
    return sum((a.diff(dim=d) - b.diff(dim=d)).abs().mean() for a, b in [(x, y)] for d in (-1, -2))


def to_unit(batch, device):
    """(B, H, W, 3) uint8 -> (B, 3, H, W) in [-1, 1]."""
    return (batch.to(device).permute(0, 3, 1, 2).float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


class Both(nn.Module):
    """Encode, sample, decode in one forward, as DDP wants it. scale is 1 while training."""

    def __init__(self, vae):
        super().__init__()
        self.vae = vae

    def forward(self, x, noise):
        mean, logvar = self.vae.encode(x)
        return self.vae.decode(self.vae.to_latent(mean, logvar, noise)), mean, logvar


def train(cfg: Config) -> dict:
    env = ddp.start(cfg.seed)
    cli.within(cfg, "steps batch_size size ch blocks z groups", 1)
    if cfg.dtype not in ("float32", "bfloat16"):
        raise ValueError(f"--dtype {cfg.dtype} is unknown; choose float32 or bfloat16")
    try:
        mult = tuple(int(m) for m in cfg.mult.split(","))
        ddp.reseed(cfg.seed, 0, 0)
        vae = VAE(cfg.ch, mult, cfg.blocks, cfg.z, cfg.groups, scale=1.0)
    except ValueError as error:
        raise ValueError(f"--ch {cfg.ch} --mult {cfg.mult} --groups {cfg.groups} make no autoencoder: {error}") from error
    if cfg.init:
        vae = load_vae(cfg.init).train().requires_grad_(True)
        vae.scale, vae.shift = 1.0, 0.0
    vae = vae.to(env.device, memory_format=torch.channels_last)
    if cfg.size % vae.factor:
        raise ValueError(f"--size {cfg.size} must be a multiple of {vae.factor}")
    model = ddp.wrap(Both(vae), env)
    opt = torch.optim.AdamW(optim.decay_groups(vae, cfg.wd), cfg.lr, (0.9, 0.95), fused=True)
    state = dict(vae=vae, opt=opt)
    vgg = Vgg(cfg.vgg).to(env.device) if cfg.vgg else None
    critic = wrapped = None
    if cfg.gan:
        critic = Critic().to(env.device)
        critic_opt = torch.optim.AdamW(critic.parameters(), cfg.lr, (0.5, 0.9), weight_decay=0.0)
        state.update(critic=critic, critic_opt=critic_opt)
        wrapped = ddp.wrap(critic, env)
    out = Path(cfg.out_dir)
    start, _ = ckpt.resume(out / "last.pt", cfg, **state)
    if cfg.data:
        source = data.Shards(cfg.data, "train") if list(Path(cfg.data).glob("*.tar")) else data.Folder(cfg.data)
        make = Images(cfg.size)
        batches = data.Batches(source, make, make.collate, cfg.batch_size, env, cfg.seed, start, cfg.workers, cfg.max_bad)
    else:
        batches = scene_batches(cfg, env, start)
    log = RunLog(cfg, env, "autoencoder", start)
    amp = torch.autocast(env.device.type, torch.bfloat16, enabled=cfg.dtype == "bfloat16")
    for step in range(start, cfg.steps):
        ddp.reseed(cfg.seed, env.rank, step)
        lr = optim.warmup_cosine(step, cfg.steps, cfg.warmup, cfg.lr)
        optim.set_lr(opt, lr)
        x = to_unit(next(batches), env.device)
        side = cfg.size // vae.factor
        g = torch.Generator().manual_seed(cfg.seed * 1_000_003 + step)  # for the global batch, whatever the number of processes
        noise = torch.randn(cfg.batch_size, vae.z, side, side, generator=g)[env.rank * len(x) :][: len(x)].to(env.device)
        with amp:
            y, mean, logvar = model(x, noise)
        y, mean, logvar = y.float(), mean.float(), logvar.float()
        parts = {"l1": (y - x).abs().mean(), "kl": kl(mean, logvar) / x[0].numel(), "edges": edges(x, y)}
        loss = parts["l1"] + cfg.mse * (y - x).square().mean() + cfg.edges * parts["edges"] + cfg.kl * parts["kl"]
        if vgg:
            parts["vgg"] = vgg(x, y)
            loss = loss + cfg.vgg_weight * parts["vgg"]
        if cfg.gan and step >= cfg.gan_start:
            fool = -critic(y).mean()
            last = vae.decoder.conv_out.weight  # both gradients are balanced at the decoder's last convolution
            grads = [torch.autograd.grad(term, last, retain_graph=True)[0] for term in (loss, fool)]
            size = [(ddp.all_sum(g) / env.world).norm() for g in grads]
            parts["fool"] = fool
            loss = loss + cfg.gan * (size[0] / (size[1] + 1e-4)).clamp(0, 1e4).detach() * fool
        opt.zero_grad(set_to_none=True)
        loss.backward()
        if cfg.grad_clip:
            nn.utils.clip_grad_norm_(vae.parameters(), cfg.grad_clip)
        opt.step()
        if cfg.gan and step >= cfg.gan_start:
            optim.set_lr(critic_opt, lr)
            parts["critic"] = (F.relu(1 - wrapped(x)).mean() + F.relu(1 + wrapped(y.detach())).mean()) / 2  # hinge
            critic_opt.zero_grad(set_to_none=True)
            parts["critic"].backward()
            critic_opt.step()
        done, end = step + 1, step + 1 == cfg.steps
        due = done % cfg.log_every == 0 or end
        leave = ddp.interrupted(due)
        if due or leave or done % cfg.save_every == 0:
            ddp.check_finite({"loss": loss.item()}, step)
        if due:
            log.write(step, **ddp.mean({"loss": loss, **parts}), lr=lr)
        log.tick(step)
        if env.is_main and (done % cfg.save_every == 0 or end or leave):
            ckpt.save(out / "last.pt", done, cfg, **state)
        if leave:
            log.close()
            raise KeyboardInterrupt
    result = {}
    if env.is_main:
        ddp.reseed(cfg.seed, 0, cfg.steps)  # also for a run that was stopped right here
        result = finish(vae, cfg, env.device, batches)
        ckpt.export(out / "model.safetensors", vae.state_dict(), vae=vae.config)
        what = "the next training pictures" if cfg.data else "new pictures"
        print(f"error on {what} {result['mse']:.5f} (squared, in [-1, 1]), scale {vae.scale:.4f}: {out}/model.safetensors")
    log.finish(result)
    return result


@torch.no_grad()
def finish(vae, cfg, device, batches) -> dict:
    """Measures the latent's standard deviation and the error on pictures that were not trained on (scenes), or the next of
    the stream; draws pairs."""
    vae.eval()
    if not cfg.data:
        x = torch.from_numpy(scenes.render([world(i, cfg.seed + 1_000_003) for i in range(512)], cfg.size))
    else:
        x = next(batches)
    x = to_unit(x, device)
    mean, logvar = vae.encode(x)
    z = vae.to_latent(mean, logvar, torch.randn_like(mean))
    y = vae.decode(z)
    vae.scale = vae.config["scale"] = 1 / z.std().item()
    pairs = [p for a, b in zip(x[:24], y[:24]) for p in (a, b)]
    cells = [((p.permute(1, 2, 0).cpu() + 1) * 127.5).round().clamp(0, 255).byte().numpy() for p in pairs]
    title = "picture  |  reconstruction, twenty-four times"
    plot.save(plot.grid(cells, 8, title=title, cell=110), Path(cfg.out_dir, "samples", "reconstructions.png"))
    return {"mse": F.mse_loss(y, x).item(), "l1": F.l1_loss(y, x).item(), "scale": vae.scale}


if __name__ == "__main__":
    cli.main(train, Config, PRESETS)
