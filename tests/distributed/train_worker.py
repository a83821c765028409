"""Run by tests of this folder under torchrun: many short training runs in one launch, with the real trainer."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from deepspeed.utils import safe_get_full_optimizer_state

from promoe_ds.models import compiled
from promoe_ds.parallel import ds_config, engine, one_pass, topology
from promoe_ds.parallel.expert_parallel import local_part
from promoe_ds.recipes.load import load_config
from promoe_ds.train.trainer import Trainer, TrainingStopped
from promoe_ds.utils.ranks import Ranks
from tests.distributed.third_batch import ThirdBatch
from tests.moe import example_router

ROOT = Path(__file__).resolve().parents[2]
assert example_router.HashRouter, "imported to register CONTRIBUTING's example"


def make(folder: Path, ds: str, *overrides: str) -> Trainer:
    """`ds` is a ds_config or the name of a shipped one and, after a blank, a recipe other than `tiny`."""
    ds, _, recipe = ds.partition(" ")
    config = load_config(
        recipe or "tiny", ["parallel.expert_parallel=2", "train.steps=6", "train.checkpoint_every=6", *overrides]
    )
    here = topology.Topology.of(Ranks.from_environment(), config.parallel.expert_parallel)
    return Trainer(config, ds_config.resolve(ds, config, here.world), folder, here)


def poisoned(drawn: Any) -> Any:
    """With images that are no numbers."""
    x, label = drawn
    return x * float("nan"), label


def explode(trainer: Trainer) -> None:
    """The loss stays finite, but on rank 1 the gradient of one weight of the third step (and its repetition) does not.

    Called once a forward and backward: calls 3 and 4.
    """
    calls = 0

    def hook(gradient: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return gradient * float("inf") if calls in (3, 4) and trainer.topology.rank == 1 else gradient

    dict(trainer.model.named_parameters())["blocks.2.attn.proj.weight"].register_hook(hook)


def train_badly(folder: Path, what: str, ds: str, *overrides: str) -> None:
    trainer = make(folder, ds, *overrides)
    if what == "data":
        if trainer.topology.rank == 1:
            trainer.dataset = ThirdBatch(trainer.dataset, poisoned)  # type: ignore[assignment]
    elif what == "gradient":
        explode(trainer)
    try:
        trainer.run()
    except TrainingStopped as error:
        if trainer.topology.rank == 0:
            print(f"{folder.name}: {error}", flush=True)
    trainer.close()


def forward_twice(trainer: Trainer) -> None:
    """Before each backward pass, as an objective of somebody's own may."""
    loss: Any = trainer.objective.loss

    def twice(forward: Any, z: torch.Tensor, *more: torch.Tensor) -> Any:
        (output, first), (_, second) = (loss(forward, x, *more) for x in (z, z.flip(0)))
        return output, {name: first[name] + second[name] / 3 for name in first}

    trainer.objective.loss = twice  # type: ignore[method-assign]


def same_buffers(trainer: Trainer) -> None:
    """What routers learn without gradients is equal on every rank, to the bit."""
    mine = {name: buffer.cpu() for name, buffer in trainer.model.named_buffers()}
    for theirs in trainer.topology.gather(mine):
        assert all(torch.equal(buffer, theirs[name]) for name, buffer in mine.items())


def same_states(trainer: Trainer) -> None:
    """What `read` returns, in collectives of a few parameters or of all, is what DeepSpeed puts together one by one."""
    trainer.engine.relink()
    for bucket in (1, 10_000, engine.BUCKET):
        engine.BUCKET = bucket
        found = dict(trainer.engine.read("ema"))
        assert found.keys() == trainer.engine.params.keys()
        for name, p in trainer.engine.params.items():
            ours = safe_get_full_optimizer_state(p, "ema")
            assert ours is not None and torch.equal(local_part(p, found[name], trainer.topology), ours), (name, bucket)


def main() -> None:
    folder, work = Path(sys.argv[1]), sys.argv[2]
    if work == "bad":
        for name, *case in json.loads(sys.argv[3]):
            train_badly(folder / name, *case)
    elif work == "states":
        for name, *case in json.loads(sys.argv[3]):
            trainer = make(folder / name, *case)
            assert trainer.run() == 0
            same_states(trainer)
            trainer.close()
    elif work == "untested torch":
        compiled.TESTED_TORCH = ("1.13",)  # type: ignore[assignment]
        make(folder, "zero1", "train.compile=true").close()
    else:
        if work == "cast first":
            work, engine._cast_by_buckets = sys.argv[3], lambda *_: []
        if work == "one pass":  # for every run, and not compiled
            work, one_pass.compiled = sys.argv[3], lambda: one_pass.update
            engine._compiles_update = lambda *_: True
        for name, ds, *overrides in json.loads(work):
            trainer = make(folder / name, ds, *overrides)
            if name.endswith("forward twice"):
                forward_twice(trainer)
            assert trainer.run() == 0
            same_buffers(trainer)
            trainer.close()
    topology.disconnect()
    topology.leave(0)


if __name__ == "__main__":
    main()
