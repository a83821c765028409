"""Watch what the routers of a model choose, from outside: hooks that are there only while somebody looks.

Legend: B images, S tokens an image, T = B*S, D width, E routed experts, N edges, I images that the router was given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from promoe_ds.moe.layer import MoELayer
from promoe_ds.moe.routing import Router, Routing

See = Callable[[int, Router, Tensor, Routing], object]
"""(block index, router, x_ISD, its edges); images are in the model's order: those with a label first"""


def routers_of(model: nn.Module) -> dict[int, Router]:
    """The routers of a DiT by block index; empty for a dense model."""
    blocks: Any = model.blocks
    return {i: block.mlp.router for i, block in enumerate(blocks) if isinstance(block.mlp, MoELayer)}


@contextmanager
def watching(model: nn.Module, see: See) -> Iterator[None]:
    """Calls `see` after every forward of every router. Recomputation (activation checkpointing) calls it again.

    A compiled model runs eagerly meanwhile: its graphs call no hooks.
    """

    def hook(block: int) -> Callable[[Any, Any, Any], None]:
        def call(router: Any, args: Any, routing: Any) -> None:
            x_TD, S, _ = args
            see(block, router, x_TD.unflatten(0, (-1, S)), routing)

        return call

    # First among the hooks: ZeRO-3 lets go of the router's parameters in one of its own.
    handles = [r.register_forward_hook(hook(i), prepend=True) for i, r in routers_of(model).items()]
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for handle in handles:
            handle.remove()


def top_expert(routing: Routing, tokens: int) -> np.ndarray:
    """int64 [T]: the expert of each token's heaviest edge, -1 for a token that no expert takes; waits for the device.

    Of equal weights the later edge wins, which is a rule but means nothing.
    """
    token_N, expert_N = routing.token_N.cpu().numpy(), routing.expert_N.cpu().numpy()
    order = np.argsort(routing.weight_N.detach().float().cpu().numpy(), kind="stable")
    expert_T = np.full(tokens, -1, dtype=np.int64)
    expert_T[token_N[order]] = expert_N[order]  # the last assignment stays
    return expert_T


class LastChoice:
    """The experts that the middle MoE layer chose in the last forward of each batch: maps for a grid of samples.

    with LastChoice(model) as choice:
        ...                 # forwards of one batch
        choice.keep(8)      # of its first 8 images
    """

    def __init__(self, model: nn.Module):
        self.model, blocks = model, list(routers_of(model))
        self.block = blocks[len(blocks) // 2] if blocks else None
        self.last: tuple[Routing, tuple[int, ...]] | None = None
        self.maps: list[np.ndarray] = []

    def _see(self, block: int, _: Router, x_ISD: Tensor, routing: Routing) -> None:
        if block == self.block:
            self.last = routing, tuple(x_ISD.shape)

    def __enter__(self) -> LastChoice:
        self._watching = watching(self.model, self._see)
        self._watching.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._watching.__exit__(None, None, None)

    def keep(self, images: int) -> None:
        """Keep the map of the first `images` images of the last forward."""
        if self.last is not None:
            routing, (seen, S, _) = self.last
            self.maps.append(top_expert(routing, seen * S).reshape(seen, S)[:images])

    def experts_BS(self) -> np.ndarray | None:
        """int64 [B, S] of all batches kept; -1 is a token without expert; None for a dense model."""
        return np.concatenate(self.maps) if self.maps else None
