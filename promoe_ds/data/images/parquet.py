"""Images in Parquet files, as Hugging Face's datasets writes and publishes them."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from promoe_ds.config.errors import reject
from promoe_ds.data.archive import Archive
from promoe_ds.data.dataset import located
from promoe_ds.data.images.decoded import DecodedImages
from promoe_ds.data.images.parquet_pages import places
from promoe_ds.data.images.splits import files_of_split
from promoe_ds.data.labelled import check_labels, numbered_classes
from promoe_ds.utils.files import parse_json

HELD, LEAST = 2**28, 2
"""bytes of row groups that a process keeps, and how many at least: threads read neighbours at the same time"""
DEAR = 2**24
"""bytes of a row group above which a picture takes longer to find than to decode"""
AGAIN = "copy or write the file again"
GROUP = np.dtype([("file", "i4"), ("number", "i4"), ("row", "i8"), ("rows", "i8"),
                  ("start", "i8"), ("end", "i8"), ("plain", "?")])  # fmt: skip
"""a row group: its file, its number and first row there, its rows, the bytes of the column of pictures, and whether
each picture lies there as it is"""


class ParquetImages(DecodedImages):
    """Parquet files with a column of pictures, a struct with `bytes` (Hugging Face's feature Image; its `path` is not
    followed), and one of labels: integers, whose names the schema's metadata has if they are a ClassLabel.

    A picture that lies uncompressed and outside of a dictionary is read by itself. For others their whole row group is
    read, and the last groups are kept: in order this costs nothing, in random order a row group per picture.

    Of several splits among the names of the files, `split` is read. Items are the rows of the sorted files, in order.

    Raises:
        ConfigError: no file of the split; one that is cut off or has other columns; no bytes; a label outside the
            classes.
    """

    kind = "pictures in Parquet (Hugging Face)"
    SUFFIXES = (".parquet",)

    def __init__(self, path: Path, split: str, channels: int, image_size: int, num_classes: int | None = None):
        self._root, files = files_of_split(path, self.SUFFIXES, split)
        self._archives: list[Archive] = []
        groups, labels, columns = [], [], None
        for number, file in enumerate(files):
            found = _File(file)  # one at a time: there may be more of them than a process may have open
            columns = columns or found.columns
            if found.columns != columns:
                conflict = f"has other columns or class names than {files[0].name}"
                reject("data.path", file, conflict, "keep the files of one data set there")
            self._archives.append(found.archive)
            groups.append(found.groups(number))
            labels.append(found.labels())
        assert columns is not None
        self._columns, self._groups = columns, np.concatenate(groups)
        self._first = np.cumsum([0, *self._groups["rows"]])
        """number of the first item of each row group"""
        label_N, names = np.concatenate(labels), columns.classes
        if not len(label_N):
            reject("data.path", path, f"holds no rows in {len(files)} Parquet file(s)", "name files with pictures")
        if names is not None:
            check_labels(label_N, len(names), self.where, "give every row one of the classes")
        classes = list(names) if names else numbered_classes(label_N, num_classes, self.where)
        super().__init__(classes, label_N, channels, image_size)
        self._start_N, self._size_N = np.zeros(len(label_N), np.int64), np.zeros(len(label_N), np.int32)
        """where pictures lie that are read by themselves, as far as it is `_known` of a row group"""
        self._known = np.zeros(len(self._groups), bool)
        self._kept = _Kept()
        self._describe()

    def _describe(self) -> None:
        self.kind = f"{self.kind}, {len(self._archives)} file(s), {len(self._groups)} row group(s)"
        whole = self._groups[~self._groups["plain"]]
        if len(whole) and (size := int((whole["end"] - whole["start"]).max())) > DEAR:
            self.note = (
                f"its pictures are compressed or in dictionaries, so one that is drawn at random costs a row group, up "
                f"to {size / 1e6:.0f} MB: encode them, which reads in order, or write them as docs/training.md says"
            )

    def _row(self, index: int) -> tuple[str, int]:
        """File, and row in it."""
        group, row = located(self._first, index)
        return self._archives[self._groups["file"][group]].path, int(self._groups["row"][group]) + row

    def name(self, index: int) -> str:
        path, row = self._row(index)
        return f"{os.path.relpath(path, self._root)}/{row}"

    def where(self, index: int) -> str:
        path, row = self._row(index)
        return f"{path} (row {row})"

    def read(self, index: int) -> bytes:
        group, row = located(self._first, index)
        try:
            if self._found(group):
                archive = self._archives[self._groups["file"][group]]
                data = archive.read(int(self._size_N[index]), int(self._start_N[index]))
            else:
                data = self._kept.get(group, lambda: self._decoded(group))[row].as_py()
        except (OSError, ValueError, pa.ArrowException) as error:
            reject("data.path", self.where(index), f"cannot be read ({' '.join(str(error).split())})", AGAIN)
        if not data:
            reject("data.path", self.where(index), "holds no bytes, at most a path", "embed the pictures' files")
        return data

    def _found(self, group: int) -> bool:
        """Whether it is known where the pictures of a row group lie. Several threads may look for them, which does no
        harm. Raises OSError."""
        if self._groups["plain"][group] and not self._known[group]:
            file, start, end, rows = (int(self._groups[key][group]) for key in ("file", "start", "end", "rows"))
            items = slice(self._first[group], self._first[group + 1])
            try:
                found = places(self._archives[file], start, end, rows, self._columns.optional)
                self._start_N[items], self._size_N[items] = found
                self._known[group] = True
            except ValueError:  # another encoding, or damage, which pyarrow will name
                self._groups["plain"][group] = False
        return bool(self._known[group])

    def _decoded(self, group: int) -> pa.ChunkedArray:
        """The pictures of a row group, by a reader of its own: readers are not made for several threads."""
        archive, number = self._archives[self._groups["file"][group]], int(self._groups["number"][group])
        archive.read(1, 0)  # raises if the file has changed
        with pq.ParquetFile(archive.path, pre_buffer=False, page_checksum_verification=True) as file:
            table = file.read_row_group(number, [self._columns.picture], use_threads=False)
        return table.flatten().column(self._columns.picture)


class Columns(NamedTuple):
    """Which columns of a file hold what."""

    picture: str
    """path of the column of pictures, such as image.bytes"""
    optional: bool
    """whether its pages say which values are there"""
    label: str
    classes: tuple[str, ...] | None
    """names, if the file has them"""


class _File:
    """What lies in one Parquet file, by its footer. Raises `ConfigError`: it is damaged, or has no such columns."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self.archive = Archive.of(path)
            if not self.archive.size:
                self._reject("is empty, 0 bytes")
            self._file = pq.ParquetFile(path, pre_buffer=False)
        except (OSError, ValueError, pa.ArrowException) as error:
            self._reject(f"is no whole Parquet file ({' '.join(str(error).split())})")
        schema = self._file.schema_arrow
        picture = self._picture(schema)
        named = self._named(schema)
        label = next(iter(named)) if len(named) == 1 else "label"
        if label not in schema.names or not pa.types.is_integer(schema.field(label).type):
            self._lacks("column `label` of integers", "give each row its class")
        classes = named.get(label)
        leaves = [self._file.schema.column(i) for i in range(len(self._file.schema))]
        self._leaf = [leaf.path for leaf in leaves].index(picture)
        optional = leaves[self._leaf].max_definition_level > 0
        self.columns = Columns(picture, optional, label, tuple(classes) if classes else None)

    def _reject(self, conflict: str, way_out: str = AGAIN) -> NoReturn:
        reject("data.path", self.path, conflict, way_out)

    def _lacks(self, what: str, way_out: str) -> NoReturn:
        if not self._file.metadata.num_rows:  # nobody has told the types of its columns
            self._reject("has no rows, so no pictures", "name files with pictures")
        columns = ", ".join(f"{field.name} ({field.type})" for field in self._file.schema_arrow)
        self._reject(f"has no {what}, but {columns}", way_out)

    def _named(self, schema: pa.Schema) -> dict[str, list[str]]:
        """The names of the classes by column, of columns that are a ClassLabel."""
        try:
            described = parse_json((schema.metadata or {}).get(b"huggingface", b"{}"))
            features = (described.get("info") or {}).get("features") or {}
            found = {key: feature["names"] for key, feature in features.items()
                     if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"}  # fmt: skip
            if not all(isinstance(name, str) for names in found.values() for name in names):
                raise TypeError("names that are no text")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            self._reject(f"its schema's metadata `huggingface` does not describe columns ({error!r})")
        return found

    def _picture(self, schema: pa.Schema) -> str:
        binary = lambda kind: pa.types.is_binary(kind) or pa.types.is_large_binary(kind)  # noqa: E731
        found = [f"{field.name}.bytes" for field in schema if pa.types.is_struct(field.type)
                 and any(child.name == "bytes" and binary(child.type) for child in field.type)]  # fmt: skip
        found = found or [field.name for field in schema if binary(field.type)]
        if len(found) > 1:
            found = [name for name in found if name.partition(".")[0] == "image"]
        if not found:
            what = "column of pictures (`image` with `bytes`)"
            self._lacks(what, "name a data set of pictures whose files are embedded")
        return found[0]

    def groups(self, file: int) -> np.ndarray:
        """Its row groups, of dtype `GROUP`. Raises `ConfigError` for pictures without bytes."""
        metadata, row = self._file.metadata, 0
        found = np.empty(metadata.num_row_groups, GROUP)
        for number in range(len(found)):
            group = metadata.row_group(number)
            chunk = group.column(self._leaf)
            counted = chunk.statistics and chunk.statistics.has_null_count
            nulls = chunk.statistics.null_count if counted else None
            if nulls:
                conflict = f"has {nulls} picture(s) without bytes in row group {number}"
                self._reject(conflict, "embed the pictures' files")
            plain = nulls == 0 and chunk.compression == "UNCOMPRESSED" and not chunk.has_dictionary_page
            start = chunk.data_page_offset
            end = start + chunk.total_compressed_size
            found[number] = file, number, row, group.num_rows, start, end, plain
            row += group.num_rows
        return found

    def labels(self) -> np.ndarray:
        """int64, of its rows. Raises `ConfigError`."""
        try:
            column = self._file.read([self.columns.label], use_threads=False).column(0)
        except (OSError, ValueError, pa.ArrowException) as error:
            self._reject(f"has labels that cannot be read ({' '.join(str(error).split())})")
        if column.null_count:
            self._reject(f"has {column.null_count} row(s) without a label", "give each row its class")
        return column.to_numpy().astype(np.int64)


class _Kept:
    """The row groups that a process has decoded last; each is decoded by one thread, for which others wait."""

    def __init__(self) -> None:
        self._process, self._lock = os.getpid(), threading.Lock()
        self._groups: dict[int, Future[pa.ChunkedArray]] = {}

    def __reduce__(self) -> tuple[type[_Kept], tuple[()]]:
        return _Kept, ()

    def get(self, number: int, decode: Callable[[], pa.ChunkedArray]) -> pa.ChunkedArray:
        """Raises what `decode` raises."""
        if self._process != os.getpid():  # a fork has copied the lock, perhaps while another thread held it
            self.__init__()
        with self._lock:
            future = self._groups.pop(number, None)
            mine, future = future is None, future or Future()
            self._groups[number] = future  # the last
        if mine:
            try:
                future.set_result(decode())
                self._forget()
            except BaseException as error:
                with self._lock:  # before others hear of it: `_forget` looks at what is done
                    self._groups.pop(number, None)
                future.set_exception(error)
        return future.result()

    def _forget(self) -> None:
        """The oldest, as far as they are too many."""
        with self._lock:
            size = {key: kept.result().nbytes for key, kept in self._groups.items() if kept.done()}
            for key in list(size)[: max(0, len(size) - LEAST)]:
                if sum(size.values()) > HELD:
                    del self._groups[key], size[key]
