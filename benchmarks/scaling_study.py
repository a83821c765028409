#!/usr/bin/env python
"""Train one recipe at many topologies and say what each part of a step costs: where expert parallelism pays.

examples:
  python benchmarks/scaling_study.py --recipe digits --world 1,2,4 --ep 1,2,4 --stage 1,2 --batch strong
  python benchmarks/scaling_study.py --recipe imagenet256_promoe_xl --world 8 --ep 1,2,4 --batch weak data.path=latents
  python benchmarks/scaling_study.py --recipe digits --routing uniform --dry-run             the points, nothing is run
  python benchmarks/scaling_study.py ... --point 3 --out DIR        one point, for a task of an array job
  python benchmarks/scaling_study.py ... --report --out DIR         table and figures of the points that are there

Each point runs through the real launcher (--launch, where {world} is its number of processes). The first window of
steps is warm-up; images/s is the median of the others, with their range. Parts of the step and bytes by kind are
measured with train.measure=true, on CUDA in a run of its own, because measuring waits for the device. The points take
turns --repeats times. A point that is done is not run again. Results: points/*.json, scaling.md, scaling.png.

Bytes are compared with the formulas of promoe_ds/costs/comm_volume.py, to the byte: gradients, parameters and counts
always, the all-to-all under uniform routing (under learned routing the tokens decide; its ratio to the expected is
given).

exit codes: 0 done, 1 a point failed (the others are kept), 2 a mistake
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
if not __package__:
    sys.path.insert(0, str(ROOT))

from benchmarks.common import facts, figure, integers, load_points, page, read_log, save_point, table  # noqa: E402
from promoe_ds.config.batching import batch_plan, check_topology  # noqa: E402
from promoe_ds.config.errors import ConfigError, reject  # noqa: E402
from promoe_ds.config.schema import Config  # noqa: E402
from promoe_ds.costs import comm_volume  # noqa: E402
from promoe_ds.costs.comm_volume import KINDS, PARTS  # noqa: E402
from promoe_ds.recipes.load import load_config  # noqa: E402
from promoe_ds.utils.command_line import Parser, check_positive, guarded  # noqa: E402

COMMUNICATION = ("all_to_all", "router_sums", "gradients", "parameters")
UNIFORM = "moe.router={name: uniform}"


@dataclass(frozen=True)
class Point:
    world: int
    ep: int
    stage: int
    batch: int
    """images per step, over all ranks"""
    repeat: int

    @property
    def name(self) -> str:
        return f"world{self.world}_ep{self.ep}_zero{self.stage}_batch{self.batch}_{self.repeat}"

    def overrides(self, args: argparse.Namespace) -> list[str]:
        steps = args.window * (args.windows + 1)
        return [
            *([UNIFORM] if args.routing == "uniform" else []), *args.overrides,
            f"parallel.expert_parallel={self.ep}", f"train.global_batch_size={self.batch}", f"train.steps={steps}",
            f"train.log_every={args.window}", f"train.checkpoint_every={steps}", "train.keep_last=1",
            "sample.classes=1", "sample.per_class=1", "sample.steps=2",
        ]  # fmt: skip


def plan(args: argparse.Namespace) -> list[Point]:
    """Every point, in the order in which it is run. Raises ConfigError for what no point can satisfy."""
    base = load_config(args.recipe, args.overrides)
    if base.moe is None:
        reject("--recipe", args.recipe, "is dense: there is nothing to shard", "choose a MoE recipe")
    size, out, refused = base.train.global_batch_size, [], ""
    for repeat in range(args.repeats):
        for world in args.world:
            batch = size if args.batch == "strong" else size // args.per * world
            for point in (Point(world, ep, stage, batch, repeat) for ep in args.ep for stage in args.stage):
                try:
                    check_topology(load_config(args.recipe, point.overrides(args)), world)
                    out.append(point)
                except ConfigError as error:  # ep does not divide this world: another point
                    refused = str(error)
    if not out:
        raise ConfigError(f"no point is possible: {refused}")
    return out


def run_point(point: Point, args: argparse.Namespace, start: Callable[..., Any]) -> dict[str, Any] | None:
    """Launch a point; its windows, or None where it failed (the output is in OUT/points/NAME.log)."""
    import torch

    from promoe_ds.checkpoint.layout import trained

    records, ds_json = [], {}
    for label, measure in [("speed", "false"), ("parts", "true")] if torch.cuda.is_available() else [("all", "true")]:
        folder = args.out / "runs" / f"{point.name}_{label}"
        shutil.rmtree(folder, ignore_errors=True)  # of a start that was interrupted: resumed windows would not compare
        launch = [word.replace("{world}", str(point.world)) for word in shlex.split(args.launch)]
        command = [*launch, str(ROOT / "launchers/train.py"), "--config", args.recipe, "--run", str(folder),
                   "--ds_config", str(ROOT / f"ds_configs/zero{point.stage}.json"), *point.overrides(args),
                   f"train.measure={measure}"]  # fmt: skip
        with (args.out / "points" / f"{point.name}.log").open("w", encoding="utf-8") as file:
            code = start(command, stdout=file, stderr=subprocess.STDOUT).returncode
        if code or not trained(folder, args.window * (args.windows + 1)):
            return None
        records.append(read_log(folder)[-args.windows :])
        ds_json = json.loads((folder / "ds_config.json").read_text(encoding="utf-8"))
        for checkpoint in (folder / "checkpoints").glob("step_*/*"):
            checkpoint.unlink()  # gigabytes that nobody asked for; the log stays
    measured = {"multi_rank": comm_volume.all_reduces(ds_json), "speed": records[0], "parts": records[-1]}
    return {**asdict(point), **settings(args), "facts": facts(point.world), **measured}


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What all points of a folder share."""
    return {"recipe": args.recipe, "routing": args.routing, "overrides": args.overrides, "window": args.window}


