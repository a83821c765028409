"""DiffMoE's choice in a pool of tokens, in training and in inference, against a slow float64 loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from promoe_ds.moe.routers.diffmoe import choose_here, choose_in_pool
from tests.moe.routers.loops import D, E, check, losses_of, make, route, same_gradients, split_of, tokens


@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("scope", ["global", "rank"])
def test_diffmoe_training(scope: str, top_k: int) -> None:
    router: Any = make("diffmoe", top_k=top_k, scope=scope)
    threshold = None
    for seed in range(3):
        x = tokens(seed=seed)
        x_TD = x.reshape(-1, D)
        k = len(x_TD) * top_k // E
        score = torch.stack([(router.gate @ t).softmax(0) for t in x_TD])
        logit = torch.stack([
            router.out_weight @ F.silu(router.hidden_weight @ t.detach() + router.hidden_bias) + router.out_bias
            for t in x_TD
        ])  # fmt: skip
        taken = {(t, i) for i in range(E) for t in sorted(range(len(x_TD)), key=lambda t: -score[t, i].item())[:k]}  # noqa: B023
        routing = route(router, x, split_of())
        check(routing, {(t, i): score[t, i] for t, i in taken})
        terms = [
            -F.logsigmoid(logit[t, i] if (t, i) in taken else -logit[t, i]) for t in range(len(x_TD)) for i in range(E)
        ]
        loss = sum(terms) / len(terms)
        ours = losses_of(router, routing)["capacity"]
        torch.testing.assert_close(ours, loss)
        predictor = [router.hidden_weight, router.hidden_bias, router.out_weight, router.out_bias]
        same_gradients(ours, loss, predictor)  # type: ignore[arg-type]
        assert torch.autograd.grad(ours, x, allow_unused=True) == (None,), "x is detached"
        router.after_step()
        kth = torch.stack(
            [sorted(logit[:, i].sigmoid().tolist(), reverse=True)[k - 1] * torch.ones(()) for i in range(E)]
        )
        threshold = kth if threshold is None else 0.95 * threshold + 0.05 * kth
        torch.testing.assert_close(router.threshold, threshold.double(), rtol=1e-6, atol=1e-6)


def test_thresholds_are_an_average_that_decays() -> None:
    """The first step sets them. Ranks and micro-batches count alike; a step without tokens leaves them."""
    router: Any = make("diffmoe", threshold_decay=0.75)
    steps = [[[0.5, 0.25, 0.125, 1.0]], [[0.1, 0.2, 0.3, 0.4], [0.3, 0.6, 0.9, 0.2]], [], [[1.0, 0.0, 0.5, 0.5]] * 3]
    expected = [0.5] * E
    for i, step in enumerate(steps):
        for kth_E in step:
            router.accumulate(torch.tensor([*kth_E, 1.0]))
        router.accumulate(torch.zeros(E + 1))  # a pool without tokens
        router.after_step()
        for e in range(E if step else 0):
            mean = sum(kth_E[e] for kth_E in step) / len(step)
            expected[e] = mean if i == 0 else 0.75 * expected[e] + 0.25 * mean
        assert router.threshold.tolist() == pytest.approx(expected) and router.updates == (1, 2, 2, 3)[i]


@pytest.mark.parametrize("inference", ["token", "pool"])
def test_diffmoe_inference(inference: str) -> None:
    router: Any = make("diffmoe", inference=inference).eval()
    router.threshold.copy_(torch.tensor([0.2, 0.5, 0.6, 1.1]))
    x = tokens()
    x_TD = x.reshape(-1, D)
    score, likely = (router.gate @ x_TD.T).softmax(0).T, router.predict(x_TD).sigmoid()
    above = {(t, i) for t in range(len(x_TD)) for i in range(E) if likely[t, i] > router.threshold[i]}
    if inference == "pool":
        number = [sum(i == j for _, j in above) for i in range(E)]
        above = {
            (t, i) for i in range(E) for t in sorted(range(len(x_TD)), key=lambda t: -score[t, i].item())[: number[i]]
        }
    routing = route(router, x, split_of())
    check(routing, {(t, i): score[t, i] for t, i in above})
    assert routing.terms == {} and 3 not in routing.expert_N and 0 < len(above) < len(x_TD) * E


def test_diffmoe_pool_of_several_ranks() -> None:
    """The union of the ranks' choices is the choice of one rank with all tokens; ties at the boundary are all taken."""
    generator = torch.Generator().manual_seed(0)
    score, likely = (torch.rand(21, E, generator=generator) for _ in range(2))
    whole = choose_here(score, likely, 21 // E)
    padding = torch.full((4, 2 * E), -1.0)
    pool = torch.cat([torch.cat([score, likely], 1)[:8], padding, torch.cat([score, likely], 1)[8:]])
    parts = [choose_in_pool(score[:8], pool, 1), choose_in_pool(score[8:], pool, 1)]
    assert torch.equal(torch.cat([p.taken_TE for p in parts]), whole.taken_TE)
    assert all(torch.equal(p.kth_E1, whole.kth_E1) for p in parts)
    pairs = [
        (t + 8 * r, i)
        for r, p in enumerate(parts)
        for t, i in zip(p.token_N.tolist(), p.expert_N.tolist(), strict=True)
    ]
    assert set(pairs) == set(zip(whole.token_N.tolist(), whole.expert_N.tolist(), strict=True))
    level = torch.full((6, E), 0.25)
    assert choose_in_pool(level, torch.cat([level, level], 1), 1).taken_TE.sum() == 6 * E
    assert choose_here(level, level, 1).taken_TE.sum() == E
    empty = choose_in_pool(score[:0], padding, 1)
    assert len(empty.token_N) == 0 and (empty.kth_E1 == 0).all()
