"""common/vit.py: against a plain-loop reference, through every published layout, with negative controls."""

import argparse
import json
import math
import re

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from common import ckpt
from common import vit as V
from common.vit import (
    ACTS,
    CLIP,
    Attention,
    Block,
    SwiGLU,
    TextTransformer,
    ViT,
    load_clip,
    load_dino,
    quick_gelu,
    resize_positions,
    trim,
)


def tiny_clip(act="quick_gelu"):
    torch.manual_seed(0)
    visual = ViT(32, 8, 64, 2, 1, act=act, eps=1e-5, out_dim=48, patch_bias=False, norm_pre=True)
    model = CLIP(visual, TextTransformer(100, 16, 128, 2, 2, 48, act))
    with torch.no_grad():
        for p in model.parameters():  # norms and biases too: a swapped one must be seen
            p.add_(0.1 * torch.randn_like(p))
    return model.eval()


def to_openai(model):
    """Independent of the loader's table: written from the published key list."""
    s, out = model.state_dict(), {"logit_scale": model.logit_scale.detach()}
    v, t = "visual.", "text."
    out["visual.class_embedding"], out["visual.positional_embedding"] = s[v + "cls_token"][0, 0], s[v + "pos_embed"][0]
    out["visual.conv1.weight"], out["visual.proj"] = s[v + "patch_embed.weight"], s[v + "proj.weight"].T.contiguous()
    out["token_embedding.weight"], out["positional_embedding"] = s[t + "token_embed.weight"], s[t + "pos_embed"]
    out["text_projection"] = s[t + "proj.weight"].T.contiguous()
    for e in ("weight", "bias"):
        out[f"visual.ln_pre.{e}"], out[f"visual.ln_post.{e}"] = s[f"{v}norm_pre.{e}"], s[f"{v}norm.{e}"]
        out[f"ln_final.{e}"] = s[f"{t}norm.{e}"]
        for tower, prefix in ((v, "visual.transformer"), (t, "transformer")):
            for i in range(2):
                a, b = f"{prefix}.resblocks.{i}", f"{tower}blocks.{i}"
                out[f"{a}.attn.in_proj_{e}"], out[f"{a}.attn.out_proj.{e}"] = s[f"{b}.attn.qkv.{e}"], s[f"{b}.attn.proj.{e}"]
                out[f"{a}.ln_1.{e}"], out[f"{a}.ln_2.{e}"] = s[f"{b}.norm1.{e}"], s[f"{b}.norm2.{e}"]
                out[f"{a}.mlp.c_fc.{e}"], out[f"{a}.mlp.c_proj.{e}"] = s[f"{b}.mlp.fc1.{e}"], s[f"{b}.mlp.fc2.{e}"]
    return out


def to_hf(openai):
    out = {"logit_scale": openai["logit_scale"], "text_projection.weight": openai["text_projection"].T.contiguous(),
           "visual_projection.weight": openai["visual.proj"].T.contiguous(),
           "text_model.embeddings.token_embedding.weight": openai["token_embedding.weight"],
           "text_model.embeddings.position_embedding.weight": openai["positional_embedding"],
           "text_model.embeddings.position_ids": torch.arange(16)[None],
           "vision_model.embeddings.class_embedding": openai["visual.class_embedding"],
           "vision_model.embeddings.patch_embedding.weight": openai["visual.conv1.weight"],
           "vision_model.embeddings.position_embedding.weight": openai["visual.positional_embedding"]}  # fmt: skip
    for e in ("weight", "bias"):
        out[f"text_model.final_layer_norm.{e}"] = openai[f"ln_final.{e}"]
        out[f"vision_model.pre_layrnorm.{e}"] = openai[f"visual.ln_pre.{e}"]
        out[f"vision_model.post_layernorm.{e}"] = openai[f"visual.ln_post.{e}"]
        for a, b in (("vision_model", "visual.transformer"), ("text_model", "transformer")):
            for i in range(2):
                h, o = f"{a}.encoder.layers.{i}", f"{b}.resblocks.{i}"
                for c, part in zip("qkv", openai[f"{o}.attn.in_proj_{e}"].chunk(3)):
                    out[f"{h}.self_attn.{c}_proj.{e}"] = part.contiguous()
                out[f"{h}.self_attn.out_proj.{e}"] = openai[f"{o}.attn.out_proj.{e}"]
                out[f"{h}.layer_norm1.{e}"], out[f"{h}.layer_norm2.{e}"] = openai[f"{o}.ln_1.{e}"], openai[f"{o}.ln_2.{e}"]
                out[f"{h}.mlp.fc1.{e}"], out[f"{h}.mlp.fc2.{e}"] = openai[f"{o}.mlp.c_fc.{e}"], openai[f"{o}.mlp.c_proj.{e}"]
    return out


