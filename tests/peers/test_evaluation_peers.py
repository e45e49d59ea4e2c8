"""common/metrics.py against the published packages on random features: prdc, vendi-score, pytorch-fid, clean-fid, torch-fidelity;
methods/pareto_eval.py against pymoo, methods/dp_rdm.py against opacus, dp-accounting and faiss."""

import numpy as np
import pytest
import torch

from common import metrics as M
from common.vision import torchvision  # noqa: F401

rng = np.random.default_rng(0)
X, Y = rng.normal(size=(500, 32)), rng.normal(size=(400, 32)) * 0.9 + 0.1
x, y = torch.from_numpy(X), torch.from_numpy(Y)


def test_prdc():
    peer = pytest.importorskip("prdc")
    for k in (3, 5):
        assert M.prdc(x, y, k) == pytest.approx({n: float(v) for n, v in peer.compute_prdc(X, Y, k).items()}, abs=1e-12)


def test_vendi():
    scipy = pytest.importorskip("scipy")
    if not hasattr(scipy.sparse, "csr"):
        scipy.sparse.csr = scipy.sparse  # the package asks for a module that newer scipy no longer has
    peer = pytest.importorskip("vendi_score.vendi")
    unit = X / np.linalg.norm(X, axis=1, keepdims=True)
    assert M.vendi(x) == pytest.approx(peer.score_dual(unit), rel=1e-9) == peer.score_X(unit)
    K = unit @ unit.T
    assert M.vendi(torch.from_numpy(K), "given", q=2) == pytest.approx(peer.score_K(K, q=2), rel=1e-9)


def statistics(f):
    return f.mean(0), np.cov(f, rowvar=False)


def test_frechet_distance():
    pytest.importorskip("scipy")
    pytest.importorskip("pytorch_fid")
    from pytorch_fid.fid_score import calculate_frechet_distance

    want = calculate_frechet_distance(*statistics(X), *statistics(Y))
    assert M.frechet_distance(x, y) == pytest.approx(want, rel=1e-8)
    assert M.Moments().update(x).frechet(M.Moments().update(y)) == pytest.approx(want, rel=1e-8)


def test_kernel_distance_on_whole_sets():
    """Subsets are drawn by other generators, so compare the formula: one subset with all rows."""
    pytest.importorskip("cleanfid")
    from cleanfid.fid import kernel_distance

    want = kernel_distance(X[:400], Y, num_subsets=1, max_subset_size=400)
    assert M.kernel_distance(x[:400], y, subsets=1, subset_size=400) == pytest.approx(want, rel=1e-9)


