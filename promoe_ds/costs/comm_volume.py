"""The bytes a training step sends, by kind, from the configuration alone: what `train.measure=true` counts.

All figures are sums over the ranks, for the ring's share of each collective (see `parallel/meter.py`); divide by W for
a rank. fp32 gradients and parameters under fp32 and bf16_autocast, 2 bytes under bf16.

Legend: T routed tokens per step over all ranks, K experts per token, D width, L MoE layers, E experts, W world size, ep
expert-parallel degree, P_r routed parameters, P_d the other trained ones.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from promoe_ds.config.batching import batch_plan
from promoe_ds.config.schema import Config
from promoe_ds.costs import flops
from promoe_ds.data.order import step_indices
from promoe_ds.data.step_noise import Purpose, coins

PARTS = ("forward", "experts", "all_to_all", "router_sums", "backward", "gradients", "parameters", "optimizer", "other")
"""of a step's time; `gradients` and `parameters` are collectives, `other` is what is left (data, logging)"""
KINDS = ("all_to_all", "counts", "router_sums", "gradients", "parameters", "scalars")
"""of bytes; `scalars` are tensors of at most 64 bytes, such as norms"""
COUNT_BYTES = 8
"""int64"""
BUCKET = 50_000_000
"""elements of `reduce_bucket_size` in the shipped ds_configs"""


def row_bytes(config: Config) -> int:
    """Bytes of an element of the rows that travel: the precision the experts compute in."""
    return 4 if config.train.precision == "fp32" else 2


def weight_bytes(config: Config) -> int:
    """Bytes of an element of gradients and parameters in ZeRO's collectives."""
    return 2 if config.train.precision == "bf16" else 4


def trained(config: Config) -> tuple[int, int]:
    """(P_d, P_r): replicated and sharded trained parameters."""
    count = flops.count_parameters(config)
    return count.trainable - count.routed, count.routed


def _padded(elements: int, ranks: int) -> int:
    """ZeRO 1 and 2 pad a flat group to a multiple of 2 elements per rank (DeepSpeed 0.19.8, NCCL's alignment)."""
    return -(-elements // (2 * ranks)) * 2 * ranks


def all_reduces(ds_json: dict[str, Any]) -> bool:
    """Whether a run with this DeepSpeed JSON all-reduces its gradients at stages 1 and 2, which is DeepSpeed's default.

    The shipped files switch it off. `reduce_scatter` does not change it (0.19.8).
    """
    value = ds_json.get("zero_optimization", {}).get("use_multi_rank_bucket_allreduce", True)
    return value in (True, "auto")


def gradients(config: Config, world: int, ep: int, stage: int = 1, multi_rank: bool = False) -> int:
    """(W-1) P_d + (W/ep - 1) P_r elements: each gradient is reduced to the rank that owns it.

    An all-reduce, which stage 0 needs, sends twice that. Once per step at stages 0 and 1; stage 2, which keeps no whole
    gradients, after every micro-batch.

    Args:
        multi_rank: the run all-reduces at stages 1 and 2 as well: `all_reduces` of its ds_config.
    """
    dense, routed = trained(config)
    times = batch_plan(config, world)[1] if stage == 2 else 1
    passes = 2 if multi_rank or stage == 0 else 1
    return passes * times * ((world - 1) * dense + (world // ep - 1) * routed) * weight_bytes(config)


def reductions(config: Config, world: int, ep: int, multi_rank: bool = False, bucket: int = BUCKET) -> int:
    """About how many collectives `gradients` are, per rank and reduction of all of them.

    A bucket holds gradients in the order in which they come, which is the order of the flat partitions: it covers few
    owners. Buckets and the W-1 borders between owners cut a flat group into buckets + W - 1 pieces. Under expert
    parallelism a bucket holds gradients of two groups.

    Args:
        bucket: elements of `reduce_bucket_size`.
    """
    dense, routed = trained(config)
    buckets = -(-(dense + routed // ep) // bucket)
    owners = [world, world // ep] if ep > 1 and routed else [world]
    return sum(buckets + (0 if multi_rank else ranks - 1) for ranks in owners if ranks > 1)


def parameters(config: Config, world: int, ep: int, stage: int) -> int:
    """After the step, stages 1 and 2 gather the updated parameters, each expert shard over its W/ep replicas."""
    if stage == 0 or world == 1:
        return 0
    dense, routed = trained(config)
    replicas = world // ep
    if ep == 1:
        return (world - 1) * _padded(dense + routed, world) * weight_bytes(config)
    shards = ep * (replicas - 1) * _padded(routed // ep, replicas)
    return ((world - 1) * _padded(dense, world) + shards) * weight_bytes(config)


def counts(config: Config, world: int, ep: int, accumulation: int = 1) -> int:
    """Each layer tells the other ranks of its group how many rows will come: E/ep integers each."""
    if ep == 1 or config.moe is None:
        return 0
    layers, local = len(config.moe_layers()), config.moe.num_experts // ep
    return layers * accumulation * world * (ep - 1) * local * COUNT_BYTES


def all_to_all_expected(config: Config, ep: int) -> float:
    """4 K T D b (1 - 1/ep) per layer: dispatch and combine, forward and backward, for routing without locality.

    T counts the conditional images that label dropping leaves on average. It is the least there is, since a token's
    expert is remote with probability 1 - 1/ep.
    """
    if config.moe is None:
        return 0.0
    kept = 1 - config.diffusion.label_drop if config.moe.conditional else 1.0
    tokens = config.train.global_batch_size * kept * config.model.tokens
    rows = flops.experts_per_token(config) * tokens * (1 - 1 / ep)
    return 4 * len(config.moe_layers()) * rows * config.model.width * row_bytes(config)


def all_to_all_uniform(config: Config, world: int, ep: int, step: int, label_N: np.ndarray) -> int:
    """Exactly, at one step under the router `uniform`, from the labels and label drops that the step draws.

    Args:
        step: optimizer step, 0-based.
        label_N: int64 [N], labels of the data set.
    """
    moe, train = config.moe, config.train
    assert moe is not None and moe.router.name == "uniform"
    micro, _ = batch_plan(config, world)
    edges = config.model.tokens * flops.experts_per_token(config)
    local, remote = moe.num_experts // ep, 0
    label_G = label_N[step_indices(train.seed, step, train.global_batch_size, len(label_N))]
    drop_G = coins(train.seed, step, np.arange(len(label_G)), Purpose.DROP, config.diffusion.label_drop)
    for row, (label, drop) in enumerate(zip(label_G, drop_G, strict=True)):
        if drop:
            if moe.conditional:
                continue  # null-label images do not travel
            label = config.model.num_classes
        expert_K = (label * edges + np.arange(edges)) % moe.num_experts
        here = (row // micro) % world % ep
        remote += int((expert_K // local != here).sum())
    return 4 * len(config.moe_layers()) * remote * config.model.width * row_bytes(config)
