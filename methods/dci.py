"""Densely captioned images: tell the crops of a picture and their captions apart, and fine-tune CLIP on them.

Paper      Urbanek, Bordes, Astolfi, Williamson, Sharma, Romero-Soriano: A Picture is Worth More Than 77 Text Tokens: Evaluating
           CLIP-Style Models on Dense Captions. CVPR 2024, arXiv 2312.08578
Idea       Captions from the web name one thing; a person describes a picture in a thousand words, tied to its regions. Cut a
           picture into its regions and give each a dense caption that fits CLIP: now a model must find the right one among
           eight that look alike (sub-crop matching), and tell a true caption from one with two words exchanged. CLIP is weak
           at both, and benchmarks of word order alone do not show it. Fine-tune it on a few thousand such pictures, with new
           captions of a crop at each visit: dense positives lift matching; a negative beside them lifts Neg and costs
           matching.
Equations  pooling over M captions -> caption_pool()     L_clip -> clip_pool_loss()     L_neg -> negatives_loss()
           SCM and Neg -> subcrop_matching(), beats_negatives()     L = alpha L_clip + beta L_neg -> method_loss()
Read first section 2, then LoRA in section 3, items_of() in section 4, official_tests() in section 5 and train()
Symbols    B crops, M captions of each, s (B, B, M) scores times the logit scale, row: picture; g pooled scores; p, t scores of
           a picture with its own positive and negative; alpha, beta weights of the two losses; r rank of LoRA's update
Run        python methods/dci.py --preset smoke                              (CPU, no data, under 30 s)
           python methods/dci.py                                             (CPU, no data; 5.3 min on two quiet cores)
           torchrun --nproc_per_node=2 methods/dci.py --preset paper --data DIR --init CLIP --tokenizer MERGES
           python methods/dci.py --arms clip --data data/coco --min_side 32 --init CLIP --tokenizer MERGES        (boxes)
Data       a generated copy of DCI's files (schema of the release), the release itself with SA-1B's photos beside it, or shards
           with boxes by data_prep/coco.py. DCI: CC BY-NC 4.0, photos: SA-1B research licence
Expect     laptop: SCM 70.5 +- 9.1 CLIP, 83.8 +- 10.0 dense, 75.9 +- 7.8 with L_neg; Neg 43, 66, 89; order 22, 36, 21; 3 seeds
Differs    from the released code: pooling "hardest" takes the minimum of the positives before anything is pooled (there it
           comes too late: 0.154 for 0.904 on the test matrix), max and min do not fall back to the mean; missing photos
           are counted, and refused in the test split; masks without a caption too; crops are cut when needed, negatives drawn
           anew at each access; texts are cut at the context length; Neg is a share of the items that have a negative; the last
           weights are reported, the split valid is not used. Left out: making captions by a language model; BLIP, FLAVA,
           X-VLM; ARO, VL-Checklist and ELEVATER themselves. Of the paper's results only 81.17 -> 88.37 was at hand.
Uses       common/ckpt.py cli.py data.py ddp.py dit.py log.py metrics.py optim.py plot.py resnet.py scenes.py tokenizer.py
           vae.py vit.py zoo.py and weights/   (copy these with this file)
"""

from __future__ import annotations

import base64
import io
import json
import math
import re
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]  # so that python, torchrun and python -m all find common/

from common import ckpt, cli, data, ddp, metrics, optim, plot, scenes, zoo
from common.dit import read_tensors
from common.log import RunLog, history, table, write_json
from common.tokenizer import Tokenizer
from common.vit import ACTS, CLIP, load_clip, trim


# 1. CONFIG (presets stand in section 7) ------------------------------------------------------------------------------
@dataclass(frozen=True)
class Config:
    # run: the same names in all ten files
    out_dir: str = "runs/dci"  # one folder a run; each arm gets a sub-folder
    seed: int = 0  # of scenes, data order, captions and LoRA
    steps: int = 300  # optimiser updates of each arm; the paper's: 10 epochs
    batch_size: int = 64  # GLOBAL number of crops, divided by the number of processes; released settings: 64
    accum: int = 1  # micro-batches an update; no negatives of each other; logged parts of the loss are of the last one
    lr: float = 2e-3  # AdamW, linear decay to 0; released: 5e-4, 1e-3, 1e-4
    wd: float = 0.0  # weight decay
    warmup: int = 0  # updates of linear warm-up
    grad_clip: float = 1.0  # largest gradient norm, 0 = off
    ema_decay: float = 0.0  # not part of this method
    dtype: str = "float32"  # float32, or bfloat16 autocast (scores and losses stay in float32)
    compile: bool = False  # torch.compile the model
    data: str = ""  # DCI's folder, or shards with boxes; "" = generated, in the release's form, below out_dir
    workers: int = 0  # loader processes of each rank
    log_every: int = 10  # updates between lines of log.jsonl
    eval_every: int = 0  # updates between evaluations; 0 = at the end only
    save_every: int = 100  # updates between checkpoints
    resume: bool = True  # continue from last.pt, exactly; --no-resume starts again
    max_bad: float = 0.01  # share of damaged photos at which the run stops
    # the method
    arms: str = "clip,short,dense,dense+neg"  # comma list; also negclip and dense+long, see ARMS
    alpha: float = 1.0  # weight of L_clip
    beta: float = 1.0  # weight of L_neg; released: 9, 1, 0
    pool: str = "avg"  # of the M captions in L_clip: avg, max, min, hardest; without effect unless --captions pick5
    captions: str = "pick1"  # first, pick1 or pick5: captions of a crop at each access
    negatives: str = "swaps"  # swaps, basic, layout, or rule: words exchanged by this file, for data without negatives
    rank: int = 4  # of LoRA's update; 0 = all weights are trained
    lora_alpha: float = 8.0  # update = alpha / rank B A; released: 32 (rank 32), 2 (ranks 1, 2, 4)
    lora_dropout: float = 0.1  # of LoRA's input; released: 0.1, 0.2
    context: int = 77  # text tokens; 248 stretches the positions behind the 20th by four (Long-CLIP), in all arms but clip
    # data and model
    init: str = ""  # CLIP weights to start from; "" = the stand-in of common/weights
    tokenizer: str = ""  # CLIP's merges file; "" = the stand-in's
    act: str = ""  # of --init: quick_gelu (OpenAI) or gelu; "" = what config.json beside it says
    min_side: int = 224  # smallest side of a mask's box in pixels; the generated copy uses 16
    allow_missing: bool = False  # evaluate although photos of the test split are missing
    images: int = 600  # generated training pictures
    test_images: int = 112  # generated test pictures; the release has 112
    memory_gb: float = 8.0  # crops below this size are kept in memory
    sugarcrepe: str = ""  # sugarcrepe csv (kind, file, caption, negative_caption): word-order test on real text
    photos: str = ""  # folder of its pictures; "" = text only, against --references
    references: str = ""  # csv of COCO captions (image_id, caption), for the text-only check


