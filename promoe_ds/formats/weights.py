"""Weights alone, without optimizer state: the folder that sampling, fine-tuning and other people's programs read.

    OUT/model.safetensors    the state dict: EMA or raw weights, fp32 or bf16 (buffers of routers stay fp32);
                             above 5 GB in shards, with model.safetensors.index.json
        config.json          model, recipe, step and form of the weights, for programs; `config.yaml` for --config
        manifest.json        sizes and checksums
        README.md            model card (`card.py`)

What is read is the copy of the configuration in the header of the safetensors files, so a file moved alone still loads.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from promoe_ds._version import __version__
from promoe_ds.checkpoint.convert import checked, made
from promoe_ds.checkpoint.layout import EMA, FORMAT, MANIFEST, WEIGHTS, file_entry, tree_digest
from promoe_ds.checkpoint.load_weights import find_weights, open_weights, read_weights, shard_files
from promoe_ds.checkpoint.resume import Reader
from promoe_ds.checkpoint.save import complete, write_tensors
from promoe_ds.config.decode import dump, encode
from promoe_ds.config.errors import reject
from promoe_ds.config.schema import Config
from promoe_ds.formats.card import model_card
from promoe_ds.models.init import build
from promoe_ds.recipes.load import load_tree
from promoe_ds.utils.files import write_text
from promoe_ds.utils.outputs import CONFIG

Source = Literal["ema", "raw"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class Weights:
    """A model's state dict under single-device names, float32 on the CPU, with what belongs to it."""

    tensors: dict[str, Tensor]
    config: Config
    step: int
    source: Source
    origin: str
    """name of the checkpoint or file they come from"""
    ema_decay: float | None = None
    """of an EMA that is not the one that is sampled"""
    imported: str = ""
    """name of the published file they were imported from, also after they were exported again; empty if trained here"""
    notes: tuple[str, ...] = ()
    """what an import left out or renamed, for people"""

    def facts(self, dtype: str) -> dict[str, Any]:
        """What an exported folder says of them."""
        facts = {"weights": self.source, "dtype": dtype, "source": self.origin, "step": self.step}
        facts |= {"ema_decay": self.ema_decay} if self.ema_decay is not None else {}
        return facts | ({"imported": self.imported} if self.imported else {})


def model_weights(reader: Reader, source: Source, average: str = "ema") -> dict[str, Tensor]:
    """The model's state dict. Raw weights are the fp32 masters; what is not trained is the same in all."""
    names = [key.removeprefix("ema/") for key in reader.where if key.startswith("ema/")]
    raw = {name for name in names if source == "raw" and f"{name}/fp32" in reader.where}
    return {name: reader(name, "fp32" if name in raw else average) for name in names}


def average_of(config: Config, decay: float | None, option: str) -> str:
    """The state that is the EMA of this decay; None is the one that is sampled. Raises ConfigError, listing them."""
    averages = {value: state for state, value in config.optimizer.averages().items()}
    if decay is not None and decay not in averages:
        kept = " and ".join(map(str, averages))
        reject(option, decay, f"the run kept an EMA of decay {kept}", "choose one of these")
    return "ema" if decay is None else averages[decay]


def held(path: Path, option: str = "--model") -> tuple[Source, ...]:
    """The kinds of weights that `load` finds there; raises ConfigError."""
    file = find_weights(path, option)
    if file.name == EMA and (file.parent / MANIFEST).is_file():
        return ("ema", "raw")
    with open_weights(shard_files(file)[0]) as opened:
        return ("raw",) if (opened.metadata() or {}).get("weights") == "raw" else ("ema",)


def load(path: Path, source: Source = "ema", option: str = "--model", decay: float | None = None) -> Weights:
    """Read the weights of a run folder (its newest checkpoint), a checkpoint, or a weights folder.

    Every byte of a checkpoint is verified first.

    Args:
        decay: which EMA of a checkpoint; None: the one that is sampled.

    Raises:
        ConfigError: nothing there; damage; a weights folder that holds the other kind of weights; a checkpoint without
            an EMA of this decay.
    """
    file = find_weights(path, option)
    if file.name == EMA and (file.parent / MANIFEST).is_file():
        tree = checked(file.parent)
        config = load_tree(tree["config"])
        state = average_of(config, decay, "--ema")
        tensors = model_weights(Reader(file.parent), source, state)
        other = decay if state != "ema" else None
        return Weights(tensors, config, tree["step"], source, file.parent.name, other)
    if decay is not None:
        reject("--ema", decay, f"{file} holds one kind of weights", "name a run or a checkpoint, or leave it out")
    tensors, config, step, head = read_weights(file, torch.device("cpu"))
    if head.get("weights", "ema") != source:
        reject("--weights", source, f"{file} holds {head['weights']} weights alone", "choose them, or another source")
    tensors, imported = {k: v.float() for k, v in tensors.items()}, head.get("imported", "")
    other = float(head["ema_decay"]) if "ema_decay" in head else None
    return Weights(tensors, config, step, source, file.parent.name, other, imported)


