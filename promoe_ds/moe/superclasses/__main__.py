"""Build a superclass file from a hierarchy.

    python -m promoe_ds.moe.superclasses --hierarchy wordnet.is_a.txt --classes wnids.txt --groups 12 \\
        --out imagenet12.yaml
    python -m promoe_ds.moe.superclasses --hierarchy wordnet.is_a.txt --classes wnids.txt --nodes n00015388,n00021939 \\
        --out two.yaml

HIERARCHY has a line `parent child` for each edge. CLASSES has a class name a line, in the order of the class numbers
(for an image folder: the sorted folder names). Either --groups, the number of superclasses, cut as evenly as the
hierarchy allows, or --nodes, which class goes to the nearest of. Prints the sizes of the superclasses.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from promoe_ds.config.schema import ConfigError, reject
from promoe_ds.moe.superclasses import groups_by_nodes, groups_by_size, read_hierarchy, render
from promoe_ds.utils.files import write_text


def _read(option: str, path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reject(option, path, f"cannot be read ({error})", "name a text file")


def _classes(path: Path) -> list[str]:
    names = [line.split()[0] for line in _read("--classes", path).splitlines() if line.strip()]
    if not names or len(set(names)) != len(names):
        reject("--classes", path, "is empty or names a class twice", "write each class once, in order")
    return names


def build(arguments: argparse.Namespace) -> None:
    """Read, group, write. Raises ConfigError."""
    parent, classes = read_hierarchy(_read("--hierarchy", arguments.hierarchy)), _classes(arguments.classes)
    if arguments.groups is not None:
        if arguments.groups < 1:
            reject("--groups", arguments.groups, "must be positive", "choose 1 or more")
        groups = groups_by_size(classes, parent, arguments.groups)
    else:
        groups = groups_by_nodes(classes, parent, arguments.nodes.split(","))
    try:
        write_text(arguments.out, render(groups, classes))
    except OSError as error:
        reject("--out", arguments.out, f"cannot be written ({error.strerror or error})", "choose another file")
    for name, numbers in groups.items():
        print(f"{len(numbers):6d}  {name}")
    print(f"{arguments.out}: use it with moe.router.superclasses={arguments.out} moe.num_experts={len(groups)}")


def main(argv: Sequence[str] | None = None) -> int:
    about = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m promoe_ds.moe.superclasses", description=__doc__, formatter_class=about)
    parser.add_argument("--hierarchy", type=Path, required=True)
    parser.add_argument("--classes", type=Path, required=True)
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--groups", type=int)
    how.add_argument("--nodes")
    parser.add_argument("--out", type=Path, required=True)
    try:
        build(parser.parse_args(argv))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
