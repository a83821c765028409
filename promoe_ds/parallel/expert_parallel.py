"""Turn a single-device model into an expert-parallel one.

`parallelize(model, topology)` replaces the routed experts of every MoE layer by their local share and an all-to-all
dispatcher, and gives routers their sums over ranks. Routers, shared and unconditional experts stay replicated, so
null-label images never travel.

DeepSpeed recognises expert parallelism by the class and attributes of the layer: a subclass of `AutoEPMoELayer`
(0.19.8) that calls only `nn.Module.__init__` and brings its own forward. What the engine and ZeRO read:

  * isinstance(layer, AutoEPMoELayer): MoE gradient groups, and ZeRO-3 is allowed
  * num_experts, num_local_experts, ep_size, ep_group_name, expert_placement_descriptor
  * experts.w1 / w2 / w3, stacked; one expert's slice is 2-D (hence the packed biases)
  * on each expert parameter: allreduce=False, group_name, ds_zero_placement_family, ds_zero_partition_group_name
  * set_deepspeed_parallelism() (inherited) creates the groups and sets layer.ep_group in deepspeed.initialize

`tests/distributed` fails if this contract changes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import deepspeed.comm as dist
import torch
from deepspeed.checkpoint.autoep_affine import (
    autoep_experts_for_rank,
    autoep_placement_to_affine_map,
    legacy_uniform_autoep_placement_descriptor,
)
from deepspeed.checkpoint.constants import (
    AFFINE_MAP,
    AUTOEP_EXPERT_PLACEMENT,
    AUTOEP_PARAM_EP_RANK,
    AUTOEP_PARAM_LOCAL_EXPERTS,
    AUTOEP_PARAM_LOGICAL_SHAPE,
    DS_AUTOEP_UC_META,
)
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from torch import Tensor, nn

from promoe_ds.models.dit import DiT
from promoe_ds.moe.dispatch import AllToAllDispatcher
from promoe_ds.moe.experts import StackedExperts
from promoe_ds.moe.layer import MoELayer, RoutedExperts
from promoe_ds.moe.router import Router
from promoe_ds.parallel.all_to_all import AllToAllHandle, all_to_all_counts
from promoe_ds.parallel.collectives import all_gather_rows, all_reduce_sum
from promoe_ds.parallel.topology import Topology, connect, disconnect
from promoe_ds.utils.ranks import Ranks


class ExpertParallelExperts(AutoEPMoELayer):
    """The share of one rank of a layer's routed experts; same interface as `RoutedExperts`."""

    forward: Any = RoutedExperts.forward  # with the experts and the dispatcher of this rank

    def __init__(self, whole: RoutedExperts, topology: Topology):
        nn.Module.__init__(self)  # not AutoEPMoELayer's, which rebuilds a language model's block
        experts = whole.experts
        self.num_experts, self.ep_size, self.ep_rank = len(experts.expert_ids), topology.ep, topology.ep_rank
        self.num_local_experts = self.num_experts // self.ep_size
        self.ep_group_name, self.ep_group = f"ep_size_{self.ep_size}", None
        self.tp_group, self.folding_group_handles = None, None
        self.combine_impl, self.comm_backend = "weighted_sum", "comm"
        self.expert_placement_descriptor = legacy_uniform_autoep_placement_descriptor(
            self.num_experts, self.num_local_experts, self.ep_size
        )
        first = self.ep_rank * self.num_local_experts
        with torch.device(experts.w1.device):
            self.experts = StackedExperts(
                self.num_local_experts,
                experts.width,
                experts.hidden,
                experts.backend,
                range(first, first + self.num_local_experts),
            )
        self.dispatcher = AllToAllDispatcher(
            self.num_experts,
            self.num_local_experts,
            lambda count: all_to_all_counts(count, self.ep_group),
            lambda rows, send, receive: AllToAllHandle(rows, send, receive, self.ep_group),
        )

    def _apply(self, fn: Any, recurse: bool = True) -> ExpertParallelExperts:
        """As in nn.Module (to, to_empty ...): new parameter objects may come out of it, and need their marks."""
        super()._apply(fn, recurse)
        for parameter in self.experts.parameters():
            self._mark(parameter)
        return self

    def _mark(self, parameter: Any) -> None:
        """Tell DeepSpeed that this parameter differs between the ranks of the expert-parallel group."""
        shape = [self.num_experts, *parameter.shape[1:]]
        placement = self.expert_placement_descriptor
        metadata = {
            AUTOEP_EXPERT_PLACEMENT: placement,
            AFFINE_MAP: autoep_placement_to_affine_map(placement, shape).to_dict(),
            AUTOEP_PARAM_LOGICAL_SHAPE: shape,
            AUTOEP_PARAM_EP_RANK: self.ep_rank,
            AUTOEP_PARAM_LOCAL_EXPERTS: list(autoep_experts_for_rank(placement, self.ep_rank)),
        }
        setattr(parameter, DS_AUTOEP_UC_META, metadata)
        parameter.allreduce, parameter.group_name = False, self.ep_group_name
        parameter.ds_zero_placement_family = "autoep_expert"
        parameter.ds_zero_partition_group_name = self.ep_group_name


def parallelize(model: DiT, topology: Topology) -> DiT:
    """Shard the routed experts of `model` over the expert-parallel groups; returns the same object.

    Call it on the meta model, before parameters are drawn: each rank then allocates and draws its own experts only.
    At ep 1 all experts stay here, and DeepSpeed trains the model as an ordinary data-parallel one. Routers sum and
    gather over all ranks, in training only.
    """
    for module in model.modules():
        if isinstance(module, Router) and topology.world > 1:
            module.all_reduce, module.all_gather = all_reduce_sum, all_gather_rows
        if isinstance(module, MoELayer) and topology.ep > 1:
            assert isinstance(module.routed, RoutedExperts), "the model is already expert-parallel"
            module.routed = ExpertParallelExperts(module.routed, topology)
    return model


def local_part(parameter: Tensor, full: Tensor, topology: Topology) -> Tensor:
    """This rank's share of a full tensor: its experts of a sharded parameter, else all of it."""
    return full.chunk(topology.ep)[topology.ep_rank] if is_sharded(parameter) else full


def is_sharded(parameter: Tensor) -> bool:
    """Whether the parameter holds this rank's experts only (its first dimension is local experts)."""
    return getattr(parameter, "allreduce", True) is False


@contextlib.contextmanager
def connected(ranks: Ranks) -> Iterator[None]:
    """Inside, the ranks can talk (NCCL on GPUs, gloo on CPUs). They may be a day apart: one may decode for long."""
    connect(ranks, timeout_minutes=24 * 60, meeting_minutes=30)
    yield  # after an exception the others may be inside a collective, so no barrier
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