# 2. THE IDEA (start reading here) ------------------------------------------------------------------------------------
def caption_pool(scores, how="avg", first=0):
    """Scores of pictures with M captions of each item (b, B, M), or (B, B * M) side by side -> (b, B).

    avg, max, min over an item's captions; hardest: the best-scored caption of other items, the worst of the own one, which is
    item first + i for picture i."""
    scores = scores.view(len(scores), len(scores), -1) if scores.ndim == 2 else scores
    plain = {"avg": torch.mean, "max": torch.amax, "min": torch.amin}
    if how in plain:
        return plain[how](scores, 2)
    if how != "hardest":
        raise ValueError(f"pooling {how!r} is unknown; choose from avg, max, min, hardest")
    own = torch.eye(*scores.shape[:2], dtype=torch.bool, device=scores.device).roll(first, 1)
    return torch.where(own, scores.amin(2), scores.amax(2))


def clip_pool_loss(scores, how="avg", to_pictures=None, first=0):
    """L_clip = 1/2 [CE(g, diagonal) + CE(g^T, diagonal)] of scores (B, B, M), logit scale included.

    Several processes: scores (b, B, M) of the own pictures with all captions, to_pictures (b, B, M) of the own items' captions
    with all pictures, first: number of the first own item."""
    scores = scores.view(len(scores), len(scores), -1) if scores.ndim == 2 else scores
    label = torch.arange(len(scores), device=scores.device) + first
    other = scores.transpose(0, 1) if to_pictures is None else to_pictures
    return (F.cross_entropy(caption_pool(scores, how, first), label)
            + F.cross_entropy(caption_pool(other, how, first), label)) / 2  # fmt: skip


def negatives_loss(pos, neg):
    """L_neg = 1/(2B) sum_i [softplus(-p_i) + softplus(t_i)]: binary cross-entropy of the scores (B,) of pictures with their
    own positive (label 1) and their own negative (label 0). Absolute, not a comparison of the two: scores begin at 25 to 40, so
    L_neg begins at half of that and first drives all of them towards 0. Negatives of other pictures are not used."""
    return (F.softplus(-pos).mean() + F.softplus(neg).mean()) / 2


def negclip_loss(f_img, f_txt, f_neg, scale):
    """NegCLIP: hard captions are further columns for pictures, texts are matched with pictures only. (b, D) unit rows of this
    process, negatives of all processes included."""
    label = torch.arange(len(f_img), device=f_img.device) + ddp.rank() * len(f_img)
    texts = torch.cat([ddp.gather_rows(f_txt), ddp.gather_rows(f_neg)])
    return (F.cross_entropy(scale * f_img @ texts.T, label)
            + F.cross_entropy(scale * f_txt @ ddp.gather_rows(f_img).T, label)) / 2  # fmt: skip


def subcrop_matching(scores):
    """SCM of one batch: share of pictures whose own item has the highest pooled score, others by their best caption, the own
    one by its worst; ties go to the lowest index. scores (B, B, M) or (B, B * M)."""
    g = caption_pool(scores, "hardest")
    return (g.argmax(1) == torch.arange(len(g), device=g.device)).float().mean().item()


def beats_negatives(pos, neg):
    """Neg: share of pictures whose worst positive (B, M) scores above every negative (B, K); a tie is wrong."""
    return (pos.amin(1) > neg.amax(1)).float().mean().item()


def chance(batch, captions):
    """-> (SCM, Neg) of random scores: the M own scores above all B M - M others, and above one negative."""
    return 1 / math.comb(batch * captions, captions), 1 / (captions + 1)


def stretch_positions(pos, keep=20, factor=4):
    """Text positions (L, D) -> (keep + factor (L - keep), D), 77 -> 248: the first rows stay, the rest is interpolated linearly
    and the last step goes on (Long-CLIP)."""
    rest = pos[keep:]
    step = torch.cat([rest[1:] - rest[:-1], rest[-1:] - rest[-2:-1]])
    share = torch.arange(factor, dtype=pos.dtype, device=pos.device)[None, :, None] / factor
    return torch.cat([pos[:keep], (rest[:, None] + share * step[:, None]).flatten(0, 1)])


def principal_part(f, dim=32):
    """Features (B, D) -> the same from their `dim` leading principal components in the batch; exact for dim >= rank. Long-CLIP
    matches short captions with these, long ones with f."""
    mean = f.mean(0)
    _, size, V = torch.linalg.svd((f - mean).detach().float(), full_matrices=False)  # rows of V: directions
    V = (V * (size > 1e-5 * size[0])[:, None])[:dim].to(f.dtype)  # directions beyond the rank are arbitrary
    return (f - mean) @ V.T @ V + mean


# 3. MODULES: low-rank updates -------------------------------------------------------------------------------------------
class LoRA(nn.Module):
    """y = W x + b + (alpha / r) B A x: A random, B zero, W frozen, b trained as the released settings do ("lora_only").

    parts: a fused q, k, v projection gets a pair (A, B) for each of the three."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, dropout: float, parts: int = 1):
        super().__init__()
        self.linear, self.scale, self.dropout = linear.requires_grad_(False), alpha / rank, dropout
        if linear.bias is not None:
            linear.bias.requires_grad_(True)
        self.A = nn.Parameter(torch.empty(parts, rank, linear.in_features).uniform_(-1, 1) / linear.in_features**0.5)
        self.B = nn.Parameter(torch.zeros(parts, linear.out_features // parts, rank))

    def forward(self, x):
        low = torch.einsum("...i,pri->...pr", F.dropout(x, self.dropout, self.training), self.A)
        return self.linear(x) + self.scale * torch.einsum("...pr,por->...po", low, self.B).flatten(-2)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The same map as one matrix."""
        self.linear.weight += self.scale * (self.B @ self.A).flatten(0, 1)
        return self.linear


def add_lora(model: CLIP, rank: int, alpha: float, dropout: float) -> CLIP:
    """On q, k, v, output, both MLP layers and the projection of both towers. Of the rest only these layers' biases are trained,
    not the logit scale."""
    model.requires_grad_(False)
    for tower in (model.visual, model.text):
        for block in tower.blocks:
            block.attn.qkv = LoRA(block.attn.qkv, rank, alpha, dropout, parts=3)
            block.attn.proj = LoRA(block.attn.proj, rank, alpha, dropout)
            block.mlp.fc1, block.mlp.fc2 = (LoRA(m, rank, alpha, dropout) for m in (block.mlp.fc1, block.mlp.fc2))
        tower.proj = LoRA(tower.proj, rank, alpha, dropout)
    return model


def merge_lora(model: nn.Module) -> nn.Module:
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, LoRA):
                setattr(module, name, child.merged())
    return model


def lengthen(model: CLIP, context: int) -> CLIP:
    """Stretches the text positions; train() puts the first 20 back after each update, the rest is trained."""
    if context == model.text.context:
        return model
    pos = model.text.pos_embed
    if len(pos) != 77 or context != 248:
        raise ValueError(f"--context {context}: only 77 -> 248 is defined, and the model has {len(pos)} positions")
    model.text.pos_embed = nn.Parameter(stretch_positions(pos.detach()))
    model.text.context = context
    return model


# 4. DATA: DCI's files, a generated copy of them, and shards with boxes ----------------------------------------------------
LINK = "\nThe following can also be seen in the image:\n"


