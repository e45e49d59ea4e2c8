"""common/metrics.py against slow definitions, torchvision and exact constants."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

from common import metrics as M
from common.vision import torchvision
from tests.helpers import in_processes


def gauss(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_accuracy_and_mean_per_class():
    scores, y = torch.eye(3)[[0, 0, 0, 1, 0]], torch.tensor([0, 0, 0, 1, 1])
    assert M.accuracy(scores, y) == pytest.approx(80) and M.accuracy(scores, y, per_class=True) == pytest.approx(75)


def test_a_caption_fits_every_record_that_has_it():
    texts, match = M.caption_matches([{"captions": ["a", "b"]}, {"captions": ["b"]}, {"captions": ["c", "c"]}])
    assert texts == ["a", "b", "b", "c", "c"]
    assert match.tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 0], [0, 0, 1], [0, 0, 1]]


def test_retrieval_equals_loops_and_ties_do_not_help():
    torch.manual_seed(0)
    q, x = torch.randn(20, 6), torch.randn(30, 6)
    match = torch.rand(20, 30) < 0.1
    match[torch.arange(20), torch.arange(20)] = True
    got = M.retrieval_recall(q, x, match, (1, 3))
    for k in (1, 3):
        hits = [match[i][(x @ q[i]).argsort(descending=True)[:k]].any() for i in range(20)]
        assert got[k] == pytest.approx(100 * sum(map(float, hits)) / 20)
    constant = M.retrieval_recall(torch.ones(4, 2), torch.ones(5, 2), torch.eye(4, 5).bool())
    assert constant[1] == 0.0  # a collapsed encoder scores nothing
    assert (
        M.retrieval_recall(torch.full((4, 2), math.nan), torch.ones(5, 2), torch.eye(4, 5).bool())[1] == 0.0
    )  # nor a diverged one
    assert M.retrieval_recall(q, x, torch.zeros(20, 30).bool(), (40,))[40] == 0.0


def test_pictures_are_resized_and_cropped_as_by_torchvision():
    T = torchvision.transforms
    rng = np.random.default_rng(0)
    for w, h in ((640, 480), (333, 500), (120, 61), (500, 375)):
        img = Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8))
        for size, crop, ours in ((224, 224, M.clip_input([img])), (256, 224, M.dino_input([img], crop=True))):
            theirs = T.CenterCrop(crop)(T.Resize(size, T.InterpolationMode.BICUBIC)(img))
            kind = "clip" if size == 224 else "dino"
            assert torch.equal(ours, M._normalised([theirs], kind)), (w, h, size)


def test_frechet_distance_against_the_matrix_root():
    """The definition, by eigenvalues of Sx Sy."""
    g = torch.Generator().manual_seed(0)
    x, y = (
        torch.randn(300, 12, generator=g).double(),
        (torch.randn(200, 12, generator=g) @ torch.randn(12, 12, generator=g)).double() + 1,
    )
    sx, sy = torch.cov(x.T), torch.cov(y.T)
    root = torch.linalg.eigvals(sx @ sy).real.clamp_min(0).sqrt().sum()
    want = (x.mean(0) - y.mean(0)).square().sum() + sx.trace() + sy.trace() - 2 * root
    assert M.frechet_distance(x, y) == pytest.approx(want.item(), rel=1e-9)
    assert M.frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert M.frechet_distance(x, x + 2) == pytest.approx(48, rel=1e-9)  # a shift of 2 in 12 dimensions
    few = x[:5]  # fewer rows than columns: a singular covariance
    assert 0 < M.frechet_distance(few, y) < float("inf")
    with pytest.raises(ValueError, match="equal columns"):
        M.frechet_distance(x, y[:, :5])


def test_knn_equals_loops():
    torch.manual_seed(0)
    f, y, g, z = torch.randn(40, 5), torch.randint(0, 3, (40,)), torch.randn(15, 5), torch.randint(0, 3, (15,))
    right = 0
    for v, label in zip(g, z):
        cosine = torch.cosine_similarity(f, v[None], dim=1)
        votes = torch.zeros(3)
        for i in cosine.argsort(descending=True)[:7]:
            votes[y[i]] += torch.exp(cosine[i] / 0.07)
        right += int(votes.argmax() == label)
    assert M.knn_accuracy(f, y, g, z, 7) == pytest.approx(100 * right / 15)
    assert M.knn_accuracy(f, y, f, y, 1) == 100


def test_linear_probe_reaches_the_minimum_and_separates():
    torch.manual_seed(0)
    y = torch.randint(0, 3, (90,))
    f = torch.eye(3)[y] * 4 + torch.randn(90, 3) + 100
    probe = M.linear_probe(f, y, 1e-3)
    assert M.accuracy(probe(f), y) > 95
    # the gradient vanishes: softmax minus labels, with the penalty, on standardised features
    x = (f - f.mean(0)) / f.std(0)
    W = torch.linalg.lstsq(torch.cat([x, torch.ones(90, 1)], 1), probe(f)).solution
    grad = x.T @ (probe(f).softmax(1) - torch.eye(3)[y]) / 90 + 1e-3 * W[:3]
    assert grad.abs().max() < 2e-3


# Sets of pictures


def exact_moments(mean, cov, n=101):
    """Moments with given values, as if seen."""
    m = M.Moments()
    m.n, m.mean, m.scatter = n, torch.tensor(mean, dtype=torch.float64), torch.tensor(cov, dtype=torch.float64) * (n - 1)
    return m


def test_frechet_constants():
    assert exact_moments([0.0], [[1.0]]).frechet(exact_moments([3.0], [[4.0]])) == pytest.approx(10)
    A, B = exact_moments([0.0, 0], [[2.0, 1], [1, 2]]), exact_moments([0.0, 0], [[3.0, -1], [-1, 1]])
    assert A.frechet(B) == pytest.approx(1.397279504456863, abs=1e-12) and B.frechet(A) == pytest.approx(A.frechet(B))
    diagonal = exact_moments([0.0, 0], [[4.0, 0], [0, 9]]).frechet(exact_moments([0.0, 0], [[1.0, 0], [0, 1]]))
    assert diagonal == pytest.approx(1 + 4)


def _share_of_moments(env, x):
    from common import ddp

    part = M.Moments().update(x[env.rank :: env.world][:7]).update(x[env.rank :: env.world][7:])
    return M.Moments.join(ddp.gather_lists([part])).frechet(M.Moments().update(x * 2 + 1))


def test_streamed_and_distributed_moments_equal_all_at_once(tmp_path):
    x = gauss(60, 5) @ gauss(5, 5, seed=1) + 1e4  # a large mean: sums of squares would cancel
    want = M.frechet_distance(x, x * 2 + 1)
    assert in_processes(2, _share_of_moments, x, path=tmp_path) == [pytest.approx(want, rel=1e-6)] * 2
    assert M.Moments.join([M.Moments(), M.Moments().update(x)]).n == 60


def test_frechet_invariances():
    x, y = gauss(80, 6), gauss(70, 6, seed=1) * 1.5 + 0.3
    turn = torch.linalg.qr(gauss(6, 6, seed=2)).Q
    want = M.frechet_distance(x, y)
    assert M.frechet_distance(x @ turn + 3, y @ turn + 3) == pytest.approx(want, rel=1e-5)
    assert M.frechet_distance(3 * x, 3 * y) == pytest.approx(9 * want, rel=1e-6)
    assert M.Moments().update(x).frechet(M.Moments().update(y)) == pytest.approx(want, rel=1e-9)
    wide = gauss(60, 512)
    assert np.isfinite(M.frechet_distance(wide, wide + 1)) and M.frechet_distance(wide, wide) < 1e-9


@pytest.mark.parametrize("noise", [1e-3, 1e-6, 1e-9, 0.0])
def test_frechet_distance_of_nearly_dependent_columns(noise):
    """Cholesky's way and, for singular covariances, the other: both against singular values of the features themselves."""
    g = torch.Generator().manual_seed(0)
    mix = torch.randn(6, 300, generator=g, dtype=torch.float64)
    x, y = (torch.randn(n, 6, generator=g, dtype=torch.float64) @ mix for n in (900, 700))
    x, y = (v + noise * torch.randn(v.shape, generator=g, dtype=torch.float64) for v in (x, y))
    a, b = ((v - v.mean(0)) / (len(v) - 1) ** 0.5 for v in (x, y))
    want = (
        (x.mean(0) - y.mean(0)).square().sum() + a.square().sum() + b.square().sum() - 2 * torch.linalg.svdvals(a @ b.T).sum()
    )
    assert M.frechet_distance(x, y) == pytest.approx(want.item(), rel=1e-8)
    assert M.Moments().update(x).frechet(M.Moments().update(y)) == pytest.approx(want.item(), rel=1e-6)


