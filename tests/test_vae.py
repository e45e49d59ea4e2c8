"""common/vae.py: sizes, layouts, padding, attention, features, tiles; note weights_vae_dit (b)."""

import copy
import math
import os
import re
import subprocess
import sys
import time

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from common import ckpt
from common import vae as V
from data_prep import train_vae
from tests.helpers import ROOT, inside, user_error


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    return V.VAE(8, (1, 2, 2), 1, 4, 4, scale=0.5, shift=0.25).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def names():
    """Keys and shapes of the full model without allocating it."""
    with torch.device("meta"):
        vae = V.VAE()
    return {k: tuple(v.shape) for k, v in vae.state_dict().items()}


def test_published_sizes(names):
    def total(prefix):
        part = {k: s for k, s in names.items() if k.startswith(prefix)}
        return len(part), sum(torch.Size(s).numel() for s in part.values())

    assert total("") == (248, 83_653_863)
    assert total("encoder.") == (106, 34_163_592) and total("decoder.") == (138, 49_490_179)
    assert total("quant_conv.") == (2, 72) and total("post_quant_conv.") == (2, 20)


def test_published_keys(names):
    """The lines of the published listing, written out."""
    want = {}

    def add(key, shape, bias=True):
        want[f"{key}.weight"] = shape
        if bias:
            want[f"{key}.bias"] = shape[:1]

    def block(key, a, b):
        (
            add(f"{key}.norm1", (a,)),
            add(f"{key}.conv1", (b, a, 3, 3)),
            add(f"{key}.norm2", (b,)),
            add(f"{key}.conv2", (b, b, 3, 3)),
        )
        if a != b:
            add(f"{key}.conv_shortcut", (b, a, 1, 1))

    for side in ("encoder", "decoder"):
        for i in (0, 1):
            block(f"{side}.mid_block.resnets.{i}", 512, 512)
        add(f"{side}.mid_block.attentions.0.group_norm", (512,))
        for k in ("to_q", "to_k", "to_v", "to_out.0"):
            add(f"{side}.mid_block.attentions.0.{k}", (512, 512))
    add("encoder.conv_in", (128, 3, 3, 3)), add("encoder.conv_norm_out", (512,)), add("encoder.conv_out", (8, 512, 3, 3))
    for i, (a, b) in enumerate([(128, 128), (128, 256), (256, 512), (512, 512)]):
        block(f"encoder.down_blocks.{i}.resnets.0", a, b), block(f"encoder.down_blocks.{i}.resnets.1", b, b)
        if i < 3:
            add(f"encoder.down_blocks.{i}.downsamplers.0.conv", (b, b, 3, 3))
    add("decoder.conv_in", (512, 4, 3, 3)), add("decoder.conv_norm_out", (128,)), add("decoder.conv_out", (3, 128, 3, 3))
    for i, (a, b) in enumerate([(512, 512), (512, 512), (512, 256), (256, 128)]):
        for j in range(3):
            block(f"decoder.up_blocks.{i}.resnets.{j}", a if j == 0 else b, b)
        if i < 3:
            add(f"decoder.up_blocks.{i}.upsamplers.0.conv", (b, b, 3, 3))
    add("quant_conv", (8, 8, 1, 1)), add("post_quant_conv", (4, 4, 1, 1))
    assert names == want


def test_layouts_round_trip(small):
    state = small.state_dict()
    for layout in ("diffusers", "diffusers-old", "compvis"):
        there = V.to_layout(state, layout, 3)
        back = V.from_layout(there)
        assert back.keys() == state.keys() and all(torch.equal(back[k], state[k]) for k in state), layout
    compvis = V.to_layout(state, "compvis", 3)
    assert "decoder.up.2.block.0.norm1.weight" in compvis and compvis["encoder.mid.attn_1.q.weight"].ndim == 4
    assert "decoder.up.2.upsample.conv.weight" in compvis and "decoder.up.0.upsample.conv.weight" not in compvis
    assert torch.equal(compvis["decoder.up.2.block.0.norm1.weight"], state["decoder.up_blocks.0.resnets.0.norm1.weight"])
    assert any(k.endswith("nin_shortcut.weight") for k in compvis) and not any("conv_shortcut" in k for k in compvis)


