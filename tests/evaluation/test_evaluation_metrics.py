from __future__ import annotations

import ast
from pathlib import Path

import numpy as np
import pytest

from promoe_ds.evaluation import metrics
from promoe_ds.evaluation.metrics import frechet_distance, gaussian_statistics, label_agreement


def random_gaussian(rng: np.random.Generator, d: int, rank: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    factor = rng.standard_normal((d, rank or 2 * d))
    return rng.standard_normal(d), factor @ factor.T / d


def test_one_dimension_is_the_closed_form():
    distance = frechet_distance(np.array([1.0]), np.array([[4.0]]), np.array([-2.0]), np.array([[9.0]]))
    assert distance == pytest.approx((1 + 2) ** 2 + (2 - 3) ** 2, rel=1e-12)


def test_commuting_covariances_are_the_closed_form():
    rng = np.random.default_rng(0)
    basis, _ = np.linalg.qr(rng.standard_normal((7, 7)))
    a, b, mu = rng.uniform(0.1, 3, 7), rng.uniform(0.1, 3, 7), rng.standard_normal(7)
    distance = frechet_distance(mu, basis * a @ basis.T, np.zeros(7), basis * b @ basis.T)
    assert distance == pytest.approx(np.square(mu).sum() + np.square(np.sqrt(a) - np.sqrt(b)).sum(), rel=1e-12)


def test_shift_of_the_mean_adds_its_square():
    mu, sigma = random_gaussian(np.random.default_rng(1), 5)
    assert frechet_distance(mu, sigma, mu + 2.0, sigma) == pytest.approx(4.0 * 5, rel=1e-10)


def test_symmetric_in_its_arguments():
    rng = np.random.default_rng(2)
    one, two = random_gaussian(rng, 12), random_gaussian(rng, 12)
    assert frechet_distance(*one, *two) == pytest.approx(frechet_distance(*two, *one), rel=1e-10)


def test_agrees_with_matrix_square_root():
    linalg = pytest.importorskip("scipy.linalg")
    rng = np.random.default_rng(3)
    for d in (1, 3, 32):
        (mu1, sigma1), (mu2, sigma2) = random_gaussian(rng, d), random_gaussian(rng, d)
        root = linalg.sqrtm(sigma1 @ sigma2)
        expected = np.square(mu1 - mu2).sum() + np.trace(sigma1 + sigma2 - 2 * np.real(root))
        assert frechet_distance(mu1, sigma1, mu2, sigma2) == pytest.approx(expected, rel=1e-8)


def test_singular_covariances_give_the_nuclear_norm_value():
    rng = np.random.default_rng(4)
    f1, f2 = rng.standard_normal((20, 6)), rng.standard_normal((20, 9))
    # tr (S1^(1/2) S2 S1^(1/2))^(1/2) is the nuclear norm of F1^T F2 for S = F F^T
    cross = np.linalg.svd(f1.T @ f2, compute_uv=False).sum()
    expected = np.square(f1).sum() + np.square(f2).sum() - 2 * cross
    zero = np.zeros(20)
    assert frechet_distance(zero, f1 @ f1.T, zero, f2 @ f2.T) == pytest.approx(expected, rel=1e-6)


def test_zero_for_equal_sets_and_never_negative():
    features = np.random.default_rng(5).standard_normal((50, 64)).astype(np.float32)
    statistics = gaussian_statistics(features)
    assert 0.0 <= frechet_distance(*statistics, *statistics) < 1e-5


def test_grows_with_added_noise():
    rng = np.random.default_rng(6)
    features, noise = rng.standard_normal((500, 10)), rng.standard_normal((500, 10))
    clean = gaussian_statistics(features)
    distances = [frechet_distance(*gaussian_statistics(features + s * noise), *clean) for s in (0, 0.25, 0.5, 1, 2)]
    assert distances == sorted(distances) and distances[-1] > distances[1] > distances[0]


def test_gaussian_statistics_against_a_loop_in_float64():
    features = np.random.default_rng(7).standard_normal((9, 3)).astype(np.float32)
    mu, sigma = gaussian_statistics(features)
    rows = features.astype(np.float64)
    loop = sum(np.outer(r - rows.mean(0), r - rows.mean(0)) for r in rows) / (len(rows) - 1)
    assert mu.dtype == sigma.dtype == np.float64
    np.testing.assert_allclose(mu, rows.mean(0), rtol=1e-12)
    np.testing.assert_allclose(sigma, loop, rtol=1e-12)


def test_gaussian_statistics_of_one_feature_is_a_matrix():
    assert gaussian_statistics(np.array([[1.0], [3.0]]))[1].tolist() == [[2.0]]


@pytest.mark.parametrize("shape", [(1, 4), (0, 4), (5,)])
def test_gaussian_statistics_refuses_too_little(shape: tuple[int, ...]):
    with pytest.raises(ValueError, match="N >= 2"):
        gaussian_statistics(np.zeros(shape))


def test_label_agreement_counts():
    logits = np.eye(4)
    assert label_agreement(logits, np.array([0, 1, 2, 3])) == 1.0
    assert label_agreement(logits, np.array([0, 1, 3, 2])) == 0.5


@pytest.mark.parametrize(("n", "labels"), [(3, 2), (0, 0)])
def test_label_agreement_refuses_lengths(n: int, labels: int):
    with pytest.raises(ValueError, match="N >= 1"):
        label_agreement(np.zeros((n, 4)), np.zeros(labels, dtype=np.int64))


def test_no_module_imports_distributed_code():
    for path in Path(metrics.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                assert not name.startswith(("deepspeed", "torch.distributed")), (path, name)
                assert path.name != "metrics.py" or not name.startswith("torch"), name
