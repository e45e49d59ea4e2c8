"""methods/dp_rdm.py: accountants against the reference table, sensitivity, subsampling, the ledger under kill and race, the attack."""

import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from common import metrics
from data_prep import coco
from methods import dp_rdm as M
from tests.helpers import ROOT, both, in_processes, inside, user_error

SMALL = ["--preset", "smoke"]


# Accountants. Reference values: papers' code and two published packages, computed once (opacus 1.6.0, dp-accounting 0.6.0)


def test_products_in_threads_are_the_matrix_product():
    g = torch.Generator().manual_seed(0)
    x, q = torch.randn(50_001, 24, generator=g), torch.randn(24, generator=g)
    for rows in (x, x[::2], x[:1], x[:0]):  # also strided, few and none
        torch.testing.assert_close(M.products(rows, q, rows=7_000), (rows.double() @ q.double()).float())


def test_the_released_example():
    assert M.epsilon(0.01, 0.2 * 18 / 2, 1000, 1e-7) == pytest.approx(0.9968787608646338, abs=1e-9)
    assert M.to_epsilon(M.ORDERS, 1000 * M.rdp(0.01, 1.8, M.ORDERS), 1e-7)[1] == 25


EXACT = [  # q, z, order, Renyi divergence by 40-digit quadrature
    (1, 1.0, 2, 1.0),
    (0.01, 1.0, 1.5, 1.2725374332745e-4),
    (0.01, 1.0, 2, 1.7181342207454794e-4),
    (0.01, 1.0, 2.5, 2.1757533228188e-4),
    (0.01, 1.0, 3, 2.64637574584661e-4),
    (0.01, 1.0, 8, 8.93643907606028e-4),
    (0.01, 1.0, 10.9, 0.38761141130038889),
    (0.01, 1.0, 32, 11.246275937048069),
    (0.1, 2.0, 1.1, 1.5231703665298e-3),
    (0.1, 2.0, 2, 2.8362282662636e-3),
    (0.1, 2.0, 4.7, 7.2051340461394e-3),
    (0.01, 1.8, 25, 5.0023326263114e-4),
    (0.5, 0.7, 6.3, 5.6046656251734524),
    (0.5, 4.0, 1.1, 8.6737186115171517e-3),
    (0.5, 4.0, 5.6, 4.7485147720255153e-2),
    (0.001, 0.5, 5.5, 2.557208859227333),
    (1e-4, 1.0, 2, math.log1p(1e-8 * math.expm1(1))),
]


@pytest.mark.parametrize("q, z, alpha, want", EXACT)
def test_renyi_divergence(q, z, alpha, want):
    assert M.rdp(q, z, alpha) == pytest.approx(want, rel=1e-10)


def test_renyi_divergence_limits_and_both_formulas():
    assert M.rdp(0, 2.0, 3.3) == 0 and M.rdp(1, 2.0, 3.3) == pytest.approx(3.3 / 8)
    for q, z in ((1e-6, 4.0), (0.3, 0.8), (0.9, 2.0)):
        assert M.rdp(q, z, 2) == pytest.approx(math.log1p(q * q * math.expm1(1 / z**2)), rel=1e-12)
        whole = np.arange(2, 40).astype(float)  # the sum and the integral agree where both exist
        by_integral = M._log_moment(M._quadrature, whole, q, z) / (whole - 1)
        np.testing.assert_allclose(M.rdp(q, z, whole), by_integral, rtol=1e-9 if q > 1e-5 else 1e-5)
        grid = M.rdp(q, z, M.ORDERS)
        assert (np.diff(grid[np.argsort(M.ORDERS)]) >= -1e-15).all()
    for q, z in ((0.01, 0.06), (0.3, 0.2)):  # tiny noise: the chord of a convex function is above it, and costs no memory
        want = M._log_moment(M._quadrature, np.array([1.5, 3.7, 10.9]), q, z)
        bound = M._chord(np.array([1.5, 3.7, 10.9]), q, z)
        assert (bound >= want).all() and (bound < 2.1 * want).all()
    assert math.isfinite(M.epsilon(0.01, 1e-4, 10, 1e-5)) and M.epsilon(0.01, 0.0499, 10, 1e-5) > M.epsilon(
        0.01, 0.0501, 10, 1e-5
    )
    for bad in ((2, 1.0, 2), (0.1, 0.0, 2), (0.1, 1.0, 1.0)):
        with pytest.raises(ValueError):
            M.rdp(*bad)


TABLE = [  # q, z, queries, delta, classic, improved, privacy loss distribution
    (1, 1.0, 1, 1e-5, 5.298526, 4.728507, 4.37718),
    (1, 5.0, 10, 1e-5, 3.234859, 2.813653, 2.59438),
    (0.01, 1.0, 1000, 1e-5, 2.537983, 2.101365, 1.82824),
    (256 / 60000, 1.1, 14063, 1e-5, 3.008381, 2.596656, 2.38178),
    (0.01, 1.8, 1000, 1e-7, 1.165597, 0.996879, 0.92771),
    (0.05, 1.5, 1000, 1e-5, 6.700394, 6.018907, 5.53481),
    (0.001, 0.55, 10000, 1 / 82800, 5.254900, 4.438855, 3.47883),
    (0.01, 0.9, 10000, 1 / 82800, 9.063654, 8.250861, 7.59064),
    (0.1, 2.0, 100, 1e-6, 3.328044, 2.914173, 2.67504),
    (0.02, 0.6, 100, 1e-5, 8.100686, 7.087869, 5.84621),
    (0.5, 4.0, 50, 1e-5, 4.863527, 4.305842, 3.96143),
    (1e-4, 0.4, 10000, 1e-8, 9.982836, 9.028064, 7.61993),
]


@pytest.mark.parametrize("q, z, T, delta, classic, improved, pld", TABLE)
def test_epsilon_table(q, z, T, delta, classic, improved, pld):
    assert M.epsilon(q, z, T, delta, "classic") == pytest.approx(classic, abs=1e-5)
    assert M.epsilon(q, z, T, delta) == pytest.approx(improved, abs=1e-5)
    assert M.epsilon_pld(q, z, T, delta) == pytest.approx(pld, abs=2e-4)


def test_released_figure_and_operating_points():
    figure = {(0.15, 1e-2): (383.2329, 31.8786, 10.7181), (0.15, 1e-4): (22.6546, 2.9147, 1.1416),
              (0.25, 1e-3): (9.8071, 1.3633, 0.5699), (0.35, 1e-2): (20.0186, 4.9935, 2.9321),
              (0.35, 1e-4): (1.9851, 0.4083, 0.2151)}  # fmt: skip
    for (sigma, q), want in figure.items():
        assert [M.epsilon(q, sigma * k / 2, 10_000, 1e-8) for k in (4, 8, 12)] == pytest.approx(want, abs=6e-5)
    points = ((0.01, 0.5525, 100, 239e6, 9.950231, 10.878459, 8.624), (693 / 2**19, 0.35, 100, 82800, 10.000036, 11.295580, 7.782),
              (0.01, 0.575, 1000, 50000, 9.442927, 10.564613, 8.066))  # fmt: skip
    for q, z, T, N, improved, classic, pld in points:
        assert M.epsilon(q, z, T, 1 / N) == pytest.approx(improved, abs=1e-5)
        assert M.epsilon(q, z, T, 1 / N, "classic") == pytest.approx(classic, abs=1e-5)
        assert M.epsilon_pld(q, z, T, 1 / N) == pytest.approx(pld, abs=1e-3)


