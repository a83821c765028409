"""Expert choice, with a gate or with prototypes, against a slow float64 loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from promoe_ds.moe.routers import ROUTERS
from tests.moe.routers.loops import D, E, S, check, losses_of, make, route, same_gradients, split_of, tokens


def per_image_choice(x: Tensor, score: Any, quota: int) -> dict[tuple[int, int], Tensor]:
    """Loop over images and experts: the `quota` tokens with the highest `score(token, expert)`."""
    expected = {}
    for b, image in enumerate(x):
        for i in range(E):
            scores = [score(token, i) for token in image]
            for s in sorted(range(S), key=lambda s: -scores[s].item())[:quota]:
                expected[b * S + s, i] = scores[s]
    return expected


@pytest.mark.parametrize("top_k", [1, 2])
def test_expert_choice(top_k: int) -> None:
    router, x = make("expert_choice", top_k=top_k), tokens()
    softmax = lambda token, i: (router.gate @ token).softmax(0)[i]  # noqa: E731
    check(route(router, x, split_of()), per_image_choice(x, softmax, S * top_k // E))


@pytest.mark.parametrize("top_k", [1, 2])
def test_promoe_expert_choice(top_k: int) -> None:
    router, x, tau = make("promoe_ec", top_k=top_k, temperature=0.3), tokens(), 0.3
    P: Any = router.prototypes
    cosine = lambda token, i: token @ P[i] / (token.norm() * P[i].norm())  # noqa: E731, Eq. (4)
    expected = per_image_choice(x, cosine, S * top_k // E)
    routing = route(router, x, split_of())
    check(routing, expected)
    loss = torch.zeros(()).double()
    for b in range(len(x)):  # Eq. (6) within the image
        m = [torch.stack([x[b, t - b * S] for t, j in expected if j == i and t // S == b]).mean(0) for i in range(E)]
        for i in range(E):
            sim = torch.stack([F.cosine_similarity(P[i], m[j], dim=0) for j in range(E)]) / tau
            loss = loss - (sim[i] - torch.logsumexp(sim, 0)) / (len(x) * E)
    ours = losses_of(router, routing)["routing_contrastive"]
    torch.testing.assert_close(ours, loss)
    same_gradients(ours, loss, [x, P])


def test_the_paper_takes_21_of_256_tokens() -> None:
    kind = ROUTERS["promoe_ec"]
    router = kind(kind.Config(), 12, D)  # type: ignore[call-arg]
    torch.nn.init.normal_(router.prototypes)  # type: ignore[arg-type]
    assert len(route(router, torch.randn(1, 256, D), split_of([0])).token_N) == 12 * 21
