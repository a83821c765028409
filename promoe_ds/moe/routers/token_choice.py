"""Token choice by a linear softmax gate, with a load-balance loss: the "DiT-MoE" (TC-DiT) baseline of the paper.

Each token goes to the K experts of highest softmax score, which are also the gate weights, not renormalised. Drawn
uniformly in +-1/sqrt(D), as the official code draws it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from promoe_ds.config.schema import RouterConfig, option
from promoe_ds.moe.constants import counting
from promoe_ds.moe.losses import load_balance, sums_over_scope
from promoe_ds.moe.router import (
    Router,
    Routing,
    RoutingContext,
    at_least_fp32,
    check_top_k,
    register_router,
    top_experts,
)


@dataclass(frozen=True, kw_only=True)
class TokenChoiceConfig(RouterConfig):
    name: str = "token_choice"
    top_k: int = option(1, "K, experts per token")
    balance_weight: float = option(
        0.01,
        "weight of the load-balance loss, per MoE layer; at 0 it is computed and logged, not trained",
        at_least=0,
        change="finetune",
    )
    balance_scope: Literal["global", "rank"] = option(
        "global",
        "global: shares over the micro-batch of all ranks; rank: each rank's own, averaged, as in the official code",
        change="finetune",
    )

    def validate(self, config: Any) -> None:
        check_top_k(self, config)


@register_router("token_choice")
class TokenChoiceRouter(Router):
    Config = TokenChoiceConfig
    one_graph = True

    def __init__(self, config: TokenChoiceConfig, num_experts: int, width: int):
        super().__init__()
        self.config = config
        self.gate = nn.Parameter(torch.empty(num_experts, width))

    def init_weights(self, generator: Callable[[str], torch.Generator]) -> None:
        bound = 1 / math.sqrt(self.gate.shape[1])
        nn.init.uniform_(self.gate, -bound, bound, generator=generator("gate"))

    @staticmethod
    def num_parameters(config: RouterConfig, num_experts: int, width: int) -> int:
        return num_experts * width

    @staticmethod
    def aux_weights(config: RouterConfig) -> dict[str, float]:
        assert isinstance(config, TokenChoiceConfig)
        return {"load_balance": config.balance_weight}

    def forward(self, x_TD: Tensor, S: int, ctx: RoutingContext) -> Routing:
        """Route each token to its K best experts. x_TD [T, D] -> Routing with N = T*K."""
        cfg = self.config
        with torch.autocast(x_TD.device.type, enabled=False):  # bf16 scores would tie and flip the choice
            score_TE = (at_least_fp32(x_TD) @ at_least_fp32(self.gate).T).softmax(dim=-1)
            weight_N, expert_N = top_experts(score_TE, cfg.top_k)
            terms = {"score": score_TE.sum(0)} if self.training else {}
        return Routing(counting(len(x_TD), x_TD.device, cfg.top_k), expert_N, weight_N, cfg.top_k, terms)

    def losses(self, terms: dict[str, Tensor], load_LE: Tensor, ctx: RoutingContext) -> dict[str, Tensor]:
        """The load-balance loss."""
        score_LE, load_LE = sums_over_scope(self.config.balance_scope, ctx.all_reduce, terms["score"], load_LE)
        return {"load_balance": load_balance(score_LE, load_LE, self.config.top_k)}
