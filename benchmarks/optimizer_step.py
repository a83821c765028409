#!/usr/bin/env python
"""Clipping, AdamW and EMA on a CPU: one after the other, and in one pass (promoe_ds/parallel/one_pass.py).

examples:
  OMP_NUM_THREADS=1 python benchmarks/optimizer_step.py
  python benchmarks/optimizer_step.py --recipe imagenet256_promoe_b --rounds 5

Both take turns on the trained parameters of a recipe: as ZeRO stage 0 holds them, and as the flat tensor of stages
1 and 2. The gradient norm, which both need first, is left out.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.common import page, spread, table  # noqa: E402
from benchmarks.interleaved import Clock, interleaved  # noqa: E402
from promoe_ds.config.errors import reject  # noqa: E402
from promoe_ds.models.init import build  # noqa: E402
from promoe_ds.parallel import one_pass  # noqa: E402
from promoe_ds.parallel.adamw_ema import AdamWithEMA  # noqa: E402
from promoe_ds.recipes.load import load_config  # noqa: E402
from promoe_ds.utils.command_line import Parser, check_positive, guarded  # noqa: E402

CLIP = 0.7
BYTES = {"apart": 8 + 28 + 12, "one pass": 36}
"""read and written per parameter: clipping 8, AdamW 28, EMA 12; or five tensors read and four written"""


class Step:
    """One of the systems, with weights, gradients and states of its own."""

    def __init__(self, shapes: list[torch.Size], args: argparse.Namespace, update: one_pass.Update | None):
        self.params = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
        self.adam = AdamWithEMA(self.params, load_config(args.recipe).optimizer, update)
        self.adam.clip = lambda: CLIP
        self.grads = [torch.randn(shape) for shape in shapes]
        for p, g in zip(self.params, self.grads, strict=True):
            p.grad = g

    def __call__(self, clock: Clock) -> None:
        clock.mark()
        if self.adam.update is None:
            torch._foreach_mul_(self.grads, torch.tensor(CLIP))
        self.adam.step()
        clock.mark()


def measure(args: argparse.Namespace, shapes: list[torch.Size], update: one_pass.Update) -> list[str]:
    """Cells of a row: milliseconds of both, and the ratio of each round."""
    torch.manual_seed(0)
    systems = {"apart": Step(shapes, args, None), "one pass": Step(shapes, args, update)}
    found = interleaved(systems, torch.device("cpu"), args.rounds)
    apart, together = ([1000 * sum(r) for r in found[name]["rounds"]] for name in systems)
    return [spread(apart), spread(together), spread([y / x for x, y in zip(apart, together, strict=True)], ".2f")]


def run(words: list[str]) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="imagenet256_promoe_s")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the page there as well")
    args = parser.parse_args(words)
    check_positive(args, "rounds")
    update = one_pass.compiled()
    if update is None:
        reject("CXX", "g++", "the compiler finds no vector instructions", "install g++, or wait for a calmer machine")
    model = build(load_config(args.recipe))  # on the meta device: only shapes
    shapes = [p.shape for p in model.parameters() if p.requires_grad]
    total = sum(shape.numel() for shape in shapes)
    rows = [
        [name, *measure(args, layout, update)]
        for name, layout in ((f"{len(shapes)} tensors", shapes), ("one flat tensor", [torch.Size([total])]))
    ]
    columns = ["parameters held as", "apart, ms", "one pass, ms", "ratio"]
    text = page(
        f"The optimizer in one pass: {args.recipe}, {total / 1e6:.1f} million parameters",
        "benchmarks/optimizer_step.py",
        words,
        f"{BYTES['apart']} bytes per parameter apart, {BYTES['one pass']} in one pass. Median (lowest to highest) of "
        f"{args.rounds} rounds in turns; the ratio is of pairs.",
        table(columns, rows),
    )
    print(text)
    if args.out:
        args.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(guarded(run, sys.argv[1:]))
