"""Speed against published packages: peer time / our time, both in one run, median of alternating repetitions.

python tests/peers/bench.py [--data ../shared/data] [--only tokenizer,clip,...,evaluation,privacy]
"""

import argparse
import multiprocessing
import os
import platform
import re
import statistics
import sys
import tempfile
import time
from functools import partial
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT)]

import numpy as np
import torch

from common import augment, data, ddp, scenes
from common.log import table, versions
from common.vision import torchvision  # noqa: F401


def race(ours, theirs, repeats=5):
    """Alternating, after one warm-up each -> (our median seconds, peer's median seconds, median of the ratios)."""
    ours(), theirs()
    a, b = [], []
    for _ in range(repeats):
        for f, times in ((ours, a), (theirs, b)):
            began = time.perf_counter()
            f()
            times.append(time.perf_counter() - began)
    return statistics.median(a), statistics.median(b), statistics.median(y / x for x, y in zip(a, b))


def clip(root):
    """ViT-B/32 training step at batch 32, same weights, same pictures, real captions padded to 77."""
    import open_clip
    from safetensors.torch import save_file

    from common.tokenizer import Tokenizer
    from common.vit import load_clip, trim
    from methods.clip_recipe import clip_loss
    from tests.peers.test_clip_peers import captions

    torch.manual_seed(0)
    theirs = open_clip.create_model("ViT-B-32-quickgelu", pretrained=None).float().train()
    with tempfile.TemporaryDirectory() as folder:
        save_file(theirs.state_dict(), f"{folder}/m.safetensors")
        ours = load_clip(f"{folder}/m.safetensors", act="quick_gelu").train()
    tok, texts = Tokenizer.from_clip(root / "clip/bpe_simple_vocab_16e6.txt.gz"), captions(root)[:32]
    img, ids = torch.randn(32, 3, 224, 224), tok(texts)
    opts = [torch.optim.AdamW(ours.parameters(), 1e-5, fused=True), torch.optim.AdamW(theirs.parameters(), 1e-5)]
    loss = open_clip.loss.ClipLoss()

    def step_ours(cut):
        opts[0].zero_grad()
        clip_loss(*ours(img, trim(ids) if cut else ids)).backward()
        opts[0].step()

    def step_theirs():
        opts[1].zero_grad()
        loss(*theirs(img, ids)[:3]).backward()
        opts[1].step()

    return [("CLIP ViT-B/32 step, batch 32", "open_clip", 1.1, *race(lambda: step_ours(True), step_theirs, 3)),
            ("... with the text left at 77 tokens", "open_clip", None, *race(lambda: step_ours(False), step_theirs, 3))]  # fmt: skip


def tokenizer(root):
    """100,000 captions to (N, 77) ids, each tokenizer fresh: caches start empty."""
    import open_clip

    from common.tokenizer import Tokenizer
    from tests.peers.test_clip_peers import captions

    texts, path = captions(root)[:100_000], root / "clip/bpe_simple_vocab_16e6.txt.gz"
    made = [Tokenizer.from_clip(path), open_clip.SimpleTokenizer(str(path))]

    def ours():
        made[0].cache.clear()
        return made[0](texts)

    def theirs():
        made[1].cache = {t: t for t in ("<start_of_text>", "<end_of_text>")}
        return made[1](texts)

    return [("BPE of 100k captions", "open_clip", 3.0, *race(ours, theirs, 3))]