@pytest.mark.parametrize("layout", ["diffusers", "diffusers-old", "compvis"])
@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_files_of_every_layout_give_the_same_output(layout, kind, tmp_path):
    torch.manual_seed(0)
    vae = V.VAE(32, (1, 2), 1, 4, 32).eval()
    state = {k: v.contiguous() for k, v in V.to_layout(vae.state_dict(), layout, 2).items()}
    path = tmp_path / f"m.{kind}"
    if kind == "safetensors":
        save_file(state, path)
    else:  # a whole checkpoint, as trainers write them
        state = {f"first_stage_model.{k}": v for k, v in state.items()}
        state |= {
            "first_stage_model.loss.logvar": torch.zeros(1),
            "model.diffusion_model.w": torch.zeros(2),
            "model_ema.x": torch.zeros(1),
        }
        torch.save({"state_dict": state, "epoch": 3}, path)
    loaded = V.load_vae(path)
    x = torch.randn(2, 3, 16, 16)
    assert all(torch.equal(v, vae.state_dict()[k]) for k, v in loaded.state_dict().items()) and loaded.scale == 0.18215
    torch.testing.assert_close(loaded.encode(x)[0], vae.encode(x)[0], atol=1e-5, rtol=1e-5)  # of another memory layout
    z = torch.randn(2, 4, 8, 8)
    assert torch.equal(loaded.decode(z), vae.decode(z))


def test_half_precision_no_quant_and_config_beside(tmp_path):
    vae = V.VAE(32, (1, 1), 1, 16, 32, quant=False)
    save_file({k: v.half() for k, v in vae.state_dict().items()}, tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text('{"scaling_factor": 1.5, "shift_factor": 0.125, "latent_channels": 16}')
    loaded = V.load_vae(tmp_path)
    assert (loaded.scale, loaded.shift, loaded.z, loaded.post_quant_conv) == (1.5, 0.125, 16, None)
    assert next(loaded.parameters()).dtype == torch.float32
    assert V.load_vae(tmp_path, scale=2.0, shift=0.0).scale == 2.0
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match="how latents are scaled"):  # of Stable Diffusion 1 they are not
        V.load_vae(tmp_path)
    (tmp_path / "config.json").write_text('{"scaling_factor": 1.5, "shift_factor": 0.125, "latent_channels": 16}')
    mean = torch.randn(1, 16, 4, 4)
    assert torch.allclose(loaded.to_latent(mean), (mean - 0.125) * 1.5)


def test_own_export_knows_its_settings(small, tmp_path):
    ckpt.export(tmp_path / "v.safetensors", small.state_dict(), vae=small.config)
    loaded = V.load_vae(tmp_path / "v.safetensors")
    assert loaded.config == small.config and loaded.fingerprint() == small.fingerprint()
    assert V.load_vae(tmp_path / "v.safetensors", scale=0.7).fingerprint() != small.fingerprint()


def test_shapes_and_sides(small):
    mean, logvar = small.encode(torch.zeros(1, 3, 64, 48))
    assert mean.shape == logvar.shape == (1, 4, 16, 12) and small.decode(mean).shape == (1, 3, 64, 48)
    with pytest.raises(ValueError, match="30 x 32 are not divisible by the autoencoder's 4"):
        small.encode(torch.zeros(1, 3, 30, 32))
    with torch.device("meta"):
        big = V.VAE()
    assert big.encode(torch.zeros(1, 3, 64, 64, device="meta"))[0].shape == (1, 4, 8, 8)


