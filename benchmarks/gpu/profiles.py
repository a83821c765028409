"""Where a step's time goes: tables of kernels, and how many there are."""

from __future__ import annotations

from functools import partial

from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.figures import Figure, Stage
from benchmarks.gpu.speed import emptied, steps, trained
from benchmarks.interleaved import Clock

POINTS = (("promoe_xl", "compiled"), ("promoe_xl", "plain"), ("dense_xl", "compiled"), ("promoe_s", "compiled"))
STEPS = 2


def run(stage: Stage) -> None:
    for recipe, way in (("promoe_s", "plain"),) if stage.dry else POINTS:
        stage.measure(f"{recipe} 64 {way}", partial(point, stage, recipe, way))


def point(stage: Stage, recipe: str, way: str) -> Figure:
    """Writes kernels_RECIPE_WAY.txt."""
    emptied(stage)
    clock, cuda = Clock(stage.device), stage.device.type == "cuda"
    work, _ = trained(stage, recipe, 64 if cuda else 2, way)
    steps(clock, work, 3)
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as found:
        steps(clock, work, STEPS)
    order = "self_device_time_total" if cuda else "self_cpu_time_total"
    table = found.key_averages().table(sort_by=order, row_limit=70, max_name_column_width=110)
    file = f"kernels_{recipe}_{way}.txt"
    (stage.folder / file).write_text(table, encoding="utf-8")
    events: list[FunctionEvent] = list(found.events() or ())
    kernels = [e for e in events if str(e.device_type).endswith("CUDA")] if cuda else events
    busy = sum(e.self_device_time_total for e in kernels) / 1e3 / STEPS if cuda else None
    return {"table": file, "kernels_per_step": len(kernels) / STEPS, "busy_ms": busy}
