"""Triton kernels for CUDA; `fused.py` has what calls them, and the same in plain torch.

Residual and adaLN, forward and backward: each tensor as large as the tokens is read once and written once, where the
plain version reads it up to nine times. The backward pass needs sums along a row (of the norm) and down the columns (of
shift, scale and gate) at once, for which the compiler makes kernels of their own: a program here walks down some rows
of one image, one row in registers at a time, and adds up its columns.

GELU backward, whose columns are summed beside it: a program walks down some rows of some columns.

Legend: B images, S tokens per image, D width, C programs per image in the backward pass, N rows, F hidden.
"""

# pyright: reportInvalidTypeForm=false, reportOptionalMemberAccess=false

from __future__ import annotations

from typing import Any

from torch import Tensor

try:
    import triton  # type: ignore[import-not-found]
    import triton.language as tl  # type: ignore[import-not-found]
except ImportError:  # torch's builds for CPU come without it
    triton = tl = None

READY = triton is not None and "__file__" in globals()
"""whether kernels can be made: Triton reads their source, which an exported pipeline has not as a file"""
ROWS = 16
"""of a program of the backward pass: sums down the columns cost 4 / ROWS of a tensor in the tokens' fp32 each"""
GELU_ROWS = 64
"""of a program of GELU's backward pass: the sums are 1 / GELU_ROWS of the columns, in fp32"""
EPS = 1e-6


def jit(kernel: Any) -> Any:
    return triton.jit(kernel) if READY else kernel


@jit
def _load(pointer, at, live):  # type: ignore[no-untyped-def]
    return tl.load(pointer + at, mask=live, other=0.0).to(tl.float32)


@jit
def _normalised(x, live, D: tl.constexpr, EPS: tl.constexpr):  # type: ignore[no-untyped-def]
    """-> the row normalised, and the reciprocal of its standard deviation."""
    centred = tl.where(live, x - tl.sum(x, 0) / D, 0.0)
    rstd = 1 / tl.sqrt(tl.sum(centred * centred, 0) / D + EPS)
    return centred * rstd, rstd


@jit
def _forward(  # type: ignore[no-untyped-def]
    x_ptr, gate_ptr, out_ptr, shift_ptr, scale_ptr, y_ptr, h_ptr, h32_ptr,
    S, rows32, gate_step, shift_step, scale_step,
    D: tl.constexpr, BLOCK: tl.constexpr, EPS: tl.constexpr,
    RESIDUAL: tl.constexpr, NORM: tl.constexpr, BOTH: tl.constexpr,
):  # fmt: skip
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    live, at, image = column < D, row * D + column, row // S
    x = _load(x_ptr, at, live)
    if RESIDUAL:
        x += _load(gate_ptr, image * gate_step + column, live) * _load(out_ptr, at, live)
        tl.store(y_ptr + at, x, mask=live)
    if NORM:
        normal, _ = _normalised(x, live, D, EPS)
        h = normal * (1 + _load(scale_ptr, image * scale_step + column, live))
        h += _load(shift_ptr, image * shift_step + column, live)
        tl.store(h_ptr + at, h, mask=live)
        if BOTH:
            tl.store(h32_ptr + at, h, mask=live & (row < rows32))


@jit
def _backward(  # type: ignore[no-untyped-def]
    dy_ptr, dh_ptr, dh32_ptr, x_ptr, gate_ptr, out_ptr, scale_ptr, dx_ptr, dout_ptr, sums_ptr,
    S, rows32, gate_step, scale_step, C, BC,
    D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, EPS: tl.constexpr,
    RESIDUAL: tl.constexpr, NORM: tl.constexpr, BOTH: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    image, part, column = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, BLOCK)
    live = column < D
    gate, scale = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    dgate, dshift, dscale, total = gate, gate, gate, gate
    if RESIDUAL:
        gate = _load(gate_ptr, image * gate_step + column, live)
    if NORM:
        scale = 1 + _load(scale_ptr, image * scale_step + column, live)
    for i in range(ROWS):
        row = part * ROWS + i
        live, at = (column < D) & (row < S), (image * S + row) * D + column
        dx, out = _load(dy_ptr, at, live), tl.zeros([BLOCK], tl.float32)
        if RESIDUAL:
            out = _load(out_ptr, at, live)
        if NORM:
            x = _load(x_ptr, at, live)
            if RESIDUAL:
                x += gate * out
            normal, rstd = _normalised(x, live, D, EPS)
            dh = _load(dh_ptr, at, live)
            if BOTH:
                dh += _load(dh32_ptr, at, live & (image * S + row < rows32))
            dshift += dh
            dscale += dh * normal
            dn = dh * scale
            dn = dn - tl.sum(dn, 0) / D - normal * (tl.sum(dn * normal, 0) / D)
            dx += tl.where(live, dn * rstd, 0.0)
            tl.store(dx_ptr + at, dx, mask=live)
        if RESIDUAL:
            tl.store(dout_ptr + at, dx * gate, mask=live)
            dgate += dx * out
            total += dx
    to, live = (image * C + part) * D + column, column < D
    if NORM:
        tl.store(sums_ptr + to, dshift, mask=live)
        tl.store(sums_ptr + BC * D + to, dscale, mask=live)
    if RESIDUAL:
        tl.store(sums_ptr + (2 * BC if NORM else 0) * D + to, dgate, mask=live)
    if BIAS:
        tl.store(sums_ptr + (3 * BC if NORM else BC) * D + to, total * gate, mask=live)


