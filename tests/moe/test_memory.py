"""Without gradients results take the memory of operands: the same to the bit, and nothing of the caller's is lost."""

from __future__ import annotations

import pytest
import torch

from promoe_ds.models.init import build, materialize
from promoe_ds.models.layers import gated_sum, modulate
from promoe_ds.moe.memory import may_overwrite, plus, times
from promoe_ds.moe.mlp import gelu
from promoe_ds.recipes.load import load_config

FAMILIES = ["null", *(f"{{router: {{name: {name}}}}}" for name in ("promoe", "promoe_ec", "token_choice", "diffmoe"))]


@pytest.mark.parametrize("moe", FAMILIES)
@pytest.mark.parametrize("mixed", [False, True])
def test_a_forward_without_gradients_is_the_same_to_the_bit(moe: str, mixed: bool) -> None:
    model = materialize(build(load_config("tiny", [f"moe={moe}"])), 0).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    x, t = torch.randn(4, 1, 8, 8, generator=generator), torch.tensor([10.0, 300.0, 500.0, 999.0])
    y, before = torch.tensor([3, 10, 0, 10]), x.clone()
    outputs = []
    for grad in (True, False):
        with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            outputs.append(model(x, t, y))
    kept, overwritten = outputs
    assert torch.equal(kept.prediction, overwritten.prediction) and kept.prediction.std() > 0.01
    assert torch.equal(x, before)
    for a, b in zip(kept.weights, overwritten.weights, strict=True):
        assert torch.equal(a, b)


@torch.no_grad()
def test_what_is_overwritten_and_what_is_not() -> None:
    x, y, half = torch.randn(3, 4), torch.randn(3, 4), torch.randn(3, 4).bfloat16()
    for operation in (plus, times):
        expected, start = (x + y if operation is plus else x * y), x.clone()
        assert torch.equal(operation(start, y), expected) and torch.equal(start, expected)
        narrow = half.clone()
        assert operation(narrow, y).dtype == torch.float32 and torch.equal(narrow, half), "a wider result has its own"
    with torch.enable_grad():
        assert not may_overwrite(x, y)
        assert torch.equal(plus(x, y), x + y) and torch.equal(times(x, y), x * y)


@torch.no_grad()
def test_streams_and_modulations_stay() -> None:
    """The residual stream and the vectors of a block are used again."""
    x, branch, gate, shift, scale = (torch.randn(2, 3, 4) for _ in range(5))
    kept = [tensor.clone() for tensor in (x, gate, shift, scale)]
    expected = x + gate * branch
    assert torch.equal(gated_sum(x, gate, branch.clone()), expected)
    normed = torch.randn(2, 3, 4)
    expected = normed * (1 + scale) + shift
    assert torch.equal(modulate(normed.clone(), shift, scale), expected)
    assert all(torch.equal(a, b) for a, b in zip((x, gate, shift, scale), kept, strict=True))
    hidden = torch.randn(5, 6)
    assert torch.equal(gelu(hidden.clone()), torch.nn.functional.gelu(hidden, approximate="tanh"))
