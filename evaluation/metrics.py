"""Metrics as pure functions of arrays, in float64. Precision and recall, which need fast blocks, are in manifold.py.

Shape suffixes: N images, d features, K classes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Array64 = npt.NDArray[np.float64]

IS_SPLIT = 5000
"""images per split of the Inception Score in ADM's evaluator"""


class Gaussian(NamedTuple):
    """Mean [d] and covariance [d, d] (ddof 1), float64."""

    mu_d: Array64
    sigma_dd: Array64


class Moments:
    """Mean and scatter of features that arrive in batches, in float64; neither the order nor the cut changes them.

    Batches are merged by the pairwise update of Chan, Golub and LeVeque (1983), which subtracts no large sums.
    """

    BLOCK = 1024
    """rows that are gathered before they are counted: matrix products of small batches would outlast the network"""

    def __init__(self, d: int) -> None:
        self.num = 0
        """rows counted by the last `flush`, `merge` or `gaussian`"""
        self.mean_d: Array64 = np.zeros(d)
        self.scatter_dd: Array64 = np.zeros((d, d))
        """sum over rows of (x - mean)(x - mean)^T"""
        self._waiting: list[npt.NDArray[Any]] = []

    def add(self, features_Nd: npt.NDArray[Any]) -> None:
        """Take a batch [N >= 0, d] of any float dtype."""
        self._waiting.append(features_Nd)
        if sum(map(len, self._waiting)) >= self.BLOCK:
            self.flush()

    def flush(self) -> None:
        """Count the rows taken so far."""
        rows, self._waiting = self._waiting, []
        if not sum(map(len, rows)):
            return
        x_Nd = np.concatenate(rows).astype(np.float64)
        mean_d = x_Nd.mean(axis=0)
        x_Nd -= mean_d
        self._count(len(x_Nd), mean_d, x_Nd.T @ x_Nd)

    def merge(self, other: Moments) -> None:
        """Count what another process has counted."""
        self.flush()
        other.flush()
        if other.num:
            self._count(other.num, other.mean_d, other.scatter_dd)

    def _count(self, num: int, mean_d: Array64, scatter_dd: Array64) -> None:
        delta_d, total = mean_d - self.mean_d, self.num + num
        self.scatter_dd += scatter_dd
        self.scatter_dd += np.outer(delta_d, delta_d * (self.num * num / total))
        self.mean_d = self.mean_d + delta_d * (num / total)
        self.num = total

    def gaussian(self) -> Gaussian:
        """Mean and unbiased covariance. Raises ValueError for fewer than two rows."""
        self.flush()
        if self.num < 2:
            raise ValueError(f"a covariance needs features [N >= 2, d], got N = {self.num}")
        return Gaussian(self.mean_d, self.scatter_dd / (self.num - 1))


def gaussian_statistics(features_Nd: npt.NDArray[Any]) -> Gaussian:
    """Mean [d] and unbiased covariance [d, d] (ddof 1) of features [N, d]; float64 whatever the input dtype.

    Raises ValueError unless the input is a matrix with at least two rows.
    """
    if features_Nd.ndim != 2 or len(features_Nd) < 2:
        raise ValueError(f"a covariance needs features [N >= 2, d], got shape {features_Nd.shape}")
    moments = Moments(features_Nd.shape[1])
    moments.add(features_Nd)
    return moments.gaussian()


def _psd_sqrt(sigma_dd: Array64) -> Array64:
    """Symmetric square root of a positive semi-definite matrix; eigenvalues below zero are rounding, hence zero."""
    values_d, vectors_dd = np.linalg.eigh(sigma_dd)
    return (vectors_dd * np.sqrt(values_d.clip(min=0.0))) @ vectors_dd.T


def frechet_distance(mu1: Array64, sigma1: Array64, mu2: Array64, sigma2: Array64) -> float:
    """Squared Frechet (2-Wasserstein) distance of Gaussians, mu [d], sigma [d, d] symmetric; arXiv:1706.08500 Eq. 6.

    |mu1 - mu2|^2 + tr S1 + tr S2 - 2 tr (S1^(1/2) S2 S1^(1/2))^(1/2). The symmetric form has the eigenvalues of S1 S2
    but needs only `eigh`: no complex parts, and no epsilon on the diagonal when a covariance is singular (N <= d).
    Rounding may leave equal Gaussians slightly below zero; such values become 0.
    """
    mu1, sigma1, mu2, sigma2 = (np.asarray(a, dtype=np.float64) for a in (mu1, sigma1, mu2, sigma2))
    root1_dd = _psd_sqrt(sigma1)
    product_dd = root1_dd @ sigma2 @ root1_dd
    eigenvalues_d = np.linalg.eigvalsh((product_dd + product_dd.T) / 2)
    cross = np.sqrt(eigenvalues_d.clip(min=0.0)).sum()
    distance = np.square(mu1 - mu2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2.0 * cross
    return max(float(distance), 0.0)


def inception_score(logits_NK: npt.NDArray[Any], split: int = IS_SPLIT) -> float:
    """exp E_x KL(p(y|x) || p(y)), arXiv:1606.03498 Sec. 4, for p = softmax(logits): between 1 and K.

    The mean over consecutive splits of `split` images, not shuffled, the last one possibly shorter, as in ADM's
    evaluator. With q the mean of p over a split, E KL(p || q) = E sum p log p - sum q log q.
    """
    if logits_NK.ndim != 2 or not len(logits_NK) or split < 1:
        raise ValueError(f"the Inception Score needs logits [N >= 1, K], got shape {logits_NK.shape}")
    scores = []
    for start in range(0, len(logits_NK), split):
        z_NK = logits_NK[start : start + split].astype(np.float64)
        z_NK -= z_NK.max(axis=1, keepdims=True)
        p_NK = np.exp(z_NK)
        total_N1 = p_NK.sum(axis=1, keepdims=True)
        p_NK /= total_N1
        negative_entropy = (p_NK * (z_NK - np.log(total_N1))).sum(axis=1).mean()
        q_K = p_NK.mean(axis=0)
        q_K = q_K[q_K > 0]  # classes that underflow everywhere contribute 0 log 0 = 0
        scores.append(np.exp(negative_entropy - (q_K * np.log(q_K)).sum()))
    return float(np.mean(scores))


def label_agreement(logits_NK: npt.NDArray[Any], labels_N: npt.NDArray[np.integer[Any]]) -> float:
    """Share of images, in [0, 1], whose largest logit is that of the label they were made for.

    On real images this is the classifier's accuracy. Raises ValueError for lengths that differ or are zero.
    """
    if logits_NK.ndim != 2 or labels_N.shape != logits_NK.shape[:1] or not len(labels_N):
        raise ValueError(f"logits {logits_NK.shape} and labels {labels_N.shape} must be [N, K] and [N], N >= 1")
    return float((logits_NK.argmax(axis=1) == labels_N).mean())
