"""The stream of micro-batches of one rank, cut out of global batches that do not depend on the topology.

Row of the global batch held by rank r of W in micro-batch j of size m: j*W*m + r*m + 0..m-1, where G = a*W*m and a is
the number of accumulation steps. All draws are made by row (`step_noise`), so the union of the rows over
ranks and micro-batches is bit for bit the same global batch for every W and m.

Shape suffixes: B images of a micro-batch, C channels, H rows, W columns (as a plain letter, W is the world size).
"""

from __future__ import annotations

import contextlib
import itertools
import math
import queue
import threading
import weakref
from collections.abc import Iterator
from functools import partial

import numpy as np
import torch

from promoe_ds.config.batching import batch_plan
from promoe_ds.config.schema import Config
from promoe_ds.data.batch import Batch
from promoe_ds.data.coded_images import CodedImages
from promoe_ds.data.dataset import ImageDataset
from promoe_ds.data.order import step_indices
from promoe_ds.data.step_encoder import StepEncoder
from promoe_ds.data.step_noise import Purpose, coins, normal
from promoe_ds.data.workers import Workers
from promoe_ds.utils.ranks import ALONE, Ranks, cores_per_rank

JOIN_SECONDS = 5.0
"""how long `close` waits for the image being read; the thread is a daemon and cannot keep the process alive"""
MOST_WORKERS = 16
"""that `data.workers=null` starts per rank"""


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
        first = step * self.accumulation
        return [self.micro_batch(number) for number in range(first, first + self.accumulation)]

    def micro_batch(self, number: int) -> Batch:
        """Micro-batch `number` of the run, 0-based: steps have `accumulation` of them."""
        train, data = self.config.train, self.dataset
        step, micro_step = divmod(number, self.accumulation)
        rows = self.rows(micro_step)
        index_B = step_indices(train.seed, step, train.global_batch_size, len(data))[rows]
        flip_B = coins(train.seed, step, rows, Purpose.FLIP, 0.5 if self.config.data.hflip else 0.0)
        draw, posterior = partial(normal, train.seed, step, rows, Purpose.POSTERIOR), None
        if isinstance(data, CodedImages):  # its latents are made by `StepEncoder`
            x_BCHW, label_B = data.pixels(index_B, flip_B), torch.from_numpy(data.label_B[index_B])
            posterior = torch.from_numpy(draw(data.latent)) if data.encoder.stochastic else None
            shape = data.latent
        else:
            x_BCHW, label_B = data.draw(index_B, flip_B, draw)
            shape = tuple(x_BCHW.shape[1:])
        drop_B = torch.from_numpy(coins(train.seed, step, rows, Purpose.DROP, self.config.diffusion.label_drop))
        return Batch(
            x_BCHW=x_BCHW,
            label_B=label_B.masked_fill(drop_B, self.config.model.num_classes),
            noise_BCHW=torch.from_numpy(normal(train.seed, step, rows, Purpose.NOISE, shape)),
            gauss_B=torch.from_numpy(normal(train.seed, step, rows, Purpose.TIME, ())),
            rows=torch.from_numpy(rows),
            posterior_BCHW=posterior,
        )

    def arrays(self, number: int) -> dict[str, np.ndarray]:
        """`micro_batch`, for another process."""
        return self.micro_batch(number).arrays()

    @property
    def nbytes(self) -> int:
        """Of a micro-batch, at most."""
        data = self.dataset
        latent = 4 * data.channels * data.image_size**2
        pixels = math.prod((3, data.images.image_size, data.images.image_size)) if isinstance(data, CodedImages) else 0
        return self.micro * (pixels + 3 * latent + 3 * 8)


def worker_count(config: Config, dataset: ImageDataset, device: torch.device) -> int:
    """Processes that make the micro-batches of a rank; 0: the thread of the stream does."""
    if not dataset.decodes:
        return 0
    if config.data.workers is not None:
        return config.data.workers
    # Without a GPU they would take the cores that the model computes on.
    return min(MOST_WORKERS, max(1, cores_per_rank() - 1)) if device.type == "cuda" else 0


