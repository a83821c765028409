"""Superclass files: the format, and every error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from promoe_ds.config.errors import ConfigError
from promoe_ds.moe.superclasses import assignment, read_superclasses
from promoe_ds.recipes.load import load_config


def test_the_built_in_file_covers_the_digits() -> None:
    groups = read_superclasses("digits", load_config("digits").model.num_classes)
    assert len(groups) == 4 and len(assignment(groups)) == 10
    assert [assignment(groups)[n] for n in groups["straight strokes"]] == [2, 2, 2]


def test_json_is_read_too(tmp_path: Path) -> None:
    file = tmp_path / "map.json"
    file.write_text(json.dumps({"superclasses": {"a": [2, 0], "b": [1]}}))
    assert assignment(read_superclasses(str(file), 3)) == [0, 1, 0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("superclasses: {a: [0], b: [2]}", "has no superclass for class 1; add them to the file"),
        ("superclasses: {a: [0]}", "has no superclass for class 1, 2; add"),
        ("superclasses: {a: [0, 1], b: [1, 2]}", "lists twice class 1; keep each in one superclass"),
        ("superclasses: {a: [0, 1, 2], b: [3]}", "has numbers outside 0..2: 3; remove them"),
        ("superclasses: {a: []}", "does not map names to lists of class numbers; write `superclasses: {"),
        ("superclasses: {a: [true]}", "does not map names"),
        ("superclasses: [0, 1]", "does not map names"),
        ("[0, 1]", "is not a mapping; write `superclasses: {"),
        ("a: [", "cannot be read as YAML or JSON"),
    ],
)
def test_a_bad_file_is_one_clear_line(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "map.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as error:
        read_superclasses(str(file), 3)
    assert f"moe.router.superclasses={file}: " in str(error.value) and message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_names_the_built_in_ones() -> None:
    with pytest.raises(ConfigError, match="mnist: is no file; name a file or one of cifar10, digits, fashion"):
        read_superclasses("mnist")
    with pytest.raises(ConfigError, match="superclasses=digit: is no file; did you mean 'digits'"):
        read_superclasses("digit")
