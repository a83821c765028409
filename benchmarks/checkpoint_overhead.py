#!/usr/bin/env python
"""What a checkpoint costs: the seconds training stands still, the seconds of writing behind it, slower steps.

    python benchmarks/checkpoint_overhead.py                                         digits, 2 processes, ep 2, ZeRO-2
    python benchmarks/checkpoint_overhead.py --processes 8 --config imagenet256_promoe_xl --ds_config zero1 \\
        --steps 60 --every 20 --runs DIR data.path=... parallel.expert_parallel=4    ProMoE-XL: needs CUDA GPUs

Trains by the real launcher with a checkpoint every few steps, and reads its own log: `on the step` is the copy of the
state into host memory, `behind` the writing and flushing by a thread while training goes on. Steps with a checkpoint
being written behind them are compared with the others of the same run, by their median.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.common import page, read_log, spread, table  # noqa: E402
from promoe_ds.recipes.load import load_config  # noqa: E402

SAVED = re.compile(r"checkpoint of step (\d+): (.*), ([\d.]+) s on the step, ([\d.]+) s behind")


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
    return SAVED.findall(done.stdout), {r["step"]: r["seconds_per_step"] for r in read_log(run)}


def rows(saves: list[tuple[str, ...]], seconds: dict[int, float], interval: int) -> dict[str, str]:
    busy: set[int] = set()  # steps that run while a checkpoint is written
    for step, _, _, behind in saves:
        at, left = int(step) + 1, float(behind)
        while left > 0 and at in seconds:
            busy.add(at)
            left, at = left - seconds[at], at + 1
    warm = {step: value for step, value in seconds.items() if step > 5}  # compilers and caches before
    blocked, behind = ([float(save[i]) for save in saves[:-1]] for i in (2, 3))  # the last is waited for
    quiet = median([value for step, value in warm.items() if step not in busy])
    slow = [value for step, value in warm.items() if step in busy]
    extra = len(slow) / len(blocked) * max(0.0, median(slow) - quiet) if slow else 0.0
    share = (median(blocked) + extra) / (interval * quiet)
    return {
        "checkpoints measured": str(len(blocked)),
        "size": saves[0][1],
        "on the step, s": spread(blocked, ".3f"),
        "behind, s": spread(behind, ".3f"),
        "a step, s, nothing being written": f"{quiet:.4f}",
        "a step, s, while one is written": f"{median(slow):.4f}" if slow else "-",
        f"share of the time at the recipe's one checkpoint in {interval} steps": f"{share:.2%}",
    }


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
    found = rows(saves, seconds, load_config(args.config).train.checkpoint_every)
    title = "What a checkpoint costs"
    print(page(title, "benchmarks/checkpoint_overhead.py", sys.argv[1:], table(["", "median"], found.items())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
