"""The one data type between every router and the experts: a list of edges "token n goes to expert m with weight w".

Legend (shape suffixes, here and in every file of this package): B images, S tokens an image, T = B*S tokens,
D width, F expert hidden, E routed experts, e = E/ep local experts, K top-k, N edges, I conditional images.

A router is one file in `routers/`: a subclass of `Router` with a nested `Config`, registered by `@register_router`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from promoe_ds.config import RouterConfig


class Routing(NamedTuple):
    """Edges from tokens to experts. A NamedTuple, not a dataclass: ZeRO-3 finds the tensors inside it."""

    token_N: Tensor
    """int64, index of the token, in [0, T)"""
    expert_N: Tensor
    """int64, index of the expert, in [0, E)"""
    weight_N: Tensor
    """float32 (or float64), gate weight, differentiable"""
    top_k: int
    """K if the edges are token-major with exactly K a token (N = T*K), else 0"""
    aux: dict[str, Tensor]
    """auxiliary losses by name, unweighted scalars; empty outside training"""


def identity(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True)
class RoutingContext:
    """What the host knows of a batch before the forward pass: which images are conditional, and how to sum over ranks.

    The model works on images in the order "conditional first, null-label after", so that conditional routing
    (Sec. 4.1 of the paper) is a slice: no mask, no copy, no device synchronisation in any layer.
    """

    label_B: Tensor
    """int64 on the device, in the model's order"""
    order_B: Tensor
    """int64 on the device: the model's order from the caller's"""
    restore_B: Tensor
    """int64 on the device: the caller's order from the model's"""
    num_conditional: int
    """I: the first I images of the model's order carry a real label"""
    all_reduce: Callable[[Tensor], Tensor] = identity
    """differentiable sum over the data-parallel ranks (identity on one device)"""

    @staticmethod
    def build(
        label_B: Tensor, null_label: int, device: torch.device | str, all_reduce: Callable[[Tensor], Tensor] = identity
    ) -> RoutingContext:
        """Split a batch by label.

        Args:
            label_B: int64 [B] on the CPU (labels are dropped on the host, so the split costs no synchronisation).
            null_label: the label of classifier-free guidance's unconditional images.
            device: where the model runs.
            all_reduce: differentiable sum over ranks, for losses of global scope.
        """
        null_B = label_B == null_label
        order_B = torch.argsort(null_B.to(torch.uint8), stable=True)
        restore_B = torch.empty_like(order_B)
        restore_B[order_B] = torch.arange(len(order_B))
        label_B, order_B, restore_B = (x.to(device, non_blocking=True) for x in (label_B[order_B], order_B, restore_B))
        return RoutingContext(label_B, order_B, restore_B, int((~null_B).sum()), all_reduce)


class Router(nn.Module):
    """Base of all routers. Subclasses set `Config` and implement `forward`."""

    Config: ClassVar[type[RouterConfig]] = RouterConfig

    def forward(self, x_BSD: Tensor, ctx: RoutingContext) -> Routing:
        """Choose experts for the tokens of `x_BSD` (conditional images only, where the layer splits)."""
        raise TypeError(f"{type(self).__name__} does not define forward")

    def init_weights(self, generator: Callable[[str], torch.Generator]) -> None:
        """Draw the router's parameters; `generator(parameter_name)` is keyed by seed and full name."""
        raise TypeError(f"{type(self).__name__} does not define init_weights")

    @staticmethod
    def num_parameters(config: RouterConfig, num_experts: int, width: int) -> int:
        """Parameters of one router, from the configuration alone."""
        raise TypeError("the router does not define num_parameters")

    @staticmethod
    def aux_weights(config: RouterConfig) -> dict[str, float]:
        """Weight of each auxiliary loss in the training loss, by name."""
        return {}


ROUTERS: dict[str, type[Router]] = {}


def register_router(name: str) -> Callable[[type[Router]], type[Router]]:
    """Class decorator: make a router known to configurations as `moe.router.name: NAME`."""

    def add(cls: type[Router]) -> type[Router]:
        if name in ROUTERS:
            raise ValueError(f"two routers are named {name!r}: {ROUTERS[name]} and {cls}")
        ROUTERS[name] = cls
        return cls

    return add


def at_least_fp32(x: Tensor) -> Tensor:
    """Scores and losses are computed in fp32 whatever the autocast; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()
