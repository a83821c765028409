#!/usr/bin/env python
"""Look at checkpoints, verify them, make something else of them, delete them."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback of Ctrl-C while libraries load

from promoe_ds.checkpoint import layout
from promoe_ds.checkpoint.layout import size
from promoe_ds.config.errors import ConfigError, reject
from promoe_ds.config.schema import Config
from promoe_ds.recipes.load import load_tree
from promoe_ds.utils.command_line import DONE, USER_ERROR, Parser, launcher
from promoe_ds.utils.files import is_dir
from promoe_ds.utils.outputs import check_new

EXAMPLES = """examples:
  python launchers/checkpoint.py inspect --run runs/digits              step, model, topology, sizes of the newest
  python launchers/checkpoint.py verify --run runs/digits               read every byte of all checkpoints
  python launchers/checkpoint.py verify runs/digits/checkpoints/step_00001000
  python launchers/checkpoint.py convert --run runs/digits --weights ema --dtype bf16 --out digits_bf16
  python launchers/sample.py --model digits_bf16 --num 100              draw from what convert made
  python launchers/checkpoint.py convert --run runs/digits --files 8 --out runs/digits_8
  python launchers/checkpoint.py prune --run runs/digits --keep 1 --dry-run
  python launchers/checkpoint.py prune --run runs/digits --damaged      what training refuses to resume from

