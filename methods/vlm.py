"""Vision-language models: four ways to tie pictures to words, trained on the same pairs and measured by the same tests.

Paper      Bordes, Pang, Ajay, Li, Bardes et al.: An Introduction to Vision-Language Modeling. 2024, arXiv 2405.17247
Idea       A tutorial without experiments; this is the experiment. CONTRASTIVE models score a picture against a caption. MASKING
           hides words and patches and asks for them back, from the other side too. GENERATIVE models write. PRETRAINED
           BACKBONES keep a language model frozen and learn only how to show it a picture. One data set, tokenizer and ViT, as
           many updates; then family by metric, beside chance and a blind reader: much that looks like seeing is guessing.
Equations  2.2 InfoNCE -> infonce()     SigLIP -> siglip_loss()     Llip -> llip_scores()     2.3 FLAVA -> masked_ce(), Masked
           2.4 CoCa -> caption_loss(), CoCa     2.5 frozen language model -> Frozen     low-rank updates -> LoRA
Read first section 2, the classes of section 3 from forward() on, then evaluate() in section 5
Symbols    f_img, f_txt unit embeddings (B, D); ids (B, L); counted (B, L): tokens in the loss; seen (B, N, W): encoded pictures
           of width W, class token first; in CoCa pooled queries, in the frozen family patches alone
Run        python methods/vlm.py [--preset smoke]                               (CPU, no data; 5.5 min on two quiet cores)
           python methods/vlm.py --arms infonce,siglip,llip,flip,mask+boxes,frozen+lora
           python methods/vlm.py --ask picture.png --question "Is there a star?"
           torchrun --nproc_per_node=8 methods/vlm.py --preset paper --data data/coco --tokenizer MERGES
Data       generated (common/scenes.py), or shards with captions by data_prep/captions.py, cc12m.py or coco.py (with boxes)
Expect     laptop: InfoNCE's zero-shot 83 +- 43, swap 56 (negclip 54); CoCa's open answers 74 +- 6, blind 23; 3 seeds, 1e6bfa9
Differs    everything is tiny. FLAVA: unimodal losses share the paired batch, codes of patches are k-means centres, half of the
           captions in image-text matching are wrong. Frozen: InfoNCE's encoder, a language model of ours. Zero-shot averages
           two templates' cosines. One generator of negatives teaches negclip and makes the tests; mask, coca and frozen are
           taught answers (off: --no-asked). Ties are wrong. Left out: MaskVLM, Chameleon, Bayes, Q-Former, video; POPE's files;
           BLEU, ROUGE, captions' CLIPScore.
Uses       common/ckpt.py cli.py data.py ddp.py dit.py log.py metrics.py optim.py plot.py scenes.py tokenizer.py
           vision.py vit.py   (copy these with this file)
"""

from __future__ import annotations

import html
import itertools
import json
import math
import re
import sys
from collections import Counter
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]  # so that python, torchrun and python -m all find common/

from common import ckpt, cli, data, ddp, metrics, optim, plot, scenes
from common.dit import read_tensors, sincos_2d
from common.log import RunLog, history, table, write_json
from common.tokenizer import Tokenizer
from common.vision import torchvision
from common.vit import Block, TextTransformer, ViT


# 1. CONFIG (presets stand in section 7) ------------------------------------------------------------------------------
@dataclass(frozen=True)
class Config:
    # run: the same names in all ten files
    out_dir: str = "runs/vlm"  # one folder a run; each arm gets a sub-folder
    seed: int = 0  # of weights, scenes, data order, questions and masks
    steps: int = 400  # optimiser updates of each arm; of lm at most 1,000
    batch_size: int = 64  # GLOBAL number of pictures, divided by the number of processes
    accum: int = 1  # micro-batches an update; negatives and means over words are its own; logged parts are the last one's
    lr: float = 1.5e-3  # peak, AdamW; of frozen and frozen+lora, with few new weights, three times as much
    wd: float = 0.05  # weight decay
    warmup: int = 30  # updates of linear warm-up, then half a cosine
    grad_clip: float = 1.0  # largest gradient norm, 0 = off
    ema_decay: float = 0.0  # not part of these methods
    dtype: str = "float32"  # float32, or bfloat16 autocast
    compile: bool = False  # torch.compile the model
    data: str = ""  # folder of shards with captions; "" = generated scenes
    eval_data: str = ""  # folder of shards to be tested on; "" = the held-out ones of --data
    workers: int = 0  # loader processes of each rank
    log_every: int = 20  # updates between lines of log.jsonl
    eval_every: int = 0  # not used: arms are evaluated at their end
    save_every: int = 100  # updates between checkpoints
    resume: bool = True  # continue from last.pt, exactly; --no-resume starts again
    max_bad: float = 0.01  # share of damaged samples at which the run stops
    # the methods
    arms: str = "infonce,negclip,mask,coca,frozen"  # comma list of ARMS; what an arm needs is trained before it
    lam_cap: float = 2.0  # CoCa: weight of the caption loss (open_clip's default), 1 of the contrastive one
    mask_words: float = 0.15  # share of words that are hidden
    mask_patches: float = 0.38  # share of patches, in blocks (FLAVA: 75 of 196)
    codes: int = 64  # k-means centres that stand for patches (FLAVA: 8192 of a tokenizer)
    wrong: float = 0.5  # share of wrong captions in image-text matching (FLAVA's code: 0.1)
    mixtures: int = 8  # Llip: tokens of a picture that a caption mixes
    drop_tokens: float = 0.5  # arm flip: share of patches that are dropped in training
    noise: float = 0.0  # share of training pictures that get the caption of another one; arm filtered throws pairs away
    keep: float = 0.5  # arm filtered: share of pairs with the highest CLIPScore that stay, one batch at least
    lora: int = 8  # arm frozen+lora: rank of the language model's updates
    shots: int = 2  # solved examples before a question, for the frozen family, as far as they fit
    # data and model
    pairs: int = 6_000  # generated training pictures; a folder gives all it has
    eval_images: int = 96  # pictures of each test; zero-shot: at most 64
    asked: bool = True  # mask, coca and frozen get a question with each picture; --no-asked: captions alone
    kinds: str = "object,colour,place,relation,what colour,what shape,count"  # of questions; also texture, size, background
    objects: int = 2  # most objects in a generated picture
    image_size: int = 32  # pixels
    patch: int = 8  # pixels
    width: int = 96  # of every transformer
    depth: int = 4  # ViT
    heads: int = 4  # attention
    text_depth: int = 2  # half the layers of a text model: CoCa's halves, FLAVA's fusion
    lm_depth: int = 3  # layers of the language model
    embed_dim: int = 128  # shared space of the contrastive losses
    context: int = 40  # longest text in tokens
    vocab: int = 1_024  # of the tokenizer that is trained on the captions
    tokenizer: str = ""  # CLIP's merges file in its place
    memory_gb: float = 8.0  # pictures below this size are kept in memory
    sugarcrepe: str = ""  # its csv (kind, file, caption, negative_caption), for rows whose pictures are among the test pictures
    ask: str = ""  # a picture: answer --question with the first of --arms that writes, trained before in out_dir, and end
    question: str = ""  # for --ask; "" = what is to be seen


# 2. THE IDEA (start reading here) ------------------------------------------------------------------------------------
def infonce(f_img, f_txt, scale, f_neg=None):
    """InfoNCE, CLIP's loss: - log of the pair's share in the batch's Boltzmann distribution exp(-E), E = -scale f_img.f_txt.
    Its gradient pushes the pair's energy down and that of the others up. Mean of both directions; equal captions of a batch
    count as others. f_img, f_txt (b, D) unit rows of this process, scale 1 / temperature; f_neg: hard negatives, more columns
    for pictures only (NegCLIP). Chance: ln B for a global batch of B, without negatives."""
    label = torch.arange(len(f_img), device=f_img.device) + ddp.rank() * len(f_img)
    texts = ddp.gather_rows(f_txt) if f_neg is None else torch.cat([ddp.gather_rows(f_txt), ddp.gather_rows(f_neg)])
    to_txt, to_img = scale * dots(f_img, texts), scale * dots(f_txt, ddp.gather_rows(f_img))
    return (F.cross_entropy(to_txt, label) + F.cross_entropy(to_img, label)) / 2


def dots(u, v):
    """All dot products (N, M), never in bfloat16: scaled by 100 they would be rounded to halves."""
    with torch.autocast(u.device.type, enabled=False):
        return u @ v.T


def siglip_loss(logits, first=0):
    """SigLIP: noise-contrastive estimation, a yes or no for every pair. logits (b, B) = scale u.v + bias of own pictures with
    all captions, the first own caption in column `first`. Sum over captions, mean over pictures. The bias begins at -10,
    or B^2 - B negatives would drive the first steps. (It usually wants another learning rate; here all arms have one.)"""
    own = torch.eye(*logits.shape, device=logits.device).roll(first, 1)  # no softmax, so a pair needs no other one
    return -F.logsigmoid((2 * own - 1) * logits).sum(1).mean()


def llip_scores(tokens, keys, f_txt, queries):
    """Llip: every caption mixes a picture's K tokens (b, K, D), keys (b, K, d), by attention of its query (B, d); so each pair
    has a picture embedding of its own -> cosines (b, B). One head, no temperature: ours, the tutorial gives no form."""
    with torch.autocast(tokens.device.type, enabled=False):
        mix = torch.einsum("jd,ikd->ijk", queries, keys).softmax(2)
        return torch.einsum("ijd,jd->ij", F.normalize(torch.einsum("ijk,ikd->ijd", mix, tokens), dim=2), f_txt)


def masked_ce(logits, target):
    """Cross-entropy at the hidden places, target (B, L) with -100 elsewhere; 0, not NaN, if nothing is hidden. The mean is over
    the hidden places of all processes. Section 2.3.3 of the tutorial: divided by ln 2, this bounds from above, in bits a hidden
    token, the distortion H(X | Z), what the encoder's output Z leaves unknown; what the masks leave visible bounds the rate."""
    loss = F.cross_entropy(logits.flatten(0, 1).float(), target.flatten(), ignore_index=-100, reduction="sum")
    count = ddp.all_sum((target != -100).sum().float())
    return loss * ddp.world_size() / count.clamp(min=1)


def caption_loss(logits, ids, counted):
    """- mean log p(c_t | c_<t, picture) over counted tokens: the logits at t - 1 predict token t."""
    target = torch.where(counted, ids, -100)
    return masked_ce(logits[:, :-1], target[:, 1:])


def log_p(logits, ids, counted):
    """Mean log-probability of each text's counted tokens (B,): the score of a generative model."""
    logp = logits[:, :-1].float().log_softmax(2).gather(2, ids[:, 1:, None])[..., 0]
    return (logp * counted[:, 1:]).sum(1) / counted[:, 1:].sum(1).clamp(min=1)


def hide_words(ids, u, mask_id, special, share=0.15):
    """BERT's rule: hides `share` of the words of ids (B, L), one at least, by u (B, L, 2) uniform in [0, 1): 80 % become
    mask_id, 10 % a random word, 10 % stay. special (B, L): never hidden -> (ids, target with -100 elsewhere)."""
    order = u[..., 0].masked_fill(special, 2.0)  # 2: never the smallest
    hidden = (order < share) | (order == order.amin(1, keepdim=True)) & ~special
    draw = u[..., 1]
    noisy = torch.where(draw < 0.8, mask_id, torch.where(draw < 0.9, (draw * 1e6).long() % (mask_id - 2), ids))
    return torch.where(hidden, noisy, ids), torch.where(hidden, ids, -100)


