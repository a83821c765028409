#!/usr/bin/env python
"""Bytes that DeepSpeed reads and writes of gradients on one rank, between autograd and the update.

examples:
  python benchmarks/gradient_copies.py
  python benchmarks/gradient_copies.py --stage 0,1,2 --recipe imagenet256_promoe_s model.depth=2 --own

Training steps of a recipe through the engine, with the operators counted as they run: those of the backward pass and
the update that autograd alone does not call, without clipping, AdamW and EMA. --own counts DeepSpeed's own way, without
what `parallel/engine.py` leaves out on one rank.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks.common import integers, page, table  # noqa: E402
from benchmarks.count_eager import Traffic  # noqa: E402
from promoe_ds.parallel import ds_config, engine, topology  # noqa: E402
from promoe_ds.recipes.load import load_config  # noqa: E402
from promoe_ds.train.trainer import Trainer  # noqa: E402
from promoe_ds.utils.command_line import Parser, guarded  # noqa: E402
from promoe_ds.utils.ranks import Ranks  # noqa: E402

OURS = {"_leave_out_copies": None, "_norm_in_one_pass": None, "_cast_by_buckets": []}
"""what the engine does to spare copies, and what each returns to spare none"""
UPDATE = ("_foreach", "_fused")
"""what clipping, AdamW and EMA are made of"""


def count(recipe: str, stage: int, overrides: list[str]) -> tuple[Counter[str], int, list[float]]:
    """Of one step: bytes by operator besides those of the same backward pass by autograd alone; trained parameters;
    losses of the steps."""
    torch.manual_seed(0)
    config = load_config(recipe, ["train.steps=2", "train.log_every=1", "data.workers=0", *overrides])
    here = topology.Topology.of(Ranks.from_environment(), 1)
    ds = ds_config.resolve(f"zero{stage}", config, here.world)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(config, ds, Path(folder), here)
        it = trainer.engine
        parameters = sum(p.numel() for p in it.params.values())
        m = config.model
        x, t = torch.randn(4, m.channels, m.image_size, m.image_size), torch.rand(4) * 1000
        goal = torch.randn(4, m.out_channels, m.image_size, m.image_size)
        y, row = torch.arange(4) % m.num_classes, torch.arange(4)

        losses, found = [], Counter[str]()
        for _ in range(2):
            it.engine.train()
            with it.accumulation():
                total = it(x, t, y, row).prediction.sub(goal).square().mean()
                losses.append(float(total))
                with Traffic() as backward:
                    it.backward(total)
            with Traffic() as update:
                norm = it.clip()
                it.step(None if norm is None else float(norm), 1e-4)
            module = it.engine.module
            with torch.autocast("cpu", torch.bfloat16, enabled=config.train.precision == "bf16_autocast"):
                total = type(module).forward(module, x, t, y, row).prediction.sub(goal).square().mean()
            with Traffic() as alone:
                torch.autograd.grad(total, [p for p in it.params.values()], allow_unused=True)
            found = Counter[str]()
            for traffic, sign in ((backward, 1), (update, 1), (alone, -1)):
                for (_, name), size in traffic.bytes.items():
                    found[name] += sign * size
        trainer.close()
    return found, parameters, losses


def run(words: list[str]) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="digits")
    parser.add_argument("--stage", type=integers, default=[0, 1, 2], metavar="0,1,2")
    parser.add_argument("--own", action="store_true", help="DeepSpeed's own way")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the page there as well")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_intermixed_args(words)
    rows = []
    for stage in args.stage:
        with ExitStack() as stack:
            for name, none in OURS.items() if args.own else ():
                stack.enter_context(mock.patch.object(engine, name, lambda *_, none=none: none))
            found, parameters, losses = count(args.recipe, stage, args.overrides)
        copies = {name: size / parameters for name, size in found.items() if not name.startswith(UPDATE)}
        named = ", ".join(
            f"{name} {size:.1f}" for name, size in sorted(copies.items(), key=lambda e: -e[1]) if size > 0.2
        )
        rows.append([stage, f"{sum(copies.values()):.1f}", named, *(f"{loss:.9g}" for loss in losses)])
    columns = ["ZeRO", "bytes per parameter", "by operator", "loss", "after an update"]
    text = page("Copies of gradients on one rank", "benchmarks/gradient_copies.py", words, table(columns, rows))
    print(text)
    if args.out:
        args.out.write_text(text, encoding="utf-8")
    topology.disconnect()


if __name__ == "__main__":
    sys.exit(guarded(run, sys.argv[1:]))