def test_the_bias_of_the_distance_follows_its_law():
    """Two samples of one Gaussian, n rows and d columns each, n >> d: 2 d / n for the means, and a quarter of E |Sx - Sy|^2, which
    is d (d + 1) / (2 n), for the covariances."""
    d, n = 16, 4000
    g = torch.Generator().manual_seed(0)
    mean = np.mean([M.frechet_distance(*torch.randn(2, n, d, generator=g, dtype=torch.float64)) for _ in range(60)])
    assert mean == pytest.approx(d * (d + 5) / (2 * n), rel=0.03)


def test_nothing_finite_comes_of_nan():
    x = torch.randn(40, 6)
    bad = x.clone()
    bad[3, 2] = math.nan
    for measure in (M.frechet_distance, M.kernel_distance, M.cmmd):
        with pytest.raises(ValueError, match="NaN"):
            measure(x, bad)
    with pytest.raises(ValueError, match="NaN"):
        M.inception_score(bad)
    assert M.Moments().update(x[:0]).update(x).frechet(M.Moments().update(x)) == pytest.approx(0, abs=1e-9)


def test_precision_to_coverage_do_not_depend_on_the_order():
    x, y = gauss(60, 5), gauss(50, 5, seed=1)
    a = torch.randperm(60, generator=torch.Generator().manual_seed(2))
    assert M.prdc(x[a], y.flip(0), 4) == pytest.approx(M.prdc(x, y, 4))


