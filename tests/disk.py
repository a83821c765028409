"""A real file system of a few bytes, to be full; files that cannot be read, and a user whom permissions bind."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest


@contextmanager
def tmpfs(path: Path, size: str) -> Iterator[Path]:
    """Mount an empty tmpfs of `size` (400k, 5m) at `path`; skips the test where that takes rights it does not have."""
    path.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no mount command here")
    if done.returncode:
        pytest.skip(f"no tmpfs can be mounted here ({done.stderr.strip()}): needs root")
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


def resize(path: Path, size: str) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", str(path)], check=True)


def loop(path: Path) -> None:
    """Put a link to itself there: an OSError for every user, which says nothing of what was there."""
    if path.is_dir():
        path.rename(path.with_name(f"away_{path.name}"))
    path.unlink(missing_ok=True)
    path.symlink_to(path)


NOBODY = 65534


def as_nobody(work: Callable[[], Any]) -> Any:
    """The result of `work` in a child whom permission bits bind: root becomes another user there.

    What `work` uses must be imported before, and lie where another user may go (not in pytest's folders).
    """
    mine, theirs = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=_as_nobody, args=(work, theirs))
    child.start()
    theirs.close()
    try:
        result = mine.recv()
    finally:
        child.join()
    if isinstance(result, BaseException):
        raise result
    return result


def _as_nobody(work: Callable[[], Any], answer: Connection) -> None:
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    try:
        answer.send(work())
    except BaseException as error:
        answer.send(error)
