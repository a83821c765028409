"""Token choice by a linear softmax gate, with a load-balance loss: the "DiT-MoE" (TC-DiT) baseline of the paper.

Each token goes to the K experts of highest softmax score, which are also the gate weights, not renormalised. Drawn
uniformly in +-1/sqrt(D), as the official code draws it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from promoe_ds.config.schema import option
from promoe_ds.moe.gates import LinearGateRouter, TopKConfig, top_experts
from promoe_ds.moe.losses import Scope, load_balance, sums_over_scope
from promoe_ds.moe.router import Reducer, Routing, Tensors, register_router
from promoe_ds.moe.split import Split


@dataclass(frozen=True, kw_only=True)
class TokenChoiceConfig(TopKConfig):
    balance_weight: float = option(
        0.01,
        "weight of the load-balance loss, per MoE layer; at 0 it is computed and logged, not trained",
        at_least=0,
        change="finetune",
    )
    balance_scope: Scope = option(
        "global",
        "global: shares over the micro-batch of all ranks; rank: each rank's own, averaged, as in the official code",
        change="finetune",
    )


@register_router("token_choice")
class TokenChoiceRouter(LinearGateRouter):
    Config = TokenChoiceConfig
    one_graph = True

    def init_weights(self, generator: Callable[[str], torch.Generator]) -> None:
        bound = 1 / math.sqrt(self.width)
        nn.init.uniform_(self.gate, -bound, bound, generator=generator("gate"))

    def forward(self, x_TD: Tensor, S: int, split: Split) -> Routing:
        """Route each token to its K best experts. x_TD [T, D] -> Routing with N = T*K."""
        score_TE = self.scores(x_TD)
        terms = {"score": score_TE.sum(0)} if self.training else {}
        return top_experts(score_TE, self.config.top_k)._replace(terms=terms)

    @staticmethod
    def aux_loss_weights(config: Any) -> dict[str, float]:
        return {"load_balance": config.balance_weight}

    @staticmethod
    def losses(config: Any, terms: Tensors, tokens_per_expert_LE: Tensor, all_reduce: Reducer) -> Tensors:
        score_LE, tokens_per_expert_LE = sums_over_scope(
            config.balance_scope, all_reduce, terms["score"], tokens_per_expert_LE
        )
        return {"load_balance": load_balance(score_LE, tokens_per_expert_LE, config.top_k)}
