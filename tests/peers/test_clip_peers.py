"""common/vit.py and common/tokenizer.py against open_clip and transformers, with the same random weights and real captions.

pip install -r tests/peers/requirements.txt, then: pytest tests/peers
"""

import csv
import gzip
import io
import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from common.vision import torchvision  # noqa: F401
from common.vit import load_clip, load_dino
from methods.clip_recipe import clip_loss


@pytest.fixture(scope="module")
def open_clip():
    return pytest.importorskip("open_clip")


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


def inputs(size=224, vocab=49408):
    g = torch.Generator().manual_seed(0)
    img, ids = torch.randn(4, 3, size, size, generator=g), torch.randint(1, vocab - 2, (4, 77), generator=g)
    for i, n in enumerate((5, 12, 30, 76)):
        ids[i, n], ids[i, n + 1 :] = vocab - 1, 0
    return img, ids


@pytest.mark.parametrize("name,act", [("ViT-B-32-quickgelu", "quick_gelu"), ("ViT-B-32", "gelu")])
def test_open_clip_features_logits_loss_and_gradients(open_clip, name, act, tmp_path):
    torch.manual_seed(0)
    theirs = open_clip.create_model(name, pretrained=None).float().eval()
    save_file(theirs.state_dict(), tmp_path / "m.safetensors")
    ours = load_clip(tmp_path / "m.safetensors", act=act)
    img, ids = inputs()
    for a, b in ((ours.encode_image(img), theirs.encode_image(img)), (ours.encode_text(ids), theirs.encode_text(ids))):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)
    f_img, f_txt, scale = ours(img, ids)
    g_img, g_txt, scale2 = theirs(img, ids)[:3]
    torch.testing.assert_close(scale * f_img @ f_txt.T, scale2 * g_img @ g_txt.T, rtol=1e-4, atol=1e-3)
    loss = clip_loss(f_img, f_txt, scale)
    other = open_clip.loss.ClipLoss()(g_img, g_txt, scale2)
    torch.testing.assert_close(loss, other, rtol=1e-5, atol=1e-6)
    loss.backward()
    other.backward()
    pairs = {"visual.patch_embed.weight": "visual.conv1.weight", "visual.blocks.3.attn.qkv.weight": "visual.transformer.resblocks.3.attn.in_proj_weight",
             "text.blocks.7.mlp.fc1.weight": "transformer.resblocks.7.mlp.c_fc.weight", "text.token_embed.weight": "token_embedding.weight",
             "visual.pos_embed": "visual.positional_embedding", "logit_scale": "logit_scale"}  # fmt: skip
    mine, peer = dict(ours.named_parameters()), dict(theirs.named_parameters())
    for a, b in pairs.items():
        g1, g2 = mine[a].grad.reshape(-1), peer[b].grad.reshape(-1)
        assert (g1 - g2).norm() / g2.norm() < 1e-3, a


def test_open_clip_resizes_positions_alike(open_clip, tmp_path):
    torch.manual_seed(0)
    theirs = open_clip.create_model("ViT-B-32", pretrained=None, force_image_size=288).float().eval()
    small = open_clip.create_model("ViT-B-32", pretrained=None).float().eval()
    save_file(small.state_dict(), tmp_path / "m.safetensors")
    state = small.state_dict()
    open_clip.model.resize_pos_embed(state, theirs)
    theirs.load_state_dict(state)
    img, _ = inputs(288)
    torch.testing.assert_close(
        load_clip(tmp_path / "m.safetensors", act="gelu").encode_image(img), theirs.encode_image(img), rtol=1e-4, atol=2e-5
    )


def test_transformers_features(transformers, tmp_path):
    torch.manual_seed(0)
    theirs = transformers.CLIPModel(transformers.CLIPConfig()).eval()
    theirs.save_pretrained(tmp_path)
    ours = load_clip(tmp_path)  # quick_gelu is read from config.json
    img, ids = inputs()
    out = theirs(input_ids=ids, pixel_values=img)
    torch.testing.assert_close(F.normalize(ours.encode_image(img), dim=-1), out.image_embeds, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(F.normalize(ours.encode_text(ids), dim=-1), out.text_embeds, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("registers", [0, 4])
def test_transformers_dinov2(transformers, registers, tmp_path):
    torch.manual_seed(0)
    kind, config = ("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig") if registers else ("Dinov2Model", "Dinov2Config")
    cfg = getattr(transformers, config)(
        hidden_size=128, num_hidden_layers=3, num_attention_heads=2, image_size=56, patch_size=14
    )
    theirs = getattr(transformers, kind)(cfg).eval()
    theirs.save_pretrained(tmp_path)
    img, _ = inputs(56)
    torch.testing.assert_close(load_dino(tmp_path).tokens(img), theirs(img).last_hidden_state, rtol=1e-4, atol=2e-5)


def captions(shared):
    def table(path, column, delimiter=",", **kw):
        opened = gzip.open(path, "rt", encoding="utf-8") if str(path).endswith("gz") else open(path, encoding="utf-8")
        return [row[column] for row in csv.DictReader(opened, delimiter=delimiter, **kw)]

    out = table(shared / "flickr8k_1k/captions_all.csv.gz", "caption") + table(
        shared / "coco_captions_val2017/captions.csv.gz", "caption"
    )
    out += gzip.open(shared / "cc3m_val_captions/captions.txt.gz", "rt", encoding="utf-8").read().splitlines()
    out += table(shared / "prompts/partiprompts.tsv", "Prompt", "\t", quoting=csv.QUOTE_NONE)
    out += table(shared / "prompts/drawbench.csv", "Prompt") + table(
        shared / "sugarcrepe/sugarcrepe.csv.gz", "negative_caption"
    )
    dsg = table(shared / "prompts/dsg1k_questions.csv.gz", "text")
    return out + dsg + table(shared / "prompts/dsg1k_questions.csv.gz", "question_natural_language")


def test_ids_equal_open_clips_on_every_caption(open_clip, shared):
    from common.tokenizer import Tokenizer

    texts = captions(shared)
    assert len(texts) > 100_000
    ours = Tokenizer.from_clip(shared / "clip/bpe_simple_vocab_16e6.txt.gz")
    theirs = open_clip.SimpleTokenizer(str(shared / "clip/bpe_simple_vocab_16e6.txt.gz"))
    wrong = [t for t in texts if ours.encode(t) != theirs.encode(t)]
    assert not wrong, f"{len(wrong)} of {len(texts)}, the first: {wrong[:5]!r}"


def test_round_trip_through_our_own_writer(open_clip, shared, tmp_path):
    wds = pytest.importorskip("webdataset")
    from data_prep import scenes

    scenes.run(scenes.Config(str(tmp_path), train=12, val=0, test=0, size=32))
    samples = list(wds.WebDataset(str(tmp_path / "train-000000.tar"), shardshuffle=False))
    assert (
        len(samples) == 12
        and json.loads(samples[0]["json"])["captions"]
        and io.BytesIO(samples[0]["png"]).read(4) == b"\x89PNG"
    )
