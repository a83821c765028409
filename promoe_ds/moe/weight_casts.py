"""Weights in the precision of autocast, cast once per optimizer step where several micro-batches make one.

torch keeps the casts that its operators ask for until an outermost autocast ends: that of a forward pass, or on CUDA
one in the thread of the backward pass. So our layers (`recompute.linear`, `StackedExperts`) ask `cast_weight`, whose
copies live as long as the context.

A copy has one place in the graph, which the gradients of every micro-batch pass, so each reaches the fp32 parameter and
the hooks on it, as ever; `renew` gives it another. Weights must not change while the context is open.

A compiled graph finds the copies in the place of the weights (`copies_in_place`): a cast inside it is made in each
forward pass, and by the compiler's choice in the backward pass once more.

Gradients of copies are cast to fp32, but for weights whose `grad_dtype` is None when they arrive: these get them as
they are. They must not add up there, which would be in bf16.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_copies: dict[tuple[int, torch.dtype, bool], tuple[Tensor, Tensor]] | None = None
"""by id of a weight, dtype, and whether a compiled graph takes it: the weight (held, so that its id stays its own) and
its copy; None outside `cast_once`"""

Place = tuple[nn.Module, str]
"""a module and the name of a parameter of its own"""


@contextmanager
def cast_once() -> Iterator[None]:
    """Around the forward and backward passes of one optimizer step."""
    global _copies
    _copies = {}
    try:
        yield
    finally:
        _copies = None


def renew() -> None:
    """Before a micro-batch whose gradients are sent while it runs backward: its copies get places of their own in the
    graph. Autograd runs younger nodes first, so a gradient that passes an earlier micro-batch's node comes at the end.
    """
    for key, (weight, copy) in (_copies or {}).items():
        _copies[key] = weight, copy.detach()  # type: ignore[index]


def let_go() -> None:
    """After the last forward pass, if nothing is computed again: the graph alone holds the copies then, each until its
    product's gradients are made."""
    if _copies is not None:
        _copies.clear()


def casting() -> bool:
    """Whether `cast_once` is open, and this is not being compiled."""
    return _copies is not None and not torch.compiler.is_compiling()


def cast_weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """`weight.to(dtype)`; within `cast_once`, the same copy of a trained parameter each time."""
    if _copies is None or weight.dtype == dtype or torch.compiler.is_compiling():
        return weight.to(dtype)
    if not (weight.is_leaf and weight.requires_grad and torch.is_grad_enabled()):
        return weight.to(dtype)
    key = id(weight), dtype, False
    if key not in _copies:
        _copies[key] = weight, weight.to(dtype) if weight.grad_dtype else weight.detach().to(dtype)
    if _copies[key][1].grad_fn is None:
        _copies[key] = weight, _Copied.apply([_copies[key][1]], weight)[0]
    return _copies[key][1]


class _Copied(torch.autograd.Function):
    """Weights -> copies that were made before. One node for all, so that little is called from Python; and one for each
    use: autograd runs younger nodes first, so gradients of later micro-batches would wait for one node to the end."""

    @staticmethod
    def forward(ctx: Any, copies: list[Tensor], *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.weights = weights
        ctx.set_materialize_grads(False)
        return tuple(copy.detach() for copy in copies)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        results = list(grads)
        dtypes = [weight.grad_dtype for weight in ctx.weights]
        wide = {i: grad for i, grad in enumerate(grads) if grad is not None and dtypes[i] is not None}
        for i, grad in zip(wide, _cast([*wide.values()], [dtypes[i] for i in wide]), strict=True):
            results[i] = grad
        return None, *results


def _cast(tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    """Few launches on CUDA."""
    contiguous = torch.contiguous_format
    copies = [torch.empty_like(x, dtype=d, memory_format=contiguous) for x, d in zip(tensors, dtypes, strict=True)]
    if copies:
        torch._foreach_copy_(copies, list(tensors))
    return copies


@torch.no_grad()
def _copies_of(weights: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """For a compiled graph, without a place in autograd's; within `cast_once` the same each time."""
    known = {} if _copies is None else _copies
    new = [w for w in weights if (id(w), dtype, True) not in known]
    for weight, copy in zip(new, _cast(new, [dtype] * len(new)), strict=True):
        known[id(weight), dtype, True] = weight, copy
    return [known[id(w), dtype, True][1] for w in weights]


@contextmanager
def copies_in_place(places: list[Place]) -> Iterator[None]:
    """While the context is open, trained fp32 weights are their copies in the precision of autocast.

    Without autocast or without gradients nothing changes: a graph then casts what it needs, or its weights are
    constants.
    """
    found = [(module, name, module._parameters[name]) for module, name in places]
    leaves = [(m, name, w) for m, name, w in found if w is not None and w.is_leaf and w.requires_grad]
    trained = [(m, name, w) for m, name, w in leaves if w.dtype == torch.float32]
    device = trained[0][2].device.type if trained else ""
    if not (trained and torch.is_grad_enabled() and torch.is_autocast_enabled(device)):
        yield
        return
    weights = [weight for *_, weight in trained]
    copies = _Copied.apply(_copies_of(weights, torch.get_autocast_dtype(device)), *weights)
    try:
        for (module, name, _), copy in zip(trained, copies, strict=True):
            module._parameters[name] = copy
        yield
    finally:
        for module, name, weight in trained:
            module._parameters[name] = weight
