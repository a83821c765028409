#!/usr/bin/env python
"""The tables of the paper on small real data: every row trained with the same seeds and budget, side by side.

examples:
  python benchmarks/paper_tables.py --table 5 --data digits                      CPU, minutes a row
  python benchmarks/paper_tables.py --table 6 --data digits --seeds 0,1 --steps 1000
  python benchmarks/paper_tables.py --table 5 --data cifar10 --path cifar10.npz --minutes 8      run it again till done

Rows take turns, a tenth of the budget each, so that no row has the machine for itself; a row that several tables share
is trained once (runs are kept in --runs). Everything resumes: the same command goes on where it was. When all rows are
done, the table is printed and written to --out with a figure. exit codes: 0 done, 2 a mistake, 85 --minutes are over.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import paper_rows  # noqa: E402
from benchmarks.paper_report import write_report  # noqa: E402
from benchmarks.paper_rows import SCALES, Row, done_steps, judge_file, scores  # noqa: E402
from promoe_ds.config.schema import Config, ConfigError, reject  # noqa: E402

WINDOWS = 4
"""throughput windows a chunk; the first is warm-up and dropped"""
DONE, USER_ERROR, RESUMABLE = 0, 2, 85


def plan(args: argparse.Namespace) -> list[Row]:
    """The rows of the table asked for. Raises ConfigError for unknown names and what the recipes reject."""
    from promoe_ds.recipes.load import load_config  # late: it imports torch

    tree = yaml.safe_load((ROOT / "benchmarks/paper_tables.yaml").read_text(encoding="utf-8"))
    for option, value, known in (("--table", args.table, tree["tables"]), ("--data", args.data, tree["data"])):
        if value not in known:
            reject(option, value, "is not known", f"choose one of {', '.join(known)}")
    data = tree["data"][args.data]
    parts = tree["parts"] | data["parts"]
    steps = args.steps or data["steps"]
    common = list(data["options"])
    if args.path is not None:
        common.append(f"data.path={args.path}")
    elif args.data != "digits":
        reject("--path", "null", f"--data {args.data} needs one", "add --path FILE.npz")
    rows = []
    for label, entry in tree["tables"][args.table]["rows"].items():
        total = steps * entry.get("budget", 1)
        slug = "-".join([*entry["is"], str(total), *(o.replace("/", "_") for o in args.overrides)])
        options = [o for part in entry["is"] for o in parts.get(part, [])] + common + args.overrides
        configs = tuple(
            load_config(data["base"], [*options, f"train.steps={total}", f"train.seed={seed}", "train.keep_last=1",
                                       "sample.classes=1", "sample.per_class=1"])
            for seed in args.seeds
        )  # fmt: skip
        runs = tuple(args.runs / args.data / slug / f"seed{seed}" for seed in args.seeds)
        rows.append(Row(label, configs, runs, entry["paper"]))
    return rows


# ---------------------------------------------------------------------------------------------------------- training


def train_until(config: Config, run: Path, step: int) -> int:
    """Train a run up to `step`, in this process; its output goes to RUN/log.txt. Returns the trainer's exit code."""
    from dataclasses import replace

    from promoe_ds.parallel import ds_config
    from promoe_ds.parallel.topology import Topology
    from promoe_ds.train.trainer import Trainer
    from promoe_ds.utils.ranks import Ranks

    chunk = -(-config.train.steps // paper_rows.CHUNKS)
    config = replace(
        config,
        train=replace(config.train, steps=step, checkpoint_every=chunk, log_every=max(1, chunk // WINDOWS)),
        sample=replace(config.sample, steps=2),
    )
    here = Topology.of(Ranks.from_environment(), ep=1)
    run.mkdir(parents=True, exist_ok=True)
    with (run / "log.txt").open("a", encoding="utf-8") as log, contextlib.redirect_stdout(log):
        trainer = Trainer(config, ds_config.resolve(None, config, 1), run, here)
        try:
            return trainer.run()
        finally:
            trainer.close()


def train_all(rows: list[Row], deadline: float) -> bool:
    """In turns until every run is trained; False if the deadline came first, or a signal."""
    longest = 0.0
    for chunk in range(1, paper_rows.CHUNKS + 1):
        for row in rows:
            for config, run in zip(row.configs, row.runs, strict=True):
                target = -(-config.train.steps * chunk // paper_rows.CHUNKS)
                if done_steps(run) >= target:
                    continue
                if time.monotonic() + longest > deadline:
                    return False
                start = time.monotonic()
                if train_until(config, run, target) != DONE:
                    return False
                longest = max(longest, time.monotonic() - start)
                print(f"{row.label}, {run.name}: step {target}/{config.train.steps}, {time.monotonic() - start:.0f} s",
                      flush=True)  # fmt: skip
    return True


# ----------------------------------------------------------------------------------------------------------- scoring


def make_judge(args: argparse.Namespace, config: Config) -> Any:
    """The classifier of the data, and the data of the EMA loss and of the reference: (judge, data set, device)."""
    from dataclasses import replace

    import torch

    from promoe_ds.data import build_dataset

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.data == "digits":
        from promoe_ds.evaluation.features import DigitsCNN

        return DigitsCNN(), build_dataset(config), device
    from benchmarks.label_cnn import LabelCNN

    held_out = build_dataset(replace(config, data=replace(config.data, split="test")))
    train = build_dataset(config)
    return LabelCNN(train, held_out, device, args.judge_steps, judge_file(args)), held_out, device


def score_all(rows: list[Row], args: argparse.Namespace, deadline: float) -> bool:
    """Write scores.json beside each run; False if the deadline came first."""
    from benchmarks.scoring import score_run

    judge: Any = None
    for row in rows:
        for config, run in zip(row.configs, row.runs, strict=True):
            if scores(run, config, args) is not None:
                continue
            if time.monotonic() > deadline:
                return False
            judge = judge or make_judge(args, config)
            result = score_run(run, judge[0], judge[1], SCALES, args.num, config.sample.steps, judge[2])
            result |= {"num": args.num, "judge": judge[0].name, "judge_accuracy": judge[0].accuracy}
            (run / "scores.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            print(f"scored {row.label}, {run.name}", flush=True)
    return True


# -------------------------------------------------------------------------------------------------------------- main


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--table", required=True, metavar="N", help="1, 3 to 13 of the paper, or 9f for Figures 3c and 9"
    )
    parser.add_argument("--data", default="digits", metavar="NAME", help="digits (embedded) or cifar10")
    parser.add_argument("--path", type=Path, help="cifar10: the packed npz")
    parser.add_argument("--steps", type=int, help="optimizer steps a row (digits 600, cifar10 2500)")
    parser.add_argument("--seeds", type=lambda text: [int(s) for s in text.split(",")], default=[0], metavar="0,1")
    parser.add_argument("--num", type=int, default=2000, help="images a guidance scale to score (2000)")
    parser.add_argument("--judge-steps", type=int, default=2000, help="cifar10: steps of the classifier's training")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after so long, resumable (exit code 85)")
    parser.add_argument("--runs", type=Path, default=Path("runs/paper_tables"), metavar="DIR")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results", metavar="DIR")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="for every row")
    return parser.parse_intermixed_args(argv)


def run(args: argparse.Namespace) -> int:
    """Train, score, report; returns the exit code."""
    rows = plan(args)  # every mistake shows before the first step
    deadline = time.monotonic() + 60 * args.minutes
    if not (train_all(rows, deadline) and score_all(rows, args, deadline)):
        print("not done; the same command goes on", flush=True)
        return RESUMABLE
    write_report(rows, args)
    return DONE


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    args.command = sys.argv[1:] if argv is None else argv
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if not os.path.exists("/dev/nvidiactl"):
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        return run(args)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR


if __name__ == "__main__":
    sys.exit(main())