@dataclass
class Item:
    """A picture or a crop of it with its captions, the first of them the summary, the rest alternates."""

    photo: str | tuple  # path; of shards (source, shard, row)
    box: tuple | None  # crop (x0, y0, x1, y1), padded; None: all of it
    captions: list[str]
    negatives: dict[str, list[str]] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)  # CLIP's, of the negatives, as stored: "swaps_0"
    long: str = ""  # whole description
    key: str = "base"
    image: int = 0  # number of the picture in its split


def bounds(masks, width, height) -> list[tuple[int, int, int, int]]:
    """The boxes of a picture's masks in either published form -> (x0, y0, x1, y1). {topLeft: {x, y}, bottomRight}, or a list of
    two corners: (x, y) in the documentation, (y, x) in the preprocessing. All masks of a file have one order, which the
    picture's sides decide where a box fits in one way only."""
    lists = [m["bounds"] for m in masks if not isinstance(m["bounds"], dict)]
    swapped = (any(b[0] > width or b[1] > height for _, b in lists)
               and all(b[1] <= width and b[0] <= height for _, b in lists))  # fmt: skip

    def box(b):
        if isinstance(b, dict):
            return b["topLeft"]["x"], b["topLeft"]["y"], b["bottomRight"]["x"], b["bottomRight"]["y"]
        (a0, a1), (b0, b1) = b
        return (a1, a0, b1, b0) if swapped else (a0, a1, b0, b1)

    return [box(m["bounds"]) for m in masks]


def padded(box, width, height, share=0.15) -> tuple[int, int, int, int]:
    """15 % of its own sides on each side, cut to whole pixels, then to the picture; never empty."""
    x0, y0, x1, y1 = box
    dx, dy = (x1 - x0) * share, (y1 - y0) * share
    x0, y0 = max(0, min(width - 1, int(x0 - dx))), max(0, min(height - 1, int(y0 - dy)))
    return x0, y0, max(x0 + 1, min(width, int(x1 + dx))), max(y0 + 1, min(height, int(y1 + dy)))


def mask_caption(mask) -> str:
    """Quality 2 (bad): "". 1 (uninteresting): the label. 0: label and caption."""
    quality, label = mask.get("mask_quality", 0), mask.get("label") or ""
    if quality == 2:
        return ""
    return f"{label}: {mask['caption']}" if quality == 0 and mask.get("caption") else label


def descendants(masks, key) -> list[dict]:
    """Masks below a mask, depth first, in the order of `requirements`; bad ones go with all below them; missing children and
    cycles are passed over."""
    out, seen = [], {str(key)}

    def visit(mask):
        for child in map(str, mask.get("requirements", [])):
            if child in masks and child not in seen:
                seen.add(child)
                if masks[child].get("mask_quality", 0) != 2:
                    out.append(masks[child])
                    visit(masks[child])

    visit(masks[str(key)])
    return out


def whole_caption(entry) -> str:
    texts = [t for t in map(mask_caption, entry["mask_data"].values()) if t]
    return f"{entry['short_caption']}\n{entry['extra_caption']}" + (LINK + "\n".join(texts) if texts else "")


def sub_caption(entry, key) -> str:
    mask = entry["mask_data"][str(key)]
    texts = [t for t in map(mask_caption, descendants(entry["mask_data"], key)) if t]
    text = f"This is an image of {mask.get('label') or 'something'}. {mask.get('caption') or ''}".strip()
    return text + (LINK + "\n".join(texts) if texts else "")


def as_list(value) -> list[str]:
    """Summaries are one text in old files and a list in new ones."""
    texts = [value] if isinstance(value, str) else list(value or [])
    if odd := [t for t in texts if not isinstance(t, str)]:
        raise TypeError(f"{odd[0]!r} stands where a text should")
    return texts


def items_of(entry, photo, size, min_side, image=0) -> tuple[list[Item], int]:
    """The base picture, then its large masks in stored order -> items, and the number of large masks without a summary."""
    summaries, negatives, scores = (entry.get(k) or {} for k in ("summaries", "negatives", "clip_scores"))

    def make(box, key, long):
        wrong = {kind: as_list(texts) for kind, texts in (negatives.get(key) or {}).items()}
        return Item(str(photo), box, as_list(summaries.get(key)), wrong, scores.get(key) or {}, long, key, image)

    out, without = [make(None, "base", whole_caption(entry))], 0
    masks = list(entry["mask_data"].values())
    for mask, box in zip(masks, bounds(masks, *size)):
        x0, y0, x1, y1 = box
        if min(x1 - x0, y1 - y0) < min_side:  # of the box before padding, inclusive
            continue
        key = f"m-{mask['idx']}-sc"
        if not as_list(summaries.get(key)):
            without += 1
            continue
        out.append(make(padded(box, *size), key, sub_caption(entry, mask["idx"])))
    return [i for i in out if i.captions], without


def find_root(folder) -> Path:
    for root in (Path(folder), Path(folder, "densely_captioned_images")):
        if (root / "splits.json").is_file():
            return root
    raise ValueError(f"{folder} holds no splits.json; expected DCI's folder with complete/, photos/ and splits.json")