def run_all(points: list[Point], args: argparse.Namespace, start: Callable[..., Any]) -> int:
    """Run what is not done; the number of points that failed. Raises ConfigError for points of another study."""
    done = load_points(args.out / "points")
    for point in points:
        for key, value in settings(args).items():
            if point.name in done and done[point.name][key] != value:
                conflict = f"{point.name} was run with {key}={done[point.name][key]}, not {value}"
                reject("--out", args.out, conflict, "choose another folder")
    failed = 0
    for i, point in enumerate(points):
        if point.name in done:
            continue
        begin = time.monotonic()
        result = run_point(point, args, start)
        if result is None:
            failed += 1
            outcome = f"failed, see {args.out / 'points' / point.name}.log"
        else:
            save_point(args.out / "points", point.name, result)
            outcome = f"{time.monotonic() - begin:.0f} s"
        print(f"[{i + 1}/{len(points)}] {point.name}: {outcome}", flush=True)
    return failed


@dataclass(frozen=True)
class Measured:
    """A topology, over all its repeats."""

    world: int
    ep: int
    stage: int
    batch: int
    routing: str
    config: Config
    speed: list[dict[str, Any]]
    """records of every window, with images_per_s"""
    parts: list[dict[str, Any]]
    """records with seconds/* and bytes/*"""
    window: int
    facts: list[dict[str, str]]
    """commit, versions and device of every repeat"""
    multi_rank: bool
    """gradients were all-reduced at stages 1 and 2, not reduced to the rank that owns them"""

    @property
    def rate(self) -> float:
        """Images/s of the median window."""
        return median(record["images_per_s"] for record in self.speed)

    def seconds(self, part: str) -> float:
        return median(r[f"seconds/{part}"] for r in self.parts)

    def sent(self, kind: str) -> float:
        """Bytes per step over all ranks, the mean over the measured steps."""
        return float(np.mean([r[f"bytes/{kind}"] for r in self.parts]))

    def formula(self, kind: str) -> float | None:
        """What `comm_volume.py` says of the same steps; None where it says nothing exact."""
        if kind == "gradients":
            return comm_volume.gradients(self.config, self.world, self.ep, self.stage, self.multi_rank)
        if kind == "parameters":
            return comm_volume.parameters(self.config, self.world, self.ep, self.stage)
        if kind == "counts":
            return comm_volume.counts(self.config, self.world, self.ep, batch_plan(self.config, self.world)[1])
        if kind == "all_to_all" and self.ep == 1:
            return 0.0
        if kind == "all_to_all" and self.routing == "uniform":
            steps = [step for r in self.parts for step in range(r["step"] - self.window, r["step"])]
            label_N = labels_of(self.config)
            sent = (comm_volume.all_to_all_uniform(self.config, self.world, self.ep, s, label_N) for s in steps)
            return sum(sent) / len(steps)
        return None

    def mismatches(self) -> list[str]:
        """Kinds whose counted bytes are not the formula's."""
        known = {kind: self.formula(kind) for kind in KINDS if self.stage < 3}
        return [kind for kind, value in known.items() if value is not None and abs(value - self.sent(kind)) > 1e-6]


