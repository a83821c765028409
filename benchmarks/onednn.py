"""fp32 matrix products by oneDNN on a CPU, for studies of hours.

torch's wheels for x86 give `mm` and `addmm` to MKL, which takes AVX2 on an AMD CPU even where it has AVX-512. oneDNN,
in the same wheels, takes what the CPU has: 210 to 240 GFLOP/s instead of 90 to 110 on one thread of a Zen 5 core
(torch 2.13.0). Both sum in fp32, in another order.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor
from torch.library import Library

LIBRARY = Library("aten", "IMPL")
"""keeps what `use` registers; it lasts as long as this object"""


def mm(x_MK: Tensor, w_KN: Tensor) -> Tensor:
    if products_suit(x_MK, w_KN):
        return torch.ops.mkldnn._linear_pointwise(dense(x_MK), dense(w_KN).t(), None, "none", [], "")
    return torch.bmm(x_MK[None], w_KN[None])[0]


def addmm(bias: Tensor, x_MK: Tensor, w_KN: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    if beta == alpha == 1 and bias.shape == w_KN.shape[1:] and products_suit(bias, x_MK, w_KN):
        return torch.ops.mkldnn._linear_pointwise(dense(x_MK), dense(w_KN).t(), bias, "none", [], "")
    return torch.baddbmm(bias.expand(len(x_MK), w_KN.shape[1])[None], x_MK[None], w_KN[None], beta=beta, alpha=alpha)[0]


def products_suit(*tensors: Tensor) -> bool:
    """What oneDNN takes here; the rest goes to the batched operators, which stay torch's own."""
    return all(t.dtype == torch.float32 and t.numel() for t in tensors) and tensors[-2].shape[-1] == len(tensors[-1])


def dense(x_MK: Tensor) -> Tensor:
    """With rows or columns that follow each other without gaps."""
    return x_MK if x_MK.is_contiguous() or x_MK.t().is_contiguous() else x_MK.contiguous()


def use() -> None:
    """From here on, in this process. Nothing changes where torch was built without oneDNN."""
    if torch.backends.mkldnn.is_available():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a kernel is overridden, which is the purpose
            LIBRARY.impl("mm", mm, "CPU")
            LIBRARY.impl("addmm", addmm, "CPU")