def test_inverses():
    assert M.find_k(10, 0.01, 0.065, 100, 1 / 239e6) == pytest.approx(16.9719, abs=1e-3)
    assert M.find_k(10, 0.01, 0.05, 1000, 1 / 50000) == pytest.approx(22.5986, abs=1e-3)
    assert M.find_q(10, 20, 0.035, 100, 1 / 82800) == 693 / 2**19  # the released bisection, to the bit
    coco = {(1, 1): (37.81, 21.05, 12.12), (1000, 0.1): (124.7, 73.4, 47.1), (10000, 0.01): (46.91, 33.08, 25.71)}
    for (T, q), want in coco.items():
        assert [M.find_k(e, q, 0.05, T, 1 / 82800) for e in (5, 10, 20)] == pytest.approx(want, rel=2e-3)
    for target in M.epsilon(0.02, 0.1 * 50 / 2, 10_000, 1 / 12_000) + np.array([-5e-5, 0, 5e-5]):  # within find_k's tolerance
        k = M.whole_k(target, 0.02, 0.1, 10_000, 1 / 12_000)
        assert k in (50, 51) and M.epsilon(0.02, 0.1 * k / 2, 10_000, 1 / 12_000) <= target
    k = M.find_k(7.0, 0.03, 0.1, 500, 1e-5)
    assert M.epsilon(0.03, 0.1 * k / 2, 500, 1e-5) == pytest.approx(7, abs=1e-4)
    assert M.find_sigma(7.0, 0.03, k, 500, 1e-5) == pytest.approx(0.1, rel=1e-3)
    T = M.find_queries(10, 0.01, 0.85, 1 / 82800)
    assert M.epsilon(0.01, 0.85, T, 1 / 82800) <= 10 < M.epsilon(0.01, 0.85, T + 1, 1 / 82800)
    assert M.find_queries(1, 1, 0.1, 1e-5) == 0
    for eps, q, sigma, T, delta in ((0.5, 1.0, 0.05, 100_000, 1 / 82_800), (0.14776, 0.00377, 0.0262, 1_983, 1 / 946_389)):
        k = M.whole_k(eps, q, sigma, T, delta)  # exact where epsilon is flat, too
        assert M.epsilon(q, sigma * k / 2, T, delta) <= eps < M.epsilon(q, sigma * (k - 1) / 2, T, delta)
    for f in (lambda: M.find_q(0.05, 20, 0.035, 100, 1e-5), lambda: M.whole_k(0.05, 0.1, 0.1, 100, 1e-5)):
        with pytest.raises(ValueError, match="orders certify"):
            f()
    with pytest.raises(ValueError, match="below what these orders certify"):
        M.find_k(1e-3, 0.02, 0.1, 1000, 1 / 12_000)


def test_closed_forms_and_order_of_the_bounds():
    def balle_wang(z, T, eps):
        def phi(x):
            return math.erfc(-x / math.sqrt(2)) / 2

        m = math.sqrt(T) / z
        return phi(m / 2 - eps / m) - math.exp(eps) * phi(-m / 2 - eps / m)

    for z, T in ((1.0, 1), (5.0, 10), (3.0, 4)):
        eps = M.epsilon_pld(1, z, T, 1e-5)
        assert balle_wang(z, T, eps) == pytest.approx(1e-5, rel=1e-4)
        rho, L = T / (2 * z * z), math.log(1e5)  # zCDP is the classic conversion over all real orders
        dense = 1 + np.linspace(0.01, 60, 60_000)
        assert M.to_epsilon(dense, T * M.rdp(1, z, dense), 1e-5, "classic")[0] == pytest.approx(
            rho + 2 * math.sqrt(rho * L), rel=1e-6
        )
    for z, T, delta in ((0.25, 1, 1e-9), (0.25, 10, 1e-9), (0.35, 1, 1e-8)):  # little noise: the bound stays the tighter one
        eps = M.epsilon_pld(1, z, T, delta)
        assert balle_wang(z, T, eps) == pytest.approx(delta, rel=0.01) and eps < M.epsilon(1, z, T, delta)
    for q, z, T, delta in ((0.03, 1.3, 200, 1e-6), (0.5, 3.0, 10, 1e-4), (0.002, 0.7, 5000, 1e-5)):
        pld, improved = M.epsilon_pld(q, z, T, delta), M.epsilon(q, z, T, delta)
        assert pld < improved < M.epsilon(q, z, T, delta, "classic")
        assert M.epsilon(q, z, 2 * T, delta) > improved > M.epsilon(q, 2 * z, T, delta)
        assert M.epsilon(q / 2, z, T, delta) < improved < M.epsilon(q, z, T, delta / 10)
    assert M.epsilon(0.1, 1.0, 0, 1e-5) == M.epsilon(0, 1.0, 9, 1e-5) == M.epsilon_pld(0.1, 1.0, 0, 1e-5) == 0
    assert M.epsilon_pld(1, 0.1, 1000, 1e-5) == math.inf
    for bad in ((0.1, 1.0, 1, 1.0), (0.1, 1.0, 1, 0.0)):
        with pytest.raises(ValueError, match="delta"):
            M.epsilon(*bad)
        with pytest.raises(ValueError, match="delta"):
            M.epsilon_pld(*bad)


# The mechanism


def mean_of(query, bank, k):
    return M.private_retrieve(query, bank, k, 0.0)


def test_without_noise_it_is_the_mean_of_the_nearest():
    g = torch.Generator().manual_seed(0)
    bank, query = torch.randn(500, 16, generator=g), torch.randn(16, generator=g)
    for k in (1, 7, 500):
        unit = torch.nn.functional.normalize(bank.double(), dim=1)
        best = (unit @ query.double()).argsort(descending=True)[:k]
        torch.testing.assert_close(mean_of(query, bank, k), unit[best].mean(0), atol=1e-12, rtol=0)
        got = M.nearest(M.unit(query[None])[0], bank, k, block=64)
        assert sorted(got.tolist()) == sorted(best.tolist())
    scaled = bank.clone()
    scaled[::3] *= 100
    torch.testing.assert_close(mean_of(query, scaled, 7), mean_of(query, bank, 7), atol=1e-7, rtol=0)
    same = torch.ones(40, 3)
    assert M.nearest(M.unit(same[:1])[0], same, 4).tolist() == [0, 1, 2, 3]  # ties: the lowest index