def test_frechet_infinity_removes_the_bias_of_few_samples():
    x, y = gauss(4000, 16), gauss(400, 16, seed=1)  # the same distribution: the distance is 0
    biased, limit = M.frechet_distance(x, y), M.frechet_infinity(x, y)
    assert biased > 0.2 and abs(limit) < biased / 3
    assert M.frechet_infinity(x, y) == limit


def test_kernel_distance_constants_and_bias():
    zero, one = torch.zeros(2, 1), torch.ones(2, 1)
    assert M.kernel_distance(zero, one, subsets=3) == pytest.approx(7)
    pair = torch.tensor([[0.0], [1.0]])
    assert M.kernel_distance(pair, pair, subsets=1) == pytest.approx(-3.5)
    same = [M.kernel_distance(gauss(100, 8, seed=2 * i), gauss(100, 8, seed=2 * i + 1), 1, 100) for i in range(40)]
    assert abs(np.mean(same)) < 3 * np.std(same) / 40**0.5 + 0.02  # unbiased
    with pytest.raises(ValueError, match="two rows"):
        M.kernel_distance(one[:1], one)


def test_cmmd_constants():
    e = torch.eye(2)
    assert M.cmmd(e[:1], e[1:]) == pytest.approx(19.9003325, abs=1e-6)
    assert M.cmmd(e[:1], -e[:1]) == pytest.approx(39.6026534, abs=1e-6)
    x = gauss(300, 8)
    assert M.cmmd(x, 5 * x) == pytest.approx(0, abs=1e-9)  # only directions count
    assert M.cmmd(x, x + 1, block=7) == pytest.approx(M.cmmd(x, x + 1)) and M.cmmd(x, x + 1) > 0


