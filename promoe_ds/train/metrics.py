"""One log line, and the same numbers in RUN/metrics.jsonl and TensorBoard."""

from __future__ import annotations

import json
import resource
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from promoe_ds.files import write_text
from promoe_ds.moe.statistics import dead_experts, max_over_mean
from promoe_ds.train.experts import shown

CLOSE_SECONDS = 10.0
"""how long the end of a run waits for TensorBoard, whose writer may be lost (an interrupted write, a dead disk)"""


def expert_load(load_LE: Tensor) -> tuple[float, int]:
    """(mean over the MoE layers of max/mean expert load, experts without a token over all layers).

    Args:
        load_LE: int32 [L, E], tokens per layer and expert over all ranks. A dense model gives (1.0, 0).
    """
    if load_LE.numel() == 0:
        return 1.0, 0
    return float(max_over_mean(load_LE).mean()), int(dead_experts(load_LE).sum())


def memory_gib(device: torch.device) -> float:
    """Peak memory of this process: allocated on the GPU, or resident on the CPU. GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def duration(seconds: float) -> str:
    """45s, 3m20s, 2h05m, 2d03h."""
    s = int(seconds)
    if s < 60:
        return f"{s}s"
    if s < 3600:
        return f"{s // 60}m{s % 60:02d}s"
    if s < 86400:
        return f"{s // 3600}h{s % 3600 // 60:02d}m"
    return f"{s // 86400}d{s % 86400 // 3600:02d}h"


class Throughput:
    """Images a second since the last report, without the time spent in pauses (checkpoints, sample grids)."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.images, self.since = 0, time.perf_counter()

    def pause(self, seconds: float) -> None:
        self.since += seconds

    def rate(self) -> float:
        return self.images / max(time.perf_counter() - self.since, 1e-9)


class MetricsLog:
    """Rank 0's log. Opening it to resume at `step` drops what was logged after that step.

    Args:
        run: the run's folder.
        step: optimizer steps done so far.
        steps: optimizer steps of the whole run, for progress and ETA.
    """

    def __init__(self, run: Path, step: int, steps: int):
        self.path, self.steps = run / "metrics.jsonl", steps
        self._truncate(step)
        self.file, self.waiting = self.path.open("ab", buffering=0), b""
        self.board: SummaryWriter | None = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)

    def _truncate(self, step: int) -> None:
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError):
                continue  # the line being written when the run was killed
        write_text(self.path, "".join(kept))

    def write(self, record: dict[str, Any]) -> None:
        """One record with the key `step`; numbers or None, the reason `skipped` of a step without an update, and
        `layers` (lists by name, `ExpertWatch.report`), of which TensorBoard shows some.

        A full disk is a warning: records wait for room.
        """
        self.waiting += json.dumps(record).encode() + b"\n"
        try:
            while self.waiting:
                self.waiting = self.waiting[self.file.write(self.waiting) :]
        except OSError as error:
            print(f"warning: {self.path} cannot be written ({error.strerror})", file=sys.stderr, flush=True)
        scalars = {key: value for key, value in record.items() if key != "step" and isinstance(value, int | float)}
        scalars |= shown(record.get("layers", {}))
        self._show(lambda board: [board.add_scalar(key, value, record["step"]) for key, value in scalars.items()])
        print(f"skipped: {record['skipped']}" if "skipped" in record else self._line(record), flush=True)

    def _show(self, draw: Callable[[SummaryWriter], object]) -> None:
        """TensorBoard, whose writer does not recover from an error."""
        try:
            if self.board:
                draw(self.board)
        except OSError as error:
            self.board = None
            text = f"warning: no more TensorBoard until the next start ({error.strerror}); metrics.jsonl goes on"
            print(text, file=sys.stderr, flush=True)

    def image(self, name: str, image: Any, step: int) -> None:
        """Add a PIL image to TensorBoard."""
        import numpy as np

        self._show(lambda board: board.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC"))

    def _line(self, r: dict[str, Any]) -> str:
        left = (self.steps - r["step"]) * r["seconds_per_step"]
        parts = [f"step {r['step']}/{self.steps}", f"loss {r['loss']:.4f}"]
        parts += [f"{key.removeprefix('loss/')} {r[key]:.4f}" for key in r if key.startswith("loss/")]
        parts += [f"gnorm {r['grad_norm']:.3f}", f"img/s {r['images_per_s']:.0f}"]
        if r["mfu"] is not None:
            parts.append(f"mfu {100 * r['mfu']:.1f}%")
        parts += [f"mem {r['memory_gib']:.2f}G", f"load {r['load_max_over_mean']:.2f}x", f"dead {r['dead_experts']}"]
        return "  ".join([*parts, f"eta {duration(left)}"])

    def close(self) -> None:
        """Waits `CLOSE_SECONDS` for TensorBoard at most: what it has not written by then is in metrics.jsonl."""
        self.file.close()
        closing = threading.Thread(target=self._show, args=(lambda board: board.close(),), daemon=True)
        closing.start()
        closing.join(CLOSE_SECONDS)
        if closing.is_alive():
            text = "warning: TensorBoard's last records may be missing (its writer does not end); metrics.jsonl has all"
            print(text, file=sys.stderr, flush=True)