def test_sensitivity():
    """One record more changes the mean by 2/k at most; the worst case attains it; with fewer than k records it is 1/k."""
    g, k, worst = torch.Generator().manual_seed(0), 4, 0.0

    def answer(query, bank):
        rows = torch.arange(len(bank))
        best = M.nearest(M.unit(query[None])[0], bank, k, rows) if len(bank) else rows
        return M.unit(bank[best]).sum(0) / k if len(best) else torch.zeros(8, dtype=torch.float64)

    for _ in range(400):
        n = int(torch.randint(0, 12, (1,), generator=g))
        bank, x, query = torch.randn(n, 8, generator=g), torch.randn(1, 8, generator=g), torch.randn(8, generator=g)
        change = (answer(query, torch.cat([bank, x])) - answer(query, bank)).norm().item()
        worst = max(worst, change)
        assert change <= (2 / k if n >= k else 1 / k) + 1e-12
    assert worst > 0.3
    x = torch.eye(8)[:1]
    bank = -x.expand(k, 8)
    assert (answer(x[0], torch.cat([bank, x])) - answer(x[0], bank)).norm().item() == pytest.approx(2 / k)


def test_few_neighbours_are_divided_by_k_and_none_is_pure_noise():
    bank, query = torch.randn(6, 8), torch.randn(8)
    random = M.Random(0)
    random.subsample = lambda N, q: torch.tensor([2, 5])
    got = M.private_retrieve(query, bank, 4, 0.0, 0.5, random)
    torch.testing.assert_close(got, M.unit(bank[[2, 5]]).sum(0) / 4)
    random.subsample = lambda N, q: torch.zeros(0, dtype=torch.long)
    noise = torch.stack([M.private_retrieve(query, bank, 4, 0.3, 0.5, random) for _ in range(500)])
    assert noise.std().item() == pytest.approx(0.3, rel=0.05) and noise.mean().abs() < 0.03


def test_poisson_subsampling():
    random, N, q = M.Random(0), 400, 0.05
    draws = [random.subsample(N, q) for _ in range(3000)]
    sizes = np.array([len(d) for d in draws])
    assert sizes.mean() == pytest.approx(N * q, rel=0.02) and sizes.var() == pytest.approx(N * q * (1 - q), rel=0.08)
    hit = np.zeros((3000, N), bool)
    for i, d in enumerate(draws):
        assert (d.diff() > 0).all() and (len(d) == 0 or (0 <= d[0] and d[-1] < N))
        hit[i, d] = True
    share = hit.mean(0)
    assert abs(share - q).max() < 5 * math.sqrt(q * (1 - q) / 3000)  # the first and the last record too
    assert abs(np.corrcoef(hit[:, 3], hit[:, 4])[0, 1]) < 0.06 and len({tuple(d.tolist()) for d in draws}) > 2900
    assert len(random.subsample(7, 1.0)) == 7 and random.subsample(10**7, 1e-7).numel() < 20


def test_noise_and_fresh_draws():
    bank, query, random = torch.randn(50, 64), torch.randn(64), M.Random(3)
    clean = mean_of(query, bank, 5)
    noise = torch.stack([M.private_retrieve(query, bank, 5, 0.2, 1.0, random) - clean for _ in range(200)])
    assert noise.std(0).mean().item() == pytest.approx(0.2, rel=0.03) and not torch.equal(noise[0], noise[1])
    again = M.private_retrieve(query, bank, 5, 0.2, 1.0, M.Random(3))
    torch.testing.assert_close(again, M.private_retrieve(query, bank, 5, 0.2, 1.0, M.Random(3)))


def test_secure_randomness():
    random = M.Random()
    u, n = random.uniform(20_000), random.normal(20_000)
    assert u.dtype == torch.float64 and 0 < u.min() and u.max() < 1 and u.mean().item() == pytest.approx(0.5, abs=0.02)
    assert n.std().item() == pytest.approx(1, abs=0.03) and n.mean().abs() < 0.04 and torch.isfinite(n).all()
    assert not torch.equal(M.Random().uniform(5), M.Random().uniform(5))


def test_wrong_banks():
    good, query = torch.randn(9, 4), torch.randn(4)
    for bank, words in ((torch.cat([good, torch.zeros(1, 4)]), "zero"), (torch.full((9, 4), torch.nan), "NaN")):
        with pytest.raises(ValueError, match=words):
            M.private_retrieve(query, bank, 10 if len(bank) == 10 else 3, 0.1)
    with pytest.raises(ValueError, match="direction"):
        M.private_retrieve(torch.zeros(4), good, 3, 0.1)
    for k, q in ((10, 1.0), (0, 1.0), (3, 0.0), (3, 1.1)):
        with pytest.raises(ValueError, match="must be in"):
            M.private_retrieve(query, good, k, 0.1, q)


def test_blending_and_public_only():
    private, other = torch.randn(6).double(), torch.randn(4, 6).double()
    torch.testing.assert_close(M.blend(private, other, 0.25), 0.25 * private[None] + 0.75 * other)
    world = M.World(None, torch.randn(30, 6), torch.full((20, 6), torch.nan), None, ["a"] * 3, torch.randn(3, 6))
    got = M.conditions(M.Arm(0.0, k=4), world, M.Config(), None, None)
    assert got.shape == (3, 1, 6) and torch.isfinite(got).all()  # no private row is touched
    best = M.nearest(M.unit(world.queries)[0], world.public_bank, 4)
    torch.testing.assert_close(got[0, 0], torch.nn.functional.normalize(world.public_bank[best], dim=1).mean(0))
    text = M.conditions(M.Arm(float("inf"), k=4), world, M.Config(lam=0.0, other="text"), None, None)
    assert text.shape == (3, 1, 6)  # one token acts as many equal ones
    many = M.conditions(M.Arm(float("inf"), k=4), world, M.Config(lam=0.0), None, None)
    assert many.shape == (3, 4, 6)


def test_what_the_accountants_must_not_lose():
    grid = M.rdp(1e-9, 1.0, np.array([2.0, 3.0, 63.0]))  # a large order beside a small one
    assert grid[0] == pytest.approx(M.rdp(1e-9, 1.0, 2.0), rel=1e-9)
    assert grid[0] == pytest.approx(1e-18 * np.expm1(1.0), rel=1e-6)
    # four draws of 1,000 have chance 3.8e-6, above delta: what they lose, about 790, has to count
    assert M.epsilon_pld(1e-4, 0.05, 1000, 1e-6) > 750


def test_a_new_budget_needs_no_new_model(tmp_path):
    options = ["--preset", "smoke", "--out_dir", tmp_path]
    assert inside(M, *options).returncode == 0
    before = (tmp_path / "last.pt").read_bytes()
    done = inside(M, *options, "--budgets", "20", "--guidance", "1.5")
    assert done.returncode == 0 and (tmp_path / "last.pt").read_bytes() == before
    user_error(inside(M, *options, "--dim", "64"), "dim was 32")


