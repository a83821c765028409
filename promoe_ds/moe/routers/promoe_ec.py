"""Prototypical routing, expert choice: ProMoE-EC (arXiv:2510.24711, Sec. 4.1 and 4.3, expert-choice form).

Scores are the cosines between tokens and prototypes, Eq. (4); each expert takes the k = S*K // E tokens of an image
nearest to its prototype, and the gate weight is the raw cosine. The routing contrastive loss, Eq. (6), is taken within
each image: every expert has tokens there, so none is left out. Images do not depend on each other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from promoe_ds.config.schema import RouterConfig, option
from promoe_ds.moe.cosine import cosine, unit
from promoe_ds.moe.losses import mean_over_scope, routing_contrastive_per_image, sum_and_number
from promoe_ds.moe.router import (
    Routing,
    RoutingContext,
    at_least_fp32,
    check_quota,
    check_top_k,
    register_router,
    top_tokens_per_image,
)
from promoe_ds.moe.routers.promoe import PrototypicalRouter


@dataclass(frozen=True, kw_only=True)
class ProMoEECConfig(RouterConfig):
    name: str = "promoe_ec"
    top_k: int = option(1, "K, experts per token on average")
    contrastive_weight: float = option(1.0, "lambda_RCL, per MoE layer", at_least=0, change="finetune")
    temperature: float = option(0.07, "tau of Eq. (6)", above=0, change="finetune")
    contrastive_scope: Literal["global", "rank"] = option(
        "global",
        "the mean over conditional images: of all ranks, or of each rank, averaged, as in the official code",
        change="finetune",
    )

    def validate(self, config: Any) -> None:
        check_top_k(self, config)
        check_quota(self, config, 1, "an image")


@register_router("promoe_ec")
class ProMoEECRouter(PrototypicalRouter):
    Config = ProMoEECConfig
    one_graph = True

    def forward(self, x_TD: Tensor, S: int, ctx: RoutingContext) -> Routing:
        """Each expert takes k tokens of each of B images. x_TD [T, D] -> Routing with N = B*E*k, expert by expert."""
        cfg = self.config
        quota = S * cfg.top_k // len(self.prototypes)
        with torch.autocast(x_TD.device.type, enabled=False):
            x_TD, prototype_ED = at_least_fp32(x_TD), at_least_fp32(self.prototypes)
            z_TE = cosine(x_TD, unit(prototype_ED).T)  # Eq. (4), alpha = 1
            token_N, expert_N, weight_N = top_tokens_per_image(z_TE.unflatten(0, (-1, S)), quota)
            terms = {}
            if self.training:
                x_BSD = x_TD.unflatten(0, (-1, S))
                total = routing_contrastive_per_image(prototype_ED, x_BSD, token_N, quota, cfg.temperature)
                terms["contrastive"] = sum_and_number(total, len(x_BSD))
        return Routing(token_N, expert_N, weight_N, 0, terms)

    def losses(self, terms: dict[str, Tensor], load_LE: Tensor, ctx: RoutingContext) -> dict[str, Tensor]:
        """The contrastive loss: its mean over the conditional images of the scope."""
        mean_L = mean_over_scope(terms["contrastive"], self.config.contrastive_scope, ctx.all_reduce)
        return {"routing_contrastive": mean_L}
