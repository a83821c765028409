"""Clipping, AdamW and EMA in one pass over memory, as one graph of torch's compiler: for partitions in host memory.

Per parameter an fp32 step reads gradient, weight, two moments and the average, and writes the last four: 36 bytes. One
after the other, clipping (8), AdamW (28) and EMA (12) move 48. Either way the gradient norm has read 4 before.

Elsewhere they stay apart: many small tensors (ZeRO 0) gain little, and on CUDA this was never run. The figures are in
benchmarks/results/optimizer_step.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Update = Callable[[Tensor, Tensor, Tensor, Tensor, Sequence[Tensor], Tensor], None]


def update(w_N: Tensor, g_N: Tensor, m_N: Tensor, v_N: Tensor, average_N: Sequence[Tensor], scalar_S: Tensor) -> None:
    """Change weights, moments and averages in place; the gradients stay as they are.

    Args:
        w_N, g_N, m_N, v_N: weights, gradients, first and second moments, fp32.
        average_N: averages of the weights, fp32.
        scalar_S: `scalars`.
    """
    clip, a1, a2, lr, root, eps, decay, *a_ema = scalar_S.unbind()
    g = g_N * clip
    m = m_N + (g - m_N) * a1
    v = v_N + (g * g - v_N) * a2
    w = w_N * decay - lr * m / (v.sqrt() * root + eps)
    for average, a in zip(average_N, a_ema, strict=True):
        average.copy_(average + (w - average) * a)
    m_N.copy_(m)
    v_N.copy_(v)
    w_N.copy_(w)


def scalars(group: dict[str, Any], step: int, clip: float, decays: Sequence[float]) -> Tensor:
    """[7 + len(decays)] fp32: what a step of AdamW (arXiv:1711.05101, Algorithm 2) needs beside its tensors.

    Tensors and not numbers, because a graph that may take any size computes with numbers in double precision.

    Args:
        group: a parameter group of torch.optim.AdamW.
        step: of the update, from 1.
        clip: factor of the gradients.
        decays: of the averages.
    """
    (b1, b2), lr = group["betas"], group["lr"]
    ahead, root = lr / (1 - b1**step), (1 - b2**step) ** -0.5
    values = [clip, 1 - b1, 1 - b2, ahead, root, group["eps"], 1 - lr * group["weight_decay"]]
    return torch.tensor(values + [1 - decay for decay in decays])


def compiled() -> Update | None:
    """`update` as one graph for any size; None where the compiler finds no vector instructions.

    It then makes scalar loops, three times slower than AdamW and EMA one after the other. It finds none without a C++
    compiler, nor where its trial program fails, and does not say so (torch 2.13: a file `enum.py` beside the script).
    """
    from torch._inductor.cpu_vec_isa import pick_vec_isa  # seconds, for those who compile

    return torch.compile(update, fullgraph=True, dynamic=True) if pick_vec_isa() else None
