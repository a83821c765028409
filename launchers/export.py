#!/usr/bin/env python
"""Write a model for others: safetensors with config.json, a diffusers pipeline, or the official key layout."""

from __future__ import annotations

import argparse
import math
import signal
import sys
from pathlib import Path
from typing import Any

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback of Ctrl-C while libraries load

from promoe_ds.checkpoint.layout import bytes_of, size
from promoe_ds.checkpoint.load_weights import find_weights, header
from promoe_ds.config.errors import reject
from promoe_ds.config.schema import Config
from promoe_ds.costs.flops import count_parameters
from promoe_ds.formats import diffusers_export, official, weights
from promoe_ds.formats.card import score_rows
from promoe_ds.sampling.job import codec_of_run, run_of
from promoe_ds.utils.command_line import Parser, launcher
from promoe_ds.utils.files import read_json
from promoe_ds.utils.outputs import check_new

EXAMPLES = """examples:
  python launchers/export.py --run runs/digits --out digits_ema                 model.safetensors, config.json, card
  python launchers/export.py --run runs/digits --out digits_bf16 --dtype bf16 --weights raw
  python launchers/export.py --run runs/digits --out digits_ema --ema 0.999     another EMA that the run kept
  python launchers/export.py --run runs/imagenet256_promoe_b --out promoe_b --format diffusers --vae sd-vae-ft-mse
  python launchers/export.py --model promoe_b_imported --out ckpt_step_500000.pth --format official
  python launchers/export.py --run runs/digits --out digits_ema --dry-run       what would be written

Read them by promoe_ds.load_model(DIR), launchers/sample.py --model DIR, train.init=DIR, or
DiffusionPipeline.from_pretrained(DIR, custom_pipeline=DIR, trust_remote_code=True). docs/formats.md describes each.
Nothing is overwritten. Exit codes: 0 done, 2 user error.
"""


def parser() -> Parser:
    p = Parser(description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = p.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", type=Path, metavar="DIR", help="run folder: its newest complete checkpoint")
    source.add_argument("--model", type=Path, metavar="PATH", help="a checkpoint, or an imported or exported folder")
    p.add_argument("--out", type=Path, required=True, metavar="PATH", help="what does not exist yet")
    p.add_argument("--format", choices=("safetensors", "diffusers", "official"), default="safetensors")
    p.add_argument("--weights", choices=("ema", "raw"), help="(default: ema; official holds both)")
    p.add_argument("--ema", type=float, metavar="DECAY", help="which EMA, of those that optimizer.ema_more kept")
    p.add_argument("--dtype", choices=("fp32", "bf16"), help="bf16: half the size, rounded (default fp32)")
    p.add_argument("--shard-gb", type=float, default=5.0, metavar="GB", help="10^9 bytes of a file at most (default 5)")
    p.add_argument("--vae", type=Path, metavar="DIR", help="diffusers: autoencoder to copy into the pipeline")
    p.add_argument("--metrics", type=Path, metavar="FILE", help="scores of the model card (default RUN/metrics.json)")
    p.add_argument("--dry-run", action="store_true", help="say what would be written")
    return p


def check(args: argparse.Namespace) -> None:
    """Everything that can be said before a tensor is read; raises ConfigError."""
    check_new(args.out)
    if args.vae and args.format != "diffusers":
        reject("--vae", args.vae, "belongs to --format diffusers", "leave it out")
    if args.vae:
        diffusers_export.vae_class(args.vae)
    if args.format == "official":
        for key in ("dtype", "weights", "ema"):
            if getattr(args, key):
                reject(f"--{key}", getattr(args, key), "official files are fp32 with both weights", "leave it out")
    if args.ema is not None and args.weights == "raw":
        reject("--ema", args.ema, "raw weights are no average", "leave one of them out")
    if not (math.isfinite(args.shard_gb) and args.shard_gb > 0):
        reject("--shard-gb", args.shard_gb, "must be positive", "choose a number above 0")


def metrics_of(args: argparse.Namespace, file: Path, config: Config, step: int) -> dict[str, Any] | None:
    """Scores for the model card: of --metrics, or those that stand in the run folder."""
    run = run_of(file)
    others = args.weights == "raw" or args.ema not in (None, config.optimizer.ema_decay)
    path = args.metrics or (run / "metrics.json" if run and not others else None)  # a run's are of its first EMA
    if path is None or not (args.metrics or path.is_file()):
        return None
    try:
        tree = read_json(path)
        score_rows(tree, step)
        return tree
    except (OSError, ValueError, TypeError, AttributeError) as error:
        reject("--metrics", path, f"holds no scores ({error})", "name a metrics.json of launchers/evaluate.py")


def export(argv: list[str]) -> None:
    args = parser().parse_args(argv)
    check(args)
    path, option = (args.run, "--run") if args.run else (args.model, "--model")
    file = find_weights(path, option)
    found = weights.held(file, option)
    source, dtype, limit = args.weights or found[0], args.dtype or "fp32", int(args.shard_gb * 1e9)
    config, step = header(file)
    if args.ema is not None:
        weights.average_of(config, args.ema, "--ema")
    metrics = metrics_of(args, file, config, step)
    count = count_parameters(config).total
    text = f"{config.name}, step {step}, {count:,} parameters, {source if args.format != 'official' else 'ema and raw'}"
    if args.format == "official":
        official.check_layout(config)
    if args.dry_run:
        about = size(count * (8 if args.format == "official" else 4 if dtype == "fp32" else 2))
        print(f"would write {args.out} ({args.format}, {dtype}): {text}; about {about}")
        return
    if args.format == "official":
        ema = weights.load(file, found[0], option)
        official.write_official(ema, weights.load(file, "raw", option) if len(found) > 1 else ema, args.out)
    elif args.format == "diffusers":
        model = weights.load(file, source, option, args.ema)
        diffusers_export.write_diffusers(model, args.out, dtype, args.vae, limit, metrics, codec_of_run(file))
    else:
        weights.write(weights.load(file, source, option, args.ema), args.out, dtype, limit, metrics)
    written = args.out.stat().st_size if args.out.is_file() else sum(map(bytes_of, [args.out, *args.out.glob("*/")]))
    print(f"{args.out}: {text}; {size(written)}")


main, console = launcher(export)

if __name__ == "__main__":
    console()