def hide_patches(side, count, rng):
    """BEiT's blocks on a (side, side) grid until exactly `count` patches are hidden -> bool (side * side,)."""
    hidden, smallest = np.zeros((side, side), bool), max(1, count // 5)
    while hidden.sum() < count:
        area = rng.integers(smallest, max(smallest, count - hidden.sum()) + 1)
        ratio = math.exp(rng.uniform(math.log(0.3), -math.log(0.3)))
        h, w = (int(np.clip(round(math.sqrt(area * r)), 1, side)) for r in (ratio, 1 / ratio))
        y, x = rng.integers(side - h + 1), rng.integers(side - w + 1)
        block = np.argwhere(~hidden[y : y + h, x : x + w])[: count - hidden.sum()]  # the last block is cut
        hidden[y + block[:, 0], x + block[:, 1]] = True
    return hidden.reshape(-1)


# 3. MODULES: one layer, one picture encoder, four families ---------------------------------------------------------------
class Layer(Block):
    """common/vit.py's block, which may also look at a context, has a mask, and keeps keys and values for generation."""

    def __init__(self, width: int, heads: int, cross: bool = False):
        super().__init__(width, heads, 4 * width)
        self.norm_c = nn.LayerNorm(width) if cross else None
        self.cross = nn.MultiheadAttention(width, heads, batch_first=True) if cross else None

    def forward(self, x, causal=False, mask=None, context=None, cache=None):
        """x (B, L, W); mask (B, 1, L, L') bool; context (B, N, W); cache: a dict, filled and used."""
        q, k, v = self.attn.qkv(self.norm1(x)).unflatten(2, (3, self.attn.heads, -1)).permute(2, 0, 3, 1, 4)
        if cache is not None:
            k, v = (torch.cat([cache[n], t], 2) if n in cache else t for n, t in (("k", k), ("v", v)))
            causal = causal and "k" not in cache  # later calls bring one token, which may see all before it
            cache.update(k=k, v=v)
        a = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        x = x + self.attn.proj(a.transpose(1, 2).flatten(2))
        if self.cross is not None:
            x = x + self.cross(self.norm_c(x), context, context, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class Stack(nn.Module):
    """Layers and a final norm; with vocab, word and position embeddings too, and logits by the same embedding."""

    def __init__(self, cfg, depth: int, vocab: int = 0, cross: bool = False, context: int = 0):
        super().__init__()
        if vocab:
            self.token_embed = nn.Embedding(vocab, cfg.width)
            self.pos_embed = nn.Parameter(0.01 * torch.randn(context or cfg.context, cfg.width))
            nn.init.normal_(self.token_embed.weight, std=0.02)
        self.layers = nn.ModuleList(Layer(cfg.width, cfg.heads, cross) for _ in range(depth))
        self.norm = nn.LayerNorm(cfg.width)

    def embed(self, ids, first=0):
        return self.token_embed(ids) + self.pos_embed[first : first + ids.shape[1]]

    def forward(self, x, causal=False, mask=None, context=None, caches=None):
        for i, layer in enumerate(self.layers):
            x = layer(x, causal, mask, context, caches[i] if caches else None)
        return self.norm(x)

    def logits(self, x):
        return x @ self.token_embed.weight.T


class Vision(ViT):
    """The ViT of all families: (B, 3, S, S) -> (B, 1 + registers + N, W). Patches pass a few convolutions instead of one linear
    map (Xiao et al. 2021, arXiv 2106.14881), with which a small model needs far fewer pictures to learn shapes.

    hidden (B, N): patches whose pixels and token are taken away; keep (B, n): patches that stay (FLIP); layers: how many
    blocks, without the final norm; default: all of them."""

    def __init__(self, cfg, registers: int = 0, masks: bool = False):
        super().__init__(cfg.image_size, cfg.patch, cfg.width, cfg.depth, cfg.heads, registers=registers)
        stages = [(nn.Conv2d(a, b, 3, 2, 1), nn.GroupNorm(8, b), nn.GELU()) for a, b in itertools.pairwise([3, *stem(cfg)])]
        self.patch_embed = nn.Sequential(*itertools.chain(*stages), nn.Conv2d(cfg.width, cfg.width, 1))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, cfg.width)) if masks else None
        side = torch.arange(cfg.image_size // cfg.patch)  # places are heard from the first step on, as in MAE
        self.pos_embed.data[0, 1:] = sincos_2d(cfg.width, side, side)[0]
        if registers:
            nn.init.trunc_normal_(self.register_tokens, std=0.02)

    def forward(self, x, hidden=None, keep=None, layers=None):
        if hidden is not None:
            side = x.shape[-1] // self.patch
            x = x * ~hidden.view(-1, 1, side, side).repeat_interleave(self.patch, 2).repeat_interleave(self.patch, 3)
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = x if hidden is None else torch.where(hidden[..., None], self.mask_token.to(x.dtype), x)
        x = x + self.pos_embed[:, 1:]
        # FLIP: behind the convolutions, so that dropped patches leave a trace in their neighbours and save no work there
        x = x if keep is None else x.gather(1, keep[..., None].expand(-1, -1, x.shape[2]))
        first = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)
        extra = [self.register_tokens.expand(len(x), -1, -1)] if self.registers else []
        x = torch.cat([first, *extra, x], 1)
        for block in self.blocks[:layers]:
            x = block(x)
        return self.norm(x) if layers is None else x


def stem(cfg):
    """Channels of the convolutions before the first block: each halves the side, the last has the transformer's width."""
    return [max(16, cfg.width >> i) for i in reversed(range(cfg.patch.bit_length() - 1))]


def full(x):
    """At least float32, whatever the autocast."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def unit(x):
    return F.normalize(full(x), dim=-1)


def lengths(ids):
    """(B, L) bool: places up to the end token, which has the largest id of a text."""
    return torch.arange(ids.shape[1], device=ids.device)[None] <= ids.argmax(1)[:, None]


class Contrastive(nn.Module):
    """2.2: two towers. loss: infonce; siglip; or llip, SigLIP's loss on cosines for which a caption mixes the picture's class
    token and registers. heads, here and below: the ways in which the model scores a picture and a text."""

    def __init__(self, cfg, tok, loss: str):
        super().__init__()
        self.loss, D = loss, cfg.embed_dim
        self.vision = Vision(cfg, cfg.mixtures - 1 if loss == "llip" else 0)
        self.text = TextTransformer(len(tok), cfg.context, cfg.width, 2 * cfg.text_depth, cfg.heads, D, act="gelu")
        self.img_proj = nn.Linear(cfg.width, D, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07 if loss == "infonce" else 10)))
        self.bias = None if loss == "infonce" else nn.Parameter(torch.tensor(-10.0))
        if loss == "llip":
            self.query, self.key = nn.Linear(D, 64), nn.Linear(cfg.width, 64)
        self.heads = ("cosine",)  # elsewhere "contrastive", beside other heads

    def see(self, images, **options):
        return self.vision(images, **options)

    def cosines(self, seen, ids):
        """All pictures with all texts (N, M)."""
        return self.compare(seen, unit(self.text(ids)))

    def compare(self, seen, f_txt):
        if self.loss != "llip":
            return dots(unit(self.img_proj(seen[:, 0])), f_txt)
        tokens = seen[:, : 1 + self.vision.registers]
        return llip_scores(full(self.img_proj(tokens)), full(self.key(tokens)), f_txt, full(self.query(f_txt)))

    def forward(self, batch):
        seen, scale = self.see(batch["image"], keep=batch.get("keep")), self.log_scale.exp()
        f_txt = unit(self.text(batch["ids"]))
        if self.loss == "infonce":
            f_neg = unit(self.text(batch["negative"])) if "negative" in batch else None
            loss = infonce(unit(self.img_proj(seen[:, 0])), f_txt, scale, f_neg)
        else:
            cos = self.compare(seen, ddp.gather_rows(f_txt))
            loss = siglip_loss(scale * cos + self.bias, ddp.rank() * len(seen))
        return loss, {"scale": scale}


class Masked(nn.Module):
    """2.3, FLAVA-like: picture encoder, text encoder, fusion of both. Six losses, all with weight 1: MIM and MLM, masked image
    and language modelling (one side alone), MMM, masked multimodal modelling of patches and of words (both sides masked), ITM,
    image-text matching, GC, global contrastive (InfoNCE, nothing masked); and answers as hidden words."""

    def __init__(self, cfg, tok, boxes: bool = False):
        super().__init__()
        W, vocab = cfg.width, len(tok) + 1
        self.mask_id, self.share, self.heads = len(tok), cfg.mask_words, ("contrastive", "matching")
        self.vision, self.words = Vision(cfg, masks=True), Stack(cfg, cfg.text_depth, vocab)
        self.img_in, self.txt_in, self.cls = nn.Linear(W, W), nn.Linear(W, W), nn.Parameter(torch.zeros(1, 1, W))
        self.fusion = Stack(cfg, cfg.text_depth)
        self.mim, self.mmm_img = nn.Linear(W, cfg.codes), nn.Linear(W, cfg.codes)
        self.mlm, self.mmm_txt = nn.Linear(W, vocab), nn.Linear(W, vocab)
        self.itm = nn.Sequential(nn.Linear(W, W), nn.Tanh(), nn.Linear(W, 1))
        self.img_proj, self.txt_proj = (nn.Linear(W, cfg.embed_dim, bias=False) for _ in range(2))
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.box = nn.Linear(W, 4) if boxes else None
        self.register_buffer("codebook", torch.zeros(cfg.codes, 3 * cfg.patch**2))

    def see(self, images, **options):
        return self.vision(images, **options)

    def read(self, ids, valid):
        return self.words(self.words.embed(ids), mask=valid[:, None, None])

    def fuse(self, seen, words, valid):
        """-> (B, 1 + 1 + N + L, W): the fusion's own class token, the picture's tokens, the words."""
        x = torch.cat([self.cls.expand(len(seen), -1, -1), self.img_in(seen), self.txt_in(words)], 1)
        ones = valid.new_ones(len(seen), 1 + seen.shape[1])
        return self.fusion(x, mask=torch.cat([ones, valid], 1)[:, None, None])

    def cosines(self, seen, ids):
        words = self.read(ids, lengths(ids))  # attention goes both ways, so the start token stands for the text
        return dots(unit(self.img_proj(seen[:, 0])), unit(self.txt_proj(words[:, 0])))

    def pooled(self, seen, ids):
        """The fusion's class token (B, W)."""
        valid = lengths(ids)
        return self.fuse(seen, self.read(ids, valid), valid)[:, 0]

    def match(self, seen, ids):
        """Log-odds that the text belongs to the picture (B,)."""
        return self.itm(self.pooled(seen, ids)).float()[:, 0]

    def cloze(self, seen, ids, hidden):
        """Word logits at all places of ids whose hidden places (B, L) are replaced by the mask."""
        valid = lengths(ids)
        words = self.read(ids.masked_fill(hidden, self.mask_id), valid)
        return self.mmm_txt(self.fuse(seen, words, valid)[:, -ids.shape[1] :])

    def targets(self, images, hidden):
        """The nearest of the codebook's patches, -100 where nothing is hidden."""
        p = self.vision.patch
        patches = F.unfold(images, p, stride=p).transpose(1, 2)
        return torch.where(hidden, torch.cdist(patches, self.codebook.expand(len(images), -1, -1)).argmin(2), -100)

    def forward(self, batch):
        images, ids, hidden = batch["image"], batch["ids"], batch["hidden"]
        valid = lengths(ids)
        codes = self.targets(images, hidden)
        special = ~valid | (ids >= self.mask_id - 2)  # padding, start and end are never hidden
        masked, target = hide_words(ids, batch["u"][:, : ids.shape[1]], self.mask_id, special, self.share)
        seen_m, words_m = self.see(images, hidden=hidden), self.read(masked, valid)
        fused = self.fuse(seen_m, words_m, valid)  # MMM: what is hidden on one side may be seen on the other
        N = seen_m.shape[1] - 1
        parts = {"mim": masked_ce(self.mim(seen_m[:, 1:]), codes), "mlm": masked_ce(self.mlm(words_m), target),
                 "mmm_img": masked_ce(self.mmm_img(fused[:, 2 : 2 + N]), codes),
                 "mmm_txt": masked_ce(self.mmm_txt(fused[:, 2 + N :]), target)}  # fmt: skip
        seen, words = self.see(images), self.read(ids, valid)  # once more, with nothing hidden
        f_img, f_txt = unit(self.img_proj(seen[:, 0])), unit(self.txt_proj(words[:, 0]))
        parts["gc"] = infonce(f_img, f_txt, self.log_scale.exp())
        logits = self.match(seen, batch["maybe"])  # wrong captions are any other picture's; ALBEF would take similar ones
        parts["itm"] = F.binary_cross_entropy_with_logits(logits, batch["right"].float())
        if "qa" in batch:  # a question is a text whose last words, the answer, are hidden
            counted = batch["qa_counted"] & (batch["qa"] < self.mask_id - 2)
            logits = self.cloze(seen, batch["qa"], counted)
            parts["qa"] = masked_ce(logits, torch.where(counted, batch["qa"], -100))
        if self.box is not None:
            parts["box"] = box_loss(self.box(self.pooled(seen, batch["phrase"])).float().sigmoid(), batch["box"])
        return sum(parts.values()), parts