@pytest.mark.parametrize("closed", [False, True])
def test_prdc_equals_the_definition(closed):
    x, y = gauss(60, 4).double(), (gauss(45, 4, seed=1) * 0.8).double()
    y[:6] = x[:6]  # ties
    y[6:12] = y[6]
    k, inside = 3, (lambda a, b: a <= b) if closed else (lambda a, b: a < b)

    def radius(z, i):
        return sorted(((z[i] - z[j]).square().sum()).item() for j in range(len(z)) if j != i)[k - 1]

    rx, ry = [radius(x, i) for i in range(60)], [radius(y, j) for j in range(45)]
    d = [[(x[i] - y[j]).square().sum().item() for j in range(45)] for i in range(60)]
    ball = [[inside(d[i][j], rx[i]) for j in range(45)] for i in range(60)]
    want = {"precision": np.mean([any(ball[i][j] for i in range(60)) for j in range(45)]),
            "recall": np.mean([any(inside(d[i][j], ry[j]) for j in range(45)) for i in range(60)]),
            "density": np.sum(ball) / (k * 45), "coverage": np.mean([any(row) for row in ball])}  # fmt: skip
    assert M.prdc(x, y, k, closed, block=17) == pytest.approx(want)
    turn = torch.linalg.qr(gauss(4, 4, seed=2).double()).Q
    if not closed:  # a rotation breaks exact ties
        free = slice(12, None)
        assert M.prdc(x @ turn, y[free] @ turn, k) == pytest.approx(M.prdc(x, y[free], k))
        assert M.prdc(7 * x + 1e3, 7 * y[free] + 1e3, k) == pytest.approx(M.prdc(x, y[free], k))


def test_prdc_constants_and_duplicates():
    def line(*values):
        return torch.tensor(values)[:, None]

    for closed in (False, True):
        a = M.prdc(line(0.0, 1, 2, 3), line(0.5, 1.5, 10, 11), 1, closed)
        assert a == {"precision": 0.5, "recall": 0.75, "density": 1.0, "coverage": 0.75}
    for k in (1, 2):
        b = M.prdc(line(0.0, 1, 3, 7), line(0.5, 2.5, 6, 20), k)
        assert b == {"precision": 0.75, "recall": 1.0, "density": 1.0, "coverage": 1.0}
    one = torch.ones(8, 2)
    assert set(M.prdc(one, one, 3).values()) == {0.0}
    assert M.prdc(one, one, 3, closed=True) == pytest.approx({"precision": 1, "recall": 1, "density": 8 / 3, "coverage": 1})
    x = gauss(30, 3)
    assert set(M.prdc(x, x, 1).values()) == {1.0} and set(M.prdc(x, x + 1e3).values()) == {0.0}


def test_prdc_roles():
    """Few modes, all of them real: precise, and most of the real world is missing."""
    collapsed, real = 0.1 * gauss(200, 16), 3 * gauss(200, 16, seed=1)
    got = M.prdc(real, collapsed, 3)
    assert got["precision"] > 0.8 and got["recall"] < 0.3
    swapped = M.prdc(collapsed, real, 3)
    assert (swapped["precision"], swapped["recall"]) == (got["recall"], got["precision"])
    real[0] = 100  # one outlier and generated pictures beside it: density is not fooled, precision is
    fooled = M.prdc(real, 100 + 0.1 * gauss(200, 16), 3)
    assert fooled["precision"] == 1 and fooled["density"] < 0.5


def test_density_and_coverage_have_their_expectation():
    got = [M.prdc(gauss(60, 8, seed=i), gauss(40, 8, seed=i + 1000), 3) for i in range(200)]
    assert np.mean([g["density"] for g in got]) == pytest.approx(1, abs=0.04)
    assert np.mean([g["coverage"] for g in got]) == pytest.approx(1 - math.comb(59, 3) / math.comb(99, 3), abs=0.02)
    for bad, words in ((gauss(5, 2), "6 rows"), (torch.full((9, 2), torch.nan), "NaN")):
        with pytest.raises(ValueError, match=words):
            M.prdc(gauss(9, 2), bad)


