"""The learning rate of a step: a pure function of the configuration and the step.

Nothing is kept between steps, so a run that is resumed, at whatever topology, has the rates of one that never stopped.
The values are those of torch's schedulers, whose own state a checkpoint would have to carry: `CosineAnnealingLR` and
`LinearLR`, after a `LinearLR` warm-up (tests/config/test_schedule.py).
"""

from __future__ import annotations

import math
from itertools import pairwise

from promoe_ds.config.errors import reject
from promoe_ds.config.schema import Config


def end_of(config: Config) -> int:
    """Steps until the schedule is at its floor."""
    return config.optimizer.schedule_steps or config.train.steps


def decay_start(config: Config) -> int:
    """Steps before the learning rate begins to fall."""
    o, end = config.optimizer, end_of(config)
    if o.schedule == "wsd":
        return end - (o.decay_steps or math.ceil(end / 10))
    return o.warmup_steps


def learning_rate(config: Config, step: int) -> float:
    """The rate of an optimizer step; the first step is 1.

    With k = step - 1, w the warm-up, d the `decay_start`, T the `end_of` the schedule and f the floor:

        k < w     lr (k + 1) / w
        k < d     lr
        k < T     lr (f + (1 - f) g(p)),  p = (k - d) / (T - d),  g = 1 - p, or (1 + cos pi p) / 2
        else      lr f
    """
    o, done = config.optimizer, step - 1
    if done < o.warmup_steps:
        return o.lr * (step / o.warmup_steps)
    start, end = decay_start(config), end_of(config)
    if o.schedule == "constant" or done < start:
        return o.lr
    passed = (done - start) / (end - start) if done < end else 1.0
    left = (1 + math.cos(math.pi * passed)) / 2 if o.schedule == "cosine" else 1 - passed
    return o.lr * (o.lr_floor + (1 - o.lr_floor) * left)


def same_rates(one: Config, other: Config, first: int, last: int) -> bool:
    """Whether all steps from `first` to `last`, of which there may be any number, have equal rates under both.

    Looked at are the ends, the first step of each phase after warm-up, and eighths of the way to the next: no two of
    the curves above that differ agree at all of them.
    """
    starts = {s + 1 for c in (one, other) for s in (decay_start(c), end_of(c))}
    ends = sorted({first, last, *(step for step in starts if first < step < last)})
    between = (a + (b - a) * i // 8 for a, b in pairwise(ends) for i in range(1, 8))
    return all(learning_rate(one, step) == learning_rate(other, step) for step in (*ends, *between))


def validate_schedule(config: Config) -> None:
    """Raise ConfigError if the phases of a schedule do not fit into its steps."""
    o, end = config.optimizer, end_of(config)
    if o.schedule == "constant":
        return
    if o.warmup_steps > end:
        conflict = f"the {o.schedule} schedule has {end} steps"
        reject("optimizer.warmup_steps", o.warmup_steps, conflict, "shorten it, or set optimizer.schedule_steps")
    if decay_start(config) < o.warmup_steps:
        conflict = f"with optimizer.warmup_steps={o.warmup_steps} it does not fit into the {end} steps of the schedule"
        reject("optimizer.decay_steps", end - decay_start(config), conflict, "shorten one of them")
