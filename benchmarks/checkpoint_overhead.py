#!/usr/bin/env python
"""What a checkpoint costs: the seconds training stands still, the seconds of writing behind it, GiB, slower steps.

    python benchmarks/checkpoint_overhead.py                                         digits, 2 processes, ep 2, ZeRO-2
    python benchmarks/checkpoint_overhead.py --processes 8 --config imagenet256_promoe_xl --ds_config zero1 \\
        --steps 60 --every 20 --runs DIR data.path=... parallel.expert_parallel=4    ProMoE-XL: needs CUDA GPUs

Trains by the real launcher with a checkpoint every few steps, and reads its own log: `on the step` is the copy of the
state into host memory, `behind` the writing and flushing by a thread while training goes on. Steps with a checkpoint
being written behind them are compared with the others of the same run, by their median.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from promoe_ds.recipes.load import load_config  # noqa: E402

LINE = re.compile(r"checkpoint of step (\d+): (.*), ([\d.]+) s on the step, ([\d.]+) s behind")


def train(args: argparse.Namespace, run: Path) -> tuple[list[tuple[str, ...]], dict[int, float]]:
    """-> (step, size, seconds on the step, seconds behind) of each checkpoint; seconds of each step without pauses."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={args.processes}",
               "--", str(ROOT / "launchers/train.py"), "--config", args.config, "--run", str(run),
               "--ds_config", str(ROOT / f"ds_configs/{args.ds_config}.json"), f"train.steps={args.steps}",
               f"train.checkpoint_every={args.every}", "train.log_every=1", "sample.steps=1",
               "sample.per_class=1", *args.overrides]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise SystemExit(f"the run failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return LINE.findall(done.stdout), {r["step"]: r["seconds_per_step"] for r in records}


def during(saves: list[tuple[str, ...]], seconds: dict[int, float]) -> set[int]:
    """The steps that run while a checkpoint is written."""
    busy: set[int] = set()
    for step, _, _, behind in saves:
        at, left = int(step) + 1, float(behind)
        while left > 0 and at in seconds:
            busy.add(at)
            left, at = left - seconds[at], at + 1
    return busy


def spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def table(saves: list[tuple[str, ...]], seconds: dict[int, float], usual: int) -> str:
    busy = during(saves, seconds)
    warm = {step: value for step, value in seconds.items() if step > 5}
    blocked, behind = ([float(save[i]) for save in saves[:-1]] for i in (2, 3))  # the last is waited for
    slow = statistics.median([v for s, v in warm.items() if s in busy] or [float("nan")])
    quiet = statistics.median([v for s, v in warm.items() if s not in busy])
    extra = len([s for s in warm if s in busy]) / max(1, len(blocked)) * max(0.0, slow - quiet)
    share = (statistics.median(blocked) + extra) / (usual * quiet)
    rows = {
        "checkpoints measured": len(blocked),
        "size": saves[0][1],
        "on the step, s: median (range)": spread(blocked),
        "behind, s: median (range)": spread(behind),
        "a step, s: median, nothing being written": f"{quiet:.4f}",
        "a step, s: median, while one is written": f"{slow:.4f}",
        f"share of the time at the recipe's one checkpoint in {usual} steps": f"{100 * share:.2f} %",
    }
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="digits")
    parser.add_argument("--ds_config", default="zero2", help="a file of ds_configs/ (zero2)")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--every", type=int, default=20)
    parser.add_argument("--runs", type=Path, help="where to make the run folder: the disk to measure (a temporary one)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_intermixed_args()
    args.overrides = args.overrides or [f"parallel.expert_parallel={args.processes}"]
    with tempfile.TemporaryDirectory(dir=args.runs) as folder:
        saves, seconds = train(args, Path(folder) / "run")
    print(table(saves, seconds, load_config(args.config).train.checkpoint_every))
    return 0


if __name__ == "__main__":
    sys.exit(main())