def features(model):
    g = torch.Generator().manual_seed(1)
    img, ids = torch.randn(3, 3, 32, 32, generator=g), torch.randint(1, 99, (3, 16), generator=g)
    ids[:, 9] = 99
    with torch.no_grad():
        return torch.cat([model.encode_image(img), model.encode_text(ids)])


def test_published_size():
    visual = ViT(224, 32, 768, 12, 12, act="quick_gelu", eps=1e-5, out_dim=512, patch_bias=False, norm_pre=True)
    model = CLIP(visual, TextTransformer(out_dim=512))
    assert len(model.state_dict()) == 302 and sum(p.numel() for p in model.parameters()) == 151_277_313
    assert sum(p.numel() for p in model.visual.parameters()) == 87_849_216
    assert model.logit_scale.item() == pytest.approx(math.log(1 / 0.07))


@pytest.mark.parametrize("layout", ["openai", "open_clip", "custom_text", "hf", "hf_folder", "torchscript", "checkpoint"])
def test_every_layout_gives_bit_equal_weights(layout, tmp_path):
    model = tiny_clip()
    state, path, act = to_openai(model), tmp_path / "model.safetensors", "quick_gelu"
    if layout == "openai":
        path = tmp_path / "clip.pt"
        torch.save({**state, "input_resolution": torch.tensor(32), "context_length": torch.tensor(16)}, path)
    elif layout == "open_clip":
        save_file(state, path)
        (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"quick_gelu": True}}))
        act = ""
    elif layout == "custom_text":
        text = ("text_projection", "positional_embedding", "token_embedding", "transformer", "ln_final")
        save_file({("text." if k.startswith(text) else "") + k: v for k, v in state.items()}, path)
    elif layout.startswith("hf"):
        save_file(to_hf(state), path)
        config = {"hidden_act": "quick_gelu"}
        (tmp_path / "config.json").write_text(json.dumps({"vision_config": config, "text_config": config}))
        path, act = (tmp_path if layout == "hf_folder" else path), ""
    elif layout == "torchscript":

        class Holder(torch.nn.Module):
            pass

        def put(module, name, value):
            head, _, rest = name.partition(".")
            if not rest:
                return module.register_parameter(head, torch.nn.Parameter(value.clone()))
            if not hasattr(module, head):
                module.add_module(head, Holder())
            put(getattr(module, head), rest, value)

        holder, path = Holder(), tmp_path / "ViT.pt"
        for k, v in state.items():
            put(holder, k, v)
        torch.jit.save(torch.jit.script(holder), path)
    else:
        path = tmp_path / "epoch.pt"
        torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}}, path)
    if layout == "torchscript":
        with pytest.raises(ValueError, match="may hold code; pass trust_torchscript"):
            load_clip(path, act=act)
    loaded = load_clip(path, act=act, trust_torchscript=layout == "torchscript")
    for k, v in model.state_dict().items():
        assert torch.equal(v, loaded.state_dict()[k]), k
    assert torch.equal(features(model), features(loaded))


def test_negative_controls(tmp_path):
    """Each mistake that loads without an error must be visible, or the test above proves nothing."""
    model = tiny_clip()
    good = features(model)

    def damaged(change):
        state = to_openai(model)
        change(state)
        save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "m.safetensors")
        return (features(load_clip(tmp_path / "m.safetensors", act="quick_gelu")) - good).abs().max()

    def swap_qk(state):
        q, k, v = state["transformer.resblocks.0.attn.in_proj_weight"].chunk(3)
        state["transformer.resblocks.0.attn.in_proj_weight"] = torch.cat([k, q, v])

    def gelu(state):
        pass

    assert damaged(gelu) == 0
    assert damaged(swap_qk) > 1e-3
    save_file(to_openai(model), tmp_path / "m.safetensors")
    assert (features(load_clip(tmp_path / "m.safetensors", act="gelu")) - good).abs().max() > 1e-3
    assert model.visual.norm.eps == 1e-5 and ViT(32, 8, 64, 1, 1).norm.eps == 1e-6


