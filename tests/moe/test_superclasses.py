"""Superclass files: the format, every error, and the builder from a hierarchy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from promoe_ds.config.schema import ConfigError
from promoe_ds.moe.superclasses import assignment, read_superclasses
from promoe_ds.moe.superclasses.__main__ import main
from promoe_ds.recipes.load import load_config

HIERARCHY = """# parent child
thing animal
thing machine
animal dog
animal cat
dog poodle
dog terrier
machine car
machine plane
thing poodle
"""
CLASSES = ["poodle", "terrier", "cat", "car", "plane"]


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
        ("a: [", "is not YAML or JSON"),
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
    with pytest.raises(ConfigError, match="superclasses=digit: is no file; name a file or one of cifar10, digits"):
        read_superclasses("digit")


def build(tmp_path: Path, *args: str, hierarchy: str = HIERARCHY) -> int:
    (tmp_path / "h.txt").write_text(hierarchy)
    if not (tmp_path / "c.txt").exists():
        (tmp_path / "c.txt").write_text("\n".join(CLASSES))
    paths = ["--hierarchy", str(tmp_path / "h.txt"), "--classes", str(tmp_path / "c.txt")]
    return main([*paths, "--out", str(tmp_path / "out.yaml"), *args])


def test_groups_by_number_are_as_even_as_the_tree_allows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert build(tmp_path, "--groups", "2") == 0
    assert read_superclasses(str(tmp_path / "out.yaml"), 5) == {"rest": [2, 3, 4], "dog": [0, 1]}
    assert "moe.num_experts=2" in capsys.readouterr().out
    assert build(tmp_path, "--groups", "5") == 0
    assert sorted(read_superclasses(str(tmp_path / "out.yaml"), 5).values()) == [[0], [1], [2], [3], [4]]


@pytest.mark.parametrize(
    ("args", "hierarchy", "message"),
    [
        (
            ["--groups", "6"],
            HIERARCHY,
            "--groups=6: the hierarchy divides these classes into 5 groups only; ask for at",
        ),
        (["--groups", "0"], HIERARCHY, "--groups=0: must be positive"),
        (["--groups", "2"], "a b\nc\n", "--hierarchy=line 2: 'c' is not `parent child`"),
        (["--groups", "2"], "a poodle\npoodle a\n", "is its own ancestor; remove the cycle"),
    ],
)
def test_a_builder_error_is_one_line_and_exit_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], args: list[str], hierarchy: str, message: str
) -> None:
    assert build(tmp_path, *args, hierarchy=hierarchy) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_class_lists_and_files_are_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.txt").write_text("dog\ndog\n")
    assert build(tmp_path, "--groups", "1") == 2
    assert "is empty or names a class twice" in capsys.readouterr().err
    missing = ["--hierarchy", str(tmp_path / "no"), "--classes", str(tmp_path / "c.txt"), "--groups", "1"]
    assert main([*missing, "--out", str(tmp_path / "out.yaml")]) == 2
    assert "--hierarchy=" in capsys.readouterr().err
    (tmp_path / "c.txt").write_text("dog\ncat\n")
    assert build(tmp_path, "--groups", "1", "--out", str(tmp_path / "no" / "out.yaml")) == 2
    assert "cannot be written (No such file or directory); choose another file" in capsys.readouterr().err
