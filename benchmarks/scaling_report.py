"""The points of `benchmarks/scaling_study.py` as CSV, markdown and figures.

Bytes are compared with the formulas of `promoe_ds/costs/comm_volume.py`, to the byte: gradients, parameters and counts
always, the all-to-all under uniform routing (under learned routing the tokens decide; its ratio to the expected is
given).
"""

from __future__ import annotations

import argparse
import csv
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.provenance import provenance
from promoe_ds.config.batching import batch_plan
from promoe_ds.config.schema import Config, reject
from promoe_ds.costs import comm_volume
from promoe_ds.costs.comm_volume import KINDS, PARTS
from promoe_ds.recipes.load import load_config

COMMUNICATION = ("all_to_all", "router_sums", "gradients", "parameters")


@dataclass(frozen=True)
class Measured:
    """A topology, over all its repeats."""

    world: int
    ep: int
    stage: int
    batch: int
    routing: str
    config: Config
    rates: list[float]
    """images/s of every window"""
    mfus: list[float | None]
    parts: list[dict[str, Any]]
    """records with seconds/* and bytes/*"""
    window: int
    facts: list[dict[str, str]]
    """commit, versions and device of every repeat, where it kept them"""

    @property
    def rate(self) -> float:
        return median(self.rates)

    def seconds(self, part: str) -> float:
        return median(r[f"seconds/{part}"] for r in self.parts)

    def sent(self, kind: str) -> float:
        """Bytes a step over all ranks, the mean over the measured steps."""
        return float(np.mean([r[f"bytes/{kind}"] for r in self.parts]))

    @property
    def communication(self) -> float:
        """Share of the step's measured parts that is communication."""
        return sum(self.seconds(part) for part in COMMUNICATION) / sum(self.seconds(part) for part in PARTS)

    @property
    def mfu(self) -> float | None:
        """Share of the peak FLOP/s; None where the peak is not known (a CPU)."""
        known = [value for value in self.mfus if value is not None]
        return median(known) if known else None

    @property
    def memory(self) -> float:
        return max(r["memory_gib"] for r in self.parts)

    @property
    def load(self) -> float:
        """Rows of the busiest expert over the mean."""
        return median(r["load_max_over_mean"] for r in self.parts)

    def formula(self, kind: str) -> float | None:
        """What `comm_volume.py` says of the same steps; None where it says nothing exact."""
        if kind == "gradients":
            return comm_volume.gradients(self.config, self.world, self.ep, self.stage)
        if kind == "parameters":
            return comm_volume.parameters(self.config, self.world, self.ep, self.stage)
        if kind == "counts":
            return comm_volume.counts(self.config, self.world, self.ep, batch_plan(self.config, self.world)[1])
        if kind == "all_to_all" and (self.routing == "uniform" or self.ep == 1):
            return 0.0 if self.ep == 1 else float(np.mean([self._window_bytes(r["step"]) for r in self.parts]))
        return None

    def _window_bytes(self, last: int) -> float:
        labels = labels_of(self.config)
        steps = range(last - self.window, last)
        sums = (comm_volume.all_to_all_uniform(self.config, self.world, self.ep, s, labels) for s in steps)
        return sum(sums) / self.window

    def mismatches(self) -> list[str]:
        """Kinds whose counted bytes are not the formula's."""
        known = {kind: self.formula(kind) for kind in KINDS if self.stage < 3}
        return [kind for kind, value in known.items() if value is not None and abs(value - self.sent(kind)) > 1e-6]


@cache
def labels_of(config: Config) -> np.ndarray:
    from promoe_ds.data import build_dataset

    data = build_dataset(config)
    return data.get(np.arange(len(data)))[1].numpy()


