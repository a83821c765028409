"""Checkpoints that know no topology, and that are whole or not there.

    RUN/checkpoints/step_00000200/
        state-00000-of-00002.safetensors   full fp32 tensors: NAME/fp32, NAME/exp_avg, NAME/exp_avg_sq
        ema.safetensors                    the model's state dict with EMA weights: what sampling and evaluation read;
                                       also the buffers of routers, not averaged
        manifest.json                      written last: step, config, sizes and checksums of the files

The tensors are stored in full under single-device names, so any world size, expert-parallel degree and ZeRO stage can
resume from them; the ranks share the writing by parameter. A checkpoint is written into `tmp_*`, flushed to disk and
renamed: a half-written one is never picked up. Everything is safetensors or JSON; nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from promoe_ds import __version__
from promoe_ds.config import Config, ConfigError, decode, dump, encode, reject

FORMAT = "promoe_ds/1"
MANIFEST = "manifest.json"
EMA = "ema.safetensors"
RESUMED_STATES = ("fp32", "exp_avg", "exp_avg_sq")
FREE_ON_RESUME = {
    *("name", "sample", "guidance", "diffusion.ddpm.clip_denoised"),
    *("parallel", "data.path", "data.prefetch", "moe.experts_backend"),
    *("train.steps", "train.log_every", "train.checkpoint_every", "train.keep_last", "train.sample_every"),
    "train.measure",
    *("train.micro_batch_size", "train.activation_checkpointing", "moe.router.superclasses"),
}
"""Keys that may differ between a checkpoint and the run that resumes it: how a step is computed, for how long, what is
shown. Accumulation and ranks change the contrastive loss in the cases docs/training.md names."""


class StateAccess(Protocol):
    """What a checkpoint needs of the engine; see `promoe_ds.parallel.engine.Engine`."""

    params: dict[str, Any]

    def read(self, name: str, state: str) -> Tensor: ...
    def write(self, name: str, state: str, full: Tensor) -> None: ...
    def allocate(self, step: int) -> None: ...
    def relink(self) -> None: ...


@dataclass(frozen=True)
class Ranks:
    """How the ranks of a job talk while saving and loading."""

    rank: int = 0
    world: int = 1
    gather: Callable[[Any], list[Any]] = lambda value: [value]
    """the value of every rank, on every rank; also a barrier"""


def folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step_{step:08d}"


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def candidates(run: Path) -> list[Path]:
    """Every checkpoint folder of a run, whole or damaged, oldest first."""
    if not (run / "checkpoints").is_dir():
        return []
    return sorted(p for p in (run / "checkpoints").iterdir() if re.fullmatch(r"step_\d{8,}", p.name))


def newest(run: Path) -> Path | None:
    """The newest complete checkpoint folder of a run (its manifest is there and sizes agree), or None."""
    return next((p for p in reversed(candidates(run)) if damage(p, read_bytes=False) is None), None)


# --------------------------------------------------------------------------------------------------------- integrity


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


def manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint folder; raises ConfigError naming the file."""
    try:
        tree = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reject("checkpoint", path, f"{MANIFEST} cannot be read ({error})", "use another checkpoint")
    if not isinstance(tree, dict) or tree.get("format") != FORMAT:
        reject("checkpoint", path, f"{MANIFEST} is not of format {FORMAT}", "use another checkpoint")
    if tree.pop("blake2b", None) != _tree_digest(tree):
        reject("checkpoint", path, f"{MANIFEST} does not match its own checksum", "use another checkpoint")
    if folder(path.parent.parent, tree["step"]).name != path.name:
        reject("checkpoint", path, f"{MANIFEST} says step {tree['step']}", "give the folder its name back")
    return tree


