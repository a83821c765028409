"""A stand-in for the engine's state, so that checkpoints can be tested in one process, and ranks that are threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.processes import PATIENCE
from promoe_ds.checkpoint.save import Saver
from promoe_ds.config.schema import Config
from promoe_ds.recipes.load import load_config
from promoe_ds.utils.ranks import ALONE, Ranks

CONFIG = load_config("tiny")
FACTS = {"world": 1, "ep": 1, "stage": 0, "torch": torch.__version__}


class State:
    """The smallest thing with the engine's state interface: a dictionary of full tensors."""

    def __init__(self, seed: int, rows: int = 3):
        generator = torch.Generator().manual_seed(seed)
        self.params = {name: torch.randn(rows, 2, generator=generator) for name in ("a", "b.c", "d")}
        states = ("fp32", "exp_avg", "exp_avg_sq", "ema")
        self.values = {(n, s): torch.randn(rows, 2, generator=generator) for n in self.params for s in states}
        self.step = 0

    def read(self, state: str) -> Iterator[tuple[str, Tensor]]:
        yield from ((name, self.values[name, state]) for name in self.params)

    def write(self, name: str, state: str, full: Tensor) -> None:
        self.values[name, state] = full

    def allocate(self, step: int) -> None:
        self.step = step
        self.values = {}

    def relink(self) -> None:
        pass


def saver(run: Path, state: State, config: Config = CONFIG, ranks: Ranks = ALONE) -> Saver:
    return Saver(run, state, config, ranks, FACTS, say=lambda text: None)


def save(run: Path, step: int, config: Config = CONFIG, rows: int = 3) -> State:
    """Save a state drawn from `step`, to the end."""
    state = State(step, rows)
    saver(run, state, config).save(step, {"fixed": torch.ones(2)}, last=True)
    return state


def on_ranks(world: int, work: Callable[[Ranks], Any]) -> list[Any]:
    """`work` on `world` threads that gather as ranks do; its results or exceptions, by rank."""
    table: list[Any] = [None] * world
    barrier = threading.Barrier(world, timeout=PATIENCE)

    class Threads(Ranks):
        def gather(self, value: Any) -> list[Any]:
            table[self.rank] = value
            barrier.wait()
            out = list(table)
            barrier.wait()
            return out

    def one(rank: int) -> Any:
        try:
            return work(Threads(rank, world))
        except Exception as error:
            return error

    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(one, range(world)))


def save_on(world: int, run: Path, step: int, config: Config = CONFIG) -> list[Any]:
    """Save one state by several ranks, to the end; None or the exception of each rank."""
    fixed = {"fixed": torch.ones(2)}
    return on_ranks(world, lambda ranks: saver(run, State(step), config, ranks).save(step, fixed, last=True))
