"""One log line, and the same numbers in RUN/metrics.jsonl and TensorBoard; what the log says of the experts.

Of the experts, sums are taken in steps that are logged only, of what the model returns: nothing is hooked into it, so a
compiled model stays compiled.

Legend: L MoE layers, E routed experts, K numbers per layer.
"""

from __future__ import annotations

import json
import math
import resource
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from promoe_ds.checkpoint import resume
from promoe_ds.models.dit import DiT, DiTOutput
from promoe_ds.moe.observe import (
    PROTOTYPE_STATISTICS,
    dead_experts,
    load_entropy,
    max_over_mean,
    prototype_statistics,
    prototypes_of,
    routers_of,
)
from promoe_ds.utils.files import write_text

CLOSE_SECONDS = 10.0
"""how long the end of a run waits for TensorBoard, whose writer may be lost (an interrupted write, a dead disk)"""
LAYERS_SHOWN = 8
"""MoE layers with TensorBoard tags of their own; metrics.jsonl has all"""

ALIKE = ("cfg", "classifier_accuracy", "FD_noise", "FD_real")
"""numbers among scores that are the same at every step: neither printed nor drawn"""


def expert_load(tokens_per_expert_LE: Tensor) -> tuple[float, int]:
    """(mean over the MoE layers of max/mean expert load, experts without a token over all layers).

    Args:
        tokens_per_expert_LE: int32 [L, E], tokens per layer and expert over all ranks. A dense model gives (1.0, 0).
    """
    if tokens_per_expert_LE.numel() == 0:
        return 1.0, 0
    return float(max_over_mean(tokens_per_expert_LE).mean()), int(dead_experts(tokens_per_expert_LE).sum())


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
    """Images per second since the last report, without the time spent in pauses (checkpoints, sample grids)."""

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
        if self.path.exists():
            whole = resume.logged(run)
            self._keep_damaged(len(whole))
            write_text(self.path, "".join(f"{line}\n" for logged, line in whole if logged <= step))
        self.file, self.waiting = self.path.open("ab", buffering=0), b""
        self.board: SummaryWriter | None = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)

    def _keep_damaged(self, whole: int) -> None:
        """A copy of a log with other lines than its whole records and a last one that was cut."""
        text = self.path.read_text(encoding="utf-8", errors="replace")
        lost = len(text.splitlines()) - whole - (not text.endswith("\n"))
        copy = self.path.with_name("metrics.jsonl.damaged")
        if lost > 0 and not copy.exists():
            copy.write_bytes(self.path.read_bytes())
            print(
                f"warning: {self.path}: {lost} lines are no records; the file is kept as {copy.name}", file=sys.stderr
            )

    def write(self, record: dict[str, Any]) -> None:
        """One record with the key `step`; numbers or None, the reason `skipped` of a step without an update, and
        `layers` (lists by name, `ExpertWatch.report`), of which TensorBoard shows some.

        A full disk is a warning: records wait for room.
        """
        record = _finite(record)
        self._append(record)
        scalars = {key: value for key, value in record.items() if key != "step" and isinstance(value, int | float)}
        scalars |= shown(record.get("layers", {}))
        self._scalars(record["step"], scalars)
        print(f"skipped: {record['skipped']}" if "skipped" in record else self._line(record), flush=True)

    def scores(self, step: int, scores: dict[str, Any], seconds: float) -> None:
        """A record of its own, with `step` and `scores` (an entry of metrics.json); TensorBoard has `scores/NAME`."""
        scores = _finite(scores)
        self._append({"step": step, "scores": scores})
        found = {key: value for key, value in scores.items() if isinstance(value, float) and key not in ALIKE}
        self._scalars(step, {f"scores/{key}": value for key, value in found.items()})
        text = ", ".join(f"{key} {value:.4g}" for key, value in found.items())
        print(f"  scores of {scores['num']} images at step {step}: {text}; {seconds:.1f} s", flush=True)

    def _append(self, record: dict[str, Any]) -> None:
        self.waiting += json.dumps(record).encode() + b"\n"
        try:
            while self.waiting:
                self.waiting = self.waiting[self.file.write(self.waiting) :]
        except OSError as error:
            print(f"warning: {self.path} cannot be written ({error.strerror})", file=sys.stderr, flush=True)

    def _scalars(self, step: int, scalars: dict[str, Any]) -> None:
        self._show(lambda board: [board.add_scalar(key, value, step) for key, value in scalars.items()])

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