def _tree_digest(tree: dict[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def damage(path: Path, read_bytes: bool = True, share: slice = slice(None)) -> str | None:
    """What is wrong with a checkpoint, or None.

    Args:
        path: the checkpoint's folder.
        read_bytes: also read every byte and compare checksums.
        share: which of the files to look at (ranks share the reading).
    """
    try:
        files = manifest(path)["files"]
    except ConfigError as error:
        return str(error)
    for name, entry in sorted(files.items())[share]:
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != entry["bytes"]:
            return f"{name} has {file.stat().st_size} bytes instead of {entry['bytes']}"
        if read_bytes and _digest(file) != entry["blake2b"]:
            return f"{name} does not match its checksum"
    return None


def find_whole(run: Path, ranks: Ranks) -> Path | None:
    """The newest checkpoint of a run, every byte verified (the ranks share the reading); None if there is none.

    Raises:
        ConfigError: the newest is damaged. The message names the file and the newest whole one before it; training
            does not go on from an older state, or from nothing, unless the user removes the damaged one.
    """
    found = candidates(run)
    if not found:
        return None
    last = found[-1]
    problem = next(filter(None, ranks.gather(damage(last, share=slice(ranks.rank, None, ranks.world)))), None)
    if problem is None:
        return last
    whole = next((p for p in reversed(found[:-1]) if damage(p) is None), None) if ranks.rank == 0 else None
    whole = ranks.gather(whole)[0]
    way_out = f"remove it to continue from {whole.name}" if whole else "no whole one is left: use another --run"
    reject("checkpoint", last, f"is damaged: {problem}", way_out)


# ------------------------------------------------------------------------------------------------------------ saving


def ema_state_dict(engine: StateAccess, fixed: dict[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """The EMA model on rank 0 (fp32, CPU); collective, empty on the other ranks.

    Args:
        fixed: what the optimizer does not train (the position table, buffers of routers), as it is.
    """
    engine.relink()
    out = {name: tensor.detach().float().cpu().contiguous() for name, tensor in fixed.items()}
    for name in engine.params:
        full = engine.read(name, "ema")
        if ranks.rank == 0:
            out[name] = full.float().cpu().contiguous().clone()
    return out if ranks.rank == 0 else {}


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> dict[str, Any]:
    save_file(tensors, path, metadata=metadata)
    _fsync(path)
    return {path.name: {"bytes": path.stat().st_size, "blake2b": _digest(path)}}


def _trouble(work: Callable[[], Any]) -> str | None:
    """Do it; say what went wrong, if anything did, so that every rank can be told."""
    try:
        work()
    except (OSError, SafetensorError) as error:
        return str(error)
    return None


def _share(engine: StateAccess, ranks: Ranks) -> dict[str, Tensor]:
    """This rank's part of the state, on the CPU; every rank takes part in every read."""
    mine = {}
    for i, name in enumerate(engine.params):
        for state in RESUMED_STATES:
            full = engine.read(name, state)
            if i % ranks.world == ranks.rank:
                mine[f"{name}/{state}"] = full.float().cpu().contiguous().clone()
    return mine


def save(
    run: Path,
    engine: StateAccess,
    fixed: dict[str, Tensor],
    step: int,
    config: Config,
    ranks: Ranks,
    facts: dict[str, Any],
) -> Path:
    """Write the checkpoint of `step` (optimizer steps done); collective. Returns its folder.

    Args:
        fixed: what the optimizer does not train, for the EMA file.
        facts: what to record besides (topology, versions).

    Raises:
        ConfigError: on every rank, if a rank could not write; the previous checkpoint is untouched.
    """
    final = folder(run, step)
    temporary = final.with_name(f"tmp_{final.name}")
    problem = None
    if ranks.rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        problem = _trouble(lambda: temporary.mkdir(parents=True, exist_ok=True))
    ranks.gather(None)
    metadata = {"format": FORMAT, "config": dump(config), "step": str(step)}
    files: dict[str, Any] = {}
    # The EMA is written and freed before this rank's share is collected: rank 0 holds one copy of the model at a time.
    ema = ema_state_dict(engine, fixed, ranks)
    if ranks.rank == 0 and problem is None:
        problem = _trouble(lambda: files.update(_write(temporary / EMA, ema, metadata)))
    ema.clear()
    mine = _share(engine, ranks)
    if problem is None:
        name = f"state-{ranks.rank:05d}-of-{ranks.world:05d}.safetensors"
        problem = _trouble(lambda: files.update(_write(temporary / name, mine, metadata)))
    if problem:
        problem = f"rank {ranks.rank}: {problem}"
    answers = ranks.gather((files, problem))
    problem = next((p for _, p in answers if p), None)
    if problem is None and ranks.rank == 0:
        entries = {name: entry for part, _ in answers for name, entry in part.items()}
        tree = {"format": FORMAT, "version": __version__, "step": step, "config": encode(config), **facts}
        problem = _trouble(lambda: _finish(temporary, final, tree | {"files": entries}))
    problem = ranks.gather(problem)[0]
    if problem and ranks.rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)  # on a full disk it is in the way
    if problem:
        reject("checkpoint", final, f"cannot be written ({problem})", "free space or mend the folder, then resume")
    return final


def write_manifest(path: Path, tree: dict[str, Any]) -> None:
    """Write the manifest of a checkpoint folder, with the checksum of its own content."""
    (path / MANIFEST).write_text(json.dumps(tree | {"blake2b": _tree_digest(tree)}, indent=1), encoding="utf-8")


def _finish(temporary: Path, final: Path, tree: dict[str, Any]) -> None:
    """Write the manifest, flush, and give the folder its name: from here on the checkpoint exists."""
    write_manifest(temporary, tree)
    _fsync(temporary / MANIFEST)
    _fsync(temporary)
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
    _fsync(final.parent)


def prune(run: Path, keep_last: int) -> None:
    """Delete all but the newest `keep_last` checkpoints, and what interrupted saves left behind."""
    for path in candidates(run)[:-keep_last]:
        shutil.rmtree(path, ignore_errors=True)
    for path in (run / "checkpoints").glob("tmp_*"):
        shutil.rmtree(path, ignore_errors=True)


# ----------------------------------------------------------------------------------------------------------- loading


def differences(old: Any, new: Any, path: str = "") -> Iterable[tuple[str, Any, Any]]:
    """Keys at which two plain configuration trees differ, with both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(k for k in new if k not in old)]:
            inner = f"{path}.{key}" if path else key
            if inner not in FREE_ON_RESUME:
                yield from differences(old.get(key), new.get(key), inner)
    elif old != new:
        yield path, old, new


def check_same_run(saved: dict[str, Any], config: Config, where: Path) -> None:
    """Raise ConfigError if a saved configuration computes something else than `config`."""
    try:
        known = encode(decode(saved))
    except ConfigError as error:
        reject("--run", where, f"holds a configuration that this version cannot read ({error})", "choose another --run")
    for path, old, new in differences(known, encode(config)):
        reject(path, new, f"{where} was made with {path}={old}", f"set {path}={old} or choose another --run")


class Reader:
    """Random access to the full tensors of a checkpoint's state files."""

    def __init__(self, path: Path):
        self.path = path
        self.where: dict[str, Any] = {}
        for name in sorted(manifest(path)["files"]):
            file = safe_open(path / name, framework="pt")
            prefix = "ema/" if name == EMA else ""
            self.where |= {prefix + key: (file, key) for key in file.keys()}

    def __call__(self, name: str, state: str) -> Tensor:
        """The full fp32 tensor of a parameter's state; raises ConfigError if the checkpoint lacks it."""
        key = f"ema/{name}" if state == "ema" else f"{name}/{state}"
        if key not in self.where:
            reject("checkpoint", self.path, f"holds no {key}", "use a checkpoint of this model")
        file, inner = self.where[key]
        return file.get_tensor(inner)


def load_weights(reader: Reader, params: Mapping[str, Tensor], local: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Copy master weights into a model before the engine is made.

    Args:
        params: trainable parameters by name.
        local: (parameter, full tensor) -> this rank's part of it.
    """
    with torch.no_grad():
        for name, p in params.items():
            part = local(p, reader(name, "fp32"))
            if part.shape != p.shape:
                reject(
                    "checkpoint",
                    reader.path,
                    f"{name} has shape {list(part.shape)}, the model {list(p.shape)}",
                    "use a checkpoint of this model",
                )
            p.copy_(part)


def load_buffers(reader: Reader, buffers: Mapping[str, Tensor]) -> None:
    """Copy the buffers, which are equal on every rank, from the EMA file. Raises ConfigError if one is missing."""
    with torch.no_grad():
        for name, buffer in buffers.items():
            buffer.copy_(reader(name, "ema"))


def restore(reader: Reader, engine: StateAccess, step: int) -> None:
    """Fill the engine's master weights, moments and EMA as after `step` updates."""
    engine.allocate(step)
    for name in engine.params:
        for state in (*RESUMED_STATES, "ema"):
            engine.write(name, state, reader(name, state))


def saved_config(run: Path) -> dict[str, Any] | None:
    """The plain configuration tree in RUN/config.yaml, or None."""
    path = run / "config.yaml"
    if not path.is_file():
        return None
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reject("--run", path, f"cannot be read ({' '.join(str(error).split())})", "mend it or choose another --run")
    if not isinstance(tree, dict):
        reject("--run", path, "is not a configuration", "mend it or choose another --run")
    return tree
