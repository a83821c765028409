"""What this card can do at most: bytes copied, and products at the shapes of ProMoE-XL at micro-batch 64."""

from __future__ import annotations

import os
import platform

import torch
from torch.cuda import nccl

from benchmarks.common import commit, deepspeed_version
from benchmarks.gpu.figures import Figure, Stage

TOKENS, WIDTH, HIDDEN = 16384, 1152, 4608
PRODUCTS = ((8192, 8192, 8192), (TOKENS, HIDDEN, WIDTH), (TOKENS, WIDTH, HIDDEN), (TOKENS, 3 * WIDTH, WIDTH),
            (TOKENS, WIDTH, WIDTH), (WIDTH, HIDDEN, TOKENS))  # fmt: skip
"""(rows, columns, summed): the first gives the card's own rate; MLP up and down, qkv, projection, a weight gradient"""


def run(stage: Stage) -> None:
    stage.measure("versions", versions)
    stage.measure("copy", lambda: copy(stage))
    for shape in PRODUCTS:
        m, n, k = (size // 64 for size in shape) if stage.dry else shape
        stage.measure("x".join(map(str, shape)), lambda m=m, n=n, k=k: product(stage, m, n, k))


def versions() -> Figure:
    cuda = torch.cuda.is_available()
    return {
        "commit": commit(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nccl": ".".join(map(str, nccl.version())) if cuda else None,
        "deepspeed": deepspeed_version(),
        "cores": len(os.sched_getaffinity(0)),
    }


def copy(stage: Stage) -> Figure:
    n = 2**20 if stage.dry else 2**30
    x, y = torch.randn(n, device=stage.device), torch.empty(n, device=stage.device)
    return {"TB_s": 2 * x.nbytes / stage.timed(lambda: y.copy_(x), times=5) / 1e12}


def product(stage: Stage, m: int, n: int, k: int) -> Figure:
    a, b = (torch.randn(*shape, device=stage.device, dtype=torch.bfloat16) for shape in ((m, k), (k, n)))
    return {"TFLOP_s": 2 * m * n * k / stage.timed(lambda: a @ b) / 1e12}
