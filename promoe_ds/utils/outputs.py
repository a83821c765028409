"""Where a command may write."""

from __future__ import annotations

import os
from pathlib import Path

from promoe_ds.config.errors import reject


def check_place(out: Path, option: str = "--out") -> None:
    """Raise `ConfigError` if `out` is RUN/checkpoints or lies in it, by its name or where its links lead.

    Training takes what lies there for its own, and a slip of the hand must not reach it. A run is known by its
    config.yaml and a checkpoint: others have folders of that name, too.
    """
    for path in (Path(os.path.abspath(out)), Path(os.path.realpath(out))):
        for folder in (path, *path.parents):
            if folder.name != "checkpoints" or not (folder.parent / "config.yaml").exists():
                continue
            if next(folder.glob("step_*/manifest.json"), None) is not None:
                conflict = f"would write among the checkpoints of {folder.parent}"
                reject(option, out, conflict, "name a place outside of that folder")


def check_new(out: Path, way_out: str = "name another one") -> None:
    """As `check_place`, and raise `ConfigError` if there is something already."""
    check_place(out)
    if out.exists():
        reject("--out", out, "exists; nothing is overwritten", way_out)
