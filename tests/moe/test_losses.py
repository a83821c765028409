"""Losses of all layers at once: closed forms, invariances, additivity over ranks, and the slow loop a layer."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from promoe_ds.moe.losses import (
    centroid_sums,
    load_balance,
    mean_over_scope,
    routing_contrastive,
    sum_and_number,
    sums_over_scope,
)
from promoe_ds.moe.router import identity
from tests.moe.test_layer import contrastive


def test_orthogonal_prototypes_at_their_centroids() -> None:
    """cos = 1 on the diagonal and 0 off it: every row's loss is log(1 + (n-1) exp(-1/tau))."""
    p = torch.eye(4, dtype=torch.float64)[None]
    expected = math.log(1 + 3 * math.exp(-1 / 0.5))
    loss_L = routing_contrastive(F.normalize(p, dim=-1).mT, 3 * p, torch.full((1, 4), 3.0, dtype=torch.float64), 0.5)
    assert loss_L.shape == (1,) and math.isclose(loss_L.item(), expected, rel_tol=1e-12)


def test_layers_at_once_are_the_slow_loop_over_each() -> None:
    """Layers with all experts, some absent, one, and none: losses and gradients of Eq. (6) in float64."""
    E, D, T, tau = 5, 8, 12, 0.3
    generator = torch.Generator().manual_seed(0)
    p_LED = torch.randn(4, E, D, generator=generator, dtype=torch.float64).requires_grad_()
    x_LTD = torch.randn(4, T, D, generator=generator, dtype=torch.float64).requires_grad_()
    chosen = torch.randint(0, E, (T,), generator=generator)
    experts = [torch.cat([torch.arange(E), chosen[E:]]), chosen % 3, torch.full((T,), 4), chosen[:0]]
    sums = [centroid_sums(x_TD[: len(e)], e, E) for x_TD, e in zip(x_LTD, experts, strict=True)]
    count_LE = torch.stack([torch.bincount(e, minlength=E) for e in experts])
    ours = routing_contrastive(F.normalize(p_LED, dim=-1).mT, torch.stack(sums), count_LE, tau)
    assigned = [[(i, x) for i, x in zip(e.tolist(), xs, strict=False)] for e, xs in zip(experts, x_LTD, strict=True)]
    slow = torch.stack([contrastive(P, tokens, tau) for P, tokens in zip(p_LED, assigned, strict=True)])
    torch.testing.assert_close(ours, slow)
    assert (ours[:2] > 0).all() and (ours[2:] == 0).all()
    weight_L = torch.tensor([1.0, -2.0, 3.0, 4.0])
    for a, b in zip(
        *(torch.autograd.grad((loss * weight_L).sum(), [p_LED, x_LTD]) for loss in (ours, slow)), strict=True
    ):
        torch.testing.assert_close(a, b)
        assert (a[2:] == 0).all()


def test_sums_are_additive_over_ranks_and_count_every_expert_of_a_token() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(10, 3, generator=generator, dtype=torch.float64)
    expert_TK = torch.stack([torch.randperm(4, generator=generator)[:2] for _ in range(10)])
    whole = centroid_sums(x, expert_TK.view(-1), 4, 2)
    parts = centroid_sums(x[:4], expert_TK[:4].view(-1), 4, 2) + centroid_sums(x[4:], expert_TK[4:].view(-1), 4, 2)
    torch.testing.assert_close(whole, parts)
    slow = sum(x[t] for t in range(10) if 2 in expert_TK[t])
    torch.testing.assert_close(whole[2], slow)
    assert (centroid_sums(x[:0], expert_TK[:0].view(-1), 4, 2) == 0).all()


def test_balance_and_means_are_those_of_each_layer_and_0_without_tokens() -> None:
    generator = torch.Generator().manual_seed(2)
    tokens_per_expert_LE = torch.tensor([[4, 1, 1], [2, 2, 2], [0, 0, 0]])
    score_LE = torch.rand(3, 3, generator=generator, dtype=torch.float64) * (tokens_per_expert_LE > 0)
    tokens, top_k = 3, 2
    slow = [
        3 * sum(f / (tokens * top_k) * s / tokens for f, s in zip(*rows, strict=True))
        for rows in zip(tokens_per_expert_LE, score_LE, strict=True)
    ]
    torch.testing.assert_close(load_balance(score_LE, tokens_per_expert_LE, top_k), torch.stack(slow))
    pair_L2 = torch.stack([sum_and_number(torch.tensor(6.0), n) for n in (3, torch.tensor(4), 0)])
    assert mean_over_scope(pair_L2, "rank", lambda v: v * math.nan).tolist() == [2.0, 1.5, 6.0]
    means = mean_over_scope(pair_L2, "global", lambda v: v + pair_L2[0].repeat(3))
    assert means.tolist() == pytest.approx([2.0, 12 / 7, 4.0])


def test_parts_are_summed_over_the_scope_by_one_reduction() -> None:
    """Shapes stay, counts take the sums' dtype and no gradient; nothing is packed where nothing is to be summed."""
    sum_ED, load_E, calls = torch.randn(3, 2, dtype=torch.float64, requires_grad=True), torch.tensor([5, 0, 7]), []

    def two_ranks(x: torch.Tensor) -> torch.Tensor:
        calls.append(x.shape)
        return x + x

    sums, load = sums_over_scope("global", two_ranks, sum_ED, load_E)
    assert calls == [(9,)] and load.dtype == torch.float64 and load.tolist() == [10, 0, 14]
    assert torch.equal(sums, 2 * sum_ED) and sums.requires_grad and not load.requires_grad
    assert sums_over_scope("rank", two_ranks, sum_ED, load_E) == (sum_ED, load_E) and len(calls) == 1
    assert sums_over_scope("global", identity, sum_ED, load_E) == (sum_ED, load_E)
