"""Token choice by a linear gate, with a load-balance loss: the "DiT-MoE" (TC-DiT) baseline of the paper, and what
became of it since: sigmoid scores, renormalised weights, a z-loss, and balance by biases (DeepSeek-V3, DSMoE).

Each token goes to the K experts of highest score, which are also the gate weights. Drawn uniformly in +-1/sqrt(D), as
the official code draws it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from promoe_ds.config.errors import reject
from promoe_ds.config.option import option
from promoe_ds.moe.conditional_routing import Split
from promoe_ds.moe.gates import BiasedConfig, BiasedRouter, LinearGateRouter, of_their_sum, top_experts
from promoe_ds.moe.losses import Scope, load_balance, sums_over_scope, z_terms
from promoe_ds.moe.router import Reducer, Routing, Tensors, register_router


@dataclass(frozen=True, kw_only=True)
class TokenChoiceConfig(BiasedConfig):
    score: Literal["softmax", "sigmoid"] = option(
        "softmax", "what scores are of the logits; sigmoids of experts do not compete (DeepSeek-V3, arXiv:2412.19437)"
    )
    renormalise: bool = option(False, "divide a token's K gate weights by their sum")
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
    z_weight: float = option(
        0.0,
        "weight of the z-loss, the mean square of the log of a token's partition function, per MoE layer and in the "
        "same scope (ST-MoE, arXiv:2202.08906): keeps logits small; at 0 it is not computed",
        at_least=0,
        change="finetune",
    )

    def validate(self, config: Any) -> None:
        """Weights that are always 1 would teach the gate nothing."""
        super().validate(config)
        if self.renormalise and self.top_k == 1:
            conflict = "with moe.router.top_k=1 every gate weight is 1, and the gate learns nothing of the images"
            reject("moe.router.renormalise", "true", conflict, "set it to false, or raise moe.router.top_k")


@register_router("token_choice")
class TokenChoiceRouter(BiasedRouter, LinearGateRouter):
    Config = TokenChoiceConfig
    one_graph = True

    def init_weights(self, generator: Callable[[str], torch.Generator]) -> None:
        super().init_weights(generator)
        bound = 1 / math.sqrt(self.width)
        nn.init.uniform_(self.gate, -bound, bound, generator=generator("gate"))

    def forward(self, x_TD: Tensor, S: int, split: Split) -> Routing:
        """Route each token to its K best experts. x_TD [T, D] -> Routing with N = T*K."""
        cfg, terms = self.config, {}
        with torch.autocast(x_TD.device.type, enabled=False):
            logit_TE = self.logits(x_TD)
            score_TE = logit_TE.softmax(dim=-1) if cfg.score == "softmax" else logit_TE.sigmoid()
            routing = top_experts(score_TE, cfg.top_k, self.bias)
            if cfg.renormalise:
                weight_TK = of_their_sum(routing.weight_N.view(-1, cfg.top_k))
                routing = routing._replace(weight_N=weight_TK.view(-1))
            if self.training:
                share_TE = score_TE if cfg.score == "softmax" else of_their_sum(score_TE)
                terms = {"score": share_TE.sum(0)} | ({"z": z_terms(logit_TE)} if cfg.z_weight else {})
        return routing._replace(terms=terms)

    @staticmethod
    def aux_loss_weights(config: Any) -> dict[str, float]:
        return {"load_balance": config.balance_weight} | ({"z": config.z_weight} if config.z_weight else {})

    @staticmethod
    def losses(config: Any, terms: Tensors, tokens_per_expert_LE: Tensor, all_reduce: Reducer) -> Tensors:
        """The load-balance loss and with `z_weight` the z-loss; one all-reduce for both."""
        parts = [terms["score"], tokens_per_expert_LE, *([terms["z"]] if config.z_weight else [])]
        score_LE, tokens_per_expert_LE, *z = sums_over_scope(config.balance_scope, all_reduce, *parts)
        losses = {"load_balance": load_balance(score_LE, tokens_per_expert_LE, config.top_k)}
        if z:
            total_L, number_L = z[0].unbind(1)
            losses["z"] = total_L / number_L.detach().clamp(min=1)
        return losses
