#!/usr/bin/env bash
# torch 2.11.0 under torch.compile: an autograd.Function whose forward returns a tensor that it wrote in place passes no
# gradient to what is before it. The value is right, nothing is said, whatever the backend (here "eager": the graph is
# run as it was traced, so that no generated code takes part).
#
# Lost: the result of x.add_(), x.mul_(), x.copy_(), x.index_copy_() and of any function with out=.
# Not lost: out[:] = y, writes through a view of the result, writes to another tensor than the result, the result of
# another operation on what was written (out * 1, out.view_as(out)), and writes in place in the backward.
#
# Seen with torch 2.11.0+cu130, Python 3.12.1, on a CPU; d/dx of sum((2 * 3 x)^2) at x = 1 is 72:
#
#   torch 2.11.0+cu130
#   forward                 plain  compiled
#   x * 2                    72.0      72.0
#   (x * 2).add_(0)          72.0       0.0
#   empty.copy_(x * 2)       72.0       0.0
#   mul(x, 2, out=empty)     72.0       0.0
#   empty[:] = x * 2         72.0      72.0
#   empty.copy_(x * 2) * 1   72.0      72.0
#
# torch 2.13.0 (Python 3.11.7) and 2.15.0 (Python 3.13.0): 72.0 everywhere. An argument names another version than
# 2.11.0: bash findings/torch_211_in_place_forward.sh 2.15.0
#
# Downloads torch's CUDA build from PyPI: 530 MB and its libraries, 5 GB on the disk, removed at the end. No GPU, no C++
# compiler needed. Exits with 1 if the behaviour is another.
set -euo pipefail
version=${1:-2.11.0}
# shellcheck source=findings/environment.sh
. "$(dirname "$0")/environment.sh"
install "torch==$version" numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch


def by_item(x):
    out = torch.empty_like(x)
    out[:] = x * 2
    return out


FORWARDS = {
    "x * 2": lambda x: x * 2,
    "(x * 2).add_(0)": lambda x: (x * 2).add_(0),
    "empty.copy_(x * 2)": lambda x: torch.empty_like(x).copy_(x * 2),
    "mul(x, 2, out=empty)": lambda x: torch.mul(x, 2, out=torch.empty_like(x)),
    "empty[:] = x * 2": by_item,
    "empty.copy_(x * 2) * 1": lambda x: torch.empty_like(x).copy_(x * 2) * 1,
}
IN_PLACE = {"(x * 2).add_(0)", "empty.copy_(x * 2)", "mul(x, 2, out=empty)"}
LOST = IN_PLACE if torch.__version__.startswith("2.11.") else set()


def function(forward):
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return forward(x)

        @staticmethod
        def backward(ctx, grad):
            return grad * 2

    return lambda x: Twice.apply(x * 3).square().sum()


def gradient(run):
    x = torch.ones(3, requires_grad=True)
    value = run(x)
    assert value.item() == 108, "the value is right"
    value.backward()
    return x.grad[0].item()


print(f"torch {torch.__version__}\n{'forward':22}  plain  compiled")
changed = False
for name, forward in FORWARDS.items():
    torch._dynamo.reset()
    run = function(forward)
    plain, compiled = gradient(run), gradient(torch.compile(run, fullgraph=True, backend="eager"))
    print(f"{name:22} {plain:6} {compiled:9}")
    changed |= (plain, compiled) != (72, 0 if name in LOST else 72)
sys.exit(changed)
PYTHON