def cast(weights: Weights, dtype: str) -> dict[str, Tensor]:
    """The tensors to write: what a router counts and compares is never rounded."""
    exact = {name for name, _ in build(weights.config).named_buffers()}
    kind = DTYPES[dtype]
    return {name: t.to(torch.float32 if name in exact else kind).contiguous() for name, t in weights.tensors.items()}


def shards(tensors: Mapping[str, Tensor], limit: int) -> Iterator[dict[str, Tensor]]:
    """Split in order, each part of at most `limit` bytes or of one tensor."""
    part: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if part and sum(t.nbytes for t in part.values()) + tensor.nbytes > limit:
            yield part
            part = {}
        part[name] = tensor
    yield part


def write_safetensors(
    folder: Path, stem: str, tensors: Mapping[str, Tensor], metadata: dict[str, str], limit: int = SHARD_BYTES
) -> dict[str, Any]:
    """STEM.safetensors, or shards and an index in Hugging Face's layout; returns their entries for the manifest."""
    parts = list(shards(tensors, limit))
    if len(parts) == 1:
        return write_tensors(folder / f"{stem}.safetensors", dict(tensors), metadata)
    files: dict[str, Any] = {}
    where: dict[str, str] = {}
    for i, part in enumerate(parts, 1):
        name = f"{stem}-{i:05d}-of-{len(parts):05d}.safetensors"
        files |= write_tensors(folder / name, part, metadata)
        where |= dict.fromkeys(part, name)
    digests = {name: entry["blake2b"] for name, entry in files.items()}  # whoever names the index names its shards
    head = {"total_size": sum(t.nbytes for t in tensors.values()), "blake2b": digests}
    path = folder / f"{stem}.safetensors.index.json"
    return files | file_entry(write_text(path, as_json({"metadata": head, "weight_map": where}), durable=True))


def as_json(tree: Any) -> str:
    return json.dumps(tree, indent=1) + "\n"


def finish(
    temporary: Path,
    out: Path,
    weights: Weights,
    dtype: str,
    files: dict[str, Any],
    metrics: dict[str, Any] | None,
    diffusers: bool = False,
) -> Path:
    """What every exported folder ends with: config.yaml, the model card and the manifest. Returns `out`."""
    config, facts = encode(weights.config), weights.facts(dtype)
    write_text(temporary / CONFIG, dump(weights.config), durable=True)
    write_text(temporary / "README.md", model_card(weights.config, facts, metrics, diffusers), durable=True)
    made_at = datetime.now(UTC).isoformat(timespec="seconds")
    tree = {"format": FORMAT, "version": __version__, "made": made_at, "torch": torch.__version__} | facts
    complete(temporary, out, tree | {"config": config, "config_blake2b": tree_digest(config), "files": files})
    return out


def write(
    weights: Weights,
    out: Path,
    dtype: str = "fp32",
    limit: int = SHARD_BYTES,
    metrics: dict[str, Any] | None = None,
) -> Path:
    """Write a weights folder.

    Args:
        dtype: `fp32`, or `bf16`: half the size, rounded.
        limit: bytes of a shard.
        metrics: of the model card, as in RUN/metrics.json.

    Raises:
        ConfigError: the target exists or cannot be written.
    """
    # Who fine-tunes from here by this configuration keeps the classes and experts that were trained.
    config = replace(weights.config, train=replace(weights.config.train, init_reset=()))
    weights = replace(weights, config=config)
    tensors, head = cast(weights, dtype), {"format": FORMAT, "config": dump(weights.config), "step": str(weights.step)}
    head |= {"weights": weights.source, "dtype": dtype} | ({"imported": weights.imported} if weights.imported else {})
    head |= {"ema_decay": str(weights.ema_decay)} if weights.ema_decay is not None else {}
    with made(out, sum(t.nbytes for t in tensors.values()) * 101 // 100) as temporary:
        files = write_safetensors(temporary, Path(WEIGHTS).stem, tensors, head, limit)
        tree = {"format": FORMAT, "promoe_ds": __version__, **weights.facts(dtype), **encode(weights.config)}
        files |= file_entry(write_text(temporary / "config.json", as_json(tree), durable=True))
        return finish(temporary, out, weights, dtype, files, metrics)
