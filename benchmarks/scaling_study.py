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
turns --repeats times. A point that is done is not run again. Results: points/*.json, scaling.csv, scaling.md, figures.

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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if not __package__:
    sys.path.insert(0, str(ROOT))

from promoe_ds.config.schema import Config, ConfigError, reject  # noqa: E402
from promoe_ds.utils.files import write_text  # noqa: E402

DONE, FAILED, USER_ERROR = 0, 1, 2


@dataclass(frozen=True)
class Point:
    world: int
    ep: int
    stage: int
    batch: int
    """images a step, over all ranks"""
    repeat: int = 0

    @property
    def name(self) -> str:
        return f"world{self.world}_ep{self.ep}_zero{self.stage}_batch{self.batch}_{self.repeat}"


def overrides(point: Point, args: argparse.Namespace) -> list[str]:
    steps = args.window * (args.windows + 1)
    routing = ["moe.router={name: uniform}"] if args.routing == "uniform" else []
    return [
        *routing, *args.overrides, f"parallel.expert_parallel={point.ep}", f"train.global_batch_size={point.batch}",
        f"train.steps={steps}", f"train.log_every={args.window}", f"train.checkpoint_every={steps}",
        "train.keep_last=1", "sample.classes=1", "sample.per_class=1", "sample.steps=2",
    ]  # fmt: skip


def config_of(point: Point, args: argparse.Namespace) -> Config:
    from promoe_ds.recipes.load import load_config  # late: it imports torch

    return load_config(args.recipe, overrides(point, args))


def plan(args: argparse.Namespace) -> list[Point]:
    """Every point, in the order in which it is run. Raises ConfigError for what no point can satisfy."""
    from promoe_ds.config.batching import check_topology
    from promoe_ds.recipes.load import load_config

    for name in ("per", "window", "windows", "repeats"):
        if getattr(args, name) < 1:
            reject(f"--{name}", getattr(args, name), "must be positive", "choose 1 or more")
    base = load_config(args.recipe, args.overrides)
    if base.moe is None:
        reject("--recipe", args.recipe, "is dense: there is nothing to shard", "choose a MoE recipe")
    out, refused = [], ""
    for repeat in range(args.repeats):
        for world in args.world:
            size = base.train.global_batch_size
            batch = size if args.batch == "strong" else size // args.per * world
            for ep in args.ep:
                for stage in args.stage:
                    point = Point(world, ep, stage, batch, repeat)
                    try:
                        check_topology(config_of(point, args), world)
                        out.append(point)
                    except ConfigError as error:  # ep does not divide this world: another point
                        refused = str(error)
    if not out:
        raise ConfigError(f"no point is possible: {refused}")
    return out


def run_point(point: Point, args: argparse.Namespace) -> dict[str, Any] | None:
    """Launch a point; its windows, or None where it failed (the output is in OUT/points/NAME.log)."""
    import torch

    from benchmarks.provenance import facts
    from promoe_ds.checkpoint.layout import trained

    runs = [("all", True)] if not torch.cuda.is_available() else [("speed", False), ("parts", True)]
    records = []
    for label, measure in runs:
        folder = args.out / "runs" / f"{point.name}_{label}"
        shutil.rmtree(folder, ignore_errors=True)  # of a start that was interrupted: resumed windows would not compare
        launch = [word.replace("{world}", str(point.world)) for word in shlex.split(args.launch)]
        command = [*launch, str(ROOT / "launchers/train.py"), "--config", args.recipe, "--run", str(folder),
                   "--ds_config", str(ROOT / f"ds_configs/zero{point.stage}.json"), *overrides(point, args),
                   f"train.measure={str(measure).lower()}"]  # fmt: skip
        log = args.out / "points" / f"{point.name}.log"
        with log.open("w", encoding="utf-8") as file:
            code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT).returncode
        if code or not trained(folder, config_of(point, args).train.steps):
            return None
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        records.append([json.loads(line) for line in lines][-args.windows :])
        for checkpoint in (folder / "checkpoints").glob("step_*/*"):
            checkpoint.unlink()  # gigabytes that nobody asked for; the log stays
    return {**asdict(point), **settings(args), "facts": facts(point.world), "speed": records[0], "parts": records[-1]}


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What all points of a folder share."""
    return {"recipe": args.recipe, "routing": args.routing, "overrides": args.overrides, "window": args.window}


def check_done(path: Path, args: argparse.Namespace) -> None:
    """Raise ConfigError if a finished point is of another study: its figures would pass for this one's."""
    done = json.loads(path.read_text(encoding="utf-8"))
    for key, value in settings(args).items():
        if done[key] != value:
            reject(
                "--out", args.out, f"{path.stem} was run with {key}={done[key]}, not {value}", "choose another folder"
            )