def test_downsampling_pads_right_and_bottom_only():
    down = V.Down(1)
    torch.nn.init.ones_(down.conv.weight), torch.nn.init.zeros_(down.conv.bias)
    impulse = torch.zeros(1, 1, 8, 8)
    impulse[0, 0, 0, 0] = (
        1  # with symmetric padding the window of output (0, 0) would be centred on it, and reach one side only
    )
    impulse[0, 0, 7, 7] = 1
    out = down(impulse)[0, 0]
    assert out.shape == (4, 4) and out[0, 0] == 1 and out[3, 3] == 1 and out.sum() == 2
    moved = torch.zeros(1, 1, 8, 8)
    moved[0, 0, 2, 2] = 1  # row 2 belongs to windows 0-2 and 2-4
    assert down(moved)[0, 0, :2, :2].tolist() == [[1, 1], [1, 1]]


@pytest.mark.parametrize("side", [(5, 7), (1, 1)])
def test_upsampling_equals_doubling_then_convolution(side):
    torch.manual_seed(0)
    up, x = V.Up(6).double(), torch.randn(2, 6, *side).double().requires_grad_()
    want = up.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
    g = torch.randn_like(want)
    grads = [torch.autograd.grad(y, [x, *up.parameters()], g) for y in (up(x), want)]
    torch.testing.assert_close(up(x), want)
    torch.testing.assert_close(*grads)


def test_attention_equals_loops():
    torch.manual_seed(0)
    block = V.AttnBlock(8, 4)
    x = torch.randn(2, 8, 3, 2)
    h = F.group_norm(x, 4, block.group_norm.weight, block.group_norm.bias, 1e-6).flatten(2).transpose(1, 2)
    q, k, v = block.to_q(h), block.to_k(h), block.to_v(h)
    out = torch.zeros_like(h)
    for b in range(2):
        for i in range(6):
            scores = torch.stack([q[b, i] @ k[b, j] for j in range(6)]) * 8**-0.5
            out[b, i] = sum(w * v[b, j] for j, w in enumerate(scores.softmax(0)))
    want = x + block.to_out[0](out).transpose(1, 2).view(2, 8, 3, 2)
    torch.testing.assert_close(block(x), want, rtol=1e-5, atol=1e-5)


def test_group_norm_epsilon(small):
    norms = [m for m in small.modules() if isinstance(m, torch.nn.GroupNorm)]
    assert len(norms) > 10 and all(m.eps == 1e-6 for m in norms)
    x = torch.randn(1, 8, 4, 4) * 1e-3  # a near-constant map tells 1e-6 from torch's 1e-5
    assert norms[0](x).std() > 0.6 > F.group_norm(x, 4, eps=1e-5).std()


def test_features_are_the_decoder(small):
    z = torch.randn(2, 4, 5, 6)
    maps = small.features(z)
    assert [tuple(m.shape[1:]) for m in maps] == [(16, 5, 6), (16, 10, 12), (16, 20, 24), (8, 20, 24)]
    assert torch.equal(small.decoder.image(maps[-1]), small.decode(z))
    by_hand = small.decoder.conv_in(small.post_quant_conv(z / 0.5 + 0.25))
    assert torch.equal(maps[0], small.decoder.mid_block(by_hand))


def test_checkpointed_features_have_the_same_gradient(small):
    grads = []
    for checkpoint in (False, True):
        z = torch.ones(1, 4, 4, 4).requires_grad_()
        sum(m.square().mean() for m in small.features(z, checkpoint)).backward()
        grads.append(z.grad)
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-7)


def test_tiles_blend_to_about_the_whole(small):
    vae = copy.deepcopy(small)  # norms and attention see a tile at a time; without them only the tiles' rims differ
    for m in vae.decoder.modules():
        for name, child in m.named_children():
            if isinstance(child, torch.nn.GroupNorm | V.AttnBlock):
                setattr(m, name, torch.nn.Identity())
    vae.decoder.mid_block.attentions = torch.nn.ModuleList([torch.nn.Identity()])
    torch.manual_seed(1)
    z = torch.randn(1, 4, 36, 50)
    whole, tiled = vae.decode(z), vae.decode(z, tile=20)
    assert tiled.shape == whole.shape == (1, 3, 144, 200)
    error = (whole - tiled).abs()[0].mean(0)
    assert error[:50, :50].max() < 1e-6  # inside the first tile, away from the blend (its rim: 15 to 20 in latents)
    assert error.mean() < 0.02 * whole.std() and error.max() < whole.std()
    assert torch.equal(vae.decode(z, tile=64), whole)


