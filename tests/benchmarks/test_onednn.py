"""oneDNN's matrix products: every layout against float64, gradients too, and what it does not take goes elsewhere."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from benchmarks import onednn

LAYOUTS = {
    "rows": lambda x: x,
    "columns": lambda x: x.t().contiguous().t(),
    "every second row": lambda x: torch.stack([x, x + 1], 1)[:, 0],
    "a part of the columns": lambda x: torch.cat([x, x + 1], 1)[:, : x.shape[1]],
    "one row for all": lambda x: x[:1].expand_as(x),
}


@pytest.mark.parametrize("right", LAYOUTS)
@pytest.mark.parametrize("left", LAYOUTS)
def test_products_of_every_layout_are_those_of_float64(left, right):
    generator = torch.Generator().manual_seed(0)
    x_MK = LAYOUTS[left](torch.randn(37, 50, generator=generator))
    w_KN = LAYOUTS[right](torch.randn(50, 21, generator=generator))
    bias_N = torch.randn(21, generator=generator)
    exact = x_MK.double() @ w_KN.double()
    torch.testing.assert_close(onednn.mm(x_MK, w_KN).double(), exact, rtol=0, atol=2e-5)
    torch.testing.assert_close(onednn.addmm(bias_N, x_MK, w_KN).double(), exact + bias_N, rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64])
def test_other_types_go_to_torch(dtype):
    x_MK, w_KN, bias_MN = torch.ones(3, 4).to(dtype), torch.ones(4, 5).to(dtype), torch.ones(3, 5).to(dtype)
    assert onednn.mm(x_MK, w_KN).dtype == dtype and (onednn.mm(x_MK, w_KN) == 4).all()
    assert (onednn.addmm(bias_MN, x_MK, w_KN, beta=2, alpha=3) == 14).all()


def test_factors_and_empty_and_wrong_shapes_are_as_in_torch():
    x_MK, w_KN = torch.ones(3, 4), torch.ones(4, 5)
    assert (onednn.addmm(torch.ones(5), x_MK, w_KN, beta=0.5, alpha=2) == 8.5).all()
    assert onednn.mm(torch.ones(0, 4), w_KN).shape == (0, 5)
    assert (onednn.addmm(torch.ones(5), torch.ones(3, 0), torch.ones(0, 5)) == 1).all()
    with pytest.raises(RuntimeError):
        onednn.mm(x_MK, torch.ones(5, 4))


def test_layers_and_their_gradients_use_it_once_told_to():
    """In a process of its own, since it lasts as long as the process."""
    code = """
import torch, torch.nn.functional as F
from benchmarks import onednn
x, w, b = (torch.randn(*s, requires_grad=True) for s in ((6, 8), (5, 8), (5,)))
before = torch.autograd.grad(F.linear(x, w, b).square().sum(), (x, w, b))
calls = []
linear, onednn.dense = onednn.dense, lambda t: calls.append(t) or linear(t)
onednn.use()
after = torch.autograd.grad(F.linear(x, w, b).square().sum(), (x, w, b))
assert len(calls) == 6, len(calls)  # forward, and both gradients
for one, other in zip(before, after): torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
