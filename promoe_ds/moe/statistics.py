"""Numbers that say how experts are used: pure functions, on any device, without waiting for it.

Legend: L MoE layers, E routed experts, D width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from promoe_ds.moe.routing import Router


def max_over_mean(load_LE: Tensor) -> Tensor:
    """float64 [L]: the busiest expert's tokens over the mean; 1 is even, E is one expert for all, 0 is no token."""
    load_LE = load_LE.double()
    return load_LE.amax(1) / load_LE.mean(1).clamp(min=1e-12)


def load_entropy(load_LE: Tensor) -> Tensor:
    """float64 [L]: -sum_e p_e ln p_e / ln E of the shares p; 1 is even, 0 one expert for all, or none."""
    share_LE = load_LE.double() / load_LE.double().sum(1, keepdim=True).clamp(min=1)
    return -torch.special.xlogy(share_LE, share_LE).sum(1) / max(math.log(load_LE.shape[1]), 1e-12)


def dead_experts(load_LE: Tensor) -> Tensor:
    """int64 [L]: experts without a token."""
    return (load_LE == 0).sum(1)


def prototypes_of(router: Router) -> Tensor | None:
    """What stands for each expert among the tokens: float [E, D] prototypes or k-means centroids; None without any.

    The parameter or buffer itself: under ZeRO-3 a rank holds a piece of it.
    """
    for name in ("prototypes", "centroids"):
        if isinstance(found := getattr(router, name, None), Tensor):
            return found
    return None


def cosines(p_ED: Tensor) -> Tensor:
    """[E, E] cosines between rows; a row of zeros has 0 with all."""
    unit_ED = F.normalize(p_ED, dim=1)
    return unit_ED @ unit_ED.T


PROTOTYPE_STATISTICS = ("prototype_norm", "prototype_norm_max", "prototype_cos", "prototype_cos_max")


def prototype_statistics(p_ED: Tensor) -> Tensor:
    """float32 [4]: mean and largest norm; mean and largest cosine of two different prototypes (0 for one alone)."""
    p_ED = p_ED.float()
    E, norm_E = len(p_ED), p_ED.norm(dim=1)
    off_EE = ~torch.eye(E, dtype=torch.bool, device=p_ED.device)
    cos_EE = cosines(p_ED)
    mean = (cos_EE * off_EE).sum() / max(1, E * (E - 1))
    largest = cos_EE.masked_fill(~off_EE, -1.0).max() if E > 1 else mean
    return torch.stack([norm_E.mean(), norm_E.max(), mean, largest])