def test_vendi_constants():
    assert M.vendi(torch.eye(7)) == pytest.approx(7) and M.vendi(torch.ones(9, 4)) == pytest.approx(1)
    assert M.vendi(torch.eye(2)[[0, 0, 0, 1]]) == pytest.approx(1.7547653506)
    assert M.vendi(torch.tensor([[1, 0.5], [0.5, 1]]), "given") == pytest.approx(1.7547653506)
    assert M.vendi(torch.full((5, 5), 0.3) + 0.7 * torch.eye(5), "given") == pytest.approx(4.3156788803, abs=1e-6)
    assert M.vendi(torch.tensor([[1, 0.9, 0], [0.9, 1, 0], [0, 0, 1]]), "given") == pytest.approx(2.1573, abs=1e-4)
    s = torch.tensor([0.0, 0, 10, 10, 20, 20], dtype=torch.float64)
    K = torch.exp(-(s[:, None] - s).abs())
    assert M.vendi(K, "given") == pytest.approx(2.9999999959, abs=1e-9)
    few, many = gauss(5, 20), gauss(20, 5)  # both sides of the smaller Gram matrix
    for x in (few, many):
        unit = F.normalize(x.double(), dim=1)
        assert M.vendi(x) == pytest.approx(M.vendi(unit @ unit.T, "given"))
        p = torch.linalg.eigvalsh(unit @ unit.T / len(x)).clamp_min(0)
        assert M.vendi(x, q=math.inf) == pytest.approx(1 / p.max().item())
        assert M.vendi(x, q=2) == pytest.approx(1 / p.square().sum().item())
    with pytest.raises(ValueError, match="NaN"):
        M.vendi(torch.full((3, 2), torch.nan))


def test_inception_score_constants():
    sure = torch.eye(5).repeat(8, 1) * 1e3
    assert M.inception_score(sure, 1) == (pytest.approx(5), 0)
    assert M.inception_score(torch.zeros(20, 4)) == (pytest.approx(1), pytest.approx(0))
    p = torch.tensor([[0.9, 0.1], [0.1, 0.9]]).log()
    assert M.inception_score(p, 1)[0] == pytest.approx(1.4449348112)
    with pytest.raises(ValueError, match="10 splits"):
        M.inception_score(p)


def test_clip_scores():
    a = torch.tensor([[1.0, 0], [1, 0]])
    b = torch.tensor([[0.4, 0.84**0.5], [-0.2, 0.96**0.5]]) * 3
    assert M.clip_score(a, b).tolist() == [pytest.approx(1.0), 0.0]
    refs = torch.stack([b, -b], 1)
    assert M.ref_clip_score(a, b, refs)[0] == pytest.approx(2 * 1 * 1 / 2)
    assert M.ref_clip_score(a, b, refs)[1] == 0


def test_kernel_distance_equals_loops_and_draws_of_both_sets():
    x, y = gauss(7, 5).double(), gauss(7, 5, seed=1).double() + 0.5

    def k(a, b):
        return (float(a @ b) / 5 + 1) ** 3

    pairs = [(i, j) for i in range(7) for j in range(7) if i != j]
    want = sum(k(x[i], x[j]) + k(y[i], y[j]) for i, j in pairs) / 42 - 2 * sum(k(a, b) for a in x for b in y) / 49
    assert M.kernel_distance(x, y, subsets=1) == pytest.approx(want, rel=1e-12)
    y = torch.cat([x[:5], x[:5] + 100])  # the second half of y must be drawn, too, and the second of x
    for a, b in ((x[:5], y), (y, x[:5])):
        assert M.kernel_distance(a, b, subsets=20) > 1e3


def test_inception_score_of_parts():
    logits = gauss(20, 4) * 3
    p = logits.double().softmax(1)[np.random.RandomState(2020).permutation(20)]
    scores = []
    for part in (p[:10], p[10:]):
        q = part.mean(0)
        scores.append(math.exp(np.mean([sum(float(v * (v / w).log()) for v, w in zip(row, q)) for row in part])))
    assert M.inception_score(logits, 2) == (pytest.approx(np.mean(scores)), pytest.approx(np.std(scores)))


