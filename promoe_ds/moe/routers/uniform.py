"""Forced balance, for benchmarks: round robin, no parameters, nothing learned.

Edge j of token s of an image with label y goes to expert ((y*S + s)*K + j) mod E with weight 1/K. Within an image the
loads differ by one at most; the label turns the start, so that images even it out, and the choice depends on no rank.
"""

from __future__ import annotations

from torch import Tensor

from promoe_ds.moe.conditional_routing import Split
from promoe_ds.moe.constants import cached_arange
from promoe_ds.moe.gates import TopKConfig, at_least_fp32
from promoe_ds.moe.router import Router, Routing, register_router


@register_router("uniform")
class UniformRouter(Router):
    Config = TopKConfig
    one_graph = True

    def forward(self, x_TD: Tensor, S: int, split: Split) -> Routing:
        """Deal the tokens out. x_TD [T, D] -> Routing with N = T*K."""
        T, K = len(x_TD), self.config.top_k
        start_B = split.label_B[: T // S] * S * K
        expert_N = (start_B[:, None] + cached_arange(S * K, x_TD.device)).reshape(-1) % self.num_experts
        token_N = cached_arange(T, x_TD.device, K)
        weight_N = at_least_fp32(x_TD.new_full((T * K,), 1 / K))
        return Routing(token_N, expert_N, weight_N, K, {})