def test_a_foreign_file_is_no_ledger(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("my only copy")
    with pytest.raises(ValueError, match="no ledger"):
        M.Ledger(path, 1.0, 1e-5)
    assert path.read_text() == "my only copy"
    path.write_text("first line\nmy only copy")
    with pytest.raises(ValueError, match="damaged"):
        M.Ledger(path, 1.0, 1e-5)
    assert path.read_text() == "first line\nmy only copy"
    path.write_text('{"bud')  # killed while the head was written
    assert M.Ledger(path, 1.0, 1e-5).spent() == 0


def test_training_means():
    near, noise = torch.randn(5, 4, 8), torch.randn(5, 8)
    clean = torch.nn.functional.normalize(near, dim=2).mean(1)
    for u, std in ((0.0, 0.05), (0.5, 0.025)):
        got = M.noisy_mean(near, 0.05, torch.tensor(u), noise)
        torch.testing.assert_close(got[:, 0], clean + std * noise)


def test_equal_tokens_act_as_one():
    model = M.Generator(6, (4, 8), M.Config(dim=16, depth=2, heads=2))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    z, t, token, keep = torch.randn(2, 4, 8, 8), torch.rand(2), torch.randn(2, 1, 6), torch.tensor([True, False])
    torch.testing.assert_close(model(z, t, token, keep), model(z, t, token.expand(2, 9, 6), keep), atol=1e-5, rtol=1e-4)


# The ledger


def test_ledger_counts_refuses_and_survives(tmp_path):
    path, q, z = tmp_path / "l.jsonl", 0.01, 0.85
    allowed = M.find_queries(2.0, q, z, 1e-5)
    ledger = M.Ledger(path, 2.0, 1e-5, "bank a")
    assert ledger.spent() == 0
    ledger.charge(q, z, allowed - 1)
    assert ledger.spent() == pytest.approx(M.epsilon(q, z, allowed - 1, 1e-5))
    M.Ledger(path, 2.0, 1e-5, "bank a").charge(q, z)
    before = path.read_bytes()
    for impossible in ((1.0, math.inf), (0.0, 1.0), (1.0, math.nan), (1.0, 1.0, 0), (1.0, 1.0, math.inf), (1.0, 1.0, 1.5)):
        with pytest.raises(ValueError, match="a charge needs"):
            ledger.charge(*impossible)
    with pytest.raises(M.BudgetExceeded, match="nothing was charged"):
        ledger.charge(q, z)
    assert path.read_bytes() == before and ledger.queries() == allowed
    for other in ((3.0, 1e-5, "bank a"), (2.0, 1e-6, "bank a"), (2.0, 1e-5, "bank b")):
        with pytest.raises(ValueError, match="belongs to another budget or bank"):
            M.Ledger(path, *other)
    path.write_bytes(before[:-1])  # only the end of the line is missing: the charge counts
    assert ledger.queries() == allowed and path.read_bytes() == before
    with open(path, "ab") as f:
        f.write(b'{"q": 0.01, "z"')  # the power went off: this answer was never given
    assert M.Ledger(path, 2.0, 1e-5, "bank a").queries() == allowed and path.read_bytes() == before
    path.write_bytes(before.replace(b'"queries": 1}', b'"queries": -5}'))
    with pytest.raises(ValueError, match="damaged"):
        ledger.spent()
    for bad in ((0, 1.0), (1.5, 1.0), (0.1, 0.0)):
        with pytest.raises(ValueError, match="a charge needs"):
            ledger.charge(*bad)
    with pytest.raises(ValueError, match="budget"):
        M.Ledger(tmp_path / "n", 0, 1e-5)


def test_different_queries_compose(tmp_path):
    ledger = M.Ledger(tmp_path / "l", 50.0, 1e-5)
    ledger.charge(0.01, 1.0, 300)
    ledger.charge(1.0, 6.0, 4)
    total = 300 * M.rdp(0.01, 1.0, M.ORDERS) + 4 * M.rdp(1.0, 6.0, M.ORDERS)
    assert ledger.spent() == pytest.approx(M.to_epsilon(M.ORDERS, total, 1e-5)[0])


def spend(path):
    ledger, count = M.Ledger(path, 1.0, 1e-5), 0
    while True:
        try:
            ledger.charge(1.0, 20.0)
            count += 1
        except M.BudgetExceeded:
            return count


def test_two_processes_cannot_overspend(tmp_path):
    path = str(tmp_path / "l")
    with multiprocessing.get_context("forkserver").Pool(3) as pool:
        counts = pool.map(spend, [path] * 3)
    assert sum(counts) == M.find_queries(1.0, 1.0, 20.0, 1e-5) == M.Ledger(path, 1.0, 1e-5).queries() and sum(counts) > 10


def test_a_killed_service_has_charged_what_it_answered(tmp_path):
    code = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
from methods import dp_rdm as M
ledger = M.Ledger({str(tmp_path / "l")!r}, 1e6, 1e-5)
while True:
    ledger.charge(1.0, 1.0)
    print("answer", flush=True)
"""
    with open(tmp_path / "out", "w") as out:
        service = subprocess.Popen([sys.executable, "-c", code], stdout=out, stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while (tmp_path / "out").read_text().count("\n") < 20 and time.time() < deadline:
        time.sleep(0.02)
    os.kill(service.pid, signal.SIGKILL)
    service.wait()
    answers = (tmp_path / "out").read_text().count("\n")
    assert answers >= 20 and answers <= M.Ledger(tmp_path / "l", 1e6, 1e-5).queries() <= answers + 1


def test_tiny_and_huge_rows_do_not_change_the_answer_by_more_than_2_over_k():
    """Lengths that float32 cannot hold: rows are normalised first, whatever their length."""
    e, u = torch.zeros(8, dtype=torch.float64), torch.zeros(8, dtype=torch.float64)
    e[0], u[0], u[1] = 1, 0.01, 1
    for scale in (1e-25, 1.0, 1e25):
        bank = torch.stack([*[e] * 20, *[scale * u] * 3])
        a, b = (M.private_retrieve(e, rows, 4, 0.0) for rows in (bank, torch.cat([bank, scale * u[None]])))
        assert (a - b).norm() <= 0.5 and torch.allclose(a, e), scale


def test_two_writers_of_the_same_answers_do_not_overwrite_each_other(tmp_path):
    arm, queries = M.Arm(10.0, 8, 3, 0.1, 1.0), torch.eye(4)
    ledger = M.Ledger(tmp_path / "l", 1e6, 1e-5)
    one, two = (M.Answers(tmp_path, arm, queries, ledger) for _ in range(2))
    for _ in range(3):
        ledger.charge(1.0, 5.0)
    one.add(torch.ones(4, dtype=torch.float64))
    with pytest.raises(ValueError, match="another process answers"):
        two.add(torch.zeros(4, dtype=torch.float64))
    assert M.Answers(tmp_path, arm, queries, ledger).given.tolist() == [[1, 1, 1, 1]]


def test_secure_noise_is_not_that_of_a_seed(tmp_path, monkeypatch):
    """A run with --secure draws new noise each time, an experiment the same."""
    seen, real = [], M.conditions

    def remember(*args, **more):
        tokens = real(*args, **more)
        seen.append(tokens)
        raise KeyboardInterrupt

    cfg = M.Config(**{**M.PRESETS["smoke"], "out_dir": str(tmp_path / "0")})
    M.run(cfg)
    monkeypatch.setattr(M, "make_arms", lambda *args: [M.Arm(10.0, 8, 40, 0.05, 0.5)])
    monkeypatch.setattr(M, "conditions", remember)
    for secure in (True, True, False, False):
        for path in (tmp_path / "0").glob("answers_*"):
            path.unlink()
        (tmp_path / "0/ledger.jsonl").unlink(missing_ok=True)
        with pytest.raises(KeyboardInterrupt):
            M.run(M.replace(cfg, secure=secure))
    assert not torch.allclose(seen[0], seen[1]) and torch.equal(seen[2], seen[3]) and not torch.allclose(seen[1], seen[2])


def test_an_experiment_leaves_the_real_meter_alone(tmp_path):
    cfg = M.Config(**{**M.PRESETS["smoke"], "out_dir": str(tmp_path)})
    (tmp_path / "ledger.jsonl").write_text("of a run with --secure")
    M.run(cfg)
    assert (tmp_path / "ledger.jsonl").read_text() == "of a run with --secure"
    assert len((tmp_path / "experiment_ledger_10_8.jsonl").read_text().splitlines()) == 9


def test_no_answer_is_paid_for_twice(tmp_path, monkeypatch):
    """--secure: stopped between two answers, before a picture is drawn, or drawn again with other settings: eight charges for
    eight prompts, and the same answers. Others are other prompts', and are not begun if the budget cannot pay for all."""
    cfg = M.Config(**{**M.PRESETS["smoke"], "out_dir": str(tmp_path), "secure": True})
    charged = lambda: len((tmp_path / "ledger.jsonl").read_text().splitlines()) - 1  # noqa: E731
    retrieve, draw = M.private_retrieve, M.sample

    def fifth_time_lucky(*args):
        if (tmp_path / "ledger.jsonl").exists() and charged() == 5:
            raise KeyboardInterrupt
        return retrieve(*args)

    monkeypatch.setattr(M, "private_retrieve", fifth_time_lucky)
    with pytest.raises(KeyboardInterrupt):
        M.run(cfg)
    (answers,) = tmp_path.glob("answers_*")
    kept = answers.read_bytes()
    assert charged() == 5 and len(kept) == 4 * 8 * 96  # the fifth was paid and never given
    with open(answers, "ab") as file:
        file.write(b"torn")
    monkeypatch.setattr(M, "private_retrieve", retrieve)
    monkeypatch.setattr(M, "sample", lambda *args: 1 / 0 if charged() == 9 else draw(*args))
    with pytest.raises(ZeroDivisionError):
        M.run(cfg)
    monkeypatch.setattr(M, "sample", draw)
    key = "epsilon 10, 8 queries fd"  # of the other arms the noise is new each time
    first, _, again = (M.run(c)[key] for c in (cfg, M.replace(cfg, guidance=3.0, memory_gb=2.0), cfg))
    assert first == pytest.approx(again, rel=1e-6)  # from the same answers
    M.run(M.replace(cfg, secure=False))
    assert charged() == 9 and len(answers.read_bytes()) == 8 * 8 * 96 and answers.read_bytes().startswith(kept)
    with pytest.raises(M.BudgetExceeded):
        M.run(M.replace(cfg, prompts=7))
    with pytest.raises(M.BudgetExceeded):  # another number of queries has no meter of its own
        M.run(M.replace(cfg, queries="9"))
    with pytest.raises(ValueError, match="another budget"):
        M.run(M.replace(cfg, budgets="11"))
    assert charged() == 9
    (tmp_path / "ledger.jsonl").unlink()
    with pytest.raises(ValueError, match="more answers than"):
        M.run(cfg)


def test_secure_runs_answer_nothing_unmetered(tmp_path):
    arms = M.make_arms(M.Config(**{**M.PRESETS["smoke"], "secure": True}), 1_000, 2)
    assert [a.eps for a in arms] == [0.0, 10.0] and math.inf in [a.eps for a in M.make_arms(M.Config(), 12_000, 9_000)]


def test_the_colour_of_an_empty_cell_is_no_right_colour(tmp_path, monkeypatch):
    """One object a picture: a colour that it does not have is never counted as right."""
    cfg = M.Config(**M.PRESETS["smoke"])
    world, images = M.generated(64, 5, True, "test")
    names = list(M.scenes.COLOURS)
    colours = [names[names.index(s.things[0].colour) - 1] for s in world]
    real, bank = images.float() / 127.5 - 1, torch.eye(64)
    monkeypatch.setattr(M, "sample", lambda model, tokens, noise, guidance, steps: noise)
    vae = type("Exact", (), {"z": 4, "factor": 4, "decode": lambda self, z: real})()
    embed = type("Nothing", (), {"pictures": lambda self, x: bank})()
    scored = []
    for asked in (colours, [s.things[0].colour for s in world]):
        there = M.World(images, bank, bank, images, ["x"] * 64, bank, asked)
        M.ddp.start(0)
        env, features = M.ddp.Env(0, 1, torch.device("cpu")), lambda x: x.float().flatten(1)[:, :8]
        scored.append(M.evaluate(None, vae, features, features(images), embed, there, M.Arm(0.0, k=4), cfg, env, tmp_path)[0])
    assert scored[0]["colour"] == 0 and scored[1]["colour"] == 100


def test_pictures_with_boxes_and_captions_are_prompted_by_captions(tmp_path):
    """COCO's classes are those of its boxes; no picture has a label."""
    (tmp_path / "img").mkdir()
    for split in ("train", "val"):
        images, said = [], []
        for i in range(8):
            name = f"{split}{i}.png"
            Image.new("RGB", (20, 16), (i, 2 * i, 90)).save(tmp_path / "img" / name)
            images.append({"id": i, "file_name": name, "width": 20, "height": 16})
            said.append({"image_id": i, "id": i, "caption": f"{split} {i}"})
        boxes = [{"image_id": 0, "id": 9, "category_id": 7, "bbox": [1, 2, 3, 4], "iscrowd": 0, "segmentation": []}]
        (tmp_path / f"captions_{split}2017.json").write_text(json.dumps({"images": images, "annotations": said}))
        (tmp_path / f"instances_{split}2017.json").write_text(
            json.dumps({"images": images, "annotations": boxes, "categories": [{"id": 7, "name": "cat"}]})
        )
    files = [f"{tmp_path}/{kind}_{split}2017.json" for kind in ("captions", "instances") for split in ("train", "val")]
    out = str(tmp_path / "coco")
    assert coco.run(coco.Config(",".join(files), str(tmp_path / "img"), out))["counts"] == {"train": 8, "val": 8}
    embed = type(
        "Ones", (), {"pictures": lambda self, x: torch.ones(len(x), 3), "texts": lambda self, t: torch.ones(len(t), 3)}
    )()
    world = M.open_folders(M.Config(**{**M.PRESETS["smoke"], "public": out, "private": out, "prompts": 6}), embed)
    assert len(world.prompts) == 6 and all(p.startswith("val ") for p in world.prompts)


def test_charges_are_whole(tmp_path):
    ledger = M.Ledger(tmp_path / "l", 10.0, 1e-5)
    with pytest.raises(ValueError, match="a whole number"):
        ledger.charge(0.1, 2.0, 1.5)
    ledger.charge(0.1, 2.0, 2)
    text = (tmp_path / "l").read_text()
    (tmp_path / "l").write_text(text.replace('"queries": 2', '"queries": 1.5'))
    with pytest.raises(ValueError, match="damaged"):
        ledger.queries()


def test_generated_worlds():
    """No reference picture is in a bank, and prompts ask for what the embedding can see."""
    cfg = M.Config(records=400, images=300, prompts=32)
    embed = M.Embedder(cfg, torch.device("cpu"))
    world = M.open_world(cfg, embed)
    private = M.generated(400, 2, True)
    known = {x.numpy().tobytes() for x in (*world.public, *private[1])}
    assert not known & {x.numpy().tobytes() for x in world.test}
    torch.testing.assert_close(embed.pictures(private[1]), world.private_bank)
    for query, colour in zip(world.queries, world.colours):
        near = M.nearest(M.unit(query[None])[0], world.private_bank, 4)
        assert [private[0][i].things[0].colour for i in near.tolist()].count(colour) >= 3, colour


def test_an_answer_is_charged_first():
    world = M.World(None, torch.randn(30, 6), torch.randn(20, 6), None, ["a"] * 3, torch.randn(3, 6))

    class Refuses:
        def charge(self, q, z):
            assert (q, z) == (0.5, 0.5)
            raise M.BudgetExceeded("spent")

    arm = M.Arm(10.0, 5, 10, 0.1, 0.5)
    real = M.private_retrieve
    try:
        M.private_retrieve = None  # would fail if it were reached
        with pytest.raises(M.BudgetExceeded):
            M.conditions(arm, world, M.Config(), Refuses(), M.Random(0))
    finally:
        M.private_retrieve = real


# The attack


def test_clopper_pearson():
    low, high = M.clopper_pearson(7, 50, 0.95)  # beta quantiles, as every statistics package gives them
    assert (low, high) == (pytest.approx(0.0582, abs=1e-4), pytest.approx(0.2674, abs=1e-4))
    assert M.clopper_pearson(0, 20, 0.95) == (0.0, pytest.approx(1 - 0.025 ** (1 / 20), abs=1e-6))
    assert M.clopper_pearson(20, 20, 0.95) == (pytest.approx(0.025 ** (1 / 20), abs=1e-6), 1.0)


def test_the_planted_record_stays_hidden_and_half_the_noise_is_caught():
    for q in (1.0, 0.5):
        assert not M.attack(4, 0.5, q, 0.01, 3_000)[2]
        assert M.attack(4, 0.5, q, 0.01, 3_000, secretly=0.5)[2]


# The whole


def _gradients(env):
    torch.manual_seed(0)
    cfg = M.Config(dim=16, depth=1, heads=2)
    model = M.Generator(6, (4, 8), cfg)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    z, near, u, noise, extra = (
        torch.randn(4, 4, 8, 8),
        torch.randn(4, 3, 6),
        torch.rand(5, 2),
        torch.randn(4, 4, 8, 8),
        torch.randn(4, 6),
    )
    mine = slice(env.rank * 4 // env.world, (env.rank + 1) * 4 // env.world)
    wrapped = M.ddp.wrap(model, env)
    loss = M.method_loss(wrapped, z[mine], near[mine], torch.cat([u[:-1][mine], u[-1:]]), noise[mine], extra[mine], cfg)
    loss.backward()
    return {"loss": torch.tensor(M.ddp.mean({"l": loss})["l"]), "proj": model.proj.weight.grad, "null": model.null.grad}


def test_two_processes_equal_one(tmp_path):
    want = _gradients(M.ddp.Env(0, 1, torch.device("cpu")))
    for got in in_processes(2, _gradients, path=tmp_path):
        for k, v in want.items():
            torch.testing.assert_close(got[k], v, atol=1e-6, rtol=1e-4)


def test_smoke_in_one_and_two_processes_and_resume(tmp_path, one_thread):
    one = inside(M, *SMALL, "--out_dir", tmp_path / "a")
    assert one.returncode == 0, one.stderr
    for words in ("public only", "not private", "epsilon 10", "spent by 8 queries", "above 1/10"):
        assert words in one.stdout
    score = json.loads((tmp_path / "a/metrics.json").read_text())
    assert 0 < score["epsilon 10, 8 queries spent"] <= 10 and score["public only spent"] == 0
    two = both(M, *SMALL, "--out_dir", tmp_path / "b")
    assert two.returncode == 0, two.stderr
    assert json.loads((tmp_path / "b/metrics.json").read_text()) == pytest.approx(score, rel=1e-3, abs=1e-2)
    calls, real = [], M.ddp.interrupted
    cfg = M.Config(**{**M.PRESETS["smoke"], "out_dir": str(tmp_path / "c")})
    try:
        M.ddp.interrupted = lambda due: calls.append(1) or len(calls) == 3
        with pytest.raises(KeyboardInterrupt):
            M.run(cfg)
    finally:
        M.ddp.interrupted = real
    M.run(cfg)
    again = inside(M, *SMALL, "--out_dir", tmp_path / "d")
    assert again.returncode == 0
    for name in ("model.safetensors", "metrics.json"):
        assert (tmp_path / "c" / name).read_bytes() == (tmp_path / "d" / name).read_bytes()


def test_plan_needs_no_model(capsys):
    M.run(M.Config(plan=True, records=82800, q=0.01, sigma=0.05, budgets="10", queries="1000"))
    out = capsys.readouterr().out
    assert "0.01   1,000    10      23" in out and "eps, PLD" in out and "adjacency" in out


def test_banks_from_files(tmp_path):
    bank = torch.randn(5, 3)
    np.save(tmp_path / "b.npy", bank.numpy())
    M.ckpt.export(tmp_path / "b.safetensors", {"embedding": bank})
    for name in ("b.npy", "b.safetensors"):
        torch.testing.assert_close(M.read_bank(tmp_path / name), bank)
    np.save(tmp_path / "c.npy", np.zeros(4))
    for name, words in (("c.npy", "rows"), ("none.npy", "holds no embeddings")):
        with pytest.raises(ValueError, match=words):
            M.read_bank(tmp_path / name)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--q", "0"], ["--q 0.0"]),
        (["--delta", "1"], ["--delta 1.0"]),
        (["--secure", "--seed", "3"], ["--secure", "--seed"]),
        (["--budgets", "ten"], ["--budgets ten"]),
        (["--queries", "0"], ["--queries 0"]),
        (["--sigma", "0.01", "--queries", "1000"], ["neighbours", "the private set has 64"]),
        (["--prompts", "9"], ["--prompts 9", "--queries 8"]),
        (["--prompts", "5"], ["--prompts", "at least 6"]),
        (["--budgets", "inf"], ["--budgets inf"]),
        (["--queries", "1e3"], ["--queries 1e3", "whole"]),
        (["--k", "65"], ["--k 65", "64 records"]),
        (["--drop", "1.5"], ["--drop"]),
        (["--public", "nowhere"], ["--private"]),
        (["--public", "nowhere", "--private", "nowhere"], ["nowhere", "data_prep/"]),
        (["--clip", "x"], ["--tokenizer"]),
        (["--other", "all"], ["--other all"]),
    ],
)
def test_wrong_input_ends_in_one_sentence(flags, words, tmp_path):
    user_error(inside(M, *SMALL, "--out_dir", tmp_path / "r", *flags), *words)


