"""Auxiliary losses of routing: functions of tensors, without parameters; how to sum over ranks they are told.

What one layer gives to a loss is additive over ranks; the losses are of all MoE layers at once.
Legend: L MoE layers, T tokens, N edges, D width, E experts. Equation numbers are those of the paper (arXiv:2510.24711).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from promoe_ds.moe.constants import unit_rows
from promoe_ds.moe.cosine import length
from promoe_ds.moe.router import identity

Scope = Literal["global", "rank"]
"""what a loss covers: the micro-batch of all ranks, so that it does not depend on the topology, or each rank's own"""
ABSENT = 1e30
"""subtracted from the logits of experts without tokens; finite, because 0 times infinity is not a number"""


class _CentroidSums(torch.autograd.Function):
    """A token's gradient is that of its expert's sum: gathered, which a compiler fuses into what reads it."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, expert_N: Tensor, num_experts: int, top_k: int) -> Tensor:
        ctx.save_for_backward(expert_N)
        ctx.top_k = top_k
        member_EN = unit_rows(num_experts, x_TD.dtype, x_TD.device).index_select(1, expert_N)
        member_ET = member_EN if top_k == 1 else member_EN.view(num_experts, len(x_TD), top_k).sum(2)
        return member_ET @ x_TD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        grad_ND = grads[0].index_select(0, ctx.saved_tensors[0])
        top_k = ctx.top_k
        return grad_ND if top_k == 1 else grad_ND.view(-1, top_k, grad_ND.shape[1]).sum(1), None, None, None


def centroid_sums(x_TD: Tensor, expert_N: Tensor, num_experts: int, top_k: int = 1) -> Tensor:
    """The sum of each expert's tokens, additive over ranks. A token counts once for each of its K experts.

    A product with the 0/1 membership matrix: deterministic, and no device synchronisation.

    Args:
        x_TD: float32 [T, D], router input, not detached.
        expert_N: int64 [T*K], token by token.

    Returns:
        float32 [E, D].
    """
    return _CentroidSums.apply(x_TD, expert_N, num_experts, top_k)  # type: ignore[no-any-return]


def routing_contrastive(unit_LDE: Tensor, sum_LED: Tensor, tokens_per_expert_LE: Tensor, temperature: float) -> Tensor:
    """Routing contrastive loss, Eq. (6): cross-entropy between prototypes p_i and token centroids m_j, i matching i.

    Only experts that received tokens take part, as rows and as columns; with fewer than two of them the loss is 0.
    Absent experts are masked, not removed: shapes do not depend on the data. A centroid enters by its direction
    alone, so the sum of its tokens stands for their mean; alone in its row, it has a softmax of exactly 1, loss 0.

    Args:
        unit_LDE: float32 [L, D, E], prototypes of length 1.
        sum_LED: float32 [L, E, D] from `centroid_sums`, summed over the ranks for the global scope.
        tokens_per_expert_LE: [L, E] of any dtype, the tokens in each sum.
        temperature: tau.

    Returns:
        float32 [L].
    """
    absent_LE = (tokens_per_expert_LE == 0).to(sum_LED.dtype)
    unit_LED = sum_LED / length(sum_LED)
    logits_LEE = torch.baddbmm(absent_LE[..., None], unit_LED, unit_LDE, beta=-ABSENT, alpha=1 / temperature)
    log_p_LE = logits_LEE.log_softmax(dim=1).diagonal(dim1=1, dim2=2)  # [l, j, i] is m_j . p_i / tau
    return (log_p_LE * (absent_LE - 1)).sum(1) / tokens_per_expert_LE.count_nonzero(dim=1).clamp(min=1)


def sums_over_scope(scope: Scope, all_reduce: Callable[[Tensor], Tensor], *parts: Tensor) -> Sequence[Tensor]:
    """Parts that are additive over ranks, summed over those of the scope by a single all-reduce.

    Args:
        scope: "global" or "rank".
        all_reduce: differentiable sum over ranks.
        parts: of any shapes; the first floating point.

    Returns:
        The sums, in the first one's dtype; where nothing is to be summed the parts themselves. A part that needs no
        gradient gets none.
    """
    if scope != "global" or all_reduce is identity:
        return parts
    packed = all_reduce(torch.cat([part.flatten().to(parts[0].dtype) for part in parts]))
    sums = packed.split([part.numel() for part in parts])
    return [
        (total if part.requires_grad else total.detach()).view_as(part) for total, part in zip(sums, parts, strict=True)
    ]


def sum_and_number(total: Tensor, number: Tensor | int) -> Tensor:
    """What one layer gives to a mean over tokens or images: the sum of its terms and how many there are; [2]."""
    return torch.stack([total, torch.ones_like(total) * number])


def mean_over_scope(pair_L2: Tensor, scope: Scope, all_reduce: Callable[[Tensor], Tensor]) -> Tensor:
    """Means whose terms are spread over ranks: sum / number, both summed over the ranks for the scope "global"; [L].

    Args:
        pair_L2: `sum_and_number` of each layer. No term anywhere gives 0.
        scope: "global" or "rank".
        all_reduce: differentiable sum over ranks.
    """
    (pair_L2,) = sums_over_scope(scope, all_reduce, pair_L2)
    total_L, number_L = pair_L2.unbind(1)
    return total_L / number_L.detach().clamp(min=1)


def load_balance(score_LE: Tensor, tokens_per_expert_LE: Tensor, top_k: int) -> Tensor:
    """Load-balance loss E * sum_i f_i P_i (Switch Transformer, arXiv:2101.03961, Eq. (4)-(6)); 1 at perfect balance.

    f_i is the share of edges that go to expert i, P_i the mean score of i over the tokens.

    Args:
        score_LE: float32 [L, E], scores summed over the tokens.
        tokens_per_expert_LE: [L, E] of any dtype, edges: K per token.

    Returns:
        float32 [L].
    """
    edges_L = tokens_per_expert_LE.sum(1).clamp(min=1)  # T*K
    return tokens_per_expert_LE.shape[1] * top_k * (tokens_per_expert_LE * score_LE).sum(1) / edges_L / edges_L


def z_terms(logit_TE: Tensor) -> Tensor:
    """What one layer gives to the router z-loss, the mean over tokens of (log sum_i exp z_i)^2 (ST-MoE,
    arXiv:2202.08906, Eq. (5)), for `mean_over_scope`; [2]."""
    return sum_and_number(logit_TE.logsumexp(dim=-1).square().sum(), len(logit_TE))


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