def shards(root):
    """Flickr8k shards to batches of 64 at 112 px: the same decode and the same random resized crop, one process."""
    import webdataset as wds
    from PIL import Image

    from data_prep import captions as prep

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        prep.run(prep.Config(str(root / "flickr8k_1k/captions.csv"), str(root / "flickr8k_1k/images.zip"), f"{folder}/f"))
        prep_scenes = __import__("data_prep.scenes", fromlist=["run"])
        prep_scenes.run(prep_scenes.Config(f"{folder}/s", train=4000, val=0, test=0, size=32))
        for name, path, size, count in (
            ("Flickr8k, 112 px", f"{folder}/f", 112, 768),
            ("scenes, 32 px", f"{folder}/s", 32, 3968),
        ):

            def crop(img, rng, size=size):
                return augment.resize_to(img, augment.crop_box(*img.size, (0.5, 1.0), rng), size)

            source = data.Shards(path, "train")

            def ours(source=source, count=count, crop=crop):
                def collate(items):
                    return torch.from_numpy(np.stack([x for x, _ in items])), [c for _, c in items]

                env = ddp.Env(0, 1, "cpu")
                batches = data.Batches(source, lambda s, rng: (crop(s["image"], rng), s["captions"][0]), collate, 64, env)
                return [next(batches) for _ in range(count // 64)]

            urls = [str(p) for p in sorted(Path(path).glob("train-*.tar"))]

            def theirs(urls=urls, count=count, crop=crop):
                rng = np.random.default_rng(0)
                pipe = (wds.WebDataset(urls, shardshuffle=len(urls) if len(urls) > 1 else False).shuffle(1000).decode("pil").to_tuple("png;jpg;webp", "json")
                        .map(lambda s: (crop(s[0].convert("RGB"), rng), s[1]["captions"][0])).batched(64))  # fmt: skip
                return [(torch.as_tensor(np.stack(x)), c) for x, c in pipe][: count // 64]

            rows.append((f"shards to batches, {name}", "webdataset", 1.2, *race(ours, theirs)))
    assert Image
    return rows


def dit(root):
    """Training steps of DiT-S/2 (batch 8, 32 x 32 latents) and of one XL/2 block (batch 4), same weights, AdamW."""
    import diffusers

    from common.dit import DiT, to_diffusers

    rows = []
    for name, width, heads, depth, batch in (("DiT-S/2", 384, 6, 12, 8), ("one XL/2 block", 1152, 16, 1, 4)):
        torch.manual_seed(0)
        ours = DiT(32, 2, 4, width, depth, heads, learn_sigma=True)
        for p in ours.parameters():
            p.data += 0.02 * torch.randn_like(p)
        theirs = diffusers.DiTTransformer2DModel(heads, width // heads, 4, 8, depth, sample_size=32, patch_size=2).train()
        theirs.load_state_dict(to_diffusers(ours.state_dict()), strict=False)
        x, t, y = torch.randn(batch, 4, 32, 32), torch.randint(0, 1000, (batch,)), torch.randint(0, 1000, (batch,))
        params = [[p for p in m.parameters() if p.requires_grad] for m in (ours, theirs)]
        opts = [torch.optim.AdamW(params[0], 1e-4, fused=True), torch.optim.AdamW(params[1], 1e-4)]  # as either's scripts do

        def step_ours(ours=ours, opt=opts[0], x=x, t=t, y=y):
            opt.zero_grad()
            ours(x, t, y).square().mean().backward()
            opt.step()

        def step_theirs(theirs=theirs, opt=opts[1], x=x, t=t, y=y):
            opt.zero_grad()
            theirs(x, timestep=t, class_labels=y).sample.square().mean().backward()
            opt.step()

        rows.append((f"{name} training step, batch {batch}", "diffusers", 1.2, *race(step_ours, step_theirs)))
        rows.append(("... ours by torch.compile", "diffusers", "", *race(partial(step_ours, torch.compile(ours)), step_theirs)))
    return rows


def autoencoder(root):
    """Stable Diffusion's autoencoder at full size, one picture of 256 px, same weights, read from the same file."""
    import diffusers

    from common.vae import load_vae

    torch.manual_seed(0)
    levels = (128, 256, 512, 512)
    theirs = diffusers.AutoencoderKL(3, 3, ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4, levels, 2).eval()
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        theirs, ours = diffusers.AutoencoderKL.from_pretrained(folder).eval(), load_vae(folder)
    x, z = torch.randn(1, 3, 256, 256), torch.randn(1, 4, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(ours.decode(z * ours.scale), theirs.decode(z).sample, rtol=1e-4, atol=1e-4)
        return [("VAE encode, 256 px", "diffusers", 1.1, *race(lambda: ours.encode(x), lambda: theirs.encode(x))),
                ("VAE decode, 256 px", "diffusers", 1.1, *race(lambda: ours.decode(z), lambda: theirs.decode(z)))]  # fmt: skip


def world(root):
    """Scenes a second on one core, description, picture and caption, 32 px; no peer, the target is 2,000."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    began, n = time.perf_counter(), 4000
    for i in range(0, n, 250):
        batch = [scenes.scene(j) for j in range(i, i + 250)]
        scenes.render(batch, 32)
        [scenes.caption(s) for s in batch]
    rate = n / (time.perf_counter() - began)
    torch.set_num_threads(threads)
    return [(f"scenes: {rate:,.0f} a second on one core (target 2,000)", "", None, n / rate, None, None)]


def augmentation(root):
    """SimCLR's whole augmentation of 256 pictures of 32 px: batched tensors against torchvision's v2 pipeline, per image."""
    import torchvision.transforms.v2 as T

    x, sides = torch.randint(0, 256, (256, 3, 32, 32), dtype=torch.uint8), torch.full((256, 2), 32)
    colour = augment.Colour((0.8, 0.8, 0.8, 0.2))

    def ours():
        u = torch.rand(256, augment.NUMBERS)
        return augment.normalise(augment.view(x, sides, u, 32, (0.2, 1.0), colour))

    pipeline = T.Compose([T.RandomResizedCrop(32, (0.2, 1.0), antialias=True), T.RandomHorizontalFlip(),
                          T.RandomApply([T.ColorJitter(0.8, 0.8, 0.8, 0.2)], 0.8), T.RandomGrayscale(0.2),
                          T.RandomApply([T.GaussianBlur(13, (0.1, 2.0))], 0.5), T.ToDtype(torch.float32, scale=True),
                          T.Normalize(augment.IMAGENET_MEAN, augment.IMAGENET_STD)])  # fmt: skip
    return [("augmentation, 256 x 32 px", "torchvision v2", 5, *race(ours, lambda: torch.stack([pipeline(i) for i in x])))]


def losses(root):
    """What the ideas cost: X-CLR's step against SimCLR's, and Suave's against the same network, views and rows with plain labels
    as targets: no Sinkhorn, no queue, no swapped prediction over ten views."""
    from dataclasses import replace

    from methods import semisup_cluster as S
    from methods import xsample as X

    env, rows = ddp.Env(0, 1, torch.device("cpu")), []
    cfg = X.Config(images_per_class="30", batch_size=128)
    world = X.open_world(cfg, env)
    batch, model = next(data.endless(world.train, cfg.image_size, 128, env, 0)), X.Encoder(cfg)
    x = X.two_views(batch, 0, cfg, env)

    def step(method):
        c = X.arm_of(cfg, method, "30")
        graph = X.make_graph(c, world, env.device)
        return lambda: X.method_loss(model, batch, x, graph, None, 0, c)[0].backward()

    rows.append(("X-CLR step, 128 samples", "SimCLR step", 0.98, *race(step("xclr"), step("simclr"), 9)))
    big = [torch.rand(2 * 128, 3, 32, 32), torch.rand(8 * 128, 3, 18, 18)]
    net = S.Net(replace(S.Config(), method="suave", embed_dim=128, hidden=256), 100, 0)
    queue, y = S.Queue(2, 3840, 128), torch.eye(100)[torch.arange(1280) % 100]
    queue.z.copy_(torch.nn.functional.normalize(torch.randn(2, 3840, 128), dim=-1))

    def suave():
        scores, z, _ = net(big)
        views, parts = scores.split(128), z.split(128)
        q = [queue.targets(i, parts[i].detach(), net.P().detach(), 0.05) for i in (0, 1)]
        [queue.push(i, parts[i]) for i in (0, 1)]
        S.unlabelled_loss(views, q, 0.1).backward()

    rows.append(("SwAV step, 128 x 10 views, queue 3,840", "the same, given targets", 0.95,
                 *race(suave, lambda: S.cross_entropy(net(big)[0], y, 0.1).backward(), 7)))  # fmt: skip
    return rows


def peak_gib(peer: bool, n: int) -> float:
    """Resident memory that precision to coverage of n x n x 768 add to that of the inputs, at most; for a process of its own."""
    from common import metrics

    x, y = (torch.randn(n, 768, generator=torch.Generator().manual_seed(i)) for i in range(2))
    if peer:
        from prdc import compute_prdc

    def highest():  # not getrusage, which a new process inherits
        return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 2**20

    before = highest()
    compute_prdc(x.numpy(), y.numpy(), 5) if peer else metrics.prdc(x, y, 5)
    return highest() - before


def evaluation(root):
    """Metrics on features: precision to coverage, Frechet distance, Vendi score."""
    import scipy.sparse
    from prdc import compute_prdc
    from pytorch_fid.fid_score import calculate_frechet_distance

    scipy.sparse.csr = scipy.sparse  # the package asks for a module that newer scipy no longer has
    from vendi_score import vendi

    from common import metrics

    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(10_000, 768, generator=g) for _ in range(2))
    a, b = x.numpy(), y.numpy()
    rows = [("precision, recall, density, coverage, 10k x 10k x 768", "prdc", 3,
             *race(lambda: metrics.prdc(x, y, 5), lambda: compute_prdc(a, b, 5), 3))]  # fmt: skip
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        ours, theirs, large = (pool.apply(peak_gib, p) for p in ((False, 10_000), (True, 10_000), (False, 50_000)))
    rows += [("... their memory, GiB", "prdc", 10, ours, theirs, theirs / ours),
             ("... ours with 50k x 50k x 768 (target 4)", "", None, large, None, None)]  # fmt: skip
    x, y = (torch.randn(10_000, 2048, generator=g) for _ in range(2))

    def theirs():
        statistics_ = [(f.mean(0), np.cov(f, rowvar=False)) for f in (x.numpy(), y.numpy())]
        calculate_frechet_distance(*statistics_[0], *statistics_[1])

    rows.append(("Frechet distance, 10k x 2,048 features given", "pytorch-fid", 3,
                 *race(lambda: metrics.frechet_distance(x, y), theirs, 3)))  # fmt: skip
    x = torch.nn.functional.normalize(torch.randn(5_000, 768, generator=g), dim=1)
    rows.append(("Vendi score, n = 5,000, 768 columns", "vendi-score", 3,
                 *race(lambda: metrics.vendi(x), lambda: vendi.score_X(x.numpy()), 3)))  # fmt: skip
    return rows


def privacy(root):
    """Accountants and exact retrieval."""
    import faiss
    from dp_accounting.pld import privacy_loss_distribution
    from opacus.accountants.analysis import rdp as opacus_rdp

    from methods import dp_rdm

    orders = [1 + i / 10 for i in range(1, 100)] + list(range(11, 64))

    def opacus():
        opacus_rdp.get_privacy_spent(orders=orders, delta=1e-5, rdp=opacus_rdp.compute_rdp(
            q=0.01, noise_multiplier=1.0, steps=1000, orders=orders))  # fmt: skip

    def google():
        p = privacy_loss_distribution.from_gaussian_mechanism(1.0, sampling_prob=0.01, value_discretization_interval=1e-4)
        p.self_compose(1000).get_epsilon_for_delta(1e-5)

    rows = [("epsilon by RDP, 152 orders", "opacus", 5, *race(lambda: dp_rdm.epsilon(0.01, 1.0, 1000, 1e-5), opacus, 5)),
            ("epsilon by PLD, 1,000 queries", "dp-accounting", 5,
             *race(lambda: dp_rdm.epsilon_pld(0.01, 1.0, 1000, 1e-5), google, 3))]  # fmt: skip
    bank = torch.nn.functional.normalize(torch.randn(1_000_000, 512), dim=1)
    queries, index = torch.randn(16, 512), faiss.IndexFlatIP(512)
    index.add(bank.numpy())
    unit, norms = dp_rdm.unit(queries), bank.norm(dim=1)  # faiss, too, is given rows of length 1
    rows.append(("nearest 20 of 1M x 512, one query at a time (16)", "faiss flat", 1,
                 *race(lambda: [dp_rdm.nearest(u, bank, 20, norms=norms) for u in unit],
                       lambda: [index.search(q[None].numpy(), 20) for q in queries], 3)))  # fmt: skip
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default=os.environ.get("SHARED_DATA", ROOT.parent / "shared" / "data"), type=Path)
    parser.add_argument("--only", default="tokenizer,clip,shards,scenes,dit,vae,augment,losses,evaluation,privacy")
    args = parser.parse_args()
    jobs = {"tokenizer": tokenizer, "clip": clip, "shards": shards, "scenes": world, "dit": dit, "vae": autoencoder,
            "augment": augmentation, "losses": losses, "evaluation": evaluation, "privacy": privacy}  # fmt: skip
    rows = []
    for job in args.only.split(","):
        for work, peer, target, a, b, ratio in jobs[job](args.data):
            rows.append(
                [work, peer, f"{a:.3f}", "" if b is None else f"{b:.3f}", "" if ratio is None else f"{ratio:.2f}", target]
            )
            print(*rows[-1], sep=" | ", flush=True)
    print(table(rows, ["work", "peer", "ours s", "peer s", "ratio", "target"]))
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads; {versions()}"
    )
    packages = re.findall(r"^([\w-]+)", (ROOT / "tests/peers/requirements.txt").read_text(), re.MULTILINE)
    print({d.name: d.version for d in metadata.distributions() if d.name in packages})
