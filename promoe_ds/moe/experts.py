"""Stacked expert MLPs over rows sorted by expert.

Three backends that agree: `loop` (the reference: one linear layer per expert, reads the counts on the host),
`grouped_mm` (two grouped GEMMs, no padding, no host synchronisation) and `megablocks` (MegaBlocks' grouped GEMM, bf16
on CUDA, reads the counts on the host). Experts without rows are computed too: their gradient is zero, not absent.

Biases are packed into `w3`, because DeepSpeed's expert-parallel contract knows exactly three stacked weights.
Legend: N rows, D width, F hidden, E experts held here.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from promoe_ds.config.errors import reject
from promoe_ds.config.schema import Config
from promoe_ds.moe import recompute
from promoe_ds.moe.constants import unit_rows
from promoe_ds.moe.dispatch import ExpertRows, tokens_per_expert
from promoe_ds.moe.mlp import gelu
from promoe_ds.moe.recompute import cast, keep, kept
from promoe_ds.moe.weight_casts import cast_weight

grouped_mm: Callable[..., Tensor] = getattr(F, "grouped_mm", None) or torch._grouped_mm

OPERATORS = f"{__name__.split('.')[0]}_experts"
"""the namespace of operators: an exported copy of this module has its own, or it would replace ours"""

Linear = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(rows [N, K], weights [E, M, K], biases [E, M]) -> [N, M]: to each row the linear layer of its expert"""


class StackedExperts(nn.Module):
    """E two-layer GELU(tanh) MLPs with biases: y = W2 gelu(W1 x + b1) + b2.

    Args:
        num_experts: E experts held by this module.
        width: D.
        hidden: F.
        backend: "loop", "grouped_mm" or "megablocks" (`backend_problem` says whether it can run).
        expert_ids: the global ids of these experts; weights are drawn per global id. Defaults to 0..E-1.
    """

    def __init__(self, num_experts: int, width: int, hidden: int, backend: str, expert_ids: range | None = None):
        super().__init__()
        self.backend, self.width, self.hidden = backend, width, hidden
        self.backends, self.activation = BACKENDS, gelu  # a compiler is given others
        self.expert_ids = expert_ids if expert_ids is not None else range(num_experts)
        self.w1 = nn.Parameter(torch.empty(num_experts, hidden, width))
        self.w2 = nn.Parameter(torch.empty(num_experts, width, hidden))
        self.w3 = nn.Parameter(torch.empty(num_experts, 1, hidden + width))
        """[b1 | b2]"""

    def init_weights(self, generator: Callable[[str], torch.Generator]) -> None:
        """Xavier-uniform per expert from its own generator, so that sharding does not change the model."""
        bound = math.sqrt(6 / (self.width + self.hidden))
        for i, expert in enumerate(self.expert_ids):
            nn.init.uniform_(self.w1[i], -bound, bound, generator=generator(f"w1.{expert}"))
            nn.init.uniform_(self.w2[i], -bound, bound, generator=generator(f"w2.{expert}"))
        nn.init.zeros_(self.w3)

    def compute_dtype(self, device: str) -> torch.dtype:
        """The autocast precision if autocast is on, else that of the weights; rows travel in it too."""
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.w1.dtype

    def forward(self, rows: ExpertRows) -> Tensor:
        """Rows [N, D] sorted by expert -> [N, D], in `compute_dtype`."""
        device = rows.x_ND.device.type
        dtype = self.compute_dtype(device)
        rows = rows._replace(x_ND=cast(rows.x_ND, dtype))
        w1, w2, w3 = (cast_weight(w, dtype) for w in (self.w1, self.w2, self.w3))
        b1_EF, b2_ED = w3.squeeze(1).split([self.hidden, self.width], dim=1)
        with torch.autocast(device, enabled=False):  # grouped_mm ignores autocast: the casts above are ours
            linear = self.backends[self.backend](rows)
            return linear(self.activation(linear(rows.x_ND, w1, b1_EF)), w2, b2_ED)


