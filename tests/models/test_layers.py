"""Position and timestep tables against their formulas."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from promoe_ds.models.layers import Attention, grid_sinusoids, sinusoids
from promoe_ds.moe.mlp import gelu


def test_timestep_sinusoids() -> None:
    table = sinusoids(torch.tensor([0.0, 250.5]), 8, 4)
    for b, t in enumerate((0.0, 250.5)):
        for i in range(4):
            angle = t * 1e4 ** (-i / 4)
            assert math.isclose(table[b, i], math.cos(angle), abs_tol=1e-4)
            assert math.isclose(table[b, 4 + i], math.sin(angle), abs_tol=1e-4)


def test_position_table_has_columns_first_then_rows() -> None:
    table = grid_sinusoids(8, 3)
    assert table.shape == (1, 9, 8)
    for row in range(3):
        for column in range(3):
            entry = table[0, 3 * row + column]
            for half, position in ((0, column), (4, row)):
                for i in range(2):
                    angle = position / 1e4 ** (i / 2)
                    assert math.isclose(entry[half + i], math.sin(angle), abs_tol=1e-6)
                    assert math.isclose(entry[half + 2 + i], math.cos(angle), abs_tol=1e-6)


def test_key_bias_changes_nothing_and_is_not_trained() -> None:
    attention = Attention(16, 4, qk_norm=False).double()
    x = torch.randn(2, 5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    before = attention(x)[0]
    with torch.no_grad():
        attention.qkv.bias[16:32] += 3.0
    torch.testing.assert_close(attention(x)[0], before)
    attention(x)[0].square().sum().backward()
    assert attention.qkv.bias.grad is not None
    assert (attention.qkv.bias.grad[16:32] == 0).all() and (attention.qkv.bias.grad[:16] != 0).any()


def test_key_bias_is_trained_under_qk_norm() -> None:
    attention = Attention(16, 4, qk_norm=True)
    attention(torch.randn(2, 5, 16))[0].square().sum().backward()
    assert attention.qkv.bias.grad is not None and (attention.qkv.bias.grad[16:32] != 0).any()


def test_gelu_as_a_compiler_gets_it() -> None:
    """x sigmoid(2u) is x/2 (1 + tanh u): values and gradients, far out too."""
    x = torch.linspace(-30, 30, 1001, dtype=torch.float64, requires_grad=True)
    compiled, results = torch.compile(gelu, fullgraph=True, backend="aot_eager"), []
    for form in (compiled, lambda x: F.gelu(x, approximate="tanh"), gelu):
        y = form(x)
        results.append((y.detach(), *torch.autograd.grad(y.sum(), x)))
    for a, b, c in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        assert torch.equal(b, c)
