"""Stacked expert MLPs over rows sorted by expert.

Three backends that agree: `loop` (the reference: one linear layer an expert, reads the counts on the host),
`grouped_mm` (two grouped GEMMs, no padding, no host synchronisation) and `megablocks` (MegaBlocks' grouped GEMM, bf16
on CUDA, reads the counts on the host). Experts without rows are computed too: their gradient is zero, not absent.

Biases are packed into `w3`, because DeepSpeed's expert-parallel contract knows exactly three stacked weights.
Legend: N rows, D width, F hidden, E experts held here.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from promoe_ds.config import Config, reject
from promoe_ds.models.layers import gelu
from promoe_ds.moe.constants import unit_rows
from promoe_ds.moe.dispatch import ExpertRows, segment_sizes

_grouped_mm: Callable[..., Tensor] = getattr(F, "grouped_mm", None) or torch._grouped_mm


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
        self.backend, self.width, self.hidden, self.activation = backend, width, hidden, gelu
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
        x_ND, w1, w2, w3 = (t.to(dtype) for t in (rows.x_ND, self.w1, self.w2, self.w3))
        b1_EF, b2_ED = w3.squeeze(1).split([self.hidden, self.width], dim=1)
        with torch.autocast(device, enabled=False):  # grouped_mm ignores autocast: the casts above are ours
            if self.backend == "loop":
                sizes = segment_sizes(rows.end_E).tolist()
                parts = [
                    F.linear(self.activation(F.linear(x, w1[i], b1_EF[i])), w2[i], b2_ED[i])
                    for i, x in enumerate(x_ND.split(sizes))
                ]
                return torch.cat(parts)
            gmm = _megablocks_gmm(rows) if self.backend == "megablocks" else _torch_gmm(rows)
            # The bias of each row's expert as a product with the 0/1 membership matrix, added in place: its gradient is
            # a small GEMM instead of a scatter with N-fold contention.
            member_NE = unit_rows(len(w1), dtype, x_ND.device).index_select(0, rows.expert_N)
            h_NF = self.activation(gmm(x_ND, w1).addmm_(member_NE, b1_EF))
            return gmm(h_NF, w2).addmm_(member_NE, b2_ED)


Gmm = Callable[[Tensor, Tensor], Tensor]
"""(rows [N, K], weights [E, M, K]) -> [N, M]: each row times the transposed weight of its expert"""


def _torch_gmm(rows: ExpertRows) -> Gmm:
    return lambda x, w: _grouped_mm(x, w.transpose(1, 2), offs=rows.end_E)


def _megablocks_gmm(rows: ExpertRows) -> Gmm:
    gmm = importlib.import_module("grouped_gemm.ops").gmm  # what megablocks' grouped MLP calls
    sizes = segment_sizes(rows.end_E).cpu()
    return lambda x, w: gmm(x, w, sizes, trans_b=True)


def backend_problem(backend: str, device: str) -> str | None:
    """Why `moe.experts_backend` cannot run on this device ("cpu", "cuda"), in words; None if it can."""
    if backend != "megablocks":
        return None
    if device != "cuda":
        return f"needs a CUDA device, this is {device}"
    try:
        importlib.import_module("grouped_gemm.ops")
    except Exception as error:  # compiled parts fail to load in many ways
        return f"cannot be imported ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
    return None


def check_backend(config: Config, device: str) -> None:
    """Raise ConfigError if the experts of `config` cannot be computed on this kind of device."""
    backend = config.moe.experts_backend if config.moe else ""
    problem = backend_problem(backend, device)
    if problem:
        reject(
            "moe.experts_backend", backend, problem, "set moe.experts_backend=grouped_mm, or see docs/performance.md"
        )
