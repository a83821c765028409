"""Score sample sets by ADM's protocol (FID, sFID, IS, precision, recall), or on other features; make references."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from anywhere, installed or not
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback of Ctrl-C while libraries load

from promoe_ds.config.errors import reject
from promoe_ds.evaluation.collect import SUFFIX, FeatureSet, check_network, collect, save_features
from promoe_ds.evaluation.dinov2 import find_dinov2
from promoe_ds.evaluation.evaluate import Evaluator, check_shape, score_all
from promoe_ds.evaluation.extractors import BATCH, EXTRACTORS, load_extractor, usual_features
from promoe_ds.evaluation.images import picture_folders
from promoe_ds.evaluation.inception import find_weights
from promoe_ds.evaluation.reference import KEEP, REFERENCES, Source, find_reference, reference_features
from promoe_ds.evaluation.report import check_output, format_table, notes, write_metrics
from promoe_ds.evaluation.samples import Samples, SampleSet, find_samples, load_samples, run_samples, unfinished
from promoe_ds.parallel.rendezvous import joined
from promoe_ds.utils.command_line import Parser, check_positive, launcher
from promoe_ds.utils.files import left_out_words
from promoe_ds.utils.ranks import Ranks

READS = {"ref": "IMAGES", "features": "SAMPLES"}
"""commands that write a features file, and what they read"""

EXAMPLES = """examples:
  score what launchers/sample.py wrote for a run of the demo; writes runs/digits/metrics.json
    python launchers/evaluate.py --run runs/digits
  ImageNet 256x256 by ADM's protocol: FID, sFID, IS, precision, recall of every guidance scale of a run, on 8 GPUs
    torchrun --nproc-per-node 8 -- launchers/evaluate.py --run runs/imagenet --ref VIRTUAL_imagenet256_labeled.npz \\
        --inception-weights pt_inception-2015-12-05-6726825d.pth
  compare sample sets: files, folders of pictures, folders with cfg*/samples.npz
    python launchers/evaluate.py out/a/samples.npz out/b other/pngs --ref digits --out metrics.json
  a reference from any images (once), a features file from samples, and scores on a network of one's own
    python launchers/evaluate.py ref photos/ --size 256 --out photos.safetensors
    python launchers/evaluate.py features out/a --out a.safetensors
    python launchers/evaluate.py a.safetensors --ref photos.safetensors
    python launchers/evaluate.py out/a --ref photos/ --features dinov2.onnx

