"""common/dit.py: published sizes and keys, position table, layouts, zero initialisation; note weights_vae_dit (b)."""

import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from common import ckpt
from common import dit as D


def tiny(**more):
    torch.manual_seed(0)
    return D.DiT(**{**dict(input_size=8, patch=2, channels=4, dim=32, depth=2, heads=4, classes=5), **more})


def shaken(model, seed=1):
    """Random values where the initialisation has zeros."""
    g = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if name != "pos_embed":
            p.data += 0.05 * torch.randn(p.shape, generator=g)
    return model.eval()


@pytest.mark.parametrize("size, count", [("DiT-S/2", 32_963_360), ("DiT-B/2", 130_512_416), ("DiT-L/2", 458_102_816),
                                         ("DiT-XL/2", 675_129_632)])  # fmt: skip
def test_published_sizes(size, count):
    with torch.device("meta"):
        model = D.DiT(**D.SIZES[size])
    assert sum(p.numel() for p in model.parameters()) == count


def test_published_keys():
    with torch.device("meta"):
        got = {k: tuple(v.shape) for k, v in D.DiT(**D.SIZES["DiT-XL/2"]).state_dict().items()}
        large = D.DiT(64, **D.SIZES["DiT-XL/2"])
    want = {"pos_embed": (1, 256, 1152), "x_embedder.proj.weight": (1152, 4, 2, 2), "x_embedder.proj.bias": (1152,),
            "y_embedder.embedding_table.weight": (1001, 1152)}  # fmt: skip

    def add(key, rows, cols):
        want.update({f"{key}.weight": (rows, cols), f"{key}.bias": (rows,)})

    add("t_embedder.mlp.0", 1152, 256), add("t_embedder.mlp.2", 1152, 1152)
    for i in range(28):
        add(f"blocks.{i}.attn.qkv", 3456, 1152), add(f"blocks.{i}.attn.proj", 1152, 1152)
        add(f"blocks.{i}.mlp.fc1", 4608, 1152), add(f"blocks.{i}.mlp.fc2", 1152, 4608)
        add(f"blocks.{i}.adaLN_modulation.1", 6912, 1152)
    add("final_layer.linear", 32, 1152), add("final_layer.adaLN_modulation.1", 2304, 1152)
    assert got == want and len(got) == 292
    assert sum(p.numel() for p in large.parameters()) == 676_014_368


def test_position_table_by_loops():
    """First half the column, second half the row, sines before cosines."""
    table = D.sincos_2d(16, torch.arange(3), torch.arange(4))
    assert table.shape == (1, 12, 16)
    for i in range(3):
        for j in range(4):
            want = []
            for place in (j, i):
                angles = [place / 10000 ** (k / 4) for k in range(4)]
                want += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            torch.testing.assert_close(table[0, i * 4 + j], torch.tensor(want), rtol=1e-6, atol=1e-6)
    swapped = D.sincos_2d(16, torch.arange(4), torch.arange(3)).view(4, 3, 16).transpose(0, 1).reshape(12, 16)
    assert not torch.allclose(table[0], swapped)


def test_time_features_cosine_first():
    f = D.time_features(torch.tensor([0.0, 7.0]))
    assert f.shape == (2, 256) and f[0].tolist() == [1.0] * 128 + [0.0] * 128
    assert f[1, 0].item() == pytest.approx(math.cos(7)) and f[1, 128 + 64].item() == pytest.approx(
        math.sin(7 * 10000**-0.5), abs=1e-6
    )


def test_zero_at_the_start():
    model = tiny(cross=True)
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([3.0, 900.0]), torch.tensor([0, 5])
    context = torch.randn(2, 3, 32)
    assert model(x, t, y, context=context).abs().max() == 0 and model(x, t, y, context=context).shape == (2, 8, 8, 8)
    tokens, c = torch.randn(2, 16, 32), torch.randn(2, 32)
    assert all(torch.equal(block(tokens, c, context), tokens) for block in model.blocks)