def _loop(rows: ExpertRows) -> Linear:
    sizes = tokens_per_expert(rows.offsets_E).tolist()

    def linear(x_NK: Tensor, w_EMK: Tensor, b_EM: Tensor) -> Tensor:
        return torch.cat([recompute.linear(x, w_EMK[i], b_EM[i]) for i, x in enumerate(x_NK.split(sizes))])

    return linear


class _GroupedLinear(torch.autograd.Function):
    """The products of `grouped_mm`'s own gradients, but x is not kept where it can be computed again."""

    @staticmethod
    def forward(ctx: Any, x_NK: Tensor, w_EMK: Tensor, b_EM: Tensor, member_NE: Tensor, offs: Tensor) -> Tensor:
        keep(ctx, x_NK, w_EMK, member_NE, offs)
        return grouped_mm(x_NK, w_EMK.mT, offs=offs).addmm_(member_NE, b_EM)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x_NK, w_EMK, member_NE, offs), (grad_NM,) = kept(ctx), grads
        return (
            grouped_mm(grad_NM, w_EMK, offs=offs),
            grouped_mm(grad_NM.mT, x_NK, offs=offs),
            member_NE.T @ grad_NM,
            None,
            None,
        )


def _grouped(rows: ExpertRows) -> Linear:
    member_NE = membership(rows.expert_N, len(rows.offsets_E), rows.x_ND.dtype)
    return lambda x_NK, w_EMK, b_EM: _GroupedLinear.apply(x_NK, w_EMK, b_EM, member_NE, rows.offsets_E)


def _megablocks(rows: ExpertRows) -> Linear:
    gmm = importlib.import_module("grouped_gemm.ops").gmm  # what megablocks' grouped MLP calls
    sizes = tokens_per_expert(rows.offsets_E).long().cpu()
    member_NE = membership(rows.expert_N, len(rows.offsets_E), rows.x_ND.dtype)
    return lambda x_NK, w_EMK, b_EM: gmm(x_NK, w_EMK, sizes, trans_b=True).addmm_(member_NE, b_EM)


def membership(expert_N: Tensor, num_experts: int, dtype: torch.dtype) -> Tensor:
    """[N, E]: 1 where the row is the expert's, else 0.

    Biases are added as its product with them, in place: the gradient of a bias is then a small GEMM, where indexing
    would scatter with N-fold contention.
    """
    return unit_rows(num_experts, dtype, expert_N.device).index_select(0, expert_N)


BACKENDS: dict[str, Callable[[ExpertRows], Linear]] = {"loop": _loop, "grouped_mm": _grouped, "megablocks": _megablocks}


def backend_problem(backend: str, device: str) -> str | None:
    """Why `moe.experts_backend` cannot run on this device ("cpu", "cuda"), in words; None if it can."""
    if backend != "megablocks":
        return None
    if device != "cuda":
        return f"needs a CUDA device, this is {device}"
    try:
        importlib.import_module("grouped_gemm.ops")
    except Exception as error:  # compiled parts fail to load in many ways
        return f"cannot be imported ({type(error).__name__}: {str(error)[:200]})"
    return None


def check_backend(config: Config, device: str) -> None:
    """Raise ConfigError if the experts of `config` cannot be computed on this kind of device."""
    backend = config.moe.experts_backend if config.moe else ""
    if problem := backend_problem(backend, device):
        way_out = "set moe.experts_backend=grouped_mm, or see docs/performance.md"
        reject("moe.experts_backend", backend, problem, way_out)


# The grouped product is a black box to the compiler: torch's own can be traced in bf16 alone. Biases are picked by
# index, not multiplied, so that their sum is fused into what comes next; their gradient is the same small GEMM.


@torch.library.custom_op(f"{OPERATORS}::grouped_mm", mutates_args=())
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
    """The backend `grouped_mm` of `BACKENDS`, for a graph."""

    def linear(x_NK: Tensor, w_EMK: Tensor, b_EM: Tensor) -> Tensor:
        y_NM = opaque_grouped_mm(x_NK, w_EMK.mT, rows.offsets_E)
        return _PlusBias.apply(y_NM, b_EM, rows.expert_N)  # type: ignore[no-any-return]

    return linear