def test_inception_network_and_resizing():
    peer = pytest.importorskip("pytorch_fid.inception")
    torch.manual_seed(0)
    theirs = peer.fid_inception_v3.__globals__["_inception_v3"](num_classes=1008, aux_logits=False, weights=None)
    for block, kind in (("Mixed_5b", (192, 32)), ("Mixed_5c", (256, 64)), ("Mixed_5d", (288, 64))):
        setattr(theirs, block, peer.FIDInceptionA(kind[0], pool_features=kind[1]))
    for block, c in (("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160), ("Mixed_6e", 192)):
        setattr(theirs, block, peer.FIDInceptionC(768, channels_7x7=c))
    theirs.Mixed_7b, theirs.Mixed_7c = peer.FIDInceptionE_1(1280), peer.FIDInceptionE_2(2048)
    for m in theirs.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(m.running_var, 0.5, 1.5)
    ours = M.FidInception().eval()
    ours.load_state_dict(theirs.state_dict())
    theirs.fc, theirs.dropout = torch.nn.Identity(), torch.nn.Identity()
    images = torch.randint(0, 256, (3, 3, 64, 48), dtype=torch.uint8)
    with torch.no_grad():
        resized = torch.nn.functional.interpolate(images / 255, (299, 299), mode="bilinear", align_corners=False)
        torch.testing.assert_close(ours(images), theirs.eval()(2 * resized - 1), atol=1e-5, rtol=1e-4)


def test_tensorflows_resizing():
    pytest.importorskip("torch_fidelity")
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x as tf1

    for shape in ((2, 3, 40, 61), (1, 3, 400, 333)):
        images = torch.randint(0, 256, shape, dtype=torch.uint8)
        want = (tf1(images.float(), size=(299, 299), align_corners=False) - 128) / 128
        torch.testing.assert_close(M.resize_299(images, "tf1"), want, atol=1e-5, rtol=0)


def test_torch_fidelity_on_features():
    """Inception score (its order of the pictures, too), KID of whole sets, FD, precision and recall."""
    pytest.importorskip("torch_fidelity")
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    logits = 3 * torch.randn(503, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    want = isc_features_to_metric(logits)
    assert M.inception_score(logits) == pytest.approx(tuple(want.values()), rel=1e-9)
    a, b = x[:400], y  # as many of both, so that a subset is the set
    want = kid_features_to_metric(a, b, kid_subsets=1, kid_subset_size=400, verbose=False)
    assert M.kernel_distance(a, b, 1, 400) == pytest.approx(want["kernel_inception_distance_mean"], rel=1e-9)
    want = fid_statistics_to_metric(*(fid_features_to_statistics(f.float()) for f in (x, y)), False)
    assert M.frechet_distance(x, y) == pytest.approx(want["frechet_inception_distance"], rel=1e-4)
    want = prc_features_to_metric(y, x, prc_neighborhood=3, prc_batch_size=1000, save_cpu_ram=False, verbose=False)
    got = M.prdc(x, y, 3)
    assert (got["precision"], got["recall"]) == pytest.approx((want["precision"], want["recall"]), abs=1e-6)


def test_clean_resizing():
    pytest.importorskip("cleanfid")
    from cleanfid.resize import build_resizer

    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    resize = build_resizer("clean")
    want = torch.from_numpy(np.stack([resize(i.permute(1, 2, 0).numpy()) for i in images])).permute(0, 3, 1, 2)
    torch.testing.assert_close(M.resize_299(images, "clean") * 128 + 128, want, atol=1e-3, rtol=0)


def test_hypervolume():
    peer = pytest.importorskip("pymoo.indicators.hv")
    from methods.pareto_eval import hypervolume

    for d in (2, 3, 4):
        P = rng.random((40, d))
        assert hypervolume(P, [0.1] * d) == pytest.approx(float(peer.HV(ref_point=[-0.1] * d)(-P)), rel=1e-9)


def test_accountants():
    """Integer orders agree with both; fractional ones with opacus only: dp-accounting bounds them from above."""
    opacus = pytest.importorskip("opacus.accountants.analysis.rdp")
    google = pytest.importorskip("dp_accounting.pld.privacy_loss_distribution")
    from methods import dp_rdm

    for q, z in ((0.01, 1.0), (0.2, 3.0), (0.5, 0.7)):
        for alpha in (1.5, 2, 3.7, 8, 31):
            want = opacus.compute_rdp(q=q, noise_multiplier=z, steps=1, orders=[alpha])[0]
            assert dp_rdm.rdp(q, z, alpha) == pytest.approx(want, rel=1e-6)
        pld = google.from_gaussian_mechanism(z, sampling_prob=q, value_discretization_interval=1e-4).self_compose(50)
        assert dp_rdm.epsilon_pld(q, z, 50, 1e-5) == pytest.approx(pld.get_epsilon_for_delta(1e-5), abs=2e-4)


def test_nearest_neighbours():
    faiss = pytest.importorskip("faiss")
    from methods import dp_rdm

    bank = torch.nn.functional.normalize(torch.randn(20_000, 64), dim=1)
    queries, index = dp_rdm.unit(torch.randn(5, 64)), faiss.IndexFlatIP(64)
    index.add(bank.numpy())
    _, want = index.search(queries.float().numpy(), 10)
    assert [dp_rdm.nearest(u, bank, 10).tolist() for u in queries] == want.tolist()
