"""Scores while training: the EMA draws on every rank, and what `launchers/evaluate.py` would say of it is logged.

Images are those of `launchers/sample.py` with `sample.steps`, `sample.cfg` and `sample.seed`; each rank draws
consecutive batches of them, whole, so that neither images nor features depend on how many ranks there are.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from promoe_ds.checkpoint import resume
from promoe_ds.config.errors import reject
from promoe_ds.config.schema import Config
from promoe_ds.diffusion.objective import make_objective
from promoe_ds.models.init import build
from promoe_ds.sampling.generate import (
    SamplingOptions,
    choose_precision,
    class_labels,
    draw_batches,
    pixel_batches,
    pixel_shape,
)
from promoe_ds.sampling.job import Job, provenance, record_of
from promoe_ds.sampling.weak import find_weak, load_weak
from promoe_ds.train.grids import open_decoder
from promoe_ds.train.metrics import MetricsLog
from promoe_ds.utils import signals
from promoe_ds.utils.files import parse_json
from promoe_ds.utils.ranks import Ranks, share_of


class Collector(Protocol):
    """`promoe_ds.evaluation.collect.Collector`."""

    def add(self, images_NHWC: np.ndarray) -> None: ...
    def result(self, name: str, labels_N: np.ndarray, sampling: dict[str, Any], ranks: Ranks) -> Any: ...


class Evaluator(Protocol):
    """`promoe_ds.evaluation.evaluate.Evaluator`, which needs nothing of this package, nor this package of it."""

    @property
    def reference(self) -> Any: ...
    def collector(self) -> Collector: ...
    def score(self, samples: Any) -> dict[str, Any]: ...


Judge = Callable[[Config, Ranks, tuple[int, int, int]], Evaluator]
"""(configuration, this process, (H, W, C) of the images) -> what scores them; raises ConfigError where it cannot"""


class ScoreFailed(Exception):
    """A score is no reason to lose a run."""


class Interrupted(Exception):
    """A rank was told to stop; raised on every rank alike."""


def options(config: Config, device: torch.device) -> SamplingOptions:
    """Those of `launchers/sample.py --run RUN --steps STEPS --seed SEED`, of `sample.steps` and `sample.seed`."""
    s, guidance = config.sample, config.guidance
    return SamplingOptions(
        cfg=s.cfg,
        steps=s.steps,
        seed=s.seed,
        precision=choose_precision(None, device),
        sampler=make_objective(config.diffusion).samplers[0],
        channels=guidance.channels,
        interval=guidance.interval,
        shift=None if s.shift == config.diffusion.shift else s.shift,
    )


class Scores:
    """What draws and scores on this rank. Every rank has one; `prepare` and `score` are collective.

    Raises:
        ConfigError: the model's images cannot be decoded, or not be scored.
    """

    def __init__(self, config: Config, ranks: Ranks, codec: dict[str, Any] | None, judge: Judge | None):
        if judge is None:
            conflict = "this program has nothing that scores"
            reject("train.score_every", config.train.score_every, conflict, "start with launchers/train.py")
        self.config, self.ranks, self.device = config, ranks, ranks.device
        self.codec = open_decoder(config, self.device, codec)
        self.options = options(config, self.device)
        self.num = config.train.score_images
        self.label_N = class_labels(self.num, config.model.num_classes)
        self.weak_record = None
        if config.guidance.model:
            file, weak, step = find_weak(config.guidance.model, config, "guidance.model")
            self.weak_record = provenance(file, weak, step, "guidance.model")
        self.evaluator = judge(config, ranks, pixel_shape(config, self.codec))

    def prepare(self) -> None:
        """Read the reference now, not in the middle of a run. Raises ConfigError."""
        self.evaluator.reference  # noqa: B018

    def owed(self, run: Path, step: int) -> bool:
        """Collective: whether a run that continues at `step` was stopped before it scored."""
        if step == 0 or step % self.config.train.score_every:
            return False
        first = self.ranks.rank == 0
        found = first and any(at == step and "scores" in parse_json(line) for at, line in resume.logged(run))
        return not self.ranks.gather(found)[0]

    def log(self, weights: dict[str, Tensor], step: int, log: MetricsLog | None) -> bool:
        """Draw, score, and write it into rank 0's log; a failure is a warning. False if a rank was told to stop.

        Args:
            weights: the whole EMA's, on every rank.
        """
        began = time.perf_counter()
        try:
            scores = self.score(weights, step)
        except Interrupted:
            return False
        except ScoreFailed as error:
            if log:
                print(f"warning: no scores at step {step}: {error}; training goes on", file=sys.stderr, flush=True)
            return True
        if log:
            log.scores(step, scores, time.perf_counter() - began)
        return True

    def score(self, weights: dict[str, Tensor], step: int) -> dict[str, Any]:
        """The scores of the EMA, as `metrics.json` has them, on rank 0; {} elsewhere.

        Raises:
            Interrupted: on every rank.
            ScoreFailed: images could not be drawn or read, on every rank; or not be compared, on rank 0.
        """
        collector, images, problem = self.evaluator.collector(), self._draw(weights), None
        batches = -(-self.num // self.options.batch)
        for _ in range(-(-batches // self.ranks.world)):  # of the rank that has most
            try:
                if (batch := next(images, None)) is not None:
                    collector.add(batch)
            except Exception as error:  # whatever a network or a device raises: the other ranks must be told
                problem = f"rank {self.ranks.rank}: {_brief(error)}"
            answers = self.ranks.gather((signals.requested() is not None, problem))
            if any(stopped for stopped, _ in answers):
                raise Interrupted
            if problem := next((problem for _, problem in answers if problem), None):
                raise ScoreFailed(problem)
        found = collector.result(f"step {step}", self.label_N, self._sampling(step), self.ranks)
        if found is None:
            return {}
        try:
            return self.evaluator.score(found)
        except Exception as error:  # on rank 0 alone, with no collective left
            raise ScoreFailed(_brief(error)) from error

    def _draw(self, weights: dict[str, Tensor]) -> Iterator[np.ndarray]:
        """This rank's images, batch by batch: uint8 [B, H, W, C]."""
        config, starts = self.config, share_of(self.ranks, self.num, self.options.batch)
        mine = np.arange(starts.start, min(starts.stop, self.num))
        model = build(config)
        model.load_state_dict(weights, assign=True)
        model.to(self.device).eval()
        weak = None
        if config.guidance.model:
            weak = load_weak(config.guidance.model, config, self.device, "guidance.model")[0]
        drawn = draw_batches(model, config, self.label_N[mine], mine, self.options, self.device, weak=weak)
        yield from (images for _, images in pixel_batches(drawn, self.codec))

    def _sampling(self, step: int) -> dict[str, Any]:
        job = Job(Path(), self.num, self.options)
        weights = {"config": self.config.name, "checkpoint_step": step}
        return record_of(job, weights, self.config, "train.score_every", self.codec, weak=self.weak_record)


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
