#!/usr/bin/env python
"""The tables of the paper on small real data: every row trained with the same seeds and budget, side by side.

examples:
  python benchmarks/paper_tables.py --table 5 --data digits                      CPU, minutes per row
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
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from statistics import mean
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from launchers.train import prepare_environment  # noqa: E402

if __name__ == "__main__":
    prepare_environment()  # before torch

from benchmarks.common import figure, integers, page, read_log, table  # noqa: E402
from benchmarks.scoring import Judge, LabelCNN, score_run  # noqa: E402
from promoe_ds.checkpoint.layout import newest, step_of  # noqa: E402
from promoe_ds.config.schema import Config, reject  # noqa: E402
from promoe_ds.costs.flops import count_parameters  # noqa: E402
from promoe_ds.data import ImageDataset, build_dataset  # noqa: E402
from promoe_ds.evaluation.features import DigitsCNN  # noqa: E402
from promoe_ds.parallel import ds_config  # noqa: E402
from promoe_ds.parallel.topology import Topology  # noqa: E402
from promoe_ds.recipes.load import load_config  # noqa: E402
from promoe_ds.train.trainer import Trainer  # noqa: E402
from promoe_ds.utils.command_line import STOPPED, Parser, guarded  # noqa: E402
from promoe_ds.utils.files import write_text  # noqa: E402
from promoe_ds.utils.ranks import Ranks  # noqa: E402

TABLES = yaml.safe_load((ROOT / "benchmarks/paper_tables.yaml").read_text(encoding="utf-8"))
TURNS = 10
"""that the training of a row is cut into"""
SCALES = [1.0, 1.5]
"""guidance scales"""


@dataclass(frozen=True)
class Row:
    """A line of a table: what it is called, what it computes (one config per seed), what the paper says of it."""

    label: str
    configs: tuple[Config, ...]
    runs: tuple[Path, ...]
    paper: dict[float, list[float]]
    """guidance scale -> FID50K, IS"""

    def results(self) -> list[dict[str, Any]]:
        """What scores.json of each run holds."""
        return [json.loads((run / "scores.json").read_text(encoding="utf-8")) for run in self.runs]


def plan(args: argparse.Namespace) -> list[Row]:
    """The rows of the table asked for. Raises ConfigError for unknown names and what the recipes reject."""
    for option, value, known in (("--table", args.table, TABLES["tables"]), ("--data", args.data, TABLES["data"])):
        if value not in known:
            reject(option, value, "is not known", f"choose one of {', '.join(known)}")
    if args.path is None and args.data != "digits":
        reject("--path", "null", f"--data {args.data} needs one", "add --path FILE.npz")
    data, rows = TABLES["data"][args.data], []
    parts = TABLES["parts"] | data["parts"]
    common = [*data["options"], *([f"data.path={args.path}"] if args.path else []), *args.overrides]
    common += ["train.keep_last=1", "sample.classes=1", "sample.per_class=1"]
    for label, entry in TABLES["tables"][args.table]["rows"].items():
        steps = (args.steps or data["steps"]) * entry.get("budget", 1)
        options = [option for part in entry["is"] for option in parts.get(part, [])]
        options += [*common, f"train.steps={steps}"]
        configs = tuple(load_config(data["base"], [*options, f"train.seed={seed}"]) for seed in args.seeds)
        name = "-".join([*entry["is"], str(steps), *(o.replace("/", "_") for o in args.overrides)])
        runs = tuple(args.runs / args.data / name / f"seed{seed}" for seed in args.seeds)
        rows.append(Row(label, configs, runs, entry["paper"]))
    return rows


def done_steps(run: Path) -> int:
    found = newest(run)
    return step_of(found) if found else 0


def train_until(config: Config, run: Path, step: int) -> int:
    """Train a run up to `step`, in this process; its output goes to RUN/log.txt. Returns the trainer's exit code."""
    turn = -(-config.train.steps // TURNS)
    train = replace(config.train, steps=step, checkpoint_every=turn, log_every=max(1, turn // 4))
    config = replace(config, train=train, sample=replace(config.sample, steps=2))
    run.mkdir(parents=True, exist_ok=True)
    with (run / "log.txt").open("a", encoding="utf-8") as log, contextlib.redirect_stdout(log):
        trainer = Trainer(config, ds_config.resolve(None, config, 1), run, Topology.of(Ranks.from_environment(), ep=1))
        try:
            return trainer.run()
        finally:
            trainer.close()


def train_all(rows: list[Row], deadline: float) -> bool:
    """In turns until every run is trained; False if the deadline came first, or a signal."""
    for turn in range(1, TURNS + 1):
        for row in rows:
            for config, run in zip(row.configs, row.runs, strict=True):
                target = -(-config.train.steps * turn // TURNS)
                if done_steps(run) >= target:
                    continue
                start = time.monotonic()
                if start > deadline or train_until(config, run, target):
                    return False
                seconds = time.monotonic() - start
                print(f"{row.label}, {run.name}: step {target}/{config.train.steps}, {seconds:.0f} s", flush=True)
    return True


def make_judge(args: argparse.Namespace, config: Config) -> tuple[Judge, ImageDataset]:
    """The classifier of the data, and the images of the EMA loss and of FD's reference."""
    train = build_dataset(config)
    if args.data == "digits":
        return DigitsCNN(), train
    held_out = build_dataset(replace(config, data=replace(config.data, split="test")))
    return LabelCNN(train, held_out, args.judge_steps), held_out


def score_all(rows: list[Row], args: argparse.Namespace, deadline: float) -> bool:
    """Write scores.json into each run that has none of this checkpoint and these options; False at the deadline."""
    judge: tuple[Judge, ImageDataset] | None = None
    for row in rows:
        for config, run in zip(row.configs, row.runs, strict=True):
            steps = config.sample.steps
            key = {"num": args.num, "step": done_steps(run), "sampler_steps": steps, "judge_steps": args.judge_steps}
            file = run / "scores.json"
            if file.is_file() and key.items() <= json.loads(file.read_text(encoding="utf-8")).items():
                continue
            if time.monotonic() > deadline:
                return False
            judge = judge or make_judge(args, config)
            write_text(file, json.dumps(key | score_run(run, *judge, SCALES, args.num, steps), indent=1) + "\n")
            print(f"scored {row.label}, {run.name}", flush=True)
    return True


def over_seeds(values: list[float], digits: int) -> str:
    """Mean over seeds, and half the range where there are several."""
    half = (max(values) - min(values)) / 2
    return f"{mean(values):.{digits}f}" + (f" ± {half:.{digits}f}" if len(values) > 1 else "")


def scores_table(rows: list[Row]) -> str:
    """Sizes, our scores and load, then the paper's FID50K and IS on ImageNet."""
    measures = (("fd", "FD", 2), ("is", "IS-like", 2), ("agreement", "agreement", 3))
    columns = ["row", "activated M", "total M", "EMA loss"]
    columns += [f"{name} cfg {scale:g}" for scale in SCALES for _, name, _ in measures]
    columns += ["load max/mean", "dead", *(f"paper {name} cfg {scale:g}" for scale in SCALES for name in ("FID", "IS"))]
    lines = []
    for row in rows:
        found, count, last = row.results(), count_parameters(row.configs[0]), [read_log(run)[-1] for run in row.runs]
        line = [row.label, f"{count.activated / 1e6:.2f}", f"{count.total / 1e6:.2f}"]
        line.append(over_seeds([result["ema_loss"] for result in found], 4))
        for scale in SCALES:
            for key, _, digits in measures:
                line.append(over_seeds([result[f"cfg{scale}"][key] for result in found], digits))
        for key, digits in (("load_max_over_mean", 2), ("dead_experts", 1)):
            line.append(over_seeds([record[key] for record in last], digits))
        for scale in SCALES:
            line += [f"{value:g}" for value in row.paper[scale]] if scale in row.paper else ["-", "-"]
        lines.append(line)
    return table(columns, lines)


def orderings(rows: list[Row]) -> str:
    """For each measure: our order from best to worst, and how many pairs of rows stand as in the paper."""

    def order(rows: list[Row], value: Callable[[Row], float]) -> str:
        return " < ".join(row.label for row in sorted(rows, key=value))

    measures: dict[str, Callable[[Row], float]] = {
        "EMA loss": lambda row: mean(result["ema_loss"] for result in row.results()),
        **{
            f"FD at guidance {scale:g}": lambda row, key=f"cfg{scale}": mean(
                result[key]["fd"] for result in row.results()
            )
            for scale in SCALES
        },
    }
    known = [row for row in rows if 1.5 in row.paper]
    pairs = [(a, b) for a, b in combinations(known, 2) if a.paper[1.5][0] != b.paper[1.5][0]]
    lines = [f"- paper, FID50K at guidance 1.5: {order(known, lambda row: row.paper[1.5][0])}"] if known else []
    for name, value in measures.items():
        agree = sum((a.paper[1.5][0] < b.paper[1.5][0]) == (value(a) < value(b)) for a, b in pairs)
        note = f" ({agree} of {len(pairs)} pairs as in the paper)" if pairs else ""
        lines.append(f"- here, {name}: {order(rows, value)}{note}")
    return "\n".join(lines)


def write_report(rows: list[Row], args: argparse.Namespace, words: list[str]) -> None:
    """Print the table, and write it with its figure to args.out."""
    name, first, train = f"paper_table{args.table}_{args.data}", rows[0].results()[0], rows[0].configs[0].train
    args.out.mkdir(parents=True, exist_ok=True)
    with figure(args.out / f"{name}.png", [1]) as (axis,):
        for row in rows:
            curve = read_log(row.runs[0])
            axis.plot([r["step"] for r in curve], [r["loss/diffusion"] for r in curve], label=row.label)
        axis.set(xlabel="step", ylabel="diffusion loss", yscale="log")
    method = f"""\
Each row: {train.steps} steps (times its budget in the paper) of {train.global_batch_size} images, {train.precision},
seeds {", ".join(map(str, args.seeds))}, rows in turns. {args.num} images per guidance scale, {first["sampler_steps"]}
sampler steps, scored by {first["judge"]} (its accuracy on held-out reals is {first["judge_accuracy"]:.3f}). FD is the
Frechet distance of its features, IS-like the Inception score with its classes; neither compares with an FID50K of
ImageNet, only their order does. EMA loss: the diffusion loss of the EMA weights, with the same noise and timesteps for
all rows. Load and dead experts (over all MoE layers) are those of the last step; ± is half the range over seeds."""
    title = f"Table {args.table} on {args.data}: {TABLES['tables'][args.table]['caption']}"
    picture = f"![training loss of the rows]({name}.png)"
    ranks = f"Order, best first:\n\n{orderings(rows)}"
    text = page(title, "benchmarks/paper_tables.py", words, method, scores_table(rows), ranks, picture)
    write_text(args.out / f"{name}.md", text)
    print(text)


def parse_args(words: list[str]) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    help = "1, 3 to 13 of the paper, or 9f for Figures 3c and 9"
    parser.add_argument("--table", required=True, metavar="N", help=help)
    parser.add_argument("--data", default="digits", metavar="NAME", help="digits (embedded) or cifar10")
    parser.add_argument("--path", type=Path, help="cifar10: the packed npz")
    parser.add_argument("--steps", type=int, help="optimizer steps per row (digits 600, cifar10 2500)")
    parser.add_argument("--seeds", type=lambda text: integers(text, 0), default=[0], metavar="0,1")
    parser.add_argument("--num", type=int, default=2000, help="images per guidance scale to score (2000)")
    parser.add_argument("--judge-steps", type=int, default=2000, help="cifar10: steps of the classifier's training")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin nothing after them, resumable (exit code 85)")
    parser.add_argument("--runs", type=Path, default=Path("runs/paper_tables"), metavar="DIR")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results", metavar="DIR")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="for every row")
    return parser.parse_intermixed_args(words)


def run(words: list[str]) -> int:
    """Train, score, report; returns the exit code."""
    args = parse_args(words)
    rows = plan(args)  # every mistake shows before the first step
    deadline = time.monotonic() + 60 * args.minutes
    if not (train_all(rows, deadline) and score_all(rows, args, deadline)):
        print("not done; the same command goes on", flush=True)
        return STOPPED
    write_report(rows, args, words)
    return 0


if __name__ == "__main__":
    sys.exit(guarded(run, sys.argv[1:]))
