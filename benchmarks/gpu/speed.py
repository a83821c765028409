"""Training steps of whole models, each alone on the card: images per second, memory, time of the host.

Forward, backward, gradient norm with clipping, fused AdamW and EMA in bf16 autocast: no DeepSpeed and no loader, as in
benchmarks/throughput.py. `warm` fills the compiler's cache on disk before, while nothing is timed.
"""

from __future__ import annotations

import gc
import time
from functools import partial
from statistics import median
from typing import Any

import torch

from benchmarks import moe_peers
from benchmarks.gpu.figures import Figure, Stage
from benchmarks.interleaved import Clock, Work
from benchmarks.throughput import DROP, make_model, train_step
from promoe_ds.costs import flops
from promoe_ds.models.compiled import compile_model
from promoe_ds.parallel.adamw_ema import AdamWithEMA

Point = tuple[str, int, str]
"""recipe, images, way: plain, compiled, or loop (Algorithm 1 of the paper, an expert at a time)"""
POINTS: tuple[Point, ...] = (
    ("promoe_xl", 64, "plain"), ("dense_xl", 64, "plain"), ("promoe_xl", 64, "compiled"), ("dense_xl", 64, "compiled"),
    ("promoe_xl", 64, "loop"),
    ("promoe_s", 64, "plain"), ("dense_s", 64, "plain"), ("promoe_s", 64, "compiled"), ("dense_s", 64, "compiled"),
    ("promoe_s", 64, "loop"),
    ("promoe_b", 64, "plain"), ("dense_b", 64, "plain"), ("promoe_b", 64, "compiled"), ("dense_b", 64, "compiled"),
    ("promoe_l", 64, "plain"), ("dense_l", 64, "plain"), ("promoe_l", 64, "compiled"), ("dense_l", 64, "compiled"),
    ("promoe_xl", 32, "plain"), ("promoe_xl", 128, "plain"), ("promoe_xl", 32, "compiled"),
    ("promoe_xl", 128, "compiled"), ("dense_xl", 128, "compiled"), ("promoe_b", 64, "loop"), ("promoe_l", 64, "loop"),
)  # fmt: skip
"""most wanted first: what is late is lost from the end"""
DRY: tuple[Point, ...] = (("promoe_s", 2, "plain"), ("dense_s", 2, "compiled"), ("promoe_s", 2, "loop"))
TINY = ("model.depth=2", "model.width=48", "model.heads=4", "model.image_size=8")
ROUNDS, ROUND_SECONDS = 3, 0.6


def run(stage: Stage) -> None:
    for recipe, images, way in DRY if stage.dry else POINTS:
        stage.measure(f"{recipe} {images} {way}", partial(point, stage, recipe, images, way))


def warm(stage: Stage) -> None:
    """Compile every model at micro-batch 64 once. Its times mean nothing: other stages run beside it."""
    for size in ("s",) if stage.dry else ("xl", "s", "b", "l"):
        for name in ("dense",) if stage.dry else ("promoe", "dense"):
            stage.measure(f"{name}_{size}", partial(compiled_once, stage, f"{name}_{size}"))


def compiled_once(stage: Stage, recipe: str) -> Figure:
    emptied(stage)
    work, _ = trained(stage, recipe, 2 if stage.dry else 64, "compiled")
    clock = Clock(stage.device)
    work(clock)
    clock.seconds(1)
    return {}


def emptied(stage: Stage) -> None:
    """Nothing of the last model is left, on the card or in the compiler."""
    torch.compiler.reset()
    gc.collect()
    if stage.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def trained(stage: Stage, recipe: str, images: int, way: str) -> tuple[Work, Any]:
    """A training step of a new model, and the model."""
    model = make_model(recipe, stage.device, *(TINY if stage.dry else ()))
    if way == "loop":
        moe_peers.use_loop(model, True)
    if way == "compiled":
        compile_model(model, "eager" if stage.dry else "inductor")
    adam = AdamWithEMA([p for p in model.parameters() if p.requires_grad], model.config.optimizer)
    return train_step(model, adam, images, stage.device, "bf16"), model


def steps(clock: Clock, work: Work, number: int) -> tuple[list[float], float]:
    """Mean seconds of each part, and of the host until a step was launched."""
    start = time.perf_counter()
    for _ in range(number):
        work(clock)
    host = (time.perf_counter() - start) / number
    return clock.seconds(number), host


def point(stage: Stage, recipe: str, images: int, way: str) -> Figure:
    emptied(stage)
    start, clock = time.monotonic(), Clock(stage.device)
    work, model = trained(stage, recipe, images, way)
    gib = {"weights_gib": gib_in_use(stage)}
    steps(clock, work, 2)
    gib |= {"states_gib": gib_in_use(stage)}
    warm_s = time.monotonic() - start
    if stage.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    one, _ = steps(clock, work, 1)
    number, times = (1, 1) if stage.dry else (max(2, min(30, round(ROUND_SECONDS / sum(one)))), ROUNDS)
    rounds = sorted((steps(clock, work, number) for _ in range(times)), key=lambda r: sum(r[0]))
    (forward, backward, update), _ = rounds[len(rounds) // 2]
    total, work_flops = forward + backward + update, images * flops.train_flops(model.config, DROP)
    if stage.device.type == "cuda":
        gib |= {"peak_gib": torch.cuda.max_memory_allocated() / 2**30}
    return {
        "images_s": images / total,
        "rounds_images_s": [round(images / sum(parts), 1) for parts, _ in rounds],
        "forward_ms": 1e3 * forward,
        "backward_ms": 1e3 * backward,
        "update_ms": 1e3 * update,
        "host_ms": 1e3 * median(h for _, h in rounds),
        "TFLOP_s": work_flops / total / 1e12,
        "TFLOP_s_without_update": work_flops / (forward + backward) / 1e12,
        "warm_s": warm_s,
        **gib,
    }


def gib_in_use(stage: Stage) -> float:
    """Of tensors alive: after a step, weights and the optimizer's state."""
    return torch.cuda.memory_allocated() / 2**30 if stage.device.type == "cuda" else 0.0