# Between the pure functions and a run: what is charged is what is done, what is said is what is computed


def some_world():
    g = torch.Generator().manual_seed(0)
    public, private, queries = (torch.randn(n, 6, generator=g) for n in (30, 20, 3))
    return M.World(None, public, private, None, ["a"] * 3, queries)


def test_an_arm_retrieves_with_what_it_is_charged_for():
    world, seen = some_world(), []
    ledger = type("L", (), {"charge": lambda self, q, z: seen.append((q, z))})()
    for lam in (1.0, 0.25):
        for eps, bank in ((10.0, world.private_bank), (0.0, world.public_bank)):
            got = M.conditions(M.Arm(eps, 5, 10, 0.1, 0.5), world, M.Config(lam=lam, other="text"), ledger, M.Random(7))
            random = M.Random(7)
            want = torch.stack([M.private_retrieve(q, bank, 10, 0.1, 0.5, random) for q in world.queries])
            torch.testing.assert_close(got[:, 0], (lam * want + (1 - lam) * M.unit(world.queries)).float())
    assert seen == [(0.5, 0.5)] * 6  # z = 0.1 * 10 / 2, of the private arm alone
    got = M.conditions(M.Arm(math.inf, k=4), world, M.Config(), None, None)
    torch.testing.assert_close(got[0, 0], M.private_retrieve(world.queries[0], world.private_bank, 4, 0.0).float())


