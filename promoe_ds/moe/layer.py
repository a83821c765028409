"""The MoE layer: conditional split -> router -> dispatch -> experts -> combine, plus shared and unconditional experts.

    MoE(x) = sum_i E_i^S(x) + { sum_j G_j E_j(x)   if x is conditional        Eq. (5), arXiv:2510.24711
                              { sum_k E_k^U(x)     if x is unconditional

Data flow for a batch whose first I images are conditional (`RoutingContext`):
  1. split: x[:I] goes to the router, x[I:] (null label) to the unconditional experts; both are views
  2. router: an edge list for the tokens of x[:I]
  3. routed experts: dispatch, stacked experts, combine (`RoutedExperts`; expert parallelism replaces exactly this part)
  4. concatenate, and add the shared experts of all tokens
Nothing is skipped for an empty part: an image count of zero runs through the same operations, so every rank issues the
same collectives and every parameter has a gradient.
"""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor, nn

from promoe_ds.config import Config
from promoe_ds.models.layers import Mlp
from promoe_ds.moe.dispatch import LocalDispatcher
from promoe_ds.moe.experts import StackedExperts
from promoe_ds.moe.routers import ROUTERS
from promoe_ds.moe.routing import Routing, RoutingContext


class RoutedExperts(nn.Module):
    """All E routed experts on one device."""

    def __init__(self, num_experts: int, width: int, hidden: int, backend: str):
        super().__init__()
        self.dispatcher = LocalDispatcher(num_experts)
        self.experts = StackedExperts(num_experts, width, hidden, backend)

    def forward(self, x_TD: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
        """Tokens and edges -> (weighted sum over each token's experts [T, D], `segment_ends` of edges [E] int32)."""
        x_TD = x_TD.to(self.experts.compute_dtype(x_TD.device.type))  # before rows are copied or sent
        rows, plan = self.dispatcher.dispatch(x_TD, routing)
        return self.dispatcher.combine(self.experts(rows), plan), plan.end_E


class MoELayer(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        moe, width = config.moe, config.model.width
        assert moe is not None, "a dense block has no MoE layer"
        hidden = int(moe.hidden_ratio * width)
        self.conditional = moe.conditional
        self.router = ROUTERS[moe.router.name](moe.router, moe.num_experts, width)  # type: ignore[call-arg]
        self.routed: nn.Module = RoutedExperts(moe.num_experts, width, hidden, moe.experts_backend)
        self.shared = nn.ModuleList(Mlp(width, hidden) for _ in range(moe.num_shared))
        unconditional = moe.num_unconditional if moe.conditional else 0
        self.unconditional = nn.ModuleList(Mlp(width, hidden) for _ in range(unconditional))

    def forward(self, x_BSD: Tensor, ctx: RoutingContext) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """x_BSD [B, S, D], conditional images first.

        Returns:
            (output [B, S, D] in x's dtype, auxiliary losses by name, edges up to each expert [E] int32: `segment_ends`)
        """
        B, S, D = x_BSD.shape
        x_TD, images = x_BSD.reshape(-1, D), ctx.num_conditional if self.conditional else B
        known_TD, null_TD = x_TD.split([images * S, (B - images) * S])
        routing = self.router(known_TD.view(images, S, D), ctx)
        out_TD, end_E = self.routed(known_TD, routing)
        if self.conditional:
            nulls = [mlp(null_TD) for mlp in self.unconditional] or [torch.zeros_like(null_TD)]
            out_TD = torch.cat([out_TD, reduce(torch.add, nulls)])
        for mlp in self.shared:
            out_TD = out_TD + mlp(x_TD)
        return out_TD.view(B, S, D).to(x_BSD.dtype), routing.aux, end_E
