"""Residual and adaLN in one pass: operators against autograd, kernels in Triton's interpreter against float64."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from promoe_ds.moe import fused, triton_kernels

B, S, D = 3, 37, 24  # rows that do not fill a program, a width that is no power of two
SEEN = 2
"""images of which a router sees the norm in fp32"""


needs_triton = pytest.mark.skipif(not triton_kernels.READY, reason="Triton is not installed")


def inputs(dtype: torch.dtype, residual: bool, norm: bool) -> list[Tensor | None]:
    """x, gate, out, shift, scale; those of images are chunks of one tensor."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(B, S, D, generator=generator) + 0.5
    gate, shift, scale = torch.randn(B, 1, 3 * D, generator=generator).to(dtype).chunk(3, dim=-1)
    out = torch.randn(B, S, D, generator=generator).to(dtype)
    return [x, *((gate, out) if residual else (None, None)), *((shift, scale) if norm else (None, None))]


def exact(given: list[Tensor | None], dy: Tensor, dh: Tensor) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Results and gradients in float64, written once more."""
    x, gate, out, shift, scale = (None if t is None else t.detach().double().requires_grad_() for t in given)
    assert x is not None
    y = x if gate is None or out is None else x + gate * out
    total = (y * dy.double()).sum()
    results = [y]
    if scale is not None and shift is not None:
        centred = y - y.mean(-1, keepdim=True)
        h = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + scale) + shift
        total = total + (h * dh.double()).sum()
        results.append(h)
    total.backward()
    named = {"x": x, "gate": gate, "out": out, "shift": shift, "scale": scale}
    grads = {name: t.grad for name, t in named.items() if t is not None and t.grad is not None}
    if "out" in grads:
        grads["bias"] = grads["out"].sum((0, 1))
    return results, grads


CASES = [(dtype, residual, norm) for dtype, residual, norm
         in product((torch.float32, torch.bfloat16), (True, False), (True, False)) if residual or norm]  # fmt: skip


@pytest.mark.parametrize(("dtype", "residual", "norm"), CASES)
def test_operators_against_float64(dtype: torch.dtype, residual: bool, norm: bool) -> None:
    given = [None if t is None else t.requires_grad_() for t in inputs(dtype, residual, norm)]
    generator = torch.Generator().manual_seed(1)
    dy, dh, dh32 = (torch.randn(B, S, D, generator=generator) for _ in range(3))
    both = norm and dtype == torch.bfloat16
    bias = torch.zeros(D, requires_grad=True) if residual else None
    y, h, h32 = fused.residual_adaln(*given, dtype=dtype, seen=SEEN if both else 0, bias=bias)
    assert h.dtype == dtype and h32.numel() == both * SEEN * S * D
    dh32[SEEN:] = 0
    dh = dh.to(dtype)
    parts = [(y, dy)] + [(h, dh)] * norm + [(h32, dh32[:SEEN])] * both
    names = [n for n, t in zip(("x", "gate", "out", "shift", "scale"), given, strict=True) if t is not None]
    names, asked = names + ["bias"] * residual, [t for t in (*given, bias) if t is not None]
    grads = torch.autograd.grad([r for r, _ in parts], asked, [g for _, g in parts])
    wanted, exact_grads = exact(given, dy, dh.float() + (dh32 if both else 0))
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
    for found, want in zip([y] + [h] * norm, wanted, strict=True):
        torch.testing.assert_close(found.double(), want, **close)
    if both:
        torch.testing.assert_close(h32.double(), wanted[-1][:SEEN], rtol=1e-5, atol=1e-5)
    for name, grad in zip(names, grads, strict=True):
        want = exact_grads[name]
        assert grad.shape == want.shape
        assert float((grad.double() - want).norm()) <= (1e-6 if dtype == torch.float32 else 4e-3) * float(want.norm())


@needs_triton
def test_a_narrow_stream_against_float64() -> None:
    """x and its gradients in bf16, computed in fp32."""
    x, gate, out, shift, scale = inputs(torch.bfloat16, True, True)
    assert x is not None
    given = [x.bfloat16(), gate, out, shift, scale]
    dy, dh = torch.randn(B, S, D).bfloat16(), torch.randn(B, S, D)
    wanted, exact_grads = exact(given, dy, dh)
    for forward, backward in ((fused.forward, fused.backward), (None, None)):
        if forward is None:
            results = fused._results(*given, torch.float32, 0)
            triton_kernels.forward(*given, *results)
            grads = fused._gradients(dy, dh, None, given[0], gate, out, scale, False)
            triton_kernels.backward(dy, dh, None, given[0], gate, out, scale, False, *grads)
        else:
            results = forward(*given, torch.float32, 0)
            grads = backward(dy, dh, None, given[0], gate, out, scale, False)
        assert results[0].dtype == grads[0].dtype == torch.bfloat16 and grads[2].dtype == torch.float32
        assert float((results[1].double() - wanted[1]).norm()) <= 1e-6 * float(wanted[1].norm())
        assert float((grads[0].double() - exact_grads["x"]).norm()) <= 4e-3 * float(exact_grads["x"].norm())


@needs_triton
@pytest.mark.parametrize(("dtype", "residual", "norm"), CASES)
def test_kernels_against_float64(dtype: torch.dtype, residual: bool, norm: bool) -> None:
    given = inputs(dtype, residual, norm)
    x, gate, out, shift, scale = given
    assert x is not None
    results = fused._results(x, gate, out, shift, scale, dtype, SEEN * norm)
    triton_kernels.forward(*given, *results)
    generator = torch.Generator().manual_seed(1)
    dy, dh, dh32 = (torch.randn(B, S, D, generator=generator) for _ in range(3))
    given_x, both = x if norm else None, norm and dtype == torch.bfloat16
    dh, dh32[SEEN:] = dh.to(dtype), 0
    grads = fused._gradients(dy, dh, dh32, given_x, gate, out, scale, residual)
    triton_kernels.backward(
        dy, dh if norm else None, dh32[:SEEN] if both else None, given_x, gate, out, scale, residual, *grads
    )
    wanted, exact_grads = exact(given, dy, dh.float() + (dh32 if both else 0))
    wanted = [want.detach() for want in wanted]
    bits = 1e-6 if dtype == torch.float32 else 4e-3
    found = [results[0]] * residual + [results[1]] * norm
    for result, want in zip(found, wanted[0 if residual else 1 :], strict=True):
        assert float((result.double() - want).norm()) <= bits * float(want.norm())
    if norm:
        assert float((results[2].double() - wanted[-1][:SEEN]).norm()) <= 1e-6 * float(wanted[-1].norm()), "in fp32"
        assert float((grads[0].double() - exact_grads["x"]).norm()) <= 1e-6 * float(exact_grads["x"].norm())
    if residual:
        assert float((grads[1].double() - exact_grads["out"]).norm()) <= bits * float(exact_grads["out"].norm())
    names = [n for n in ("shift", "scale") if norm] + ["gate", "bias"] * residual
    for name, found_B1D in zip(names, grads[2].sum(2)[:, :, None], strict=True):
        found = found_B1D.sum((0, 1)) if name == "bias" else found_B1D
        assert float((found.double() - exact_grads[name]).norm()) <= 1e-6 * float(exact_grads[name].norm()), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernel", [False, pytest.param(True, marks=needs_triton)])
@pytest.mark.parametrize("rows", [0, 1, 130])
def test_gelu_backward_against_float64(dtype: torch.dtype, kernel: bool, rows: int) -> None:
    """Rows that do not fill a program, more columns than one has, and values where exp overflows."""
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(rows, 600, generator=generator).to(dtype) for _ in range(2))
    if rows:
        x[0, :4] = torch.tensor([-30.0, 30.0, 0.0, -5.0])
    if kernel:
        dx, sums = fused._gelu_gradients(grad, x)
        triton_kernels.gelu_backward(grad, x, dx, sums)
    else:
        dx, sums = fused.gelu_backward(grad, x)
    exact = x.double().requires_grad_()
    torch.nn.functional.gelu(exact, approximate="tanh").backward(grad.double())
    assert exact.grad is not None and dx.dtype == dtype and sums.dtype == torch.float32
    scale = float(exact.grad.norm())
    assert float((dx.double() - exact.grad).norm()) <= (1e-6 if dtype == torch.float32 else 4e-3) * scale
    assert float((sums.double().sum(0) - exact.grad.sum(0)).norm()) <= 1e-6 * scale
