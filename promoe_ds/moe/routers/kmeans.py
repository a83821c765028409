"""Implicit guidance: k-means instead of a trained gate (arXiv:2510.24711, Sec. 4.2, Tab. 1 and 8).

Each token goes to the expert of its nearest centroid; after each step a centroid becomes the mean of the tokens it got
from all ranks, and one without tokens keeps its place. What the paper leaves open is chosen here: the distance is
Euclidean, between router inputs; the gate weight is 1 (a distance is no gate, and nothing trains it).

Centroids start as E distinct tokens of the first training batch, drawn at random by their place in the global batch, so
the draw depends on the seed but on no rank. Legend: W ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from promoe_ds.config.errors import reject
from promoe_ds.config.schema import RouterConfig
from promoe_ds.moe.conditional_routing import Split
from promoe_ds.moe.gates import at_least_fp32
from promoe_ds.moe.losses import centroid_sums
from promoe_ds.moe.router import Router, Routing, register_router

PRIME = 16_777_213
"""the largest prime below 2^24: keys are exact in float32. 5 does not divide PRIME - 1, so x^5 permutes the residues"""


@dataclass(frozen=True, kw_only=True)
class KMeansConfig(RouterConfig):
    def validate(self, config: Any) -> None:
        images = config.train.micro_batch_size or config.train.global_batch_size  # of one process alone, at most
        E, tokens = config.moe.num_experts, images * config.model.tokens
        if tokens < E:
            conflict = f"a forward pass has {tokens} tokens, fewer than centroids"
            reject("moe.num_experts", E, conflict, "lower it, or raise the batch size")


def shuffled(index_T: Tensor, shift: int) -> Tensor:
    """A fixed pseudo-random permutation of 0..PRIME-1: int64 -> int64, x -> (x + shift)^5 mod PRIME."""
    x_T = (index_T + shift) % PRIME
    square_T = x_T * x_T % PRIME
    return square_T * square_T % PRIME * x_T % PRIME


@register_router("kmeans")
class KMeansRouter(Router):
    Config = KMeansConfig

    def __init__(self, config: KMeansConfig, num_experts: int, width: int):
        super().__init__(config, num_experts, width)
        self.centroids: Tensor
        self.placed: Tensor
        self.register_buffer("centroids", torch.empty(num_experts, width))
        self.register_buffer("placed", torch.empty(num_experts))
        """1 where a centroid has been put on a token"""
        self.all_placed = False
        """whether `placed` is known, on the host, to be full; alike on every rank"""
        self.shift = 0

    def init_weights(self, generator: Callable[[str], torch.Generator]) -> None:
        """Small random centroids, until the first training batch; and the seed of the draw from that batch."""
        nn.init.normal_(self.centroids, std=0.02, generator=generator("centroids"))
        nn.init.zeros_(self.placed)
        self.shift = int(torch.randint(PRIME, (), generator=generator("shift")))
        self.all_placed = False

    @torch.no_grad()
    def forward(self, x_TD: Tensor, S: int, split: Split) -> Routing:
        """Route each token to its nearest centroid. x_TD [T, D] -> Routing with N = T, weights 1."""
        with torch.autocast(x_TD.device.type, enabled=False):
            x_TD = at_least_fp32(x_TD)
            if self.training:
                self.place(x_TD, S, split)
            c_ED = self.centroids.to(x_TD.dtype)
            # argmin |x - c|^2 = argmax x.c - |c|^2 / 2
            expert_T = (x_TD @ c_ED.T - c_ED.square().sum(1) / 2).argmax(dim=1)
            if self.training:
                self.accumulate(centroid_sums(F.pad(x_TD, (0, 1), value=1.0), expert_T, len(c_ED)))  # and their number
        token_T = torch.arange(len(x_TD), device=x_TD.device)
        return Routing(token_T, expert_T, x_TD.new_ones(len(x_TD)), 1, {})

    def place(self, x_TD: Tensor, tokens: int, split: Split) -> None:
        """Put centroids that have no place yet on random tokens of all ranks; waits for the device until all have one.

        A batch with too few conditional tokens leaves the rest for the next one.
        """
        self.all_placed = self.all_placed or bool(self.placed.all())
        if self.all_placed:
            return
        E, row_I = len(self.centroids), split.row_B[: len(x_TD) // tokens]
        index_T = (row_I[:, None] * tokens + torch.arange(tokens, device=x_TD.device)).reshape(-1)
        key_T = torch.cat([shuffled(index_T, self.shift).to(x_TD.dtype), x_TD.new_full((E,), -1.0)])
        best = key_T.topk(E)
        mine_ED1 = torch.cat(
            [best.values[:, None], torch.cat([x_TD, x_TD.new_zeros(E, x_TD.shape[1])])[best.indices]], 1
        )
        found_WD1 = self.all_gather(mine_ED1)  # W*E rows
        best = found_WD1[:, 0].topk(E)
        fresh_E1 = ((self.placed == 0) & (best.values >= 0))[:, None]
        self.centroids.copy_(
            torch.where(fresh_E1, found_WD1[best.indices, 1:].to(self.centroids.dtype), self.centroids)
        )
        self.placed.copy_(self.placed.maximum(fresh_E1[:, 0].to(self.placed.dtype)))

    @torch.no_grad()
    def drop_step(self) -> None:
        """Centroids that were put on tokens that are not finite, alike on every rank, have no place yet."""
        super().drop_step()
        lost_E = ~self.centroids.isfinite().all(dim=1)
        self.centroids[lost_E], self.placed[lost_E], self.all_placed = 0.0, 0.0, False

    def update(self, sums: Tensor) -> None:
        """Each centroid becomes the mean of its tokens over all ranks and micro-batches of the step."""
        count_E1 = sums[:, -1:]
        mean_ED = (sums[:, :-1] / count_E1.clamp(min=1)).to(self.centroids.dtype)
        self.centroids.copy_(torch.where(count_E1 > 0, mean_ED, self.centroids))
