"""Latents on disk: sharded safetensors with an index.

    DIR/index.json                 classes, codec, crop, shape, dtype; of every shard: file, items, bytes, checksum
    DIR/items.safetensors          label int64 [N]; names uint8, joined by newlines: which image item i is
    DIR/shard-00000-of-01252.safetensors   moments [n, F, M, h, w]: of the image, and (F = 2) of its mirror image

Items are numbered in the order of the shards. Only `index.json` makes a folder complete; it is written last.

Legend: N items, n items of a shard, M channels of moments, h w latent cells, H = W pixels.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from promoe_ds.config.errors import reject
from promoe_ds.utils.files import atomic, check_readable, file_digest, write_text

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


def read_index(folder: Path, option: str = "data.path") -> Index:
    """The index of a complete folder.

    Raises:
        ConfigError: no index, another format, or a shard that is missing or of another length.
    """
    path = folder / INDEX
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        if tree.pop("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT}")
        index = Index(**{**tree, "shards": [Shard(**shard) for shard in tree["shards"]]})
        if missing := [key for key in CODEC if key not in index.codec]:
            raise ValueError(f"its codec has no {missing[0]}")
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


def verify(folder: Path, option: str = "--verify") -> Index:
    """Read every byte and compare checksums. Raises `ConfigError` naming the first file that differs."""
    index = read_index(folder, option)
    for file, expected in [(ITEMS, index.items_blake2b), *((s.file, s.blake2b) for s in index.shards)]:
        try:
            found = file_digest(folder / file)
        except OSError as error:
            reject(option, folder / file, f"cannot be read ({error.strerror})", f"copy it back, or {AGAIN}")
        if found != expected:
            reject(option, folder / file, "does not match its checksum", f"remove it and {AGAIN}")
    return index
