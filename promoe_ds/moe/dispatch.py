"""From edges to rows sorted by expert, and back. Two dispatchers, one interface.

    dispatched, plan = dispatcher.dispatch(x_TD, routing)   dispatched.wait(): rows of the experts held here, sorted
    combined = dispatcher.combine(y_ND, plan)               combined.wait(): weighted sum over each token's edges

Both start at once and are waited for later, so that other work is done while rows travel.
`LocalDispatcher` holds all experts: a sort and two gathers, no communication, no device synchronisation.
`AllToAllDispatcher` adds the exchange between the ranks of an expert-parallel group. Dropless: every edge is computed.

Legend: T tokens, D width, N edges of this rank, M rows received, E experts, e = E/ep local experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from promoe_ds.moe.constants import cached_arange
from promoe_ds.moe.recompute import Explicit, recomputed
from promoe_ds.moe.router import Routing

T = TypeVar("T")


class Pending(NamedTuple, Generic[T]):
    """A result that may still be on its way."""

    wait: Callable[[], T]
    """returns it; call it once"""


class ExpertRows(NamedTuple):
    """Work for the experts held by this rank."""

    x_ND: Tensor
    """rows sorted by local expert"""
    expert_N: Tensor
    """int64, the local expert of each row, ascending"""
    offsets_E: Tensor
    """int32 [e], one past the last row of each local expert"""


class _Permute(torch.autograd.Function):
    """x[order]; the gradient is gathered by the inverse, where indexing would scatter-add."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0].index_select(0, ctx.saved_tensors[0]), None, None


