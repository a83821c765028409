"""Residual and adaLN in one pass over the tokens, on CUDA: operators that torch's compiler takes as they are.

    y = x + gate * out                      if there is an `out`, else x
    h = norm(y) * (1 + scale) + shift       if there is a `scale`

And the gradient of GELU with its column sums, which are that of the bias added before.

`models/adaln.py` computes it plainly where the kernels cannot run. The operators have a plain version beside the
kernels, for tests and to count bytes without a GPU.

Legend: B images, S tokens per image, D width; gate, shift and scale are [B, 1, D].
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from promoe_ds.moe import triton_kernels
from promoe_ds.moe.recompute import keep, kept
from promoe_ds.moe.triton_kernels import EPS, GELU_ROWS, ROWS

OPERATORS = f"{__name__.split('.')[0]}_fused"
"""their namespace: an exported copy of this module in the same process has one of its own, or it would replace ours"""


def fusible(x: Tensor) -> bool:
    """Whether the kernels can take these tokens."""
    return x.is_cuda and triton_kernels.READY and x.dtype in (torch.float32, torch.bfloat16)


def plain(
    x: Tensor, gate: Tensor | None, out: Tensor | None, shift: Tensor | None, scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    """-> (y, h) in fp32; h is y where there is no `scale`."""
    y = x.float() if gate is None or out is None else x.float() + gate.float() * out.float()
    if shift is None or scale is None:
        return y, y
    return y, F.layer_norm(y, y.shape[-1:], eps=EPS) * (1 + scale.float()) + shift.float()


@torch.library.custom_op(f"{OPERATORS}::residual_adaln", mutates_args=())
def forward(
    x: Tensor, gate: Tensor | None, out: Tensor | None, shift: Tensor | None, scale: Tensor | None,
    dtype: torch.dtype, seen: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """-> y, h in `dtype`, and h of the first `seen` images in fp32; those not asked for have no elements."""
    results = _results(x, gate, out, shift, scale, dtype, seen)
    if x.is_cuda:
        triton_kernels.forward(x, gate, out, shift, scale, *results)
        return results
    y, h = plain(x, gate, out, shift, scale)
    for result, value in zip(results, (y, h, h[:seen]), strict=True):
        if result.numel():
            result.copy_(value)
    return results


@forward.register_fake
def _results(
    x: Tensor, gate: Any, out: Any, shift: Any, scale: Any, dtype: torch.dtype, seen: int
) -> tuple[Tensor, Tensor, Tensor]:
    y = x.new_empty(x.shape if out is not None else 0)
    h = x.new_empty(x.shape if scale is not None else 0, dtype=dtype)
    return y, h, x.new_empty((seen, *x.shape[1:]) if seen else 0, dtype=torch.float32)


@torch.library.custom_op(f"{OPERATORS}::residual_adaln_backward", mutates_args=())
def backward(
    dy: Tensor, dh: Tensor | None, dh32: Tensor | None, x: Tensor | None, gate: Tensor | None, out: Tensor | None,
    scale: Tensor | None, of_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """-> the gradients of x (none without a norm: it is dy) and out, and of shift and scale, gate, and if wanted of the
    bias in out the parts [1 to 4, B, C, D], whose sum over C, and for the bias over B, they are. Without a norm x is
    not needed. dh32 is of the h in fp32, of as many images as there are in it."""
    results = dx, dout, sums = _gradients(dy, dh, dh32, x, gate, out, scale, of_bias)
    if dx.is_cuda:
        triton_kernels.backward(dy, dh, dh32, x, gate, out, scale, of_bias, *results)
        return results
    total, columns = dy.float(), []
    if x is not None and scale is not None and dh is not None:
        y, _ = plain(x, gate, out, None, None)
        dh = dh.float() if dh32 is None else dh + _of_all(dh32, dh)
        rstd = (y.var(-1, correction=0, keepdim=True) + EPS).rsqrt()
        normal, dn = F.layer_norm(y, y.shape[-1:], eps=EPS), dh * (1 + scale.float())
        columns += [dh, dh * normal]
        dn = rstd * (dn - dn.mean(-1, keepdim=True) - normal * (dn * normal).mean(-1, keepdim=True))
        total = total + dn
        dx.copy_(total)
    if gate is not None and out is not None:
        columns += [total * out] + [total * gate] * of_bias
        dout.copy_(total * gate)
    for part, column in zip(sums.zero_(), columns, strict=True):
        part[:, 0] = column.sum(1)
    return results


@backward.register_fake
def _gradients(
    dy: Tensor, dh: Any, dh32: Any, x: Any, gate: Any, out: Any, scale: Any, of_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    (B, S, D), sums = dy.shape, 2 * (scale is not None) + (out is not None) + of_bias
    return (
        dy.new_empty(dy.shape if scale is not None else 0),
        dy.new_empty(dy.shape if out is not None else 0, dtype=None if out is None else out.dtype),
        dy.new_empty(sums, B, -(-S // ROWS), D, dtype=torch.float32),
    )


def _of_all(part: Tensor, whole: Tensor) -> Tensor:
    """Images that `part` lacks are 0."""
    return F.pad(part, (0, 0, 0, 0, 0, len(whole) - len(part)))


class _ResidualAdaln(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gate: Any, out: Any, shift: Any, scale: Any, dtype: torch.dtype, seen: int, bias: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        keep(ctx, x if scale is not None else None, gate, out, scale)
        ctx.bias_dtype = None if bias is None else bias.dtype
        if scale is None and torch.compiler.is_compiling():  # pointwise: a compiler joins it with what comes before
            return x + gate.to(x.dtype) * out.to(x.dtype), x.new_empty(0), x.new_empty(0)
        y, h, h32 = forward(x, gate, out, shift, scale, dtype, seen)
        return (x.view_as(x) if out is None else y), h, h32

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, out, scale = kept(ctx)
        dy, dh, dh32 = (grad.contiguous() for grad in grads)
        dh, dh32 = dh if scale is not None else None, dh32 if dh32.numel() else None
        if dh is not None and dh32 is not None and torch.compiler.is_compiling():  # joined with what makes dh
            dh, dh32 = (dh + _of_all(dh32, dh)).to(dh.dtype), None
        dx, dout, sums = backward(dy, dh, dh32, x, gate, out, scale, ctx.bias_dtype is not None)
        columns = iter(sums.sum(2)[:, :, None])
        dshift, dscale = (None, None) if scale is None else (next(columns).to(scale.dtype) for _ in range(2))
        if out is None:
            return dx, None, None, dshift, dscale, None, None, None
        dgate = next(columns).to(gate.dtype)
        dbias = None if ctx.bias_dtype is None else next(columns).sum((0, 1)).to(ctx.bias_dtype)
        return dy if scale is None else dx, dgate, dout, dshift, dscale, None, None, dbias


def residual_adaln(
    x: Tensor, gate: Tensor | None, out: Tensor | None, shift: Tensor | None, scale: Tensor | None,
    dtype: torch.dtype = torch.float32, seen: int = 0, bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As above; differentiable once.

    Args:
        x: float32 or bfloat16 [B, S, D], contiguous.
        gate, out: [B, 1, D] and contiguous [B, S, D], or None.
        shift, scale: [B, 1, D], or None.
        dtype: of h.
        seen: number of images, the first, whose h is wanted in float32 too.
        bias: [D], contained in `out` already but without its gradient, which is the sum of out's; or None.

    Returns:
        y as x and h, both [B, S, D], and h in float32, [seen, S, D]; what was not asked for has no elements. Without
        an `out` y is x: who goes on with y has its gradient added in the same pass.
    """
    return _ResidualAdaln.apply(x, gate, out, shift, scale, dtype, seen, bias)  # type: ignore[no-any-return]


@torch.library.custom_op(f"{OPERATORS}::gelu_backward", mutates_args=())
def gelu_backward(grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of GELU in its tanh form, contiguous [N, F] both -> that of x, and [C, F], whose sum over C is that of
    its columns, in fp32."""
    results = dx, sums = _gelu_gradients(grad, x)
    if x.is_cuda:
        triton_kernels.gelu_backward(grad, x, dx, sums)
        return results
    exact = torch.ops.aten.gelu_backward(grad.float(), x.float(), approximate="tanh")
    dx.copy_(exact)
    sums.zero_()[:1] = exact.sum(0)
    return results


@gelu_backward.register_fake
def _gelu_gradients(grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    N, F = x.shape
    return torch.empty_like(x), x.new_empty(-(-N // GELU_ROWS), F, dtype=torch.float32)