def read_dci(folder, split, min_side, allow_missing=False, say=False) -> list[Item]:
    """All items of a split, picture by picture. say: prints what was found and left out. ValueError for a damaged file, and for
    missing photos of the test split."""
    root, out, missing, without, pictures = find_root(folder), [], [], 0, 0
    what = f"{root / 'splits.json'}: {split} is not"
    try:
        names = json.loads((root / "splits.json").read_text("utf-8"))[split]
        for name in names:
            what = f"{root / 'complete' / Path(name).name}: not"
            entry = json.loads((root / "complete" / Path(name).name).read_text("utf-8"))
            photo = root / "photos" / Path(entry["image"]).name
            if not photo.is_file():
                missing.append(photo.name)
                continue
            size = entry.get("width"), entry.get("height")
            if not all(size):
                with Image.open(photo) as img:
                    size = img.size
            items, bare = items_of(entry, photo, size, min_side, pictures)
            out, without, pictures = out + items, without + bare, pictures + 1
    except FileNotFoundError as error:
        raise ValueError(
            f"{error.filename} is named in {root}/splits.json and does not exist; unpack dci.tar.gz again"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{what} in DCI's form ({type(error).__name__}: {error})") from error
    if missing and split == "test" and not allow_missing:
        raise ValueError(f"{len(missing)} of {len(names)} photos of the test split are missing, {missing[0]} the first; "
                         "they come from SA-1B's sa_000138.tar. --allow_missing evaluates the rest: another test")  # fmt: skip
    if not out:
        raise ValueError(f"{root}: no picture of the split {split} can be used, {len(missing)} photos are missing")
    if say:
        whole = sum(i.key == "base" for i in out)
        print(f"{split}: {whole} pictures, {len(out) - whole} masks of at least {min_side} px; left out: {len(missing)} "
              f"missing photos, {pictures - whole} pictures and {without} masks without summary", file=sys.stderr)  # fmt: skip
    return out


def read_boxes(folder, split, min_side, allow_missing=False, max_bad=0.01) -> list[Item]:
    """Shards with captions and boxes (data_prep/coco.py): the picture with its captions, one box of each class with its name;
    negatives exchange words, or the name for that of another class. Damaged pictures of the test split are refused."""
    source, out, number, damaged, mute = data.Shards(folder, split), [], 0, 0, 0
    for shard, size in enumerate(source.sizes):
        for row in range(size):
            try:
                r = source.read(shard, row)
            except data.BadSample:
                damaged += 1
                continue
            if not r.get("captions"):
                mute += 1
                continue
            (w, h), place = r["image"].size, (source, shard, row)
            items, names = [Item(place, None, r["captions"], long="\n".join(r["captions"]), image=number)], set()
            for j, b in enumerate(r.get("boxes") or []):
                try:
                    (x0, y0, x1, y1), _ = map(float, b["box"]), b["label"].strip()
                except (TypeError, KeyError, ValueError, AttributeError) as error:
                    raise ValueError(f"{folder}: the boxes of {r['key']} are not in the form {{label, box}}; prepare them by "
                                     "data_prep/coco.py") from error  # fmt: skip
                # COCO's box is that of its mask, which is all that DCI takes of a mask, too
                if not b.get("iscrowd") and min(x1 - x0, y1 - y0) >= min_side and b["label"] not in names:
                    text = scenes.articles(f"a photo of a {b['label']}")
                    items.append(Item(place, padded(b["box"], w, h), [text], long=text, key=f"m-{j}-sc", image=number))
                    names.add(b["label"])
            out, number = out + items, number + 1
    if damaged > (max_bad * sum(source.sizes) if split == "train" or allow_missing else 0):
        raise ValueError(f"{folder}, {split}: {damaged} of {sum(source.sizes)} pictures are damaged, prepare them again; more "
                         "than --max_bad stop the run, in the test split one without --allow_missing")  # fmt: skip
    if damaged + mute and ddp.rank() == 0:
        print(f"{folder}, {split}: left out are {damaged} damaged pictures and {mute} without captions", file=sys.stderr)
    if not out:
        raise ValueError(f"{folder}, {split}: no picture has captions; prepare some with boxes by data_prep/coco.py")
    boxes = [i for i in out if i.key != "base"]
    names = sorted({i.captions[0] for i in boxes})
    shown: dict[int, set] = {}
    for item in boxes:
        shown.setdefault(item.image, set()).add(item.captions[0])
    for n, item in enumerate(boxes):
        others = [t for t in names if t not in shown[item.image]]  # a rider's box shows the horse, too
        item.negatives["rule"] = [others[k] for k in np.random.default_rng((1, n)).permutation(len(others))[:3]]
    with_rules([i for i in out if i.key == "base"], 0)
    return out


def with_rules(items, seed) -> list[Item]:
    """Adds up to three negatives by rule to every item."""
    for i, item in enumerate(items):
        rng = np.random.default_rng((seed, i))
        item.negatives["rule"] = [t for t in (rule_negative(item.captions[0], rng) for _ in range(3)) if t]
    return items


# Negatives without a language model
GROUPS = (tuple(scenes.COLOURS) + ("black", "white", "brown", "gray", "grey", "golden", "silver", "dark", "pale"),
          ("large", "small", "big", "little", "tiny", "huge", "tall", "short", "long", "young", "old"),
          ("left", "right", "above", "below", "top", "bottom", "front", "back", "under", "over"),
          ("man", "woman", "boy", "girl", "dog", "cat", "person", "child", "people", "bus", "car", "truck", "train", "table"),
          scenes.TEXTURES + ("lined", "checked", "plain", "wooden", "metal", "wet", "dry"), scenes.SHAPES)  # fmt: skip
STOP = frozenset("a an the of on in at to and with is are it its this that there for from by as into near next two three "
                 "while his her their some photo picture".split())  # fmt: skip


def exchanged(words, order) -> str:
    """The words order[0], order[1], ... in these places; punctuation and the first word's capital stay where they are."""
    parts = [re.fullmatch(r"(\W*)(.*?)(\W*)", w).groups() for w in words]
    texts = [own for _, own, _ in parts]
    if capital := texts[0][:1].isupper():
        texts[0] = texts[0][:1].lower() + texts[0][1:] if texts[0][1:].islower() else texts[0]  # not of "NASA"
    new = [texts[k] for k in order]
    new[0] = new[0][:1].upper() + new[0][1:] if capital else new[0]
    return " ".join(before + text + after for (before, _, after), text in zip(parts, new))


def rule_negative(text: str, rng) -> str:
    """Two words exchanged, of one kind (colours, sizes, places, things) where the text has two, else two content words; "" if
    nothing can be exchanged. Not of "top right" or "red and white", which stay as true as they were."""
    words = text.split()
    bare = [re.sub(r"\W", "", w).lower() for w in words]

    def differ(places):
        return [(i, j) for i in places for j in places if i < j and bare[i] != bare[j] and set(bare[i + 1 : j]) - {"and", "or"}]

    pairs = [p for group in GROUPS for p in differ([i for i, w in enumerate(bare) if w in group])]
    pairs = pairs or differ([i for i, w in enumerate(bare) if w and w not in STOP])
    if not pairs:
        return ""
    order, (i, j) = list(range(len(words))), pairs[rng.integers(len(pairs))]
    order[i], order[j] = j, i
    return exchanged(words, order)


def shuffled(text: str, rng) -> str:
    """Content words in another order, all else in place: the word-order test."""
    words = text.split()
    places = [i for i, w in enumerate(words) if re.sub(r"\W", "", w).lower() not in STOP]
    order = list(range(len(words)))
    for a, b in zip(places, rng.permutation(places)):
        order[a] = b
    return exchanged(words, order)


def write_toy(root: Path, count: int, test: int, seed: int, size: int = 64) -> None:
    """Generated pictures in the form of the release's complete/: objects are masks, a spot is a mask below its object.
    Short captions leave out sizes and ground, summaries name everything; all three kinds of negatives. No object (shape, colour
    and size) of the test pictures is in a training picture."""
    for sub in ("photos", "complete"):
        (root / sub).mkdir(parents=True, exist_ok=True)
    splits = {"train": [], "valid": [], "test": []}
    for i in range(count + test):
        s = scenes.scene(i, seed * 1000 + 700, (1, 3), grid=2, part="train" if i < count else "test")
        name = f"{i:06d}-data.json"
        splits["train" if i < count else "test"].append(name)
        if (root / "complete" / name).exists():
            continue
        plot.save(Image.fromarray(scenes.render([s], size)[0]), root / "photos" / f"sa_{i:07d}.png")
        masks, summaries, negatives = {}, {}, {}
        nodes = scenes.tree(s, size)
        for node in nodes[1:]:
            x0, y0, x1, y1 = node["box"]
            png = io.BytesIO()
            Image.fromarray(node["mask"]).convert("1").save(png, format="PNG")
            masks[str(node["id"])] = dict(
                idx=node["id"], outer_mask=base64.b64encode(png.getvalue()).decode(), area=int(node["mask"].sum()),
                bounds={"topLeft": {"x": x0, "y": y0}, "bottomRight": {"x": x1, "y": y1}},
                parent=-1 if node["parent"] == 0 else node["parent"],
                requirements=[n["id"] for n in nodes if n["parent"] == node["id"]],
                mask_quality=0, label=node["label"], caption=node["caption"])  # fmt: skip
        objects = [n["id"] for n in nodes if n["parent"] == 0]
        parts = {"base": s} | {f"m-{n}-sc": replace(s, things=(replace(t, cell=0),), grid=1) for n, t in zip(objects, s.things)}
        for key, part in parts.items():
            texts = [scenes.caption(part)] + [scenes.caption(part, 97 * i + v) for v in range(1, 25)]
            summaries[key] = list(dict.fromkeys(texts))[:8]
            negatives[key] = toy_negatives(part, i)
        first = scenes.caption(s, 3 * i + 1, brief=True)
        extra = f"The background is {s.tone} and {s.pattern}."
        entry = dict(image=f"sa_{i:07d}.png", height=size, width=size, short_caption=first, extra_caption=extra,
                     mask_keys=list(masks), mask_data=masks)  # fmt: skip
        write_json(root / "complete" / name, {**entry, "summaries": summaries, "negatives": negatives})
    write_json(root / "splits.json", splits)


def toy_negatives(s, seed) -> dict[str, list[str]]:
    """Three of each kind for a scene, one for a close-up: a changed attribute or object, a changed layout or ground, exchanged
    words. None is true of the scene."""
    nouns = re.compile(rf"\b(?:{'|'.join((*scenes.SHAPES, 'background'))})\b")

    def said(text):  # another order of the words at one noun says the same, and the last words are about the last noun
        *parts, end = (frozenset(part.split()) for part in nouns.split(text))
        return [*parts[:-1], parts[-1] | end] if parts else [end], nouns.findall(text)

    rng, text, count = np.random.default_rng((seed, 5)), scenes.caption(s), 3 if s.grid > 1 else 1
    changed = [n["caption"] for n in scenes.negatives(s, seed) if n["kind"].startswith("replace")]
    moved = [n["caption"] for n in scenes.negatives(s, seed) if n["kind"].startswith("swap")]
    moved += [scenes.caption(replace(s, tone=t, pattern=p)) for t in scenes.TONES for p in scenes.PATTERNS
              if t != s.tone or p != s.pattern]  # fmt: skip
    swaps = [t for t in dict.fromkeys(rule_negative(text, rng) for _ in range(12)) if t and said(t) != said(text)]
    while len(swaps) < count:  # too few exchanges of two words: all of them in another order
        swaps += [t for t in [shuffled(text, rng)] if said(t) != said(text)]
    return {k: [str(t) for t in rng.permutation([x for x in v if said(x) != said(text)])[:count]]
            for k, v in (("basic", changed), ("layout", moved), ("swaps", swaps))}  # fmt: skip


def crop_of(item, size):
    """The item's crop as CLIP sees it: short side to `size`, then the centre; long crops lose their ends."""
    if isinstance(item.photo, tuple):
        source, *place = item.photo
        img = source.read(*place)["image"]
    else:
        img = data.decode_image(Path(item.photo).read_bytes(), item.photo)
    return metrics.short_side(img.crop(item.box) if item.box else img, size, size)


class Crops:
    """Items as a source of pictures for data.load: cut when they are read."""

    def __init__(self, items, size):
        self.items, self.size, self.sizes, self.folder = items, size, [len(items)], "the photos of the crops"

    def read(self, shard, row):
        try:
            return {"image": crop_of(self.items[row], self.size)}
        except OSError as error:
            raise data.BadSample(f"{error.filename} cannot be read ({error.strerror})") from error


def normalised(images):  # twin: normalised
    """uint8 (B, 3, S, S) -> CLIP's input."""
    mean, std = (torch.tensor(v, device=images.device).view(1, 3, 1, 1) for v in metrics.MEAN_STD["clip"])
    return (images.float() / 255 - mean) / std


def open_items(cfg, split, say=False) -> list[Item]:
    if Path(cfg.data, "manifest.json").is_file():
        split = data.held_out(cfg.data) if split == "test" else split
        return read_boxes(cfg.data, split, cfg.min_side, cfg.allow_missing, cfg.max_bad)
    items = read_dci(cfg.data, split, cfg.min_side, cfg.allow_missing, say)
    return items if any("swaps" in i.negatives for i in items) else with_rules(items, 0)


def short_items(items) -> list[Item]:
    """The control: whole pictures with their short captions, the first line of the description."""
    return [replace(i, captions=[i.long.split("\n")[0]], negatives={}) for i in items if i.key == "base"]


# 5. EVALUATE ---------------------------------------------------------------------------------------------------------------
@torch.no_grad()
def text_features(model, tok, texts, device, part=256):
    out = []
    for i in range(0, len(texts), part):
        ids = trim(tok(texts[i : i + part], model.text.context), 8).to(device)
        out.append(F.normalize(model.encode_text(ids).float(), dim=1))
    return torch.cat(out) if out else torch.zeros(0, model.text.out_dim, device=device)


@torch.no_grad()
def picture_features(model, items, env, part=64):
    """(N, D) in order, divided over the processes; a damaged photo ends the run, since leaving it out would change the batches
    behind it."""
    source, out = Crops(items, model.visual.image_size), []
    for i in range(part * env.rank, len(items), part * env.world):
        try:
            images = [np.asarray(source.read(0, r)["image"]) for r in range(i, min(i + part, len(items)))]
        except data.BadSample as error:
            raise ValueError(f"{error}; the test needs every photo") from error
        x = normalised(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).to(env.device))
        f = F.normalize(model.encode_image(x).float(), dim=1)
        out.append((i, f.cpu()))
    return torch.cat([f for _, f in sorted(ddp.gather_lists(out), key=lambda x: x[0])]).to(env.device)


