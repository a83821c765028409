#!/usr/bin/env python
"""The same run at every topology: losses, gradient norms and final EMA against one process without ZeRO.

    python benchmarks/topology_invariance.py [--steps 20] [--keep DIR]

Each row trains the recipe `tiny` with the real trainer in fp32 and is compared with its reference row. Rows of one
world size share a launch. Exit code 1 if a row is out of tolerance: losses 1e-5 and gradient norms 1e-4 relative, EMA
weights 1e-5 absolute.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.processes import run_to_end  # noqa: E402

TOLERANCE = {"loss": 1e-5, "grad_norm": 1e-4, "ema": 1e-5}


@dataclass(frozen=True)
class Case:
    world: int
    ep: int
    stage: int
    micro: int
    overrides: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return "-".join(map(str, (self.world, self.ep, self.stage, self.micro, *self.overrides)))


@dataclass(frozen=True)
class Deviation:
    """Largest relative deviation from the reference over all steps (loss, grad_norm); absolute of the final EMA."""

    loss: float
    grad_norm: float
    ema: float

    def within(self) -> bool:
        return all(getattr(self, key) <= limit for key, limit in TOLERANCE.items())


GLOBAL_BATCH = 32
WITHOUT_CONTRASTIVE = ("moe.router.contrastive_weight=0",)
REFERENCE = Case(1, 1, 0, 32)
REFERENCE_ACCUMULATION = Case(1, 1, 0, 32, WITHOUT_CONTRASTIVE)
CASES = {
    Case(1, 1, 2, 32): REFERENCE,
    Case(2, 1, 1, 16): REFERENCE,
    Case(2, 2, 0, 16): REFERENCE,
    Case(2, 2, 2, 16): REFERENCE,
    Case(2, 2, 3, 16): REFERENCE,
    Case(4, 2, 0, 8): REFERENCE,
    Case(4, 2, 2, 8): REFERENCE,
    Case(4, 4, 1, 8): REFERENCE,
    Case(4, 2, 3, 8): REFERENCE,
    # The routing contrastive loss is nonlinear in the micro-batch, so accumulation is compared without it.
    Case(2, 2, 2, 8, WITHOUT_CONTRASTIVE): REFERENCE_ACCUMULATION,
    Case(2, 2, 0, 8, WITHOUT_CONTRASTIVE): REFERENCE_ACCUMULATION,
    Case(2, 2, 1, 8, WITHOUT_CONTRASTIVE): REFERENCE_ACCUMULATION,
    Case(2, 2, 3, 8, WITHOUT_CONTRASTIVE): REFERENCE_ACCUMULATION,
}
"""row -> the row it must equal"""


def train_cases(folder: Path, steps: int, cases: list[Case]) -> None:
    """Run in every process of a launch: train the cases one after the other."""
    from promoe_ds.parallel import ds_config, topology
    from promoe_ds.recipes.load import load_config
    from promoe_ds.train.trainer import Trainer
    from promoe_ds.utils.ranks import Ranks

    for case in cases:
        config = load_config("tiny", [
            f"parallel.expert_parallel={case.ep}", f"train.micro_batch_size={case.micro}", f"train.steps={steps}",
            f"train.checkpoint_every={steps}", f"train.global_batch_size={GLOBAL_BATCH}", *case.overrides,
        ])  # fmt: skip
        ds = ds_config.resolve(str(ROOT / f"ds_configs/zero{case.stage}.json"), config, case.world)
        trainer = Trainer(config, ds, folder / case.name, topology.Topology.of(Ranks.from_environment(), case.ep))
        assert trainer.run() == 0
        trainer.close()
    topology.disconnect()
    topology.leave(0)


def launch(folder: Path, steps: int, world: int, cases: list[Case]) -> None:
    work = json.dumps([asdict(case) for case in cases])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}", __file__,
               "--worker", work, "--keep", str(folder), "--steps", str(steps)]  # fmt: skip
    done = run_to_end(command)
    if done.returncode:
        raise RuntimeError(f"world {world} failed:\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}")


def read(folder: Path, case: Case) -> tuple[list[dict], dict]:
    from safetensors.torch import load_file

    from promoe_ds.checkpoint.layout import newest

    lines = (folder / case.name / "metrics.jsonl").read_text().splitlines()
    last = newest(folder / case.name)
    assert last is not None, f"{case.name}: no checkpoint"
    return [json.loads(line) for line in lines], load_file(last / "ema.safetensors")


def deviation(folder: Path, case: Case, reference: Case) -> Deviation:
    (log, ema), (log0, ema0) = read(folder, case), read(folder, reference)
    assert [r["step"] for r in log] == [r["step"] for r in log0] and ema.keys() == ema0.keys()
    losses = [key for key in log0[0] if key == "loss" or key.startswith("loss/")]
    if case.overrides:
        losses = ["loss", "loss/diffusion"]  # the unweighted contrastive term does depend on the micro-batch
    relative = lambda key: max(abs(a[key] - b[key]) / max(abs(b[key]), 1e-12) for a, b in zip(log, log0, strict=True))  # noqa: E731
    worst = max(float((ema[key] - ema0[key]).abs().max()) for key in ema0)
    return Deviation(max(map(relative, losses)), relative("grad_norm"), worst)


def measure(folder: Path, steps: int = 20) -> dict[Case, Deviation]:
    """Train every case under `folder` and return each row's deviation from its reference."""
    every = [REFERENCE, REFERENCE_ACCUMULATION, *CASES]
    for world in sorted({case.world for case in every}):
        launch(folder, steps, world, [case for case in every if case.world == world])
    return {case: deviation(folder, case, reference) for case, reference in CASES.items()}


def table(rows: dict[Case, Deviation]) -> str:
    lines = ["| world | ep | ZeRO | micro-batch | accumulation | loss | grad norm | EMA | |", "|---" * 9 + "|"]
    for case, d in rows.items():
        accumulation = GLOBAL_BATCH // (case.world * case.micro)
        lines.append(
            f"| {case.world} | {case.ep} | {case.stage} | {case.micro} | {accumulation} | {d.loss:.1e} "
            f"| {d.grad_norm:.1e} | {d.ema:.1e} | {'ok' if d.within() else 'OUT'} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep the runs in this folder")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        cases = [Case(**{**case, "overrides": tuple(case["overrides"])}) for case in json.loads(args.worker)]
        train_cases(args.keep, args.steps, cases)
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        rows = measure(args.keep or Path(temporary), args.steps)
    print(f"recipe tiny, fp32, {args.steps} steps, global batch {GLOBAL_BATCH}; largest deviation from (1, 1, 0)")
    print(table(rows))
    return 0 if all(d.within() for d in rows.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
