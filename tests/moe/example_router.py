"""The example of docs/routers.md: each token goes to an expert drawn from a hash of its position and its label."""

import torch
from torch import Tensor

from promoe_ds.moe.conditional_routing import Split
from promoe_ds.moe.router import Router, Routing, register_router


@register_router("hash")
class HashRouter(Router):
    def forward(self, x_TD: Tensor, S: int, split: Split) -> Routing:
        token_N = torch.arange(len(x_TD), device=x_TD.device)
        label_N = split.label_B[: len(x_TD) // S].repeat_interleave(S)
        expert_N = ((token_N % S + 1) * 2654435761 + label_N * 40503 >> 7) % self.num_experts
        return Routing(token_N, expert_N, torch.ones(len(x_TD), device=x_TD.device), 1, {})