def test_a_charge_of_another_kind_counts_against_what_is_spent(tmp_path):
    ledger = M.Ledger(tmp_path / "l", 2.0, 1e-5)
    n = M.find_queries(2.0, 1.0, 20.0, 1e-5)
    ledger.check(1.0, 20.0, n)
    ledger.charge(0.01, 1.0, 300)
    for f in (ledger.charge, ledger.check):
        with pytest.raises(M.BudgetExceeded):
            f(1.0, 20.0, n)


def test_answers_are_begun_only_if_all_can_be_paid(tmp_path):
    n, arm = M.find_queries(2.0, 0.5, 5.0, 1e-5), M.Arm(2.0, 8, 100, 0.1, 0.5)  # z = 5
    ledger = M.Ledger(tmp_path / "l", 2.0, 1e-5)
    M.Answers(tmp_path, arm, torch.zeros(n, 3), ledger)
    with pytest.raises(M.BudgetExceeded):
        M.Answers(tmp_path, arm, torch.zeros(n + 1, 3), ledger)


def test_delta_of_the_user_reaches_arms_and_meter(tmp_path):
    cfg = M.Config(**{**M.PRESETS["smoke"], "out_dir": str(tmp_path), "delta": 1e-3})
    (arm,) = [a for a in M.make_arms(cfg, 64, 64) if 0 < a.eps < math.inf]
    assert arm.k == M.whole_k(10.0, 0.5, 0.5, 8, 1e-3) != M.whole_k(10.0, 0.5, 0.5, 8, 1 / 64)
    score = M.run(cfg)
    head = json.loads((tmp_path / "experiment_ledger_10_8.jsonl").read_text().splitlines()[0])
    bank = M.open_world(cfg, M.Embedder(cfg, torch.device("cpu"))).private_bank
    assert head == {"budget": 10.0, "delta": 1e-3, "bank": M.hashlib.blake2b(bank.numpy(), digest_size=12).hexdigest()}
    assert score["epsilon 10, 8 queries spent"] == pytest.approx(M.epsilon(0.5, 0.5 * arm.k / 2, 8, 1e-3))
    kept, shown = torch.load(tmp_path / "last.pt", weights_only=True), load_file(tmp_path / "model.safetensors")
    for k, v in kept["ema"].items():  # the averaged weights are exported
        torch.testing.assert_close(shown[k], v)
    assert any(not torch.equal(shown[k], kept["model"][k]) for k in kept["ema"])


