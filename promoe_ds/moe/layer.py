"""The MoE layer: conditional split -> router -> dispatch -> experts -> combine, plus shared and unconditional experts.

    MoE(x) = sum_i E_i^S(x) + { sum_j G_j E_j(x)   if x is conditional        Eq. (5), arXiv:2510.24711
                              { sum_k E_k^U(x)     if x is unconditional

Data flow for a batch whose first I images are conditional (`Split`):
  1. split: x[:I] goes to the router, x[I:] (null label) to the unconditional experts; both are views. The router may be
     given another view of the same tokens, r[:I] (`moe.router_input`); the experts' input stays x
  2. router: an edge list for the tokens of x[:I]
  3. routed experts: dispatch, stacked experts, combine (`RoutedExperts`; expert parallelism replaces exactly this part)
     While rows travel, shared experts (dispatch) and unconditional ones (combine) are computed; so backwards too
  4. concatenate, and add the shared experts of all tokens
Nothing is skipped for an empty part: an image count of zero runs through the same operations, so every rank issues the
same collectives and every parameter has a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from promoe_ds.config.schema import Config
from promoe_ds.moe.conditional_routing import Split
from promoe_ds.moe.dispatch import LocalDispatcher
from promoe_ds.moe.experts import StackedExperts
from promoe_ds.moe.mlp import Mlp
from promoe_ds.moe.recompute import Explicit, cast, recomputed
from promoe_ds.moe.router import ROUTERS, Routing, Tensors

Work = Callable[[], list[Tensor]]
"""what can be computed while rows travel"""


class RoutedExperts(nn.Module):
    """All E routed experts on one device."""

    def __init__(self, num_experts: int, width: int, hidden: int, backend: str):
        super().__init__()
        self.dispatcher = LocalDispatcher(num_experts)
        self.experts = StackedExperts(num_experts, width, hidden, backend)

    def forward(
        self, x_TD: Tensor, routing: Routing, during_dispatch: Work, during_combine: Work
    ) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
        """Dispatch, experts, combine; does both works in between.

        Autograd runs later operations first, so gradients travel beside the same works.

        Returns:
            The weighted sum over each token's experts, [T, D] in the precision of the gate weights; `expert_offsets` of
            this rank's edges by global expert, int32 [E]; what the two works returned.
        """
        x_TD = cast(x_TD, self.experts.compute_dtype(x_TD.device.type))  # before rows are copied or sent
        dispatched, plan = self.dispatcher.dispatch(x_TD, routing)
        first = during_dispatch()
        combined = self.dispatcher.combine(self.experts(dispatched.wait()), plan)
        second = during_combine()
        return combined.wait(), plan.offsets_E, first, second


class LayerStats(NamedTuple):
    """What an MoE layer tells besides its output."""

    terms: Tensors
    """`Routing.terms`"""
    offsets_E: Tensor
    """int32, this rank's edges up to each expert, `expert_offsets`"""
    weight_N: Tensor
    """float32, gate weights of this rank's edges"""