@cache
def labels_of(config: Config) -> np.ndarray:
    from promoe_ds.data import build_dataset

    return build_dataset(config).label_B


def read_points(folder: Path, option: str = "--out") -> list[Measured]:
    """Everything under FOLDER/points. Raises ConfigError, which names the option, if there is nothing."""
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for tree in load_points(folder / "points", option).values():
        tree.setdefault("multi_rank", True)  # of a study before the shipped files switched it off
        key = tuple(tree[k] for k in ("world", "ep", "stage", "batch", "routing", "multi_rank"))
        found.setdefault(key, []).append(tree)
    if not found:
        reject(option, folder, "holds no finished point", "run the study first")
    out = []
    for (world, ep, stage, batch, routing, multi_rank), trees in sorted(found.items()):
        options = [*trees[0]["overrides"], f"parallel.expert_parallel={ep}", f"train.global_batch_size={batch}"]
        config = load_config(trees[0]["recipe"], [*options, *([UNIFORM] if routing == "uniform" else [])])
        speed, parts = ([record for tree in trees for record in tree[name]] for name in ("speed", "parts"))
        facts, window = [tree["facts"] for tree in trees], trees[0]["window"]
        out.append(Measured(world, ep, stage, batch, routing, config, speed, parts, window, facts, multi_rank))
    return out


def baseline(points: list[Measured], stage: int) -> Measured:
    """What speed-ups of a stage are over: its smallest world, at the lowest ep measured there."""
    return min((p for p in points if p.stage == stage), key=lambda p: (p.world, p.ep))


def topology_table(points: list[Measured], columns: list[str], cells: Callable[[Measured], list[Any]]) -> str:
    rows = ([p.world, p.ep, p.stage, *cells(p)] for p in points)
    return table(["world", "ep", "ZeRO", *(column.replace("_", "-") for column in columns)], rows)


def speed_table(points: list[Measured]) -> str:
    def cells(p: Measured) -> list[Any]:
        rates, mfus = [r["images_per_s"] for r in p.speed], [r["mfu"] for r in p.speed if r.get("mfu") is not None]
        communication = sum(map(p.seconds, COMMUNICATION)) / sum(map(p.seconds, PARTS))
        memory, load = max(r["memory_gib"] for r in p.parts), median(r["load_max_over_mean"] for r in p.parts)
        return [p.batch, f"{p.rate:.0f}", f"{min(rates):.0f}-{max(rates):.0f}", f"{median(mfus):.1%}" if mfus else "-",
                f"{p.rate / baseline(points, p.stage).rate:.2f}", f"{communication:.0%}", f"{memory:.2f}",
                f"{load:.2f}"]  # fmt: skip

    columns = ["batch", "images/s", "range", "MFU", "speed-up", "communication", "peak GiB", "load max/mean"]
    return topology_table(points, columns, cells)


def bytes_table(points: list[Measured]) -> str:
    def cells(p: Measured) -> list[str]:
        expected, wrong = comm_volume.all_to_all_expected(p.config, p.ep), p.mismatches()
        ratio = f"{p.sent('all_to_all') / expected:.3f}" if expected else "-"
        verdict = f"differs: {', '.join(wrong)}" if wrong else "equal" if p.stage < 3 else "-"
        return [*(f"{p.sent(kind):,.0f}" for kind in KINDS), ratio, verdict]

    return topology_table(points, [*KINDS, "all-to-all / expected", "formula"], cells)


def draw(points: list[Measured], path: Path) -> None:
    """Throughput over ranks with the ideal line, and parts of the step; of the first stage."""
    points = [p for p in points if p.stage == points[0].stage]
    first, worlds = baseline(points, points[0].stage), sorted({p.world for p in points})
    with figure(path, [1, 1.4]) as (rate, parts):
        for ep in sorted({p.ep for p in points}):
            line = [p for p in points if p.ep == ep]
            rate.plot([p.world for p in line], [p.rate for p in line], "o-", label=f"ep {ep}")
        rate.plot(worlds, [first.rate * world / first.world for world in worlds], "k--", label="ideal")
        rate.set(xlabel="ranks", ylabel="images/s", ylim=(0, None), title=f"ZeRO-{first.stage}")
        bottom = np.zeros(len(points))
        for part in PARTS:
            height = np.array([1000 * p.seconds(part) for p in points])
            parts.bar([f"{p.world}/{p.ep}" for p in points], height, bottom=bottom, label=part)
            bottom += height
        parts.set(xlabel="ranks/ep", ylabel="ms per step", ylim=(0, 1.8 * bottom.max()))  # room for the legend