def read_points(folder: Path, option: str = "--out") -> list[Measured]:
    """Everything under FOLDER/points. Raises ConfigError, which names the option, if there is nothing."""
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for path in sorted((folder / "points").glob("*.json")):
        tree = json.loads(path.read_text(encoding="utf-8"))
        found.setdefault(tuple(tree[k] for k in ("world", "ep", "stage", "batch", "routing")), []).append(tree)
    if not found:
        reject(option, folder, "holds no finished point", "run the study first")
    out = []
    for key, trees in sorted(found.items()):
        world, ep, stage, batch, routing = key
        first = trees[0]
        options = [*first["overrides"], f"parallel.expert_parallel={ep}", f"train.global_batch_size={batch}"]
        options += ["moe.router={name: uniform}"] if routing == "uniform" else []
        out.append(Measured(
            world, ep, stage, batch, routing, load_config(first["recipe"], options),
            [r["images_per_s"] for t in trees for r in t["speed"]], [r.get("mfu") for t in trees for r in t["speed"]],
            [r for t in trees for r in t["parts"]], first["window"], [t["facts"] for t in trees if "facts" in t],
        ))  # fmt: skip
    return out


# ------------------------------------------------------------------------------------------------------------- tables


def baseline(points: list[Measured], stage: int) -> Measured:
    """What speed-ups of a stage are over: its smallest world, at the lowest ep measured there."""
    return min((p for p in points if p.stage == stage), key=lambda p: (p.world, p.ep))


def speedup(point: Measured, points: list[Measured]) -> float:
    """Images/s over those of the stage's baseline."""
    return point.rate / baseline(points, point.stage).rate


def baselines(points: list[Measured]) -> str:
    """The baselines in words."""
    named = [baseline(points, stage) for stage in sorted({p.stage for p in points})]
    return ", ".join(f"{p.world} rank(s) at ep {p.ep} (ZeRO {p.stage})" for p in named)


def speed_table(points: list[Measured]) -> str:
    head = [
        "world",
        "ep",
        "ZeRO",
        "batch",
        "images/s",
        "range",
        "MFU",
        "speed-up",
        "communication",
        "peak GiB",
        "load max/mean",
    ]
    lines = [" | ".join(head), "|".join(["---"] * len(head))]
    for p in points:
        mfu = "-" if p.mfu is None else f"{p.mfu:.1%}"
        lines.append(f"{p.world} | {p.ep} | {p.stage} | {p.batch} | {p.rate:.0f} "
                     f"| {min(p.rates):.0f}-{max(p.rates):.0f} "
                     f"| {mfu} | {speedup(p, points):.2f} | {p.communication:.0%} "
                     f"| {p.memory:.2f} | {p.load:.2f}")  # fmt: skip
    return "\n".join(f"| {line} |" for line in lines)


def parts_table(points: list[Measured]) -> str:
    head = ["world", "ep", "ZeRO", *(part.replace("_", "-") for part in PARTS)]
    lines = [" | ".join(head), "|".join(["---"] * len(head))]
    for p in points:
        cells = [f"{1000 * p.seconds(part):.1f}" for part in PARTS]
        lines.append(" | ".join([str(p.world), str(p.ep), str(p.stage), *cells]))
    return "\n".join(f"| {line} |" for line in lines)


def bytes_table(points: list[Measured]) -> str:
    head = ["world", "ep", "ZeRO", *(kind.replace("_", "-") for kind in KINDS), "all-to-all / expected", "formula"]
    lines = [" | ".join(head), "|".join(["---"] * len(head))]
    for p in points:
        expected = comm_volume.all_to_all_expected(p.config, p.ep)
        ratio = f"{p.sent('all_to_all') / expected:.3f}" if expected else "-"
        wrong = p.mismatches()
        verdict = f"differs: {', '.join(wrong)}" if wrong else "equal" if p.stage < 3 else "-"
        cells = [f"{p.sent(kind):,.0f}" for kind in KINDS]
        lines.append(" | ".join([str(p.world), str(p.ep), str(p.stage), *cells, ratio, verdict]))
    return "\n".join(f"| {line} |" for line in lines)