def test_the_loss_is_flow_matching_with_logit_normal_times():
    cfg, seen = M.Config(drop=0.3, max_noise=0.2), []

    def model(zt, t, tokens, keep):
        seen.append((zt, t, tokens, keep))
        return torch.zeros_like(zt)

    g = torch.Generator().manual_seed(0)
    z0, near, noise, extra = (torch.randn(*s, generator=g) for s in ((4, 2, 3, 3), (4, 3, 6), (4, 2, 3, 3), (4, 6)))
    u = torch.tensor([[0.5, 0.1], [0.1, 0.3], [0.9, 0.29], [0.7, 0.9], [0.25, 0.0]])
    loss = M.method_loss(model, z0, near, u, noise, extra, cfg)
    zt, t, tokens, keep = seen[0]
    normal = torch.distributions.Normal(0, 1).icdf(u[:4, 0])
    torch.testing.assert_close(t, 1 / (1 + (-normal).exp()))
    for i in range(4):
        torch.testing.assert_close(zt[i], z0[i] + t[i] * (noise[i] - z0[i]))  # 0: picture, 1: noise
    assert keep.tolist() == [False, True, False, True]
    torch.testing.assert_close(tokens, M.noisy_mean(near, 0.2, u[4, 0], extra))
    assert loss.item() == pytest.approx((noise - z0).square().mean().item())
    assert M.method_loss(lambda *args: noise - z0, z0, near, u, noise, extra, cfg) == 0


def test_sampling_follows_the_guided_flow():
    noise, target, tokens = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4), torch.randn(3, 1, 6)
    times = []

    def model(z, t, tokens, keep):  # exact velocities to `target` with the condition, to 0 without
        times.append(t[0].item())
        assert tokens.shape[0] == 6 and keep.tolist() == [True] * 3 + [False] * 3
        goal = torch.where(keep[:, None, None, None], torch.cat([target, target]), 0.0)
        return torch.cat([noise, noise]) - goal

    torch.testing.assert_close(M.sample(model, tokens, noise, 1.0, 4), target)
    assert times == [1.0, 0.75, 0.5, 0.25]
    torch.testing.assert_close(M.sample(model, tokens, noise, 2.5, 4), 2.5 * target)
    torch.testing.assert_close(M.sample(model, tokens, noise, 0.0, 3), torch.zeros_like(noise), atol=1e-6, rtol=0)


