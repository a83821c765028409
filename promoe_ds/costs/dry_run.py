"""What a run would be, without running it: sizes, FLOPs, memory by part, groups and the DeepSpeed JSON."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import yaml

from promoe_ds.config.decode import encode
from promoe_ds.config.schema import Config
from promoe_ds.costs import flops
from promoe_ds.costs.codec_cost import codec_cost

GIB = 2**30


def _memory(config: Config, ds: Any, world: int, codec: dict[str, Any]) -> dict[str, Any]:
    topology = config, world, config.parallel.expert_parallel, ds.stage, ds.offload
    zero = {key: value for key, value in ds.json["zero_optimization"].items() if value != "auto"}  # its own default
    buckets = 2 if zero.get("overlap_comm", ds.stage == 3) else 1  # one fills while the other is reduced
    device = flops.memory_per_gpu(*topology, buckets * int(zero.get("reduce_bucket_size", flops.DEFAULT_BUCKET)))
    device |= {f"codec_{name}": codec[name] for name in ("weights", "activations") if name in codec}
    parts = {name: size / GIB for name, size in device.items()}
    host = {name: size / GIB for name, size in flops.host_memory_per_rank(*topology).items()}
    return {**parts, "total": sum(parts.values()), "host": host}


def _groups(config: Config, ds: Any, world: int) -> dict[str, Any]:
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


def report(config: Config, ds: Any, world: int) -> dict[str, Any]:
    """Everything a dry run tells; JSON-serialisable.

    Args:
        ds: the `parallel.ds_config.ResolvedDS` of `resolve(path, config, world)`, which has checked the topology.
        world: number of processes.
    """
    count, forward, step = flops.count_parameters(config), flops.forward_flops(config), flops.train_flops(config)
    codec = codec_cost(config)
    return {
        "name": config.name,
        "config": encode(config),
        "params": {"total": count.total, "trainable": count.trainable, "routed": count.routed, **asdict(count)},
        "flops": {
            "forward_gflops_per_image": forward / 1e9,
            "train_gflops_per_image": step / 1e9,
            "train_tflops_per_step": step * config.train.global_batch_size / 1e12,
        },
        "memory_gib": _memory(config, ds, world, codec or {}),
        "codec": codec,
        "groups": _groups(config, ds, world),
        "ds_config": ds.json,
    }


def _table(title: str, rows: list[tuple[str, str]]) -> str:
    left, right = (max(len(row[i]) for row in rows) for i in (0, 1))
    return "\n".join([title, *(f"  {name:<{left}}  {value:>{right}}" for name, value in rows)])


def _sizes(title: str, memory: dict[str, float]) -> str:
    return _table(title, [(k, f"{v:,.2f} GiB" if v >= 1 else f"{v * 1024:,.1f} MiB") for k, v in memory.items() if v])


def render(facts: dict[str, Any]) -> str:
    """The report as a page of aligned tables."""
    params, work, groups = facts["params"], facts["flops"], dict(facts["groups"])
    sizes = {k: v for k, v in params["by_part"].items() if v} | {
        name: params[name] for name in ("total", "trainable", "activated")
    }
    speed = [
        ("forward, per image", f"{work['forward_gflops_per_image']:,.2f} GFLOP"),
        ("training, per image", f"{work['train_gflops_per_image']:,.2f} GFLOP"),
        ("training, per step", f"{work['train_tflops_per_step']:,.3f} TFLOP"),
    ]
    codec = facts["codec"] or {}
    if "missing" in codec:
        speed.append(("encoding", f"not known ({codec['missing']})"))
    elif codec:
        speed.append((f"encoding {codec['side']} pixels, per image", f"{codec['gflops_per_image']:,.2f} GFLOP"))
        sizes |= {f"encoder ({codec['kind']}, frozen)": codec["params"]}
    memory = dict(facts["memory_gib"])
    host = memory.pop("host")
    shown = [f"{g[0]}-{g[-1]}" if len(g) > 1 else str(g[0]) for g in groups.pop("expert_parallel_groups")]
    shown = shown if len(shown) <= 8 else [*shown[:4], "...", shown[-1]]
    sections = [
        f"# {facts['name']}",
        _table("Parameters", [(name, f"{size:,}") for name, size in sizes.items()]),
        _table("Work", speed),
        _sizes("Memory per device (estimate)", memory),
        _sizes("Host memory per rank (offloaded)", host) if host else "",
        _table("Groups", [(name.replace("_", " "), str(value)) for name, value in groups.items()])
        + f"\n  expert-parallel groups of ranks: {' '.join(shown)}",
        f"Configuration\n{yaml.safe_dump(facts['config'], sort_keys=False).rstrip()}",
        f"DeepSpeed JSON\n{json.dumps(facts['ds_config'], indent=2)}",
    ]
    return "\n\n".join(filter(None, sections))