def permute(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """Row i of the result is row order[i] of x; `inverse` is that of `order`. Swapped, they undo it."""
    return _Permute.apply(x, order, inverse)  # type: ignore[no-any-return]


def inverse_of(order: Tensor, places: Tensor | None = None) -> Tensor:
    """Of a permutation, int64 [N]. `places` are 0 to N-1, if they are there already."""
    if places is None:  # not kept for the next time: N is another
        places = torch.arange(len(order), device=order.device)
    return order.scatter(0, order, places)


def expert_offsets(sorted_N: Tensor, segments: int) -> Tensor:
    """One past the last position of each of `segments` values in an ascending index list; int32 [segments]."""
    return torch.searchsorted(sorted_N, cached_arange(segments, sorted_N.device), right=True, out_int32=True)


def tokens_per_expert(offsets_E: Tensor) -> Tensor:
    """How often each value is there, from `expert_offsets`; any leading shape; int32."""
    return F.pad(offsets_E, (1, 0)).diff()


class Plan(NamedTuple):
    """What `combine` needs to undo `dispatch`."""

    routing: Routing
    num_tokens: int
    order_N: Tensor
    inverse_N: Tensor
    """of `order_N`"""
    offsets_E: Tensor
    """int32 [E], `expert_offsets` of this rank's edges by global expert"""
    exchange: tuple[list[int], list[int], Tensor, Tensor] | None = None
    """of an all-to-all: rows sent to and received from each rank, `order_M` that sorted those received, its inverse"""


class _Rows(Explicit):
    """One row per edge, in the order of the experts."""

    def __call__(self, x_TD: Tensor, order_N: Tensor, inverse_N: Tensor, token_N: Tensor, top_k: int) -> Tensor:
        return permute(_to_edges(x_TD, token_N, top_k), order_N, inverse_N)

    def again(
        self, x_TD: Tensor, order_N: Tensor, inverse_N: Tensor, token_N: Tensor, top_k: int
    ) -> tuple[tuple[Tensor, ...], None]:
        return (_to_edges(x_TD, token_N, top_k).index_select(0, order_N),), None

    def gradient(self, inputs: list[Any], rest: Any, grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        (x_TD, _, inverse_N, token_N, top_k), grad_ND = inputs, grads[0]
        assert grad_ND is not None
        return _over_edges(grad_ND.index_select(0, inverse_N), token_N, top_k, len(x_TD)), None, None, None, None


class _WeightedSum(Explicit):
    """Sum of weight * row over each token's edges, Eq. (5); accumulates in the weights' precision (fp32)."""

    def __call__(
        self, y_ND: Tensor, order_N: Tensor, inverse_N: Tensor, weight_N: Tensor, token_N: Tensor, top_k: int,
        num_tokens: int,
    ) -> Tensor:  # fmt: skip
        return _over_edges(permute(y_ND, inverse_N, order_N) * weight_N[:, None], token_N, top_k, num_tokens)

    def again(self, *inputs: Any) -> tuple[tuple[Tensor, ...], None]:
        return (self(*inputs),), None

    def gradient(self, inputs: list[Any], rest: Any, grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        (y_ND, order_N, inverse_N, weight_N, token_N, top_k, _), grad_TD = inputs, grads[0]
        assert grad_TD is not None
        grad_ND = _to_edges(grad_TD, token_N, top_k)
        grad_weight_N = (grad_ND * y_ND.index_select(0, inverse_N)).sum(1)
        grad_y_ND = (grad_ND * weight_N[:, None]).to(y_ND.dtype).index_select(0, order_N)
        return grad_y_ND, None, None, grad_weight_N, None, None, None


def _to_edges(x_TD: Tensor, token_N: Tensor, top_k: int) -> Tensor:
    """Each token's row for each of its edges; `_over_edges` of gradients is its own gradient."""
    if top_k > 1:
        x_TD = x_TD[:, None].expand(-1, top_k, -1).reshape(-1, x_TD.shape[1])
    return x_TD if top_k else x_TD.index_select(0, token_N)


def _over_edges(x_ND: Tensor, token_N: Tensor, top_k: int, num_tokens: int) -> Tensor:
    """Sums over each token's edges."""
    if top_k == 1:
        return x_ND
    if top_k:
        return x_ND.view(num_tokens, top_k, x_ND.shape[1]).sum(1)
    return x_ND.new_zeros(num_tokens, x_ND.shape[1]).index_add_(0, token_N, x_ND)


_rows, _weighted_sum = _Rows(), _WeightedSum()


class LocalDispatcher:
    """All experts are here."""

    def __init__(self, num_experts: int):
        self.num_experts = num_experts

    def dispatch(self, x_TD: Tensor, routing: Routing) -> tuple[Pending[ExpertRows], Plan]:
        """x_TD [T, D] and N edges -> (N rows sorted by expert, how to undo it)."""
        expert_N, order_N = routing.expert_N.sort(stable=True)
        offsets_E = expert_offsets(expert_N, self.num_experts)
        inverse_N = inverse_of(order_N, routing.token_N if routing.top_k == 1 else None)
        x_ND = recomputed(_rows, x_TD, order_N, inverse_N, routing.token_N, routing.top_k)
        rows = ExpertRows(x_ND, expert_N, offsets_E)
        return Pending(lambda: rows), Plan(routing, len(x_TD), order_N, inverse_N, offsets_E)

    def combine(self, y_ND: Tensor, plan: Plan) -> Pending[Tensor]:
        """Rows in expert order -> [T, D] in the precision of the gate weights."""
        token_N, _, weight_N, top_k, _ = plan.routing
        inputs = y_ND, plan.order_N, plan.inverse_N, weight_N, token_N, top_k, plan.num_tokens
        return Pending(lambda: recomputed(_weighted_sum, *inputs))


class AllToAllDispatcher(LocalDispatcher):
    """Experts are sharded over the ranks of a group, e = E/ep consecutive ones per rank.

    One exchange of the count matrix, one device-to-host copy of it, one uneven all-to-all; after the experts the mirror
    image. The rows sent are exactly those whose expert lives elsewhere (a rank's share for itself is a local copy).
    A rank without rows joins every collective, forward and backward.

    Args:
        num_experts: E.
        num_local: e.
        all_to_all_counts: [ep, e] int64 -> [ep, e]: row r goes to rank r, row s of the result came from rank s.
        all_to_all: (x, send, receive), rows per rank, -> a handle whose `wait()` returns the rows received;
            differentiable (`parallel.all_to_all.AllToAllHandle`).
    """

    def __init__(
        self,
        num_experts: int,
        num_local: int,
        all_to_all_counts: Callable[[Tensor], Tensor],
        all_to_all: Callable[[Tensor, list[int], list[int]], Any],
    ):
        super().__init__(num_experts)
        self.num_local, self.ep = num_local, num_experts // num_local
        self.all_to_all_counts, self.all_to_all = all_to_all_counts, all_to_all

    def dispatch(self, x_TD: Tensor, routing: Routing) -> tuple[Pending[ExpertRows], Plan]:
        local, plan = super().dispatch(x_TD, routing)
        sent = tokens_per_expert(plan.offsets_E).long().view(self.ep, self.num_local)
        got = self.all_to_all_counts(sent)
        send, receive = torch.stack([sent.sum(1), got.sum(1)]).tolist()  # the one device-to-host copy of the layer
        handle = self.all_to_all(local.wait().x_ND, send, receive)
        # Rows arrive rank by rank, each sorted by local expert: bring them into expert order.
        expert = cached_arange(self.num_local, x_TD.device).repeat(self.ep)
        expert_M, order_M = expert.repeat_interleave(got.flatten(), output_size=sum(receive)).sort(stable=True)
        offsets_E = expert_offsets(expert_M, self.num_local)
        inverse_M = inverse_of(order_M)
        received = Pending(lambda: ExpertRows(permute(handle.wait(), order_M, inverse_M), expert_M, offsets_E))
        return received, plan._replace(exchange=(send, receive, order_M, inverse_M))

    def combine(self, y_ND: Tensor, plan: Plan) -> Pending[Tensor]:
        assert plan.exchange is not None, "the plan was made by another dispatcher"
        send, receive, order_M, inverse_M = plan.exchange
        handle = self.all_to_all(permute(y_ND, inverse_M, order_M), receive, send)
        combine = super().combine
        return Pending(lambda: combine(handle.wait(), plan).wait())
