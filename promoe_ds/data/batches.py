"""The stream of micro-batches of one rank, cut out of global batches that do not depend on the topology.

Row of the global batch held by rank r of W in micro-batch j of size m: j*W*m + r*m + 0..m-1, where G = a*W*m and a is
the number of accumulation steps. All draws are made by row (`order.row_generator`), so the union of the rows over
ranks and micro-batches is bit for bit the same global batch for every W and m.

Shape suffixes: B images of a micro-batch, C channels, H rows, W columns (as a plain letter, W is the world size).
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import queue
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from promoe_ds.config.batching import batch_plan
from promoe_ds.config.schema import Config
from promoe_ds.data.dataset import ImageDataset
from promoe_ds.data.order import Purpose, row_generator, step_indices
from promoe_ds.utils.ranks import ALONE, Ranks

JOIN_SECONDS = 5.0
"""how long `close` waits for the image being read; the thread is a daemon and cannot keep the process alive"""


@dataclass(frozen=True, eq=False)
class Batch:
    """One micro-batch of one rank: CPU tensors, everything random already drawn."""

    x_BCHW: torch.Tensor
    """float32 in [-1, 1], or scaled latents, after random flips"""
    label_B: torch.Tensor
    """int64 after label drop; `model.num_classes` is the null label"""
    noise_BCHW: torch.Tensor
    """float32, standard normal"""
    gauss_B: torch.Tensor
    """float32, standard normal; the objective turns it into timesteps"""
    rows: torch.Tensor
    """int64 [B], positions in the global batch"""

    def pin(self) -> Batch:
        """In memory from which a GPU copies while the host goes on."""
        return Batch(*(getattr(self, f.name).pin_memory() for f in dataclasses.fields(self)))


def item_path(config: Config, dataset: ImageDataset, step: int, row: int) -> str:
    """Path of the image or latent in a row of the global batch of optimizer step `step` (0-based), if it has one."""
    train = config.train
    return dataset.where(int(step_indices(train.seed, step, train.global_batch_size, len(dataset))[row]))


class BatchMaker:
    """Pure: optimizer step -> the micro-batches of one rank (a of them, of m images each).

    Raises:
        ConfigError: the global batch does not divide over ranks and micro-batches.
    """

    def __init__(self, config: Config, dataset: ImageDataset, ranks: Ranks = ALONE) -> None:
        self.config, self.dataset, self.ranks = config, dataset, ranks
        self.micro, self.accumulation = batch_plan(config, ranks.world)

    def rows(self, micro_step: int) -> np.ndarray:
        """Rows of the global batch in micro-batch `micro_step`: int64 [m]."""
        first = (micro_step * self.ranks.world + self.ranks.rank) * self.micro
        return np.arange(first, first + self.micro, dtype=np.int64)

    def step(self, step: int) -> list[Batch]:
        """The micro-batches of optimizer step `step` (0-based), in the order of accumulation."""
        train = self.config.train
        index_G = step_indices(train.seed, step, train.global_batch_size, len(self.dataset))
        return [self._batch(step, index_G, self.rows(j)) for j in range(self.accumulation)]

    def _batch(self, step: int, index_G: np.ndarray, rows: np.ndarray) -> Batch:
        flip_B = self._coin(step, rows, Purpose.FLIP, 0.5 if self.config.data.hflip else 0.0)
        x_BCHW, label_B = self.dataset.draw(
            index_G[rows], flip_B, lambda shape: self._normal(step, rows, Purpose.POSTERIOR, shape)
        )
        drop_B = torch.from_numpy(self._coin(step, rows, Purpose.DROP, self.config.diffusion.label_drop))
        return Batch(
            x_BCHW=x_BCHW,
            label_B=label_B.masked_fill(drop_B, self.config.model.num_classes),
            noise_BCHW=torch.from_numpy(self._normal(step, rows, Purpose.NOISE, tuple(x_BCHW.shape[1:]))),
            gauss_B=torch.from_numpy(self._normal(step, rows, Purpose.TIME, ())),
            rows=torch.from_numpy(rows),
        )

    def _generators(self, step: int, rows: np.ndarray, purpose: Purpose) -> Iterator[np.random.Generator]:
        return (row_generator(self.config.train.seed, step, int(row), purpose) for row in rows)

    def _coin(self, step: int, rows: np.ndarray, purpose: Purpose, probability: float) -> np.ndarray:
        """bool [B], true with `probability`."""
        return np.array([rng.random() < probability for rng in self._generators(step, rows, purpose)])

    def _normal(self, step: int, rows: np.ndarray, purpose: Purpose, shape: tuple[int, ...]) -> np.ndarray:
        """float32 [B, *shape], standard normal."""
        out = np.empty((len(rows), *shape), dtype=np.float32)
        for i, rng in enumerate(self._generators(step, rows, purpose)):
            rng.standard_normal(dtype=np.float32, out=out[i, ...])  # in place: a stack of rows would be copied
        return out


def _produce(maker: BatchMaker, first_step: int, ready: queue.Queue, stop: threading.Event) -> None:
    """Body of the thread. A function, not a method: holding the stream would keep a forgotten one alive forever."""
    try:
        for step in itertools.count(first_step):
            batches = maker.step(step)
            ready.put([batch.pin() for batch in batches] if torch.cuda.is_available() else batches)
            if stop.is_set():
                return
    except BaseException as error:  # whatever it is, it belongs to the consumer
        ready.put(error)


def _shut(thread: threading.Thread, ready: queue.Queue, stop: threading.Event) -> None:
    stop.set()
    with contextlib.suppress(queue.Empty):
        while True:  # makes room for the one item the thread may be waiting to deliver
            ready.get_nowait()
    thread.join(JOIN_SECONDS)


class BatchStream(Iterator[list[Batch]], contextlib.AbstractContextManager):
    """Endless iterator over optimizer steps; an item is the list of this rank's micro-batches (a of them).

    One daemon thread prepares `data.prefetch` steps ahead. Its exceptions, of whatever type, are raised by `next`,
    from then on every time. `close` (or leaving the `with` block) ends the thread and the iteration.

    Args:
        config: reads `train`, `data`, `diffusion.label_drop` and `model.num_classes`.
        dataset: from `build_dataset`.
        ranks: this process among them; each holds different images, whatever ep is.
        start_step: optimizer step of the first item, 0-based; equal to skipping that many items.

    Raises:
        ConfigError: the batch sizes do not divide.
    """

    def __init__(self, config: Config, dataset: ImageDataset, ranks: Ranks = ALONE, start_step: int = 0) -> None:
        maker = BatchMaker(config, dataset, ranks)
        stop = threading.Event()
        self._ready: queue.Queue[list[Batch] | BaseException] = queue.Queue(maxsize=config.data.prefetch)
        self._failure: BaseException | None = None
        thread = threading.Thread(
            target=_produce, args=(maker, start_step, self._ready, stop), name="batches", daemon=True
        )
        self._finalizer = weakref.finalize(self, _shut, thread, self._ready, stop)  # also at interpreter exit
        thread.start()

    def __next__(self) -> list[Batch]:
        if not self._finalizer.alive:
            raise StopIteration
        item = self._failure or self._ready.get()
        if isinstance(item, BaseException):
            self._failure = item
            raise item
        return item

    def close(self) -> None:
        """End the thread; harmless when repeated."""
        self._finalizer()

    def __exit__(self, *exception: object) -> None:
        self.close()
