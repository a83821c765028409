"""What a checkpoint is, and whether it is whole.

    RUN/checkpoints/step_00000200/
        state-00000-of-00002.safetensors   full fp32 tensors: NAME/fp32, NAME/exp_avg, NAME/exp_avg_sq
        ema.safetensors                    the model's state dict with EMA weights: what sampling and evaluation read;
                                       also the buffers of routers, not averaged
        ema_0.999.safetensors              the same of each decay in `optimizer.ema_more`
        manifest.json                      written last: step, config, topology, sizes and checksums of the files

The tensors are stored in full under single-device names, so any world size, expert-parallel degree and ZeRO stage can
resume from them. `save.py` writes into `tmp_*`, flushes to disk and renames: a half-written checkpoint is never
picked up. There is no pointer to the newest one: it is found by name. Everything is safetensors or JSON; nothing is
unpickled, and DeepSpeed's own shard files are neither written nor read.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NoReturn, Protocol

from torch import Tensor
from tqdm import tqdm

from promoe_ds.config.errors import ConfigError, reject
from promoe_ds.utils.files import NOT_FOUND, file_digest, making, read_json, write_text
from promoe_ds.utils.ranks import Ranks

FORMAT = "promoe_ds/1"
MANIFEST = "manifest.json"
EMA = "ema.safetensors"
WEIGHTS = "model.safetensors"
"""of a folder that holds weights alone, made by `launchers/export.py` and its like"""
WEIGHTS_INDEX = "model.safetensors.index.json"
"""of a folder whose weights are in several files"""
AVERAGE = re.compile(r"(ema(_[0-9.e-]+)?)\.safetensors")
"""of the files of a checkpoint, those that hold an EMA: NAME.safetensors, of the state NAME"""
NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)
"""how file systems without flock answer (some of Lustre and NFS)"""
RESUMED_STATES = ("fp32", "exp_avg", "exp_avg_sq")


class StateAccess(Protocol):
    """What a checkpoint needs of the engine; see `promoe_ds.parallel.engine.Engine`."""

    params: dict[str, Any]

    def read(self, state: str) -> Iterable[tuple[str, Tensor]]: ...
    def write(self, name: str, state: str, full: Tensor) -> None: ...
    def allocate(self, step: int) -> None: ...
    def relink(self) -> None: ...


def unreadable(path: Path, error: OSError, option: str = "checkpoint") -> NoReturn:
    """Stop at what may be whole: it is never called damaged, passed over or deleted. Raises ConfigError."""
    way_out = "look at its permissions and its file system; it may be whole"
    reject(option, path, f"cannot be read ({error.strerror or error})", way_out)


def folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step_{step:08d}"


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def is_checkpoint_name(name: str) -> bool:
    return re.fullmatch(r"step_\d{8,}", name) is not None


def candidates(run: Path) -> list[Path]:
    """Every checkpoint folder of a run, whole or damaged, oldest first; raises ConfigError if they cannot be listed."""
    try:
        return sorted((p for p in (run / "checkpoints").iterdir() if is_checkpoint_name(p.name)), key=step_of)
    except FileNotFoundError:
        return []
    except OSError as error:
        unreadable(run / "checkpoints", error)


def leftovers(run: Path) -> list[Path]:
    """What interrupted saves have left behind."""
    return sorted((run / "checkpoints").glob("tmp_*"))


def newest(run: Path) -> Path | None:
    """The newest complete checkpoint folder of a run (its manifest is there and sizes agree), or None.

    Raises ConfigError if one that is as new cannot be read.
    """
    return next((p for p in reversed(candidates(run)) if damage(p, read_bytes=False) is None), None)


def trained(run: Path, steps: int) -> bool:
    """Whether a run has reached this step. An exit code of 0 does not say so: the deepspeed launcher ends with 0 where
    its own launch.py is killed."""
    found = newest(run)
    return found is not None and step_of(found) >= steps


def claim(run: Path) -> IO[str]:
    """Make the run folder and lock it: it is this process's until the file is closed, or the process dies.

    Raises:
        ConfigError: another process trains in it, or it cannot be written.
    """
    lock = None
    try:
        with making(run / "checkpoints"):
            lock = (run / ".lock").open("w", encoding="utf-8")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if lock:
            lock.close()
        reject("--run", run, "another process is training in it", "wait for it, or choose another folder")
    except OSError as error:
        if lock and error.errno in NO_LOCKS:
            print(f"warning: {run} is on a file system without locks: start one job per folder", file=sys.stderr)
            return lock
        reject("--run", run, f"cannot be written ({error.strerror or error})", "choose another folder")
    return lock


def _read_manifest(path: Path) -> dict[str, Any]:
    """Raises ValueError, saying what is wrong with it; ConfigError if it cannot be read."""
    try:
        tree = read_json(path / MANIFEST)
    except NOT_FOUND as error:
        raise ValueError(f"{MANIFEST} is missing") from error
    except OSError as error:
        unreadable(path / MANIFEST, error)
    except ValueError as error:
        raise ValueError(f"{MANIFEST} is not JSON ({error})") from error
    if not isinstance(tree, dict) or tree.get("format") != FORMAT:
        raise ValueError(f"{MANIFEST} is not of format {FORMAT}")
    if tree.pop("blake2b", None) != tree_digest(tree):
        raise ValueError(f"{MANIFEST} does not match its own checksum")
    depth = 2 if "weights" in tree else 1  # an exported pipeline keeps its transformer in a folder
    if any(Path(name).is_absolute() or len(p := Path(name).parts) > depth or ".." in p for name in tree["files"]):
        raise ValueError(f"{MANIFEST} names files elsewhere")
    if "weights" not in tree and folder(path.parent.parent, tree["step"]).name != path.name:
        raise ValueError(f"{MANIFEST} says step {tree['step']}: give the folder its name back")
    return tree


def manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint folder; raises ConfigError naming the file."""
    try:
        return _read_manifest(path)
    except ValueError as error:
        reject("checkpoint", path, str(error), "use another checkpoint")


