"""Files that are whole or not there, whoever reads or writes beside us. Imports the standard library only."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

NOT_FOUND = (FileNotFoundError, NotADirectoryError)
"""what says that a file does not exist; any other OSError leaves open what is there, and whether it is whole"""


@contextlib.contextmanager
def atomic(path: Path, durable: bool = False) -> Iterator[Path]:
    """A temporary path beside `path` that takes its name on success: readers never see half a file.

    The mode is 0666 less the umask, as of any new file: safetensors makes files that only their owner can read.

    Args:
        durable: flush to disk before the name is given.
    """
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.tmp")
    try:
        temporary.unlink(missing_ok=True)  # of a killed process with our number
        with temporary.open("xb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        yield temporary
        if stat.S_IMODE(temporary.stat().st_mode) != mode:
            temporary.chmod(mode)
        if durable:
            fsync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str, durable: bool = False) -> None:
    """`text` in UTF-8, whole or not there; `durable` as of `atomic`."""
    with atomic(path, durable) as temporary:
        temporary.write_text(text, encoding="utf-8")


def fsync(path: Path) -> None:
    """Flush a file or a folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_file(path: Path) -> bool:
    """As `Path.is_file`, but what cannot be looked at is an OSError and not False."""
    return stat.S_ISREG(_mode(path))


def is_dir(path: Path) -> bool:
    """As `Path.is_dir`, but what cannot be looked at is an OSError and not False."""
    return stat.S_ISDIR(_mode(path))


def _mode(path: Path) -> int:
    try:
        return path.stat().st_mode
    except NOT_FOUND:
        return 0


def check_readable(path: Path) -> None:
    """Raises the OSError of a file that cannot be opened; safetensors would say that it does not exist."""
    path.open("rb").close()
