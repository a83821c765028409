#!/usr/bin/env bash
# torch's `parameter.grad_dtype = None` lets gradients arrive in any dtype, and then the first one decides in which the others
# are added: gradient accumulation is in bf16 if the first micro-batch's is, also for fp32 gradients after it, and stops at
# 256 times one value. In the other order, or under create_graph=True, the same gradients give an fp32 sum. By default
# (`grad_dtype` is that of the parameter) each is cast first.
#
# torch's AdamW cannot use them: it raises an error with each of its implementations, where SGD's plain one takes them.
#
# Seen with torch 2.13.0, Python 3.11, on a CPU; 512 gradients of 1:
#   bf16: 256 in torch.bfloat16
#   bf16, then fp32: 256 in torch.bfloat16
#   fp32, then bf16: 512 in torch.float32
#   bf16, then fp32, create_graph: 512 in torch.float32
#   bf16, default: 512 in torch.float32
#   AdamW: error error error, SGD: error step step (fused, foreach, neither)
# Exits with 1 if that changes.
set -euo pipefail
# shellcheck source=findings/environment.sh
. "$(dirname "$0")/environment.sh"
install torch==2.13.0 numpy
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import sys

import torch


class Half(torch.autograd.Function):
    """A copy in bf16, whose gradient is passed on as it is."""

    @staticmethod
    def forward(ctx, w):
        return w.bfloat16()

    @staticmethod
    def backward(ctx, grad):
        return grad


def summed(order, dtype=None, create_graph=False):
    w = torch.nn.Parameter(torch.zeros(1))
    w.grad_dtype = dtype
    for kind in order:
        (Half.apply(w) if kind == "bf16" else w).sum().backward(create_graph=create_graph)
    return f"{w.grad.item():g} in {w.grad.dtype}"


def update(kind, **options):
    w = torch.nn.Parameter(torch.zeros(2))
    w.grad_dtype, w.grad = None, None
    w.grad = torch.ones(2, dtype=torch.bfloat16)
    try:
        kind([w], lr=0.1, **options).step()
    except RuntimeError:
        return "error"
    return "step"


first, then = ["bf16"], ["fp32"]
lines = [
    "bf16: " + summed(first * 512),
    "bf16, then fp32: " + summed(first + then * 511),
    "fp32, then bf16: " + summed(then + first * 511),
    "bf16, then fp32, create_graph: " + summed(first + then * 511, create_graph=True),
    "bf16, default: " + summed(first * 512, torch.float32),
]
ways = {"fused": True}, {"foreach": True}, {"foreach": False}
adam, sgd = (" ".join(update(kind, **way) for way in ways) for kind in (torch.optim.AdamW, torch.optim.SGD))
lines.append(f"AdamW: {adam}, SGD: {sgd} (fused, foreach, neither)")
print("\n".join(lines))
half, full = "256 in torch.bfloat16", "512 in torch.float32"
wanted = [half, half, full, full, full]
sys.exit([line.split(": ")[1] for line in lines[:5]] != wanted or (adam, sgd) != ("error error error", "error step step"))
PYTHON