def test_square_text_projection_is_transposed(tmp_path):
    torch.manual_seed(0)
    visual = ViT(32, 8, 64, 1, 1, act="gelu", eps=1e-5, out_dim=64, patch_bias=False, norm_pre=True)
    model = CLIP(visual, TextTransformer(100, 16, 64, 2, 1, 64, "gelu"))  # square, like B/32: a wrong transpose loads
    model.visual.blocks.append(Block(64, 1, 256, "gelu", 1e-5))
    state = to_openai(model)
    save_file(state, tmp_path / "m.safetensors")
    loaded = load_clip(tmp_path / "m.safetensors", act="gelu")
    assert torch.equal(loaded.text.proj.weight, model.text.proj.weight)
    assert not torch.equal(loaded.text.proj.weight, loaded.text.proj.weight.T)


def test_wrong_files_are_named(tmp_path):
    model, path = tiny_clip(), tmp_path / "m.safetensors"
    state = to_openai(model)
    save_file({k: v for k, v in state.items() if "ln_final" not in k} | {"extra.weight": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="missing: text.norm.bias.*unexpected: .*extra.weight"):
        load_clip(path, act="gelu")
    save_file(state, path)
    with pytest.raises(ValueError, match="activation"):
        load_clip(path)
    with pytest.raises(ValueError, match="not a DINO"):
        load_dino(path)
    save_file({"a.weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="not a CLIP ViT"):
        load_clip(path, act="gelu")
    path.write_bytes(b"garbage")
    with pytest.raises(ValueError, match="not a readable weight file"):
        load_clip(path, act="gelu")
    torch.save({"x": Exception("code")}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="refused"):
        load_clip(tmp_path / "evil.pt", act="gelu")
    with pytest.raises(ValueError, match="does not exist"):
        load_clip(tmp_path / "none.pt", act="gelu")


def test_attention_equals_loops():
    torch.manual_seed(0)
    attn, x = Attention(12, 3).double(), torch.randn(2, 5, 12, dtype=torch.double)
    for causal in (False, True):
        out = torch.zeros_like(x)
        q, k, v = attn.qkv(x).chunk(3, -1)
        for b in range(2):
            for h in range(3):
                c = slice(4 * h, 4 * h + 4)
                for i in range(5):
                    seen = range(i + 1) if causal else range(5)
                    w = torch.stack([q[b, i, c] @ k[b, j, c] / 2 for j in seen]).softmax(0)
                    out[b, i, c] = sum(w[n] * v[b, j, c] for n, j in enumerate(seen))
        torch.testing.assert_close(attn(x, causal), attn.proj(out))


def test_causality_padding_and_trim():
    model = tiny_clip()
    ids = torch.randint(1, 99, (4, 16), generator=torch.Generator().manual_seed(2))
    ids[:, 7] = 99
    ids[:, 8:] = 0
    f = model.encode_text(ids)
    padded = ids.clone()
    padded[:, 8:] = 99  # Hugging Face pads with the end token; the first one counts
    assert torch.equal(model.encode_text(padded), f)
    torch.testing.assert_close(model.encode_text(trim(ids)), f)
    assert trim(ids).shape == (4, 8) and trim(ids, 16).shape == (4, 16) and trim(ids, 3).shape == (4, 9)
    before = ids.clone()
    before[:, 3] = before[:, 3] % 98 + 1
    assert (model.encode_text(before) - f).abs().max() > 1e-3
    h = model.text.hidden(ids)
    torch.testing.assert_close(model.text.hidden(ids[:, :5]), h[:, :5])


def test_text_dropout_acts_in_training_only():
    model = tiny_clip()
    ids = torch.tensor([[5, 6, 99]])
    assert torch.equal(model.text(ids, 0.5), model.text(ids))
    model.train()
    assert torch.equal(model.text(ids, 0.0), model.text(ids))
    assert not torch.equal(model.text(ids, 0.5), model.text(ids, 0.5))


def test_position_resizing_rules():
    torch.manual_seed(0)
    pos = torch.randn(1, 1 + 37 * 37, 8)
    assert resize_positions(pos, (37, 37), "offset") is pos
    out = {rule: resize_positions(pos, (16, 16), rule) for rule in ("antialias", "offset")}
    for v in out.values():
        assert v.shape == (1, 257, 8) and torch.equal(v[:, 0], pos[:, 0])
    assert (out["antialias"] - out["offset"]).abs().max() > 1e-2
    grid = pos[:, 1:].reshape(1, 37, 37, 8).permute(0, 3, 1, 2)
    want = F.interpolate(grid, scale_factor=(16.1 / 37, 16.1 / 37), mode="bicubic").flatten(2).transpose(1, 2)
    torch.testing.assert_close(out["offset"][:, 1:], want)


def dino(layout, registers=0, scaled=False, swiglu=False):
    torch.manual_seed(0)
    model = ViT(28, 14, 64, 2, 1, hidden=176 if swiglu else 0, layer_scale=scaled, swiglu=swiglu, registers=registers).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    state = {k.replace("patch_embed.", "patch_embed.proj.").replace(".ls1", ".ls1.gamma").replace(".ls2", ".ls2.gamma"): v
             for k, v in model.state_dict().items()}  # fmt: skip
    if layout == "training":
        state = {"teacher": {f"module.backbone.{k}": v for k, v in state.items()} | {"head.mlp.0.weight": torch.zeros(2)}}
    if layout == "v2":
        state["mask_token"] = torch.zeros(1, 64)
    if layout == "hf":
        out = {}
        for k, v in state.items():
            if ".attn.qkv." in k:
                for c, part in zip(("query", "key", "value"), v.chunk(3)):
                    out["encoder.layer." + k[7:].replace("attn.qkv", f"attention.attention.{c}")] = part
                continue
            for a, b in (("blocks.", "encoder.layer."), ("attn.proj", "attention.output.dense"), ("ls1.gamma", "layer_scale1.lambda1"),
                         ("ls2.gamma", "layer_scale2.lambda1"), ("patch_embed.proj", "embeddings.patch_embeddings.projection"),
                         ("pos_embed", "embeddings.position_embeddings"), ("cls_token", "embeddings.cls_token"),
                         ("w12", "weights_in"), ("w3", "weights_out")):  # fmt: skip
                k = k.replace(a, b)
            out[
                "layernorm" + k[4:] if k.startswith("norm.") else k.replace("register_tokens", "embeddings.register_tokens")
            ] = v
        state = out
    return model, state


@pytest.mark.parametrize("layout,options", [
    ("backbone", {}), ("training", {}), ("v2", dict(scaled=True)), ("v2", dict(scaled=True, registers=4)),
    ("v2", dict(scaled=True, swiglu=True)), ("hf", dict(scaled=True)), ("hf", dict(scaled=True, registers=4, swiglu=True)),
])  # fmt: skip
def test_dino_layouts(layout, options, tmp_path):
    model, state = dino(layout, **options)
    torch.save(state, tmp_path / "d.pth")
    loaded = load_dino(tmp_path / "d.pth")
    x = torch.randn(2, 3, 28, 28)
    torch.testing.assert_close(loaded(x), model(x), rtol=0, atol=0)
    assert loaded.pos_rule == ("antialias" if options.get("registers") else "offset")
    assert loaded.norm.eps == 1e-6


def test_registers_have_no_position():
    model, _ = dino("v2", registers=4, scaled=True)
    x = torch.randn(1, 3, 28, 28)
    before = model.tokens(x)
    assert before.shape == (1, 1 + 4 + 4, 64)
    with torch.no_grad():
        model.register_tokens.copy_(model.register_tokens[:, [2, 0, 3, 1]])
    after = model.tokens(x)
    torch.testing.assert_close(after[:, 5:], before[:, 5:])
    torch.testing.assert_close(after[:, 0], before[:, 0])
    assert (after[:, 1:5] - before[:, 1:5]).abs().max() > 1e-3


def test_layer_scale_of_one_is_a_plain_block():
    torch.manual_seed(0)
    plain, scaled = Block(8, 2, 32), Block(8, 2, 32, layer_scale=True)
    scaled.load_state_dict({**plain.state_dict(), "ls1": torch.ones(8), "ls2": torch.ones(8)})
    x = torch.randn(2, 3, 8)
    torch.testing.assert_close(plain(x), scaled(x))


def test_bad_image_size():
    with pytest.raises(ValueError, match="multiple of the patch 8"):
        ViT(32, 8, 16, 1, 1)(torch.zeros(1, 3, 30, 32))
    torch.testing.assert_close(quick_gelu(torch.tensor(1.0)), torch.tensor(0.8458), atol=1e-4, rtol=0)


def test_heads_are_read_beside_the_weights_and_never_guessed_for_wide_towers(tmp_path):
    torch.manual_seed(0)
    for width, head_width in ((160, 80), (1280, 80)):
        clip = CLIP(ViT(16, 8, width, 1, width // head_width, 2 * width, "gelu", 1e-5, 8, False, True),
                    TextTransformer(20, 8, 64, 1, 2, 8, "gelu"))  # fmt: skip
        folder = tmp_path / str(width)
        folder.mkdir()
        theirs = [(r"^text\.(?=blocks)", "transformer."), (r"^visual\.(?=blocks)", "visual.transformer."), (r"blocks\.", "resblocks."),
                  (r"\.norm1\.", ".ln_1."), (r"\.norm2\.", ".ln_2."), (r"attn\.qkv\.", "attn.in_proj_"), (r"attn\.proj\.", "attn.out_proj."),
                  (r"\.fc1\.", ".c_fc."), (r"\.fc2\.", ".c_proj."), (r"visual\.cls_token", "visual.class_embedding"),
                  (r"visual\.pos_embed", "visual.positional_embedding"), (r"visual\.patch_embed", "visual.conv1"),
                  (r"visual\.norm_pre", "visual.ln_pre"), (r"visual\.norm\.", "visual.ln_post."), (r"visual\.proj\.weight", "visual.proj"),
                  (r"text\.token_embed", "token_embedding"), (r"text\.pos_embed", "positional_embedding"), (r"text\.norm\.", "ln_final."),
                  (r"text\.proj\.weight", "text_projection")]  # fmt: skip
        state = {}
        for k, v in clip.state_dict().items():
            v = (
                v.T
                if k in ("visual.proj.weight", "text.proj.weight")
                else v.squeeze(0)
                if k.endswith(("cls_token", "pos_embed"))
                else v
            )
            v = v.flatten() if k.endswith("cls_token") else v
            for a, b in theirs:
                k = re.sub(a, b, k)
            state[k] = v.contiguous()
        save_file(state, folder / "open_clip_model.safetensors")
        if width == 1280:
            with pytest.raises(ValueError, match="how many heads"):
                load_clip(folder, act="gelu")
        (folder / "config.json").write_text('{"model_type": "clip"}')
        text_cfg = {"heads": 2}
        (folder / "open_clip_config.json").write_text(
            json.dumps({"model_cfg": {"vision_cfg": {"head_width": head_width}, "text_cfg": text_cfg}})
        )
        got = load_clip(folder)
        x, ids = torch.randn(2, 3, 16, 16), torch.tensor([[18, 3, 19, 0], [18, 4, 5, 19]])
        torch.testing.assert_close(got.encode_image(x), clip.eval().encode_image(x))
        torch.testing.assert_close(got.encode_text(ids), clip.encode_text(ids))


def test_a_training_file_of_dino_and_a_classifier(tmp_path):
    vit = ViT(16, 8, 64, 1, 1)
    state = {f"backbone.{k.replace('patch_embed.', 'patch_embed.proj.')}": v for k, v in vit.state_dict().items()}
    torch.save({"teacher": state, "args": argparse.Namespace(arch="vit"), "epoch": 3}, tmp_path / "dino.pth")
    x = torch.randn(1, 3, 16, 16)
    assert torch.equal(load_dino(tmp_path / "dino.pth")(x), vit.eval()(x))
    torch.save({**state, "head.weight": torch.zeros(10, 64)}, tmp_path / "timm.pth")
    with pytest.raises(ValueError, match="classifier"):
        load_dino(tmp_path / "timm.pth")


# By hand ---------------------------------------------------------------------------------------------------------------


def moved(module):
    """Every number off its start, so that a forgotten or swapped part is seen."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return module.eval()


def test_antialiased_positions_and_pictures_that_are_no_squares():
    pos = torch.randn(1, 1 + 64, 6, generator=torch.Generator().manual_seed(0))
    grid = pos[:, 1:].view(1, 8, 8, 6).permute(0, 3, 1, 2)
    want = F.interpolate(grid, size=(3, 5), mode="bicubic", antialias=True).permute(0, 2, 3, 1).reshape(1, 15, 6)
    torch.testing.assert_close(resize_positions(pos, (3, 5), "antialias")[:, 1:], want)
    model = moved(ViT(32, 8, 16, 0, 1, norm_pre=True))
    with torch.no_grad():
        model.patch_embed.weight.zero_()
        got = model.tokens(torch.zeros(1, 3, 16, 24))  # two rows of three patches
        x = resize_positions(model.pos_embed, (2, 3), "antialias")
        x[:, :1] += model.cls_token
        x[:, 1:] += model.patch_embed.bias
        torch.testing.assert_close(got, model.norm(model.norm_pre(x)))
        assert not torch.allclose(
            resize_positions(model.pos_embed, (3, 2), "antialias"), resize_positions(model.pos_embed, (2, 3), "antialias")
        )


def test_a_block_by_hand():
    x, block = torch.randn(2, 3, 8), moved(Block(8, 2, 32, layer_scale=True))
    with torch.no_grad():
        one, two = block.ls1.clone(), block.ls2.clone()
        block.ls2.zero_()
        torch.testing.assert_close(block(x), x + one * block.attn(block.norm1(x)))
        block.ls1.zero_()
        block.ls2.copy_(two)
        torch.testing.assert_close(block(x), x + two * block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(x)))))
        mlp = moved(SwiGLU(4, 6))
        gate, value = mlp.w12(x[..., :4])[..., :6], mlp.w12(x[..., :4])[..., 6:]
        torch.testing.assert_close(mlp(x[..., :4]), mlp.w3(gate * gate.sigmoid() * value))
    v = torch.linspace(-4, 4, 50, dtype=torch.double)
    torch.testing.assert_close(ACTS["gelu"](v), v / 2 * (1 + torch.erf(v / 2**0.5)))  # exact, not by tanh


def test_text_tower_by_hand_and_its_start():
    net, ids = moved(TextTransformer(10, 6, 8, 0, 1)), torch.tensor([[3, 4, 9, 0]])
    torch.testing.assert_close(net.hidden(ids), net.norm(net.token_embed.weight[ids] + net.pos_embed[:4]))
    torch.testing.assert_close(net(ids), net.hidden(ids)[:, 2])
    torch.manual_seed(0)
    net = TextTransformer(600, 300, 64, 8, 4, 64)
    block = net.blocks[3]
    assert block.norm1.eps == net.norm.eps == 1e-5 and block.mlp.act is quick_gelu
    for w, std in ((net.token_embed.weight, 0.02), (net.pos_embed, 0.01), (block.attn.qkv.weight, 1 / 8), (net.proj.weight, 1 / 8),
                   (block.attn.proj.weight, 1 / 32), (block.mlp.fc1.weight, 128**-0.5), (block.mlp.fc2.weight, 1 / 32)):  # fmt: skip
        assert w.std().item() == pytest.approx(std, rel=0.05)


def test_the_joint_forward_gives_unit_features_and_the_scale():
    model = moved(tiny_clip())
    img, ids = torch.randn(2, 3, 32, 32), torch.tensor([[5, 99, 0], [6, 7, 99]])
    a, b, scale = model(img, ids)
    for unit, f in ((a, model.encode_image(img)), (b, model.encode_text(ids))):
        torch.testing.assert_close(unit, f / f.norm(dim=1, keepdim=True))
    torch.testing.assert_close(scale, torch.tensor(math.e) ** model.logit_scale)
    assert CLIP(model.visual, model.text, logit_bias=True).logit_bias.item() == -10 and model.logit_bias is None


def test_what_only_some_clip_files_have(tmp_path):
    """Half precision, SigLIP's bias, layer scale, exact GELU by open_clip's settings, heads by Hugging Face's."""
    torch.manual_seed(0)
    model, path = tiny_clip(), tmp_path / "m.safetensors"
    model.visual = moved(ViT(32, 8, 64, 2, 1, 256, "gelu", 1e-5, 48, False, True, layer_scale=True))
    state = to_openai(model) | {"logit_bias": torch.tensor(-3.5)}
    for i, j in ((0, 1), (0, 2), (1, 1), (1, 2)):
        state[f"visual.transformer.resblocks.{i}.ls_{j}.gamma"] = getattr(model.visual.blocks[i], f"ls{j}").detach()
    save_file({k: v.half() for k, v in state.items()}, path)
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"embed_dim": 48}}))
    got = load_clip(path)
    assert got.logit_bias.item() == -3.5 and got.visual.blocks[0].mlp.act is got.text.blocks[0].mlp.act is ACTS["gelu"]
    assert got.visual.norm.eps == got.visual.blocks[0].norm1.eps == got.text.norm.eps == 1e-5
    for k, v in model.visual.state_dict().items():
        assert torch.equal(got.visual.state_dict()[k], v.half().float()), k
    (tmp_path / "open_clip_config.json").unlink()
    save_file(to_hf(to_openai(tiny_clip())), path)
    towers = {f"{t}_config": {"hidden_act": "quick_gelu", "num_attention_heads": n} for t, n in (("vision", 4), ("text", 8))}
    (tmp_path / "config.json").write_text(json.dumps(towers))
    got = load_clip(path)
    assert (got.visual.blocks[0].attn.heads, got.text.blocks[0].attn.heads) == (4, 8)


