"""Finding a model's weights and loading them; needs no DeepSpeed.

Read are safetensors whose header holds the configuration: the EMA file of a checkpoint, a weights folder
(`formats/weights.py`), shards with an index. Nothing is unpickled.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from promoe_ds.checkpoint.layout import (
    EMA,
    FORMAT,
    MANIFEST,
    WEIGHTS,
    WEIGHTS_INDEX,
    candidates,
    damage,
    damages,
    is_checkpoint_name,
    manifest,
    newest,
    unreadable,
)
from promoe_ds.config.decode import BAD_YAML, read_yaml
from promoe_ds.config.errors import ConfigError, reject
from promoe_ds.config.schema import Config
from promoe_ds.models.dit import DiT
from promoe_ds.models.init import build
from promoe_ds.recipes.load import load_tree
from promoe_ds.utils.files import NOT_FOUND, check_readable, file_digest, is_dir, is_file, read_json


def find_weights(path: Path, option: str = "--run") -> Path:
    """The weights meant by a file, a checkpoint folder, a weights folder (`launchers/export.py`), or a
    run folder (its newest complete checkpoint).

    Raises:
        ConfigError: nothing there, the newest is damaged, or something cannot be read; `option` is what the message
            calls the path.
    """
    try:
        file = _find_weights(path, option)
        check_readable(file)
    except OSError as error:
        unreadable(Path(error.filename or path), error, option)
    return file


def _find_weights(path: Path, option: str) -> Path:
    """As `find_weights`; raises OSError where something cannot be looked at."""
    if is_file(path):
        return path
    if not is_dir(path):
        reject(option, path, "no such file or folder", "name a run folder, a checkpoint folder or an ema.safetensors")
    for name in (EMA, WEIGHTS, WEIGHTS_INDEX):
        if is_file(path / name):
            if problem := (damage(path, read_bytes=False) if is_checkpoint_name(path.resolve().name) else None):
                reject(option, path, f"is damaged: {problem}", "name another checkpoint")
            if name != EMA and is_file(path / MANIFEST):  # of a weights folder, whose config.json is never read
                problems = (text for text in damages(path, read_bytes=False) if not text.startswith("config.json "))
                if problem := next(problems, None):
                    reject(option, path, f"is damaged: {problem}", "copy or export it again")
            return path / name
    found = candidates(path)
    if not found and is_file(path / "model_index.json"):
        way_out = "load it with DiffusionPipeline, or export a safetensors folder"
        reject(option, path, "is a diffusers pipeline", way_out)
    if not found:
        reject(option, path, "holds no complete checkpoint", "train first, or name another run folder")
    problem = damage(found[-1], read_bytes=False)
    if problem:  # never an older model in silence
        whole = newest(path)
        choice = f"add --model {whole}" if option.startswith("--") else f"set {option}={whole}"
        way_out = f"remove it, or {choice}" if whole else "no whole checkpoint is left: name another run"
        reject(option, found[-1], f"is damaged: {problem}", way_out)
    if not is_file(found[-1] / EMA):
        reject(option, found[-1], f"has no {EMA}", "name another checkpoint folder")
    return found[-1] / EMA


def checked_digest(file: Path, option: str = "weights") -> str:
    """The digest of a file, compared with the manifest beside it if there is one; raises ConfigError."""
    try:
        digest = file_digest(file)
    except OSError as error:
        unreadable(file, error, option)
    if file.with_name(MANIFEST).is_file():
        expected = manifest(file.parent)["files"].get(file.name, {}).get("blake2b", digest)
        if digest != expected:
            reject(option, file, "is damaged: it does not match its checksum", "name another checkpoint")
    return digest


def shard_files(file: Path) -> list[Path]:
    """The safetensors files that a file stands for: itself, or those that an index names. Raises ConfigError."""
    if file.name != WEIGHTS_INDEX:
        return [file]
    try:
        names = sorted(set(read_json(file)["weight_map"].values()))
        if not names or any(Path(name).name != name for name in names):
            raise ValueError("it names no files beside it")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reject("weights", file, f"is no index of weights ({error})", "restore it or name another model")
    return [file.with_name(name) for name in names]


def open_weights(file: Path, device: torch.device | str = "cpu") -> Any:
    """A safetensors file, opened for random access; raises ConfigError."""
    try:
        check_readable(file)
        return safe_open(str(file), framework="pt", device=str(device))
    except (SafetensorError, *NOT_FOUND) as error:
        conflict = f"is damaged or no safetensors file ({' '.join(str(error).split())})"
        reject("weights", file, conflict, "restore it or name another checkpoint")
    except OSError as error:
        unreadable(file, error, "weights")


def read_weights(file: Path, device: torch.device) -> tuple[dict[str, torch.Tensor], Config, int, dict[str, str]]:
    """Tensors as `load_ema` gives them to the model, configuration, step and header of a file or an index of files.

    Raises:
        ConfigError: as of `load_ema`.
    """
    tensors: dict[str, torch.Tensor] = {}
    metadata: dict[str, str] = {}
    for part in shard_files(file):
        with open_weights(part, device) as opened:
            head = opened.metadata() or {}
            if tensors and head != metadata:
                reject("weights", file, f"names shards of different models ({part.name})", "restore its shards")
            metadata = head
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}
    config, step = _decode_metadata(file, metadata)
    if metadata.get("dtype") == "bf16":  # stored so to be small; the model is fp32
        tensors = {name: tensor.float() for name, tensor in tensors.items()}
    return tensors, config, step, metadata


def header(file: Path) -> tuple[Config, int]:
    """Configuration and step of a file, or of an index of files, without its tensors; raises ConfigError."""
    with open_weights(shard_files(file)[0]) as opened:
        return _decode_metadata(file, opened.metadata() or {})


def _decode_metadata(file: Path, metadata: Mapping[str, str]) -> tuple[Config, int]:
    if metadata.get("format") != FORMAT:
        conflict = f"has format {metadata.get('format')!r}, expected {FORMAT!r}"
        reject("weights", file, conflict, "name an ema.safetensors written by launchers/train.py")
    try:
        return load_tree(read_yaml(metadata["config"])), int(metadata["step"])
    except (ConfigError, KeyError, *BAD_YAML) as error:
        conflict = f"its metadata cannot be used ({' '.join(str(error).split())})"
        reject("weights", file, conflict, "restore it or name another checkpoint")


def _empty_model(config: Config) -> DiT:
    """The model without storage, unless it has buffers that its state does not hold: those must be computed."""
    model = build(config)
    stored = model.state_dict().keys()
    return model if all(name in stored for name, _ in model.named_buffers()) else DiT(config)


def _check_tensors(file: Path, found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is unexpected" for name in found if name not in expected]
    for name in expected.keys() & found.keys():
        got, want = found[name], expected[name]
        if got.shape != want.shape or got.dtype != want.dtype:
            problems.append(f"{name} is {got.dtype}{list(got.shape)}, expected {want.dtype}{list(want.shape)}")
    if problems:
        more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
        conflict = f"does not fit its own config: {min(problems)}{more}"
        reject("weights", file, conflict, "restore the file or name another checkpoint")


def load_ema(path: Path | str, device: torch.device | str = "cpu") -> tuple[DiT, Config, int]:
    """The EMA model of a file, checkpoint folder or run folder, with its configuration and training step.

    The weights are assigned to a model built without storage: no weight is drawn only to be overwritten, and the
    largest model needs its own size in memory once.

    Returns:
        The model (float32, `eval`, no gradients, on `device`), the resolved config, the step.

    Raises:
        ConfigError: no checkpoint; a damaged file; another format; missing, unexpected or ill-shaped tensors.
    """
    file, device = find_weights(Path(path)), torch.device(device)
    tensors, config, step, _ = read_weights(file, device)
    model = _empty_model(config)
    _check_tensors(file, tensors, model.state_dict())
    model.load_state_dict(tensors, strict=True, assign=True)
    return model.to(device).eval().requires_grad_(False), config, step
