"""Where a command may write, and the names of files that several commands write or read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from promoe_ds.config.errors import reject

CONFIG = "config.yaml"
"""of a run, of exported weights and of samples: the whole configuration"""
CODEC = "codec.json"
"""of a run on latents: what decodes its samples"""
RECORD = "sampling.json"
"""of samples: how they were made"""
SAMPLES = "samples.npz"
"""of samples: all of them, packed"""
SAVED = "saved"
"""of a run, an empty file: it has had a complete checkpoint, so that one without any does not start again unasked"""


def check_place(out: Path, option: str = "--out") -> None:
    """Raise `ConfigError` if `out` is RUN/checkpoints or lies in it, by its name or where its links lead; or in a file.

    Training takes what lies there for its own, and a slip of the hand must not reach it.
    """
    if file := next((path for path in Path(os.path.abspath(out)).parents if os.path.isfile(path)), None):
        reject(option, out, f"{file} is not a folder", "name a place in one")
    for folder in _around(out):
        if folder.name == "checkpoints" and _is_run(folder.parent):
            conflict = f"would write among the checkpoints of {folder.parent}"
            reject(option, out, conflict, "name a place outside of that folder")


def check_run_place(run: Path) -> None:
    """As `check_place`, and raise `ConfigError` if a new run would lie in another one, such as in its samples, or hold
    one. A run that has begun goes on, wherever it lies."""
    check_place(run, "--run")
    if _is_run(run):
        return
    for folder in _around(run / ".."):
        if _is_run(folder):
            reject("--run", run, f"lies in the run {folder}", "name another folder")
    if inner := next((path for path in sorted(run.glob("*")) if _is_run(path)), None):
        reject("--run", run, f"holds the run {inner}", "name a folder of its own, such as one beside that")


def _around(out: Path) -> Iterator[Path]:
    """A place and the folders it lies in, by its name and where its links lead."""
    for path in (Path(os.path.abspath(out)), Path(os.path.realpath(out))):
        yield from (path, *path.parents)


def _is_run(folder: Path) -> bool:
    """A run is known by its config.yaml and a checkpoint, or that it had one: others have folders of that name, too."""
    manifests = (folder / "checkpoints").glob("step_*/manifest.json")
    had = os.path.exists(folder / SAVED)
    return os.path.exists(folder / CONFIG) and (had or next(manifests, None) is not None)


def check_new(out: Path, way_out: str = "name another one") -> None:
    """As `check_place`, and raise `ConfigError` if there is something already."""
    check_place(out)
    if out.exists():
        reject("--out", out, "exists; nothing is overwritten", way_out)
