"""What the log says of the experts, layer by layer.

Sums are taken in steps that are logged only, of what the model returns: nothing is hooked into it, so a compiled model
stays compiled.

Legend: L MoE layers, E routed experts, K numbers a layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from promoe_ds.models.dit import DiT, DiTOutput
from promoe_ds.moe.statistics import (
    PROTOTYPE_STATISTICS,
    dead_experts,
    load_entropy,
    max_over_mean,
    prototype_statistics,
    prototypes_of,
)
from promoe_ds.moe.trace import routers_of

LAYERS_SHOWN = 8
"""MoE layers with TensorBoard tags of their own; metrics.jsonl has all"""


class ExpertWatch:
    """Sums over the forwards of one optimizer step, on this rank; they stay on the device until a report."""

    def __init__(self, model: DiT):
        self.routers = routers_of(model)
        self.start()

    def start(self) -> None:
        """A new step."""
        self._losses: list[str] = []
        self._sums_KL: Tensor | None = None

    @torch.no_grad()
    def see(self, output: DiTOutput) -> None:
        """Add a forward of the step."""
        if not self.routers:
            return
        sums_L2 = torch.stack([torch.stack([w_N.sum(), w_N.square().sum()]) for w_N in output.weights])
        edges_L = sums_L2.new_tensor([len(w_N) for w_N in output.weights])
        self._losses = list(output.aux)
        sums_KL = torch.stack([torch.ones_like(edges_L), edges_L, *sums_L2.T, *output.aux.values()]).double()
        self._sums_KL = sums_KL if self._sums_KL is None else self._sums_KL + sums_KL

    def report(
        self,
        load_LE: Tensor,
        sum_over_ranks: Callable[[Tensor], Tensor],
        whole: Callable[[Tensor], Tensor] = Tensor.detach,
    ) -> dict[str, list[Any]]:
        """Numbers by name, a list with one for each MoE layer; collective if a forward was seen.

        Args:
            load_LE: int32 [L, E], over all ranks.
            whole: all values of a parameter or buffer of which this rank may hold a piece.
        """
        if not self.routers:
            return {}
        load_LE = load_LE.cpu()
        values: dict[str, list[Any]] = {
            "block": list(self.routers),
            "load_max_over_mean": max_over_mean(load_LE).tolist(),
            "load_entropy": load_entropy(load_LE).tolist(),
            "dead_experts": dead_experts(load_LE).tolist(),
        }
        if self._sums_KL is not None:
            forwards_L, edges_L, weight_L, square_L, *losses = sum_over_ranks(self._sums_KL).cpu()
            mean_L = weight_L / edges_L.clamp(min=1)
            values["gate_mean"] = mean_L.tolist()
            values["gate_std"] = (square_L / edges_L.clamp(min=1) - mean_L**2).clamp(min=0).sqrt().tolist()
            for name, loss_L in zip(self._losses, losses, strict=True):
                values[f"loss/{name}"] = (loss_L / forwards_L).tolist()
            prototypes = [p for router in self.routers.values() if (p := prototypes_of(router)) is not None]
            if prototypes:  # equal on every rank
                rows_LK = torch.stack([prototype_statistics(whole(p)) for p in prototypes])
                values |= dict(zip(PROTOTYPE_STATISTICS, rows_LK.T.tolist(), strict=True))
        return {name: [_short(value) for value in row] for name, row in values.items()}


def _short(value: float) -> float | None:
    """Six digits are enough, and JSON knows no NaN."""
    if isinstance(value, int):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else None


def shown(layers: dict[str, list[Any]]) -> dict[str, float]:
    """TensorBoard's scalars: tags `layers/NAME/block_03`, at most `LAYERS_SHOWN` layers, first and last among them."""
    blocks = layers.get("block", [])
    count = min(LAYERS_SHOWN, len(blocks))
    places = sorted({round(i * (len(blocks) - 1) / max(1, count - 1)) for i in range(count)})
    rows = {name: row for name, row in layers.items() if name != "block"}
    tags = {f"layers/{name}/block_{blocks[i]:02d}": row[i] for name, row in rows.items() for i in places}
    return {tag: value for tag, value in tags.items() if value is not None}
