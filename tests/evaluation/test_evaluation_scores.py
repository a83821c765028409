"""Closed forms and slow loops: the streamed Gaussians, the Inception Score, the four shares, the kernel distance."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from promoe_ds.evaluation.kernel_distance import kernel_distance, squared_mmd
from promoe_ds.evaluation.manifold import manifold, nearest_squares, squared_distances
from promoe_ds.evaluation.metrics import Moments, gaussian_statistics, inception_score


@pytest.mark.parametrize("block", [1, 30, 1024])
@pytest.mark.parametrize("cuts", [[], [1], [0, 3, 50], list(range(100))])
def test_moments_do_not_depend_on_the_cut(cuts: list[int], block: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Moments, "BLOCK", block)
    x = np.random.default_rng(0).standard_normal((100, 5)) + 1e6  # sums of squares would lose 12 digits here
    moments, other = Moments(5), Moments(5)
    for number, batch in enumerate(np.split(x, cuts)):
        (moments if number % 2 else other).add(batch)
    moments.merge(other)
    np.testing.assert_allclose(moments.gaussian().mu_d, x.mean(0), rtol=1e-14)
    np.testing.assert_allclose(moments.gaussian().sigma_dd, np.cov(x, rowvar=False), rtol=0, atol=1e-9)


def test_moments_of_one_row_have_no_covariance():
    moments = Moments(2)
    moments.add(np.ones((1, 2)))
    with pytest.raises(ValueError, match="N >= 2"):
        moments.gaussian()


def test_statistics_of_float32_are_summed_in_float64():
    x = np.full((1000, 1), 0.1, np.float32)
    assert gaussian_statistics(x).mu_d[0] == pytest.approx(np.float64(np.float32(0.1)), rel=1e-15)


def test_one_hot_logits_score_the_number_of_classes():
    assert inception_score(1e4 * np.eye(7).repeat(3, 0)) == pytest.approx(7, rel=1e-12)
    assert inception_score(np.zeros((5, 7))) == pytest.approx(1, rel=1e-12)
    assert inception_score(1e4 * np.eye(7)[[0, 0, 0]]) == pytest.approx(1, rel=1e-12)  # six classes underflow


def test_two_kinds_of_images_in_closed_form():
    """p = (1 - e, e) and its mirror image, q = (1/2, 1/2): exp(log 2 - H(e))."""
    e = 0.2
    logits = np.log([[1 - e, e], [e, 1 - e]]) + 5.0
    expected = 2 * np.exp(e * np.log(e) + (1 - e) * np.log(1 - e))
    assert inception_score(logits) == pytest.approx(expected, rel=1e-12)


def test_splits_are_consecutive_and_the_last_may_be_short():
    hot = 1e4 * np.eye(3)
    logits = np.concatenate([hot, hot[:1].repeat(3, 0), hot[:2]])
    assert inception_score(logits, split=3) == pytest.approx((3 + 1 + 2) / 3, rel=1e-12)
    for bad in (np.zeros((0, 3)), np.zeros(3)):
        with pytest.raises(ValueError, match="needs logits"):
            inception_score(bad)


REFERENCE = np.array([[0.0], [1], [2], [3], [10]])
"""squared radii with 3 neighbours: 9, 4, 4, 9, 81"""
SAMPLES = np.array([[-3.0], [-4], [2.5], [19], [19.5], [-3.5], [20]])


@pytest.mark.parametrize("block", [1, 2, 3, 100])
@pytest.mark.parametrize("distances", ["fp32", "fp16"])
def test_precision_and_recall_in_one_dimension(block: int, distances):
    assert nearest_squares(torch.tensor(REFERENCE), 3, distances, block)[:, 3].tolist() == [9, 4, 4, 9, 81]
    # in the balls [-3, 3], [-1, 3], [0, 4], [0, 6], [1, 19], borders included: -3, 2.5, 19 of 7 samples
    # the samples' own balls reach from -3 to 2.5 and from 19 to 2.5 and beyond: every reference is in one
    precision, recall, density, coverage = manifold(SAMPLES, REFERENCE, block=block, distances=distances)
    assert precision == pytest.approx(3 / 7) and recall == 1.0
    assert density is None and coverage is None  # 5 rows have no 5 neighbours
    swapped = manifold(REFERENCE, SAMPLES, block=block, distances=distances)[:2]
    assert swapped == pytest.approx((1.0, 3 / 7))


def test_recall_of_samples_in_one_place():
    samples = np.array([[0.0], [0], [0], [0], [0.5]])
    precision, recall, *_ = manifold(samples, REFERENCE)
    assert (precision, recall) == (1.0, pytest.approx(2 / 5))  # balls of radius 0 at 0, and [0, 1] at 0.5


def test_distances_against_float64_and_what_fp16_cannot_hold():
    rng = np.random.default_rng(1)
    u, v = (torch.tensor(rng.standard_normal((n, 30)), dtype=torch.float32) for n in (4, 6))
    exact = torch.cdist(u.double(), v.double()).square()
    assert (squared_distances(u, v) - exact).abs().max() < 1e-4
    half = squared_distances(u, v, "fp16")
    assert half.dtype == torch.float32 and 1e-4 < (half - exact).abs().max() < 0.2
    assert torch.equal(half, half.half().float())
    far = squared_distances(100 * u, v, "fp16")  # beyond 65504: the block falls back to fp32
    assert far.isfinite().all() and far.max() > 65504


def test_too_few_for_three_neighbours():
    with pytest.raises(ValueError, match="3 neighbours need more than 3 rows, got 3"):
        manifold(np.zeros((3, 2)), np.zeros((9, 2)))


def given_features() -> tuple[np.ndarray, np.ndarray]:
    """Samples and reference of the golden numbers below, the same on every machine."""
    rng = np.random.Generator(np.random.Philox(0))
    return rng.random((60, 6)), 1.25 * rng.random((50, 6)) + 0.125


def slow_shares(u: np.ndarray, v: np.ndarray, k: int) -> tuple[float, float, float, float]:
    """The definitions, pair by pair in float64."""
    radius_u, radius_v = ([sorted(np.linalg.norm(x - y) for y in rows)[k] for x in rows] for rows in (u, v))
    distance = [[np.linalg.norm(x - y) for y in v] for x in u]
    inside = [[d <= r for d, r in zip(row, radius_v, strict=True)] for row in distance]
    precision = np.mean([any(row) for row in inside])
    recall = np.mean([any(distance[i][j] <= radius_u[i] for i in range(len(u))) for j in range(len(v))])
    density = np.mean([sum(row) / k for row in inside])
    coverage = np.mean([any(row[j] for row in inside) for j in range(len(v))])
    return float(precision), float(recall), float(density), float(coverage)


@pytest.mark.parametrize("block", [7, 5000])
def test_the_four_shares_against_loops_and_the_authors_program(block: int):
    u, v = given_features()
    found = manifold(u, v, block=block)
    assert found[:2] == pytest.approx(slow_shares(u, v, 3)[:2], rel=1e-12)
    assert found[2:] == pytest.approx(slow_shares(u, v, 5)[2:], rel=1e-12)
    # prdc 0.2: compute_prdc(v, u, nearest_k=3) and (..., 5); no distance equals a radius here, so < is <=
    assert found == pytest.approx((0.9, 0.5, 0.9766666666666668, 0.88), rel=1e-12)


def test_a_reference_of_repeated_rows_is_covered_by_itself():
    rows = np.repeat(np.arange(3.0)[:, None], 6, 0)
    assert manifold(rows, rows) == (1.0, 1.0, 6 / 5, 1.0)  # with < all four are 0


def test_squared_mmd_against_sums_over_pairs():
    u, v = (torch.tensor(x[:20]) for x in given_features())

    def mean(x: torch.Tensor, y: torch.Tensor, skip: bool) -> float:
        values = [(float(a @ b) / 6 + 1) ** 3 for i, a in enumerate(x) for j, b in enumerate(y) if not skip or i != j]
        return sum(values) / len(values)

    expected = mean(u, u, True) + mean(v, v, True) - 2 * mean(u, v, False)
    assert squared_mmd(u, v).item() == pytest.approx(expected, rel=1e-12)


def test_kernel_distance_is_torch_fidelitys():
    u, v = given_features()
    # torch-fidelity 0.4.0: kid_features_to_metric(u, v, kid_subsets=20, kid_subset_size=30)
    assert kernel_distance(u, v, subsets=20, size=30) == pytest.approx(0.7283933383430515, rel=1e-10)
    assert kernel_distance(u, v) == pytest.approx(0.6957102259948656, rel=1e-10)  # kid_subset_size=50, all there are
    assert kernel_distance(u[:50], u[:50]) < 0  # unbiased: equal sets are below zero
    with pytest.raises(ValueError, match="2 rows of each, got 1 and 50"):
        kernel_distance(u[:1], v)
