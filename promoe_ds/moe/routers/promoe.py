"""Prototypical routing, token choice: the router of ProMoE (arXiv:2510.24711, Sec. 4.1 and 4.3).

Unusual: the gate weight is the raw cosine between token and prototype (it may be negative and is not renormalised),
and the routing contrastive loss pulls each prototype to the mean of its tokens and pushes it from the others'.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from promoe_ds.config.option import option
from promoe_ds.moe.conditional_routing import Split
from promoe_ds.moe.cosine import cosine, length
from promoe_ds.moe.gates import BiasedConfig, BiasedRouter, TopKConfig, at_least_fp32, top_experts
from promoe_ds.moe.losses import Scope, centroid_sums, load_balance, routing_contrastive, sums_over_scope
from promoe_ds.moe.router import Reducer, Router, Routing, Tensors, register_router

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda z_TE: z_TE,
    "sigmoid": torch.sigmoid,
    "softmax": lambda z_TE: z_TE.softmax(dim=-1),
}


@dataclass(frozen=True, kw_only=True)
class PrototypicalConfig(TopKConfig):
    """What token choice and expert choice share."""

    contrastive_weight: float = option(1.0, "lambda_RCL, per MoE layer", at_least=0, change="finetune")
    temperature: float = option(0.07, "tau of Eq. (6)", above=0, change="finetune")
    contrastive_scope: Scope = option(
        "global",
        "global: the micro-batch of all ranks, so that the loss does not depend on the topology; rank: each rank's "
        "own, averaged, as in the official code",
        change="finetune",
    )


class PrototypicalRouter(Router):
    """What they share too: prototypes, their drawing, and the weight of the contrastive loss."""

    def __init__(self, config: Any, num_experts: int, width: int):
        super().__init__(config, num_experts, width)
        self.prototypes = nn.Parameter(torch.empty(num_experts, width))

    def init_weights(self, generator: Callable[[str], torch.Generator]) -> None:
        nn.init.normal_(self.prototypes, std=0.02, generator=generator("prototypes"))

    @staticmethod
    def aux_loss_weights(config: Any) -> dict[str, float]:
        return {"routing_contrastive": config.contrastive_weight}


@dataclass(frozen=True, kw_only=True)
class ProMoEConfig(BiasedConfig, PrototypicalConfig):
    activation: Literal["identity", "sigmoid", "softmax"] = option(
        "identity", "A in S = A(Z), Eq. (2); the paper prefers identity (Tab. 7)"
    )
    alpha: float = option(1.0, "scale of the cosine, Eq. (4)", above=0)
    balance_weight: float = option(
        0.0,
        "weight of a load-balance loss beside it, per MoE layer and in the same scope (Tab. 12: it does not help); "
        "at 0 it is not computed",
        at_least=0,
        change="finetune",
    )


@register_router("promoe")
class ProMoERouter(BiasedRouter, PrototypicalRouter):
    Config = ProMoEConfig
    one_graph = True

    def forward(self, x_TD: Tensor, S: int, split: Split) -> Routing:
        """Route each token to the K prototypes nearest in cosine. x_TD [T, D] -> Routing with N = T*K."""
        cfg = self.config
        with torch.autocast(x_TD.device.type, enabled=False):  # bf16 scores would tie and flip the choice
            x_TD, prototype_ED = at_least_fp32(x_TD), at_least_fp32(self.prototypes)
            unit_DE = (prototype_ED / length(prototype_ED)).T
            z_TE = cosine(x_TD, unit_DE)  # Eq. (4)
            score_TE = ACTIVATIONS[cfg.activation](z_TE if cfg.alpha == 1 else cfg.alpha * z_TE)  # Eq. (2)
            routing = top_experts(score_TE, cfg.top_k, self.bias)  # Eq. (3)
            terms = {}
            if self.training:
                terms = {"unit": unit_DE, "sum": centroid_sums(x_TD, routing.expert_N, self.num_experts, cfg.top_k)}
                if cfg.balance_weight:
                    # It needs shares that sum to 1 over the experts, which cosines and sigmoids do not.
                    share_TE = score_TE if cfg.activation == "softmax" else score_TE.softmax(dim=-1)
                    terms["share"] = share_TE.sum(0)
        return routing._replace(terms=terms)

    @staticmethod
    def aux_loss_weights(config: Any) -> dict[str, float]:
        weights = PrototypicalRouter.aux_loss_weights(config)
        return weights | ({"load_balance": config.balance_weight} if config.balance_weight else {})

    @staticmethod
    def losses(config: Any, terms: Tensors, tokens_per_expert_LE: Tensor, all_reduce: Reducer) -> Tensors:
        """The contrastive loss, Eq. (6), and with `balance_weight` the load-balance loss; one all-reduce for both."""
        parts = [terms["sum"], tokens_per_expert_LE, *([terms["share"]] if config.balance_weight else [])]
        sum_LED, tokens_per_expert_LE, *share = sums_over_scope(config.contrastive_scope, all_reduce, *parts)
        losses = {
            "routing_contrastive": routing_contrastive(terms["unit"], sum_LED, tokens_per_expert_LE, config.temperature)
        }
        if share:
            losses["load_balance"] = load_balance(share[0], tokens_per_expert_LE, config.top_k)
        return losses
