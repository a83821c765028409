"""What tests of routers share: small routers and tokens in float64, and the edges that a slow loop expects."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from promoe_ds.moe.conditional_routing import Split, split_by_label
from promoe_ds.moe.router import Router, Routing, aux_losses_of
from promoe_ds.moe.routers import ROUTERS

D, S, E, NULL = 8, 12, 4, 10
LABELS = [3, 1, 9, 3, 0]


def make(name: str, experts: int = E, **options: Any) -> Router:
    kind = ROUTERS[name]
    router = kind(kind.Config(**options), experts, D).double()  # type: ignore[call-arg]
    with torch.no_grad():
        router.init_weights(lambda key: torch.Generator().manual_seed(len(key)))
        for p in router.parameters():
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()), dtype=torch.float64) / 2)
    return router


def tokens(images: int = len(LABELS), seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(images, S, D, generator=generator, dtype=torch.float64).requires_grad_()


def split_of(labels: list[int] = LABELS, **options: Any) -> Split:
    return split_by_label(torch.tensor(labels), NULL, "cpu", **options)


def losses_of(router: Router, routing: Routing) -> dict[str, Tensor]:
    """The auxiliary losses of one router alone, scalars."""
    load_1E = torch.bincount(routing.expert_N, minlength=E)[None]
    return {name: loss_L.squeeze(0) for name, loss_L in aux_losses_of(router, [routing.terms], load_1E).items()}


def route(router: Router, x_BSD: Tensor, split: Split) -> Routing:
    return router(x_BSD.flatten(0, 1), x_BSD.shape[1], split)


def edges(routing: Routing) -> dict[tuple[int, int], Tensor]:
    pairs = zip(routing.token_N.tolist(), routing.expert_N.tolist(), strict=True)
    return dict(zip(pairs, routing.weight_N, strict=True))


def check(routing: Routing, expected: dict[tuple[int, int], Tensor]) -> None:
    found = edges(routing)
    assert found.keys() == expected.keys()
    for edge, weight in expected.items():
        torch.testing.assert_close(found[edge], weight, rtol=1e-12, atol=1e-12)


def same_gradients(ours: Tensor, slow: Tensor, inputs: list[Tensor]) -> None:
    for a, b in zip(*(torch.autograd.grad(v, inputs, allow_unused=True) for v in (ours, slow)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
