"""Image files in a folder per class."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from promoe_ds.config.errors import reject
from promoe_ds.data.images.decoded import DecodedImages
from promoe_ds.utils.files import above, hidden, walk
from promoe_ds.utils.pictures import SUFFIXES


def list_tree(root: Path, suffixes: tuple[str, ...] = SUFFIXES) -> tuple[list[str], list[str], np.ndarray, int]:
    """The files of a tree with one folder per class, at any depth in their class; class ids are the ranks of the names.

    Classes may be links, also two to one folder: each has its files. A link to the tree itself is no class.

    Returns:
        names of the classes, sorted; paths of the files relative to the tree, sorted within a class (as strings: a
        million Paths would take a gigabyte); int64 labels of the files; how many names were left out (`files.walk`).

    Raises:
        ConfigError: the tree cannot be listed, has no class folders, or one of them has no such files.
    """
    try:
        found = sorted(p for p in root.iterdir() if p.is_dir())
        back = {os.path.realpath(root), *above(root)}
        folders = [p for p in found if not hidden(p.name) and os.path.realpath(p) not in back]
        by_class, left_out = [], len(found) - len(folders)
        for folder in folders:
            names = []
            for parent, files, count in walk(folder, suffixes):
                prefix = os.path.relpath(parent, root)
                names += [os.path.join(prefix, name) for name in files]
                left_out += count
            if not names:
                conflict = f"a class folder without images ({' '.join(suffixes)})"
                reject("data.path", folder, conflict, "fill it or remove it")
            by_class.append(sorted(names))
    except OSError as error:
        reject("data.path", error.filename, f"cannot be listed ({error.strerror})", "check the permissions")
    if not folders:
        reject("data.path", root, "has no class folders", "put the images of each class in a folder of its own")
    label_B = np.repeat(np.arange(len(folders), dtype=np.int64), [len(names) for names in by_class])
    names = [name for names in by_class for name in names]
    return [folder.name for folder in folders], names, label_B, left_out


class FolderImages(DecodedImages):
    """Image files of `list_tree`, whose errors it raises."""

    kind = "image files in a folder per class"

    def __init__(self, root: Path, channels: int, image_size: int) -> None:
        classes, self._names, label_B, left_out = list_tree(root)
        super().__init__(classes, label_B, channels, image_size, left_out)
        self._root = root

    def name(self, index: int) -> str:
        return self._names[index]

    def where(self, index: int) -> str:
        return str(self._root / self._names[index])

    def read(self, index: int) -> bytes:
        path = self.where(index)
        try:
            return Path(path).read_bytes()
        except OSError as error:
            reject("data.path", path, f"cannot be read ({error.strerror})", "put the file back and start again")
