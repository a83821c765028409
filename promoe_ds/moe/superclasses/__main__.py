"""Build a superclass file from a hierarchy.

    python -m promoe_ds.moe.superclasses --hierarchy wordnet.is_a.txt --classes wnids.txt --groups 12 \\
        --out imagenet12.yaml

HIERARCHY has a line `parent child` for each edge. CLASSES has a class name per line, in the order of the class numbers
(for an image folder: the sorted folder names). GROUPS is the number of superclasses, which are cut as evenly as the
hierarchy allows. Prints their sizes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import yaml

from promoe_ds.config.schema import reject
from promoe_ds.moe.superclasses import groups_by_size, read_hierarchy
from promoe_ds.utils.command_line import Parser, check_positive, launcher
from promoe_ds.utils.files import write_text


def _read(option: str, path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reject(option, path, f"cannot be read ({error})", "name a text file")


def build(argv: list[str]) -> None:
    about = argparse.RawDescriptionHelpFormatter
    parser = Parser("python -m promoe_ds.moe.superclasses", description=__doc__, formatter_class=about)
    parser.add_argument("--hierarchy", type=Path, required=True)
    parser.add_argument("--classes", type=Path, required=True)
    parser.add_argument("--groups", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    check_positive(args, "groups")
    parent = read_hierarchy(_read("--hierarchy", args.hierarchy))
    classes = [line.split()[0] for line in _read("--classes", args.classes).splitlines() if line.strip()]
    if not classes or len(set(classes)) != len(classes):
        reject("--classes", args.classes, "is empty or names a class twice", "write each class once, in order")
    groups = groups_by_size(classes, parent, args.groups)
    tree = {"superclasses": groups, "classes": classes}
    try:
        write_text(args.out, yaml.safe_dump(tree, sort_keys=False, default_flow_style=None, width=120))
    except OSError as error:
        reject("--out", args.out, f"cannot be written ({error.strerror or error})", "choose another file")
    for name, numbers in groups.items():
        print(f"{len(numbers):6d}  {name}")
    print(f"{args.out}: use it with moe.router.superclasses={args.out} moe.num_experts={len(groups)}")


main, console = launcher(build)

if __name__ == "__main__":
    console()
