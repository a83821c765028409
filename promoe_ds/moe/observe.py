"""How experts are used: numbers from their load, pure functions that never wait for the device; and what the routers of
a model choose, watched from outside by hooks that are there only while somebody looks.

Legend: L MoE layers, B images, S tokens per image, T = B*S, D width, E routed experts, N edges, I images that the
router was given.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from promoe_ds.moe.layer import MoELayer
from promoe_ds.moe.router import Router, Routing


def max_over_mean(tokens_per_expert_LE: Tensor) -> Tensor:
    """float64 [L]: the busiest expert's tokens over the mean; 1 is even, E is one expert for all, 0 is no token."""
    tokens_per_expert_LE = tokens_per_expert_LE.double()
    return tokens_per_expert_LE.amax(1) / tokens_per_expert_LE.mean(1).clamp(min=1e-12)


def load_entropy(tokens_per_expert_LE: Tensor) -> Tensor:
    """float64 [L]: -sum_e p_e ln p_e / ln E of the shares p; 1 is even, 0 one expert for all, or none."""
    share_LE = tokens_per_expert_LE.double() / tokens_per_expert_LE.double().sum(1, keepdim=True).clamp(min=1)
    return (0 - torch.special.xlogy(share_LE, share_LE).sum(1)) / max(math.log(tokens_per_expert_LE.shape[1]), 1e-12)


def dead_experts(tokens_per_expert_LE: Tensor) -> Tensor:
    """int64 [L]: experts without a token."""
    return (tokens_per_expert_LE == 0).sum(1)


def prototypes_of(router: Router) -> Tensor | None:
    """What stands for each expert among the tokens: float [E, D] prototypes or k-means centroids; None without any.

    The parameter or buffer itself: under ZeRO-3 a rank holds a piece of it.
    """
    return getattr(router, "prototypes", getattr(router, "centroids", None))


def cosines(p_ED: Tensor) -> Tensor:
    """[E, E] cosines between rows; a row of zeros has 0 with all."""
    unit_ED = F.normalize(p_ED, dim=1)
    return unit_ED @ unit_ED.T


PROTOTYPE_STATISTICS = ("prototype_norm", "prototype_norm_max", "prototype_cos", "prototype_cos_max")


def prototype_statistics(p_ED: Tensor) -> Tensor:
    """float32 [4]: mean and largest norm; mean and largest cosine of two different prototypes (0 for one alone)."""
    p_ED = p_ED.float()
    E, norm_E = len(p_ED), p_ED.norm(dim=1)
    off_EE = ~torch.eye(E, dtype=torch.bool, device=p_ED.device)
    cos_EE = cosines(p_ED)
    mean = (cos_EE * off_EE).sum() / max(1, E * (E - 1))
    largest = cos_EE.masked_fill(~off_EE, -1.0).max() if E > 1 else mean
    return torch.stack([norm_E.mean(), norm_E.max(), mean, largest])


See = Callable[[int, Router, Tensor, Routing], object]
"""(block index, router, x_ISD, its edges); images are in the model's order: those with a label first"""


def routers_of(model: nn.Module) -> dict[int, Router]:
    """The routers of a DiT by block index; empty for a dense model."""
    blocks: Any = model.blocks
    return {i: block.mlp.router for i, block in enumerate(blocks) if isinstance(block.mlp, MoELayer)}


@contextmanager
def hooked(hooks: Iterable[RemovableHandle]) -> Iterator[None]:
    """Removes these hooks at the end. A compiled model runs eagerly until then, because graphs call no hooks."""
    compiled = "torch._dynamo" in sys.modules  # to ask would load the compiler, which takes two seconds
    try:
        with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
            yield
    finally:
        for hook in hooks:
            hook.remove()


def watching(model: nn.Module, see: See) -> AbstractContextManager[None]:
    """Calls `see` after every forward of every router. Recomputation (activation checkpointing) calls it again."""

    def hook(block: int) -> Callable[[Any, Any, Any], None]:
        def call(router: Any, args: Any, routing: Any) -> None:
            x_TD, S, _ = args
            see(block, router, x_TD.unflatten(0, (-1, S)), routing)

        return call

    # First among the hooks: ZeRO-3 lets go of the router's parameters in one of its own.
    return hooked([r.register_forward_hook(hook(i), prepend=True) for i, r in routers_of(model).items()])


def top_expert(routing: Routing, tokens: int) -> np.ndarray:
    """int64 [T]: the expert of each token's heaviest edge, -1 for a token that no expert takes; waits for the device.

    Of equal weights the later edge wins, which is a rule but means nothing.
    """
    token_N, expert_N = routing.token_N.cpu().numpy(), routing.expert_N.cpu().numpy()
    order = np.argsort(routing.weight_N.detach().float().cpu().numpy(), kind="stable")
    expert_T = np.full(tokens, -1, dtype=np.int64)
    expert_T[token_N[order]] = expert_N[order]  # the last assignment stays
    return expert_T


class LastChoice(ExitStack):
    """The experts that the middle MoE layer chose in the last forward of each batch: maps for a grid of samples.

    with LastChoice(model) as choice:
        ...                 # forwards of one batch
        choice.keep(8)      # of its first 8 images
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        blocks = list(routers_of(model))
        self.block = blocks[len(blocks) // 2] if blocks else None
        self.last: tuple[Routing, tuple[int, ...]] | None = None
        self.maps: list[np.ndarray] = []
        self.enter_context(watching(model, self._see))

    def _see(self, block: int, _: Router, x_ISD: Tensor, routing: Routing) -> None:
        if block == self.block:
            self.last = routing, tuple(x_ISD.shape)

    def keep(self, images: int) -> None:
        """Keep the map of the first `images` images of the last forward."""
        if self.last is not None:
            routing, (seen, S, _) = self.last
            self.maps.append(top_expert(routing, seen * S).reshape(seen, S)[:images])

    def experts_BS(self) -> np.ndarray | None:
        """int64 [B, S] of all batches kept; -1 is a token without expert; None for a dense model."""
        return np.concatenate(self.maps) if self.maps else None