def test_ref_clip_score_is_a_harmonic_mean():
    a, b = torch.tensor([[1.0, 0]]), torch.tensor([[0.6, 0.8]])
    refs = torch.tensor([[[0.0, 1.0], [-1.0, 0.0]]])  # CLIPScore 1.5, largest cosine to a reference 0.8
    assert M.ref_clip_score(a, b, refs)[0] == pytest.approx(2 * 1.5 * 0.8 / 2.3)


def test_published_constants_and_the_squash():
    assert M.MEAN_STD["clip"] == ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))  # OpenAI's
    assert M.MEAN_STD["dino"] == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # ImageNet's
    wide = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 120, 3), dtype=np.uint8))
    T = torchvision.transforms
    square = T.Compose([T.Resize((224, 224), T.InterpolationMode.BICUBIC), T.ToTensor(), T.Normalize(*M.MEAN_STD["dino"])])
    torch.testing.assert_close(M.dino_input([wide])[0], square(wide))


def test_frechet_infinity_needs_two_sizes():
    with pytest.raises(ValueError, match="too few"):
        M.frechet_infinity(gauss(50, 3), gauss(2, 3))


# The FID network


@pytest.fixture(scope="module")
def fid(tmp_path_factory):
    """Ours, and torchvision's with the pooling branches patched as the published network has them; equal random weights."""
    torch.manual_seed(0)
    theirs = torchvision.models.inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False).eval()
    for m in theirs.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(m.running_var, 0.5, 1.5)
            torch.nn.init.normal_(m.running_mean, std=0.1)
    kinds = torchvision.models.inception

    def patched(block, pool):
        def pool_only(x, *args, **options):  # the blocks call F.avg_pool2d on their own input
            return pool(x)

        old = block.forward

        def forward(x):
            kinds.F = type("F", (), {**vars(F), "avg_pool2d": staticmethod(pool_only)})
            try:
                return old(x)
            finally:
                kinds.F = F

        block.forward = forward

    for name, block in theirs.named_children():
        if name == "Mixed_7c":
            patched(block, lambda x: F.max_pool2d(x, 3, 1, 1))
        elif isinstance(block, kinds.InceptionA | kinds.InceptionC | kinds.InceptionE):
            patched(block, lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False))
    state = {k: v for k, v in theirs.state_dict().items() if not k.endswith("num_batches_tracked")}
    path = tmp_path_factory.mktemp("fid") / "pt_inception.safetensors"
    save_file(state, path)
    return M.inception_features(path), theirs, path


def test_fid_network_equals_patched_torchvision(fid):
    ours, theirs, _ = fid
    assert sum(p.numel() for p in ours.parameters()) == 23_850_960
    state = {k: v for k, v in ours.state_dict().items() if not k.endswith("num_batches_tracked")}
    assert len(state) == 472 and sum(v.numel() for v in state.values()) == 23_885_392
    assert sum(isinstance(m, torch.nn.Conv2d) for m in ours.modules()) == 94
    x = gauss(2, 3, 299, 299)
    with torch.no_grad():
        f = ours.pooled(x)
        want = theirs.fc(f) - theirs.fc.bias
        torch.testing.assert_close(ours.logits(f), want, atol=1e-5, rtol=1e-5)
        theirs.fc = torch.nn.Identity()
        torch.testing.assert_close(f, theirs(x), atol=1e-5, rtol=1e-4)
        pictures = torch.randint(0, 256, (3, 3, 40, 32), dtype=torch.uint8)
        one = torch.cat([ours(p[None]) for p in pictures])
        torch.testing.assert_close(ours(pictures), one, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="uint8"):
        ours(x)


def test_fid_weights_are_checked(fid, tmp_path):
    state = fid[0].state_dict()
    torch.save({k: v for k, v in state.items()}, tmp_path / "net.pth")  # with num_batches_tracked
    assert M.inception_features(tmp_path / "net.pth", "clean").resize == "clean"
    torch.save(state, tmp_path / "pt_inception-2015-12-05-6726825d.pth")
    del state["fc.bias"]
    torch.save(state, tmp_path / "short.pth")
    (tmp_path / "text.pth").write_text("no")
    for name, words in (("pt_inception-2015-12-05-6726825d.pth", "SHA-256"), ("short.pth", "fc.bias"),
                        ("text.pth", "cannot be read"), ("absent.pth", "does not exist")):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            M.inception_features(tmp_path / name)