TESTS = {  # official name: items, captions of each, negatives -> columns; "": not reported
    "all_swaps": ("all", 1, "swaps", ("SCM", "Neg")),
    "all_swaps_pick5": ("all", 5, "swaps", ("P5-SCM", "P5-Neg")),
    "base_swaps": ("base", 1, "swaps", ("", "Base Neg")),
    "all_hardest": ("all", 1, "hardest", ("", "Hard Negs")),
}


def official_tests(model, tok, items, features, env, batch=8) -> dict[str, float]:
    """The four tests, in percent, of items with their features (N, D): batches of 8 consecutive items, never shuffled, so that
    neighbours are crops of one picture. Processes share whole batches. SCM is a share of all items, Neg of those that have a
    negative."""
    kind = "swaps" if any("swaps" in i.negatives for i in items) else "rule"
    out = {}
    for which, count, negative, columns in TESTS.values():
        chosen = [r for r, i in enumerate(items) if len(i.captions) >= count and (which == "all" or i.key == "base")]
        if not chosen:
            continue
        mine = [chosen[b : b + batch] for b in range(0, len(chosen), batch)][env.rank :: env.world]
        sums = torch.zeros(4, dtype=torch.float64)  # right by SCM, items, right by Neg, items with a negative
        for rows in mine:
            f, part = features[rows], [items[r] for r in rows]
            texts = text_features(model, tok, [c for i in part for c in i.captions[:count]], env.device)
            scores = (f @ texts.T).view(len(part), len(part), count)
            sums += torch.tensor([subcrop_matching(scores) * len(part), len(part), 0, 0])
            wrong = [hardest(i) if negative == "hardest" else (i.negatives.get(kind) or [])[:1] for i in part]
            f_wrong = text_features(model, tok, [t for texts in wrong for t in texts], env.device).split([*map(len, wrong)])
            for row, t in enumerate(f_wrong):
                if len(t):
                    sums += torch.tensor([0, 0, beats_negatives(scores[row, row][None], f[row : row + 1] @ t.T), 1])
        sums = ddp.all_sum(sums.to(env.device))
        for name, right, total in ((columns[0], sums[0], sums[1]), (columns[1], sums[2], sums[3])):
            if name and total:
                out[name] = 100 * (right / total).item()
    return out


