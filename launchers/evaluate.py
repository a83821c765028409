"""Score sample sets: label agreement and Frechet distance to real images."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from anywhere, installed or not

from evaluation.evaluate import (  # noqa: E402
    Evaluator,
    SampleSet,
    check_output,
    find_samples,
    format_table,
    load_samples,
    run_samples,
    write_metrics,
)
from evaluation.features import EXTRACTORS  # noqa: E402
from evaluation.reference import REFERENCES  # noqa: E402
from promoe_ds.config import ConfigError, reject  # noqa: E402

EXAMPLES = """examples:
  score what launchers/sample.py wrote for a run; writes runs/digits/metrics.json
    python launchers/evaluate.py --run runs/digits
  compare sample sets: a file, a folder with samples.npz, a folder with cfg*/samples.npz
    python launchers/evaluate.py out/a/samples.npz out/b --ref digits --out metrics.json

An .npz holds arr_0 (uint8 images, N x H x W x C) and arr_1 (integer labels, N). Exit codes: 0 done, 2 user error.
"""


class _Parser(argparse.ArgumentParser):
    """Reports a bad command line in the same single line as every other mistake."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see {Path(self.prog).name} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("samples", nargs="*", type=Path, metavar="SAMPLES", help=".npz, or a folder holding some")
    parser.add_argument(
        "--run", type=Path, metavar="DIR", help="every samples.npz below DIR/samples; --out becomes DIR/metrics.json"
    )
    parser.add_argument(
        "--ref", default="digits", metavar="NAME", help=f"reference set: {', '.join(REFERENCES)} (default: %(default)s)"
    )
    parser.add_argument(
        "--features",
        default="digits-cnn",
        metavar="NAME",
        help=f"feature extractor: {', '.join(EXTRACTORS)} (default: %(default)s)",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the scores as JSON")
    return parser


def _read_sets(args: argparse.Namespace) -> list[SampleSet]:
    if args.run is not None and args.samples:
        reject("--run", args.run, "SAMPLES were given as well", "give one or the other")
    if args.run is not None:
        return run_samples(args.run)
    if not args.samples:
        reject("SAMPLES", "(none)", "nothing to score", "name an .npz or a folder, or use --run DIR")
    return [load_samples(path) for argument in args.samples for path in find_samples(argument)]


def run(argv: Sequence[str] | None) -> None:
    """Parse, load everything, score, print, write. Raises `ConfigError` before the output file is touched."""
    args = _parser().parse_args(argv)
    sets = _read_sets(args)
    out = args.run / "metrics.json" if args.run is not None and args.out is None else args.out
    if out is not None:
        check_output(out)
    evaluator = Evaluator(args.features, args.ref)
    for samples in sets:
        evaluator.check(samples)
    if evaluator.accuracy is not None:
        print(f"{evaluator.extractor.name}: accuracy on held-out real images {evaluator.accuracy:.4f}")
    scores = [evaluator.score(samples) for samples in sets]
    print(format_table(scores))
    if out is not None:
        write_metrics(out, scores)
        print(f"wrote {out}")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 2 for a user's mistake, told in one line on stderr."""
    try:
        run(argv)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
