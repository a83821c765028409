"""A data set with a fault, for the jobs that tests start."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class ThirdBatch:
    """The real data set, but for its third batch, which `fault` changes."""

    def __init__(self, real: Any, fault: Callable[[Any], Any]):
        self.real, self.fault, self.calls = real, fault, 0

    def __len__(self) -> int:
        return len(self.real)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def draw(self, *args: Any) -> Any:
        self.calls += 1
        drawn = self.real.draw(*args)
        return self.fault(drawn) if self.calls == 3 else drawn