def test_the_null_token_stands_where_keep_is_false():
    model = M.Generator(6, (4, 8), M.Config(dim=16, depth=1, heads=2))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    z, t, a, b = torch.randn(2, 4, 8, 8), torch.rand(2), torch.randn(2, 1, 6), torch.randn(2, 1, 6)
    keep = torch.tensor([True, False])
    one, two = model(z, t, a, keep), model(z, t, b, keep)
    assert torch.equal(one[1], two[1]) and not torch.allclose(one[0], two[0])


def test_neighbours_are_the_nearest_the_picture_itself_first():
    bank, env = M.unit(torch.randn(23, 6)).float(), M.ddp.Env(0, 1, torch.device("cpu"))
    got = M.neighbours_of(bank, 4, env, block=5)
    assert torch.equal(got, (bank @ bank.T).argsort(1, descending=True)[:, :4]) and got[:, 0].tolist() == list(range(23))


def test_what_the_public_model_depends_on():
    base = M.training_part(M.Config())
    needed = dict(k=5, max_noise=0.2, drop=0.0, images=10, steps=9, seed=1, lr=1.0, batch_size=8, ema_decay=0.5, public="x", vae="x",
                  clip="x")  # fmt: skip
    for name, value in needed.items():
        assert M.training_part(M.replace(M.Config(), **{name: value})) != base, name
    for name, value in dict(sigma=0.5, q=0.5, lam=0.5, records=9, guidance=1.0).items():
        assert M.training_part(M.replace(M.Config(), **{name: value})) == base, name


def test_pictures_are_embedded_as_clip_wants_them():
    embed, (_, images) = M.Embedder(M.Config(), torch.device("cpu")), M.generated(5, 1, False)
    pil = [Image.fromarray(x.permute(1, 2, 0).numpy()) for x in images]
    want = M.zoo.load_clip().eval().encode_image(metrics.clip_input(pil, embed.side))
    torch.testing.assert_close(embed.pictures(images, part=2), torch.nn.functional.normalize(want, dim=1), atol=1e-4, rtol=1e-3)


def test_the_noisy_public_arm():
    cfg = M.Config(budgets="5,9,20", queries="1000,2000", q=0.02)
    arms = M.make_arms(cfg, 12_000, 9_000)
    a, noisy = next(a for a in arms if a.eps == 9 and a.queries == 2000), arms[1]
    assert noisy == M.replace(a, eps=0.0, q=0.02 * 12_000 / 9_000) and noisy.name == "public, as noisy"
    assert M.make_arms(cfg, 12_000, 100)[1].q == 1.0
    for a in arms:
        if 0 < a.eps < math.inf:
            spent = [M.epsilon(0.02, 0.1 * k / 2, a.queries, 1 / 12_000) for k in (a.k, a.k - 1)]
            assert spent[0] <= a.eps < spent[1]


def test_the_plan_says_how_long_a_budget_lasts(capsys):
    M.run(M.Config(plan=True, records=82800, q=0.01, sigma=0.05, budgets="10", queries="1000"))
    out = capsys.readouterr().out
    row = next(line.split() for line in out.splitlines() if line.startswith("32 "))
    assert row == ["32", "0.8", f"{M.find_queries(10, 0.01, 0.8, 1 / 82800):,}"]


def test_private_things_are_spotted_and_public_ones_are_not_all():
    assert all(s.things[0].texture == "spotted" for s in M.generated(50, 1, True)[0])
    assert len({s.things[0].texture for s in M.generated(50, 1, False)[0]}) > 2


def test_near_ties_that_float32_cannot_tell():
    e = 1e-3 + 1e-5 * torch.rand(2_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    bank = torch.zeros(2_000, 8, dtype=torch.float64)
    bank[:, 0], bank[:, 1] = e.cos(), e.sin()
    bank *= 1 + torch.arange(2_000)[:, None] % 7
    for norms in (None, bank.norm(dim=1)):
        for block in (64, 10_000):
            got = M.nearest(torch.eye(8, dtype=torch.float64)[0], bank, 5, None, norms, block)
            assert got.tolist() == e.argsort()[:5].tolist()


def test_a_subsample_reaches_the_last_record_however_short_the_gaps():
    random = M.Random(0)
    random.uniform = lambda n: torch.full((n,), 1 - 1e-12, dtype=torch.float64)  # every gap is 1
    assert random.subsample(1000, 0.01).tolist() == list(range(1000))


def test_evaluation_numbers(tmp_path, monkeypatch):
    cfg = M.Config(**M.PRESETS["smoke"])
    g = torch.Generator().manual_seed(0)
    test, fake = (torch.randint(0, 256, (24, 3, 32, 32), generator=g, dtype=torch.uint8) for _ in range(2))
    fake = fake // 2
    queries = M.unit(torch.randn(24, 64, generator=g)).float()
    monkeypatch.setattr(M, "sample", lambda model, tokens, noise, guidance, steps: noise)
    vae = type("Exact", (), {"z": 4, "factor": 4, "decode": lambda self, z: fake.float() / 127.5 - 1})()

    def f(x):
        return x.float().flatten(1)[:, :6]

    embed = type("E", (), {"pictures": lambda self, x: M.unit(f(x) @ torch.eye(6, 64)).float()})()
    world = M.World(test, torch.eye(64), torch.eye(64), test, ["x"] * 24, queries)
    M.ddp.start(0)
    env, arm = M.ddp.Env(0, 1, torch.device("cpu")), M.Arm(0.0, k=4)
    got, pixels = M.evaluate(None, vae, f, f(test), embed, world, arm, cfg, env, tmp_path)
    want = metrics.prdc(f(test), f(fake), 5)
    assert torch.equal(pixels, fake) and want["coverage"] != metrics.prdc(f(fake), f(test), 5)["coverage"]
    assert got["density"] == want["density"] and got["coverage"] == want["coverage"] and got["spent"] == 0
    assert got["fd"] == pytest.approx(metrics.frechet_distance(f(test), f(fake)))
    assert got["clip"] == pytest.approx(100 * sum(float(a @ b) for a, b in zip(embed.pictures(fake), queries)) / 24, rel=1e-4)


def test_every_micro_batch_has_its_own_noise(tmp_path, monkeypatch):
    seen, loss = [], M.method_loss
    monkeypatch.setattr(M, "method_loss", lambda *args: seen.append(args[3:6]) or loss(*args))
    M.run(M.Config(**{**M.PRESETS["smoke"], "out_dir": str(tmp_path), "accum": 2, "steps": 2, "batch_size": 8}))
    assert len(seen) == 4
    for kind in zip(*seen):  # times, noise of the latents, noise of the condition
        assert not any(torch.equal(a, b) for i, a in enumerate(kind) for b in kind[:i])
