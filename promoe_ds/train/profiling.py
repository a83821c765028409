"""`train.profile=A:B`: a trace of the steps A to B of rank 0, and a table of what costs most.

In RUN/profile, `trace_steps_A_to_B.json.gz` opens in https://ui.perfetto.dev, and `top_steps_A_to_B.txt` holds the
operators by their own time, on the device where there is one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from promoe_ds.utils.files import write_text

ROWS = 40
"""of the table"""


class StepProfiler:
    """Call `before(step)` and `after(step)` around each step, 1-based; it acts on the steps asked for alone."""

    def __init__(self, text: str | None, run: Path, device: torch.device, say: Callable[[str], None]):
        self.folder, self.say = run / "profile", say
        self.first, self.last = map(int, (text or "0:0").split(":"))  # checked by validate; None: no step
        self.cuda = device.type == "cuda"
        self.profiler: Any = None

    @property
    def active(self) -> bool:
        return self.profiler is not None

    def before(self, step: int) -> None:
        if self.first <= step <= self.last and self.profiler is None:
            self.first = step  # a resumed run may begin within
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.cuda else [])]
            self.profiler = profile(activities=activities, record_shapes=True)
            self.profiler.start()

    def after(self, step: int) -> None:
        if self.profiler is not None and step >= self.last:
            self.close(step)

    def close(self, step: int | None = None) -> None:
        """Write what was recorded, if anything; a disk that is full costs the profile, not the run."""
        if self.profiler is None:
            return
        profiler, self.profiler = self.profiler, None
        if self.cuda:
            torch.cuda.synchronize()
        profiler.stop()
        name = f"steps_{self.first}_to_{step or self.last}"
        by = "self_device_time_total" if self.cuda else "self_cpu_time_total"
        try:
            self.folder.mkdir(exist_ok=True)
            table = profiler.key_averages().table(sort_by=by, row_limit=ROWS)
            write_text(self.folder / f"top_{name}.txt", table + "\n")
            profiler.export_chrome_trace(str(self.folder / f"trace_{name}.json.gz"))
        except OSError as error:
            with contextlib.suppress(OSError):
                self.say(f"  no profile: {error}")
            return
        self.say(f"  profile of {name.replace('_', ' ')}: {self.folder}")
