"""Metrics as pure functions of arrays, in float64.

Shape suffixes: N images, d features, K classes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array64 = npt.NDArray[np.float64]


def gaussian_statistics(features_Nd: npt.NDArray[Any]) -> tuple[Array64, Array64]:
    """Mean [d] and unbiased covariance [d, d] (ddof 1) of features [N, d]; float64 whatever the input dtype.

    Raises ValueError unless the input is a matrix with at least two rows.
    """
    if features_Nd.ndim != 2 or len(features_Nd) < 2:
        raise ValueError(f"a covariance needs features [N >= 2, d], got shape {features_Nd.shape}")
    features = features_Nd.astype(np.float64)
    return features.mean(axis=0), np.atleast_2d(np.cov(features, rowvar=False, ddof=1))


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


def label_agreement(logits_NK: npt.NDArray[Any], labels_N: npt.NDArray[np.integer[Any]]) -> float:
    """Share of images, in [0, 1], whose largest logit is that of the label they were made for.

    On real images this is the classifier's accuracy. Raises ValueError for lengths that differ or are zero.
    """
    if logits_NK.ndim != 2 or labels_N.shape != logits_NK.shape[:1] or not len(labels_N):
        raise ValueError(f"logits {logits_NK.shape} and labels {labels_N.shape} must be [N, K] and [N], N >= 1")
    return float((logits_NK.argmax(axis=1) == labels_N).mean())
