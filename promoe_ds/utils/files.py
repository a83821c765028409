"""Files that are whole or not there, whoever reads or writes beside us; and the files of trees.

Imports the standard library only: evaluation/ uses it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn, TypeVar

T = TypeVar("T")
NOT_FOUND = (FileNotFoundError, NotADirectoryError)
"""what says that a file does not exist; any other OSError leaves open what is there, and whether it is whole"""
MOST_NESTED = 100
"""levels of JSON from outside; what is read has a handful"""


def in_threads(load: Callable[[], T]) -> T:
    """What `load` returns, which reads .npy or .npz files; several threads may do so at once.

    NumPy parses the header of a file as Python does a program, and Python 3.11 keeps one count of the depth for all
    threads that parse (python/cpython#106905): now and then a valid file is a SystemError. It is read again.
    """
    for _ in range(100):
        try:
            return load()
        except SystemError as error:
            if "recursion depth" not in str(error):
                raise
    return load()


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


@contextlib.contextmanager
def making(folder: Path) -> Iterator[None]:
    """Make a folder and those above it. If anything is raised here or inside, those that were made and are empty go
    again: a refusal leaves nothing behind. Raises OSError."""
    made: list[Path] = []
    try:
        for path in [path for path in (folder, *folder.parents) if not path.is_dir()][::-1]:
            try:
                path.mkdir()
                made.append(path)
            except FileExistsError:  # by another process, or it is a file
                if not path.is_dir():
                    raise
        yield
    except BaseException:
        for path in reversed(made):
            with contextlib.suppress(OSError):
                path.rmdir()
        raise


def parse_json(text: str | bytes, **how: Any) -> Any:
    """JSON that comes from outside; `how` as of `json.loads`.

    Raises:
        ValueError: it is none, or nested so deeply that Python would have a RecursionError for it: where it is read, or
            later where it is compared or written.
    """
    with contextlib.suppress(RecursionError):
        tree = json.loads(text, **how)
        level = [tree]
        for _ in range(MOST_NESTED + 1):
            outer = [x.values() if isinstance(x, dict) else x for x in level if isinstance(x, (dict, list))]
            if not outer:
                return tree
            level = [x for inner in outer for x in inner]
    raise ValueError("it is nested too deeply")


def read_json(path: Path, **how: Any) -> Any:
    """As `parse_json`, of a file in UTF-8. Raises OSError, too, where it cannot be read."""
    return parse_json(path.read_text(encoding="utf-8"), **how)


def write_text(path: Path, text: str, durable: bool = False) -> Path:
    """`text` in UTF-8, whole or not there; `durable` as of `atomic`. Returns the path."""
    with atomic(path, durable) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def file_digest(*paths: Path, state: Any = None, tick: Callable[[int], object] = lambda read: None) -> str:
    """Digest of the bytes of files, one after the other, in hex.

    Args:
        state: of hashlib, the kind of digest; None: blake2b.
        tick: is told how many bytes were read.
    """
    state = state or hashlib.blake2b()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(2**23):
                state.update(block)
                tick(len(block))
    return state.hexdigest()


def hidden(name: str) -> bool:
    """Whether the name of a file or folder is hidden: what notebooks, file managers and macOS leave behind."""
    return name.startswith(".")


def above(folder: str | Path) -> set[str]:
    """Real paths of the folders that hold `folder`. A link to one of them leads back to where it lies."""
    return {str(parent) for parent in Path(os.path.realpath(folder)).parents}


def walk(folder: str | Path, suffixes: tuple[str, ...]) -> Iterator[tuple[str, list[str], int]]:
    """`folder` and the folders below it, links to folders followed: the one walk of all that is read from trees.

    Hidden names are left out, and each real folder is visited once, under its own name rather than a link's.

    Args:
        suffixes: lower case; the case of names does not matter.

    Yields:
        path of a folder, those of its file names that end in a suffix (in no order), and how many names were left out:
        hidden folders, hidden files with a suffix, links to folders that are visited under another name.

    Raises:
        OSError: a folder cannot be listed.
    """

    def fail(error: OSError) -> NoReturn:
        raise error

    seen, starts = above(folder), [os.fspath(folder)]
    for start in starts:  # grows by the links that are met: real folders come first
        for parent, folders, files in os.walk(start, onerror=fail):
            if (real := os.path.realpath(parent)) in seen:
                folders.clear()
                yield parent, [], 1
                continue
            seen.add(real)
            files = [name for name in files if name.lower().endswith(suffixes)]
            left_out = sum(map(hidden, folders)) + sum(map(hidden, files))
            folders[:] = sorted(name for name in folders if not hidden(name))
            starts += [path for name in folders if os.path.islink(path := os.path.join(parent, name))]
            yield parent, [name for name in files if not hidden(name)], left_out


def left_out_words(count: int) -> str:
    """What is said where `walk` has left names out."""
    names = "1 name is" if count == 1 else f"{count} names are"
    return f"{names} left out: hidden, or links to folders that are read already"


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
    except (*NOT_FOUND, ValueError):  # ValueError: no file has a null byte in its name
        return 0


def check_readable(path: Path) -> None:
    """Raises the OSError of a file that cannot be opened; safetensors would say that it does not exist."""
    path.open("rb").close()