def write_report(folder: Path, args: argparse.Namespace) -> str:
    """Write scaling.md and scaling.png into the folder; returns the markdown."""
    points = read_points(folder)
    draw(points, folder / "scaling.png")
    bases = [baseline(points, stage) for stage in sorted({p.stage for p in points})]
    over = ", ".join(f"{p.world} rank(s) at ep {p.ep} (ZeRO {p.stage})" for p in bases)
    title = f"Scaling study: {points[0].config.name}, {args.batch} scaling, {points[0].routing} routing"
    text = page(
        title, "benchmarks/scaling_study.py", args.words,
        f"Median over windows of {points[0].window} steps, after one window of warm-up. Speed-up is over\n{over}; "
        "communication is the share of the step's measured parts.",
        speed_table(points),
        "Milliseconds per step, mean over ranks. Each part excludes the others: an all-to-all in the backward pass "
        "counts as all-to-all.",
        topology_table(points, list(PARTS), lambda p: [f"{1000 * p.seconds(part):.1f}" for part in PARTS]),
        'Bytes per step that leave a rank, summed over ranks. "formula" compares them with\n'
        "`promoe_ds/costs/comm_volume.py`, to the byte.",
        bytes_table(points),
        "![images/s over ranks, parts of the step](scaling.png)",
        measured=[fact for p in points for fact in p.facts],
    )  # fmt: skip
    (folder / "scaling.md").write_text(text, encoding="utf-8")
    return text


def parse_args(words: list[str]) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="digits", metavar="NAME|PATH")
    parser.add_argument("--world", type=integers, default=[1, 2, 4], metavar="1,2,4")
    parser.add_argument("--ep", type=integers, default=[1, 2, 4], metavar="1,2,4")
    parser.add_argument("--stage", type=lambda text: integers(text, 0), default=[1, 2], help="ZeRO stages, 0 to 3")
    parser.add_argument("--batch", choices=["weak", "strong"], default="strong",
                        help="strong: the recipe's global batch; weak: as many images per rank")  # fmt: skip
    parser.add_argument("--per", type=int, default=4, help="weak: the recipe's global batch is for so many ranks (4)")
    parser.add_argument("--routing", choices=["learned", "uniform"], default="learned")
    parser.add_argument("--window", type=int, default=10, help="steps per window (10)")
    parser.add_argument("--windows", type=int, default=4, help="windows measured after one of warm-up (4)")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--launch", default=f"{sys.executable} -m torch.distributed.run --standalone "
                        "--nproc-per-node={world} --", help="command before launchers/train.py")  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="DIR", help="runs/scaling/RECIPE-BATCH-ROUTING")
    parser.add_argument("--point", type=int, metavar="I", help="run point I only (0-based; an array job's task)")
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument("--dry-run", action="store_true", help="list the points")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_intermixed_args(words)
    check_positive(args, "per", "window", "windows", "repeats")
    args.out = args.out or Path("runs/scaling") / f"{Path(args.recipe).stem}-{args.batch}-{args.routing}"
    args.words = words
    return args


def run(words: list[str], start: Callable[..., Any] = subprocess.run) -> int:
    """Plan, run, report; returns the exit code.

    Args:
        start: runs a job to its end, as `subprocess.run` does.
    """
    args = parse_args(words)
    points = plan(args)
    if args.point is not None:
        if not 0 <= args.point < len(points):
            reject("--point", args.point, f"there are {len(points)} points, from 0", "see --dry-run")
        points = [points[args.point]]
    if args.dry_run:
        print("\n".join(f"{i:3d}  {point.name}" for i, point in enumerate(points)))
        return 0
    (args.out / "points").mkdir(parents=True, exist_ok=True)
    failed = 0 if args.report else run_all(points, args, start)
    if args.point is None and failed < len(points):
        print(write_report(args.out, args))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(guarded(run, sys.argv[1:]))
