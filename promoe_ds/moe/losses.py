"""Auxiliary losses of routing: pure functions of tensors, no parameters, no communication.

Legend: T tokens, D width, E experts. Equation numbers are those of the paper (arXiv:2510.24711).
"""

from __future__ import annotations

from collections.abc import Callable

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
