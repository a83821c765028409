"""Routing contrastive loss: closed forms, invariances, additivity over ranks."""

from __future__ import annotations

import math

import torch

from promoe_ds.moe.losses import centroid_sums, routing_contrastive, unit


def test_orthogonal_prototypes_at_their_centroids() -> None:
    """cos = 1 on the diagonal and 0 off it: every row's loss is log(1 + (n-1) exp(-1/tau))."""
    p = torch.eye(4, dtype=torch.float64)
    sums = torch.cat([3 * p, torch.full((4, 1), 3.0, dtype=torch.float64)], dim=1)
    expected = math.log(1 + 3 * math.exp(-1 / 0.5))
    assert math.isclose(routing_contrastive(unit(p), sums, 0.5).item(), expected, rel_tol=1e-12)


def test_absent_experts_change_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    p, m = (torch.randn(5, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    present = torch.tensor([0, 2, 3])
    sums = torch.zeros(5, 9, dtype=torch.float64)
    sums[present] = torch.cat([m[present], torch.ones(3, 1, dtype=torch.float64)], dim=1)
    p.requires_grad_()
    full = routing_contrastive(unit(p), sums, 0.07)
    torch.testing.assert_close(full, routing_contrastive(unit(p[present]), sums[present], 0.07))
    (grad,) = torch.autograd.grad(full, p)
    assert torch.isfinite(grad).all() and (grad[[1, 4]] == 0).all() and (grad[present] != 0).any()


def test_zero_with_fewer_than_two_experts() -> None:
    p = torch.randn(3, 4, requires_grad=True)
    for rows in ([], [1]):
        sums = torch.zeros(3, 5)
        sums[rows] = 1.0
        loss = routing_contrastive(unit(p), sums, 0.07)
        (grad,) = torch.autograd.grad(loss, p)
        assert loss.item() == 0 and (grad == 0).all()


def test_sums_are_additive_over_ranks_and_count_every_expert_of_a_token() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(10, 3, generator=generator, dtype=torch.float64)
    expert_TK = torch.stack([torch.randperm(4, generator=generator)[:2] for _ in range(10)])
    whole = centroid_sums(x, expert_TK, 4)
    parts = centroid_sums(x[:4], expert_TK[:4], 4) + centroid_sums(x[4:], expert_TK[4:], 4)
    torch.testing.assert_close(whole, parts)
    assert whole[:, -1].sum() == 20
    slow = sum(x[t] for t in range(10) if 2 in expert_TK[t])
    torch.testing.assert_close(whole[2, :-1], slow)
