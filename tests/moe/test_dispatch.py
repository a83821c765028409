"""Dispatch then combine is a weighted sum over edges, whatever the edges; the two are permutations, not copies."""

from __future__ import annotations

import pytest
import torch

from promoe_ds.moe.dispatch import (
    AllToAllDispatcher,
    LocalDispatcher,
    Pending,
    expert_offsets,
    inverse_of,
    permute,
    tokens_per_expert,
)
from promoe_ds.moe.router import Routing

E, D = 6, 4


def edges(kind: str, tokens: int, generator: torch.Generator) -> Routing:
    """Token choice with one or three experts a token, or a free list of edges as expert choice makes them."""
    if kind == "free":
        number = 2 * tokens
        token_N = torch.randint(0, max(tokens, 1), (number,), generator=generator)[: number if tokens else 0]
        top_k = 0
    else:
        top_k = int(kind)
        token_N = torch.arange(tokens).repeat_interleave(top_k)
    expert_N = torch.randint(0, E - 1, (len(token_N),), generator=generator)  # expert E-1 stays empty
    weight_N = torch.randn(len(token_N), generator=generator, dtype=torch.float64).requires_grad_()
    return Routing(token_N, expert_N, weight_N, top_k, {})


@pytest.mark.parametrize("tokens", [0, 1, 17])
@pytest.mark.parametrize("kind", ["1", "3", "free"])
def test_dispatch_experts_combine_equals_the_sum_over_edges(kind: str, tokens: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    routing = edges(kind, tokens, generator)
    x = torch.randn(tokens, D, generator=generator, dtype=torch.float64).requires_grad_()
    scale_E = torch.arange(1.0, E + 1, dtype=torch.float64)  # "expert" e multiplies by e + 1
    dispatcher = LocalDispatcher(E)
    dispatched, plan = dispatcher.dispatch(x, routing)
    rows = dispatched.wait()
    assert rows.expert_N.tolist() == sorted(routing.expert_N.tolist())
    assert rows.offsets_E.dtype == torch.int32 and rows.offsets_E.tolist() == plan.offsets_E.tolist()
    assert tokens_per_expert(plan.offsets_E).tolist() == [(routing.expert_N == e).sum().item() for e in range(E)]
    out = dispatcher.combine(rows.x_ND * scale_E[rows.expert_N][:, None], plan).wait()
    slow = torch.zeros(tokens, D, dtype=torch.float64)
    for t, e, w in zip(routing.token_N.tolist(), routing.expert_N.tolist(), routing.weight_N, strict=True):
        slow = slow.index_add(0, torch.tensor([t]), (w * scale_E[e] * x[t])[None])
    torch.testing.assert_close(out, slow)
    if tokens:
        probe = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out)
        ours = torch.autograd.grad((out * probe).sum(), [x, routing.weight_N])
        theirs = torch.autograd.grad((slow * probe).sum(), [x, routing.weight_N])
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b)


def test_permute_is_exact_and_its_gradient_is_the_inverse() -> None:
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    x = torch.randn(9, 3, dtype=torch.float64, requires_grad=True)
    inverse = inverse_of(order)
    assert torch.equal(permute(permute(x, order, inverse), inverse, order), x)
    assert torch.equal(permute(x, order, inverse), x[order])
    torch.autograd.gradcheck(lambda y: permute(y, order, inverse), x)


def test_segment_ends_and_sizes() -> None:
    ends = expert_offsets(torch.tensor([0, 0, 2, 2, 2, 5]), 7)
    assert ends.tolist() == [2, 2, 5, 5, 5, 6, 6] and tokens_per_expert(ends).tolist() == [2, 0, 3, 0, 0, 1, 0]
    assert expert_offsets(torch.tensor([], dtype=torch.int64), 3).tolist() == [0, 0, 0]
    assert tokens_per_expert(torch.stack([ends, ends])).tolist() == [[2, 0, 3, 0, 0, 1, 0]] * 2


def test_all_to_all_with_a_group_of_one_equals_local() -> None:
    generator = torch.Generator().manual_seed(3)
    routing, x = edges("3", 11, generator), torch.randn(11, D, generator=generator, dtype=torch.float64)
    alone = AllToAllDispatcher(E, E, lambda count: count, lambda rows, *_: Pending(lambda: rows))
    local = LocalDispatcher(E)
    (rows, plan), (local_rows, local_plan) = alone.dispatch(x, routing), local.dispatch(x, routing)
    for a, b in zip(got := rows.wait(), expected := local_rows.wait(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(alone.combine(got.x_ND, plan).wait(), local.combine(expected.x_ND, local_plan).wait())
