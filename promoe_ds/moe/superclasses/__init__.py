"""Superclasses of a data set's classes: the file that the classification router learns from.

A file in YAML or JSON, `digits.yaml` beside this module being the example:

    superclasses:            # one expert each, in this order
      animals: [0, 1, 5]     # class numbers; every class in exactly one superclass
      vehicles: [2, 3, 4]
    classes: [cat, dog, ...] # optional names, ignored
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from promoe_ds.config.decode import read_mapping, read_yaml
from promoe_ds.config.errors import did_you_mean, reject

OPTION = "moe.router.superclasses"


def read_superclasses(name_or_path: str, num_classes: int | None = None) -> dict[str, list[int]]:
    """Superclass names to their class numbers, in the order of the experts.

    Args:
        name_or_path: a built-in file's name, or a path.
        num_classes: what the file must cover; by default as many classes as it has entries.

    Raises:
        ConfigError: no such file, another format, or classes missing, unknown or given twice.
    """
    folder = Path(__file__).parent  # not at import: an exported model's code has no file
    builtin = sorted(path.stem for path in folder.glob("*.yaml"))
    path = folder / f"{name_or_path}.yaml" if name_or_path in builtin else Path(name_or_path)
    if not path.is_file():
        way_out = did_you_mean(name_or_path, builtin, f"name a file or one of {', '.join(builtin)}")
        reject(OPTION, name_or_path, "is no file", way_out)
    way_out = "write `superclasses: {name: [class numbers], ...}`"
    groups = read_mapping(OPTION, path, read_yaml, "YAML or JSON", way_out).get("superclasses")
    is_class_list = lambda value: isinstance(value, list) and value and all(type(n) is int for n in value)  # noqa: E731
    if not isinstance(groups, dict) or not groups or not all(map(is_class_list, groups.values())):
        reject(OPTION, name_or_path, "does not map names to lists of class numbers", way_out)
    _check_cover(name_or_path, groups, num_classes)
    return {str(name): numbers for name, numbers in groups.items()}


def _check_cover(path: str, groups: Mapping[Any, list[int]], num_classes: int | None) -> None:
    """Every class 0..num_classes-1 is in exactly one superclass."""
    count = Counter(number for numbers in groups.values() for number in numbers)
    total = num_classes if num_classes is not None else sum(count.values())
    for conflict, numbers, way_out in (
        ("lists twice class", sorted(n for n in count if count[n] > 1), "keep each in one superclass"),
        ("has no superclass for class", [n for n in range(total) if n not in count], "add them to the file"),
        (
            f"has numbers outside 0..{total - 1}:",
            sorted(n for n in count if not 0 <= n < total),
            "remove them, or use the file made for these classes",
        ),
    ):
        if numbers:
            reject(OPTION, path, f"{conflict} {', '.join(map(str, numbers[:5]))}", way_out)


def assignment(groups: Mapping[str, Sequence[int]]) -> list[int]:
    """The superclass number of each class, from `read_superclasses`."""
    of = {number: i for i, numbers in enumerate(groups.values()) for number in numbers}
    return [of[number] for number in range(len(of))]
