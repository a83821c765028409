"""The grouped linear layer of `experts.py` as a compiler needs it, with the same results.

The grouped product is a black box to the compiler: torch's own can be traced in bf16 alone. Biases are picked by index,
not multiplied, so that their sum is fused into what comes next; their gradient is the same small GEMM.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from promoe_ds.moe.dispatch import ExpertRows
from promoe_ds.moe.experts import Linear, grouped_mm, membership


@torch.library.custom_op("promoe_ds_experts::grouped_mm", mutates_args=())
def opaque_grouped_mm(a: Tensor, b: Tensor, offs: Tensor) -> Tensor:
    """`grouped_mm`: [N, K] and [E, K, M] -> [N, M], or [K, N] and [N, M] -> [E, K, M]; groups of N end at `offs`."""
    return grouped_mm(a, b, offs=offs)


@opaque_grouped_mm.register_fake
def _(a: Tensor, b: Tensor, offs: Tensor) -> Tensor:
    return a.new_empty(*((len(a),) if b.dim() == 3 else (len(offs), len(a))), b.shape[-1])


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_NM: Tensor) -> tuple[Tensor, Tensor, None]:
    x_NK, w_EKM, offs = ctx.saved_tensors
    return opaque_grouped_mm(grad_NM, w_EKM.mT, offs), opaque_grouped_mm(grad_NM.mT, x_NK, offs).mT, None


opaque_grouped_mm.register_autograd(_backward, setup_context=_keep)


class _PlusBias(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_NM: Tensor, b_EM: Tensor, expert_N: Tensor) -> Tensor:
        ctx.save_for_backward(expert_N)
        ctx.num_experts = len(b_EM)
        return y_NM + b_EM.index_select(0, expert_N)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (expert_N,), (grad_NM,) = ctx.saved_tensors, grads
        return grad_NM, membership(expert_N, ctx.num_experts, grad_NM.dtype).T @ grad_NM, None


def grouped(rows: ExpertRows) -> Linear:
    """The backend `grouped_mm` of `experts.BACKENDS`, for a graph."""

    def linear(x_NK: Tensor, w_EMK: Tensor, b_EM: Tensor) -> Tensor:
        y_NM = opaque_grouped_mm(x_NK, w_EMK.mT, rows.end_E)
        return _PlusBias.apply(y_NM, b_EM, rows.expert_N)  # type: ignore[no-any-return]

    return linear
