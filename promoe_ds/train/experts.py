"""What the log says of the experts, layer by layer.

The routers are watched in steps that are logged only; the sums stay on the device until they are reduced over the
ranks, so no step waits for them.

Legend: L MoE layers, E routed experts, K numbers a layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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

    def __init__(self, model: DiT, aux: list[str], device: torch.device):
        """`aux` names the routers' losses."""
        self.model, self.aux, self.device = model, aux, device
        self.blocks = list(routers_of(model))
        self._sums: dict[int, Tensor] = {}
        self._prototypes: dict[int, Tensor] = {}

    @contextmanager
    def step(self, logged: bool) -> Iterator[None]:
        """Watch what happens inside, if the step is to be logged."""
        self._sums, self._prototypes = {}, {}
        if not logged or not self.blocks:
            yield
            return
        with watching(self.model, self._see):
            yield

    @torch.no_grad()
    def _see(self, block: int, router: Router, _: Tensor, routing: Routing) -> None:
        weight_N = routing.weight_N.detach().float()
        one = torch.ones((), device=weight_N.device)
        aux = [routing.aux[name].detach().float() for name in self.aux if name in routing.aux]
        sums_K = torch.stack([one, one * len(weight_N), weight_N.sum(), weight_N.square().sum(), *aux]).double()
        self._sums[block] = self._sums[block] + sums_K if block in self._sums else sums_K
        prototype_ED = prototypes_of(router)
        if prototype_ED is not None:  # equal on every rank
            self._prototypes[block] = prototype_statistics(prototype_ED)

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
            sums_LK = sum_over_ranks(torch.stack([self._sums[block] for block in self.blocks])).cpu()
            calls_L, edges_L, weight_L, square_L, *aux = sums_LK.unbind(1)
            mean_L = weight_L / edges_L.clamp(min=1)
            values["gate_mean"] = mean_L.tolist()
            values["gate_std"] = (square_L / edges_L.clamp(min=1) - mean_L**2).clamp(min=0).sqrt().tolist()
            values |= {f"loss/{name}": (aux_L / calls_L).tolist() for name, aux_L in zip(self.aux, aux, strict=False)}
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
