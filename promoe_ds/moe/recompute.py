"""What the backward pass computes again instead of keeping it: pointwise results, whose inputs are kept.

The norm, its modulation, permuted rows and the weighted sum of experts cost little next to a product, but each is as
large as what it was computed from, and a product keeps its input for the gradient of its weights. GELU's result is kept
besides its input: on a CPU a second tanh takes 2 % of the forward and backward time.

    h = recomputed(pointwise, x, scale)     keeps x and scale
    y = linear(h, weight, bias)             keeps no h: asks the node of `recomputed` for it

`keep` and `kept` do this for any autograd function, and views of h and chains of such results work too. Whoever does
not know of it (a router of your own, say) keeps h, as always. The same operations run once more, so values are equal to
the bit. A compiler decides by itself what to compute again, so a graph gets the plain operators.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from promoe_ds.moe.weight_casts import cast_weight, casting


class Source(NamedTuple):
    """How to get a tensor again: which view of which result of which node."""

    node: Any
    number: int
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    def again(self) -> Tensor:
        result = _results(self.node)[self.number].detach()
        return result.as_strided(self.size, self.stride, self.offset)


def source(x: Any) -> Source | None:
    """None if x cannot be computed again."""
    if torch.compiler.is_compiling() or not isinstance(x, Tensor):
        return None
    base = x if x._base is None else x._base
    if not isinstance(base.grad_fn, _Recomputed._backward_cls):  # type: ignore[attr-defined]
        return None
    return Source(base.grad_fn, base.output_nr, x.size(), x.stride(), x.storage_offset())  # type: ignore[arg-type]


def keep(ctx: Any, *values: Any) -> None:
    """In place of `ctx.save_for_backward`, also for values that are no tensors; `kept` returns them."""
    ctx.recipes = [source(x) or (None if isinstance(x, Tensor) else (x,)) for x in values]
    ctx.save_for_backward(*(x for x, recipe in zip(values, ctx.recipes, strict=True) if recipe is None))


def kept(ctx: Any) -> list[Any]:
    """What `keep` was given, tensors detached; once in each backward pass."""
    saved = iter(ctx.saved_tensors)
    found = []
    for recipe in ctx.recipes:
        if isinstance(recipe, Source):
            found.append(recipe.again())
        else:
            found.append(next(saved) if recipe is None else recipe[0])
    return found


class Explicit(ABC):
    """A function for `recomputed` with a gradient of its own, where autograd's takes more passes over memory."""

    @abstractmethod
    def __call__(self, *inputs: Any) -> Any:
        """The result, or a tuple of them; a compiler differentiates this one."""

    @abstractmethod
    def again(self, *inputs: Any) -> tuple[tuple[Tensor, ...], Any]:
        """The results, and what `gradient` needs beside the inputs; in the backward pass, if one asks for a result."""

    @abstractmethod
    def gradient(self, inputs: list[Any], rest: Any, grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        """Of each input; not yet in its dtype. `rest` is None if nobody asked for a result; it may be written to."""


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Callable[..., Any], *inputs: Any) -> Any:
        ctx.set_materialize_grads(False)
        ctx.function, ctx.graph = function, None
        keep(ctx, *inputs)
        return _plain(function, inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        if all(g is None for g in grads):
            return (None,) * len(ctx.needs_input_grad)
        if isinstance(ctx.function, Explicit):
            inputs, _, rest = ctx.graph or (kept(ctx), None, None)
            ctx.graph = None
            return None, *ctx.function.gradient(inputs, rest, grads)
        results = _results(ctx)
        inputs, ctx.graph = ctx.graph[0], None
        used = [(r, g) for r, g in zip(results, grads, strict=True) if g is not None]
        wanted = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
        found = iter(torch.autograd.grad([r for r, _ in used], wanted, [g for _, g in used], allow_unused=True))
        return None, *(next(found) if isinstance(x, Tensor) and x.requires_grad else None for x in inputs)


def _plain(function: Callable[..., Any], inputs: Any) -> Any:
    """Without autocast, which is on in the forward pass and off in the backward pass."""
    device = next(x.device.type for x in inputs if isinstance(x, Tensor))
    if not torch.is_autocast_enabled(device):
        return function(*inputs)
    with torch.autocast(device, enabled=False):
        return function(*inputs)


def _results(node: Any) -> tuple[Tensor, ...]:
    """Of a `recomputed`, with their graph: computed at the first call of a backward pass, let go by its own."""
    if node.graph is None and isinstance(node.function, Explicit):
        inputs = kept(node)
        node.graph = inputs, *node.function.again(*inputs)
    if node.graph is None:
        needs = node.needs_input_grad[1:]
        inputs = [x.detach().requires_grad_() if need else x for x, need in zip(kept(node), needs, strict=True)]
        with torch.enable_grad():
            results = _plain(node.function, inputs)
        node.graph = inputs, results if isinstance(results, tuple) else (results,)
    return node.graph[1]


def recomputed(function: Callable[..., Any], *inputs: Any) -> Any:
    """`function(*inputs)`, which keeps the inputs for the backward pass and not what it makes of them.

    Args:
        function: of tensors and constants, without parameters or state, to a new tensor or a tuple of new ones; called
            again in the backward pass. It should be cheap. It may be an `Explicit`.
        inputs: the first tensor says on which device. Those with gradients must be tensors of their own, not in a list.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return function(*inputs)
    return _Recomputed.apply(function, *inputs)


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x.to(dtype)`, of which no copy is kept."""
    return x if x.dtype == dtype else recomputed(Tensor.to, x, dtype)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        keep(ctx, x, weight)
        return F.linear(x.to(weight.dtype), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = kept(ctx)
        rows, grad = x.to(weight.dtype).reshape(-1, x.shape[-1]), grads[0].reshape(-1, len(weight))
        need_x, need_weight, need_bias = ctx.needs_input_grad
        return (
            (grad @ weight).view(x.shape).to(x.dtype) if need_x else None,
            grad.T @ rows if need_weight else None,
            grad.sum(0) if need_bias else None,
        )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`, also under autocast, that keeps no x that can be computed again, and casts as `cast_once` has it."""
    again = torch.is_grad_enabled() and source(x) is not None
    device = x.device.type
    if (again or casting()) and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        weight, bias = cast_weight(weight, dtype), bias if bias is None else cast_weight(bias, dtype)
    return _Linear.apply(x, weight, bias) if again else F.linear(x, weight, bias)  # type: ignore[no-any-return]