An .npz holds arr_0 (uint8 images, N x H x W x C) and maybe arr_1 (integer labels, N). docs/evaluation.md says what the
numbers mean and where weights and references come from; nothing is downloaded. Exit codes: 0 done, 2 user error.
"""


def _extraction(parser: argparse.ArgumentParser) -> None:
    """Options of every command that runs a network."""
    names = f"{', '.join(EXTRACTORS)}, or a .onnx or TorchScript .pt file, reported as FD[name]"
    names += " (default: digits-cnn for digits, else inception)"
    parser.add_argument("--features", metavar="NAME", help=names)
    where = "(default: $INCEPTION_WEIGHTS, else torch hub's folder)"
    parser.add_argument("--inception-weights", type=Path, metavar="PATH", help=where)
    where = "of --features dinov2 (default: $DINOV2_WEIGHTS, else torch hub's folder)"
    parser.add_argument("--dinov2-weights", type=Path, metavar="PATH", help=where)
    parser.add_argument("--device", default="auto", metavar="D", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--batch", type=int, default=BATCH, metavar="N", help=f"images per forward (default: {BATCH})")


def _parser() -> Parser:
    parser = Parser(description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = ".npz, .safetensors, or a folder of sets or pictures"
    parser.add_argument("samples", nargs="*", type=Path, metavar="SAMPLES", help=what)
    parser.add_argument("--run", type=Path, metavar="DIR", help="score every set below DIR/samples")
    files = "an .npz of ADM, MAR or JiT, a .pkl of edm2, a file made by `ref`"
    what = f"{', '.join(REFERENCES)}, {files}, or a folder (default: digits)"
    parser.add_argument("--ref", default="digits", metavar="REF", help=what)
    _extraction(parser)
    what = "of precision and recall; fp16 rounds as ADM's evaluator (default: fp32)"
    parser.add_argument("--distances", choices=("fp32", "fp16"), default="fp32", help=what)
    parser.add_argument("--out", type=Path, metavar="FILE", help="scores as JSON (default of --run: DIR/metrics.json)")
    parser.add_argument("--dry-run", action="store_true", help="look for samples, reference and weights, score nothing")
    return parser


def _tool_parser(command: str) -> Parser:
    """`ref IMAGES --out FILE` and `features SAMPLES --out FILE`."""
    parser = Parser(prog=f"evaluate.py {command}", description="write a features file")
    parser.add_argument("images", metavar=READS[command], help=".npz or folder of pictures")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.safetensors")
    _extraction(parser)
    if command == "ref":
        parser.add_argument("--size", type=int, metavar="S", help="crop pictures to the centre, S x S, as in ADM")
        parser.add_argument(
            "--keep", type=int, default=KEEP, metavar="N", help=f"features for precision, recall ({KEEP})"
        )
    return parser


def _features(args: argparse.Namespace, reference: str, found: Sequence[tuple[str, Path]] = ()) -> str:
    """The extractor's name, having made sure that reference and weights are there before images are read.

    Args:
        found: (option, path); features files among them must be the extractor's.
    """
    if not Path(reference).exists():
        find_reference(reference)
    name = args.features or usual_features(reference)
    for option, path in found:
        if path.suffix == SUFFIX and path.is_file():
            check_network(path, name, option)
    if name == "inception":
        find_weights(args.inception_weights)
    if name == "dinov2":
        find_dinov2(args.dinov2_weights)
    return name


def _read_sets(args: argparse.Namespace) -> list[Samples]:
    if args.run is not None and args.samples:
        reject("--run", args.run, "SAMPLES were given as well", "give one or the other")
    if args.run is not None:
        return run_samples(args.run)
    if not args.samples:
        reject("SAMPLES", "(none)", "nothing to score", "name an .npz or a folder, or use --run DIR")
    return [load_samples(path) for argument in args.samples for path in find_samples(argument)]


def _say_left_out(*sets: str) -> None:
    """A line on stderr for each folder in which names are left out."""
    for name in dict.fromkeys(sets):
        if name not in REFERENCES and Path(name).is_dir():
            if count := sum(left_out for *_, left_out in picture_folders(Path(name), "images")):
                print(f"note: {name}: {left_out_words(count)}", file=sys.stderr)


def score(argv: Sequence[str], ranks: Ranks) -> None:
    """Parse, check everything, score, print, write. Raises `ConfigError` before the output file is touched."""
    args = _parser().parse_args(argv)
    check_positive(args, "batch")
    files = [("--ref", Path(args.ref)), *(("SAMPLES", path) for path in args.samples)]
    features, device = _features(args, args.ref, files), ranks.pick_device(args.device)
    sets = _read_sets(args)
    if args.run is not None and ranks.rank == 0 and (begun := unfinished(args.run)):
        folders = ", ".join(map(str, begun))
        print(f"note: not finished, and left out: {folders}; launchers/sample.py finishes them", file=sys.stderr)
    if ranks.rank == 0:
        _say_left_out(*(samples.name for samples in sets), args.ref)
    out = args.run / "metrics.json" if args.run is not None and args.out is None else args.out
    if out is not None:
        check_output(out)
    if args.dry_run:
        return
    run_by: dict[str, Any] = {"device": device, "batch": args.batch, "ranks": ranks, "progress": True}
    weights: dict[str, Any] = {"weights": args.inception_weights, "dinov2_weights": args.dinov2_weights}
    evaluator = Evaluator(features, args.ref, **weights, distances=args.distances, **run_by)
    with joined(ranks):
        scores = score_all(evaluator, sets)
    if not scores:
        return
    if evaluator.extractor.accuracy is not None:
        print(f"{evaluator.extractor.name}: accuracy on held-out real images {evaluator.extractor.accuracy:.4f}")
    print("\n".join([format_table(scores), *notes(scores)]))
    if out is not None:
        write_metrics(out, scores)
        print(f"wrote {out}")


def make_features(command: str, argv: Sequence[str], ranks: Ranks) -> None:
    """`ref` and `features`: extract, write one features file. Raises `ConfigError` before it is touched."""
    args, is_reference = _tool_parser(command).parse_args(argv), command == "ref"
    check_positive(args, "batch", *(("keep", "size") if is_reference else ()))
    files = [("IMAGES", Path(args.images))] if is_reference else []
    name, device = _features(args, args.images, files), ranks.pick_device(args.device)
    check_output(args.out, ".safetensors", "features are safetensors")
    source: Source | SampleSet
    if is_reference:
        source = find_reference(args.images, "IMAGES", args.size)
        images = source.images
    else:
        source = images = _one_set(args.images)
    weights: dict[str, Any] = {"weights": args.inception_weights, "dinov2_weights": args.dinov2_weights}
    extractor = load_extractor(name, **weights, device=device, batch=args.batch)
    if images is not None:
        check_shape(images, extractor, READS[command])
    if ranks.rank == 0:
        _say_left_out(source.name)
    with joined(ranks):
        if isinstance(source, Source):
            found = reference_features(source, extractor, keep=args.keep, ranks=ranks, progress=True)
        else:
            found = collect(extractor, source, sampling=source.sampling, ranks=ranks, progress=True)
    if found is None:
        return
    try:
        save_features(args.out, found)
    except OSError as error:
        reject("--out", args.out, f"cannot be written ({error.strerror})", "choose another file")
    kept = 0 if found.features_Nd is None else len(found.features_Nd)
    count = "statistics" if found.num is None else f"{found.num} images"
    print(f"wrote {args.out}: {count}, {kept} rows of features of {found.extractor}, sha256 {found.sha256[:16]}")


def _one_set(argument: str) -> SampleSet:
    paths = find_samples(Path(argument))
    if len(paths) > 1:
        reject("SAMPLES", argument, f"holds {len(paths)} sample sets", f"name one of them, such as {paths[0]}")
    samples = load_samples(paths[0])
    if isinstance(samples, FeatureSet):
        reject("SAMPLES", argument, "is a features file already", "name images")
    return samples


def run(argv: Sequence[str]) -> None:
    """`ref ...`, `features ...`, or scoring."""
    ranks = Ranks.from_environment()
    if argv and argv[0] in READS:
        make_features(argv[0], argv[1:], ranks)
    else:
        score(argv, ranks)


main, console = launcher(run)

if __name__ == "__main__":
    console()