def box_loss(got, box):
    """X-VLM's kind of loss: L1 of (cx, cy, w, h) in [0, 1] plus 1 - generalised IoU, mean over the batch."""
    giou = torchvision.ops.generalized_box_iou_loss(corners(got), corners(box), reduction="mean")
    return F.l1_loss(got, box) * 4 + giou  # 4: summed over the coordinates


corners = partial(torchvision.ops.box_convert, in_fmt="cxcywh", out_fmt="xyxy")


class CoCa(nn.Module):
    """2.4: a text decoder in two halves. The lower one sees words only, and its class token, appended at the END, is the
    caption's embedding; the upper one also attends to the picture, and writes. L = InfoNCE + lam_cap (caption + answers)."""

    def __init__(self, cfg, tok):
        super().__init__()
        self.lam_cap, self.heads = cfg.lam_cap, ("contrastive", "likelihood", "likelihood - blind")
        self.vision = Vision(cfg)
        self.lower, self.upper = Stack(cfg, cfg.text_depth, len(tok)), Stack(cfg, cfg.text_depth, cross=True)
        self.cls = nn.Parameter(0.02 * torch.randn(1, 1, cfg.width))
        queries = 1 + (cfg.image_size // cfg.patch) ** 2  # attention pooling: one query to compare, the others to be read
        self.queries = nn.Parameter(0.02 * torch.randn(1, queries, cfg.width))
        self.pool = nn.MultiheadAttention(cfg.width, cfg.heads, batch_first=True)
        self.img_proj, self.txt_proj = (nn.Linear(cfg.width, cfg.embed_dim, bias=False) for _ in range(2))
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def see(self, images):
        tokens = self.vision(images)
        return self.pool(self.queries.expand(len(images), -1, -1), tokens, tokens, need_weights=False)[0]

    def caption_embedding(self, ids):
        """-> unit embeddings (B, D) and the lower half's words (B, L, W). The class token does not see padding."""
        B, L = ids.shape
        x = torch.cat([self.lower.embed(ids), self.cls.expand(B, -1, -1)], 1)
        mask = torch.ones(L + 1, L + 1, dtype=torch.bool, device=ids.device).tril()[None].repeat(B, 1, 1)
        mask[:, L, :L] = lengths(ids)  # causal words never see it: one pass gives embedding and prediction
        x = self.lower(x, mask=mask[:, None])
        return unit(self.txt_proj(x[:, L])), x[:, :L]

    def cosines(self, seen, ids):
        return dots(unit(self.img_proj(seen[:, 0])), self.caption_embedding(ids)[0])

    def logits(self, seen, ids, caches=None, first=0):
        """Next-word logits (B, L, vocab). caches: of both halves; first: number of words in them already."""
        low, up = caches or (None, None)  # keys and values of the words so far; those of the picture are cheap to make again
        x = self.lower(self.lower.embed(ids, first), causal=True, caches=low)
        return self.lower.logits(self.upper(x, causal=True, context=seen[:, 1:], caches=up))

    def caches(self):
        return [[{} for _ in half.layers] for half in (self.lower, self.upper)]

    def forward(self, batch):
        seen, ids = self.see(batch["image"]), batch["ids"]
        f_txt, words = self.caption_embedding(ids)
        logits = self.lower.logits(self.upper(words, causal=True, context=seen[:, 1:]))
        parts = {"contrastive": infonce(unit(self.img_proj(seen[:, 0])), f_txt, self.log_scale.exp()),
                 "caption": caption_loss(logits, ids, lengths(ids))}  # fmt: skip
        if "qa" in batch:
            logits = self.logits(seen, batch["qa"])
            parts["qa"] = caption_loss(logits, batch["qa"], batch["qa_counted"])
        return parts["contrastive"] + self.lam_cap * (parts["caption"] + parts.get("qa", 0.0)), parts


class LM(nn.Module):
    """A causal language model of captions, questions and answers, packed one after the other. It never sees a picture."""

    def __init__(self, cfg, tok):
        super().__init__()
        self.stack = Stack(cfg, cfg.lm_depth, len(tok), context=2 * cfg.context)

    def forward(self, batch):
        ids = batch["packed"]
        logits = self.stack.logits(self.stack(self.stack.embed(ids), causal=True))
        return caption_loss(logits, ids, torch.ones_like(ids, dtype=torch.bool)), {}


class Frozen(nn.Module):
    """2.5: patches of a frozen encoder, through a projector, stand as words before the text of a frozen language model.
    L = - mean log p_LM(text | projector(picture), prompt), captions after an instruction and answers after questions: gradients
    flow THROUGH the frozen weights to the projector.

    Words keep the positions of their training, pictures have none, since the encoder's tokens carry their own. trained: what
    learns beside the projector: "", "lora", or "all" of the language model, as in LLaVA's second stage."""

    def __init__(self, cfg, vision, stack: Stack, trained: str = ""):
        super().__init__()
        self.vision, self.stack = vision.requires_grad_(False).eval(), stack.requires_grad_(trained == "all")
        self.heads = ("likelihood", "likelihood - blind")
        self.projector = nn.Sequential(nn.Linear(vision.width, cfg.width), nn.GELU(), nn.Linear(cfg.width, cfg.width))
        if trained == "lora":
            for layer in self.stack.layers:
                layer.attn.qkv, layer.attn.proj = LoRA(layer.attn.qkv, cfg.lora), LoRA(layer.attn.proj, cfg.lora)

    @torch.no_grad()
    def features(self, images):
        """LLaVA's choice: patch tokens of the penultimate layer, since the last one only serves the class token."""
        return self.vision(images, layers=-1)[:, 1:]

    def see(self, images):
        return self.projector(self.features(images))

    def logits(self, seen, ids, caches=None, first=0, before=None):
        """Next-word logits (B, L, vocab). before: (x (1, P, W), words in it), solved examples in front of the picture."""
        shift = before[1] if before else 0  # positions count words alone, those of the examples too
        x = self.stack.embed(ids, first + shift)
        if not first:  # the picture goes in once; later calls find it among the kept keys and values
            start = [before[0].expand(len(ids), -1, -1)] if before else []
            x = torch.cat([*start, seen, x], 1)
        return self.stack.logits(self.stack(x, causal=True, caches=caches)[:, -ids.shape[1] :])

    def examples(self, seen, rows):
        """Solved examples for `before`: pictures (k, N, W) and one list of ids each -> (x, number of words)."""
        parts, words = [], 0
        for s, ids in zip(seen, rows):
            ids = torch.tensor([ids], device=seen.device)
            parts += [s[None], self.stack.embed(ids, words)]
            words += ids.shape[1]
        return torch.cat(parts, 1), words

    def caches(self):
        return [{} for _ in self.stack.layers]

    def forward(self, batch):
        # the encoder is frozen and pictures are not augmented, so that train() may have looked at each of them once
        seen, loss = self.projector(batch["features"] if "features" in batch else self.features(batch["image"])), 0.0
        for ids, counted in ((batch["told"], batch["told_counted"]), (batch.get("qa"), batch.get("qa_counted"))):
            if ids is not None:
                loss = loss + caption_loss(self.logits(seen, ids), ids, counted)
        return loss, {}


class LoRA(nn.Module):
    """y = W0 x + b + (alpha / r) B A x, alpha = 2 r: A Kaiming-uniform, B = 0, W0 frozen; at first the same model."""

    def __init__(self, linear: nn.Linear, rank: int):
        super().__init__()
        self.linear, self.scale = linear.requires_grad_(False), 2.0
        self.A = nn.Parameter(torch.empty(rank, linear.in_features))
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, x):
        return self.linear(x) + self.scale * x @ self.A.T @ self.B.T


@torch.no_grad()
def generate(model, seen, prompts, end, longest=24):
    """Greedy continuation of prompts (B, P) of equal length with cached keys and values -> lists of ids without the end."""
    caches, ids, out = model.caches(), prompts, []  # the prompt first, then one word at a time
    for first in [0, *range(prompts.shape[1], prompts.shape[1] + longest - 1)]:
        ids = model.logits(seen, ids, caches, first)[:, -1].argmax(1, keepdim=True)
        out.append(ids)
        if (torch.cat(out, 1) == end).any(1).all():
            break
    return [row[: row.index(end)] if end in row else row for row in torch.cat(out, 1).tolist()]


# 4. DATA: pictures with captions, questions, wrong captions; everything random is a function of (seed, position) -------------
TELL = ("describe the picture:", "what do you see?", "caption:")  # instructions of the frozen family