class MoELayer(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        moe, width = config.moe, config.model.width
        assert moe is not None, "a dense block has no MoE layer"
        hidden = int(moe.hidden_ratio * width)
        self.conditional = moe.conditional
        kind: Any = ROUTERS[moe.router.name]
        self.router = kind(moe.router, moe.num_experts, moe.router_width(width))
        self.routed: nn.Module = RoutedExperts(moe.num_experts, width, hidden, moe.experts_backend)
        self.shared = nn.ModuleList(Mlp(width, hidden) for _ in range(moe.num_shared))
        unconditional = moe.num_unconditional if moe.conditional else 0
        self.unconditional = nn.ModuleList(Mlp(width, hidden) for _ in range(unconditional))

    def images_seen(self, split: Split) -> int:
        """How many images the router is given, the first of the model's order."""
        return split.num_conditional if self.conditional else len(split.label_B)

    def forward(self, x_BSD: Tensor, split: Split, r_BSR: Tensor | None = None) -> tuple[Tensor, LayerStats]:
        """Images in the model's order, conditional ones first.

        Args:
            x_BSD: [B, S, D], what the experts compute from.
            r_BSR: [B, S, R], what the router looks at, R = `moe.router_width`, or of its images alone; None: x.

        Returns:
            Output [B, S, D] in x's dtype, stats.
        """
        B, S, D = x_BSD.shape
        x_TD, images = x_BSD.reshape(-1, D), self.images_seen(split)
        known_TD, null_TD = x_TD.split([images * S, (B - images) * S])
        if r_BSR is not None and len(r_BSR) != images:  # a slice of all would cost a gradient of zeros
            r_BSR = r_BSR[:images]
        seen_TR = known_TD if r_BSR is None else r_BSR.flatten(0, 1)
        routing = self.router(seen_TR, S, split)
        out_TD, offsets_E, shared, nulls = self.routed(
            known_TD, routing, lambda: _each(self.shared, x_TD), lambda: _each(self.unconditional, null_TD)
        )
        if self.conditional:
            nulls = nulls or [torch.zeros_like(null_TD)]
        out_TD = recomputed(_join, out_TD, x_BSD.dtype, len(nulls), *nulls, *shared)
        return out_TD.view(B, S, D), LayerStats(routing.terms, offsets_E, routing.weight_N)


class _Joined(torch.autograd.Function):
    """For a compiler: each gradient is cast once, from the sum's precision to the part's, where autograd goes by way of
    fp32."""

    @staticmethod
    def forward(ctx: Any, known_TD: Tensor, dtype: torch.dtype, nulls: int, *parts_TD: Tensor) -> Tensor:
        ctx.known, ctx.nulls = len(known_TD), nulls
        ctx.dtypes = [part_TD.dtype for part_TD in (known_TD, *parts_TD)]
        return _sum(known_TD, dtype, nulls, parts_TD)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        known, *of_parts = _taken_apart(grads[0], ctx.known, ctx.nulls, len(ctx.dtypes) - 1)
        dtype, *dtypes = ctx.dtypes
        return known.to(dtype), None, None, *(part.to(dtype) for part, dtype in zip(of_parts, dtypes, strict=True))


class _Join(Explicit):
    """Sums of the routed experts, with those of `nulls` unconditional ones below them, and shared ones added to all."""

    def __call__(self, known_TD: Tensor, dtype: torch.dtype, nulls: int, *parts_TD: Tensor) -> Tensor:
        # torch 2.13's compiler cannot trace a function of any number of tensors where there is no gradient
        if not torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return _sum(known_TD, dtype, nulls, parts_TD)
        return _Joined.apply(known_TD, dtype, nulls, *parts_TD)  # type: ignore[no-any-return]

    def again(
        self, known_TD: Tensor, dtype: torch.dtype, nulls: int, *parts_TD: Tensor
    ) -> tuple[tuple[Tensor, ...], None]:
        return (_sum(known_TD, dtype, nulls, parts_TD),), None

    def gradient(self, inputs: list[Any], rest: Any, grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        (known_TD, _, nulls, *parts_TD), grad_TD = inputs, grads[0]
        assert grad_TD is not None
        known, *of_parts = _taken_apart(grad_TD, len(known_TD), nulls, len(parts_TD))
        return known, None, None, *of_parts


def _taken_apart(grad_TD: Tensor, known: int, nulls: int, parts: int) -> list[Tensor]:
    """The gradients of the routed experts' sums and of the parts, from that of `_sum`."""
    return [grad_TD[:known], *(grad_TD[known:] if i < nulls else grad_TD for i in range(parts))]


_join = _Join()


def _sum(known_TD: Tensor, dtype: torch.dtype, nulls: int, parts_TD: tuple[Tensor, ...]) -> Tensor:
    out_TD = torch.cat([known_TD, reduce(torch.add, parts_TD[:nulls])]) if nulls else known_TD
    out_TD = reduce(torch.add, parts_TD[nulls:], out_TD)
    return out_TD if out_TD.dtype == dtype else out_TD.to(dtype)  # torch 2.11 compiles gradients of 0 for an idle `to`


def _each(experts: Iterable[nn.Module], x_TD: Tensor) -> list[Tensor]:
    return [mlp(x_TD) for mlp in experts]