def hardest(item) -> list[str]:
    """The stored negative that CLIP likes best; without stored scores all of them: the model then finds its own hardest."""
    named = {f"{k}_{n}": t for k, texts in item.negatives.items() for n, t in enumerate(texts)}
    stored = {k: v for k, v in item.scores.items() if k in named}
    return [named[max(stored, key=stored.get)]] if stored else list(named.values())


def extra_tests(model, tok, items, f, env) -> dict[str, float]:
    """Beside the official tests: matching within one picture (both directions, 0 = chance, 100 = perfect), retrieval of whole
    pictures by their whole description (cut at the context), and true captions against up to four with their words shuffled."""
    t = text_features(model, tok, [i.captions[0] for i in items], env.device)
    gains = []
    for number in sorted({i.image for i in items}):
        rows = [r for r, i in enumerate(items) if i.image == number]
        if len(rows) > 1:
            s, n = f[rows] @ t[rows].T, len(rows)
            right = [(s.argmax(d) == torch.arange(n, device=s.device)).float().mean().item() for d in (0, 1)]
            gains.append((sum(right) / 2 - 1 / n) / (1 - 1 / n))
    base = [r for r, i in enumerate(items) if i.key == "base" and i.long]
    long = text_features(model, tok, [items[r].long for r in base], env.device)
    same = torch.eye(len(base), dtype=torch.bool, device=f.device)
    both = {"image to text": (f[base], long), "text to image": (long, f[base])} if base else {}
    each = {f"long {way} R@{k}": v for way, (a, b) in both.items()
            for k, v in metrics.retrieval_recall(a, b, same, (1, 5, 10)).items()}  # fmt: skip
    order, luck = [], []
    for row, item in enumerate(items):
        rng = np.random.default_rng((7, row))
        wrong = {w for w in (shuffled(item.captions[0], rng) for _ in range(4)) if w != item.captions[0]}
        if wrong:
            scores = f[row] @ text_features(model, tok, [item.captions[0], *sorted(wrong)], env.device).T
            order.append(float(scores[0] > scores[1:].max()))
            luck.append(1 / len(scores))
    cut = [len(tok.encode(items[r].long)) + 2 > model.text.context for r in base]
    first = [v for k, v in each.items() if k.endswith("R@1")]
    found = {"within": [100 * g for g in gains], "long R@1": first, "long, cut": [100 * c for c in cut],
             "order": [100 * o for o in order], "order by chance": [100 * c for c in luck]}  # fmt: skip
    return {k: float(np.mean(v)) for k, v in found.items() if v} | each


def sugarcrepe(model, tok, cfg, env) -> dict[str, float]:
    """Percent right by kind: the picture (text only: another caption of it) is nearer to the caption than to the negative."""
    rows = data.read_rows(cfg.sugarcrepe, ("kind", "file", "caption", "negative_caption"))
    if cfg.photos:
        files = {p.name: p for p in Path(cfg.photos).rglob("*.jpg")}
        rows = [r for r in rows if r["file"] in files]
    else:  # a row's picture is stood for by the first of its captions that is not the row's own
        found: dict[str, list[str]] = {}
        for r in data.read_rows(cfg.references, ("image_id", "caption")):
            found.setdefault(r["image_id"].lstrip("0"), []).append(r["caption"])
        other = [next((c for c in found.get(Path(r["file"]).stem.lstrip("0"), []) if c != r["caption"]), "") for r in rows]
        rows, other = [r for r, c in zip(rows, other) if c], [c for c in other if c]
    if not rows:
        raise ValueError(f"{cfg.sugarcrepe}, {cfg.photos or cfg.references}: no row has its picture there")
    if cfg.photos:
        names = sorted({r["file"] for r in rows})
        place = {n: i for i, n in enumerate(names)}
        query = picture_features(model, [Item(str(files[n]), None, []) for n in names], env)[[place[r["file"]] for r in rows]]
    else:
        query = text_features(model, tok, other, env.device)
    yes, no = (text_features(model, tok, [r[k] for r in rows], env.device) for k in ("caption", "negative_caption"))
    right = ((query * yes).sum(1) > (query * no).sum(1)).float().cpu()
    kinds = sorted({r["kind"] for r in rows})
    out = {f"crepe {k}": 100 * right[[i for i, r in enumerate(rows) if r["kind"] == k]].mean().item() for k in kinds}
    return out | {"crepe": 100 * right.mean().item(), "crepe rows": float(len(rows))}


def evaluate(model, tok, items, cfg, env) -> dict[str, float]:
    model.eval()
    f = picture_features(model, items, env)
    out = official_tests(model, tok, items, f, env) | extra_tests(model, tok, items, f, env)
    if cfg.sugarcrepe:
        out |= sugarcrepe(model, tok, cfg, env)
    model.train()
    return out


# 6. TRAIN ----------------------------------------------------------------------------------------------------------------
ARMS = {  # what is trained on, and with which loss
    "clip": "nothing: the starting point",
    "short": "whole pictures, short captions, L_clip: as many updates, no dense captions",
    "dense": "crops, dense captions, L_clip",
    "dense+neg": "... and L_neg",
    "negclip": "crops, dense captions, negatives as further columns",
    "dense+long": "... L_clip of crops with the whole description, and of their principal part with the summary: Long-CLIP "
    "without its label smoothing; --context 248 stretches the positions of a CLIP with 77",
}


def items_of_arm(cfg, items) -> tuple[list[Item], int]:
    """What the arm is trained on, and how many captions of it at each access. ValueError if that is less than a batch."""
    many = 5 if cfg.captions == "pick5" and cfg.arms in ("dense", "dense+neg") else 1
    if cfg.negatives == "rule" and not any("rule" in i.negatives for i in items):
        items = with_rules(items, cfg.seed)
    items = short_items(items) if cfg.arms == "short" else [i for i in items if len(i.captions) >= many]
    if cfg.arms in ("dense+neg", "negclip"):
        items = [i for i in items if i.negatives.get(cfg.negatives)]
    if len(items) < cfg.batch_size:
        raise ValueError(f"arm {cfg.arms}: {len(items)} crops have {many} captions and what the arm needs, fewer than "
                         f"--batch_size {cfg.batch_size}; without negatives of the kind {cfg.negatives}, --negatives rule "
                         "makes some")  # fmt: skip
    return items, many


def draw_texts(items, rows, key, many, u):
    """-> texts of each row: `many` captions without replacement (or the first ones, for key "first"), by uniform numbers u."""
    out = []
    for item, v in zip((items[r] for r in rows), u):
        pool = item.captions if key in ("first", "pick1", "pick5") else item.negatives[key]
        order = range(many) if key == "first" else np.argsort(v[: len(pool)])[:many]
        out += [pool[i] for i in order]
    return out