def test_posterior_sample(small):
    mean, logvar, noise = torch.ones(1, 4, 1, 1), torch.full((1, 4, 1, 1), 2 * math.log(3)), torch.full((1, 4, 1, 1), 2.0)
    torch.testing.assert_close(small.to_latent(mean, logvar, noise), torch.full((1, 4, 1, 1), (1 + 3 * 2 - 0.25) * 0.5))
    big = V.VAE(8, (1, 2), 1, 4, 4).eval()
    big.quant_conv.bias.data[:] = torch.tensor([0.0] * 4 + [99, -99, 99, -99])
    logvar = big.encode(torch.zeros(1, 3, 8, 8))[1]
    assert logvar.amax() == 20 and logvar.amin() == -30


def test_resblock_and_mid_by_hand():
    torch.manual_seed(0)
    block, x = V.ResBlock(8, 12, 4), torch.randn(2, 8, 5, 5)

    def norm(m, v):
        g = v.view(2, 4, -1)
        g = (g - g.mean(2, keepdim=True)) / (g.var(2, unbiased=False, keepdim=True) + 1e-6).sqrt()
        return g.view(v.shape) * m.weight.view(-1, 1, 1) + m.bias.view(-1, 1, 1)

    def silu(v):
        return v / (1 + (-v).exp())

    h = block.conv2(silu(norm(block.norm2, block.conv1(silu(norm(block.norm1, x))))))
    torch.testing.assert_close(block(x), block.conv_shortcut(x) + h, atol=1e-5, rtol=1e-5)
    mid, x = V.MidBlock(8, 4), torch.randn(1, 8, 3, 3)
    torch.testing.assert_close(mid(x), mid.resnets[1](mid.attentions[0](mid.resnets[0](x))))


def test_names_of_the_attention_written_out(small):
    state, a = small.state_dict(), "mid_block.attentions.0."
    old, comp = V.to_layout(state, "diffusers-old", 3), V.to_layout(state, "compvis", 3)
    for mine, theirs, short in (("to_q", "query", "q"), ("to_k", "key", "k"), ("to_v", "value", "v"),
                                ("to_out.0", "proj_attn", "proj_out")):  # fmt: skip
        w = state[f"decoder.{a}{mine}.weight"]
        assert torch.equal(old[f"decoder.{a}{theirs}.weight"], w)
        assert torch.equal(comp[f"decoder.mid.attn_1.{short}.weight"][:, :, 0, 0], w)
    assert torch.equal(comp["decoder.mid.attn_1.norm.weight"], state[f"decoder.{a}group_norm.weight"])


def test_scaling_and_groups_come_from_where_they_should(tmp_path):
    save_file(V.VAE(8, (1, 2), 1, 4, 4).state_dict(), tmp_path / "diffusion_pytorch_model.safetensors")
    beside = tmp_path / "config.json"
    beside.write_text('{"scaling_factor": 1.5, "shift_factor": 0.125, "norm_num_groups": 4}')
    vae = V.load_vae(tmp_path)
    assert {m.num_groups for m in vae.modules() if isinstance(m, torch.nn.GroupNorm)} == {4} and vae.config["groups"] == 4
    assert V.load_vae(tmp_path, shift=0.0).shift == 0 and V.load_vae(tmp_path, scale=2.0).config["scale"] == 2
    prints = {V.load_vae(tmp_path, shift=s).fingerprint() for s in (0.0, 0.5)} | {vae.fingerprint()}
    vae.quant_conv.weight.data[0] += 1
    assert len(prints | {vae.fingerprint()}) == 4  # weights and scaling are both of it
    beside.write_text('{"scaling_factor": 1.5, "norm_num_groups": 4, "latents_mean": [0, 0, 0, 0]}')
    with pytest.raises(ValueError, match="each channel"):
        V.load_vae(tmp_path)


