#!/usr/bin/env bash
# torch.compile on torch 2.11: the gradients of an autograd.Function are 0 if its forward ends in a call that has nothing to
# do and returns what it was given, such as `.to(dtype)` of a tensor that has that dtype, or `.contiguous()` of one that is.
# The result is right, nothing is written in place, and nothing is said. Written for several precisions, a function is right
# in bf16, where the cast is made, and trains nothing in fp32.
#
# A view as the result is right, and so is an idle cast before the last operation. Torch 2.13.0 is right in all cases.
#
# Seen with Python 3.11 on a CPU, backend aot_eager, gradients of x and y over those without compilation:
#   torch 2.11.0: to the same dtype 0 0, contiguous 0 0, to bf16 1 1, a view 1 1, cast before the sum 1 1
#   torch 2.13.0: to the same dtype 1 1, contiguous 1 1, to bf16 1 1, a view 1 1, cast before the sum 1 1
# Exits with 1 if that changes. Downloads torch 2.11's CUDA build from PyPI, 5 GB on the disk, removed at the end. No GPU.
set -euo pipefail
# shellcheck source=findings/environment.sh
. "$(dirname "$0")/environment.sh"
for version in 2.11.0 2.13.0; do
    install "torch==$version" numpy
    "$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch

FORWARDS = {
    "to the same dtype": lambda x, y: (x + y).to(x.dtype),
    "contiguous": lambda x, y: (x + y).contiguous(),
    "to bf16": lambda x, y: (x + y).to(torch.bfloat16),
    "a view": lambda x, y: (x + y).view(-1),
    "cast before the sum": lambda x, y: x.to(x.dtype) + y,
}


def gradients(forward, compiled):
    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, y):
            return forward(x, y)

        @staticmethod
        def backward(ctx, grad):
            return 3 * grad.float(), 5 * grad.float()

    def total(x, y):
        return Function.apply(2 * x, 2 * y).float().sin().sum()

    torch._dynamo.reset()
    x, y = torch.linspace(0.1, 1, 4, requires_grad=True), torch.linspace(1, 1.2, 4, requires_grad=True)
    (torch.compile(total, backend="aot_eager", fullgraph=True) if compiled else total)(x, y).backward()
    return x.grad, y.grad


found = {}
for name, forward in FORWARDS.items():
    pairs = zip(gradients(forward, True), gradients(forward, False), strict=True)
    found[name] = [round((a / b).mean().item(), 3) for a, b in pairs]
version = torch.__version__.partition("+")[0]
print(f"torch {version}: " + ", ".join(f"{name} {x:g} {y:g}" for name, (x, y) in found.items()))
lost = {name for name, ratios in found.items() if ratios == [0, 0]}
right = {name for name, ratios in found.items() if ratios == [1, 1]}
expected = {"to the same dtype", "contiguous"} if version == "2.11.0" else set()
sys.exit(lost != expected or right != set(FORWARDS) - expected)
PYTHON
done
