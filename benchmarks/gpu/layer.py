"""The MoE layer: against the loop over experts, its grouped products, its memory-bound kernels, and the optimizer's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from statistics import median

import torch
import torch.nn.functional as F

from benchmarks.gpu.figures import Figure, Stage
from benchmarks.gpu.speed import TINY, emptied
from benchmarks.interleaved import interleaved
from benchmarks.throughput import layer_systems
from promoe_ds.costs.flops import count_parameters
from promoe_ds.moe.experts import grouped_mm
from promoe_ds.parallel.adamw_ema import AdamWithEMA
from promoe_ds.recipes.load import load_config

EXPERTS = 12
Kernel = tuple[Callable[[], object], float]
"""work, and bytes it must move"""


def run(stage: Stage) -> None:
    for size in ("s",) if stage.dry else ("xl", "s", "b"):
        stage.measure(f"layer {size}", partial(against_loop, stage, size))
    widths = {"xl": 64} if stage.dry else {"xl": 1152, "s": 384}
    for size, width in widths.items():
        rows = 13 * 64 if stage.dry else 58 * 256  # of 64 images, 6 without label
        for name, flops, work in products(stage, rows, width):
            stage.measure(f"{size} {name}", partial(rate, stage, flops, work))
        for name, (work, size_bytes) in kernels(stage, rows, width).items():
            stage.measure(f"{size} {name}", partial(traffic, stage, work, size_bytes))
    emptied(stage)
    for name, work, per_parameter, total in optimizer(stage):
        stage.measure(name, partial(update, stage, work, per_parameter, total))


def against_loop(stage: Stage, size: str) -> Figure:
    """Milliseconds, forward and backward, of each system of benchmarks/throughput.py, 64 images, in turns."""
    emptied(stage)
    images, small, backend = (2, TINY, "eager") if stage.dry else (64, (), "inductor")
    systems = layer_systems(size, images, "bf16", "learned", stage.device, small, backend)
    found = interleaved(systems, stage.device, 1 if stage.dry else 3)
    return {
        name: of["failed"] if "failed" in of else float(f"{1e3 * median(map(sum, of['rounds'])):.5g}")
        for name, of in found.items()
    }


def products(stage: Stage, rows: int, width: int) -> list[tuple[str, float, Callable[[], object]]]:
    """The six of forward and backward, experts of equal size, and a plain product of as many operations."""
    D, H, E = width, 2 * width, EXPERTS
    random = partial(torch.randn, device=stage.device, dtype=torch.bfloat16)
    x, h, w1, w2 = random(rows, D), random(rows, H), random(E, H, D), random(E, D, H)
    ends = (torch.arange(1, E + 1, device=stage.device) * (rows // E)).int()
    ends[-1] = rows
    mm, flops = partial(grouped_mm, offs=ends), 2.0 * rows * D * H
    works: dict[str, Callable[[], object]] = {
        "grouped x w1": lambda: mm(x, w1.mT),
        "grouped h w2": lambda: mm(h, w2.mT),
        "grouped dy w2": lambda: mm(x, w2),
        "grouped dh w1": lambda: mm(h, w1),
        "grouped dw1": lambda: mm(h.mT, x),
        "grouped dw2": lambda: mm(x.mT, h),
        "one product": lambda: x @ w1[0].mT,
    }
    return [(name, flops, work) for name, work in works.items()]


def kernels(stage: Stage, rows: int, width: int) -> dict[str, Kernel]:
    """Memory-bound work of a layer, as plain torch does it."""
    random = partial(torch.randn, device=stage.device)
    x, h = (random(rows, size, dtype=torch.bfloat16) for size in (width, 2 * width))
    f, prototypes = random(rows, width), random(width, EXPERTS)
    order, expert = (torch.randperm(rows, device=stage.device), torch.randint(EXPERTS, (rows,), device=stage.device))
    member, bias = F.one_hot(expert, EXPERTS).bfloat16(), random(EXPERTS, 2 * width, dtype=torch.bfloat16)
    return {
        "gather rows": (lambda: x.index_select(0, order), 2.0 * x.nbytes),
        "scatter rows": (lambda: torch.empty_like(x).index_copy_(0, order, x), 2.0 * x.nbytes),
        "sort": (lambda: expert.sort(stable=True), 2.0 * expert.nbytes),
        "gelu": (lambda: F.gelu(h, approximate="tanh"), 2.0 * h.nbytes),
        "add biases": (lambda: h.addmm_(member, bias, beta=1, alpha=1e-6), 2.0 * h.nbytes),
        "fp32 scores": (lambda: f @ prototypes, 1.0 * f.nbytes),
        "fp32 norm": (lambda: torch.linalg.vector_norm(f, dim=-1), 1.0 * f.nbytes),
        "layer norm": (lambda: F.layer_norm(f, (width,)), 2.0 * f.nbytes),
        "to bf16": (lambda: f.bfloat16(), 1.5 * f.nbytes),
    }


def optimizer(stage: Stage) -> list[tuple[str, Callable[[], object], int, int]]:
    """Name, work, bytes per parameter, parameters: of the update of a step."""
    size = 2**10 if stage.dry else 2**22
    params = [torch.randn(size, device=stage.device, requires_grad=True) for _ in range(64)]
    for p in params:
        p.grad = torch.randn_like(p)
    adam = AdamWithEMA(params, load_config("imagenet256_promoe_s").optimizer)
    adam.step()
    (average,) = adam.averages
    emas, live = [adam.state[p][average] for p in params], [p.detach() for p in params]
    total = 64 * size
    return [
        ("clip", lambda: torch.nn.utils.clip_grad_norm_(params, 0.5), 12, total),
        ("AdamW and EMA", adam.step, 40, total),
        ("EMA", lambda: torch._foreach_lerp_(emas, live, 1e-4), 12, total),
    ]


def rate(stage: Stage, flops: float, work: Callable[[], object]) -> Figure:
    return {"TFLOP_s": flops / stage.timed(work, times=20) / 1e12}


def traffic(stage: Stage, work: Callable[[], object], size: float) -> Figure:
    took = stage.timed(work, times=20)
    return {"us": 1e6 * took, "TB_s": size / took / 1e12}


def update(stage: Stage, work: Callable[[], object], per_parameter: int, total: int) -> Figure:
    each = stage.timed(work, times=5) / total
    xl = count_parameters(load_config("imagenet256_promoe_xl")).trainable
    return {"ns_per_parameter": 1e9 * each, "TB_s": per_parameter / each / 1e12, "ms_at_promoe_xl": 1e3 * each * xl}
