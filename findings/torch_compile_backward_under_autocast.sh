#!/usr/bin/env bash
# torch.compile traces the backward pass under the autocast of the forward pass. Eagerly, `with torch.autocast(...)` around
# the forward pass alone, as its documentation asks for, leaves the backward of an autograd.Function outside: what it computes
# in fp32 on purpose (gradients of a router, sums over many tokens) is in bf16 once compiled, and fp32 by its dtype.
#
# torch._functorch.config.backward_pass_autocast = "off" computes what eager does; the default is "same_as_forward".
#
# Seen with torch 2.13.0, Python 3.11, on a CPU; bf16 rounds to 4e-03:
#   aot_eager, same_as_forward: gradients of x and w apart by 6e-03 and 2e-03 of their largest
#   aot_eager, off: gradients of x and w apart by 0e+00 and 0e+00 of their largest
#   inductor, same_as_forward: gradients of x and w apart by 6e-03 and 2e-03 of their largest
#   inductor, off: gradients of x and w apart by 0e+00 and 0e+00 of their largest
# Exits with 1 if that changes.
set -euo pipefail
# shellcheck source=findings/environment.sh
. "$(dirname "$0")/environment.sh"
install torch==2.13.0 numpy
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch
import torch._functorch.config as functorch


class Scores(torch.autograd.Function):
    """x @ w.T with an fp32 backward, as a router may have it."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        with torch.autocast("cpu", enabled=False):
            return x @ w.T

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        return grad @ w, grad.T @ x


def gradients(function):
    torch.manual_seed(0)
    x, w = torch.randn(4096, 64, requires_grad=True), torch.randn(8, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        scores = function(x, w)
    assert scores.dtype == torch.float32
    scores.square().sum().backward()
    return x.grad, w.grad


plain = gradients(Scores.apply)
found = []
for backend in ("aot_eager", "inductor"):
    for setting in ("same_as_forward", "off"):
        torch._dynamo.reset()
        functorch.backward_pass_autocast = setting
        compiled = gradients(torch.compile(Scores.apply, backend=backend, fullgraph=True))
        far = [((a - b).abs().max() / a.abs().max()).item() for a, b in zip(plain, compiled, strict=True)]
        print(f"{backend}, {setting}: gradients of x and w apart by {far[0]:.0e} and {far[1]:.0e} of their largest")
        assert all(gradient.dtype == torch.float32 for gradient in compiled)
        found.append(max(far) > 1e-4)
sys.exit(found != [True, False] * 2)
PYTHON
