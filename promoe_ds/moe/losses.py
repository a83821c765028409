"""Auxiliary losses of routing: pure functions of tensors, no parameters, no communication.

Legend: T tokens, D width, E experts. Equation numbers are those of the paper (arXiv:2510.24711).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from promoe_ds.moe.constants import counting, unit_rows

ABSENT = 1e30
"""subtracted from the logits of experts without tokens; finite, because 0 times infinity is not a number"""


def length(x: Tensor) -> Tensor:
    """Euclidean length along the last dimension, which is kept; at least 1e-12, to divide by."""
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(1e-12)


def unit(x: Tensor) -> Tensor:
    """Vectors along the last dimension, scaled to length 1; zero stays zero."""
    return x / length(x)


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
    rows = unit_rows(num_experts, x_TD.dtype, x_TD.device).index_select(0, expert_TK.view(-1))
    top_k = expert_TK.shape[1]
    member_ET = (rows if top_k == 1 else rows.view(-1, top_k, num_experts).sum(1)).T
    return torch.cat([member_ET @ x_TD, member_ET.sum(1, keepdim=True)], dim=1)


def routing_contrastive(unit_ED: Tensor, sums_ED1: Tensor, temperature: float) -> Tensor:
    """Routing contrastive loss, Eq. (6): cross-entropy between prototypes p_i and token centroids m_j, i matching i.

    Only experts that received tokens take part, as rows and as columns; with fewer than two of them the loss is 0.
    Absent experts are masked, not removed: shapes do not depend on the data. A centroid enters by its direction
    alone, so the sum of its tokens stands for their mean; alone in its row, it has a softmax of exactly 1, loss 0.

    Args:
        unit_ED: float32 [E, D], prototypes of length 1.
        sums_ED1: float32 [E, D + 1] from `centroid_sums`, summed over the ranks for the global scope.
        temperature: tau.

    Returns:
        float32 scalar.
    """
    E, D = unit_ED.shape
    sum_ED, count_E1 = sums_ED1.split([D, 1], dim=1)
    present_E = count_E1.detach().view(-1).clamp(max=1)  # 1.0 or 0.0
    logits_EE = torch.addmm(present_E - 1, unit_ED, unit(sum_ED).T, beta=ABSENT, alpha=1 / temperature)
    nll = F.nll_loss(logits_EE.log_softmax(dim=-1), counting(E, unit_ED.device), present_E, reduction="sum")
    return nll / present_E.sum().clamp(min=1)


def mean_over_scope(
    sum_and_count: tuple[Tensor, Tensor | int], scope: str, all_reduce: Callable[[Tensor], Tensor]
) -> Tensor:
    """A mean whose terms are spread over ranks: sum / number, both summed over the ranks for the scope "global".

    Args:
        sum_and_count: scalar sum of the terms of this rank, and how many there are. No term anywhere gives 0.
        scope: "global" or "rank".
        all_reduce: differentiable sum over ranks.
    """
    total, number = sum_and_count
    pair = torch.stack([total, torch.as_tensor(number, dtype=total.dtype, device=total.device)])
    total, number = (all_reduce(pair) if scope == "global" else pair).unbind()
    return total / number.detach().clamp(min=1)


def load_balance_sums(score_TE: Tensor, expert_TK: Tensor) -> Tensor:
    """What the load-balance loss needs, additive over ranks: per expert its edges and its summed scores; [3, E].

    The last row is the number of tokens, repeated.
    """
    count_E = torch.zeros_like(score_TE).scatter(1, expert_TK, 1.0).sum(0)
    return torch.stack([count_E, score_TE.sum(0), torch.full_like(count_E, len(score_TE))])


def load_balance(sums_3E: Tensor, top_k: int) -> Tensor:
    """Load-balance loss E * sum_i f_i P_i (Switch Transformer, arXiv:2101.03961, Eq. (4)-(6)); 1 at perfect balance.

    f_i is the share of edges that go to expert i (no gradient), P_i the mean score of i over the tokens.
    """
    count_E, score_E, tokens_E = sums_3E.unbind()
    tokens_E = tokens_E.detach().clamp(min=1)
    return count_E.numel() * (count_E.detach() / (tokens_E * top_k) * score_E / tokens_E).sum()


def routing_contrastive_per_image(
    prototype_ED: Tensor, x_BSD: Tensor, token_N: Tensor, quota: int, temperature: float
) -> Tensor:
    """Eq. (6) within each image, under expert choice: sum over images of the mean over experts.

    Args:
        prototype_ED: float32 [E, D].
        x_BSD: float32 [B, S, D], router input, not detached.
        token_N: int64 [E*B*quota], the tokens taken, expert by expert and image by image.
        quota: tokens an expert takes of each image, at least 1.
        temperature: tau.

    Returns:
        float32 scalar; divide by the number of images.
    """
    E, B = len(prototype_ED), len(x_BSD)
    none_EBS = torch.zeros(E, B, x_BSD.shape[1], dtype=x_BSD.dtype, device=x_BSD.device)
    position_EBk = (token_N % x_BSD.shape[1]).view(E, B, quota)
    member_BES = none_EBS.scatter(2, position_EBk, 1 / quota).transpose(0, 1)
    centroid_BED = member_BES @ x_BSD  # m_bi: a product, so that its gradient is one too
    logits_BEE = F.normalize(prototype_ED, dim=-1) @ F.normalize(centroid_BED, dim=-1).transpose(1, 2) / temperature
    return -logits_BEE.log_softmax(dim=-1).diagonal(dim1=1, dim2=2).sum() / E
