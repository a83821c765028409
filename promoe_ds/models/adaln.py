"""adaLN-zero: the norm in front of each part of a block, its modulation by the conditioning, and the gate behind it.

    h = norm(x) (1 + scale) + shift          adaln
    x = x + gate part(h)                     gated; with the next part's h: residual_adaln

They are computed again in the backward pass (`moe/recompute.py`). Their gradients are autograd's to the bit, but write
over what is no longer needed, and no gate's product is made again. A block calls `modulate`, `join` and `leave`, which
on CUDA take the kernels of `moe/fused.py` instead.

Under `train.residual=bf16` the stream x is in half precision and normalised in fp32.

Legend: B images, S tokens per image, D width. Gradients of shift, scale and gate are sums over S.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from promoe_ds.moe import fused
from promoe_ds.moe.recompute import Explicit, cast, recomputed
from promoe_ds.moe.triton_kernels import EPS


def norm(x_BSD: Tensor) -> Tensor:
    """In front of every part of a block, without affine parameters of its own."""
    return F.layer_norm(x_BSD, x_BSD.shape[-1:], eps=EPS)


def _mul(a: Tensor, b: Tensor) -> Tensor:
    """a * b, written over a if it has the precision of the product."""
    return a.mul_(b) if torch.result_type(a, b) == a.dtype else a * b


def _add(a: Tensor, b: Tensor) -> Tensor:
    return a.add_(b) if torch.result_type(a, b) == a.dtype else a + b


Normed = tuple[Tensor, Tensor, Tensor, Tensor]
"""x [B, S, D], its norm, mean and reciprocal standard deviation [B, S, 1]"""


def _normed(x_BSD: Tensor) -> Normed:
    return x_BSD, *torch.native_layer_norm(x_BSD, x_BSD.shape[-1:], None, None, EPS)


def _adaln_gradient(normed: Normed, scale_B1D: Tensor, grad_BSD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of x, shift and scale; writes over the norm."""
    x_BSD, norm_BSD, mean_BS1, rstd_BS1 = normed
    scaled_BSD = (grad_BSD * (1 + scale_B1D)).to(x_BSD.dtype)
    args = x_BSD.shape[-1:], mean_BS1, rstd_BS1, None, None, [True, False, False]
    grad_x_BSD = torch.ops.aten.native_layer_norm_backward(scaled_BSD, x_BSD, *args)[0]
    return grad_x_BSD, grad_BSD.sum(1, keepdim=True), _mul(norm_BSD, grad_BSD).sum(1, keepdim=True)


def _gate_gradient(gate_B1D: Tensor, out_BSD: Tensor, grad_BSD: Tensor) -> tuple[Tensor, Tensor]:
    """Of gate and out, from that of their product."""
    grad_BSD = grad_BSD.to(torch.result_type(gate_B1D, out_BSD))
    return (grad_BSD * out_BSD).sum(1, keepdim=True), grad_BSD * gate_B1D