def write_manifest(path: Path, tree: dict[str, Any]) -> None:
    """Write the manifest of a checkpoint folder, with the checksum of its own content, flushed to disk."""
    write_text(path / MANIFEST, json.dumps(tree | {"blake2b": tree_digest(tree)}, indent=1), durable=True)


def tree_digest(tree: dict[str, Any]) -> str:
    """blake2b of a plain tree, whatever the order of its keys."""
    return hashlib.blake2b(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def file_entry(path: Path) -> dict[str, Any]:
    """What the manifest says of a file, by its name."""
    return {path.name: {"bytes": path.stat().st_size, "blake2b": file_digest(path)}}


@contextlib.contextmanager
def progress(what: str, total: int, quiet: bool = False) -> Iterator[Callable[[int], object]]:
    """Yields a function to tell bytes to; a bar on a terminal, for what takes longer than a second."""
    with tqdm(
        total=total, desc=what, unit="B", unit_scale=True, unit_divisor=1024, disable=quiet or None, delay=1
    ) as bar:
        yield bar.update


def size(count: float) -> str:
    """Bytes for people: 512 B, 3.4 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            break
        count, unit = count / 1024, "TiB"
    return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"


def damages(
    path: Path, read_bytes: bool = True, share: slice = slice(None), tick: Callable[[int], object] = lambda read: None
) -> Iterator[str]:
    """Everything that is wrong with a checkpoint, file by file.

    Args:
        path: the checkpoint's folder.
        read_bytes: also read every byte and compare checksums.
        share: which of the files to look at (ranks share the reading).
        tick: told how many bytes were read.

    Raises:
        ConfigError: a file cannot be read, so nobody knows.
    """
    try:
        files = _read_manifest(path)["files"]
    except ValueError as error:
        yield str(error)
        return
    for name, entry in sorted(files.items())[share]:
        try:
            found = (path / name).stat().st_size
            if found != entry["bytes"]:
                yield f"{name} has {found} bytes instead of {entry['bytes']}"
            elif read_bytes and file_digest(path / name, tick=tick) != entry["blake2b"]:
                yield f"{name} does not match its checksum"
        except NOT_FOUND:
            yield f"{name} is missing"
        except OSError as error:
            unreadable(path / name, error)


def damage(path: Path, read_bytes: bool = True, share: slice = slice(None), quiet: bool = True) -> str | None:
    """The first thing that is wrong with a checkpoint, or None; arguments as of `damages`. `quiet`: no progress."""
    with progress(f"verifying {path.name}", 0 if quiet else bytes_of(path, share), quiet) as tick:
        return next(damages(path, read_bytes, share, tick), None)


def bytes_of(path: Path, share: slice = slice(None)) -> int:
    """Bytes in the files of a checkpoint folder, of those that can be seen."""
    sizes = []
    for file in sorted(path.glob("*")):
        with contextlib.suppress(OSError):  # `damages` will name it
            if file.is_file() and file.name != MANIFEST:
                sizes.append(file.stat().st_size)
    return sum(sizes[share])


def removal(run: Path) -> str:
    """The command that removes the damaged checkpoints of a run."""
    return f"python launchers/checkpoint.py prune --run {shlex.quote(str(run))} --damaged"


def find_whole(run: Path, ranks: Ranks, read_bytes: bool = True) -> Path | None:
    """The newest checkpoint of a run, every byte verified (the ranks share the reading), or the sizes of its files
    alone; None if there is none.

    Raises:
        ConfigError: the newest is damaged. The message names the file and the newest whole one before it; training
            does not go on from an older state, or from nothing, unless the user removes the damaged one. Or a file
            cannot be read. On every rank alike, whichever met it.
    """

    def gathered(look: Callable[[], Any]) -> list[Any]:
        try:
            mine = look()
        except ConfigError as error:
            mine = error
        answers = ranks.gather(mine)
        for error in answers:
            if isinstance(error, ConfigError):
                raise error
        return answers

    found = gathered(lambda: candidates(run))[0]
    if not found:
        return None
    last, share = found[-1], slice(ranks.rank, None, ranks.world)
    problem = next(filter(None, gathered(lambda: damage(last, read_bytes, share, quiet=ranks.rank > 0))), None)
    if problem is None:
        return last
    older = found[-2::-1] if ranks.rank == 0 else []
    whole = gathered(lambda: next((p for p in older if damage(p, read_bytes, quiet=False) is None), None))[0]
    way_out = f"remove it to continue from {whole.name}: {removal(run)}" if whole else ""
    reject("checkpoint", last, f"is damaged: {problem}", way_out or "no whole one is left: use another --run")