def test_three_resizing_rules():
    row = torch.tensor([0, 1, 2, 3], dtype=torch.uint8).view(1, 1, 1, 4).expand(1, 3, 4, 4)
    half = (M.resize_299(row) + 1) / 2 * 255
    tf1 = M.resize_299(row, "tf1") * 128 + 128
    at = torch.arange(299) * 4 / 299
    torch.testing.assert_close(tf1[0, 0, 0], at.clamp_max(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(half[0, 0, 0], ((torch.arange(299) + 0.5) * 4 / 299 - 0.5).clamp(0, 3), atol=1e-4, rtol=0)
    flat = torch.full((1, 3, 50, 70), 77, dtype=torch.uint8)
    assert ((M.resize_299(flat) + 1) * 127.5 - 77).abs().max() < 1e-3
    for rule in ("tf1", "clean"):
        assert (M.resize_299(flat, rule) * 128 + 128 - 77).abs().max() < 1e-3
    board = torch.zeros(1, 3, 598, 598, dtype=torch.uint8)
    board[..., ::2, 1::2] = board[..., 1::2, ::2] = 255
    aliased, grey = (M.resize_299(board, rule) for rule in ("tf1", "clean"))
    assert (aliased == -1).all() and grey[..., 2:-2, 2:-2].abs().max() < 0.03  # every second pixel, or their mean
    with pytest.raises(ValueError, match="unknown"):
        M.resize_299(flat, "nearest")


def test_inputs_of_dino_and_clip():
    wide = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 120, 3), dtype=np.uint8))
    from torchvision.transforms import v2 as t

    squash, crop, clip = M.dino_input([wide]), M.dino_input([wide], crop=True), M.clip_input([wide, wide.convert("L")])
    assert squash.shape == crop.shape == clip[:1].shape == (1, 3, 224, 224) and clip.shape[0] == 2
    want = t.Compose([t.Resize(224, t.InterpolationMode.BICUBIC), t.CenterCrop(224), t.PILToTensor(),
                      t.ToDtype(torch.float32, scale=True), t.Normalize(*M.MEAN_STD["clip"])])(wide)  # fmt: skip
    torch.testing.assert_close(clip[0], want)
    assert not torch.allclose(squash, crop)


def test_radii_of_tight_clusters_are_float64s():
    """Two clusters so far apart that float32 cannot tell neighbours inside one of them."""
    g = torch.Generator().manual_seed(0)
    x = 0.01 * torch.randn(60, 8, dtype=torch.float64, generator=g)
    x[30:] += 100.0
    far = torch.cdist(x, x).square().fill_diagonal_(torch.inf)
    torch.testing.assert_close(M.knn_radius(x, 5, block=16), far.kthvalue(5, 1).values, rtol=1e-6, atol=0)


# By hand ---------------------------------------------------------------------------------------------------------------


def test_the_linear_probe_minimises_its_loss():
    """The penalty is half the squared weights, not those of the bias: the gradient of exactly this loss is zero."""
    y = torch.tensor([0, 0, 0, 0, 0, 1])
    f = gauss(6, 2).double().float()
    probe = M.linear_probe(f, y, 0.5)
    b = probe(f.mean(0, keepdim=True))[0]
    W = torch.stack([probe((f.mean(0) + f.std(0) * e)[None])[0] - b for e in torch.eye(2)], 1).requires_grad_()
    b.requires_grad_()
    (F.cross_entropy((f - f.mean(0)) / f.std(0) @ W.T + b, y) + 0.25 * W.square().sum()).backward()
    assert W.grad.abs().max() < 1e-4 and b.grad.abs().max() < 1e-4 and b.detach().abs().max() > 0.3


