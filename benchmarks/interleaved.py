"""Timing of several systems in turns: all see the same machine, whatever else it does meanwhile."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

WINDOW_SECONDS = {"cuda": 0.25, "cpu": 0.0}
"""of one window; a CPU step is long enough alone"""


class Clock:
    """Marks between the parts of a step, without a wait between them."""

    def __init__(self, device: torch.device):
        self.cuda, self.marks = device.type == "cuda", []

    def mark(self) -> None:
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def seconds(self, parts: int) -> list[float]:
        """Mean of each of `parts` intervals over the steps marked so far; forgets them."""
        if self.cuda:
            torch.cuda.synchronize()
        marks, self.marks = self.marks, []
        steps = [marks[i : i + parts + 1] for i in range(0, len(marks), parts + 1)]
        between = [[self._between(a, b) for a, b in zip(s, s[1:], strict=False)] for s in steps]
        return [statistics.fmean(column) for column in zip(*between, strict=True)]

    def _between(self, a: Any, b: Any) -> float:
        return a.elapsed_time(b) / 1e3 if self.cuda else b - a


Work = Callable[[Clock], None]
"""one step, which marks its begin and the end of each part"""


def interleaved(systems: dict[str, Work], device: torch.device, rounds: int, parts: int) -> dict[str, Any]:
    """Windows of each system in turn -> by system, seconds of each round by part, and peak GiB; or its failure."""
    clock, out, steps = Clock(device), {}, {}
    for name, work in systems.items():
        try:
            work(clock)  # warm-up
            clock.seconds(parts)
            work(clock)
            first = sum(clock.seconds(parts))
            steps[name] = max(1, min(50, round(WINDOW_SECONDS[device.type] / first)))
            out[name] = {"rounds": [], "gib": None}
        except torch.OutOfMemoryError:
            out[name] = {"failed": "out of memory"}
            clock.marks.clear()
            torch.cuda.empty_cache()
    for _ in range(rounds):
        for name, number in steps.items():
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            for _ in range(number):
                systems[name](clock)
            out[name]["rounds"].append(clock.seconds(parts))
            if device.type == "cuda":
                out[name]["gib"] = torch.cuda.max_memory_allocated() / 2**30
    return out
