"""Timing of several systems in turns: all see the same machine, whatever else it does meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

WINDOW_SECONDS = {"cuda": 0.25, "cpu": 0.0}
"""of one window; a CPU step is long enough alone"""


class Clock:
    """Marks at the begin of a step and after each of its parts, without waiting between them."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.marks: list[Any] = []

    def mark(self) -> None:
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def seconds(self, steps: int) -> list[float]:
        """Mean seconds of each part over the `steps` steps since the last call."""
        if self.cuda:
            torch.cuda.synchronize()
            self.marks = [self.marks[0].elapsed_time(event) / 1e3 for event in self.marks]
        mark_SP = np.reshape(self.marks, (steps, -1))
        self.marks = []
        return np.diff(mark_SP, axis=1).mean(axis=0).tolist()


Work = Callable[[Clock], None]
"""one step, which marks its begin and the end of each part"""


def brief(error: Exception) -> str:
    """In one line of a table."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}".replace("|", "/")


def interleaved(systems: dict[str, Work], device: torch.device, rounds: int) -> dict[str, Any]:
    """Windows of each system in turn -> by system, seconds of each round by part; or its failure.

    No peak memory: it would include what the other systems hold.
    """
    clock, out, steps = Clock(device), {}, {}
    for name, work in systems.items():
        try:
            work(clock)  # warm-up
            clock.seconds(1)
            work(clock)
            steps[name] = max(1, min(50, round(WINDOW_SECONDS[device.type] / sum(clock.seconds(1)))))
            out[name] = {"rounds": []}
        except Exception as error:  # whatever a compiler or a kernel raises: the others still count
            out[name] = {"failed": brief(error)}
            clock.marks.clear()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    for _ in range(rounds):
        for name, number in steps.items():
            for _ in range(number):
                systems[name](clock)
            out[name]["rounds"].append(clock.seconds(number))
    return out
