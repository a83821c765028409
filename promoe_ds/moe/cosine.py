"""Cosines between tokens and prototypes, Eq. (4) with alpha = 1.

Legend: T tokens, D width, E experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from promoe_ds.moe.recompute import keep, kept


def length(x: Tensor) -> Tensor:
    """Euclidean length along the last dimension, kept; at least 1e-12. `F.normalize` takes one operator more."""
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(1e-12)


class _Cosine(torch.autograd.Function):
    """z = x u / |x|. Its gradient in two passes over the tokens, where autograd makes five."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, unit_DE: Tensor) -> Tensor:
        length_T1 = length(x_TD)
        z_TE = x_TD @ unit_DE / length_T1
        keep(ctx, x_TD, unit_DE, length_T1, z_TE)
        return z_TE

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x_TD, unit_DE, length_T1, z_TE = kept(ctx)
        grad_TE = grads[0] / length_T1
        along_T1 = (grad_TE * z_TE).sum(1, keepdim=True) / length_T1
        return (x_TD * along_T1).addmm_(grad_TE, unit_DE.T, beta=-1), x_TD.T @ grad_TE


def cosine(x_TD: Tensor, unit_DE: Tensor) -> Tensor:
    """Cosine of each token with each prototype, without a normalised copy of the tokens. Differentiable once.

    Args:
        x_TD: float32 or float64 [T, D].
        unit_DE: as x, [D, E], prototypes of length 1.

    Returns:
        As x, [T, E]; 0 for a token that is 0. For tokens shorter than 1e-12, but not 0, the gradient is not exact.
    """
    return _Cosine.apply(x_TD, unit_DE)  # type: ignore[no-any-return]
