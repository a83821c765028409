"""See what the experts of a trained model learned: one folder with report.html, PNGs and CSVs."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
from pathlib import Path
from typing import Any

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback of Ctrl-C while libraries load

from promoe_ds.config.errors import ConfigError, reject
from promoe_ds.utils.command_line import Parser, launcher
from promoe_ds.utils.files import making
from promoe_ds.utils.ranks import ALONE

EXAMPLES = """examples:
  python launchers/analyze.py --run runs/digits
  python launchers/analyze.py --run runs/promoe --compare runs/tc runs/diffmoe --out comparison
  python launchers/analyze.py --model ema.safetensors --data imagenet_latents --images 2000 --device cuda
  python launchers/analyze.py --run runs/digits --timesteps 50,500,950 --subspace 32 --dry-run

The report is one file: it opens anywhere, without a network. Written to RUN/analysis; an earlier report there is
replaced. Without a run, to the folder of --out. Exit codes: 0 done, 2 user error, 85 stopped (run it again), 130 by
Ctrl-C.
"""


def parser() -> Parser:
    p = Parser(description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = p.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", type=Path, metavar="DIR", help="run folder: its newest complete checkpoint")
    source.add_argument("--model", type=Path, metavar="PATH", help="a checkpoint or converted folder, or a file of it")
    p.add_argument("--compare", type=Path, nargs="+", default=[], metavar="RUN", help="runs or weights beside it")
    p.add_argument("--data", metavar="PATH", help="images or latents as the model's (default: data.path of the run)")
    p.add_argument("--vae", metavar="PATH", help="codec that shows latents as pictures (default: data.vae of the run)")
    p.add_argument("--out", type=Path, metavar="DIR", help="(default RUN/analysis)")
    p.add_argument("--images", type=int, default=512, help="images shown to the model (default 512)")
    p.add_argument("--timesteps", default="100,300,500,700,900", metavar="T,T", help="in [0, 1000]; 1000 is noise")
    p.add_argument("--tokens", type=int, default=2560, help="tokens of the clusters and t-SNE (default 2560)")
    p.add_argument("--maps", type=int, default=8, help="images with token maps (default 8)")
    p.add_argument("--subspace", type=int, metavar="K", help="singular vectors compared (default: width / 8)")
    p.add_argument("--batch", type=int, default=64, help="images per forward (default 64)")
    p.add_argument("--seed", type=int, default=0, help="of images, noise, clusters and t-SNE (default 0)")
    text = "bf16 is autocast (default: bf16 on CUDA, fp32 on CPU)"
    p.add_argument("--precision", choices=("fp32", "bf16"), help=text)
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default auto)")
    p.add_argument("--dry-run", action="store_true", help="say what would be looked at, and where it would be written")
    return p


def parse_timesteps(text: str) -> tuple[float, ...]:
    """`100,500` to (100.0, 500.0), ascending; raises `ConfigError`."""
    way_out = "write numbers from 0 to 1000, for example 100,500,900"
    try:
        times = tuple(sorted({float(part) for part in text.split(",")}))
    except ValueError:
        reject("--timesteps", repr(text), "is not a list of numbers", way_out)
    if not all(0 <= t <= 1000 for t in times):
        reject("--timesteps", repr(text), "leaves the range of timesteps", way_out)
    return times


def check_numbers(args: argparse.Namespace) -> None:
    for key, least in (("images", 2), ("tokens", 3), ("maps", 1), ("batch", 1)):
        if getattr(args, key) < least:
            reject(f"--{key}", getattr(args, key), "is too small", f"choose {least} or more")
    if not 0 <= args.seed < 2**32:
        reject("--seed", args.seed, "must lie in [0, 2**32)", "choose such a number")


def names_of(paths: list[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    parts = [Path(os.path.realpath(path)).parts for path in paths]
    longest = max(map(len, parts))
    for length in range(1, longest + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise ConfigError("--compare: a model is named twice; name each once")


def look(args: argparse.Namespace, file: Path, name: str, plan: Any) -> Any:
    """Load a model, show it the images, and compute its numbers."""
    from promoe_ds.analysis.collect import observe, with_data
    from promoe_ds.analysis.summary import check_rank, summarise
    from promoe_ds.checkpoint.load_weights import load_ema
    from promoe_ds.data.codecs import open_codec
    from promoe_ds.sampling.job import codec_of_run

    device = ALONE.pick_device(args.device)
    model, config, step = load_ema(file, device)
    config = with_data(config, args.data)
    check_rank(config, args.subspace)
    vae = args.vae or config.data.vae
    codec = open_codec(vae, device, "--vae" if args.vae else "data.vae of the run") if vae else None
    if codec is not None and (found := codec_of_run(file)) is not None:
        codec.follow(found)
    return summarise(observe(model, config, step, name, plan, codec), args.subspace)


def analyze(argv: list[str]) -> None:
    args = parser().parse_args(argv)
    check_numbers(args)
    timesteps, paths = parse_timesteps(args.timesteps), [args.run or args.model, *args.compare]
    names = names_of(paths)
    if args.out is None and args.run is None:
        raise ConfigError("--out: --model has no run folder to write to; add --out DIR")
    from promoe_ds.analysis.collect import Plan  # late: --help needs no torch
    from promoe_ds.analysis.report import REPORT, check_folder, prepare_folder, recorded_scores, write_report
    from promoe_ds.checkpoint.load_weights import find_weights

    plan = Plan(args.images, timesteps, args.tokens, args.maps, args.batch, args.seed, args.precision)
    out = args.out or args.run / "analysis"
    check_folder(out)
    if args.run:
        recorded_scores(args.run)  # damage is told before the work
    options = ["--run" if args.run else "--model", *["--compare"] * len(args.compare)]
    weights = [find_weights(path, option) for path, option in zip(paths, options, strict=True)]
    if args.dry_run:
        for name, file in zip(names, weights, strict=True):
            print(f"{name}: {file}; {plan.images} images at {len(timesteps)} timesteps")
        print(f"would write {out / REPORT}")
        return
    with making(out):  # a mistake leaves nothing behind
        prepare_folder(out)
        summaries = [look(args, file, name, plan) for file, name in zip(weights, names, strict=True)]
    write_report(out, summaries, args.run, shlex.join(["launchers/analyze.py", *argv]))
    print(f"report: {out / REPORT}")


main, console = launcher(analyze)

if __name__ == "__main__":
    console()
