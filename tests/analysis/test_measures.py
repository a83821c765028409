"""Measures of specialisation, against slow loops and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest

from promoe_ds.analysis import measures

RNG = np.random.default_rng(0)


def test_explained_entropy_by_definition() -> None:
    count_CE = RNG.integers(0, 9, (5, 4))
    n = count_CE.sum()
    information = entropy = 0.0
    for e in range(4):
        p_e = count_CE[:, e].sum() / n
        entropy -= p_e * math.log(p_e)
        for c in range(5):
            p = count_CE[c, e] / n
            information += p * math.log(p / (count_CE[c].sum() / n * p_e)) if p else 0
    assert measures.explained_entropy(count_CE) == pytest.approx(information / entropy, abs=1e-12)


def test_explained_entropy_at_its_ends() -> None:
    assert measures.explained_entropy(np.eye(3, dtype=int) * 7) == pytest.approx(1)
    assert measures.explained_entropy(np.outer([1, 2, 3], [4, 5])) == pytest.approx(0, abs=1e-12)
    assert measures.explained_entropy(np.array([[5, 0], [9, 0]])) == 0  # one expert for all
    assert measures.explained_entropy(np.zeros((2, 3), dtype=int)) == 0


def test_chance_is_what_a_class_explains_that_means_nothing() -> None:
    """Images of which each has an expert of its own: 8 to a class explain much of it, whatever the classes are."""
    class_I = np.repeat(np.arange(4), 8)
    count_IE = np.zeros((32, 4), int)
    count_IE[np.arange(32), RNG.permutation(class_I)] = 16

    def by_class(labels_I: np.ndarray) -> float:
        return measures.explained_entropy(np.stack([count_IE[labels_I == c].sum(0) for c in range(4)]))

    chance = measures.chance_entropy(count_IE, class_I, seed=0, rounds=200)
    assert chance == pytest.approx(np.mean([by_class(RNG.permutation(class_I)) for _ in range(200)]), abs=0.02)
    assert 0.05 < chance < 0.3 and abs(by_class(class_I) - chance) < 0.15
    assert measures.chance_entropy(count_IE, class_I, seed=0) == measures.chance_entropy(count_IE, class_I, seed=0)
    own = measures.chance_entropy(count_IE, np.arange(32), seed=0)  # an image per class: any order explains all
    assert own == pytest.approx(measures.explained_entropy(count_IE), abs=1e-12) == pytest.approx(1)
    assert measures.chance_entropy(np.full((32, 4), 4), class_I, seed=0) == pytest.approx(0, abs=1e-12)


def test_distance_ratio_by_loops() -> None:
    x_ND, group_N = RNG.normal(size=(40, 3)), RNG.permutation(np.repeat([2, 5, 9], [10, 10, 20]))
    centroid = {g: x_ND[group_N == g].mean(0) for g in (2, 5, 9)}
    intra = sum(math.dist(x, centroid[g]) for x, g in zip(x_ND, group_N, strict=True)) / 40
    inter = (math.dist(centroid[2], centroid[5]) + math.dist(centroid[2], centroid[9])) / 3
    inter += math.dist(centroid[5], centroid[9]) / 3
    assert measures.distance_ratio(x_ND, group_N) == pytest.approx(inter / intra, rel=1e-12)
    assert math.isnan(measures.distance_ratio(x_ND, np.zeros(40, int)))
    assert math.isnan(measures.distance_ratio(np.array([[0.0], [1.0]]), np.array([0, 1])))  # no spread


def test_subspace_similarity_is_the_definition() -> None:
    w_EMD, k = RNG.normal(size=(4, 10, 7)), 3
    found = measures.subspace_similarity(w_EMD, k)
    for a in range(4):
        for b in range(4):
            u_a, u_b = (np.linalg.svd(w_EMD[i])[0][:, :k] for i in (a, b))
            total = sum(float(u_a[:, i] @ u_b[:, j]) ** 2 for i in range(k) for j in range(k))
            assert found[a, b] == pytest.approx(total / k, abs=1e-12)


def test_subspace_similarity_in_closed_form() -> None:
    basis = np.eye(6)
    scale = np.diag([5.0, 4, 3])
    same, other, half = basis[:, :3] @ scale, basis[:, 3:] @ scale, basis[:, [0, 3, 4]] @ scale
    found = measures.subspace_similarity(np.stack([same, -2 * same[:, ::-1], other, half]), 3)
    assert np.allclose(found[0], [1, 1, 0, 1 / 3])
    assert np.allclose(np.diag(found), 1) and np.allclose(found, found.T)
    many = measures.subspace_similarity(RNG.normal(size=(40, 64, 64)), 8)
    assert measures.mean_of_pairs(many) == pytest.approx(8 / 64, rel=0.05)  # by chance
    assert math.isnan(measures.mean_of_pairs(np.ones((1, 1))))


def test_clusters_and_plane() -> None:
    x_ND = np.concatenate([RNG.normal(10 * c, 0.1, (20, 3)) for c in range(3)])
    cluster_N = measures.kmeans_clusters(x_ND, 3, seed=0)
    assert len({tuple(cluster_N[20 * c : 20 * c + 20]) for c in range(3)}) == 3
    assert all(len(set(cluster_N[20 * c : 20 * c + 20])) == 1 for c in range(3))
    assert measures.kmeans_clusters(np.zeros((5, 2)), 10, seed=0).tolist() == [0] * 5
    plane_N2 = measures.tsne(x_ND, seed=0)
    assert plane_N2.shape == (60, 2) and measures.distance_ratio(plane_N2, cluster_N) > 2
    assert (measures.tsne(x_ND, seed=0) == plane_N2).all()
