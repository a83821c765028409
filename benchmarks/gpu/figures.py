"""Figures as they are found: one JSON line each, written at once, so that a kill costs only the one under way.

A line has `stage`, `name`, `device`, and either values or `failed`. What has a line is not measured again, so the same
command goes on where the last one ended.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.interleaved import Clock, brief

FILE = "figures.jsonl"
BROKEN = 3
"""exit code: the device answers no more, but a new process may go on"""
NO_TIME = "no time left"
Figure = dict[str, Any]


def read(folder: Path) -> list[Figure]:
    """Every whole line; the last one may have been cut by a kill."""
    figures = []
    for line in (folder / FILE).read_text(encoding="utf-8").splitlines() if (folder / FILE).exists() else ():
        try:
            figures.append(json.loads(line))
        except ValueError:
            continue
    return figures


def append(folder: Path, figure: Figure) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    line = json.dumps(figure)
    with (folder / FILE).open("a+b") as file:
        file.seek(0, os.SEEK_END)
        if file.tell():
            file.seek(-1, os.SEEK_END)
            line = line if file.read() == b"\n" else f"\n{line}"  # the last writer was killed within its line
        file.write(f"{line}\n".encode())
        file.flush()
        os.fsync(file.fileno())


@dataclass
class Stage:
    """What a stage knows, and how it tells what it finds."""

    name: str
    folder: Path
    dry: bool = False
    seconds: float = 1e9
    """after them no measurement is begun"""
    begin: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.device = torch.device("cpu") if self.dry else torch.device("cuda", 0)
        self.card = "cpu" if self.dry else torch.cuda.get_device_name()
        self._known = {f["name"] for f in read(self.folder) if f["stage"] == self.name and f["device"] == self.card}

    @property
    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.begin)

    def say(self, name: str, **values: Any) -> None:
        """Keep a figure; floats to six digits."""
        values = {key: float(f"{x:.6g}") if isinstance(x, float) else x for key, x in values.items()}
        append(self.folder, {"stage": self.name, "name": name, "device": self.card, **values})
        print(name, values, flush=True)

    def measure(self, name: str, work: Callable[[], Figure]) -> None:
        """Keep what `work` returns, or how it failed; the next measurement still counts.

        Exits with `BROKEN` where the device failed for good: every later measurement would fail with it.
        """
        if name in self._known:
            return
        if self.left < 0:
            return self.say(name, failed=NO_TIME)
        now = self.folder / f"{self.name}.now"
        now.write_text(name, encoding="utf-8")
        start = time.monotonic()
        try:
            values = work()
        except Exception as error:  # whatever a kernel or a compiler raises
            traceback.print_exc()
            self.say(name, failed=brief(error))
            if broken(error):
                now.unlink()
                sys.exit(BROKEN)
        else:
            self.say(name, **values, took_s=time.monotonic() - start)
        now.unlink()

    def timed(self, work: Callable[[], object], times: int = 10, rounds: int = 3) -> float:
        """Seconds of a call: median over rounds of the mean of `times` calls, after three; device time on CUDA."""
        warm, times, rounds = (0, 1, 1) if self.dry else (3, times, rounds)
        clock, found = Clock(self.device), []
        for _ in range(warm):
            work()
        for _ in range(rounds):
            clock.mark()
            for _ in range(times):
                work()
            clock.mark()
            found.append(clock.seconds(1)[0] / times)
        return median(found)


def broken(error: Exception) -> bool:
    """Whether CUDA can do nothing more in this process."""
    words = str(error).lower()
    return "cuda error" in words and not isinstance(error, torch.OutOfMemoryError)


def relative(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected, in float64."""
    a, b = found.detach().double().cpu(), expected.detach().double().cpu()
    return float((a - b).norm() / b.norm().clamp_min(1e-30))
