"""Auxiliary losses of routing: pure functions of tensors, no parameters, no communication.

Legend: T tokens, D width, E experts. Equation numbers are those of the paper (arXiv:2510.24711).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def centroid_sums(x_TD: Tensor, expert_TK: Tensor, num_experts: int) -> Tensor:
    """Per expert: the sum of its tokens and, in the last column, their number.

    A token counts once for each of its K experts. A product with the 0/1 membership matrix: deterministic, and no
    device synchronisation. The result is additive over ranks.

    Args:
        x_TD: float32 [T, D], router input, not detached.
        expert_TK: int64 [T, K].

    Returns:
        float32 [E, D + 1].
    """
    member_TE = x_TD.new_zeros(len(x_TD), num_experts).scatter(1, expert_TK, 1.0)
    return torch.cat([member_TE.T @ x_TD, member_TE.sum(0)[:, None]], dim=1)


def routing_contrastive(prototype_ED: Tensor, sums_ED1: Tensor, temperature: float) -> Tensor:
    """Routing contrastive loss, Eq. (6): cross-entropy between prototypes p_i and token centroids m_j, i matching i.

    Only experts that received tokens take part, as rows and as columns; with fewer than two of them the loss is 0.
    Absent experts are masked, not removed: shapes do not depend on the data.

    Args:
        prototype_ED: float32 [E, D].
        sums_ED1: float32 [E, D + 1] from `centroid_sums`, summed over the ranks for the global scope.
        temperature: tau.

    Returns:
        float32 scalar.
    """
    count_E = sums_ED1[:, -1].detach()
    present_E = count_E > 0
    centroid_ED = sums_ED1[:, :-1] / count_E.clamp(min=1)[:, None]
    logits_EE = F.normalize(prototype_ED, dim=-1) @ F.normalize(centroid_ED, dim=-1).T / temperature
    logits_EE = logits_EE.masked_fill(~present_E[None, :], torch.finfo(logits_EE.dtype).min)
    loss_E = -logits_EE.log_softmax(dim=-1).diagonal().masked_fill(~present_E, 0.0)
    number = present_E.sum()
    return (loss_E.sum() / number.clamp(min=1)) * (number >= 2)