class ExpertWatch:
    """Sums over the forwards of one optimizer step, on this rank; they stay on the device until a report."""

    def __init__(self, model: DiT):
        self.routers = routers_of(model)
        self.names = [
            [f"blocks.{block}.mlp.router.{name}" for name, _ in router.named_parameters()]
            for block, router in self.routers.items()
        ]
        self.names = self.names if any(self.names) else []
        """of the parameters of each router; empty if they have none"""
        self.start()

    def start(self) -> None:
        """A new step."""
        self._losses: list[str] = []
        self._sums_KL: Tensor | None = None

    @torch.no_grad()
    def see(self, output: DiTOutput) -> None:
        """Add a forward of the step."""
        if not self.routers:
            return
        sums_L2 = torch.stack([torch.stack([w_N.sum(), w_N.square().sum()]) for w_N in output.weights])
        edges_L = sums_L2.new_tensor([len(w_N) for w_N in output.weights])
        self._losses = list(output.aux_losses)
        sums_KL = torch.stack([torch.ones_like(edges_L), edges_L, *sums_L2.T, *output.aux_losses.values()]).double()
        self._sums_KL = sums_KL if self._sums_KL is None else self._sums_KL + sums_KL

    def report(
        self,
        tokens_per_expert_LE: Tensor,
        sum_over_ranks: Callable[[Tensor], Tensor],
        whole: Callable[[Tensor], Tensor] = Tensor.detach,
        gradients: Callable[[list[str]], dict[str, Tensor]] | None = None,
    ) -> dict[str, list[Any]]:
        """Numbers by name, a list with one for each MoE layer; collective if a forward was seen.

        Args:
            tokens_per_expert_LE: int32 [L, E], over all ranks.
            whole: all values of a parameter or buffer of which this rank may hold a piece.
            gradients: the mean gradients of parameters, by their names in the model; called on every rank alike.
        """
        if not self.routers:
            return {}
        tokens_per_expert_LE = tokens_per_expert_LE.cpu()
        values: dict[str, list[Any]] = {
            "block": list(self.routers),
            "load_max_over_mean": max_over_mean(tokens_per_expert_LE).tolist(),
            "load_entropy": load_entropy(tokens_per_expert_LE).tolist(),
            "dead_experts": dead_experts(tokens_per_expert_LE).tolist(),
        }
        if self._sums_KL is not None:
            forwards_L, edges_L, weight_L, square_L, *losses = sum_over_ranks(self._sums_KL).cpu()
            mean_L = weight_L / edges_L.clamp(min=1)
            values["gate_mean"] = mean_L.tolist()
            values["gate_std"] = (square_L / edges_L.clamp(min=1) - mean_L**2).clamp(min=0).sqrt().tolist()
            for name, loss_L in zip(self._losses, losses, strict=True):
                values[f"loss/{name}"] = (loss_L / forwards_L).tolist()
            prototypes = [p for router in self.routers.values() if (p := prototypes_of(router)) is not None]
            if prototypes:  # equal on every rank
                rows_LK = torch.stack([prototype_statistics(whole(p)) for p in prototypes])
                values |= dict(zip(PROTOTYPE_STATISTICS, rows_LK.T.tolist(), strict=True))
            if gradients and self.names:
                found = gradients([name for names in self.names for name in names])
                squares_LP = [torch.stack([found[n].square().sum() for n in names]) for names in self.names]
                values["router_grad_norm"] = torch.stack(squares_LP).sum(1).sqrt().tolist()
        return {name: [_short(value) for value in row] for name, row in values.items()}


def _finite(record: dict[str, Any]) -> dict[str, Any]:
    """JSON knows no NaN."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}


def _short(value: float) -> float | None:
    """Six digits are enough, and JSON knows no NaN."""
    if isinstance(value, int):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else None


def shown(layers: dict[str, list[Any]]) -> dict[str, float]:
    """TensorBoard's scalars: tags `layers/NAME/block_03`, at most `LAYERS_SHOWN` layers, first and last among them."""
    blocks = layers.get("block", [])
    count = min(LAYERS_SHOWN, len(blocks))
    places = sorted({round(i * (len(blocks) - 1) / max(1, count - 1)) for i in range(count)})
    rows = {name: row for name, row in layers.items() if name != "block"}
    tags = {f"layers/{name}/block_{blocks[i]:02d}": row[i] for name, row in rows.items() for i in places}
    return {tag: value for tag, value in tags.items() if value is not None}