def test_whole_checkpoints_by_their_prefix(tmp_path):
    state = V.VAE(32, (1, 1), 1, 4, 32).state_dict()
    torch.save({f"vae.{k}": w for k, w in state.items()} | {"unet.x": torch.zeros(1)}, tmp_path / "m.pt")
    assert torch.equal(V.load_vae(tmp_path / "m.pt").state_dict()["quant_conv.bias"], state["quant_conv.bias"])
    torch.save({f"first_stage_model.{k}": w for k, w in state.items()} | {"conditioner.x": torch.zeros(1)}, tmp_path / "xl.pt")
    with pytest.raises(ValueError, match="how latents are scaled"):  # SDXL's differs, and its file does not say it
        V.load_vae(tmp_path / "xl.pt")


def test_kl():
    assert train_vae.kl(torch.zeros(2, 3), torch.zeros(2, 3)) == 0
    mean, logvar = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 1.0]])
    q, p = torch.distributions.Normal(mean, (logvar / 2).exp()), torch.distributions.Normal(0.0, 1.0)
    torch.testing.assert_close(train_vae.kl(mean, logvar), torch.distributions.kl_divergence(q, p).sum())


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda s: s.pop("decoder.conv_out.bias"), ["missing", "decoder.conv_out.bias"]),
        (lambda s: s.update({"decoder.more": torch.zeros(1)}), ["unexpected", "decoder.more"]),
        (lambda s: s.update({"decoder.conv_out.weight": torch.zeros(3, 8, 1, 1)}), ["decoder.conv_out.weight is (3, 8, 1, 1)"]),
        (lambda s: s.clear() or s.update({"w": torch.zeros(2)}), ["not an autoencoder"]),
    ],
)
def test_wrong_files_are_named(small, tmp_path, change, words):
    state = {k: v.clone() for k, v in small.state_dict().items()}
    change(state)
    ckpt.export(tmp_path / "v.safetensors", state, vae=small.config)
    with pytest.raises(ValueError, match=r"v\.safetensors") as error:
        V.load_vae(tmp_path / "v.safetensors")
    assert all(w in str(error.value) for w in words), str(error.value)


def test_unreadable_files(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        V.load_vae(tmp_path / "none.pt")
    (tmp_path / "bad.safetensors").write_bytes(b"\xff" * 100)
    (tmp_path / "bad.pt").write_bytes(b"not a file")
    for name in ("bad.safetensors", "bad.pt"):
        with pytest.raises(ValueError, match="cannot|can be read safely"):
            V.load_vae(tmp_path / name)


def test_train_vae_resumes_exactly_and_its_file_loads(tmp_path):
    base = ["--preset", "smoke", "--steps", "16", "--save_every", "1", "--out_dir"]
    assert inside(train_vae, *base, tmp_path / "a").returncode == 0
    process = subprocess.Popen([sys.executable, "data_prep/train_vae.py", *base, str(tmp_path / "b")], cwd=ROOT,
                               stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())})  # fmt: skip
    while process.poll() is None and not (tmp_path / "b" / "last.pt").exists():
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (tmp_path / "b" / "metrics.json").exists()
    assert inside(train_vae, *base, tmp_path / "b").returncode == 0
    same = [(tmp_path / d / "model.safetensors").read_bytes() for d in "ab"]
    assert same[0] == same[1]
    vae = V.load_vae(tmp_path / "a" / "model.safetensors")
    assert vae.z == 8 and re.fullmatch(r"[0-9a-f]{16}", vae.fingerprint())
    user_error(inside(train_vae, "--size", "30", "--out_dir", tmp_path / "c"), "--size 30", "multiple of 4")
    user_error(inside(train_vae, "--groups", "5", "--out_dir", tmp_path / "c"), "--groups 5")
    user_error(inside(train_vae, "--vgg", "none.pth", "--out_dir", tmp_path / "c"), "none.pth", "does not exist")
