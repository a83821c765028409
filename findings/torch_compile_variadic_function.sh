#!/usr/bin/env bash
# torch.compile cannot trace an autograd.Function whose forward takes *args where no gradient is asked for: the same Function
# with its arguments named is traced, and with gradients both are. Inference is thus refused where training compiles.
# The message speaks of an exception in the function ("object of type ... has no len()" here): its arguments have moved by one.
#
# Seen with torch 2.13.0, Python 3.11, on a CPU, backend eager, fullgraph:
#   named: with gradients traced, without traced
#   variadic: with gradients traced, without Unsupported
# Exits with 1 if that changes.
set -euo pipefail
# shellcheck source=findings/environment.sh
. "$(dirname "$0")/environment.sh"
install torch==2.13.0 numpy
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch


class Named(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dtype, a, b):
        ctx.rows = len(x)
        return (x + a + b).to(dtype)

    @staticmethod
    def backward(ctx, grad):
        return grad, None, grad, grad


class Variadic(Named):
    @staticmethod
    def forward(ctx, x, dtype, *parts):
        ctx.rows = len(x)
        return (x + parts[0] + parts[1]).to(dtype)


def verdict(function, gradients):
    compiled = torch.compile(lambda x, a, b: function.apply(x, torch.float32, a, b), backend="eager", fullgraph=True)
    inputs = [torch.randn(4, requires_grad=True) for _ in range(3)]
    with torch.set_grad_enabled(gradients):
        try:
            out = compiled(*inputs)
        except torch._dynamo.exc.Unsupported:
            return "Unsupported"
    return "traced" if torch.equal(out, sum(inputs)) else "wrong"


found = [[verdict(function, gradients) for gradients in (True, False)] for function in (Named, Variadic)]
for name, (training, inference) in zip(("named", "variadic"), found, strict=True):
    print(f"{name}: with gradients {training}, without {inference}")
sys.exit(found != [["traced", "traced"], ["traced", "Unsupported"]])
PYTHON
