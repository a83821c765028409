"""What the log says of the experts, layer by layer.

The routers are watched in steps that are logged only; the sums stay on the device until they are reduced over the
ranks, so no step waits for them.

Legend: L MoE layers, E routed experts, K numbers a layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from promoe_ds.models.dit import DiT
from promoe_ds.moe.routing import Router, Routing
from promoe_ds.moe.statistics import (
    PROTOTYPE_STATISTICS,
    dead_experts,
    load_entropy,
    max_over_mean,
    prototype_statistics,
    prototypes_of,
)
from promoe_ds.moe.trace import routers_of, watching

LAYERS_SHOWN = 8
"""MoE layers with TensorBoard tags of their own; metrics.jsonl has all"""


class ExpertWatch:
    """Sums over the forwards of one optimizer step, on this rank."""

    def __init__(self, model: DiT):
        self.model, self.blocks = model, list(routers_of(model))
        self._start(watched=False)

    def _start(self, watched: bool) -> None:
        self._watched, self._forwards = watched, 0
        self._sums: dict[int, Tensor] = {}
        self._losses: dict[str, Tensor] = {}
        self._prototypes: dict[int, Tensor] = {}

    @contextmanager
    def step(self, logged: bool) -> Iterator[None]:
        """Watch what happens inside, if the step is to be logged."""
        self._start(watched=logged and bool(self.blocks))
        with watching(self.model, self._see) if self._watched else nullcontext():
            yield
        self._watched = False

    @torch.no_grad()
    def _see(self, block: int, router: Router, _: Tensor, routing: Routing) -> None:
        weight_N = routing.weight_N.detach().float()
        edges = weight_N.new_full((), len(weight_N))
        sums_K = torch.stack([edges, weight_N.sum(), weight_N.square().sum()]).double()
        self._sums[block] = self._sums[block] + sums_K if block in self._sums else sums_K
        prototype_ED = prototypes_of(router)
        if prototype_ED is not None:  # equal on every rank
            self._prototypes[block] = prototype_statistics(prototype_ED)

    @torch.no_grad()
    def losses(self, aux: dict[str, Tensor]) -> None:
        """Add the auxiliary losses of a forward, `DiTOutput.aux`, if the step is watched."""
        if self._watched:
            self._forwards += 1
            for name, loss_L in aux.items():
                self._losses[name] = loss_L.double() + self._losses.get(name, 0.0)

    def report(self, load_LE: Tensor, sum_over_ranks: Callable[[Tensor], Tensor]) -> dict[str, list[Any]]:
        """Numbers by name, a list with one for each MoE layer; collective if the step was watched.

        Args:
            load_LE: int64 [L, E], over all ranks.
        """
        if not self.blocks:
            return {}
        load_LE = load_LE.cpu()
        values: dict[str, list[Any]] = {
            "block": self.blocks,
            "load_max_over_mean": max_over_mean(load_LE).tolist(),
            "load_entropy": load_entropy(load_LE).tolist(),
            "dead_experts": dead_experts(load_LE).tolist(),
        }
        if self._sums:
            sums_3L = torch.stack([self._sums[block] for block in self.blocks], dim=1)
            forwards_L = torch.full_like(sums_3L[0], self._forwards)
            sums_KL = sum_over_ranks(torch.stack([*sums_3L, forwards_L, *self._losses.values()])).cpu()
            edges_L, weight_L, square_L, forwards_L, *losses = sums_KL
            mean_L = weight_L / edges_L.clamp(min=1)
            values["gate_mean"] = mean_L.tolist()
            values["gate_std"] = (square_L / edges_L.clamp(min=1) - mean_L**2).clamp(min=0).sqrt().tolist()
            for name, loss_L in zip(self._losses, losses, strict=True):
                values[f"loss/{name}"] = (loss_L / forwards_L).tolist()
        if self._prototypes:
            rows = torch.stack([self._prototypes[block] for block in self.blocks]).cpu().T.tolist()
            values |= dict(zip(PROTOTYPE_STATISTICS, rows, strict=True))
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
