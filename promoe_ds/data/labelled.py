"""Files and the labels that a `dataset.json` gives them, in a folder or an uncompressed zip: StyleGAN's layout."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from promoe_ds.config.errors import reject
from promoe_ds.data.zips import StoredZip
from promoe_ds.utils.files import parse_json, walk

LABELS = "dataset.json"


class LabelledFiles:
    """The files of `dataset.json`, {"labels": [[NAME, LABEL], ...]} with integers for classes.

    Attributes:
        names: bytes [N], sorted; paths below the root. A million strings would take 100 MB.
        label_N: int64, of them.
        left_out: hidden files.

    Raises:
        ConfigError: no `dataset.json`, one without labels, or one that does not agree with the files.
    """

    def __init__(self, root: Path, suffixes: tuple[str, ...], again: str):
        self.root = root
        self._zip = None if root.is_dir() else StoredZip(root)
        self.names, self.label_N = self._labelled(again)
        self.left_out = 0
        found = self._stored(suffixes) if self._zip else np.array(sorted(self._listed(suffixes)) or [b""])
        if not np.array_equal(found, self.names):
            odd = [*np.setdiff1d(self.names, found), *np.setdiff1d(found, self.names), b"a name that it has twice"][0]
            conflict = f"its {LABELS} and its files disagree about {odd.decode(errors='replace')}"
            reject("data.path", root, conflict, again)

    def _stored(self, suffixes: tuple[str, ...]) -> np.ndarray:
        """Names in the zip, sorted."""
        assert self._zip is not None
        lower, ends = np.char.lower(self._zip.names), np.array(suffixes, "S")
        names = self._zip.names[np.logical_or.reduce([np.char.endswith(lower, end) for end in ends])]
        hidden = np.char.startswith(names, b".") | (np.char.find(names, b"/.") >= 0)
        self.left_out = int(hidden.sum())
        return names[~hidden]

    def _listed(self, suffixes: tuple[str, ...]) -> Iterator[bytes]:
        for parent, files, left_out in walk(self.root, suffixes):
            self.left_out += left_out
            prefix = Path(parent).relative_to(self.root).as_posix()
            yield from (os.fsencode(name if prefix == "." else f"{prefix}/{name}") for name in files)

    def _labelled(self, again: str) -> tuple[np.ndarray, np.ndarray]:
        """Sorted names as bytes, and their labels."""
        where = f"{self.root} ({LABELS})" if self._zip else self.root / LABELS
        try:
            text = self._zip.read(LABELS.encode()) if self._zip else (self.root / LABELS).read_bytes()
            pairs = parse_json(text)["labels"]
            names, labels = np.array([name.encode() for name, _ in pairs]), np.array([label for _, label in pairs])
            if labels.dtype.kind not in "iu" or labels.ndim != 1:
                raise ValueError("its labels are not integers")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            conflict = f"is not names and labels ({type(error).__name__}: {' '.join(str(error).split())})"
            reject("data.path", where, conflict, f"{again}, with labels")
        order = np.argsort(names, kind="stable")
        return names[order], labels[order].astype(np.int64)

    def name(self, index: int) -> str:
        return os.fsdecode(self.names[index])

    def where(self, index: int) -> str:
        return f"{self.root} ({self.name(index)})" if self._zip else str(self.root / self.name(index))

    def read(self, index: int) -> bytes:
        """Content of a file. Raises OSError, or `ConfigError` where it does not match its checksum."""
        return self._zip.read(self.names[index]) if self._zip else Path(self.where(index)).read_bytes()


def check_labels(label_N: np.ndarray, classes: int, where: Callable[[int], str], way_out: str) -> None:
    """Raises `ConfigError` for a label outside of so many classes; `where` is the path of an item."""
    wrong = np.flatnonzero((label_N < 0) | (label_N >= classes))
    if len(wrong) and label_N[wrong[0]] < 0:
        conflict = f"has the label {label_N[wrong[0]]}, and labels begin at 0"
        reject("data.path", where(int(wrong[0])), conflict, "-1 often means a split without labels: name another")
    if len(wrong):
        conflict = f"has the label {label_N[wrong[0]]}, outside the {classes} classes"
        reject("data.path", where(int(wrong[0])), conflict, way_out)


def numbered_classes(label_N: np.ndarray, num_classes: int | None, where: Callable[[int], str]) -> list[str]:
    """Names for classes that are known by number only: as many as the model has, or as the labels need.

    Args:
        label_N: integers, at least one.
        num_classes: of the model.
        where: path of an item, for the message.

    Raises:
        ConfigError: a label is outside of them.
    """
    count = int(label_N.max()) + 1
    check_labels(label_N, num_classes or count, where, f"set model.num_classes={count} if it is right")
    return [str(number) for number in range(num_classes or count)]
