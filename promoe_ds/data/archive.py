"""Large files read at places that an index knows, by any thread and any process."""

from __future__ import annotations

import os
import weakref
from dataclasses import dataclass
from functools import lru_cache

KEPT_OPEN = 128
"""files per process: ImageNet is published as 1,024 tars, and often a process may not have more open files"""


@dataclass(frozen=True)
class Archive:
    """A file as it was when it was indexed.

    A file object has a position, which threads and forked processes share: a tar that was opened before a fork gives
    wrong bytes of the right length. `pread` has none. Only the path travels to another process, which opens it anew.
    """

    path: str
    size: int
    modified_ns: int

    @classmethod
    def of(cls, path: str | os.PathLike[str]) -> Archive:
        """Raises OSError."""
        found = os.stat(path)
        return cls(os.fspath(path), found.st_size, found.st_mtime_ns)

    def read(self, size: int, start: int) -> bytes:
        """`size` bytes from `start` on, fewer where the file ends. Raises OSError, also if the file has changed."""
        return self.opened().read(size, start)

    def opened(self) -> Descriptor:
        """What reads it, for many reads in a row. Raises OSError."""
        return _opened(self)


class Descriptor:
    """Closed when the last reader lets go of it, so none ever reads from another file that got its number."""

    def __init__(self, archive: Archive):
        self.number = os.open(archive.path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.number)
        found = os.fstat(self.number)
        if (found.st_size, found.st_mtime_ns) != (archive.size, archive.modified_ns):
            raise OSError("it has changed since it was opened")

    def read(self, size: int, start: int) -> bytes:
        """As `Archive.read`."""
        return os.pread(self.number, size, start)


@lru_cache(maxsize=KEPT_OPEN)
def _opened(archive: Archive) -> Descriptor:
    return Descriptor(archive)
