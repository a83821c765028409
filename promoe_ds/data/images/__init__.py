"""Image files as training data: a class per layout on disk, found by what lies at the path.

    CLASS/NAME.jpg                                                        FolderImages     a folder per class
    NAME.npz: classes, SPLIT_jpeg, SPLIT_offsets, SPLIT_labels            PackedImages     a pack
    train-00000-of-00294.parquet: image.bytes, label                      ParquetImages    Hugging Face
    NAME-0000.tar: KEY.jpg, KEY.cls                                       TarImages        WebDataset
    00000/img00000000.png, dataset.json, often in a zip                   NumberedImages   StyleGAN, edm2, REPA

All of them are `DecodedImages`: raw bytes of image files, and one decoder.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

from promoe_ds.config.errors import reject
from promoe_ds.data.images.decoded import DecodedImages, decode
from promoe_ds.data.images.numbered import NumberedImages
from promoe_ds.data.images.packs import PackedImages
from promoe_ds.data.images.trees import FolderImages
from promoe_ds.data.images.webdataset import TarImages
from promoe_ds.data.labelled import LABELS
from promoe_ds.utils.files import hidden
from promoe_ds.utils.pictures import IMAGE_MODES, SUFFIXES

__all__ = ["DecodedImages", "FolderImages", "NumberedImages", "PackedImages", "TarImages", "decode", "open_images"]
PARQUET, TARS = ".parquet", TarImages.SUFFIXES
LOOKED_FOR = f"a folder per class, a packed npz, {PARQUET} files, tars of webdataset, or a folder or zip with {LABELS}"
GLANCE = 32
"""names of a folder that are looked at to tell what it holds"""


def image_kinds(place: Path) -> list[str]:
    """What images lie at a path, by the names in it and in its folders: of folders, npz, numbered, parquet and tar.

    Raises:
        ConfigError: it cannot be listed.
    """
    if not os.path.isdir(place):  # unlike Path.is_dir, never an OSError of its own
        ends = {"npz": (".npz",), "numbered": (".zip",), "parquet": (PARQUET,), "tar": TARS}
        return [kind for kind, suffixes in ends.items() if place.name.lower().endswith(suffixes)]
    try:
        below = [name.lower() for folder in _folders(place) for name in itertools.islice(_files(folder), GLANCE)]
        names = [name.lower() for name in _files(place)] + below
        numbered = any((folder / LABELS).is_file() for folder in (place, place / "images"))
    except OSError as error:
        reject("data.path", error.filename, f"cannot be listed ({error.strerror})", "check the permissions")
    pictures = "numbered" if numbered else "folders"
    found = {
        pictures: numbered or any(name.endswith(SUFFIXES) for name in below),
        "parquet": any(name.endswith(PARQUET) for name in names),
        "tar": any(name.endswith(TARS) for name in names),
    }
    return [kind for kind, there in found.items() if there]


def _files(folder: str | Path) -> Iterator[str]:
    with os.scandir(folder) as entries:
        yield from (entry.name for entry in entries if not hidden(entry.name) and not entry.is_dir())


def _folders(place: Path) -> list[str]:
    with os.scandir(place) as entries:
        return [entry.path for entry in entries if not hidden(entry.name) and entry.is_dir()]


def open_images(
    path: str, *, split: str, channels: int, image_size: int, num_classes: int | None = None
) -> DecodedImages:
    """The images at a path, whichever of the layouts above lies there; `~` is expanded.

    Args:
        split: of a pack; of Parquet files and tars whose names say one.
        num_classes: of the model, for layouts that store numbers and no names.

    Raises:
        ConfigError: no such path, none or two of the layouts, an unusable number of channels, or what readers report.
    """
    if channels not in IMAGE_MODES:
        reject("model.channels", channels, "images have 1 channel (grey) or 3 (RGB)", "choose one of these")
    place = Path(path).expanduser()
    if not os.path.exists(place):
        reject("data.path", path, "does not exist", f"name {LOOKED_FOR}")
    if not (os.path.isfile(place) or os.path.isdir(place)):
        reject("data.path", path, "is neither a file nor a folder", "name what can be read at any place")
    kinds = image_kinds(place)
    if len(kinds) > 1:
        reject("data.path", path, f"holds images in two layouts ({' and '.join(kinds)})", "keep one of them there")
    match kinds or (["folders"] if os.path.isdir(place) else []):
        case ["folders"]:  # or it says what it misses
            return FolderImages(place, channels, image_size)
        case ["npz"]:
            return PackedImages(place, split, channels, image_size)
        case ["numbered"]:
            return NumberedImages(place, channels, image_size, num_classes)
        case ["tar"]:
            return TarImages(place, split, channels, image_size, num_classes)
        case ["parquet"]:
            from promoe_ds.data.images.parquet import ParquetImages  # late: pyarrow takes half a second to import

            return ParquetImages(place, split, channels, image_size, num_classes)
    reject("data.path", path, "is none of the kinds of images", f"name {LOOKED_FOR}")
