"""Expert choice within each image by a linear softmax gate: the EC-DiT baseline (arXiv:2410.02098).

Scores are a softmax over the experts; each expert then takes the k = S*K // E tokens of an image with the highest
score for it. A token may be taken by several experts or by none; the load is equal by construction. The rule is the
same in training and in inference, and an image does not depend on its batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from promoe_ds.config.schema import RouterConfig, option
from promoe_ds.moe.router import (
    Router,
    Routing,
    RoutingContext,
    at_least_fp32,
    check_quota,
    check_top_k,
    register_router,
    top_tokens_per_image,
)


@dataclass(frozen=True, kw_only=True)
class ExpertChoiceConfig(RouterConfig):
    name: str = "expert_choice"
    top_k: int = option(1, "K, experts per token on average")

    def validate(self, config: Any) -> None:
        check_top_k(self, config)
        check_quota(self, config, 1, "an image")


@register_router("expert_choice")
class ExpertChoiceRouter(Router):
    Config = ExpertChoiceConfig
    one_graph = True

    def __init__(self, config: ExpertChoiceConfig, num_experts: int, width: int):
        super().__init__()
        self.config = config
        self.gate = nn.Parameter(torch.empty(num_experts, width))

    def init_weights(self, generator: Callable[[str], torch.Generator]) -> None:
        nn.init.normal_(self.gate, std=0.006, generator=generator("gate"))

    @staticmethod
    def num_parameters(config: RouterConfig, num_experts: int, width: int) -> int:
        return num_experts * width

    def forward(self, x_TD: Tensor, S: int, ctx: RoutingContext) -> Routing:
        """Each expert takes k tokens of each of B images. x_TD [T, D] -> Routing with N = B*E*k, expert by expert."""
        quota = S * self.config.top_k // len(self.gate)
        with torch.autocast(x_TD.device.type, enabled=False):
            score_TE = (at_least_fp32(x_TD) @ at_least_fp32(self.gate).T).softmax(dim=-1)
            token_N, expert_N, weight_N = top_tokens_per_image(score_TE.unflatten(0, (-1, S)), quota)
        return Routing(token_N, expert_N, weight_N, 0, {})
