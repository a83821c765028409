#!/usr/bin/env python
"""The tables of the paper on small real data: every row trained with the same seeds and budget, side by side.

examples:
  python benchmarks/paper_tables.py --table 5 --data digits                      CPU, minutes per row
  python benchmarks/paper_tables.py --table 6 --data digits --seeds 0,1 --steps 1000
  python benchmarks/paper_tables.py --table 5 --data cifar10 --path cifar10.npz --minutes 8      run it again till done
  python benchmarks/paper_tables.py --table 5,6,8 --data fashion --seeds 0,1,2   CPU, 15 minutes per row and seed

Seeds come one after the other, so that each finished one fills the tables. Within a seed rows take turns, a quarter of
the budget each, so that no row has the machine for itself. A row that several tables share is trained once. Runs are
kept in --runs, scores of finished runs in OUT/paper_tables_DATA.json; what is there is not trained again. Everything
resumes: the same command goes on where it was, also after SIGTERM, and started twice, the two share the work.
exit codes: 0 done, 2 a mistake, 85 --minutes are over, or a signal came.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from launchers.train import prepare_environment  # noqa: E402
from promoe_ds.utils import signals  # noqa: E402

if __name__ == "__main__":
    signals.listen()
    prepare_environment()  # before torch

from benchmarks import fashion  # noqa: E402
from benchmarks.common import facts, integers, read_log  # noqa: E402
from benchmarks.paper_report import SCALES, Row, write_report  # noqa: E402
from benchmarks.scoring import LabelCNN, Standard, score_run  # noqa: E402
from promoe_ds.checkpoint.layout import newest, step_of  # noqa: E402
from promoe_ds.config.errors import reject  # noqa: E402
from promoe_ds.config.schema import Config  # noqa: E402
from promoe_ds.data import build_dataset  # noqa: E402
from promoe_ds.evaluation.features import DigitsCNN  # noqa: E402
from promoe_ds.parallel import ds_config  # noqa: E402
from promoe_ds.parallel.topology import Topology  # noqa: E402
from promoe_ds.recipes.load import load_config  # noqa: E402
from promoe_ds.train.trainer import StoppedEarly, Trainer  # noqa: E402
from promoe_ds.utils.command_line import STOPPED, Parser, guarded  # noqa: E402
from promoe_ds.utils.files import write_text  # noqa: E402
from promoe_ds.utils.ranks import Ranks  # noqa: E402

TABLES = yaml.safe_load((ROOT / "benchmarks/paper_tables.yaml").read_text(encoding="utf-8"))
TURNS = 4
"""that the training of a run is cut into"""
POLL_SECONDS = 10.0
"""between looks at what other processes work on"""


@dataclass(frozen=True)
class Run:
    """A row with one seed."""

    name: str
    """PARTS-STEPS/seedN: its folder below --runs, and its key among the kept scores"""
    seed: int
    config: Config
    folder: Path
    key: dict[str, Any]
    """what its scores depend on, but for the commit"""

    def turns(self) -> int:
        """Done, of `TURNS`."""
        return done_steps(self.folder) * TURNS // self.config.train.steps


def plan(args: argparse.Namespace, table: str) -> tuple[list[Row], list[Run]]:
    """The rows of a table, and the runs of them all. Raises ConfigError for what the recipes reject."""
    data, rows, runs = TABLES["data"][args.data], [], []
    parts = TABLES["parts"] | data["parts"]
    path = args.runs / "fashion" / "fashion.npz" if args.data == "fashion" else args.path
    for label, entry in TABLES["tables"][table]["rows"].items():
        steps = (args.steps or data["steps"]) * entry.get("budget", 1)
        options = [option for part in entry["is"] for option in parts.get(part, [])]
        options += [*data["options"], *args.overrides, f"train.steps={steps}"]
        more = ["train.keep_last=1", "sample.classes=1", "sample.per_class=1", *([f"data.path={path}"] if path else [])]
        name = "-".join([*entry["is"], str(steps), *(o.replace("/", "_") for o in args.overrides)])
        of_row = []
        for seed in args.seeds:
            config = load_config(data["base"], [*options, *more, f"train.seed={seed}"])
            key = {"base": data["base"], "options": options, "seed": seed, "num": args.num}
            key |= {"sampler_steps": config.sample.steps, "judge_steps": args.judge_steps or data["judge_steps"]}
            of_row.append(Run(f"{name}/seed{seed}", seed, config, args.runs / args.data / name / f"seed{seed}", key))
        rows.append(Row(label, tuple(run.name for run in of_row), of_row[0].config, entry["paper"]))
        runs += of_row
    return rows, runs


def done_steps(run: Path) -> int:
    found = newest(run)
    return step_of(found) if found else 0


def train_until(config: Config, run: Path, step: int) -> int:
    """Train a run up to `step`, in this process; its output goes to RUN/log.txt. Returns the trainer's exit code."""
    turn = -(-config.train.steps // TURNS)
    train = replace(config.train, steps=step, checkpoint_every=turn, log_every=max(1, config.train.steps // 40))
    config = replace(config, train=train, sample=replace(config.sample, steps=2))
    run.mkdir(parents=True, exist_ok=True)
    with (run / "log.txt").open("a", encoding="utf-8") as log, contextlib.redirect_stdout(log):
        try:
            topology = Topology.of(Ranks.from_environment(), ep=1)
            trainer = Trainer(config, ds_config.resolve(None, config, 1), run, topology)
        except StoppedEarly:
            return STOPPED
        try:
            return trainer.run()
        finally:
            trainer.close()


@contextlib.contextmanager
def alone(name: Path, wait: bool = False) -> Iterator[bool]:
    """Whether this process has the lock `name`.lock; until the block ends, or the process dies."""
    name.parent.mkdir(parents=True, exist_ok=True)
    with name.with_name(f"{name.name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True


def kept_file(args: argparse.Namespace) -> Path:
    return args.out / f"paper_tables_{args.data}.json"


def kept_scores(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Of finished runs, by name. Raises ConfigError for a damaged file."""
    file = kept_file(args)
    try:
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    except ValueError as error:
        reject("--out", file, f"is damaged ({error})", "restore the file, or remove it to score all runs again")


def keep(args: argparse.Namespace, run: Run, scores: dict[str, Any]) -> None:
    """Add to the kept scores, a line per run."""
    with alone(args.runs / args.data / "scores", wait=True):
        known = kept_scores(args) | {run.name: run.key | scores}
        lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(known[name])}" for name in sorted(known))
        args.out.mkdir(parents=True, exist_ok=True)
        write_text(kept_file(args), f"{{\n{lines}\n}}\n")


class Study:
    """The work on a list of runs: training in turns, then scores; the standard is made when it is first needed."""

    def __init__(self, args: argparse.Namespace, runs: Sequence[Run]):
        self.args, self.deadline = args, time.monotonic() + 60 * args.minutes
        self.runs = {run.name: run for run in runs}
        self.standard: Standard | None = None

    def left(self) -> list[Run]:
        """Runs without scores: the first seed first, then the one that is furthest behind."""
        kept = kept_scores(self.args)
        found = [run for run in self.runs.values() if not run.key.items() <= kept.get(run.name, {}).items()]
        return sorted(found, key=lambda run: (self.args.seeds.index(run.seed), run.turns()))

    def finish(self) -> bool:
        """Train and score until nothing is left; False if the deadline or a signal came first."""
        while left := self.left():
            if time.monotonic() > self.deadline or signals.requested():
                return False
            for run in left:
                with alone(run.folder / "turn") as mine:
                    if mine and not self.step(run):
                        return False
                if mine:
                    break
            else:  # other processes are at work on all of them
                time.sleep(POLL_SECONDS)
        return True

    def step(self, run: Run) -> bool:
        """A turn of training, or the scores; False if a signal came first."""
        wall, cpu = time.monotonic(), time.process_time()
        turns, steps = run.turns(), run.config.train.steps
        if run not in self.left():  # another process was faster
            return True
        if turns == TURNS:
            self.score(run)
            print(f"scored {run.name}, {time.monotonic() - wall:.0f} s", flush=True)
            return True
        target = -(-steps * (turns + 1) // TURNS)
        code = train_until(run.config, run.folder, target)
        took = {"step": done_steps(run.folder), "seconds": time.monotonic() - wall, "cpu": time.process_time() - cpu}
        with (run.folder / "turns.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(took) + "\n")
        words = f"{run.name}: step {took['step']}/{steps}, {took['seconds']:.0f} s, {took['cpu']:.0f} s of CPU"
        print(words, flush=True)
        return code == 0

    def score(self, run: Run) -> None:
        self.standard = self.standard or make_standard(self.args, run)
        scores = score_run(run.folder, self.standard, SCALES, self.args.num, run.config.sample.steps)
        log = read_log(run.folder)
        late = [record for record in log if record["step"] > 0.75 * run.config.train.steps]
        for name in ("load_max_over_mean", "dead_experts"):
            scores[name] = sum(record[name] for record in late) / len(late)
        scores["curve"] = [[record["step"], round(record["loss/diffusion"], 4)] for record in log]
        turns = [json.loads(line) for line in (run.folder / "turns.jsonl").read_text(encoding="utf-8").splitlines()]
        scores["train_hours"] = sum(turn["seconds"] for turn in turns) / 3600
        scores["train_cpu_hours"] = sum(turn["cpu"] for turn in turns) / 3600
        keep(self.args, run, scores | {"facts": facts()})


def make_standard(args: argparse.Namespace, run: Run) -> Standard:
    """The classifier of the data, and images that no run has seen; digits have no others."""
    if args.data == "digits":
        return Standard(DigitsCNN(), build_dataset(run.config), run.config.data)
    where = replace(run.config.data, split="test")
    train, held_out = build_dataset(run.config), build_dataset(replace(run.config, data=where))
    file = args.runs / args.data / f"judge_{run.key['judge_steps']}.safetensors"
    with alone(file, wait=True):
        judge = LabelCNN(train, held_out, run.key["judge_steps"], file)
    return Standard(judge, held_out, where)


def parse_args(words: list[str]) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    help = "1, 3 to 13 of the paper, or 9f for Figures 3c and 9; several: 5,6,8"
    parser.add_argument("--table", required=True, metavar="N", help=help)
    parser.add_argument("--data", default="digits", metavar="NAME", help="digits (embedded), cifar10 or fashion")
    help = f"cifar10: the packed npz; fashion: folder of the four IDX files ({fashion.FOLDER})"
    parser.add_argument("--path", type=Path, help=help)
    parser.add_argument("--steps", type=int, help="optimizer steps per row (digits 600, cifar10 2500, fashion 1200)")
    parser.add_argument("--seeds", type=lambda text: integers(text, 0), default=[0], metavar="0,1")
    parser.add_argument("--num", type=int, default=2000, help="images per guidance scale to score (2000)")
    parser.add_argument("--judge-steps", type=int, help="of the classifier's training (cifar10 2000, fashion 800)")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin nothing after them, resumable (exit code 85)")
    parser.add_argument("--runs", type=Path, default=Path("runs/paper_tables"), metavar="DIR")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results", metavar="DIR")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="for every row")
    args = parser.parse_intermixed_args(words)
    args.table = args.table.split(",")
    for option, values, known in (("--table", args.table, TABLES["tables"]), ("--data", [args.data], TABLES["data"])):
        for value in values:
            if value not in known:
                reject(option, value, "is not known", f"choose one of {', '.join(known)}")
    if args.path is None and args.data == "cifar10":
        reject("--path", "null", "--data cifar10 needs one", "add --path FILE.npz")
    return args


def run(words: list[str]) -> int:
    """Train, score, report; returns the exit code."""
    args = parse_args(words)
    planned = {table: plan(args, table) for table in args.table}  # every mistake shows before the first step
    study = Study(args, [run for _, runs in planned.values() for run in runs])
    pack = args.runs / "fashion" / "fashion.npz"
    if args.data == "fashion" and study.left() and not pack.exists():
        fashion.pack(args.path or fashion.FOLDER, pack)
    if not study.finish():
        print("not done; the same command goes on", flush=True)
        return STOPPED
    for table, (rows, _) in planned.items():
        write_report(rows, kept_scores(args), args, table, TABLES["tables"][table]["caption"], words)
    return 0


if __name__ == "__main__":
    sys.exit(guarded(run, sys.argv[1:]))
