"""Files in an uncompressed zip, as the tools of StyleGAN and edm2 write them, by the million.

`zipfile` keeps half a kilobyte per file, and its handles may be used neither by two threads nor by two processes after
a fork. This index is four arrays, and every read says where it begins.
"""

from __future__ import annotations

import mmap
import struct
import zlib
from array import array
from pathlib import Path

import numpy as np

from promoe_ds.config.errors import reject
from promoe_ds.data.archive import Archive

END, END64, WHERE64, ENTRY, LOCAL = b"PK\5\6", b"PK\6\6", b"PK\6\7", b"PK\1\2", b"PK\3\4"
"""signatures: end of the directory, the same with 64 bits, where that is, an entry of the directory, a file"""
COPY = "copy or write it again"


class StoredZip:
    """The files of a zip that lie in it uncompressed.

    Attributes:
        names: bytes [N], sorted.

    Raises:
        ConfigError: it cannot be read, is cut off, or a file in it is compressed.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            self._file = Archive.of(path)
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
                entries = self._entries(view)
        except (OSError, ValueError, struct.error) as error:
            reject("data.path", path, f"is not a whole zip ({' '.join(str(error).split())})", COPY)
        order = np.argsort(entries[0], kind="stable")
        self.names, self._crc, self._size, self._start = (column[order] for column in entries)

    def _entries(self, view: mmap.mmap) -> tuple[np.ndarray, ...]:
        """Names, checksums, lengths, and where the header of each file begins."""
        end = view.rfind(END, max(0, len(view) - 2**16 - 22))
        if end < 0:
            raise ValueError("it has no directory at its end")
        count, _, at = struct.unpack_from("<H2L", view, end + 10)
        if end >= 20 and view[end - 20 : end - 16] == WHERE64:
            (end64,) = struct.unpack_from("<Q", view, end - 12)
            if view[end64 : end64 + 4] != END64:
                raise ValueError("its directory is not where it says")
            count, _, at = struct.unpack_from("<3Q", view, end64 + 32)
        names: list[bytes] = []
        crcs, sizes, starts = array("L"), array("q"), array("q")
        for _ in range(count):
            signature, method, crc, _, size, n, extra, comment, start = struct.unpack_from("<4s6xH4x3L3H8xL", view, at)
            if signature != ENTRY:
                raise ValueError("its directory is cut off")
            names.append(name := view[at + 46 : at + 46 + n])
            if method:
                raise ValueError(f"{name.decode(errors='replace')} is compressed: zip it with -0")
            if 2**32 - 1 in (size, start):
                size, start = _wide(view[at + 46 + n : at + 46 + n + extra], size, start)
            if start + 30 + size > len(view):  # behind its header
                raise ValueError(f"{name.decode(errors='replace')} reaches beyond its end")
            crcs.append(crc)
            sizes.append(size)
            starts.append(start)
            at += 46 + n + extra + comment
        return (np.array(names), *(np.array(column, dtype=np.int64) for column in (crcs, sizes, starts)))

    def read(self, name: bytes) -> bytes:
        """A file, compared with its checksum. Raises `ConfigError` where it is damaged, `KeyError` without it."""
        i = int(np.searchsorted(self.names, name))
        if i == len(self.names) or self.names[i] != name:
            raise KeyError("it has no such file")
        where, start, size = f"{self.path} ({name.decode(errors='replace')})", int(self._start[i]), int(self._size[i])
        try:
            head = self._file.read(30, start)
            n, extra = struct.unpack_from("<2H", head, 26)
            data = self._file.read(size, start + 30 + n + extra)
        except (OSError, struct.error) as error:
            reject("data.path", where, f"cannot be read ({error})", COPY)
        if head[:4] != LOCAL or zlib.crc32(data) != self._crc[i]:
            reject("data.path", where, "does not match its checksum", COPY)
        return data


def first_name(path: Path) -> str:
    """The name of the first file in a zip; "" of what is no zip."""
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        head = file.read(30 + 2**12)
    if len(head) < 30 or head[:4] != LOCAL:
        return ""
    return head[30 : 30 + struct.unpack_from("<H", head, 26)[0]].decode(errors="replace")


def _wide(extra: bytes, size: int, start: int) -> tuple[int, int]:
    """Length and place of a file that take 64 bits: those that are 2^32 - 1 follow in the extra field number 1.

    Of a file that is stored, the compressed length is the length and follows it.
    """
    at = 0
    while extra[at : at + 2] != b"\1\0":
        at += 4 + struct.unpack_from("<H", extra, at + 2)[0]
    at += 4
    if size == 2**32 - 1:
        (size,) = struct.unpack_from("<Q", extra, at)
        at += 16
    if start == 2**32 - 1:
        (start,) = struct.unpack_from("<Q", extra, at)
    return size, start