def run_all(points: list[Point], args: argparse.Namespace) -> int:
    """Run what is not done; the number of points that failed."""
    failed = 0
    for i, point in enumerate(points):
        path = args.out / "points" / f"{point.name}.json"
        if path.is_file():
            check_done(path, args)
            continue
        start = time.monotonic()
        result = run_point(point, args)
        if result is None:
            failed += 1
            print(f"[{i + 1}/{len(points)}] {point.name}: failed, see {path.with_suffix('.log')}", flush=True)
            continue
        write_text(path, json.dumps(result))
        print(f"[{i + 1}/{len(points)}] {point.name}: {time.monotonic() - start:.0f} s", flush=True)
    return failed


def integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="digits", metavar="NAME|PATH")
    parser.add_argument("--world", type=integers, default=[1, 2, 4], metavar="1,2,4")
    parser.add_argument("--ep", type=integers, default=[1, 2, 4], metavar="1,2,4")
    parser.add_argument("--stage", type=integers, default=[1, 2], metavar="1,2", help="ZeRO stages, 0 to 3")
    parser.add_argument("--batch", choices=["weak", "strong"], default="strong",
                        help="strong: the recipe's global batch; weak: as many images a rank")  # fmt: skip
    parser.add_argument("--per", type=int, default=4, help="weak: the recipe's global batch is for so many ranks (4)")
    parser.add_argument("--routing", choices=["learned", "uniform"], default="learned")
    parser.add_argument("--window", type=int, default=10, help="steps a window (10)")
    parser.add_argument("--windows", type=int, default=4, help="windows measured after one of warm-up (4)")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--launch", default=f"{sys.executable} -m torch.distributed.run --standalone "
                        "--nproc-per-node {world} --", help="command before launchers/train.py")  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="DIR", help="runs/scaling/RECIPE-BATCH-ROUTING")
    parser.add_argument("--point", type=int, metavar="I", help="run point I only (0-based; an array job's task)")
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument("--dry-run", action="store_true", help="list the points")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_intermixed_args(argv)
    args.out = args.out or Path("runs/scaling") / f"{Path(args.recipe).stem}-{args.batch}-{args.routing}"
    args.command = sys.argv[1:] if argv is None else argv
    return args


def run(args: argparse.Namespace) -> int:
    """Plan, run, report; returns the exit code."""
    points = plan(args)
    if args.point is not None:
        if not 0 <= args.point < len(points):
            reject("--point", args.point, f"there are {len(points)} points, from 0", "see --dry-run")
        points = [points[args.point]]
    if args.dry_run:
        print("\n".join(f"{i:3d}  {point.name}" for i, point in enumerate(points)))
        return DONE
    (args.out / "points").mkdir(parents=True, exist_ok=True)
    failed = 0 if args.report else run_all(points, args)
    if args.point is None and failed < len(points):
        from benchmarks.scaling_report import write_report

        print(write_report(args.out, args))
    return FAILED if failed else DONE


def main(argv: list[str] | None = None) -> int:
    try:
        return run(parse_args(argv))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print("stopped; the same command runs what is missing", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
