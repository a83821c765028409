#!/usr/bin/env python
"""The same run at every topology: losses, gradient norms and final EMA against one process without ZeRO.

    python benchmarks/topology_invariance.py [--steps 20] [--keep DIR]

Each row trains the recipe `tiny` with the real trainer in fp32 and is compared with its reference row. Rows of one
world size share a launch. Exit code 1 if a row is out of tolerance: losses 1e-5 and gradient norms 1e-4 relative, EMA
weights 1e-5 absolute.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, NoReturn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.common import ema_difference, page, read_log, table  # noqa: E402

GLOBAL_BATCH = 32
NO_CONTRASTIVE = "moe.router.contrastive_weight=0"


class Case(NamedTuple):
    world: int
    ep: int
    stage: int
    micro: int
    override: str = ""

    @property
    def name(self) -> str:
        return "-".join(map(str, self))

    @property
    def reference(self) -> Case:
        return Case(1, 1, 0, 32, self.override)


CASES = [
    Case(1, 1, 2, 32),
    Case(2, 1, 1, 16),
    Case(2, 2, 0, 16),
    Case(2, 2, 2, 16),
    Case(2, 2, 3, 16),
    Case(4, 2, 0, 8),
    Case(4, 2, 2, 8),
    Case(4, 4, 1, 8),
    Case(4, 2, 3, 8),
    # The routing contrastive loss is nonlinear in the micro-batch, so accumulation is compared without it.
    Case(2, 2, 2, 8, NO_CONTRASTIVE),
    Case(2, 2, 0, 8, NO_CONTRASTIVE),
    Case(2, 2, 1, 8, NO_CONTRASTIVE),
    Case(2, 2, 3, 8, NO_CONTRASTIVE),
]
REFERENCE = CASES[0].reference


class Deviation(NamedTuple):
    """Largest deviation from the reference over all steps, relative (loss, grad_norm); of the final EMA, absolute."""

    loss: float
    grad_norm: float
    ema: float

    def within(self) -> bool:
        return all(found <= limit for found, limit in zip(self, TOLERANCE, strict=True))


TOLERANCE = Deviation(1e-5, 1e-4, 1e-5)


def train_cases(folder: Path, steps: int) -> NoReturn:
    """Run in every process of a launch: train the cases of this world size one after the other, and end."""
    from promoe_ds.parallel import ds_config, topology
    from promoe_ds.recipes.load import load_config
    from promoe_ds.train.trainer import Trainer
    from promoe_ds.utils.ranks import Ranks

    ranks = Ranks.from_environment()
    for case in dict.fromkeys([*(case.reference for case in CASES), *CASES]):
        if case.world != ranks.world:
            continue
        config = load_config("tiny", [
            f"parallel.expert_parallel={case.ep}", f"train.micro_batch_size={case.micro}", f"train.steps={steps}",
            f"train.checkpoint_every={steps}", f"train.global_batch_size={GLOBAL_BATCH}",
            "parallel.timeout_minutes=5", *([case.override] if case.override else []),
        ])  # fmt: skip
        ds = ds_config.resolve(str(ROOT / f"ds_configs/zero{case.stage}.json"), config, ranks.world)
        trainer = Trainer(config, ds, folder / case.name, topology.Topology.of(ranks, case.ep))
        assert trainer.run() == 0
        trainer.close()
    topology.disconnect()  # together: the other ranks take one that ends alone for dead
    topology.leave(0)


def deviation(folder: Path, case: Case) -> Deviation:
    runs = folder / case.name, folder / case.reference.name
    log, reference = map(read_log, runs)
    assert [r["step"] for r in log] == [r["step"] for r in reference]

    def relative(key: str) -> float:
        return max(abs(a[key] - b[key]) / max(abs(b[key]), 1e-12) for a, b in zip(log, reference, strict=True))

    losses = [key for key in log[0] if key == "loss" or key.startswith("loss/")]
    if case.override:
        losses = ["loss", "loss/diffusion"]  # the unweighted contrastive term does depend on the micro-batch
    ema = ema_difference(*runs, log[-1]["step"])
    return Deviation(max(map(relative, losses)), relative("grad_norm"), ema)


def launch(world: int, words: list[str]) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}", "--"]
    done = subprocess.run([*torchrun, __file__, *words], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{words}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")


def measure(folder: Path, steps: int = 20, start: Callable[[int, list[str]], object] = launch) -> dict[Case, Deviation]:
    """Train every case under `folder` and return each one's deviation from its reference.

    Args:
        start: runs this script with some words in a number of processes.
    """
    for world in (1, 2, 4):
        start(world, ["--worker", "--steps", str(steps), "--keep", str(folder)])
    return {case: deviation(folder, case) for case in CASES}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep the runs in this folder")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        train_cases(args.keep, args.steps)
    with tempfile.TemporaryDirectory() as temporary:
        found = measure(args.keep or Path(temporary), args.steps)
    columns = ["world", "ep", "ZeRO", "micro-batch", "accumulation", "loss", "grad norm", "EMA", ""]
    rows = [[*case[:4], GLOBAL_BATCH // (case.world * case.micro), *(f"{value:.1e}" for value in d),
             "ok" if d.within() else "OUT"] for case, d in found.items()]  # fmt: skip
    method = (
        f"Recipe `tiny`, fp32, {args.steps} steps, global batch {GLOBAL_BATCH}; largest deviation from one process at "
        "ZeRO-0 (rows with accumulation: both without the contrastive loss)."
    )
    program = "benchmarks/topology_invariance.py"
    print(page("Topology invariance", program, sys.argv[1:], method, table(columns, rows)))
    return 0 if all(d.within() for d in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