def write_csv(points: list[Measured], path: Path) -> None:
    names = ["world", "ep", "stage", "batch", "routing", "images_per_s", "min", "max", "mfu", "memory_gib", "load"]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*names, *(f"seconds_{p}" for p in PARTS), *(f"bytes_{k}" for k in KINDS)])
        for p in points:
            row = [p.world, p.ep, p.stage, p.batch, p.routing, p.rate, min(p.rates), max(p.rates), p.mfu,
                   p.memory, p.load]  # fmt: skip
            writer.writerow([*row, *(p.seconds(part) for part in PARTS), *(p.sent(kind) for kind in KINDS)])


# ------------------------------------------------------------------------------------------------------------ figures


def draw(points: list[Measured], path: Path) -> None:
    """Throughput, memory and communication share over ep, parts, speed-up with the ideal line; of the first stage."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    stage = points[0].stage
    points = [p for p in points if p.stage == stage]
    figure, axes = pyplot.subplots(1, 5, figsize=(20, 3.8), width_ratios=[1, 1, 1, 1.4, 1])
    rate, memory, share, parts, speed = axes
    for world in sorted({p.world for p in points}):
        line, label = [p for p in points if p.world == world], f"{world} rank{'s' * (world > 1)}"
        rate.plot([p.ep for p in line], [p.rate for p in line], "o-", label=label)
        memory.plot([p.ep for p in line], [p.memory for p in line], "o-", label=label)
        share.plot([p.ep for p in line], [100 * p.communication for p in line], "o-", label=label)
    bottom = np.zeros(len(points))
    for part in PARTS:
        seconds = np.array([p.seconds(part) for p in points])
        parts.bar([f"{p.world}/{p.ep}" for p in points], seconds * 1000, bottom=bottom * 1000, label=part)
        bottom += seconds
    for ep in sorted({p.ep for p in points}):
        line = [p for p in points if p.ep == ep]
        speed.plot([p.world for p in line], [speedup(p, points) for p in line], "o-", label=f"ep {ep}")
    worlds = sorted({p.world for p in points})
    first = baseline(points, stage)
    speed.plot(worlds, [w / first.world for w in worlds], "k--", linewidth=0.8, label="ideal")
    rate.set(xlabel="ep", ylabel="images/s", ylim=(0, None))
    memory.set(xlabel="ep", ylabel="peak GiB a rank", ylim=(0, None))
    share.set(xlabel="ep", ylabel="communication, % of a step", ylim=(0, 100))
    parts.set(xlabel="ranks/ep", ylabel="ms a step", ylim=(0, 1400 * bottom.max()))  # room for the legend
    speed.set(xlabel="ranks", ylabel=f"speed-up over {first.world} rank(s), ep {first.ep}", ylim=(0, None))
    for axis in (rate, memory, share):
        axis.set_xticks(sorted({p.ep for p in points}))
    for axis in axes:
        axis.legend(fontsize=7, ncols=2 if axis is parts else 1, loc="upper left" if axis is parts else "best")
    figure.suptitle(f"ZeRO-{stage}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


def write_report(folder: Path, args: argparse.Namespace) -> str:
    """Write scaling.{csv,md,png} into the folder; returns the markdown."""
    points = read_points(folder)
    write_csv(points, folder / "scaling.csv")
    draw(points, folder / "scaling.png")
    first = points[0]
    text = f"""# Scaling study: {first.config.name}, {args.batch} scaling, {first.routing} routing

{provenance("benchmarks/scaling_study.py", args.command, [fact for p in points for fact in p.facts])}

Median over windows of {first.window} steps, after one window of warm-up; speed-up is over
{baselines(points)}; communication is the share of the step's measured parts.

{speed_table(points)}

Milliseconds a step, mean over ranks, each part without what is in another (an all-to-all of the backward pass is under
all-to-all):

{parts_table(points)}

Bytes a step that leave a rank, summed over ranks; "formula" compares them with
`promoe_ds/costs/comm_volume.py` to the byte:

{bytes_table(points)}

![images/s, memory and communication share over ep, parts of the step, speed-up](scaling.png)
"""
    (folder / "scaling.md").write_text(text, encoding="utf-8")
    return text
