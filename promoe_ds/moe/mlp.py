"""The MLP of a dense block and of an expert that every token meets."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from promoe_ds.moe import fused
from promoe_ds.moe.recompute import linear


def gelu(x: Tensor) -> Tensor:
    """GELU in its tanh form, x/2 (1 + tanh u) with u = sqrt(2/pi) (x + 0.044715 x^3); any shape and floating dtype.

    A compiler gets it as x sigmoid(2u), which is the same: on a CPU a sigmoid costs a tenth of a tanh, and the GELUs
    are most of what an MoE layer does besides its products.
    """
    if not torch.compiler.is_compiling():
        return F.gelu(x, approximate="tanh")
    return x * torch.sigmoid(x * (1.5957691216057308 + 0.07135481627260025 * x * x))  # 2 sqrt(2/pi), and 0.044715 of it


def _in_graph_on_cuda(x: Tensor) -> bool:
    return torch.compiler.is_compiling() and fused.fusible(x)


class _GeluAfterBias(torch.autograd.Function):
    """GELU of [..., F] that contains a bias [F] without its gradient, which is made beside that of GELU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.dtype = bias.dtype
        return gelu(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (x,) = ctx.saved_tensors
        grad, rows = (t.contiguous().view(-1, x.shape[-1]) for t in (grads[0], x))
        dx, sums = fused.gelu_backward(grad, rows)
        return dx.view(x.shape), sums.sum(0).to(ctx.dtype)


class Linear(nn.Linear):
    """`nn.Linear` that keeps no input that can be computed again."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return linear(x, self.weight, self.bias)

    def beside_bias(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """-> (the result, its bias or None). A bias is to be given to what comes next, `residual_adaln` or GELU, whose
        kernel makes its gradient beside that of the result, which would be read once more for it. In graphs on CUDA
        alone: elsewhere ZeRO-3 may hold the bias inside this module's forward."""
        if not _in_graph_on_cuda(x):
            return self(x), None
        return F.linear(x, self.weight, self.bias.detach()), self.bias


class Mlp(nn.Module):
    """W2 gelu(W1 x + b1) + b2, any leading shape."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1, self.fc2 = Linear(width, hidden), Linear(hidden, width)
        self.activation = gelu

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.hidden(x))

    def hidden(self, x: Tensor) -> Tensor:
        """gelu(W1 x + b1)."""
        y, bias = self.fc1.beside_bias(x)
        return self.activation(y) if bias is None else _GeluAfterBias.apply(y, bias)  # type: ignore[no-any-return]

    def beside_bias(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """As of its last layer."""
        if not _in_graph_on_cuda(x):
            return self(x), None
        return self.fc2.beside_bias(self.hidden(x))
