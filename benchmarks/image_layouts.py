"""The same pictures in every layout that images are read from, written from the layouts' descriptions: for the timing
of `image_sources.py`, and for tests."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

Item = tuple[str, bytes, int]
"""name, content of the file, class"""
CLASSES = [f"n{number:02d}" for number in range(1, 51)]
"""names of the classes; so many are used as the items have"""


def picture(seed: int, width: int = 20, height: int = 16) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image: Image.Image, kind: str = "jpeg") -> bytes:
    image.save(buffer := io.BytesIO(), kind)
    return buffer.getvalue()


def some_items(count: int = 11) -> list[Item]:
    """JPEGs and PNGs of three classes, sorted by class as a tree lists them."""
    items = []
    for number in range(count):
        label, kind = number * 3 // count, "png" if number % 3 == 2 else "jpeg"
        items.append((f"{CLASSES[label]}_{number:05d}.{kind}", encoded(picture(number), kind), label))
    return items


def write_folders(root: Path, items: Sequence[Item]) -> Path:
    for name, data, label in items:
        (root / CLASSES[label]).mkdir(parents=True, exist_ok=True)
        (root / CLASSES[label] / name).write_bytes(data)
    return root


def write_parquet(root: Path, items: Sequence[Item], files: int = 2, classes: int | None = None, **how: Any) -> Path:
    """As datasets 5 writes it, or with other options of pyarrow.parquet.write_table.

    Args:
        classes: how many are named; None: as many as the items have, 0: none.
    """
    root.mkdir(parents=True, exist_ok=True)
    how = {"row_group_size": 3, "use_dictionary": False, "compression": "none"} | how
    count = 1 + max(label for *_, label in items) if classes is None else classes
    feature = {"names": CLASSES[:count], "_type": "ClassLabel"} if count else {"dtype": "int64", "_type": "Value"}
    features = {"image": {"_type": "Image"}, "label": feature}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("image", kind), ("label", pa.int64())], metadata)
    for number, part in enumerate(np.array_split(np.arange(len(items)), files)):
        chosen = [items[i] for i in part]
        columns = {
            "image": [{"bytes": data, "path": name} for name, data, _ in chosen],
            "label": [label for *_, label in chosen],
        }
        file = root / f"train-{number:05d}-of-{files:05d}.parquet"
        pq.write_table(pa.table(columns, schema), file, **how)
    return root


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def write_tars(root: Path, items: Sequence[Item], files: int = 2, format: int = tarfile.USTAR_FORMAT) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for number, part in enumerate(np.array_split(np.arange(len(items)), files)):
        with tarfile.open(root / f"pictures-train-{number:04d}.tar", "w", format=format) as tar:
            for i in part:
                name, data, label = items[i]
                stem, _, kind = name.partition(".")
                add(tar, f"{stem}.json", b"{}")  # is passed over
                pair = [(f"{stem}.{kind}", data), (f"{stem}.cls", str(label).encode())]
                for member in pair if i % 2 else pair[::-1]:
                    add(tar, *member)
    return root


def write_files(path: Path, files: Mapping[str, bytes]) -> Path:
    """A folder of these files, or a stored zip where the path ends so."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
            for name, data in files.items():
                archive.writestr(name, data)
        return path
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def write_numbered(path: Path, items: Sequence[Item]) -> Path:
    """A folder, or a zip where the path ends so."""
    files: dict[str, bytes] = {}
    for number, (name, data, _) in enumerate(items):
        files[f"{number // 4:05d}/img{number:08d}.{name.partition('.')[2]}"] = data
    labels = [[name, label] for name, (*_, label) in zip(files, items, strict=True)]
    files["dataset.json"] = json.dumps({"labels": labels}).encode()
    return write_files(path, files)


def write_zip(root: Path, items: Sequence[Item]) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    return write_numbered(root / "pictures.zip", items)


def as_old_parquet(root: Path, items: Sequence[Item]) -> Path:
    """As the files that lie at Hugging Face since 2022: compressed, in dictionaries."""
    return write_parquet(root, items, row_group_size=4, use_dictionary=True, compression="snappy")


def as_pages(root: Path, items: Sequence[Item]) -> Path:
    """A page per value, of the newer kind."""
    return write_parquet(root, items, data_page_version="2.0", data_page_size=1, write_batch_size=1)


SOURCES: dict[str, Callable[[Path, Sequence[Item]], Path]] = {
    "parquet": write_parquet,
    "parquet_pages": as_pages,
    "parquet_snappy": as_old_parquet,
    "tars": write_tars,
    "numbered": write_numbered,
    "zip": write_zip,
}
"""how to write each of them below a path that does not exist yet; gives what `open_images` is told"""
