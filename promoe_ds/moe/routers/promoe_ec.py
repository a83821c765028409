"""Prototypical routing, expert choice: ProMoE-EC (arXiv:2510.24711, Sec. 4.1 and 4.3, expert-choice form).

Scores are the cosines between tokens and prototypes, Eq. (4); each expert takes the k = S*K // E tokens of an image
nearest to its prototype, and the gate weight is the raw cosine. The routing contrastive loss, Eq. (6), is taken within
each image: every expert has tokens there, so none is left out. Images do not depend on each other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from promoe_ds.moe.conditional_routing import Split
from promoe_ds.moe.cosine import cosine
from promoe_ds.moe.gates import PerImageConfig, at_least_fp32, top_tokens_per_image
from promoe_ds.moe.losses import mean_over_scope, routing_contrastive_per_image, sum_and_number
from promoe_ds.moe.router import Reducer, Routing, Tensors, register_router
from promoe_ds.moe.routers.promoe import PrototypicalConfig, PrototypicalRouter


@dataclass(frozen=True, kw_only=True)
class ProMoEECConfig(PrototypicalConfig, PerImageConfig):
    pass


@register_router("promoe_ec")
class ProMoEECRouter(PrototypicalRouter):
    Config = ProMoEECConfig
    one_graph = True

    def forward(self, x_TD: Tensor, S: int, split: Split) -> Routing:
        """Each expert takes k tokens of each of B images. x_TD [T, D] -> Routing with N = B*E*k, expert by expert."""
        quota, terms = S * self.config.top_k // self.num_experts, {}
        with torch.autocast(x_TD.device.type, enabled=False):
            x_TD, prototype_ED = at_least_fp32(x_TD), at_least_fp32(self.prototypes)
            routing = top_tokens_per_image(cosine(x_TD, F.normalize(prototype_ED).T), S, quota)  # Eq. (4), alpha = 1
            if self.training:
                x_BSD, tau = x_TD.unflatten(0, (-1, S)), self.config.temperature
                total = routing_contrastive_per_image(prototype_ED, x_BSD, routing.token_N, quota, tau)
                terms["contrastive"] = sum_and_number(total, len(x_BSD))
        return routing._replace(terms=terms)

    @staticmethod
    def losses(config: Any, terms: Tensors, tokens_per_expert_LE: Tensor, all_reduce: Reducer) -> Tensors:
        """The contrastive loss: its mean over the conditional images of the scope."""
        return {"routing_contrastive": mean_over_scope(terms["contrastive"], config.contrastive_scope, all_reduce)}
