"""The stages by name, and their time on a GPU. `python -m benchmarks.gpu.stages NAME --out DIR` runs one alone."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from typing import NamedTuple

from promoe_ds.utils.command_line import Parser, launcher


class Times(NamedTuple):
    module: str
    """of this package"""
    function: str
    seconds: float
    """at most"""
    beside: str | None = None
    """the stage that runs at the same time, or with which others do: nothing is timed then"""


STAGES = {
    "ceilings": Times("ceilings", "run", 40),
    "warm": Times("speed", "warm", 150, "smoke"),
    "engine": Times("engine", "run", 150, "smoke"),
    "smoke": Times("smoke", "run", 150),
    "speed": Times("speed", "run", 255),
    "profile": Times("profiles", "run", 55),
    "layer": Times("layer", "run", 50),
}
MARGIN = 10.0
"""seconds before its end after which a stage begins nothing"""


def run(words: list[str]) -> None:
    import torch

    from benchmarks.gpu.figures import Stage

    parser = Parser(description=__doc__)
    parser.add_argument("name", choices=STAGES)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--dry", action="store_true", help="tiny models on the CPU")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin nothing after them")
    args: argparse.Namespace = parser.parse_args(words)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    stage = Stage(args.name, args.out, args.dry, args.seconds)
    getattr(importlib.import_module(f"benchmarks.gpu.{STAGES[args.name].module}"), STAGES[args.name].function)(stage)


if __name__ == "__main__":
    _, console = launcher(run)
    console()
