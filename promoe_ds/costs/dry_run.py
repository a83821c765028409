"""What a run would be, without running it: sizes, FLOPs, memory by part, groups and the DeepSpeed JSON."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Protocol

import yaml

from promoe_ds.config.decode import encode
from promoe_ds.config.schema import Config
from promoe_ds.costs import flops

if TYPE_CHECKING:  # the model is imported when a report is made, not with this file
    from promoe_ds.models.dit import DiT

GIB = 2**30
DEFAULT_BUCKET = 500_000_000
"""elements of a ZeRO gradient bucket where the JSON names none (DeepSpeed 0.19.8)"""


class ResolvedDS(Protocol):
    """What is read of `parallel.ds_config.ResolvedDS`."""

    @property
    def json(self) -> dict[str, Any]: ...
    @property
    def stage(self) -> int: ...
    @property
    def offload(self) -> bool: ...


def count_built(model: DiT) -> dict[str, int]:
    """Parameters of a built model: all of them, the fixed ones among them, and those of the stacked routed experts."""
    from promoe_ds.moe.experts import StackedExperts

    stacks = [module for module in model.modules() if isinstance(module, StackedExperts)]
    return {
        "total": sum(p.numel() for p in model.parameters()),
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "routed": sum(p.numel() for stack in stacks for p in stack.parameters()),
    }


def _params(config: Config) -> dict[str, Any]:
    from promoe_ds.models.init import build

    count, built = flops.count_parameters(config), count_built(build(config))
    expected = {"total": count.total, "trainable": count.trainable, "routed": count.routed}
    if built != expected:
        raise RuntimeError(f"flops.count_parameters says {expected}, the built model has {built}")
    return {**built, "activated": count.activated, "by_part": count.by_part}


def _bucket_elements(zero: dict[str, Any], stage: int) -> int:
    """Elements of the gradient buckets; two of them where reduction overlaps the backward pass."""
    if stage == 0:
        return 0
    zero = {key: value for key, value in zero.items() if value != "auto"}  # DeepSpeed's own default
    overlap = zero.get("overlap_comm", stage == 3)
    return int(zero.get("reduce_bucket_size", DEFAULT_BUCKET)) * (2 if overlap else 1)


def _memory(config: Config, ds: ResolvedDS, world: int) -> dict[str, Any]:
    ep = config.parallel.expert_parallel
    buckets = _bucket_elements(ds.json["zero_optimization"], ds.stage)
    device = flops.memory_per_gpu(config, world, ep, ds.stage, ds.offload, buckets)
    host = flops.host_memory_per_rank(config, world, ep, ds.stage, ds.offload)
    parts = {name: size / GIB for name, size in device.items()}
    return {**parts, "total": sum(parts.values()), "host": {name: size / GIB for name, size in host.items()}}


def _groups(config: Config, ds: ResolvedDS, world: int) -> dict[str, Any]:
    ep = config.parallel.expert_parallel
    return {
        "world": world,
        "ep": ep,
        "data_parallel": world,
        "expert_data_parallel": world // ep,
        "expert_parallel_groups": [list(range(first, first + ep)) for first in range(0, world, ep)],
        "experts_per_rank": config.moe.num_experts // ep if config.moe else 0,
        "zero_stage": ds.stage,
        "offload": ds.offload,
        "global_batch": ds.json["train_batch_size"],
        "micro_batch": ds.json["train_micro_batch_size_per_gpu"],
        "accumulation": ds.json["gradient_accumulation_steps"],
    }


def report(config: Config, ds: ResolvedDS, world: int) -> dict[str, Any]:
    """Everything a dry run tells; JSON-serialisable.

    Args:
        ds: `parallel.ds_config.resolve(path, config, world)`, which has checked the topology.
        world: number of processes.

    Raises:
        RuntimeError: the built model and `flops.py` disagree about the number of parameters (a defect of ours).
    """
    forward, step = flops.forward_flops(config), flops.train_flops(config)
    return {
        "name": config.name,
        "config": encode(config),
        "params": _params(config),
        "flops": {
            "forward_gflops_per_image": forward / 1e9,
            "train_gflops_per_image": step / 1e9,
            "train_tflops_per_step": step * config.train.global_batch_size / 1e12,
        },
        "memory_gib": _memory(config, ds, world),
        "groups": _groups(config, ds, world),
        "ds_config": ds.json,
    }


# ----------------------------------------------------------------------------------------------------------- rendering


def _table(rows: list[tuple[str, str]]) -> list[str]:
    left, right = (max(len(row[i]) for row in rows) for i in (0, 1))
    return [f"  {name:<{left}}  {value:>{right}}" for name, value in rows]


def _render_params(params: dict[str, Any], flops: dict[str, float]) -> list[str]:
    rows = [(name, f"{size:,}") for name, size in params["by_part"].items() if size]
    rows += [(name, f"{params[name]:,}") for name in ("total", "trainable", "activated")]
    speed = [
        ("forward, an image", f"{flops['forward_gflops_per_image']:,.2f} GFLOP"),
        ("training, an image", f"{flops['train_gflops_per_image']:,.2f} GFLOP"),
        ("training, a step", f"{flops['train_tflops_per_step']:,.3f} TFLOP"),
    ]
    return ["Parameters", *_table(rows), "", "Work", *_table(speed)]


def _size(gib: float) -> str:
    return f"{gib:,.2f} GiB" if gib >= 1 else f"{gib * 1024:,.1f} MiB"


def _render_memory(memory: dict[str, Any]) -> list[str]:
    rows = [(name, _size(size)) for name, size in memory.items() if name != "host" and size]
    lines = ["Memory a device (estimate)", *_table(rows)]
    if memory["host"]:
        host = [(name, _size(size)) for name, size in memory["host"].items()]
        lines += ["", "Host memory a rank (offloaded)", *_table(host)]
    return lines


def _shown_groups(groups: list[list[int]]) -> str:
    shown = [f"{g[0]}-{g[-1]}" if len(g) > 1 else str(g[0]) for g in groups]
    return " ".join(shown if len(shown) <= 8 else [*shown[:4], "...", shown[-1]])


def _render_groups(groups: dict[str, Any]) -> list[str]:
    rows = [(name.replace("_", " "), str(value)) for name, value in groups.items() if not isinstance(value, list)]
    shown = _shown_groups(groups["expert_parallel_groups"])
    return ["Groups", *_table(rows), f"  expert-parallel groups of ranks: {shown}"]


def render(facts: dict[str, Any]) -> str:
    """The report as a page of aligned tables."""
    sections = [
        [f"# {facts['name']}"],
        _render_params(facts["params"], facts["flops"]),
        _render_memory(facts["memory_gib"]),
        _render_groups(facts["groups"]),
        ["Configuration", yaml.safe_dump(facts["config"], sort_keys=False).rstrip()],
        ["DeepSpeed JSON", json.dumps(facts["ds_config"], indent=2)],
    ]
    return "\n\n".join("\n".join(lines) for lines in sections)