@jit
def _gelu_backward(  # type: ignore[no-untyped-def]
    grad_ptr, x_ptr, dx_ptr, sums_ptr, N, F, BLOCK: tl.constexpr, ROWS: tl.constexpr
):
    part, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for i in range(ROWS):
        row = part * ROWS + i
        live, at = (column < F) & (row < N), row * F + column
        x = _load(x_ptr, at, live)
        sigmoid = 1 / (1 + tl.exp(-x * (1.5957691216057308 + 0.07135481627260025 * x * x)))  # as in `mlp.gelu`
        slope = 1.5957691216057308 + 0.21406444881780075 * x * x
        dx = _load(grad_ptr, at, live) * sigmoid * (1 + x * (1 - sigmoid) * slope)
        tl.store(dx_ptr + at, dx, mask=live)
        total += dx
    tl.store(sums_ptr + part * F + column, total, mask=column < F)


def _widths(D: int) -> dict[str, int]:
    block = triton.next_power_of_2(D)
    return {"D": D, "BLOCK": block, "num_warps": max(1, min(16, block // 256))}


def _step(of_images: Tensor | None) -> int:
    """From one image to the next."""
    return 0 if of_images is None else of_images.stride(0)


def forward(
    x: Tensor, gate: Tensor | None, out: Tensor | None, shift: Tensor | None, scale: Tensor | None,
    y: Tensor, h: Tensor, h32: Tensor,
) -> None:  # fmt: skip
    """Fill y = x + gate * out if there is an `out`, and h = norm(y) * (1 + scale) + shift if there is a `scale`; in
    fp32 as much of it as h32 holds. Shapes as in `fused.residual_adaln`; x, out contiguous; gate, shift, scale rows."""
    B, S, D = x.shape
    _forward[(B * S,)](
        x, gate, out, shift, scale, y, h, h32, S, h32.numel() // D, _step(gate), _step(shift), _step(scale), EPS=EPS,
        **_widths(D), RESIDUAL=out is not None, NORM=scale is not None, BOTH=h32.numel() > 0,
    )  # fmt: skip


def backward(
    dy: Tensor, dh: Tensor | None, dh32: Tensor | None, x: Tensor | None, gate: Tensor | None, out: Tensor | None,
    scale: Tensor | None, of_bias: bool, dx: Tensor, dout: Tensor, sums: Tensor,
) -> None:  # fmt: skip
    """Fill the gradients of x and out, and the sums [1 to 4, B, C, D] that make those of shift, scale, gate, bias."""
    (B, S, D), C, rows32 = dy.shape, sums.shape[2], 0 if dh32 is None else dh32.shape[0] * dh32.shape[1]
    _backward[(B, C)](
        dy, dh, dh32, x, gate, out, scale, dx, dout, sums, S, rows32, _step(gate), _step(scale), C, B * C,
        ROWS=ROWS, EPS=EPS, **_widths(D), RESIDUAL=out is not None, NORM=scale is not None, BOTH=dh32 is not None,
        BIAS=of_bias,
    )  # fmt: skip


def gelu_backward(grad: Tensor, x: Tensor, dx: Tensor, sums: Tensor) -> None:
    """Fill the gradient of x, all contiguous [N, F], and the parts [C, F] of its column sums."""
    parts, F = sums.shape
    if parts:
        block = 512
        grid = parts, -(-F // block)
        _gelu_backward[grid](grad, x, dx, sums, len(x), F, BLOCK=block, ROWS=GELU_ROWS, num_warps=2)