A checkpoint resumes at any number of processes, ep and ZeRO stage as it is: nothing is converted for that.
What cannot be read may be whole: it stops the command, and nothing is deleted.
Exit codes: 0 done; 2 a checkpoint is damaged or cannot be read, or a mistake in the command.
"""


def parser() -> Parser:
    p = Parser(description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = p.add_subparsers(dest="command", required=True, metavar="inspect|verify|convert|prune")

    def command(name: str, text: str) -> argparse.ArgumentParser:
        raw = argparse.RawDescriptionHelpFormatter
        return commands.add_parser(name, help=text, description=text, epilog=EXAMPLES, formatter_class=raw)

    def source(sub: argparse.ArgumentParser, many: bool = False) -> None:
        sub.add_argument("path", type=Path, nargs="*" if many else "?", metavar="PATH", help="a checkpoint folder")
        which = "all its checkpoints" if many else "its newest checkpoint"
        sub.add_argument("--run", type=Path, metavar="DIR", help=f"a run folder: {which}")

    sub = command("inspect", "print step, model, topology, versions, files and sizes")
    source(sub)
    sub.add_argument("--json", action="store_true", help="one JSON object on stdout")
    source(command("verify", "read every byte and compare checksums; exit 2 if one is damaged"), many=True)
    sub = command("convert", "write weights alone, or the same state in another number of files")
    source(sub)
    sub.add_argument("--out", type=Path, required=True, metavar="DIR", help="a folder that does not exist yet")
    form = sub.add_mutually_exclusive_group(required=True)
    form.add_argument("--weights", choices=("ema", "raw"), help="one file of weights, for sample.py --model DIR")
    form.add_argument("--files", type=int, metavar="N", help="a new run folder, its state in N files")
    sub.add_argument("--dtype", choices=("fp32", "bf16"), help="of --weights (fp32)")
    sub = command("prune", "read every byte, then delete old or damaged checkpoints and what interrupted saves left")
    sub.add_argument("--run", type=Path, required=True, metavar="DIR", help="a run folder that nobody trains in")
    sub.add_argument("--keep", type=int, metavar="N", help="delete all whole ones but the newest N")
    sub.add_argument("--damaged", action="store_true", help="delete the damaged ones, if a whole one remains")
    sub.add_argument("--dry-run", action="store_true", help="only say what would be deleted")
    return p


def checkpoints_of(run: Path) -> list[Path]:
    found = layout.candidates(run)
    if not found:
        reject("--run", run, "holds no checkpoint", "train first, or name another run folder")
    return found


def chosen(args: argparse.Namespace) -> Path:
    """The one checkpoint meant by PATH or --run."""
    if (args.path is None) == (args.run is None):
        raise ConfigError("name either a checkpoint folder or --run DIR; see --help")
    if args.run:
        return checkpoints_of(args.run)[-1]
    return named(args.path)


def named(path: Path) -> Path:
    """A checkpoint folder that was named itself; raises ConfigError."""
    try:
        if not is_dir(path):
            reject("PATH", path, "no such folder", "name a checkpoint folder, or --run DIR")
    except OSError as error:
        layout.unreadable(path, error, "PATH")
    return path.resolve()


def inspect(args: argparse.Namespace) -> int:
    path = chosen(args)
    facts = facts_of(path)
    print(json.dumps(facts) if args.json else render(path, facts))
    return DONE


def facts_of(path: Path) -> dict[str, Any]:
    """What the manifest says, the number of parameters and whether the files are there; raises ConfigError."""
    from promoe_ds.costs.flops import count_parameters

    tree = layout.manifest(path)
    problem = layout.damage(path, read_bytes=False)
    parameters = count_parameters(load_tree(tree["config"])).total
    total = sum(entry["bytes"] for entry in tree["files"].values())
    return tree | {"parameters": parameters, "bytes": total, "problem": problem}


def age(made: str) -> str:
    """`2026-01-31T12:00:00+00:00` and how long ago that was."""
    minutes = int((datetime.now(UTC) - datetime.fromisoformat(made)).total_seconds() // 60)
    for unit, length in (("days", 24 * 60), ("hours", 60)):
        if minutes >= 2 * length:
            return f"{made} ({minutes // length} {unit} ago)"
    return f"{made} ({minutes} minutes ago)"


def model_line(config: Config) -> str:
    m, moe = config.model, config.moe
    text = f"depth {m.depth}, width {m.width}, patch {m.patch}, {m.image_size}x{m.image_size}x{m.channels}"
    experts = f"{moe.num_experts} experts, router {moe.router.name}" if moe else "dense"
    return f"{text}, {m.num_classes} classes, {experts}"


def render(path: Path, facts: dict[str, Any]) -> str:
    config = load_tree(facts["config"])
    t = config.train
    if "weights" in facts:
        saved_by = f"weights alone, from {facts['source']}: {facts['weights']}, {facts['dtype']}"
    else:
        processes = f"{facts['world']} process{'es' if facts['world'] > 1 else ''}"
        saved_by = f"{processes}, ep {facts['ep']}, ZeRO-{facts['stage']}; resumes at any"
    rows = {
        "step": f"{facts['step']:,} of {t.steps:,}",
        "made": age(facts["made"]),
        "recipe": config.name,
        "model": model_line(config),
        "parameters": f"{facts['parameters']:,}",
        "training": f"{config.diffusion.name}, {t.precision}, global batch {t.global_batch_size}, seed {t.seed}, "
        f"lr {config.optimizer.lr:g}, EMA {', '.join(map(str, config.optimizer.averages().values()))}",
        "saved by": saved_by,
        "versions": f"promoe_ds {facts['version']}, torch {facts['torch']}, format {facts['format']}",
        "config": f"blake2b {facts['config_blake2b'][:16]}",
        "state": facts["problem"] or "every file has its size (verify reads every byte)",
    }
    lines = [str(path), *(f"  {key:<11} {value}" for key, value in rows.items())]
    lines.append(f"  {'files':<11} {size(facts['bytes'])} in {len(facts['files'])}")
    lines += [f"    {size(entry['bytes']):>10}  {name}" for name, entry in sorted(facts["files"].items())]
    return "\n".join(lines)


def verify(args: argparse.Namespace) -> int:
    """One line per fault, and one per whole checkpoint."""
    if bool(args.path) == (args.run is not None):
        raise ConfigError("name either checkpoint folders or --run DIR; see --help")
    paths = checkpoints_of(args.run) if args.run else [named(path) for path in args.path]
    faults = [fault for path in paths for fault in faults_of(path)]
    if args.run:
        for path in layout.leftovers(args.run):
            print(f"ignored  {path}: left by an interrupted save, or being written")
    if faults and args.run:
        print(f"remove the damaged ones by: {layout.removal(args.run)}", file=sys.stderr)
    return USER_ERROR if faults else DONE


def faults_of(path: Path) -> list[str]:
    """Every fault of a checkpoint, printed as soon as it is known."""
    with layout.progress(path.name, layout.bytes_of(path)) as tick:
        found = list(layout.damages(path, tick=tick))
    for fault in found:
        print(f"damaged  {path}: {fault}", flush=True)
    if not found:
        print(f"whole    {path}: {size(layout.bytes_of(path))}", flush=True)
    return found


def convert(args: argparse.Namespace) -> int:
    from promoe_ds.checkpoint.convert import resplit
    from promoe_ds.formats import weights

    path = chosen(args)
    check_new(args.out, "name another folder")  # before every byte is read
    if args.files is not None:
        if args.dtype:
            reject("--dtype", args.dtype, "belongs to --weights; a state is always fp32", "leave it out")
        made = resplit(path, args.out, args.files)
        print(f"{made}: {size(layout.bytes_of(made))}; launchers/train.py --run {args.out} continues from it")
    else:
        made = weights.write(weights.load(path, args.weights, "PATH"), args.out, args.dtype or "fp32")
        print(f"{made}: {size(layout.bytes_of(made))}; launchers/sample.py --model {made} draws from it")
    return DONE


def prune(args: argparse.Namespace) -> int:
    from promoe_ds.checkpoint.save import discard

    if args.keep is None and not args.damaged:
        raise ConfigError("say what to delete: --keep N, --damaged or both; see --help")
    if args.keep is not None and args.keep < 1:
        reject("--keep", args.keep, "would leave nothing to resume from", "keep 1 or more")
    found = checkpoints_of(args.run)
    with layout.claim(args.run):
        damaged = [path for path in found if faults_of(path)]
        whole = [path for path in found if path not in damaged]
        if args.damaged and damaged and not whole:
            reject("--damaged", args.run, "no checkpoint of it is whole", "remove the folder yourself to start again")
        doomed = (damaged if args.damaged else []) + (whole[: -args.keep] if args.keep else [])
        for path in [*doomed, *layout.leftovers(args.run)]:
            amount = size(layout.bytes_of(path))
            print(f"{'would delete' if args.dry_run else 'deleted'} {path}: {amount}", flush=True)
            try:
                if not args.dry_run:
                    discard(path)
            except OSError as error:
                reject("checkpoint", path, f"cannot be deleted ({error.strerror})", "fix its permissions")
    return DONE


def run(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    return {"inspect": inspect, "verify": verify, "convert": convert, "prune": prune}[args.command](args)


main, console = launcher(run)

if __name__ == "__main__":
    console()
