"""Images in tars, as webdataset writes and reads them."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from promoe_ds.config.errors import reject
from promoe_ds.data.archive import Archive
from promoe_ds.data.dataset import located
from promoe_ds.data.images.decoded import DecodedImages
from promoe_ds.data.images.splits import files_of_split
from promoe_ds.data.labelled import numbered_classes
from promoe_ds.data.tars import Member, Window, members
from promoe_ds.utils.files import hidden
from promoe_ds.utils.pictures import SUFFIXES

LABEL = "cls"
PICTURES = tuple(suffix.removeprefix(".") for suffix in SUFFIXES)
AGAIN = "copy or write the tar again"
MOST = 2**31 - 1
"""number of a class: far above all there are, and no array of numbers overflows"""
AT_ONCE = 8
"""tars whose headers are read at the same time from a disk that answers late"""


@dataclass(frozen=True, eq=False)
class Shard:
    """The samples of one tar."""

    archive: Archive
    keys: bytes
    """names of the samples, one after the other"""
    key_end_N: np.ndarray
    """int64, where each ends in `keys`"""
    start_N: np.ndarray
    """int64, first byte of each picture"""
    size_N: np.ndarray
    """int64"""
    label_N: np.ndarray
    """int64"""
    left_out: int
    """hidden files"""


class TarImages(DecodedImages):
    """Tars of webdataset (github.com/webdataset/webdataset): the files of a sample follow each other and share their
    name up to the first dot. KEY.jpg (jpeg, png, webp, bmp; in any case) is the picture, KEY.cls its class, a number;
    other files of a sample are passed over.

    Of several splits among the names of the tars, `split` is read. Items are the samples of the sorted tars, in order.

    Raises:
        ConfigError: no tar of the split; one that is cut off, damaged, compressed or joined; a sample without a picture
            or a label; a label outside the classes.
    """

    kind = "pictures in tars (WebDataset)"
    SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz")

    def __init__(self, path: Path, split: str, channels: int, image_size: int, num_classes: int | None = None):
        self._root, files = files_of_split(path, self.SUFFIXES, split)
        self._shards = _read_shards(files)
        self._first = np.cumsum([0, *(len(shard.label_N) for shard in self._shards)])
        """number of the first item of each tar"""
        label_N = np.concatenate([shard.label_N for shard in self._shards])
        if not len(label_N):
            reject("data.path", path, f"its {len(files)} tar(s) hold no pictures", "name tars of webdataset")
        classes = numbered_classes(label_N, num_classes, self.where)
        super().__init__(classes, label_N, channels, image_size, sum(shard.left_out for shard in self._shards))
        self.kind = f"{self.kind}, {len(files)} of them"

    def _place(self, index: int) -> tuple[Shard, int]:
        number, item = located(self._first, index)
        return self._shards[number], item

    def _key(self, index: int) -> tuple[Shard, str]:
        shard, item = self._place(index)
        start = int(shard.key_end_N[item - 1]) if item else 0
        return shard, os.fsdecode(shard.keys[start : int(shard.key_end_N[item])])

    def name(self, index: int) -> str:
        shard, key = self._key(index)
        return f"{os.path.relpath(shard.archive.path, self._root)}/{key}"

    def where(self, index: int) -> str:
        shard, key = self._key(index)
        return f"{shard.archive.path} ({key})"

    def read(self, index: int) -> bytes:
        shard, item = self._place(index)
        size = int(shard.size_N[item])
        try:
            data = shard.archive.read(size, int(shard.start_N[item]))
        except OSError as error:
            reject("data.path", self.where(index), f"cannot be read ({error.strerror or error})", AGAIN)
        if len(data) < size:
            reject("data.path", self.where(index), "lies beyond the end of the tar", AGAIN)
        return data


def _read_shards(files: list[Path]) -> list[Shard]:
    """Side by side if the first was mostly waited for. Each read lets go of the interpreter, and threads queue for it:
    for files in memory eight threads take 2.5 times as long as one."""
    start, busy = time.perf_counter(), time.process_time()
    first = [read_shard(path) for path in files[:1]]
    waited = time.perf_counter() - start > 2 * (time.process_time() - busy)
    with ThreadPoolExecutor(AT_ONCE if waited else 1, thread_name_prefix="tars") as pool:
        return first + list(pool.map(read_shard, files[1:]))


def read_shard(path: Path) -> Shard:
    """The samples of a tar. Raises `ConfigError`."""
    samples, left_out = _Samples(), 0
    try:
        window = Window(Archive.of(path))
        if path.suffix.lower() != ".tar" or window.archive.read(2, 0) == b"\x1f\x8b":
            raise ValueError("it is compressed, so nothing in it can be found without reading all: unpack it")
        for member in members(window):
            folder, _, base = member.name.rpartition("/")
            if hidden(base):
                left_out += 1
                continue
            stem, _, kind = base.partition(".")
            samples.add(f"{folder}/{stem}" if folder else stem, kind.lower(), member, window)
        samples.close()
    except (OSError, ValueError) as error:
        text = error.strerror if isinstance(error, OSError) and error.strerror else error
        reject("data.path", path, f"is no whole tar of samples ({' '.join(str(text).split())})", AGAIN)
    keys = [os.fsencode(key) for key in samples.keys]
    key_end_N = np.cumsum([len(key) for key in keys], dtype=np.int64)
    start_N, size_N, label_N = (np.array(column, np.int64) for column in (samples.start, samples.size, samples.label))
    return Shard(window.archive, b"".join(keys), key_end_N, start_N, size_N, label_N, left_out)


class _Samples:
    """Samples, put together from files that follow each other. Raises ValueError for one that lacks something."""

    def __init__(self) -> None:
        self.keys: list[str] = []
        self.start: list[int] = []
        self.size: list[int] = []
        self.label: list[int] = []
        self._begin("")

    def _begin(self, key: str) -> None:
        self._key, self._picture, self._label, self._odd = key, None, None, ""

    def add(self, key: str, kind: str, member: Member, window: Window) -> None:
        if key != self._key:
            self.close()
            self._begin(key)
        if kind in PICTURES:
            if self._picture:
                raise ValueError(f"{key} has two pictures, the second is {member.name}")
            self._picture = member
        elif kind == LABEL:
            data = window.read(member.size, member.start).strip()
            if self._label is not None or not data.isdigit():
                raise ValueError(f"{member.name} is not one number but {data[:20]!r}, or a second label")
            self._label = int(data)
            if self._label > MOST:
                raise ValueError(f"{member.name} is no class but {self._label}")
        elif kind.rpartition(".")[2] in (*PICTURES, LABEL):
            self._odd = f"; {member.name} is none of it, because all behind the first dot of a name is its kind"

    def close(self) -> None:
        """The end of a sample; one without picture, label and anything like them is none."""
        if self._picture is None and self._label is None and not self._odd:
            return
        for thing, what in ((self._picture, "picture"), (self._label, f"label (.{LABEL})")):
            if thing is None:
                raise ValueError(f"{self._key} has no {what}{self._odd}")
        assert self._picture is not None and self._label is not None
        self.keys.append(self._key)
        self.start.append(self._picture.start)
        self.size.append(self._picture.size)
        self.label.append(self._label)
