"""A trained model with its routed experts shared out over ranks, for sampling without an engine."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import deepspeed.comm as dist

from promoe_ds.models.dit import DiT
from promoe_ds.parallel.expert_parallel import ExpertParallelExperts, local_part, parallelize
from promoe_ds.parallel.topology import Topology, connect, disconnect, gather_objects


@contextlib.contextmanager
def connected(topology: Topology) -> Iterator[None]:
    """Inside, the ranks can talk (NCCL on GPUs, gloo on CPUs). They may be a day apart: one may decode for long."""
    connect(topology, timeout_minutes=24 * 60, meeting_minutes=30)
    yield  # after an exception the others may be inside a collective: no farewell
    disconnect()


def share_experts(model: DiT, topology: Topology) -> DiT:
    """Keep this rank's share of the routed experts of a whole model, and move it to the rank's device; collective.

    Every rank must then run the model equally often.
    """
    whole = model.state_dict()
    model = parallelize(model, topology).float()  # any pass over the parameters marks the sharded ones
    parts = model.state_dict(keep_vars=True)
    model.load_state_dict({name: local_part(part, whole[name], topology) for name, part in parts.items()})
    groups: list[Any] = [
        dist.new_group(ranks) for ranks in topology.ep_groups()
    ]  # deepspeed.initialize makes them in training
    for module in model.modules():
        if isinstance(module, ExpertParallelExperts):
            module.ep_group = groups[topology.rank // topology.ep]
    return model.to(topology.device).eval().requires_grad_(False)


def most_of(topology: Topology, count: int) -> int:
    """The largest `count` over all ranks; collective."""
    return max(gather_objects(count, topology))