@dataclass
class Pairs:
    """pictures: {image (N, 3, S, S) uint8, row (N,)}, or a source of them; for each row captions, names of the objects that are
    known to be there, and the generated scene, if it is one. noisy: rows whose captions belong to another picture."""

    pictures: object
    captions: list[list[str]]
    objects: list[list[str]]
    scenes: list[scenes.Scene]
    classes: list[str]
    keys: list[str]
    noisy: np.ndarray
    kinds: tuple[str, ...] = ()  # of questions about generated scenes

    def question(self, row, rng):
        """-> (question, answer, kind), or None. Generated scenes: all kinds; pictures with boxes: is there such an object?"""
        if self.scenes:
            return scenes.ask(self.scenes[row], rng, self.kinds)
        here, yes = set(self.objects[row]), rng.random() < 0.5
        pool = sorted(here if yes else set(self.classes) - here) if here else []
        return (existence(pool[rng.integers(len(pool))]), "yes" if yes else "no", "object") if pool else None

    def negative(self, row, caption, rng):
        """A caption that is wrong for the picture: exact for generated scenes, two words exchanged in others. Worded like a
        true caption, so that its style does not give it away (29 % are plain, of true captions 20 %: a wording that leaves
        the difference out is replaced by the plain one)."""
        if self.scenes:
            wrong = [n["scene"] for n in counterparts(self.scenes[row], int(rng.integers(1 << 30)))]
            other, variant = wrong[rng.integers(len(wrong))], int(rng.integers(1, 1 << 20)) if rng.integers(5) else 0
            text = scenes.caption(other, variant, brief=True)
            named = text != scenes.caption(self.scenes[row], variant, brief=True)  # some wordings leave the difference out
            return text if named else scenes.caption(other, brief=True)
        words = caption.split()
        places = [i for i, w in enumerate(words) if len(w) > 3]
        pairs = [(i, j) for i in places for j in places if i < j and words[i] != words[j]]
        if pairs:
            i, j = pairs[rng.integers(len(pairs))]
            words[i], words[j] = words[j], words[i]
        return " ".join(words) if pairs else "nothing"

    def wrong(self, row, rng):
        """Another picture's caption that is none of this one's; a short one may happen to be true of it, too."""
        for _ in range(20):
            other = self.captions[rng.integers(len(self.captions))] or self.captions[row]
            text = other[rng.integers(len(other))]
            if text not in self.captions[row]:
                return text
        return "nothing"


def existence(name):
    return scenes.articles(f"Is there a {name}?")


def counterparts(s, seed):
    """scenes.negatives without changes of size, which captions here do not name, and, while others are left, without pairs of
    colour and shape that training never shows, which would give them away: {kind, caption, scene}."""
    made = [{**n, "caption": scenes.caption(n["scene"], brief=True)} for n in scenes.negatives(s, seed)]
    made = [n for n in made if n["caption"] != scenes.caption(s, brief=True)]
    return [n for n in made if not any(scenes.held_out(t.shape, t.colour) for t in n["scene"].things)] or made


def generated(count, seed, cfg, part="test", **options) -> Pairs:
    """part: train or test, whose pictures have no object (shape, colour and size) in common; captions do not name the size."""
    options = {"objects": (1, cfg.objects), "pairs": "seen", "grid": 2, "region": "any", "part": part, **options}
    world = scenes.Source(count, seed, cfg.image_size, brief=True, **options)
    pictures = {"image": torch.from_numpy(world.images).permute(0, 3, 1, 2), "row": torch.arange(count)}
    names = [[t.shape for t in s.things] for s in world.scenes]
    keys, clean = [str(i) for i in range(count)], np.zeros(count, bool)
    return Pairs(pictures, world.texts, names, world.scenes, list(scenes.SHAPES), keys, clean, tuple(cfg.kinds.split(",")))


def prepared(split, cfg, env) -> Pairs:
    """Shards with captions; boxes tell which objects are there."""
    folder = cfg.eval_data if split == "test" and cfg.eval_data else cfg.data
    source = data.Shards(folder, data.held_out(folder, ("test", "val")) if split == "test" else split)
    found = data.records(source)
    captions = [[c for c in r.get("captions") or [] if html.unescape(c).strip()] for r in found]  # "&nbsp;" says nothing
    rows = [i for i, some in enumerate(captions) if some]
    if not rows:
        raise ValueError(f"{folder}: no picture of the split {split} has a caption; see data_prep/captions.py")
    rows = rows if split == "train" else rows[: cfg.eval_images]
    gb = cfg.memory_gb if split == "train" else math.inf  # test pictures are few
    pictures = data.load(source, rows, cfg.image_size, env, gb, cfg.workers, cfg.max_bad)
    try:
        objects = [sorted({str(b["label"]) for b in r.get("boxes") or []}) for r in found]
    except (TypeError, KeyError) as error:
        raise ValueError(f"{folder}: its boxes are not in the form {{label, box}}; see data_prep/coco.py") from error
    classes = sorted({name for names in objects for name in names})
    names = [r.get("source") or r["key"] for r in found]  # the file's own name, which benchmarks know
    return Pairs(pictures, captions, objects, [], classes, names, np.zeros(len(found), bool))


@lru_cache(maxsize=1)  # the arms of a run share it
def open_world(cfg, env) -> tuple[Pairs, Pairs, Tokenizer]:
    if cfg.data:
        train, test = prepared("train", cfg, env), prepared("test", cfg, env)
    else:
        train, test = generated(cfg.pairs, cfg.seed, cfg, "train"), generated(cfg.eval_images, 1_000_003, cfg)
    rng = np.random.default_rng((cfg.seed, 31))  # --noise: so many captions belong to other pictures
    train.noisy = (rng.random(len(train.captions)) < cfg.noise) & [len(c) > 0 for c in train.captions]
    rows = np.flatnonzero(train.noisy)
    moved = {r: train.captions[other] for r, other in zip(rows, np.roll(rows, 1))}
    train.captions = [moved.get(i, c) for i, c in enumerate(train.captions)]
    return train, test, make_tokenizer(train, cfg)


def world_of(cfg, env):
    """open_world() by the settings that it depends on, so that it is made once for all arms."""
    return open_world(replace(cfg, out_dir="", arms="", steps=0, **{k: getattr(Config, k) for k in OPTIONS_OF}), env)


