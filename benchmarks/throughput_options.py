"""The command line of throughput.py: what is measured, and mistakes in one line before anything is."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from promoe_ds.config.schema import reject
from promoe_ds.utils.command_line import Parser, check_positive

CHOICES = {
    "section": ("counts", "step", "layer", "sampling"),
    "sizes": ("s", "b", "l", "xl"),
    "precision": ("fp32", "bf16"),
    "routing": ("learned", "uniform", "skewed"),
}


def _list_of(*choices: str) -> Callable[[str], list[str]]:
    def words(text: str) -> list[str]:
        found = text.split(",")
        unknown = [word for word in found if word not in choices]
        if unknown:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(choices)}")
        return found

    return words


def _numbers(text: str) -> list[int]:
    try:
        found = [int(word) for word in text.split(",")]
    except ValueError:
        found = [0]
    if min(found) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers of 1 or more")
    return found


def arguments(description: str, words: Sequence[str]) -> argparse.Namespace:
    """Options with the defaults of this machine. Raises `ConfigError`."""
    gpu = torch.cuda.is_available()
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (
        ("section", CHOICES["section"]),
        ("sizes", CHOICES["sizes"] if gpu else ("s",)),
        ("precision", ("bf16",) if gpu else ("fp32",)),
        ("routing", CHOICES["routing"]),
    ):
        help = f"of {','.join(CHOICES[name])}; default {','.join(default)}"
        parser.add_argument(f"--{name}", type=_list_of(*CHOICES[name]), default=list(default), help=help)
    micro = [64, 8, 32, 128] if gpu else [8]
    parser.add_argument("--micro", type=_numbers, default=micro, help="images; all but the first at the end sizes only")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no point after them")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    parser.add_argument("--sample-batch", type=int, default=64 if gpu else 2)
    parser.add_argument("--sample-steps", type=int, default=4 if gpu else 1)
    parser.add_argument("--out", type=Path, help="folder of the figures; default runs/throughput_cpu or _gpu")
    parser.add_argument("--page", type=Path, help="the table, also printed; default page.md in that folder")
    parser.add_argument("--fresh", action="store_true", help="forget earlier figures of these sections")
    parser.add_argument("--table", action="store_true", help="measure nothing")
    args = parser.parse_args(words)
    check_positive(args, "rounds", "threads", "sample_batch", "sample_steps")
    args.device = torch.device("cuda", 0) if gpu else torch.device("cpu")
    args.out = args.out or Path("runs/throughput_gpu" if gpu else "runs/throughput_cpu")
    args.page = args.page or args.out / "page.md"
    if args.out.exists() and not args.out.is_dir():
        reject("--out", args.out, "is not a folder", "choose another")
    if args.page.is_dir() or (args.page.parent != args.out and not args.page.parent.is_dir()):
        reject("--page", args.page, "is a folder, or lies in none", "name a file in a folder that is there")
    return args
