"""CONTRIBUTING's example of a router: each token goes to an expert drawn from a hash of its position and its label."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from promoe_ds.config.schema import RouterConfig
from promoe_ds.moe.router import Router, Routing, register_router
from promoe_ds.moe.split import Split


@dataclass(frozen=True, kw_only=True)
class HashConfig(RouterConfig):
    name: str = "hash"


@register_router("hash")
class HashRouter(Router):
    Config = HashConfig

    def __init__(self, config: HashConfig, num_experts: int, width: int):
        super().__init__(config, num_experts, width)

    def init_weights(self, generator: Callable[[str], torch.Generator]) -> None:
        """A hash has nothing to draw."""

    @staticmethod
    def num_parameters(config: RouterConfig, num_experts: int, width: int) -> int:
        return 0

    def forward(self, x_TD: Tensor, S: int, split: Split) -> Routing:
        token_N = torch.arange(len(x_TD), device=x_TD.device)
        key_N = (token_N % S + 1) * 2654435761 + split.label_B[: len(x_TD) // S].repeat_interleave(S) * 40503
        expert_N = (key_N >> 7) % self.num_experts
        return Routing(token_N, expert_N, torch.ones(len(x_TD), device=x_TD.device), 1, {})
