"""Forced balance, for benchmarks: round robin, no parameters, nothing learned.

Edge j of token s of an image with label y goes to expert ((y*S + s)*K + j) mod E with weight 1/K. Within an image the
loads differ by one at most; the label turns the start, so that images even it out, and the choice depends on no rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from promoe_ds.config.schema import RouterConfig, option
from promoe_ds.moe.constants import counting
from promoe_ds.moe.router import Router, Routing, RoutingContext, at_least_fp32, check_top_k, register_router


@dataclass(frozen=True, kw_only=True)
class UniformConfig(RouterConfig):
    name: str = "uniform"
    top_k: int = option(1, "K, experts per token")

    def validate(self, config: Any) -> None:
        check_top_k(self, config)


@register_router("uniform")
class UniformRouter(Router):
    Config = UniformConfig
    one_graph = True

    def __init__(self, config: UniformConfig, num_experts: int, width: int):
        super().__init__()
        self.config, self.num_experts = config, num_experts

    def init_weights(self, generator: Callable[[str], torch.Generator]) -> None:
        """There is nothing to draw."""

    @staticmethod
    def num_parameters(config: RouterConfig, num_experts: int, width: int) -> int:
        return 0

    def forward(self, x_TD: Tensor, S: int, ctx: RoutingContext) -> Routing:
        """Deal the tokens out. x_TD [T, D] -> Routing with N = T*K."""
        T, K = len(x_TD), self.config.top_k
        start_B = ctx.label_B[: T // S] * S * K
        expert_N = (start_B[:, None] + counting(S * K, x_TD.device)).reshape(-1) % self.num_experts
        token_N = counting(T, x_TD.device, K)
        weight_N = at_least_fp32(x_TD.new_full((T * K,), 1 / K))
        return Routing(token_N, expert_N, weight_N, K, {})
