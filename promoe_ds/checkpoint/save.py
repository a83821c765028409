"""Saving a run: the state is copied on the step, the files are written behind the next ones.

`Saver.save` copies every rank's share into host memory (collective: full tensors are gathered) and returns; a thread
writes and flushes the files while training goes on. After every step the trainer calls `Saver.poll`: once all ranks'
files are on disk, the manifest is written and the folder gets its name, on all ranks after the same step. A crash
before that leaves a `tmp_*` folder and nothing else.

The order on disk: each file, written and fsynced; the manifest, written and fsynced; the folder, fsynced; the rename;
the parent folder, fsynced; only then are older checkpoints deleted.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from promoe_ds._version import __version__
from promoe_ds.checkpoint.layout import (
    FORMAT,
    RESUMED_STATES,
    StateAccess,
    candidates,
    file_entry,
    folder,
    leftovers,
    size,
    tree_digest,
    write_manifest,
)
from promoe_ds.config.decode import dump, encode
from promoe_ds.config.errors import ConfigError, reject
from promoe_ds.config.schema import Config
from promoe_ds.utils.files import atomic, fsync
from promoe_ds.utils.outputs import SAVED
from promoe_ds.utils.ranks import Ranks

HEADER_BYTES = 256
"""of a tensor in a safetensors header and of a file in the manifest, generously"""


def _copied(tensor: Tensor) -> Tensor:
    """A contiguous fp32 copy on the CPU that shares nothing with the original: training goes on changing that."""
    return torch.empty(tensor.shape, dtype=torch.float32).copy_(tensor.detach())


def ema_state_dict(
    engine: StateAccess, fixed: dict[str, Tensor], ranks: Ranks, state: str = "ema", everywhere: bool = False
) -> dict[str, Tensor]:
    """The EMA model on rank 0 (fp32, CPU), or on every rank; collective, empty elsewhere.

    Args:
        fixed: what the optimizer does not train (the position table, buffers of routers), as it is.
        state: one of `OptimizerConfig.averages`.
    """
    engine.relink()
    out = {name: _copied(tensor) for name, tensor in fixed.items()}
    for name, full in engine.read(state):
        if ranks.rank == 0 or everywhere:
            out[name] = _copied(full)
    return out if ranks.rank == 0 or everywhere else {}


def share(engine: StateAccess, ranks: Ranks) -> dict[str, Tensor]:
    """This rank's part of the state, on the CPU; every rank takes part in every read."""
    mine, kept = {}, set(list(engine.params)[ranks.rank :: ranks.world])
    for state in RESUMED_STATES:
        for name, full in engine.read(state):
            if name in kept:
                mine[f"{name}/{state}"] = _copied(full)
    return mine


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> dict[str, Any]:
    """Write a safetensors file, flushed to disk; returns its entry for the manifest."""
    with atomic(path, durable=True) as temporary:
        save_file(tensors, temporary, metadata=metadata)
    return file_entry(path)