def rows_of(tok, prompts, answers, context):
    """Start, prompt (prompts may be None), answer, end -> ids (B, L) and counted (B, L): True for the answer and the end. Long
    answers are cut."""
    rows, flags = [], []
    for prompt, answer in zip(prompts or [""] * len(answers), answers):
        p = tok.encode(prompt)[: context - 3]
        a = tok.encode(answer)[: context - 2 - len(p)]
        if not a:
            raise ValueError(f"the answer {answer!r} has no token: nothing would be learned from {prompt!r}")
        rows.append([tok.start, *p, *a, tok.end])
        flags.append([False] * (1 + len(p)) + [True] * (len(a) + 1))
    longest = min(context, -(-max(map(len, rows)) // 4) * 4)  # few different shapes
    pad = [longest - len(r) for r in rows]
    ids = torch.tensor([r + [0] * n for r, n in zip(rows, pad)])
    return ids, torch.tensor([f + [False] * n for f, n in zip(flags, pad)])


def normalised(images):  # twin: normalised
    """uint8 (B, 3, S, S) -> CLIP's input."""
    mean, std = (torch.tensor(v, device=images.device).view(1, 3, 1, 1) for v in metrics.MEAN_STD["clip"])
    return (images.float() / 255 - mean) / std


def make_batch(pairs: Pairs, part, arm, tok, cfg, micro, first, device):
    """What one arm needs for pictures {image, row}; `first` is the number of the first of them in the global batch, so that the
    draws do not depend on the number of processes."""
    rows = part["row"].tolist()
    family = ARMS[arm][0]
    # one generator a picture of the global batch; each arm draws what it needs, in this order
    rngs = [np.random.default_rng((cfg.seed, 21, micro, first + i)) for i in range(len(rows))]
    if family == "lm":  # words are quickly learned: few texts do
        texts = [packed(pairs, tok, g, 2 * cfg.context) for i, g in enumerate(rngs, first) if i % 4 == 0]
        return {"packed": torch.tensor(texts, dtype=torch.long, device=device).view(-1, 2 * cfg.context)}  # may be none
    captions = [pairs.captions[r][g.integers(len(pairs.captions[r]))] for r, g in zip(rows, rngs)]
    out = {"image": normalised(part["image"].to(device))} if "image" in part else {"features": part["features"]}
    if family != "frozen":
        out["ids"] = rows_of(tok, None, captions, cfg.context)[0]
    if family in ("mask", "coca", "frozen") and pairs.classes and cfg.asked:
        asked = [pairs.question(r, g) or ("", "no", "") for r, g in zip(rows, rngs)]
        out["qa"], out["qa_counted"] = rows_of(tok, [q for q, _, _ in asked], [a for _, a, _ in asked], cfg.context)
        out["qa_counted"] &= torch.tensor([[bool(q)] for q, _, _ in asked])  # a picture of which nothing is known
    if family == "frozen":
        tell = [TELL[g.integers(len(TELL))] for g in rngs]
        out["told"], out["told_counted"] = rows_of(tok, tell, captions, cfg.context)
    if arm == "negclip":
        wrong = [pairs.negative(r, c, g) for r, c, g in zip(rows, captions, rngs)]
        out["negative"] = rows_of(tok, None, wrong, cfg.context)[0]
    patches = (cfg.image_size // cfg.patch) ** 2
    if arm == "flip":
        keep = max(1, round(patches * (1 - cfg.drop_tokens)))
        out["keep"] = torch.from_numpy(np.stack([np.sort(g.permutation(patches)[:keep]) for g in rngs]))
    if family == "mask":
        count = round(cfg.mask_patches * patches)
        out["hidden"] = torch.from_numpy(np.stack([hide_patches(cfg.image_size // cfg.patch, count, g) for g in rngs]))
        out["u"] = torch.from_numpy(np.stack([g.random((cfg.context, 2)) for g in rngs]))
        out["right"] = torch.tensor([g.random() >= cfg.wrong for g in rngs])
        maybe = [c if ok else pairs.wrong(r, g) for c, ok, r, g in zip(captions, out["right"], rows, rngs)]
        out["maybe"] = rows_of(tok, None, maybe, cfg.context)[0]
    if arm == "mask+boxes":
        chosen = [int(g.integers(len(pairs.scenes[r].things))) for r, g in zip(rows, rngs)]
        out["box"] = torch.stack([box_of(pairs.scenes[r], i, cfg.image_size) for r, i in zip(rows, chosen)])
        names = [scenes.name(pairs.scenes[r].things[i], False, False) for r, i in zip(rows, chosen)]
        out["phrase"] = rows_of(tok, None, names, cfg.context)[0]
    return {k: v.to(device) for k, v in out.items()}


def packed(pairs, tok, rng, length):
    """Captions under an instruction, questions with answers: whole texts one after the other, the last one cut."""
    out = []
    while len(out) < length:
        row = int(rng.integers(len(pairs.captions)))
        asked = pairs.question(row, rng) if rng.random() < 0.5 else None
        captions = pairs.captions[row] or ["nothing"]
        prompt, text = asked[:2] if asked else (TELL[rng.integers(len(TELL))], captions[rng.integers(len(captions))])
        out += [tok.start, *tok.encode(prompt), *tok.encode(text), tok.end]
    return out[:length]


def box_of(s, i, size):
    """Box of the i-th object as (cx, cy, w, h), shares of the picture."""
    objects = [n["box"] for n in scenes.tree(s, size) if n["parent"] == 0]
    return torchvision.ops.box_convert(torch.tensor(objects[i]) / size, "xyxy", "cxcywh")


def codebook(pairs, cfg, iters=10):
    """k-means centres (codes, 3 p p) of the training pictures' patches: the discrete codes of MIM, without a tokenizer. Of the
    first 1,000 pictures, at most 20,000 patches, or ten for each centre."""
    parts = [pairs.pictures] if isinstance(pairs.pictures, dict) else data.parts_of(pairs.pictures, cfg.image_size)
    images = torch.cat([p["image"] for p in itertools.islice(parts, 4)])[:1000]  # a part of a source has 256
    x = F.unfold(normalised(images), cfg.patch, stride=cfg.patch).transpose(1, 2).flatten(0, 1)
    if len(x) < cfg.codes:
        raise ValueError(f"--codes {cfg.codes} is more than the {len(x)} patches of the training pictures")
    rng = np.random.default_rng((cfg.seed, 41))
    x = x[rng.permutation(len(x))[: max(20_000, 10 * cfg.codes)]]
    centres = x[: cfg.codes].clone()
    for _ in range(iters):
        own = torch.cdist(x, centres).argmin(1)
        sums = torch.zeros_like(centres).index_add_(0, own, x)
        count = own.bincount(minlength=len(centres))[:, None]
        centres = torch.where(count > 0, sums / count.clamp(min=1), centres)
    return centres


# 5. EVALUATE: benchmarks as pure functions, then all of them for one model -------------------------------------------------
def prefers(right, wrong):
    """ARO, SugarCrepe: share of pictures that score the true caption above the wrong one, and share of ties. Strict, so that a
    model that gives everything the same score gets 0, not 100."""
    return (right > wrong).float().mean().item(), (right == wrong).float().mean().item()


def winoground(scores):
    """scores (N, 2, 2), [n, caption, picture] -> shares: text (both pictures prefer their caption), image (both captions prefer
    their picture), group (both). Chance 1/4, 1/4, 1/6."""
    text = (scores[:, 0, 0] > scores[:, 1, 0]) & (scores[:, 1, 1] > scores[:, 0, 1])
    image = (scores[:, 0, 0] > scores[:, 0, 1]) & (scores[:, 1, 1] > scores[:, 1, 0])
    return tuple(x.float().mean().item() for x in (text, image, text & image))


def plain_answer(text):
    """Lower case, no articles and punctuation, number words as digits."""
    words = re.sub(r"[^\w\s]", " ", text.lower()).split()
    digits = {w: str(i) for i, w in enumerate("zero one two three four five six seven eight nine ten".split())} | {"none": "0"}
    return " ".join(digits.get(w, w) for w in words if w not in ("a", "an", "the"))


def vqa_accuracy(given, answers):
    """One answer: exact match. Several people's: leave each out, min(1, matches among the others / 3), mean (VQA's official
    score: 0, .3, .6, .9, 1 for 0, 1, 2, 3, 4 of ten; often misquoted as min(1, n / 3))."""
    same = [plain_answer(given) == plain_answer(a) for a in answers]
    if len(same) == 1:
        return float(same[0])
    return float(np.mean([min(1.0, (sum(same) - s) / 3) for s in same]))


def yes_or_no(text):
    """Free text -> "yes", "no" or "" (neither, or unclear): the first of its three first words that is one of the two."""
    words = re.findall(r"[a-z]+", text.lower())
    return "" if words[:1] in (["not"], ["nothing"]) else next((w for w in words[:3] if w in ("yes", "no")), "")


def pope_score(said, truth):
    """said, truth: lists of bool -> accuracy, precision, recall, F1 (yes is positive) and the share of yes."""
    said, truth = np.array(said, bool), np.array(truth, bool)
    hits = (said & truth).sum()
    precision, recall = hits / max(1, said.sum()), hits / max(1, truth.sum())
    f1 = 2 * precision * recall / max(1e-9, precision + recall)
    out = {"accuracy": (said == truth).mean(), "precision": precision, "recall": recall, "F1": f1, "yes": said.mean()}
    return {k: float(v) for k, v in out.items()}


def pope_questions(objects, classes, setting, rng):
    """objects: names in each picture -> [(picture, name, is it there)], as many that are not there as are, at most 3 each.
    Absent ones: random, popular (the most frequent in all pictures), adversarial (most often together with the present one)."""
    often, together = Counter(n for names in objects for n in set(names)), Counter()
    for names in objects:
        together.update((a, b) for a in set(names) for b in set(names) if a != b)
    out = []
    for i, names in enumerate(objects):
        there, absent = sorted(set(names)), sorted(set(classes) - set(names))
        for name in (there[j] for j in rng.permutation(len(there))[:3]):
            if not absent:
                break
            order = [absent[j] for j in rng.permutation(len(absent))]  # ties in random order
            weight = {"random": [0 for _ in order], "popular": [often[a] for a in order],
                      "adversarial": [together[name, a] for a in order]}[setting]  # fmt: skip
            foil = order[int(np.argmax(weight))]
            absent.remove(foil)
            out += [(i, name, True), (i, foil, False)]
    return out


def selective(confidence, right, risk=0.05):
    """-> (coverage: largest share of questions that can be answered, surest first, with at most `risk` of them wrong;
    effective reliability at that threshold: mean of +1 right, -1 wrong, 0 not answered)."""
    order = np.argsort(-np.asarray(confidence), kind="stable")
    sure, right = np.asarray(confidence)[order], np.asarray(right, float)[order]
    error = np.cumsum(1 - right) / np.arange(1, len(right) + 1)
    fine = (error <= risk) & np.append(sure[1:] < sure[:-1], True)  # no threshold parts answers that are equally sure
    count = int(np.flatnonzero(fine)[-1]) + 1 if fine.any() else 0
    return count / len(right), float((2 * right[:count] - 1).sum() / len(right))


def ngrams(words, n):
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def cider_d(given, references):
    """CIDEr-D, mean over pictures, 10 for a caption that equals its only reference. n-grams of every picture weigh nothing:
    sets of one picture score 0, and templates score low however right they are."""
    refs = [[[ngrams(r.split(), n) for n in range(1, 5)] for r in some] for some in references]
    seen = Counter(g for some in refs for g in {g for r in some for grams in r for g in grams})
    size = math.log(max(1, len(references)))

    def vector(grams):
        return {g: c * (size - math.log(max(1, seen[g]))) for g, c in grams.items()}

    total = 0.0
    for text, some in zip(given, refs):
        mine = [vector(ngrams(text.split(), n)) for n in range(1, 5)]
        for ref in some:
            theirs = [vector(grams) for grams in ref]
            away = len(text.split()) - sum(ref[0].values())
            for a, b in zip(mine, theirs):
                dot = sum(min(v, b[g]) * b[g] for g, v in a.items() if g in b)
                norm = math.sqrt(sum(v * v for v in a.values()) * sum(v * v for v in b.values()))
                total += 10 / 4 * dot / max(norm, 1e-12) * math.exp(-(away**2) / 72) / len(some)
    return total / max(1, len(given))


WORDS = {other: word for word, others in scenes.SYNONYMS.items() for other in others}  # "scarlet" -> "red"


def facts(text):
    """What a generated caption claims: (colour, shape), (texture, shape), (shape, "at", place) and (shape, relation, shape)."""
    words = [WORDS.get(w, w) for w in text.lower().split()]
    out, shapes, held = set(), [], []
    for before, w in zip(["", *words], words):
        held += [w] if w in scenes.COLOURS or w in scenes.TEXTURES else []
        if w in scenes.SHAPES:
            out |= {(h, w) for h in held if h != "solid"}
            shapes, held = [*shapes, w], []
        elif shapes and f"{before} {w}" in scenes.PLACES[2]:
            out.add((shapes[-1], "at", f"{before} {w}"))
    if len(shapes) == 2:
        between = f" {' '.join(words[words.index(shapes[0]) : words.index(shapes[1])])} "
        out |= {(shapes[0], rel, shapes[1]) for rel in ("left of", "right of", "above", "below") if f" {rel} " in between}
    return out


def true_facts(s):
    """All facts of a scene, relations in both directions."""
    out = {(t.colour, t.shape) for t in s.things} | {(t.texture, t.shape) for t in s.things if t.texture != "solid"}
    out |= {(t.shape, "at", scenes.PLACES[s.grid][t.cell]) for t in s.things}
    related = [(a, b, scenes.relation(a, b, s.grid)) for a in s.things for b in s.things if a != b]
    return out | {(a.shape, rel.removeprefix("to the "), b.shape) for a, b, rel in related}


def attribute_f1(given, world):
    """Precision over what captions claim; recall over colours and textures of the scene -> F1 in [0, 1]."""
    claims = [(facts(text), true_facts(s)) for text, s in zip(given, world)]
    precision = sum(len(a & b) for a, b in claims) / max(1, sum(len(a) for a, _ in claims))
    named = [(a, {f for f in b if len(f) == 2}) for a, b in claims]
    recall = sum(len(a & b) for a, b in named) / max(1, sum(len(b) for _, b in named))
    return 2 * precision * recall / max(1e-9, precision + recall)


# of COCO's classes a few; CHAIR's own list has hundreds
COCO_WORDS = {**dict.fromkeys("man men woman women boy girl child children people lady guy kid".split(), "person"),
              "bike": "bicycle", "motorbike": "motorcycle", "plane": "airplane", "sofa": "couch", "television": "tv",
              "table": "dining table", "cellphone": "cell phone", "kitten": "cat", "puppy": "dog"}  # fmt: skip


def mentioned(text, classes) -> list[str]:
    """Classes that a text names, each as often as it does, the longest names first: a hot dog is no dog."""
    words = WORDS if set(classes) <= set(scenes.SHAPES) else COCO_WORDS  # elsewhere, a "traffic light" is not pale
    text = " ".join(words.get(w, w) for w in re.findall(r"\w+", text.lower()))
    text = text.replace("dining dining", "dining")
    return re.findall(rf"\b({'|'.join(map(re.escape, sorted(classes, key=len, reverse=True)))})s?\b", text)


def chair(given, objects, classes, references):
    """CHAIR_i: share of mentions that are of objects which are not there, that is, neither annotated (objects) nor in one of
    the picture's own captions (references); CHAIR_s: share of captions with one. A silent model scores 0: look at the length,
    too."""
    there = [{*here, *(m for r in own for m in mentioned(r, classes))} for here, own in zip(objects, references)]
    mentions = [mentioned(text, classes) for text in given]
    wrong = [sum(m not in here for m in some) for some, here in zip(mentions, there)]
    return sum(wrong) / max(1, sum(map(len, mentions))), float(np.mean([w > 0 for w in wrong]))


class Scorer:
    """How well pictures and texts fit, for every head of every family, and what a model writes; all benchmarks go through it.
    The head "likelihood - blind" subtracts the text's score before a grey picture, which stands for no picture."""

    def __init__(self, model, tok, cfg, device):
        self.model, self.tok, self.cfg, self.device = model, tok, cfg, device
        self.prompt = TELL[0] if isinstance(model, Frozen) else ""
        S = cfg.image_size
        self.blank = model.see(torch.zeros(1, 3, S, S, device=device))  # mean grey: what the blind reader sees

    def see(self, images):
        return torch.cat([self.model.see(normalised(i.to(self.device))) for i in images.split(256)])

    def ids(self, texts, prompts=None):
        ids, counted = rows_of(self.tok, prompts or [self.prompt] * len(texts), texts, self.cfg.context)
        return ids.to(self.device), counted.to(self.device)

    def blocks(self, score, seen, *rows, size=512):
        """score(pictures, *rows) in blocks -> (n,); seen (n or 1, N, W)."""
        every = (seen.expand(len(rows[0]), -1, -1), *rows)
        return torch.cat([score(*part) for part in zip(*(x.split(size) for x in every))])

    def likelihood(self, seen, ids, counted, **options):
        """Mean log p of the counted words (n,)."""
        return self.blocks(lambda s, x, c: log_p(self.model.logits(s, x, **options), x, c), seen, ids, counted)

    def pairs(self, seen, texts, every=False) -> dict[str, torch.Tensor]:
        """Picture n with text n -> (n,), or every picture with every text -> (N, M), by each head of the model."""
        (ids, counted), out, model = self.ids(texts), {}, self.model
        slow = {"likelihood": lambda s: self.likelihood(s, ids, counted),
                "matching": lambda s: self.blocks(model.match, s, ids)}  # fmt: skip
        for head in model.heads:
            if head == "likelihood - blind":
                out[head] = out["likelihood"] - self.likelihood(self.blank, ids, counted)
            elif head in slow:
                out[head] = torch.stack([slow[head](s[None]) for s in seen]) if every else slow[head](seen)
            elif every:
                out[head] = torch.cat([model.cosines(seen, t) for t in ids.split(512)], 1)
            else:
                out[head] = self.blocks(lambda s, x: model.cosines(s, x).diagonal(), seen, ids, size=64)
        return {head: v.float().cpu() for head, v in out.items()}

    def answers(self, seen, questions, candidates, **options):
        """The likeliest of each question's candidates -> (indices, -1 for a tie; their probabilities among the candidates)."""
        own = [i for i, some in enumerate(candidates) for _ in some]  # all candidates of all questions, one after the other
        ids, counted = self.ids([c for some in candidates for c in some], [questions[i] for i in own])
        seen = seen.expand(len(questions), -1, -1)[own]

        def hidden_words(s, x, c):
            return (self.model.cloze(s, x, c).float().log_softmax(2).gather(2, x[..., None])[..., 0] * c).sum(1)

        if isinstance(self.model, Masked):
            # a masked model fills the answer's places, all at once; end token and padding are no words
            total = self.blocks(hidden_words, seen, ids, counted & (ids < self.model.mask_id - 2))
        else:
            total = self.likelihood(seen, ids, counted, **options) * counted.sum(1)  # log p of the whole answer, not its mean
        best = [g.softmax(0).topk(2) for g in total.split([len(c) for c in candidates])]
        return [int(i[0]) if v[0] > v[1] else -1 for v, i in best], [float(v[0]) for v, _ in best]

    def write(self, seen, prompts):
        """Greedy texts: prompts of equal length are continued together."""
        rows = [[self.tok.start, *self.tok.encode(p)[: self.cfg.context - 8]] for p in prompts]
        out = [""] * len(rows)
        for size in sorted({len(r) for r in rows}):
            same = [i for i, r in enumerate(rows) if len(r) == size]
            for some in (same[i : i + 256] for i in range(0, len(same), 256)):  # keys and values are kept for all of a block
                ids = torch.tensor([rows[i] for i in some], device=self.device)
                texts = generate(self.model, seen[some], ids, self.tok.end, self.cfg.context - size)
                for i, text in zip(some, texts):
                    out[i] = self.tok.decode(text)
        return out


@torch.no_grad()
def evaluate(model, tok, test: Pairs, cfg, env) -> dict:
    """Flat dict, percentages for the most part; what a family cannot do is not there. Every process does the whole. Asked to
    stop, it leaves between two tests: the last checkpoint is there, and the next start goes on here."""
    model.eval()
    score = Scorer(model, tok, cfg, env.device)
    rows, seen, out = test.pictures["row"].tolist(), score.see(test.pictures["image"]), {}
    world, writes = [test.scenes[r] for r in rows] if test.scenes else [], hasattr(model, "caches")
    stages = {"retrieval": lambda: retrieval(score, test, rows, seen)}
    if world:
        stages |= {"zero-shot": lambda: zero_shot(score, cfg), "wrong captions": lambda: compositional(score, cfg)}
    if cfg.sugarcrepe:
        stages["SugarCrepe"] = lambda: sugarcrepe(score, seen, [test.keys[r] for r in rows], cfg)
    if not isinstance(model, Contrastive) and test.classes:
        stages["questions"] = lambda: questions(score, test, rows, seen, cfg)
    if writes:
        stages["captions"] = lambda: captions(score, seen, test, rows)
    if isinstance(model, Masked) and model.box is not None:
        stages["boxes"] = lambda: {"box IoU > 0.5": grounding(score, world, seen, cfg)}
    bar = tqdm(stages, f"{cfg.arms} tests", unit="test", leave=False, disable=not env.is_main)
    for name in bar:
        bar.set_postfix_str(name)
        if ddp.interrupted():
            raise KeyboardInterrupt
        out |= stages[name]()
    return out


def retrieval(score, test, rows, seen) -> dict:
    """Captions that several pictures share count for each; generated pictures have one full caption, others all of theirs."""
    records = [{"captions": [scenes.caption(test.scenes[r], brief=True)] if test.scenes else test.captions[r]} for r in rows]
    (texts, match), out = metrics.caption_matches(records), {}
    for head, scores in score.pairs(seen, texts, every=True).items():
        out[f"{head}: text to image R@1"] = recall_at_1(scores.T, match)
        out[f"{head}: image to text R@1"] = recall_at_1(scores, match.T)
    return out


def recall_at_1(scores, match):
    """Share of queries whose best right item beats every wrong one, in percent: ties never help."""
    best = scores.masked_fill(~match, -torch.inf).amax(1)
    return 100 * (best > scores.masked_fill(match, -torch.inf).amax(1)).float().mean().item()


def zero_shot(score, cfg) -> dict:
    """Colour and shape of a single object among 72 classes, two templates averaged; pairs that were trained on, and pairs that
    were not. Contrastive heads average cosines, generative ones the mean log-probability of a word."""
    names, out = [f"{c} {s}" for c in scenes.COLOURS for s in scenes.SHAPES], {}
    for pairs, name in (("seen", "zero-shot"), ("held_out", "zero-shot, unseen pairs")):
        single = generated(min(64, cfg.eval_images), 2_000_003, cfg, objects=(1, 1), pairs=pairs)
        seen = score.see(single.pictures["image"])
        label = torch.tensor([names.index(f"{s.things[0].colour} {s.things[0].shape}") for s in single.scenes])
        both = [score.pairs(seen, [scenes.articles(f.format(n)) for n in names], True) for f in ("a {}", "there is a {}")]
        own = F.one_hot(label, len(names)).bool()
        out |= {f"{head}: {name}": recall_at_1(both[0][head] + both[1][head], own) for head in both[0]}
    return out


def against(score, seen, true, wrong, name) -> tuple[dict, dict, dict]:
    """True captions against wrong ones -> by head: share of right ones, of ties, of right ones before a grey picture; and both
    scores."""
    a, b = (score.pairs(seen, texts) for texts in (true, wrong))
    grey = [score.pairs(score.blank.expand(len(true), -1, -1), texts) for texts in (true, wrong)]
    out = {}
    for head in a:
        right, ties = prefers(a[head], b[head])
        out |= {f"{head}: {name}": 100 * right, f"{head}: {name}, ties": 100 * ties}
        if head != "likelihood - blind":
            out[f"{head}: blind {name}"] = 100 * prefers(grey[0][head], grey[1][head])[0]
    return out, a, b


def compositional(score, cfg) -> dict:
    """ARO's and SugarCrepe's form by kind, one wrong caption a picture, and the same before a grey picture; Winoground's form
    from exchanged words, where the wrong caption has its own picture. "add" starts from one object fewer than the largest
    training scene has, so that the longer caption has a familiar length."""
    out = {}
    for kind, objects in (("replace", 2), ("swap", 2), ("add", max(1, cfg.objects - 1))):
        world = generated(cfg.eval_images, 3_000_017, cfg, objects=(objects, objects))
        made = [[n for n in counterparts(s, i) if n["kind"].startswith(kind)] for i, s in enumerate(world.scenes)]
        rows = [i for i, some in enumerate(made) if some]
        wrong = [made[i][i % len(made[i])] for i in rows]
        texts = [scenes.caption(world.scenes[i], brief=True) for i in rows], [n["caption"] for n in wrong]
        found, true, false = against(score, score.see(world.pictures["image"])[rows], *texts, kind)
        out |= found
        if kind == "swap":
            counter = torch.from_numpy(scenes.render([n["scene"] for n in wrong], cfg.image_size)).permute(0, 3, 1, 2)
            there = [score.pairs(score.see(counter), t) for t in texts]
            for head in score.model.heads:
                s = torch.stack([torch.stack([a[head], b[head]], 1) for a, b in zip((true, false), there)], 1)
                for name, value in zip(("text", "image", "group"), winoground(s)):  # s (n, caption, picture)
                    out[f"{head}: pairs, {name}"] = 100 * value
    return out


def read_sugarcrepe(path, keys) -> tuple[list[int], list[str], list[str], list[str]]:
    """Rows of the released table whose picture is one of keys -> its place there, true and wrong captions, kinds."""
    place = {Path(k).stem: i for i, k in enumerate(keys)}  # file names without their ending
    rows = data.read_rows(path, ("kind", "file", "caption", "negative_caption"))
    rows = [r for r in rows if Path(r["file"]).stem in place]
    if not rows:
        raise ValueError(f"--sugarcrepe {path}: none of its pictures, COCO's val2017, is among the test pictures")
    return [place[Path(r["file"]).stem] for r in rows], *([r[k] for r in rows] for k in ("caption", "negative_caption", "kind"))


def sugarcrepe(score, seen, keys, cfg) -> dict:
    """By kind, and of all rows together before a grey picture, too."""
    places, true, wrong, kinds = read_sugarcrepe(cfg.sugarcrepe, keys)
    out, a, b = against(score, seen[places], true, wrong, "SugarCrepe")
    for kind in sorted(set(kinds)):
        mine = torch.tensor([k == kind for k in kinds])
        out |= {f"{head}: SugarCrepe {kind}": 100 * prefers(a[head][mine], b[head][mine])[0] for head in a}
    return out | {"SugarCrepe rows": float(len(places))}


def questions(score, test, rows, seen, cfg) -> dict:
    """VQA with fixed candidates and in free text, blind baselines, solved examples first, selective prediction; POPE."""
    rngs, asked = [np.random.default_rng((7, row)) for row in rows], []  # the same questions for every model
    for place, (row, rng) in enumerate(zip(rows, rngs)):
        asked += [(place, *q) for q in dict.fromkeys(test.question(row, rng) for _ in range(4)) if q]
    if not asked:
        return {}
    kinds = [k for _, _, _, k in asked]
    candidates = [scenes.OPEN.get(k, ("yes", "no")) for k in kinds]
    places, text = [p for p, *_ in asked], [q for _, q, _, _ in asked]
    out, own = {}, seen[places]

    def add(name, right):
        for group, pick in (("yes/no", lambda k: k not in scenes.OPEN), ("open", lambda k: k in scenes.OPEN)):
            mine = [r for r, k in zip(right, kinds) if pick(k)]
            if mine:
                out[f"{name}, {group}"] = 100 * float(np.mean(mine))

    def constrained(x, **options):
        best, sure = score.answers(x, text, candidates, **options)
        return [vqa_accuracy(c[b] if b >= 0 else "", [a]) for c, b, (_, _, a, _) in zip(candidates, best, asked)], sure

    right, sure = constrained(own)
    add("VQA", right)
    out |= {f"VQA {k}": 100 * float(np.mean([r for r, q in zip(right, kinds) if q == k])) for k in sorted(set(kinds))}
    add("VQA blind", constrained(score.blank)[0])
    common = {k: Counter(a for *_, a, q in asked if q == k).most_common(1)[0][0] for k in set(kinds)}
    add("VQA majority", [float(common[k] == a) for *_, a, k in asked])
    coverage, reliability = selective(sure, right)
    out |= {"answered at 5 % risk": 100 * coverage, "reliability": 100 * reliability}
    if hasattr(score.model, "caches"):
        free = score.write(own, text)
        add("VQA free", [vqa_accuracy(f, [a]) for f, (_, _, a, _) in zip(free, asked)])
        unclear = [not yes_or_no(f) for f, k in zip(free, kinds) if k not in scenes.OPEN]
        out |= {"VQA free, unclear": 100 * float(np.mean(unclear))} if unclear else {}
    if isinstance(score.model, Frozen) and cfg.shots and test.scenes:
        solved = generated(cfg.shots, 4_000_037, cfg, "train")  # the same examples before every question
        done = [solved.question(i, np.random.default_rng((8, i))) for i in range(cfg.shots)]
        ids = [[score.tok.start, *score.tok.encode(q), *score.tok.encode(a), score.tok.end] for q, a, _ in done]
        while sum(map(len, ids)) > cfg.context:  # the language model has twice as many positions; the question needs its own
            ids.pop()
        if ids:
            before = score.model.examples(score.see(solved.pictures["image"]), ids)
            add("VQA few-shot", constrained(own, before=before)[0])
    objects = [test.objects[r] for r in rows]
    for setting in ("random", "popular", "adversarial"):
        made = pope_questions(objects, test.classes, setting, np.random.default_rng(9))
        if made:
            where, names, truth = zip(*made)
            for name, pictures in (("POPE", seen[list(where)]), ("POPE blind", score.blank)):
                best, _ = score.answers(pictures, [existence(n) for n in names], [("yes", "no")] * len(made))
                said = pope_score([b == 0 if b >= 0 else not t for b, t in zip(best, truth)], truth)  # a tie is wrong
                out |= {f"{name} {setting} {k}": 100 * v for k, v in said.items()}
    return out


def captions(score, seen, test, rows) -> dict:
    """What the model writes; and, for attribute F1 and CIDEr-D, what it would write of every picture before a grey one."""
    out = captioning(score.write(seen, [score.prompt] * len(seen)), test, rows)
    blind = captioning(score.write(score.blank, [score.prompt]) * len(seen), test, rows)
    return out | {f"blind {k}": blind[k] for k in ("attribute F1", "CIDEr-D") if k in blind}


def captioning(given, test, rows) -> dict:
    references, objects = [test.captions[r] for r in rows], [test.objects[r] for r in rows]
    plain = [" ".join(re.findall(r"\w+", g.lower())) for g in given]
    references = [[" ".join(re.findall(r"\w+", c.lower())) for c in some] for some in references]
    out = {"attribute F1": 100 * attribute_f1(given, [test.scenes[r] for r in rows])} if test.scenes else {}
    out["CIDEr-D"] = cider_d(plain, references)
    known = [i for i, names in enumerate(objects) if names]  # of the others we do not know what is there
    if known:
        both = chair(*([some[i] for i in known] for some in (given, objects)), test.classes, [references[i] for i in known])
        out |= dict(zip(("CHAIR_i", "CHAIR_s"), (100 * v for v in both)))
    return out | {"words": float(np.mean([len(g.split()) for g in given])), "distinct": 100 * len(set(given)) / len(given)}


def grounding(score, world, seen, cfg) -> float:
    """Boxes of named objects with an IoU above one half, in percent."""
    things = [(i, j) for i, s in enumerate(world) for j in range(len(s.things))]
    ids, _ = score.ids([scenes.name(world[i].things[j], False, False) for i, j in things])
    got = score.model.box(score.model.pooled(seen[[i for i, _ in things]], ids)).sigmoid()
    box = torch.stack([box_of(world[i], j, cfg.image_size) for i, j in things]).to(got.device)
    return 100 * (torchvision.ops.box_iou(corners(got), corners(box)).diagonal() > 0.5).float().mean().item()


# 6. TRAIN ----------------------------------------------------------------------------------------------------------------
ARMS = {  # family, arms that are trained first
    "infonce": ("contrastive", ()),  # two towers, InfoNCE
    "siglip": ("contrastive", ()),  # two towers, a yes or no for every pair
    "llip": ("contrastive", ()),  # the caption mixes the picture's tokens
    "negclip": ("contrastive", ()),  # InfoNCE with a hard negative caption each
    "flip": ("contrastive", ()),  # InfoNCE, part of the patches dropped
    "filtered": ("contrastive", ("infonce",)),  # InfoNCE on the pairs with the highest CLIPScore of the arm infonce
    "mask": ("mask", ()),  # FLAVA-like: MIM, MLM, MMM, ITM, GC
    "mask+boxes": ("mask", ()),  # ... and the box of a named object
    "coca": ("coca", ()),  # InfoNCE and a caption decoder
    "lm": ("lm", ()),  # the language model, text alone
    "frozen": ("frozen", ("infonce", "lm")),  # a projector into the frozen language model
    "frozen+lora": ("frozen", ("infonce", "lm")),  # ... and low-rank updates of it
    "frozen+all": ("frozen", ("infonce", "lm")),  # ... and all of its weights: only the picture encoder stays frozen
}
OPTIONS_OF = {"lam_cap": ["coca"], "mixtures": ["llip"], "drop_tokens": ["flip"], "keep": ["filtered"], "lora": ["frozen+lora"],
              **dict.fromkeys(("mask_words", "mask_patches", "codes", "wrong"), ["mask", "mask+boxes"])}  # fmt: skip


def build(cfg, tok, env, trained=False):
    """The model of the arm cfg.arms; its weights if it is trained, and the models that it needs, lie beside cfg.out_dir."""
    arm, family = cfg.arms, ARMS[cfg.arms][0]
    if family == "contrastive":
        model = Contrastive(cfg, tok, arm if arm in ("siglip", "llip") else "infonce")
    elif family == "frozen":
        stack = build(replace(cfg, arms="lm"), tok, env, True).stack
        vision = build(replace(cfg, arms="infonce"), tok, env, True).vision
        ddp.reseed(cfg.seed, 0, 1)
        model = Frozen(cfg, vision, stack, arm.removeprefix("frozen").removeprefix("+"))
    else:
        model = Masked(cfg, tok, arm == "mask+boxes") if family == "mask" else {"coca": CoCa, "lm": LM}[family](cfg, tok)
    if trained:
        model.load_state_dict(read_tensors(Path(cfg.out_dir).parent / arm / "model.safetensors")[0])
    return model.to(env.device)


def make_tokenizer(pairs, cfg):
    if cfg.tokenizer:
        return Tokenizer.from_clip(cfg.tokenizer)
    rng = np.random.default_rng((cfg.seed, 51))
    asked = [pairs.question(int(r), rng) for r in rng.integers(0, len(pairs.captions), 2_000)] if pairs.classes else []
    texts = [c for some in pairs.captions for c in some] + [f"{q} {a}" for q, a, _ in filter(None, asked)] + 20 * list(TELL)
    texts += 2 * [w for some in scenes.OPEN.values() for w in some] + [existence(c) for c in 2 * pairs.classes]
    texts += ["yes", "no"] * 2
    return Tokenizer.train(texts, cfg.vocab)


@torch.no_grad()
def best_pairs(pairs, tok, cfg, env):
    """Rows with the highest CLIPScore under the arm infonce, share --keep of them -> rows, precision in percent (we know which
    captions are wrong), that of a random choice."""
    score = Scorer(build(replace(cfg, arms="infonce"), tok, env, True), tok, cfg, env.device)
    rows, images = pairs.pictures["row"].tolist(), pairs.pictures["image"]
    parts = [(images[i : i + 256], [pairs.captions[r][0] for r in rows[i : i + 256]]) for i in range(0, len(rows), 256)]
    cos = torch.cat([score.pairs(score.see(x), texts)["cosine"] for x, texts in parts])
    best = cos.argsort(descending=True, stable=True)[: max(cfg.batch_size, round(cfg.keep * len(rows)))].sort().values
    good = ~pairs.noisy[rows]
    return best, 100 * float(good[best].mean()), 100 * float(good.mean())


def train(cfg: Config) -> dict:
    """One arm (cfg.arms names it), in cfg.out_dir. Returns its metrics."""
    env, out, family, extra = ddp.start(cfg.seed), Path(cfg.out_dir), ARMS[cfg.arms][0], {}
    pairs, test, tok = world_of(cfg, env)
    if cfg.arms == "filtered":
        if not isinstance(pairs.pictures, dict):
            raise ValueError(f"the arm filtered keeps pictures in memory, more than --memory_gb {cfg.memory_gb}")
        best, extra["kept pairs that are right"], extra["pairs that are right"] = best_pairs(pairs, tok, cfg, env)
        pairs = replace(pairs, pictures={k: v[best] for k, v in pairs.pictures.items()})
    ddp.reseed(cfg.seed, 0, 0)
    model = build(cfg, tok, env)
    if family == "mask":
        model.codebook.copy_(codebook(pairs, cfg))
    floats = len(pairs.captions) * (cfg.image_size // cfg.patch) ** 2 * cfg.width
    if family == "frozen" and isinstance(pairs.pictures, dict) and 4 * floats < cfg.memory_gb * 2**30:
        # nothing changes a picture: look at each once
        blocks = tqdm(pairs.pictures["image"].split(256), "features", disable=not env.is_main, mininterval=5)
        parts = [model.features(normalised(x.to(env.device))) for x in blocks]
        pairs = replace(pairs, pictures={"features": torch.cat(parts), "row": pairs.pictures["row"].to(env.device)})
    wrapped = ddp.wrap(torch.compile(model) if cfg.compile else model, env)
    rate = cfg.lr * (3 if cfg.arms in ("frozen", "frozen+lora") else 1)  # few new weights between frozen ones
    opt = torch.optim.AdamW(optim.decay_groups(model, cfg.wd), rate, (0.9, 0.98), fused=True)
    start, _ = ckpt.resume(out / "last.pt", cfg, model=model, opt=opt)
    size = cfg.batch_size // cfg.accum
    many = len(pairs.pictures["row"]) if isinstance(pairs.pictures, dict) else sum(pairs.pictures.sizes)
    if many < size:
        raise ValueError(f"--batch_size {cfg.batch_size} is more than the {many} pairs of the arm {cfg.arms}: they would be "
                         "their own negatives")  # fmt: skip
    stream = data.endless(pairs.pictures, cfg.image_size, size, env, cfg.seed, start * cfg.accum, cfg.workers, cfg.max_bad)
    log, first = RunLog(cfg, env, cfg.arms, start), env.rank * env.share(cfg.batch_size, accum=cfg.accum)
    for step in range(start, cfg.steps):
        optim.set_lr(opt, optim.warmup_cosine(step, cfg.steps, cfg.warmup, rate))
        mean_loss = 0.0
        for micro in range(step * cfg.accum, (step + 1) * cfg.accum):
            batch = make_batch(pairs, next(stream), cfg.arms, tok, cfg, micro, first, env.device)
            with torch.autocast(env.device.type, torch.bfloat16, enabled=cfg.dtype == "bfloat16"):
                loss, parts = wrapped(batch)
            (loss / cfg.accum).backward()
            mean_loss += loss.detach() / cfg.accum
        norm = nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], cfg.grad_clip or math.inf)
        opt.step()
        opt.zero_grad(set_to_none=True)
        if hasattr(model, "log_scale"):
            model.log_scale.data.clamp_(0, math.log(100))
        done, last = step + 1, step + 1 == cfg.steps
        due = done % cfg.log_every == 0 or last
        leave = ddp.interrupted(due)
        if due or leave or done % cfg.save_every == 0:
            ddp.check_finite({"loss": mean_loss.item(), "grad_norm": norm.item()}, step)
        if due:
            log.write(step, **ddp.mean({"loss": mean_loss, **parts}), lr=opt.param_groups[0]["lr"])
        log.tick(step)
        if env.is_main and (done % cfg.save_every == 0 or last or leave):
            ckpt.save(out / "last.pt", done, cfg, model=model, opt=opt)
        if leave:
            log.close()
            raise KeyboardInterrupt
    result = extra if family == "lm" else {**evaluate(model, tok, test, cfg, env), **extra}
    result["trained parameters, millions"] = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
    log.write(cfg.steps - 1, **result)
    if env.is_main:
        tok.save(out / "merges.txt")
        ckpt.export(out / "model.safetensors", model.state_dict(), arm=cfg.arms)
        names = ("loss", "contrastive", "caption", "qa", "gc", "itm", "mim", "mlm", "mmm_img", "mmm_txt", "box")
        plot.save(plot.lines(history(log.dir, *names), cfg.arms), out / "curves.png")
        if hasattr(model, "caches"):
            draw_answers(model, tok, test, cfg, env, out / "samples" / "answers.png")
    log.finish(result)
    return result


@torch.no_grad()
def draw_answers(model, tok, test, cfg, env, path):
    """Twelve test pictures: what the model writes, a question and its answer; green: all of the caption is true."""
    score = Scorer(model, tok, cfg, env.device)
    rows, images = test.pictures["row"].tolist()[:12], test.pictures["image"][:12]
    seen = score.see(images)
    given = score.write(seen, [score.prompt] * len(rows))
    asked = [test.question(r, np.random.default_rng((7, r))) for r in rows]
    said = score.write(seen, [q[0] if q else score.prompt for q in asked])
    labels = [f"{g} | {q[0]} {a}" if q else g for g, q, a in zip(given, asked, said)]
    right = [bool(test.scenes and facts(g)) and facts(g) <= true_facts(test.scenes[r]) for g, r in zip(given, rows)]
    marks = [plot.GREEN if ok else None for ok in right]
    title = f"{cfg.arms}: caption | question and answer; green: nothing wrong in the caption"
    plot.save(plot.grid(list(images.permute(0, 2, 3, 1).cpu().numpy()), 6, labels, marks, title, 170, 7), path)


def check(cfg: Config) -> None:
    """One sentence for what a user can get wrong."""
    cli.choose(cfg, "arms kinds", arms=ARMS, kinds=(*scenes.YES_NO, *scenes.OPEN), dtype=("float32", "bfloat16"))
    if set(cfg.kinds.split(",")) == {"relation"}:
        raise ValueError("--kinds relation needs another kind beside it, for pictures with one object")
    cli.within(cfg, "steps pairs eval_images image_size patch width depth heads text_depth lm_depth embed_dim codes", 1)
    cli.within(cfg, "mixtures lora", 1)
    cli.within(cfg, "noise keep mask_words mask_patches wrong drop_tokens", 0, 1)
    cli.within(cfg, "objects", 1, 3)
    cli.within(cfg, "shots", 0)
    cli.within(cfg, "context", 16)
    if cfg.patch < 2 or cfg.patch & (cfg.patch - 1):
        raise ValueError(f"--patch {cfg.patch} must be a power of two, 2 at least")
    if cfg.width < 16 or any(w % 8 for w in stem(cfg)) or cfg.width % cfg.heads:
        raise ValueError(f"--width {cfg.width} must be 16 at least, a multiple of --heads {cfg.heads}, and the channels of the "
                         f"convolutions before it ({', '.join(map(str, stem(cfg)))}) multiples of 8")  # fmt: skip
    if cfg.image_size % cfg.patch:
        raise ValueError(f"--image_size {cfg.image_size} must be a multiple of --patch {cfg.patch}")
    if cfg.eval_data and not cfg.data:
        raise ValueError(f"--eval_data {cfg.eval_data} needs --data: a model of generated scenes knows no photographs")
    if "mask+boxes" in cfg.arms.split(",") and cfg.data:
        raise ValueError("the arm mask+boxes needs generated scenes, whose objects have one name each; leave --data out")
    if cfg.sugarcrepe and not cfg.data:
        raise ValueError(f"--sugarcrepe {cfg.sugarcrepe} needs --data, and COCO's val2017 there or in --eval_data")


def run(cfg: Config) -> dict:
    """All arms with what they need, each in its own folder; finished arms are kept. Prints one table, family by metric."""
    check(cfg)
    if cfg.ask:
        return {"answer": answer_once(cfg)}
    env = ddp.start(cfg.seed)
    env.share(cfg.batch_size, accum=cfg.accum)
    if cfg.sugarcrepe:  # before anything is trained
        read_sugarcrepe(cfg.sugarcrepe, world_of(cfg, env)[1].keys)
    out, scores, wanted = Path(cfg.out_dir), {}, []
    for arm in cfg.arms.split(","):
        wanted += [a for a in (*ARMS[arm][1], arm) if a not in wanted]
    for arm in wanted:
        steps = min(cfg.steps, 1_000) if arm == "lm" else cfg.steps
        others = {k: getattr(Config, k) for k, own in OPTIONS_OF.items() if arm not in own}  # not settings of this arm
        one = replace(cfg, arms=arm, out_dir=str(out / arm), steps=steps, **others)
        scores[arm] = ckpt.once(train, one)  # a trained arm with other tests is evaluated again
    result = {f"{arm} {k}": v for arm, s in scores.items() for k, v in s.items()}
    if ddp.rank() == 0:
        report(cfg, scores)
        write_json(out / "metrics.json", result)
    return result


def report(cfg, scores) -> None:
    heads = {f"{arm}, {h}" if h != "cosine" else arm: {k.split(": ", 1)[1]: v for k, v in s.items() if k.startswith(f"{h}: ")}
             for arm, s in scores.items() for h in dict.fromkeys(k.split(": ")[0] for k in s if ": " in k)}  # fmt: skip
    one = None if cfg.data else 100 / cfg.eval_images
    chance = {"zero-shot": 100 / 72, "zero-shot, unseen pairs": 100 / 72, "text to image R@1": one, "image to text R@1": one,
              "replace": 50.0, "swap": 50.0, "add": 50.0, "pairs, text": 25.0, "pairs, image": 25.0, "pairs, group": 100 / 6,
              "SugarCrepe": 50.0}  # fmt: skip
    columns = [c for c in chance if any(c in h for h in heads.values())]
    rows = [[name, *[h.get(c) for c in columns]] for name, h in heads.items()]
    blind = {f"{name}, blind": [h.get(f"blind {c}") for c in columns] for name, h in heads.items()}
    rows += [[name, *row] for name, row in blind.items() if any(v is not None for v in row)]
    print("\nwhich belongs to which, percent\n" + table([*rows, ["chance", *[chance[c] for c in columns]]], ["", *columns]))
    tables = {"questions, percent": ("VQA, yes/no", "VQA blind, yes/no", "VQA majority, yes/no", "VQA, open", "VQA blind, open",
                                     "VQA majority, open", "VQA free, open", "VQA few-shot, open", "POPE adversarial accuracy",
                                     "POPE blind adversarial accuracy", "answered at 5 % risk"),
              "captions": ("attribute F1", "blind attribute F1", "CIDEr-D", "blind CIDEr-D", "CHAIR_i", "words",
                           "distinct")}  # fmt: skip
    for title, columns in tables.items():
        rows = [[arm, *[s.get(c) for c in columns]] for arm, s in scores.items() if any(c in s for c in columns)]
        if rows:
            print(f"\n{title}\n" + table(rows, ["", *columns]))
    names = ("kept pairs that are right", "pairs that are right", "box IoU > 0.5")
    more = [[arm, k, s[k]] for arm, s in scores.items() for k in names if k in s]
    if more:
        print("\n" + table(more, ["", "", "percent"]))
    print(f"\npictures, curves and weights: {cfg.out_dir}")


@torch.no_grad()
def answer_once(cfg) -> str:
    """--ask: a picture of your own, a question, the answer of a trained arm, of the first of --arms that writes."""
    img = data.decode_image(Path(cfg.ask).read_bytes(), cfg.ask)
    for arm in (a for a in cfg.arms.split(",") if ARMS[a][0] in ("coca", "frozen")):
        folder = Path(cfg.out_dir, arm)
        if (folder / "metrics.json").exists():
            saved = json.loads((folder / "config.json").read_text())
            old = Config(**{k: v for k, v in saved.items() if k in Config.__dataclass_fields__})
            old, tok = replace(old, out_dir=str(folder)), Tokenizer.load(folder / "merges.txt")
            env = ddp.start(cfg.seed)
            score = Scorer(build(old, tok, env, True).eval(), tok, old, env.device)
            part = data.stack([data.squeezed(old.image_size)({"image": img, "row": 0})])
            text = score.write(score.see(part["image"]), [cfg.question or score.prompt])[0]
            print(f"{arm}: {text}")
            return text
    raise ValueError(f"--ask: of --arms {cfg.arms}, {cfg.out_dir} holds no trained arm that writes; train coca or frozen first")


# 7. MAIN -----------------------------------------------------------------------------------------------------------------
PRESETS = {
    "smoke": dict(steps=4, batch_size=8, pairs=64, eval_images=12, width=32, depth=2, heads=2, text_depth=1, lm_depth=1,
                  embed_dim=32, warmup=1, log_every=2, save_every=2, codes=16, out_dir="runs/vlm_smoke"),
    "laptop": {},
    "gpu": dict(steps=6_000, batch_size=512, lr=1e-3, pairs=100_000, eval_images=1_000, width=384, depth=8, heads=6,
                text_depth=3, lm_depth=6, embed_dim=256, patch=4, warmup=300, dtype="bfloat16", out_dir="runs/vlm_gpu",
                arms="infonce,siglip,llip,negclip,flip,mask,mask+boxes,coca,frozen,frozen+lora,frozen+all"),
    # photographs of Flickr8k by data_prep/captions.py, or of COCO by coco.py
    "photos": dict(data="data/flickr8k", steps=600, lr=1e-3, width=128, image_size=64, vocab=4_096, context=48, eval_images=200,
                   arms="infonce,siglip,mask,coca,frozen", out_dir="runs/vlm_photos"),
    # the tutorial has no settings: ViT-B/16 on COCO's 118,000 pictures, 20 epochs
    "paper": dict(steps=2_300, batch_size=1_024, data="data/coco", image_size=224, patch=16, width=768, depth=12, heads=12,
                  text_depth=6, lm_depth=12, embed_dim=512, context=77, lr=5e-4, warmup=300, dtype="bfloat16", workers=12,
                  eval_images=1_000, codes=8_192, arms="infonce,siglip,llip,negclip,mask,coca,frozen,frozen+lora",
                  out_dir="runs/vlm_paper"),
}  # fmt: skip

if __name__ == "__main__":
    cli.main(run, Config, PRESETS)