def method_loss(model, images, ids, many, cfg):
    """ids: `many` captions of each of this process's b crops, then, in arms with negatives or whole descriptions, one more text
    of each -> (loss, parts for the log)."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=cfg.dtype == "bfloat16"):
        out = model(images, ids)
    f, texts, scale = (v.float() for v in out)
    b = len(images)
    first = ddp.rank() * b
    own, rest = texts[: b * many].view(b, many, -1), texts[b * many :]
    if cfg.arms == "negclip":
        return negclip_loss(f, own[:, 0], rest, scale), {"scale": scale}
    if cfg.arms == "dense+long":
        long = clip_pool_loss(scale * (f @ ddp.gather_rows(rest).T)[..., None], "avg",
                              scale * (rest @ ddp.gather_rows(f).T)[..., None], first)  # fmt: skip
        g = principal_part(ddp.gather_rows(f))
        brief = clip_pool_loss(scale * (g[first : first + b] @ ddp.gather_rows(own[:, 0]).T)[..., None], "avg",
                               scale * (own[:, 0] @ g.T)[..., None], first)  # fmt: skip
        return long + brief, {"long": long, "brief": brief, "scale": scale}
    every = ddp.gather_rows(own)  # (B, M, D)
    scores = scale * torch.einsum("id,jmd->ijm", f, every)
    to_pictures = scale * torch.einsum("jmd,id->jim", own, ddp.gather_rows(f))
    l_clip = clip_pool_loss(scores, cfg.pool, to_pictures, first)
    if cfg.arms != "dense+neg":
        return l_clip, {"clip": l_clip, "scale": scale}
    pos = caption_pool(scores, cfg.pool, first).diagonal(first)  # (b,)
    l_neg = negatives_loss(pos, scale * (f * rest).sum(1))
    return cfg.alpha * l_clip + cfg.beta * l_neg, {"clip": l_clip, "neg": l_neg, "scale": scale}


def build(cfg, env):
    """-> model, tokenizer. model.visual.image_size: of its pictures; model.sizes: of a stand-in's towers, else {}."""
    tok = Tokenizer.from_clip(cfg.tokenizer) if cfg.tokenizer else zoo.load_tokenizer()
    path = cfg.init or zoo.WEIGHTS / "clip.safetensors"
    sizes = read_tensors(path)[1] if str(path).endswith(".safetensors") else {}
    sizes = {k: sizes[k] for k in ("visual", "text") if k in sizes}  # our own files hold them
    model = zoo.load_clip(path) if sizes else load_clip(path, act=cfg.act)
    model.sizes = sizes
    if model.text.token_embed.num_embeddings != len(tok):
        known = model.text.token_embed.num_embeddings
        raise ValueError(f"--init knows {known} tokens and the tokenizer {len(tok)}; pass the --tokenizer of that model")
    return model.to(env.device).requires_grad_(True), tok


def train(cfg: Config) -> dict:
    """One arm (cfg.arms names it), in cfg.out_dir. Returns its metrics."""
    env, out = ddp.start(cfg.seed), Path(cfg.out_dir)
    ddp.reseed(cfg.seed, 0, 0)
    model, tok = build(cfg, env)
    test = open_items(cfg, "test")
    if cfg.arms == "clip":
        log = RunLog(cfg, env, "clip", cfg.steps)  # a run of no updates
        result = evaluate(model, tok, test, cfg, env)
        log.finish(result)
        return result
    lengthen(model, cfg.context)
    if cfg.rank:  # before any picture is read, which draws random numbers, too
        add_lora(model, cfg.rank, cfg.lora_alpha, cfg.lora_dropout).to(env.device)
        if cfg.context != 77:
            model.text.pos_embed.requires_grad_(True)
    items, many = items_of_arm(cfg, open_items(cfg, "train"))
    side = model.visual.image_size
    pictures = data.load(Crops(items, side), np.arange(len(items)), side, env, cfg.memory_gb, cfg.workers, cfg.max_bad)
    fixed = model.text.pos_embed[:20].detach().clone()
    wrapped = ddp.wrap(torch.compile(model) if cfg.compile else model, env)
    opt = torch.optim.AdamW(optim.decay_groups(model, cfg.wd), cfg.lr, fused=True)
    start, _ = ckpt.resume(out / "last.pt", cfg, model=model, opt=opt)
    micro_size = cfg.batch_size // cfg.accum
    b = env.share(cfg.batch_size, accum=cfg.accum)
    stream = data.endless(pictures, side, micro_size, env, cfg.seed, start * cfg.accum, cfg.workers, cfg.max_bad)
    log = RunLog(cfg, env, cfg.arms, start)
    for step in range(start, cfg.steps):
        ddp.reseed(cfg.seed, env.rank, step)  # LoRA's dropout
        rate = cfg.lr * (1 - max(0, step - cfg.warmup) / max(1, cfg.steps - cfg.warmup))
        optim.set_lr(opt, rate * min(1.0, (step + 1) / max(1, cfg.warmup)))
        mean_loss = 0.0
        for micro in range(step * cfg.accum, (step + 1) * cfg.accum):
            batch = next(stream)
            rows = batch["row"].tolist()
            u = np.random.default_rng((cfg.seed, 11, micro)).random((micro_size, 2, 64))[env.rank * b :]  # for the global batch
            texts = draw_texts(items, rows, cfg.captions, many, u[:, 0])
            if cfg.arms in ("dense+neg", "negclip"):
                texts += draw_texts(items, rows, cfg.negatives, 1, u[:, 1])
            elif cfg.arms == "dense+long":
                texts += [items[r].long for r in rows]
            ids = trim(tok(texts, model.text.context), 8).to(env.device)
            loss, parts = method_loss(wrapped, normalised(batch["image"].to(env.device)), ids, many, cfg)
            (loss / cfg.accum).backward()
            mean_loss += loss.detach() / cfg.accum
        if cfg.context != 77:
            model.text.pos_embed.grad[:20] = 0  # Long-CLIP's fixed positions; weight decay is undone below
        norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or math.inf)
        opt.step()
        opt.zero_grad(set_to_none=True)
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100))  # after the update, as CLIP does: a clamp in the loss has no gradient
            if cfg.context != 77:
                model.text.pos_embed[:20] = fixed  # Long-CLIP
        done, last = step + 1, step + 1 == cfg.steps
        due = done % cfg.log_every == 0 or last
        leave = ddp.interrupted(due)
        if due or leave or done % cfg.save_every == 0:
            ddp.check_finite({"loss": mean_loss.item(), "grad_norm": norm.item()}, step)
        if due:
            log.write(step, **ddp.mean({"loss": mean_loss, **parts}), lr=opt.param_groups[0]["lr"])
        if cfg.eval_every and done % cfg.eval_every == 0 and not last:
            log.write(step, **evaluate(model, tok, test, cfg, env))
        log.tick(step)
        if env.is_main and (done % cfg.save_every == 0 or last or leave):
            ckpt.save(out / "last.pt", done, cfg, model=model, opt=opt)
        if leave:
            log.close()
            raise KeyboardInterrupt
    if cfg.rank:
        merge_lora(model)
    result = evaluate(model, tok, test, cfg, env)
    log.write(cfg.steps - 1, **result)
    if env.is_main:
        if model.sizes:
            model.sizes["text"]["context"] = model.text.context
        act = next(name for name, f in ACTS.items() if f is model.visual.blocks[0].mlp.act)
        heads = {name: getattr(model, name).blocks[0].attn.heads for name in ("visual", "text")}
        ckpt.export(out / "model.safetensors", model.state_dict(), arm=cfg.arms, act=act, heads=heads, **model.sizes)
        plot.save(plot.lines(history(log.dir, "loss"), cfg.arms, y="loss"), out / "curves.png")
    log.finish(result)
    return result


