"""Routers that learn nothing: by the class of an image, and uniform."""

from __future__ import annotations

import pytest
import torch

from tests.moe.routers.loops import LABELS, NULL, S, check, losses_of, make, route, same_gradients, split_of, tokens


@pytest.mark.parametrize("labels", [LABELS, [3, 1, 9, NULL, NULL]])
def test_classification(labels: list[int]) -> None:
    router, x = make("classification", superclasses="digits"), tokens()
    W, b = router.weight, router.bias
    group = {0: 0, 8: 0, 6: 1, 9: 1, 1: 2, 4: 2, 7: 2, 2: 3, 3: 3, 5: 3}
    expected, losses = {}, []
    for j, image in enumerate(x):
        p = (W @ (sum(image) / S) + b).softmax(0)  # type: ignore[operator]
        best = int(p.argmax())
        expected |= {(j * S + s, best): p[best] for s in range(S)}
        if labels[j] != NULL:
            losses.append(-p[group[labels[j]]].log())
    routing = route(router, x, split_of(labels))
    check(routing, expected)
    ours = losses_of(router, routing)["superclass"]
    torch.testing.assert_close(ours, torch.stack(losses).mean())
    same_gradients(ours, torch.stack(losses).mean(), [x, W, b])  # type: ignore[list-item]


@pytest.mark.parametrize("top_k", [1, 3])
def test_uniform(top_k: int) -> None:
    routing = route(make("uniform", experts=5, top_k=top_k), tokens(), split_of())
    expected = {}
    for b, label in enumerate(LABELS):
        for s in range(S):
            for j in range(top_k):
                expected[b * S + s, ((label * S + s) * top_k + j) % 5] = torch.tensor(1 / top_k, dtype=torch.float64)
    check(routing, expected)
    load = torch.bincount(routing.expert_N, minlength=5)
    assert load.max() - load.min() <= len(LABELS)
