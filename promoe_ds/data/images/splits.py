"""Which files of a folder belong to a split, where the names of the files say it."""

from __future__ import annotations

import re
from pathlib import Path

from promoe_ds.config.errors import did_you_mean, reject
from promoe_ds.utils.files import walk

WORDS = re.compile(r"(?<![a-z0-9])(train|validation|valid|val|test)(?![a-z0-9])")


def files_of_split(path: Path, suffixes: tuple[str, ...], split: str) -> tuple[Path, list[Path]]:
    """The files below `path`, or `path` itself, that belong to a split.

    `data/train-00000-of-00294.parquet`, `imagenet1k-validation-07.tar`, `val/3.tar`: the last of such words in a path
    below `path` is its split (`val`, `valid` and `validation` are one). A file without one belongs to all of them.

    Returns:
        the folder that names begin at; the files, sorted.

    Raises:
        ConfigError: there are splits, and not this one.
    """
    if path.is_file():
        return path.parent, [path]
    try:
        listed = [Path(parent, name) for parent, files, _ in walk(path, suffixes) for name in files]
    except OSError as error:
        reject("data.path", error.filename, f"cannot be listed ({error.strerror})", "check the permissions")
    names = sorted(str(file.relative_to(path)) for file in listed)
    found = {name: _plain((WORDS.findall(name.lower()) or [""])[-1]) for name in names}
    chosen = [path / name for name, of in found.items() if of in ("", _plain(split))]
    if not chosen:
        known = sorted(set(found.values()))
        way_out = did_you_mean(split, known, "choose one of them")
        reject("data.split", split, f"{path} has the splits {', '.join(known)}", way_out)
    return path, chosen


def _plain(split: str) -> str:
    return "validation" if split in ("val", "valid") else split
