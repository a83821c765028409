"""Latents on disk: sharded safetensors with an index.

    DIR/index.json                 classes, codec, crop, shape, dtype; of every shard: file, items, bytes, checksum
    DIR/items.safetensors          label int64 [N]; names uint8, joined by newlines: which image item i is
    DIR/shard-00000-of-01252.safetensors   moments [n, F, M, h, w]: of the image, and (F = 2) of its mirror image

Items are numbered in the order of the shards. Only `index.json` makes a folder complete; it is written last.

Legend: N items, n items of a shard, M channels of moments, h w latent cells, H = W pixels.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from promoe_ds.config.errors import reject, written
from promoe_ds.utils.files import atomic, check_readable, file_digest, read_json, write_text

FORMAT = "promoe_ds_latents/1"
INDEX, ITEMS = "index.json", "items.safetensors"
CODEC = ("kind", "channels", "factor", "scale", "shift", "stochastic", "digest")
"""what is said of the codec, `Codec.record`"""
DTYPES = {"float16": np.float16, "float32": np.float32}
AGAIN = "run launchers/encode_latents.py again"


@dataclass(frozen=True)
class Shard:
    """A finished shard."""

    file: str
    items: int
    bytes: int
    blake2b: str


@dataclass(frozen=True)
class Index:
    """What `index.json` says; nothing in it depends on how many processes wrote the shards, or when."""

    classes: list[str]
    items: int
    """N, over all shards"""
    shape: list[int]
    """[F, M, h, w] of an item: F is 2 where its mirror image is stored too, else 1"""
    dtype: str
    image_size: int
    """H, of the images that were encoded; 0 where it is not known"""
    crop: str
    codec: dict[str, Any]
    """`Codec.record`"""
    items_blake2b: str
    shards: list[Shard]
    skipped: list[dict[str, str]]
    """damaged images left out on request: name and reason"""


def shard_name(number: int, count: int) -> str:
    return f"shard-{number:05d}-of-{count:05d}.safetensors"


def write_tensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """A safetensors file, flushed to disk before it takes its name."""
    with atomic(path, durable=True) as temporary:
        save_file(tensors, temporary)


def write_index(folder: Path, index: Index) -> None:
    write_text(folder / INDEX, json.dumps({"format": FORMAT, **asdict(index)}, indent=1) + "\n")


Rule = Callable[[Any], bool]


def _natural(value: Any) -> bool:
    return type(value) is int and value >= 0  # True is an int, too


def _number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e30  # float32 holds it


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _all(value: Any, rule: Rule, length: int | None = None) -> bool:
    """Whether it is a list of such items, of this length if one is said."""
    return isinstance(value, list) and length in (None, len(value)) and all(map(rule, value))


def _check(what: str, tree: dict[str, Any], rules: dict[str, Rule]) -> None:
    """Raise ValueError for the first key that is absent or holds what its rule does not allow."""
    for key, rule in rules.items():
        if key not in tree:
            raise ValueError(f"{what} has no {key}")
        if not rule(tree[key]):
            raise ValueError(f"{what} has {key}={written(tree[key])[:80]}")


def check_codec(record: Any) -> None:
    """Raise ValueError if something that was read is no `Codec.record`."""
    if not isinstance(record, dict):
        raise ValueError("its codec is no record of one")

    def per_channel(value: Any) -> bool:
        return _number(value) or _all(value, _number, record["channels"])

    rules: dict[str, Rule] = {
        "kind": _text,
        "channels": _natural,
        "factor": _natural,
        "scale": per_channel,
        "shift": per_channel,
        "stochastic": lambda value: isinstance(value, bool),
        "digest": _text,
    }
    more: dict[str, Rule] = {
        "pixel_range": lambda value: _all(value, _number, 2),
        "std": lambda value: _number(value) and isinstance(record["scale"], list),
    }
    _check("its codec", record, rules | {key: rule for key, rule in more.items() if key in record})


def _decoded(tree: Any) -> Index:
    """Raises ValueError, TypeError, KeyError or AttributeError for what is no index, or contradicts itself."""
    if tree.pop("format") != FORMAT:
        raise ValueError(f"its format is not {FORMAT}")
    check_codec(codec := tree["codec"])
    for shard in tree["shards"]:
        here: Rule = lambda value: _text(value) and Path(value).name == value  # noqa: E731
        _check("a shard of it", shard, {"file": here, "items": _natural, "bytes": _natural, "blake2b": _text})
    total = sum(shard["items"] for shard in tree["shards"])
    moments = codec["channels"] * (2 if codec["stochastic"] else 1)
    rules: dict[str, Rule] = {
        "classes": lambda value: _all(value, _text) and len(value) > 0,
        "items": lambda value: _natural(value) and value == total > 0,
        "shape": lambda value: _all(value, _natural, 4) and value[0] in (1, 2) and value[1] == moments > 0,
        "dtype": lambda value: value in DTYPES,
        "image_size": _natural,
        "crop": _text,
        "items_blake2b": _text,
        "skipped": lambda value: _all(value, lambda item: isinstance(item, dict)),
    }
    _check("it", tree, rules)
    return Index(**{**tree, "shards": [Shard(**shard) for shard in tree["shards"]]})


def read_index(folder: Path, option: str = "data.path") -> Index:
    """The index of a complete folder.

    Raises:
        ConfigError: no index, another format, or a shard that is missing or of another length.
    """
    path = folder / INDEX
    try:
        index = _decoded(read_json(path))
    except FileNotFoundError:
        reject(option, folder, f"has no {INDEX}: no latents, or not all of them are encoded", AGAIN)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        reject(option, path, f"cannot be used ({' '.join(str(error).split())})", AGAIN)
    for shard in index.shards:
        file = folder / shard.file
        try:
            found = file.stat().st_size
        except OSError as error:
            reject(option, file, f"cannot be read ({error.strerror})", f"copy it back, or {AGAIN}")
        if found != shard.bytes:
            reject(option, file, f"has {found} bytes, the index says {shard.bytes}", f"remove it and {AGAIN}")
    return index


def open_tensors(path: Path, option: str = "data.path", again: str = AGAIN) -> Any:
    """A safetensors file mapped into memory, arrays as NumPy. Raises `ConfigError` if it is none; `again` makes it."""
    try:
        check_readable(path)
        return safe_open(str(path), framework="np")
    except OSError as error:
        reject(option, path, f"cannot be read ({error.strerror or error})", f"copy it back, or {again}")
    except SafetensorError as error:
        reject(option, path, f"cannot be opened ({' '.join(str(error).split())})", f"remove it and {again}")


def open_moments(folder: Path, index: Index, shard: Shard, option: str = "data.path") -> Any:
    """The moments of a shard, [n, F, M, h, w], mapped into memory. Raises `ConfigError` if it holds others."""
    file, expected = folder / shard.file, [shard.items, *index.shape]
    mapped = open_tensors(file, option).get_slice("moments")
    if mapped.get_shape() != expected:
        conflict = f"holds {mapped.get_shape()}, the index says {expected}"
        reject(option, file, conflict, f"remove it and {AGAIN}")
    return mapped


def verify(folder: Path, option: str = "--verify") -> Index:
    """Read every byte and compare checksums and shapes. Raises `ConfigError` naming the first file that differs."""
    index = read_index(folder, option)
    for file, expected in [(ITEMS, index.items_blake2b), *((s.file, s.blake2b) for s in index.shards)]:
        try:
            found = file_digest(folder / file)
        except OSError as error:
            reject(option, folder / file, f"cannot be read ({error.strerror})", f"copy it back, or {AGAIN}")
        if found != expected:
            reject(option, folder / file, "does not match its checksum", f"remove it and {AGAIN}")
    for shard in index.shards:
        open_moments(folder, index, shard, option)
    return index