def test_patches_come_back_in_place():
    """With an identity network, un-patchify(patchify(x)) = x: tokens row by row, channel fastest."""
    model = tiny(dim=16, channels=4, depth=0, learn_sigma=False, heads=2)
    with torch.no_grad():
        model.pos_embed.zero_()
        w = model.x_embedder.proj.weight.zero_()  # (16, 4, 2, 2): token entry (p_row, p_col, channel)
        for r in range(2):
            for c in range(2):
                for ch in range(4):
                    w[(r * 2 + c) * 4 + ch, ch, r, c] = 1
        model.final_layer.linear.weight.copy_(torch.eye(16))
    model.final_layer.norm_final = torch.nn.Identity()
    x = torch.randn(2, 4, 8, 8)
    assert torch.equal(model(x, torch.zeros(2)), x)


def test_block_by_hand():
    model = shaken(tiny(cross=True))
    x, c, context = torch.randn(2, 16, 32), torch.randn(2, 32), torch.randn(2, 3, 32)
    block = model.blocks[0]
    m = block.adaLN_modulation(c).view(2, 6, 32)

    def norm(v):
        return (v - v.mean(-1, keepdim=True)) / (v.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()

    def attend(q, k, v):
        out = torch.zeros_like(q)
        for b in range(2):
            for h in range(4):
                s = slice(8 * h, 8 * h + 8)
                scores = q[b, :, s] @ k[b, :, s].T / 8**0.5
                out[b, :, s] = scores.softmax(-1) @ v[b, :, s]
        return out

    def linear(layer, v):
        return v @ layer.weight.T + layer.bias

    h = norm(x) * (1 + m[:, None, 1]) + m[:, None, 0]
    want = x + m[:, None, 2] * linear(block.attn.proj, attend(*linear(block.attn.qkv, h).chunk(3, -1)))
    k, v = linear(block.cross.kv, context).chunk(2, -1)
    want = want + linear(block.cross.proj, attend(linear(block.cross.q, norm(want)), k, v))
    h = norm(want) * (1 + m[:, None, 4]) + m[:, None, 3]
    h = torch.nn.functional.gelu(linear(block.mlp.fc1, h), approximate="tanh")
    want = want + m[:, None, 5] * linear(block.mlp.fc2, h)
    torch.testing.assert_close(block(x, c, context), want, rtol=1e-4, atol=1e-5)


def test_whole_model_by_hand():
    model = shaken(tiny())
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([10.0, 990.0]), torch.tensor([1, 5])
    c = model.t_embedder.mlp(D.time_features(t)) + model.y_embedder.embedding_table.weight[y]
    kernel, bias = model.x_embedder.proj.weight.flatten(1), model.x_embedder.proj.bias
    patches = [x[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].flatten(1) @ kernel.T + bias for i in range(4) for j in range(4)]
    h = torch.stack(patches, 1) + model.pos_embed
    for block in model.blocks:
        h = block(h, c)
    shift, scale = model.final_layer.adaLN_modulation(c).view(2, 2, 32).unbind(1)
    h = model.final_layer.linear(F.layer_norm(h, (32,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None])
    want = torch.zeros(2, 8, 8, 8)
    for i in range(4):
        for j in range(4):
            want[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2] = h[:, 4 * i + j].view(2, 2, 2, 8).permute(0, 3, 1, 2)
    torch.testing.assert_close(model(x, t, y), want, atol=1e-5, rtol=1e-4)
    assert not model.pos_embed.requires_grad


def test_initial_scale():
    fresh = D.DiT(8, 2, 4, 256, 1, 4, classes=500)
    for w in (fresh.t_embedder.mlp[0].weight, fresh.t_embedder.mlp[2].weight, fresh.y_embedder.embedding_table.weight):
        assert w.std().item() == pytest.approx(0.02, rel=0.05)


def test_qkv_order_matters():
    model = shaken(tiny())
    args = torch.randn(1, 4, 8, 8), torch.tensor([10.0]), torch.tensor([1])
    before = model(*args)
    qkv = model.blocks[0].attn.qkv
    q, k, v = qkv.weight.data.chunk(3)
    qkv.weight.data = torch.cat([v, q, k])
    assert not torch.allclose(model(*args), before)


@pytest.mark.parametrize("layout", ["facebook", "trainer", "diffusers", "own"])
def test_layouts_give_the_same_output(layout, tmp_path):
    import argparse

    model = shaken(tiny(heads=4))
    state, path = model.state_dict(), tmp_path / ("m.pt" if layout in ("facebook", "trainer") else "m.safetensors")
    if layout == "facebook":
        torch.save(state, path)
    elif layout == "trainer":
        zeros = {k: torch.zeros_like(v) for k, v in state.items()}
        torch.save({"model": zeros, "ema": state, "opt": {}, "args": argparse.Namespace(lr=1e-4)}, path)
    elif layout == "diffusers":
        save_file({k: v.contiguous().clone() for k, v in D.to_diffusers(state).items()}, path)
    else:
        ckpt.export(path, state, dit=model.config)
    loaded = D.load_dit(path, **({} if layout == "own" else dict(heads=4, input_size=8)))
    args = torch.randn(2, 4, 8, 8), torch.tensor([10.0, 990.0]), torch.tensor([1, 5])
    assert torch.equal(loaded(*args), model(*args))
    assert not any(p.requires_grad for p in loaded.parameters())


def test_diffusers_names_round_trip():
    state = shaken(tiny()).state_dict()
    back = D.from_diffusers(D.to_diffusers(state))
    assert back.keys() == state.keys() - {"pos_embed"} and all(torch.equal(back[k], state[k]) for k in back)


def test_diffusers_names_written_out():
    s, b = shaken(tiny()).state_dict(), "transformer_blocks.1."
    d = D.to_diffusers(s)
    pairs = {
        "proj_out_1": "final_layer.adaLN_modulation.1", "proj_out_2": "final_layer.linear", "pos_embed.proj": "x_embedder.proj",
        b + "attn1.to_out.0": "blocks.1.attn.proj", b + "ff.net.0.proj": "blocks.1.mlp.fc1", b + "ff.net.2": "blocks.1.mlp.fc2",
        b + "norm1.linear": "blocks.1.adaLN_modulation.1", b + "norm1.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
        b + "norm1.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
    }  # fmt: skip
    for theirs, ours in pairs.items():
        assert torch.equal(d[theirs + ".weight"], s[ours + ".weight"]) and torch.equal(d[theirs + ".bias"], s[ours + ".bias"])
    for i, name in enumerate("qkv"):
        assert torch.equal(d[f"{b}attn1.to_{name}.weight"], s["blocks.1.attn.qkv.weight"][32 * i : 32 * i + 32])
    assert torch.equal(d[b + "norm1.emb.class_embedder.embedding_table.weight"], s["y_embedder.embedding_table.weight"])


def test_averaged_weights_are_taken_and_the_side_is_read_beside_the_file(tmp_path):
    state = shaken(tiny()).state_dict()
    torch.save({"model": state, "ema": {k: v + 1 for k, v in state.items()}}, tmp_path / "e.pt")
    assert torch.equal(D.read_tensors(tmp_path / "e.pt")[0]["x_embedder.proj.bias"], state["x_embedder.proj.bias"] + 1)
    save_file({k: v.contiguous().clone() for k, v in D.to_diffusers(state).items()}, tmp_path / "d.safetensors")
    (tmp_path / "config.json").write_text('{"sample_size": 12}')
    assert D.load_dit(tmp_path / "d.safetensors", heads=4).config["input_size"] == 12


def test_without_sigma_keeps_the_first_channels(tmp_path):
    model = shaken(tiny())
    torch.save(model.state_dict(), tmp_path / "m.pt")
    half = D.load_dit(tmp_path / "m.pt", heads=4, input_size=8, learn_sigma=False)
    args = torch.randn(2, 4, 8, 8), torch.tensor([10.0, 990.0]), torch.tensor([1, 5])
    assert half.final_layer.linear.weight.shape[0] == 16
    torch.testing.assert_close(half(*args), model(*args)[:, :4], rtol=0, atol=0)
    wrong = torch.cat([model.state_dict()["final_layer.linear.weight"][:16]])  # rows 0..15 would be another thing
    assert not torch.equal(half.final_layer.linear.weight, wrong)


def test_a_latent_of_another_side_is_refused():
    model = D.DiT(8, 2, 4, 32, 1, 2, classes=3)
    with pytest.raises(ValueError, match="4 x 16 does not fit a DiT for 8 x 8"):  # as many tokens
        model(torch.zeros(1, 4, 4, 16), torch.zeros(1), torch.zeros(1, dtype=torch.long))
    half = model.bfloat16()
    assert half(torch.zeros(1, 4, 8, 8).bfloat16(), torch.zeros(1), torch.zeros(1, dtype=torch.long)).dtype == torch.bfloat16


def test_another_grid_recomputes_positions(tmp_path):
    torch.save(shaken(tiny()).state_dict(), tmp_path / "m.pt")
    large = D.load_dit(tmp_path / "m.pt", heads=4, input_size=16)
    assert large.pos_embed.shape == (1, 64, 32)
    assert torch.equal(large.pos_embed, D.sincos_2d(32, torch.arange(8), torch.arange(8)))


def test_positions_stay_in_the_range_that_was_trained_at_every_further_side(tmp_path):
    """8, 16, then 32: the last file has the range of the first, which a file has to tell."""
    path = tmp_path / "m.safetensors"
    save_file(shaken(tiny()).state_dict(), path)
    for side in (16, 32):
        model = D.load_dit(path, heads=4, input_size=side, resample=True)
        ckpt.export(path, model.state_dict(), dit=model.config)
        places = torch.arange(side // 2) * (8 / side)
        assert torch.equal(model.pos_embed, D.sincos_2d(32, places, places)) and model.config["extent"] == 4
    places = torch.arange(32) / 4  # the last step, gone on with
    assert torch.equal(D.load_dit(path, input_size=64).pos_embed, D.sincos_2d(32, places, places))


def test_add_and_context_reach_the_output():
    model = shaken(tiny(cross=True, classes=0))
    x, t, context = torch.randn(1, 4, 8, 8), torch.tensor([10.0]), torch.randn(1, 3, 32)
    base = model(x, t, context=context)
    assert not torch.equal(model(x, t, add=torch.ones(1, 32), context=context), base)
    assert not torch.equal(model(x, t, context=context + 1), base)


@pytest.mark.parametrize(
    "change, call, words",
    [
        (lambda s: s.pop("blocks.1.mlp.fc1.bias"), dict(heads=4), ["missing ['blocks.1.mlp.fc1.bias']"]),
        (lambda s: s.update(more=torch.zeros(1)), dict(heads=4), ["unexpected ['more']"]),
        (lambda s: s.pop("x_embedder.proj.weight"), dict(heads=4), ["x_embedder.proj.weight"]),
        (lambda s: None, {}, ["how many heads", "DiT-XL/2"]),
        (lambda s: None, dict(size="DiT-XL/2"), ["not a DiT-XL/2", "dim is 32, not 1152"]),
        (lambda s: None, dict(size="DiT-H/2"), ["DiT-H/2", "unknown"]),
        (lambda s: s.update({"pos_embed": torch.zeros(3)}), dict(heads=4), ["cannot be loaded"]),
    ],
)
def test_wrong_files_are_named(tmp_path, change, call, words):
    state = tiny().state_dict()
    change(state)
    torch.save(state, tmp_path / "m.pt")
    with pytest.raises(ValueError, match=r"m\.pt") as error:
        D.load_dit(tmp_path / "m.pt", **call)
    assert all(w in str(error.value) for w in words), str(error.value)


def test_sizes_must_fit():
    with pytest.raises(ValueError, match="latent side 7 must be a multiple of the patch 2"):
        tiny(input_size=7)
    with pytest.raises(ValueError, match="width 32 cannot be divided by 3 heads"):
        tiny(heads=3)
