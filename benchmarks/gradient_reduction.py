#!/usr/bin/env python
"""Gradients reduced to the rank that owns them, against all-reduced ones: bytes, losses, time of real training steps.

examples:
  python benchmarks/gradient_reduction.py --recipe tiny --world 2,4,8 --ep 1,2,4 --stage 1,2 --rounds 1 --count
  python benchmarks/gradient_reduction.py --world 2,4 --ep 1,2 --bucket 50000,50000000

Each run is the trainer with train.measure=true; the two ways take turns, --rounds times, in one launch per world. The
first two steps of a run are warm-up. --count leaves the times out.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.common import integers, page, read_log, spread, table  # noqa: E402
from promoe_ds.costs import comm_volume  # noqa: E402
from promoe_ds.recipes.load import load_config  # noqa: E402
from promoe_ds.utils.command_line import Parser, check_positive, guarded  # noqa: E402

WARM_UP = 2
WAYS = {"owner": False, "everyone": True}
"""-> DeepSpeed's use_multi_rank_bucket_allreduce"""


def ds_config(stage: int, bucket: int, way: str) -> dict[str, Any]:
    """The shipped file of a stage with other buckets."""
    tree = json.loads((ROOT / f"ds_configs/zero{stage}.json").read_text(encoding="utf-8"))
    tree["zero_optimization"] |= {"reduce_bucket_size": bucket, "use_multi_rank_bucket_allreduce": WAYS[way]}
    return tree


def train_all(folder: Path) -> None:
    """A rank of the job: every run of FOLDER/work.json, one after another."""
    from promoe_ds.parallel import ds_config as resolver
    from promoe_ds.parallel import topology
    from promoe_ds.train.trainer import Trainer
    from promoe_ds.utils.ranks import Ranks

    for name, recipe, overrides in json.loads((folder / "work.json").read_text()):
        config = load_config(recipe, overrides)
        here = topology.Topology.of(Ranks.from_environment(), config.parallel.expert_parallel)
        ds = resolver.resolve(str(folder / f"{name}.json"), config, here.world)
        trainer = Trainer(config, ds, folder / name, here)
        calls = count_calls(trainer.engine.engine.optimizer)
        trainer.run()
        trainer.close()
        if here.rank == 0:
            (folder / name / "calls").write_text(str(len(calls) / config.train.steps))
    topology.disconnect()
    topology.leave(0)


def count_calls(zero: Any) -> list[int]:
    """A list that grows with every collective that DeepSpeed's optimizer of stage 1 or 2 makes for gradients."""
    calls: list[int] = []
    inner = zero.allreduce_bucket

    def counted(bucket: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(sum(part.numel() for part in bucket))
        return inner(bucket, *args, **kwargs)

    zero.allreduce_bucket = counted
    return calls


def launch(
    args: argparse.Namespace, world: int, folder: Path, start: Callable[..., Any]
) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    """Run everything of a world; (ep, stage, bucket, way) -> of each round, the log's records and calls per step."""
    steps = args.steps + (0 if args.count else WARM_UP)
    common = [f"train.steps={steps}", "train.log_every=1", f"train.checkpoint_every={steps}", "train.measure=true"]
    common += ["sample.classes=1", "sample.per_class=1", "sample.steps=1", *args.overrides]
    eps = [ep for ep in args.ep if world % ep == 0]
    keys = list(product(eps, args.stage, args.bucket, WAYS))
    names = {(r, *key): "_".join(map(str, (r, *key))) for r in range(args.rounds) for key in keys}
    work = []
    for (_, ep, stage, bucket, way), name in names.items():
        (folder / f"{name}.json").write_text(json.dumps(ds_config(stage, bucket, way)))
        work.append((name, args.recipe, [*common, f"parallel.expert_parallel={ep}"]))
    (folder / "work.json").write_text(json.dumps(work))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}", "--"]
    with (folder / "log").open("w") as log:
        code = start([*command, __file__, "--worker", str(folder)], stdout=log, stderr=log).returncode
    if code:
        sys.exit(f"the job of {world} ranks failed:\n{(folder / 'log').read_text()[-3000:]}")
    out: dict[tuple[Any, ...], list[dict[str, Any]]] = {key: [] for key in keys}
    for (_, *key), name in names.items():
        calls = float((folder / name / "calls").read_text())
        out[tuple(key)].append({"log": read_log(folder / name), "calls": calls})
    return out


def row(args: argparse.Namespace, world: int, key: tuple[int, int, int], runs: Any) -> list[object]:
    """A line of the table, both ways."""
    ep, stage, bucket = key
    owner, everyone = (runs[*key, way] for way in WAYS)
    config = load_config(args.recipe, [*args.overrides, f"parallel.expert_parallel={ep}"])
    bound = comm_volume.gradients(config, world, ep, stage)
    sent = [each[0]["log"][-1]["bytes/gradients"] for each in (owner, everyone)]
    pairs = zip(owner[0]["log"], everyone[0]["log"], strict=True)
    apart = max(abs(x["loss"] / y["loss"] - 1) for x, y in pairs)
    cells: list[object] = [world, ep, stage, f"{bucket:,}", f"{bound:,}", *(f"{x / bound:.2f}" for x in sent)]
    cells += [*(f"{each[0]['calls']:.0f}" for each in (owner, everyone)), f"{apart:.0e}"]
    if args.count:
        return cells
    for field in ("seconds_per_step", "seconds/gradients"):
        ms = [[1000 * median(r[field] for r in run["log"][WARM_UP:]) for run in each] for each in (owner, everyone)]
        ratios = [x / y for x, y in zip(*ms, strict=True)]
        cells += [*(f"{median(values):.0f}" for values in ms), spread(ratios, ".2f")]
    return cells


def parse_args(words: list[str]) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="digits")
    parser.add_argument("--world", type=integers, default=[2, 4], metavar="2,4")
    parser.add_argument("--ep", type=integers, default=[1, 2], metavar="1,2")
    parser.add_argument("--stage", type=integers, default=[1], metavar="1,2")
    parser.add_argument("--bucket", type=integers, default=[comm_volume.BUCKET], metavar="N", help="elements")
    parser.add_argument("--steps", type=int, default=6, help="measured steps of a run (6)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--count", action="store_true", help="bytes, calls and losses only")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the page there as well")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_intermixed_args(words)
    check_positive(args, "steps", "rounds")
    return args


def run(words: list[str], start: Callable[..., Any] = subprocess.run) -> None:
    """
    Args:
        start: runs a job to its end, as `subprocess.run` does.
    """
    args = parse_args(words)
    if args.worker:
        return train_all(args.worker)
    rows = []
    for world in args.world:
        with tempfile.TemporaryDirectory() as folder:
            runs = launch(args, world, Path(folder), start)
        rows += [row(args, world, key, runs) for key in dict.fromkeys(key[:3] for key in runs)]
    columns = ["world", "ep", "ZeRO", "bucket", "bound, bytes", "owner / bound", "all-reduce / bound"]
    columns += ["reductions", "all-reduces", "losses apart"]
    if not args.count:
        columns += ["step ms, owner", "all-reduce", "ratio", "gradients ms, owner", "all-reduce", "ratio"]
    text = page("Gradient reduction", "benchmarks/gradient_reduction.py", words, table(columns, rows))
    print(text)
    if args.out:
        args.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(guarded(run, sys.argv[1:]))