def test_votes_of_neighbours_do_not_depend_on_lengths():
    f, y = torch.tensor([[1.0, 0], [0.8, 0.6], [0, 1]]), torch.tensor([0, 1, 1])
    test, want = torch.tensor([[0.99, 0.1]]), torch.tensor([0])
    for length in (1e-3, 1, 1e3):
        assert M.knn_accuracy(f, y, length * test, want, 3, tau=0.07) == 100
        assert M.knn_accuracy(torch.tensor([[5.0], [1], [0.1]]) * f, y, test, want, 3, tau=10) == 0  # two votes against one


def test_frechet_infinity_is_the_intercept_of_the_line_through_its_subsets():
    x, y, g = gauss(60, 3), gauss(40, 3, seed=1), torch.Generator().manual_seed(7)
    sizes = [4, 22, 40]
    d = [M.frechet_distance(x, y[torch.randperm(40, generator=g)[:m]]) for m in sizes]
    slope, intercept = np.polyfit([1 / m for m in sizes], d, 1)
    assert M.frechet_infinity(x, y, points=3, seed=7) == pytest.approx(intercept, rel=1e-6)
    assert M.frechet_infinity(x, y, points=3, seed=8) != pytest.approx(intercept, rel=1e-3)


def test_random_subsets_follow_the_seed():
    x, y = gauss(30, 4), gauss(30, 4, seed=1)
    a, b = (M.kernel_distance(x, y, 2, 8, seed) for seed in (0, 1))
    assert a == M.kernel_distance(x, y, 2, 8) and a != b
    logits = gauss(40, 4)
    a, b = (M.inception_score(logits, 2, seed)[0] for seed in (2020, 1))
    assert a == M.inception_score(logits, 2)[0] and a != b


def test_sizes_of_inputs():
    wide = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    assert M.clip_input([wide], 32).shape == M.dino_input([wide], size=32).shape == (1, 3, 32, 32)
    assert torch.equal(M.clip_input([wide], 40), M._normalised([wide.crop((10, 0, 50, 40))], "clip"))
    assert M.dino_input([wide], crop=True, size=28).shape == (1, 3, 28, 28)
    want = wide.resize((48, 32), Image.BICUBIC).crop((10, 2, 38, 30))  # 32 = 28 * 8 / 7
    assert torch.equal(M.dino_input([wide], crop=True, size=28), M._normalised([want], "dino"))


def test_clean_resizing_is_bicubic_clipped_and_not_rounded():
    x = torch.randint(0, 2, (1, 3, 12, 12), generator=torch.Generator().manual_seed(0), dtype=torch.uint8) * 255
    v = M.resize_299(x, "clean") * 128 + 128
    want = np.asarray(Image.fromarray(x[0, 0].numpy().astype(np.float32)).resize((299, 299), Image.BICUBIC))
    assert want.min() < -5 and want.max() > 260  # bicubic overshoots at edges
    torch.testing.assert_close(v[0, 0], torch.from_numpy(want.clip(0, 255)), atol=1e-3, rtol=0)


def test_moments_without_rows_join():
    x = gauss(9, 3)
    joined = M.Moments.join([M.Moments(), M.Moments().update(x[:4]), M.Moments(), M.Moments().update(x[4:])])
    torch.testing.assert_close(joined.scatter / 8, torch.cov(x.T.double()))
    assert joined.n == 9 and M.Moments.join([M.Moments(), M.Moments()]).n == 0


def test_the_smallest_subset_is_a_tenth_but_no_more_than_5000_rows(monkeypatch):
    seen, update = [], M.Moments.update
    monkeypatch.setattr(M.Moments, "update", lambda self, x: seen.append(len(x)) or update(self, x))
    for rows, first in ((60_000, 5000), (200, 20), (9, 2)):
        M.frechet_infinity(gauss(10, 1), gauss(rows, 1), points=3)
        assert (seen[1], seen[3]) == (first, rows)
        seen.clear()


def test_features_that_are_no_numbers_are_refused_part_by_part():
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="hold NaN or infinity"):
            M.Moments().update(torch.tensor([[0.0, 1], [bad, 0]]))
        with pytest.raises(ValueError, match="hold NaN or infinity"):
            M.frechet_infinity(torch.rand(9, 2), torch.full((9, 2), bad))