class _AdaLN(Explicit):
    def __call__(self, x_BSD: Tensor, shift_B1D: Tensor, scale_B1D: Tensor) -> Tensor:
        return norm(x_BSD) * (1 + scale_B1D) + shift_B1D

    def again(self, x_BSD: Tensor, shift_B1D: Tensor, scale_B1D: Tensor) -> tuple[tuple[Tensor, ...], Normed]:
        normed = _normed(x_BSD)
        return (_add(normed[1] * (1 + scale_B1D), shift_B1D),), normed

    def gradient(self, inputs: list[Any], rest: Any, grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        x_BSD, _, scale_B1D = inputs
        assert grads[0] is not None
        return _adaln_gradient(rest or _normed(x_BSD), scale_B1D, grads[0])


class _ResidualAdaLN(Explicit):
    def __call__(
        self, x_BSD: Tensor, gate_B1D: Tensor, out_BSD: Tensor, shift_B1D: Tensor, scale_B1D: Tensor
    ) -> tuple[Tensor, Tensor]:
        x_BSD = x_BSD + gate_B1D * out_BSD
        return x_BSD, adaln(x_BSD, shift_B1D, scale_B1D)

    def again(
        self, x_BSD: Tensor, gate_B1D: Tensor, out_BSD: Tensor, shift_B1D: Tensor, scale_B1D: Tensor
    ) -> tuple[tuple[Tensor, ...], Normed]:
        x_BSD = _add(gate_B1D * out_BSD, x_BSD)
        (h_BSD,), normed = adaln.again(x_BSD, shift_B1D, scale_B1D)
        return (x_BSD, h_BSD), normed

    def gradient(self, inputs: list[Any], rest: Any, grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        x_BSD, gate_B1D, out_BSD, _, scale_B1D = inputs
        grad_x_BSD, grad_h_BSD = grads
        ends: tuple[Tensor | None, ...] = None, None
        if grad_h_BSD is not None:
            normed = rest or _normed(_add(gate_B1D * out_BSD, x_BSD))
            normed_grad_BSD, *ends = _adaln_gradient(normed, scale_B1D, grad_h_BSD)  # type: ignore[assignment]
            grad_x_BSD = normed_grad_BSD if grad_x_BSD is None else _add(normed_grad_BSD, grad_x_BSD)
        assert grad_x_BSD is not None
        return grad_x_BSD, *_gate_gradient(gate_B1D, out_BSD, grad_x_BSD), *ends


class _Gated(Explicit):
    def __call__(self, gate_B1D: Tensor, out_BSD: Tensor) -> Tensor:
        return gate_B1D * out_BSD

    def again(self, gate_B1D: Tensor, out_BSD: Tensor) -> tuple[tuple[Tensor, ...], None]:
        return (gate_B1D * out_BSD,), None

    def gradient(self, inputs: list[Any], rest: Any, grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        assert grads[0] is not None
        gate_B1D, out_BSD = inputs
        return _gate_gradient(gate_B1D, out_BSD, grads[0])


adaln = _AdaLN()
"""(x_BSD, shift_B1D, scale_B1D) -> the norm and its modulation"""
residual_adaln = _ResidualAdaLN()
"""(x_BSD, gate_B1D, out_BSD, shift_B1D, scale_B1D): a part's output joins the residual stream -> (the stream, `adaln`
of it for the next part)"""
gated = _Gated()
"""(gate_B1D, out_BSD) -> their product"""


def widened(x_BSD: Tensor) -> Tensor:
    """What the norm takes: a stream in half precision beside autocast in fp32, others as they are."""
    return cast(x_BSD, torch.float32) if _is_narrow(x_BSD) else x_BSD


def _is_narrow(x_BSD: Tensor) -> bool:
    return x_BSD.dtype == torch.bfloat16 and torch.is_autocast_enabled(x_BSD.device.type)


def _product_dtype(x: Tensor) -> torch.dtype:
    """In which a linear layer takes x: autocast's if it is on."""
    return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype


def modulate(x_BSD: Tensor, shift_B1D: Tensor, scale_B1D: Tensor) -> tuple[Tensor, Tensor]:
    """-> (the stream, `adaln` of it), to go on with both: on CUDA their gradients are then added in one pass."""
    if fused.fusible(x_BSD):
        inputs = x_BSD, None, None, shift_B1D, scale_B1D, _product_dtype(x_BSD)
        return recomputed(fused.residual_adaln, *inputs)[:2]
    return x_BSD, recomputed(adaln, widened(x_BSD), shift_B1D, scale_B1D)


def join(
    x_BSD: Tensor, gate_B1D: Tensor, out_BSD: Tensor, shift_B1D: Tensor, scale_B1D: Tensor, seen: int,
    bias_D: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """`residual_adaln` -> (the stream, the next part's input, that of the first `seen` images in fp32 or None: take it
    from the input). bias_D is that of `Linear.beside_bias`."""
    if fused.fusible(x_BSD):
        dtype = _product_dtype(x_BSD)
        # in a model of bf16 weights, routers take bf16
        seen = seen if torch.is_autocast_enabled(x_BSD.device.type) and dtype != torch.float32 else 0
        inputs = x_BSD, gate_B1D, out_BSD, shift_B1D, scale_B1D, dtype, seen, bias_D
        x_BSD, h_BSD, fp32_ISD = recomputed(fused.residual_adaln, *inputs)
        return x_BSD, h_BSD, fp32_ISD if seen else None
    assert bias_D is None, "it would get no gradient"
    if _is_narrow(x_BSD):
        x_BSD = leave(x_BSD, gate_B1D, out_BSD)
        return *modulate(x_BSD, shift_B1D, scale_B1D), None
    return *recomputed(residual_adaln, x_BSD, gate_B1D, out_BSD, shift_B1D, scale_B1D), None


def leave(x_BSD: Tensor, gate_B1D: Tensor, out_BSD: Tensor, bias_D: Tensor | None = None) -> Tensor:
    """The stream, joined by the last part of a block. bias_D is that of `Linear.beside_bias`."""
    if fused.fusible(x_BSD):
        return fused.residual_adaln(x_BSD, gate_B1D, out_BSD, None, None, bias=bias_D)[0]
    assert bias_D is None, "it would get no gradient"
    joined_BSD = x_BSD + recomputed(gated, gate_B1D, out_BSD)
    return joined_BSD.to(x_BSD.dtype) if _is_narrow(x_BSD) else joined_BSD


def norm_beside(x_BSD: Tensor, *time_BD: Tensor) -> Tensor:
    """The norm, and beside it the timestep's part of the conditioning if it is given: [B, S, D or 2D]."""
    out_BSD = norm(x_BSD)
    return torch.cat([out_BSD, *(t_BD[:, None].expand_as(out_BSD).to(out_BSD.dtype) for t_BD in time_BD)], dim=-1)