def complete(temporary: Path, final: Path, tree: dict[str, Any]) -> None:
    """Write the manifest, flush, and give the folder its name: from here on the checkpoint exists."""
    write_manifest(temporary, tree)
    fsync(temporary)
    old = final.with_name(f"tmp_old_{final.name}")
    if final.exists():
        final.rename(old)
    temporary.rename(final)
    fsync(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def make_room(temporary: Path, need: int) -> None:
    """Make an empty folder to write `need` bytes in; raises OSError if they do not fit."""
    for path in temporary.parent.glob("tmp_*"):  # of saves that were interrupted: on a full disk in the way
        shutil.rmtree(path, ignore_errors=True)
    temporary.mkdir(parents=True)
    usage = shutil.disk_usage(temporary)
    if usage.total and usage.free < need:
        temporary.rmdir()
        raise OSError(f"it needs {size(need)}, the disk has {size(usage.free)} free")


def _free(path: Path) -> int:
    """Bytes free on its disk; 0 if that is gone."""
    try:
        return shutil.disk_usage(path).free
    except OSError:
        return 0


def discard(path: Path) -> None:
    """Delete a checkpoint folder; what a crash leaves of it is named as a leftover. Raises OSError."""
    if not path.name.startswith("tmp_"):
        path = path.rename(path.with_name(f"tmp_deleted_{path.name}"))
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def prune(run: Path, keep_last: int) -> None:
    """Delete all but the newest `keep_last` checkpoints, and what interrupted saves left behind.

    What cannot be deleted is a warning: the disk will be full of it one day.
    """
    for path in [*candidates(run)[:-keep_last], *leftovers(run)]:
        if problem := _trouble(partial(discard, path)):
            print(f"warning: {path} cannot be deleted ({problem})", file=sys.stderr, flush=True)


def _before(run: Path) -> str:
    """What a failed save leaves."""
    try:
        found = candidates(run)
    except ConfigError:
        return "those before it cannot be listed now"
    return f"{found[-1].name} is unharmed" if found else "it is the first"


def _trouble(work: Callable[[], Any]) -> str | None:
    """Do it; say what went wrong, if anything did, so that every rank can be told."""
    try:
        work()
    except (OSError, SafetensorError) as error:
        return str(error)
    return None


@dataclass
class Job:
    """A checkpoint being written."""

    step: int
    final: Path
    need: int
    """bytes, over all ranks"""
    blocked: float
    """seconds that training stood still for the copy"""
    thread: Thread | None = None
    files: dict[str, Any] = field(default_factory=dict)
    problem: str | None = None
    seconds: float = 0.0
    """that this rank's thread took"""

    @property
    def temporary(self) -> Path:
        return self.final.with_name(f"tmp_{self.final.name}")


class Saver:
    """Writes the checkpoints of a run, one at a time. Every rank has one; `save`, `poll` and `finish` are collective.

    Args:
        run: the run folder.
        engine: whose state is saved.
        config: of the run; `train.keep_last` and `train.on_save_error` are obeyed.
        ranks: this process among them.
        facts: what to record besides (topology, versions).
        say: where rank 0 reports.
    """

    def __init__(
        self,
        run: Path,
        engine: StateAccess,
        config: Config,
        ranks: Ranks,
        facts: dict[str, Any],
        say: Callable[[str], object] = print,
    ):
        self.run, self.engine, self.config, self.ranks, self.facts, self.say = run, engine, config, ranks, facts, say
        self.job: Job | None = None

    @property
    def written(self) -> bool:
        """A checkpoint is under way, and this rank's part of it is on disk (or has failed)."""
        return self.job is not None and not (self.job.thread and self.job.thread.is_alive())

    def poll(self) -> None:
        """Complete the checkpoint under way if every rank has written its part; errors as of `finish`."""
        if self.job is not None and all(self.ranks.gather(self.written)):  # all ranks have a job, or none has
            self.finish()

    def save(self, step: int, fixed: dict[str, Tensor], last: bool = False) -> None:
        """Copy the state after `step` optimizer steps and begin to write it.

        Args:
            fixed: what the optimizer does not train, for the EMA files.
            last: of the run: wait until it is complete.

        Raises:
            ConfigError: on every rank, if this one (as far as `last` waits for it) or the one before cannot be
                written; the checkpoints before are untouched. `train.on_save_error=continue` warns instead, except
                about the last.
        """
        self.finish(tolerant=last)
        start = time.perf_counter()
        averages = {
            f"{state}.safetensors": ema_state_dict(self.engine, fixed, self.ranks, state)
            for state in self.config.optimizer.averages()
        }
        mine = f"state-{self.ranks.rank:05d}-of-{self.ranks.world:05d}.safetensors"
        tensors = {name: ema for name, ema in averages.items() if ema}  # by file
        tensors[mine] = share(self.engine, self.ranks)
        need = sum(self.ranks.gather(self._bytes(tensors)))
        self.job = job = Job(step, folder(self.run, step), need, 0.0)
        if self.ranks.rank == 0:
            job.problem = _trouble(lambda: make_room(job.temporary, need))
        problem = self.ranks.gather(job.problem)[0]
        if problem is None:
            job.thread = Thread(target=self._write, args=(job, tensors), daemon=True, name=f"checkpoint {step}")
            job.thread.start()
        job.blocked = time.perf_counter() - start
        if problem or last:
            self.finish(last)

    def finish(self, last: bool = False, tolerant: bool = False) -> None:
        """Complete the checkpoint under way, if there is one; waits for the writing.

        Args:
            last: a failure is an error whatever `train.on_save_error` says.
            tolerant: a failure is a warning whatever it says: there is something more urgent.
        """
        if self.job is None:
            return
        job, self.job = self.job, None
        if job.thread:
            job.thread.join()
        answers = self.ranks.gather((job.files, job.problem))
        problem = next((f"rank {r}: {p}" if job.thread else p for r, (_, p) in enumerate(answers) if p), None)
        if problem is None and self.ranks.rank == 0:
            files = {name: entry for part, _ in answers for name, entry in part.items()}
            problem = _trouble(lambda: complete(job.temporary, job.final, self._tree(job.step, files)))
        problem = self.ranks.gather(problem)[0]
        if problem:
            self._failed(job, problem, last or (self.config.train.on_save_error == "stop" and not tolerant))
        elif self.ranks.rank == 0:
            with contextlib.suppress(OSError):  # the checkpoint is whole without it
                (self.run / SAVED).touch()
            prune(self.run, self.config.train.keep_last)
            written = sum(entry["bytes"] for part, _ in answers for entry in part.values())
            text = f"checkpoint of step {job.step}: {size(written)}, {job.blocked:.3f} s on the step"
            self.say(f"  {text}, {job.seconds:.3f} s behind")

    def _bytes(self, tensors: dict[str, dict[str, Tensor]]) -> int:
        sizes = [t.nbytes + len(name) + HEADER_BYTES for part in tensors.values() for name, t in part.items()]
        return sum(sizes) + len(tensors) * (len(dump(self.config)) + HEADER_BYTES)

    def _write(self, job: Job, tensors: dict[str, dict[str, Tensor]]) -> None:
        """The thread's work: no collective, nothing but files."""
        start = time.perf_counter()
        metadata = {"format": FORMAT, "config": dump(self.config), "step": str(job.step)}
        try:
            for name in list(tensors):
                job.files |= write_tensors(job.temporary / name, tensors.pop(name), metadata)
        except Exception as error:  # whatever it is, the other ranks must be told
            job.problem = " ".join(str(error).split()) or type(error).__name__
            tensors.clear()
        job.seconds = time.perf_counter() - start

    def _tree(self, step: int, files: dict[str, Any]) -> dict[str, Any]:
        config = encode(self.config)
        made = datetime.now(UTC).isoformat(timespec="seconds")
        head = {"format": FORMAT, "version": __version__, "made": made, "step": step}
        return head | {"config": config, "config_blake2b": tree_digest(config), **self.facts, "files": files}

    def _failed(self, job: Job, problem: str, fatal: bool) -> None:
        """Remove what was written, so that it is not in the way; stop, or warn."""
        if self.ranks.rank == 0:
            shutil.rmtree(job.temporary, ignore_errors=True)
        if job.thread:
            free = self.ranks.gather(_free(self.run))[0]
            problem += f"; it needs {size(job.need)}, the disk has {size(free)} free"
        before = _before(self.run)
        conflict = f"cannot be written ({problem}); {before}"
        if fatal:
            reject("checkpoint", job.final, conflict, "free space or fix the folder, then resume")
        if self.ranks.rank == 0:
            warning = f"warning: checkpoint={job.final}: {conflict}; training goes on and tries again"
            print(warning, file=sys.stderr, flush=True)