def test_which_network_and_names_of_a_dino_file(tmp_path):
    (model, state), x = dino("backbone"), torch.randn(1, 3, 28, 28)
    student = {k: v + 1 for k, v in state.items()}
    torch.save({"student": {f"module.backbone.{k}": v for k, v in student.items()}, "teacher": state}, tmp_path / "d.pth")
    assert torch.equal(load_dino(tmp_path / "d.pth").norm.bias, state["norm.bias"])
    assert torch.equal(load_dino(tmp_path / "d.pth", "student").norm.bias, state["norm.bias"] + 1)
    torch.save(
        {k.replace("blocks.", "blocks.0."): v for k, v in state.items()}, tmp_path / "chunks.pth"
    )  # blocks.0.0, blocks.0.1
    assert torch.equal(load_dino(tmp_path / "chunks.pth")(x), model(x))
    hf = {}  # transformers' ViTModel, in which DINO's first version is published there
    for k, v in state.items():
        for a, b in (("patch_embed.proj", "embeddings.patch_embeddings.projection"), ("cls_token", "embeddings.cls_token"),
                     ("pos_embed", "embeddings.position_embeddings"), ("blocks.", "encoder.layer."), (".norm1.", ".layernorm_before."),
                     (".norm2.", ".layernorm_after."), ("attn.proj", "attention.output.dense"), ("mlp.fc1", "intermediate.dense"),
                     ("mlp.fc2", "output.dense")):  # fmt: skip
            k = k.replace(a, b)
        k = "layernorm" + k[4:] if k.startswith("norm.") else k
        parts = zip(("query", "key", "value"), v.chunk(3)) if ".attn.qkv." in k else [(None, v)]
        hf |= {k.replace("attn.qkv", f"attention.attention.{c}") if c else k: part for c, part in parts}
    torch.save(hf, tmp_path / "hf.pth")
    assert torch.equal(load_dino(tmp_path / "hf.pth")(x), model(x))


def test_a_folder_may_hold_our_own_export(tmp_path):
    clip = V.CLIP(V.ViT(16, 8, 32, 1, 2, out_dim=8, norm_pre=True), V.TextTransformer(50, 9, 32, 1, 2, 8))
    ckpt.export(tmp_path / "model.safetensors", clip.state_dict(), act="gelu", heads={"visual": 2, "text": 2})
    for path in (tmp_path, tmp_path / "model.safetensors"):
        got = V.load_clip(path).state_dict()
        assert all(torch.equal(got[k], v) for k, v in clip.state_dict().items())