def check(cfg: Config) -> None:
    """One sentence for what a user can get wrong."""
    cli.choose(cfg, "arms", arms=ARMS, pool=("avg", "max", "min", "hardest"), captions=("first", "pick1", "pick5"),
               dtype=("float32", "bfloat16"), negatives=("swaps", "basic", "layout", "rule"),
               act=("", "quick_gelu", "gelu"), context=(77, 248))  # fmt: skip
    cli.within(cfg, "steps images test_images", 1)
    cli.within(cfg, "rank", 0)
    if cfg.batch_size < 2 * cfg.accum:
        raise ValueError(f"--batch_size {cfg.batch_size} must be two crops a micro-batch at least, --accum is {cfg.accum}")
    if cfg.sugarcrepe and not cfg.photos and not cfg.references:
        raise ValueError("--sugarcrepe needs --photos, or --references for the text-only check")
    for name in ("sugarcrepe", "photos", "references"):
        if (path := getattr(cfg, name)) and not Path(path).exists():
            raise ValueError(f"--{name} {path} does not exist")


def run(cfg: Config) -> dict:
    """All arms, each in its own folder; finished arms are kept. Prints the tests with their chance levels, and the claim."""
    check(cfg)
    out, scores = Path(cfg.out_dir), {}
    env = ddp.start(cfg.seed)
    env.share(cfg.batch_size, accum=cfg.accum)  # refuses what cannot be cut
    if not cfg.data:  # smaller pictures, smaller masks
        cfg = replace(cfg, data=str(out / f"generated_{cfg.seed}_{cfg.images}"), min_side=16)
        if env.is_main:
            write_toy(Path(cfg.data), cfg.images, cfg.test_images, cfg.seed)
        if env.world > 1:
            torch.distributed.barrier()
    arms = cfg.arms.split(",")
    trained = [a for a in arms if a != "clip"]  # the starting point alone needs no training pictures
    known = open_items(cfg, "train", say=env.is_main) if trained else []
    for arm in trained:  # before anything is trained
        items_of_arm(replace(cfg, arms=arm), known)
    items = open_items(cfg, "test", say=env.is_main)
    for arm in arms:
        one = replace(cfg, arms=arm, out_dir=str(out / arm))
        scores[arm] = ckpt.once(train, one)
    result = {f"{arm} {k}": v for arm, s in scores.items() for k, v in s.items()}
    if env.is_main:
        report(cfg, scores)
        write_json(out / "metrics.json", result)
        draw_items(items, out / "samples.png")
    return result


def report(cfg, scores) -> None:
    columns = list(next(iter(scores.values())))
    luck = {"SCM": chance(8, 1)[0], "Neg": 0.5, "P5-SCM": chance(8, 5)[0], "P5-Neg": chance(8, 5)[1], "Base Neg": 0.5,
            "within": 0.0, "order": next(iter(scores.values())).get("order by chance", 0) / 100}  # fmt: skip
    official = [c for c in columns if c in ("SCM", "Neg", "P5-SCM", "P5-Neg", "Base Neg", "Hard Negs")]
    crepe = [c for c in columns if c.startswith("crepe")]
    further = [c for c in ("within", "long R@1", "long, cut", "order") if c in columns]  # R@5 and R@10: in metrics.json
    luck |= dict.fromkeys((c for c in crepe if c != "crepe rows"), 0.5)
    for title, some in (("the four tests, batches of 8", official), ("further tests", further), ("SugarCrepe", crepe)):
        if some:
            rows = [[arm, *[s.get(c) for c in some]] for arm, s in scores.items()]
            rows.append(["chance", *[100 * luck[c] if c in luck else None for c in some]])
            print(f"\n{title}, percent\n" + table(rows, ["", *some]))
    claims = (("clip", "dense", "SCM", "dense captions lift sub-crop matching"),
              ("short", "dense", "SCM", "... over as many updates on short ones of whole pictures"),
              ("clip", "dense", "Neg", "... and negatives"),
              ("dense", "dense+neg", "Neg", "the negatives loss lifts negatives"),
              ("dense", "dense+neg", "order", "... and word order"),
              ("dense", "dense+neg", "SCM", "... at the price of matching"))  # fmt: skip
    rows = [[f"{text} ({key})", scores[a][key], scores[b][key], f"{scores[b][key] - scores[a][key]:+.1f}"]
            for a, b, key, text in claims if a in scores and b in scores and key in scores[a]]  # fmt: skip
    if rows:
        print("\n" + table(rows, ["claim", "without", "with", "difference"]))
        print("the paper: VL-Checklist's objects 81.17 -> 88.37 by dense captions alone")
    print(f"\npictures, curves and weights: {cfg.out_dir}")


def draw_items(items, path) -> None:
    """Pictures with their crops, first captions and first negatives, eight in all."""
    cut = {i.image for i in items if i.key != "base"}
    chosen = [i for i in items if i.image in cut][:8]
    shown = [np.asarray(crop_of(i, 128)) for i in chosen]
    wrong = [next((t for k in ("swaps", "rule") for t in i.negatives.get(k, [])), "") for i in chosen]
    texts = [f"{i.captions[0]}  NOT: {w}" if w else i.captions[0] for i, w in zip(chosen, wrong)]
    plot.save(plot.grid(shown, 4, texts, None, "crops, captions and negatives", 210, 6), path)


# 7. MAIN -----------------------------------------------------------------------------------------------------------------
PRESETS = {
    "smoke": dict(steps=4, batch_size=8, images=12, test_images=6, log_every=2, save_every=2, arms="clip,dense,dense+neg",
                  out_dir="runs/dci_smoke"),
    "laptop": {},
    "gpu": dict(steps=3_000, batch_size=512, images=8_000, test_images=1_000, out_dir="runs/dci_gpu",
                arms="clip,short,dense,dense+neg,negclip,dense+long"),
    # released settings: LoRA on ViT-B/32, 32 crops on each of two GPUs; about 6 of their 10 epochs; which rank was published is
    # not known
    "paper": dict(arms="clip,dense,dense+neg", data="data/dci", init="data/clip-vit-base-patch32", steps=8_000, batch_size=64,
                  lr=1e-3, rank=4, lora_alpha=2.0, lora_dropout=0.2, dtype="bfloat16", workers=8, save_every=500,
                  out_dir="runs/dci_paper"),
}  # fmt: skip

if __name__ == "__main__":
    cli.main(run, Config, PRESETS)
