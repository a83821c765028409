"""adaLN-zero's own gradients against autograd's, to the bit, and what they leave out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.op_counting import OperatorCount
from promoe_ds.models.adaln import adaln, gated, residual_adaln
from promoe_ds.models.init import build, materialize
from promoe_ds.moe import fused
from promoe_ds.moe.recompute import linear, recomputed
from promoe_ds.moe.routers import ROUTERS
from promoe_ds.recipes.load import load_config

B, S, D = 3, 7, 20


def draw(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()


def inputs_of(stream: torch.dtype, rest: torch.dtype) -> list[Tensor]:
    """x, gate, out, shift, scale; the stream is fp32 and all else bf16 under autocast."""
    shapes = (B, S, D), (B, 1, D), (B, S, D), (B, 1, D), (B, 1, D)
    return [draw(*shape, dtype=rest if i else stream, seed=i) for i, shape in enumerate(shapes)]


FUNCTIONS: dict[str, tuple[Any, Callable[..., Any], Callable[[list[Tensor]], list[Tensor]]]] = {
    "adaln": (
        adaln,
        lambda x, shift, scale: F.layer_norm(x, (D,), eps=1e-6) * (1 + scale) + shift,
        lambda i: [i[0], i[3], i[4]],
    ),
    "residual_adaln": (
        residual_adaln,
        lambda x, gate, out, shift, scale: (
            (x := x + gate * out),
            F.layer_norm(x, (D,), eps=1e-6) * (1 + scale) + shift,
        ),
        lambda i: i,
    ),
    "gated": (gated, lambda gate, out: gate * out, lambda i: i[1:3]),
}
DTYPES = [(torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)]


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize(("stream", "rest"), DTYPES)
@pytest.mark.parametrize("asked", [False, True])
def test_equal_to_autograd_to_the_bit(name: str, stream: torch.dtype, rest: torch.dtype, asked: bool) -> None:
    """`asked`: a product behind asks for the result anew, before the function's own gradient."""
    function, plain, pick = FUNCTIONS[name]
    inputs = pick(inputs_of(stream, rest))
    weight = draw(4, D, dtype=stream, seed=9)
    found = []
    for work, product in ((lambda *x: recomputed(function, *x), linear), (plain, F.linear)):
        out = work(*inputs)
        *stream_out, h = out if isinstance(out, tuple) else (out,)
        y = product(h.to(stream), weight) if asked else h * h.detach()
        total = y.float().square().sum() + sum(x.sin().sum() for x in stream_out)
        found.append((h, *torch.autograd.grad(total, inputs)))
    for ours, theirs in zip(*found, strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_in_double_precision(name: str) -> None:
    function, _, pick = FUNCTIONS[name]
    assert torch.autograd.gradcheck(lambda *x: recomputed(function, *x), pick(inputs_of(torch.float64, torch.float64)))


@pytest.mark.parametrize("used", [0, 1])
def test_one_of_two_results(used: int) -> None:
    inputs, (function, plain, _) = inputs_of(torch.float64, torch.float64), FUNCTIONS["residual_adaln"]
    grads = [
        torch.autograd.grad(work(*inputs)[used].sin().sum(), inputs, allow_unused=True)
        for work in (lambda *x: recomputed(function, *x), plain)
    ]
    for ours, theirs in zip(*grads, strict=True):
        assert (ours is None) == (theirs is None) and (ours is None or torch.equal(ours, theirs))


def test_gradients_that_others_hold_are_not_written_to() -> None:
    inputs = inputs_of(torch.float32, torch.float32)
    x, h = recomputed(residual_adaln, *inputs)
    grads = [torch.ones_like(x), torch.full_like(h, 2.0)]
    torch.autograd.backward([x, h], grads)
    assert (grads[0] == 1).all() and (grads[1] == 2).all()


def test_a_gate_makes_its_product_once() -> None:
    gate, out = FUNCTIONS["gated"][2](inputs_of(torch.float32, torch.float32))
    with OperatorCount() as count:
        recomputed(gated, gate, out).sum().backward()
    assert count.names["mul"] == 3


@pytest.mark.parametrize("router", sorted(ROUTERS))
def test_kernels_in_a_model_of_bf16_weights(router: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What routers are given has the precision of their weights. The kernels' plain operators, on a CPU."""
    monkeypatch.setattr(fused, "fusible", lambda x: x.dtype == torch.bfloat16)
    more = ["moe.router.superclasses=digits", "moe.num_experts=4"] if router == "classification" else []
    model = materialize(build(load_config("tiny", [f"moe.router.name={router}", *more])), 0)
    for p in model.parameters():
        p.data = p.data.bfloat16()
    out = model(torch.randn(4, 1, 8, 8), torch.full((4,), 500.0), torch.tensor([1, 2, 10, 3]))
    assert out.prediction.dtype == torch.bfloat16 and out.prediction.isfinite().all()