def _steps(maker: BatchMaker, first_step: int, workers: Workers | None, pin: bool) -> Iterator[list[Batch]]:
    for step in itertools.count(first_step):
        if workers is None:
            batches = maker.step(step)
            yield [batch.copy(pin) for batch in batches] if pin else batches
        else:
            yield [Batch.of(next(workers)).copy(pin) for _ in range(maker.accumulation)]


def _produce(steps: Iterator[list[Batch]], ready: queue.Queue, stop: threading.Event) -> None:
    """Body of the thread. A function, not a method: holding the stream would keep a forgotten one alive forever."""
    try:
        for batches in steps:
            ready.put(batches)
            if stop.is_set():
                return
    except BaseException as error:  # whatever it is, it belongs to the consumer
        ready.put(error)


def _shut(thread: threading.Thread, ready: queue.Queue, stop: threading.Event, workers: Workers | None) -> None:
    stop.set()
    if workers is not None:
        workers.end()  # the thread may be waiting for one
    with contextlib.suppress(queue.Empty):
        while True:  # makes room for the one item the thread may be waiting to deliver
            ready.get_nowait()
    thread.join(JOIN_SECONDS)


class BatchStream(Iterator[list[Batch]], contextlib.AbstractContextManager):
    """Endless iterator over optimizer steps; an item is the list of this rank's micro-batches (a of them).

    One daemon thread prepares `data.prefetch` steps ahead, by itself or with the results of `data.workers` processes.
    Its exceptions, of whatever type, are raised by `next`, from then on every time. `close` (or leaving the `with`
    block) ends thread and processes, and the iteration. Images that the step encodes come out as latents on the device.

    Args:
        config: reads `train`, `data`, `diffusion.label_drop` and `model.num_classes`.
        dataset: from `build_dataset`.
        ranks: this process among them; each holds different images, whatever ep is.
        start_step: optimizer step of the first item, 0-based; equal to skipping that many items.

    Raises:
        ConfigError: the batch sizes do not divide.
    """

    def __init__(self, config: Config, dataset: ImageDataset, ranks: Ranks = ALONE, start_step: int = 0) -> None:
        maker, stop = BatchMaker(config, dataset, ranks), threading.Event()
        count = worker_count(config, dataset, ranks.device)
        workers = Workers(maker.arrays, start_step * maker.accumulation, maker.nbytes, count) if count else None
        self._encoder = StepEncoder(dataset, ranks.device) if isinstance(dataset, CodedImages) else None
        self._ready: queue.Queue[list[Batch] | BaseException] = queue.Queue(maxsize=config.data.prefetch)
        self._next: list[Batch] | BaseException | None = None
        steps = _steps(maker, start_step, workers, torch.cuda.is_available())
        thread = threading.Thread(target=_produce, args=(steps, self._ready, stop), name="batches", daemon=True)
        self._finalizer = weakref.finalize(self, _shut, thread, self._ready, stop, workers)  # also at interpreter exit
        thread.start()

    def __next__(self) -> list[Batch]:
        if not self._finalizer.alive:
            raise StopIteration
        item, self._next = self._ready.get() if self._next is None else self._next, None
        if isinstance(item, BaseException):
            self._next = item
            raise item
        return item if self._encoder is None else self._encoder(item, self._following())

    def _following(self) -> list[Batch] | None:
        """The next item, if it is there and no exception; it stays the next one."""
        with contextlib.suppress(queue.Empty):
            self._next = self._ready.get_nowait()
        return None if isinstance(self._next, BaseException) else self._next

    def close(self) -> None:
        """End the thread; harmless when repeated."""
        self._finalizer()

    def __exit__(self, *exception: object) -> None:
        self.close()
