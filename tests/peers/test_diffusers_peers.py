"""common/vae.py and common/dit.py against diffusers with the same random weights, saved and loaded through safetensors.

pip install -r tests/peers/requirements.txt, then: pytest tests/peers
"""

import pytest
import torch
from safetensors.torch import save_file

from common.dit import load_dit, to_diffusers
from common.vae import from_layout, load_vae, to_layout
from common.vision import torchvision  # noqa: F401


@pytest.fixture(scope="module")
def diffusers():
    return pytest.importorskip("diffusers")


def shake(model, seed=0):
    g = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.data += 0.02 * torch.randn(p.shape, generator=g)
    return model.eval().requires_grad_(False)


def autoencoder(diffusers, widths=(64, 128, 128), z=4, **more):
    n = len(widths)
    return shake(diffusers.AutoencoderKL(
        3, 3, ("DownEncoderBlock2D",) * n, ("UpDecoderBlock2D",) * n, widths, layers_per_block=2, latent_channels=z,
        norm_num_groups=32, sample_size=64, **more))  # fmt: skip


@pytest.mark.parametrize("layout", ["diffusers", "diffusers-old", "compvis"])
def test_autoencoder(diffusers, layout, tmp_path):
    theirs = autoencoder(diffusers)
    state = {k: v.contiguous() for k, v in to_layout(from_layout(theirs.state_dict()), layout, 3).items()}
    save_file(state, tmp_path / "m.safetensors")
    ours = load_vae(tmp_path / "m.safetensors", scale=0.5)
    x = torch.randn(2, 3, 64, 32)
    posterior = theirs.encode(x).latent_dist
    mean, logvar = ours.encode(x)
    torch.testing.assert_close(mean, posterior.mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logvar, posterior.logvar, rtol=1e-5, atol=1e-5)
    z = torch.randn(2, 4, 16, 8)
    torch.testing.assert_close(ours.decode(z * 0.5), theirs.decode(z).sample, rtol=1e-5, atol=1e-5)


def test_autoencoder_folder_without_quant_convolutions(diffusers, tmp_path):
    theirs = autoencoder(
        diffusers, z=16, use_quant_conv=False, use_post_quant_conv=False, scaling_factor=1.5, shift_factor=0.06
    )
    theirs.save_pretrained(tmp_path)
    ours = load_vae(tmp_path)
    assert (ours.scale, ours.shift) == (1.5, 0.06)
    z = torch.randn(1, 16, 8, 8)
    torch.testing.assert_close(ours.decode((z - 0.06) * 1.5), theirs.decode(z).sample, rtol=1e-5, atol=1e-5)


def test_full_size_keys(diffusers):
    from common.vae import VAE

    with torch.device("meta"):
        theirs = diffusers.AutoencoderKL(3, 3, ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4, (128, 256, 512, 512), 2)
        ours = VAE()
    want = {k: v.shape for k, v in theirs.state_dict().items()}
    assert {k: v.shape for k, v in ours.state_dict().items()} == want


def transformer(diffusers, heads=4, width=16, depth=3):
    """Their time frequencies are 10,000^(-k / 127), those of the published model 10,000^(-k / 128): set right here."""
    model = shake(diffusers.DiTTransformer2DModel(
        heads, width, 4, 8, depth, norm_num_groups=32, sample_size=16, patch_size=2, num_embeds_ada_norm=10))  # fmt: skip
    for block in model.transformer_blocks:
        assert block.norm1.emb.time_proj.downscale_freq_shift == 1
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    return model


def test_transformer(diffusers, tmp_path):
    theirs = transformer(diffusers)
    save_file(
        {k: v.contiguous() for k, v in theirs.state_dict().items() if not k.startswith("pos_embed.pos")},
        tmp_path / "m.safetensors",
    )
    ours = load_dit(tmp_path / "m.safetensors", heads=4, input_size=16)
    # diffusers repeats the embedders in every block and reads the first for the last layer: make them equal first
    state = {k: v for k, v in to_diffusers(ours.state_dict()).items()}
    assert state.keys() == {k for k in theirs.state_dict() if not k.startswith("pos_embed.pos")}
    theirs.load_state_dict(state, strict=False)
    x, t, y = torch.randn(2, 4, 16, 16), torch.tensor([7, 981]), torch.tensor([3, 10])
    want = theirs(x, timestep=t, class_labels=y).sample
    torch.testing.assert_close(ours(x, t, y), want, rtol=1e-5, atol=1e-5)


def test_training_gradients(diffusers, tmp_path):
    theirs = transformer(diffusers, depth=2).requires_grad_(True).eval()
    save_file({k: v.detach().contiguous() for k, v in theirs.state_dict().items()
               if not k.startswith("pos_embed.pos")}, tmp_path / "m.safetensors")  # fmt: skip
    ours = load_dit(tmp_path / "m.safetensors", heads=4, input_size=16).requires_grad_(True)
    theirs.load_state_dict(to_diffusers(ours.state_dict()), strict=False)
    torch.manual_seed(0)
    x, t, y = torch.randn(2, 4, 16, 16), torch.tensor([7, 981]), torch.tensor([3, 10])
    ours(x, t, y).square().sum().backward()
    theirs(x, timestep=t, class_labels=y).sample.square().sum().backward()
    block = theirs.transformer_blocks[1]
    pairs = [(ours.blocks[1].mlp.fc1.weight, block.ff.net[0].proj.weight), (ours.blocks[1].attn.proj.bias, block.attn1.to_out[0].bias),
             (ours.blocks[1].adaLN_modulation[1].weight, block.norm1.linear.weight), (ours.x_embedder.proj.weight, theirs.pos_embed.proj.weight)]  # fmt: skip
    for a, b in pairs:  # sums over many positions in float32, relative to the largest entry: 6e-7 to 1e-5, by the weights
        assert (a.grad - b.grad).abs().max() < 3e-5 * b.grad.abs().max()
