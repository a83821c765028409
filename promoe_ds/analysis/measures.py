"""How specialised experts are, as numbers: pure functions of numpy arrays.

Legend: N tokens, I images, D width, E experts, C groups (classes, timesteps or positions), M rows of a weight
matrix, k rank.
"""

from __future__ import annotations

import numpy as np


def explained_entropy(count_CE: np.ndarray) -> float:
    """The share of the choice of expert that the group explains: I(C; E) / H(E), in [0, 1] (Theil's U).

    0: every group uses the experts alike; 1: the group decides the expert. 0 too if one expert takes all.

    Args:
        count_CE: tokens of each group at each expert.
    """
    from sklearn.metrics import mutual_info_score  # late: scikit-learn takes a second to import

    share_E = count_CE.sum(0)[count_CE.any(0)] / count_CE.sum()
    entropy = float(-(share_E * np.log(share_E)).sum())
    return min(1.0, mutual_info_score(None, None, contingency=count_CE) / entropy) if entropy > 1e-12 else 0.0


def chance_entropy(count_IE: np.ndarray, class_I: np.ndarray, seed: int, rounds: int = 20) -> float:
    """What classes that mean nothing would explain: `explained_entropy` with the images' classes shuffled, the mean.

    It is above 0, since the tokens of an image go together and every class has few images.

    Args:
        count_IE: tokens of each image at each expert.
        class_I: class of each image.
    """
    rng, (_, first_C) = np.random.default_rng(seed), np.unique(np.sort(class_I), return_index=True)
    shuffled = (np.add.reduceat(rng.permutation(count_IE), first_C) for _ in range(rounds))
    return float(np.mean([explained_entropy(count_CE) for count_CE in shuffled]))


def distance_ratio(x_ND: np.ndarray, group_N: np.ndarray) -> float:
    """Inter- over intra-group distance: the mean Euclidean distance between two groups' centroids over the mean
    distance of a token to the centroid of its group. Above 1, groups are farther apart than they are wide.

    The paper (Fig. 1a) gives such a ratio without a formula; this is ours. NaN for fewer than two groups, and where
    all tokens are their centroids.
    """
    groups = np.unique(group_N)
    if len(groups) < 2:
        return float("nan")
    x_ND = np.asarray(x_ND, dtype=np.float64)
    centroid_CD = np.stack([x_ND[group_N == g].mean(0) for g in groups])
    intra = np.linalg.norm(x_ND - centroid_CD[np.searchsorted(groups, group_N)], axis=1).mean()
    gaps = np.linalg.norm(centroid_CD[:, None] - centroid_CD[None], axis=-1)
    inter = gaps[np.triu_indices(len(groups), 1)].mean()
    return float(inter / intra) if intra > 0 else float("nan")


def subspace_similarity(w_EMD: np.ndarray, k: int) -> np.ndarray:
    """[E, E]: phi(a, b) = ||U_a^T U_b||_F^2 / k in [0, 1], U the top-k left singular vectors of an expert's matrix.

    Hu et al. 2021 (LoRA, arXiv:2106.09685), Sec. 7.2, with i = j = k. 1: the same subspace; 0: orthogonal ones; two
    random ones of R^M have k / M in the mean.

    Args:
        w_EMD: a matrix [M, D] of each expert.
        k: at most min(M, D).
    """
    u_EMk = np.linalg.svd(np.asarray(w_EMD, dtype=np.float64), full_matrices=False)[0][:, :, :k]
    gram_EkEk = np.tensordot(u_EMk, u_EMk, (1, 1))
    return (gram_EkEk**2).sum((1, 3)) / k


def mean_of_pairs(matrix_EE: np.ndarray) -> float:
    """The mean over pairs of different experts; NaN for one alone."""
    off = matrix_EE[~np.eye(len(matrix_EE), dtype=bool)]
    return float(off.mean()) if off.size else float("nan")


def kmeans_clusters(x_ND: np.ndarray, clusters: int, seed: int) -> np.ndarray:
    """int64 [N]: k-means (scikit-learn, k-means++, the best of 3 starts)."""
    from sklearn.cluster import KMeans

    clusters = min(clusters, len(np.unique(x_ND, axis=0)))
    kmeans = KMeans(clusters, n_init=3, random_state=seed)  # type: ignore[arg-type]
    return kmeans.fit_predict(x_ND).astype(np.int64)


def tsne(x_ND: np.ndarray, seed: int) -> np.ndarray:
    """float32 [N, 2]: t-SNE in the plane (scikit-learn, perplexity 30 or less, initialised by PCA)."""
    from sklearn.manifold import TSNE

    perplexity = min(30.0, max(1.0, (len(x_ND) - 1) / 3))
    return TSNE(2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(x_ND)
