"""`section.key=value` on the command line: the type of the field decides how the text is read."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from promoe_ds.config import decode as module
from promoe_ds.config.decode import dump, encode
from promoe_ds.recipes.load import load_config, load_tree
from tests.launch import run
from tests.recipes.test_load import error, write


@pytest.mark.parametrize(("text", "expected"), [("1e-4", 1e-4), ("1.0e-4", 1e-4), ("1", 1.0), ("'2e-5'", 2e-5)])
def test_floats_as_people_write_them(text: str, expected: float) -> None:
    lr = load_config("imagenet256_promoe_s", [f"optimizer.lr={text}"]).optimizer.lr
    assert lr == expected and type(lr) is float


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1e5", 100_000),
        ("1_000", 1000),
        ("2000.0", 2000),
        ("0500", 500),  # no octal number
        ("0500000", 500_000),
    ],
)
def test_integers_as_people_write_them(text: str, expected: int) -> None:
    steps = load_config("imagenet256_promoe_s", [f"train.steps={text}"]).train.steps
    assert steps == expected and type(steps) is int


def test_large_integers_are_exact() -> None:
    assert load_config("tiny", ["train.seed=9007199254740993"]).train.seed == 2**53 + 1


WORDS = [
    "2012",
    "no",
    "1e3",
    "0500000",
    "2012-01-01",
    "1:30",
    "true",
    "[a]",
    "{a}",
    "a: b",
    "x #1",
    "5.",
    "0x10",
    ".inf",
    "2024-02-30",
    "0x_",
    "!!timestamp a",
    "#a",
    "&a",
]


@pytest.mark.parametrize("word", WORDS)
def test_text_for_string_fields_is_taken_as_written(word: str) -> None:
    config = load_config("tiny", [f"{key}={word}" for key in ("name", "data.path", "data.split", "train.init")])
    assert [config.name, config.data.path, config.data.split, config.train.init] == [word] * 4
    assert load_tree(yaml.safe_load(dump(config))) == config
    router = load_config("digits_classification", [f"moe.router.superclasses={word}"]).moe.router  # type: ignore[union-attr]
    assert encode(router)["superclasses"] == word
    error(f"moe.router.name={word}: no such router", f"moe.router.name={word}")


def test_null_is_nothing_for_optional_strings_and_for_others_a_word_in_quotes() -> None:
    for null in ("null", "~", ""):
        assert load_config("cifar10_promoe_s", ["data.path=x", f"data.path={null}"]).data.path is None
    assert load_config("tiny", ["data.split='null'"]).data.split == load_config("tiny", ["name='null'"]).name == "null"
    assert load_config("tiny", ["data.path='null'"]).data.path == "null", "quotes are YAML's"
    assert load_config("tiny", ['data.path="a: b"']).data.path == "a: b"
    for null in ("null", "~", ""):
        error("data.split=null: expected str, got null; write it in quotes", f"data.split={null}")


@pytest.mark.parametrize(
    ("text", "shown", "conflict"),
    [
        ('"a\\0b"', "'a\\x00b'", "holds a NUL character"),
        ('"\\ud800"', "'\\ud800'", "is not UTF-8"),
        ("\udcff\udcfe", "'\\udcff\\udcfe'", "is not UTF-8"),  # bytes of a command line
    ],
)
def test_text_that_no_file_holds_is_refused(tmp_path: Path, text: str, shown: str, conflict: str) -> None:
    for key in ("name", "train.init", "guidance.model", "data.split"):
        error(f"{key}={shown}: {conflict}", f"{key}={text}")
    if text[0] == '"':
        error(f"name={shown}: {conflict}", base=write(tmp_path / "mine.yaml", f"base: tiny\nname: {text}"))


def test_profiles_and_respacings_need_no_quotes() -> None:
    for text in ("2:5", "'2:5'"):
        assert load_config("tiny", [f"train.profile={text}"]).train.profile == "2:5"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Switch:
    mode: Literal["on", "off", 3, True] = "on"


@pytest.mark.parametrize(
    ("text", "expected"), [("off", "off"), ("on", "on"), ("3", 3), ("true", True), ("'off'", "off")]
)
def test_choices_are_matched_as_written_first(text: str, expected: Any) -> None:
    mode = module._decode(Switch, {"mode": module.Override(text)}, "").mode
    assert mode == expected and type(mode) is type(expected)


@pytest.mark.parametrize("text", ["1:30", "0x10"])
def test_numbers_in_notations_of_yaml_alone_are_refused(text: str) -> None:
    error(f"train.steps='{text}': expected int, got str", f"train.steps={text}")


def test_an_override_of_a_section_may_be_overridden() -> None:
    moe = load_config("imagenet256_dense_s", ["moe={num_experts: 6}", "moe.num_shared=2"]).moe
    assert moe is not None and (moe.num_experts, moe.num_shared) == (6, 2)
    error("`moe` is null in this recipe", "moe=null", "moe.num_shared=2")


@pytest.mark.parametrize(
    "text",
    [
        "2024-02-30",
        "0x_",
        "!!timestamp a",
        "!!bool maybe",
        "!!int ''",
        "!!float ''",
        "!!timestamp {=: 1}",
        "1" + ":1" * 400 + ".0",  # each part is worth 60 times the next
    ],
)
def test_what_yaml_takes_for_a_value_and_cannot_read_is_one_line(tmp_path: Path, text: str) -> None:
    error(f"train.steps={text!r}: expected int, got str", f"train.steps={text}")
    path = write(tmp_path / "mine.yaml", f"base: tiny\ndata: {{split: {text}}}\n")
    error(f"--config={path}: cannot be read as YAML (", base=path)


def test_a_tag_that_does_not_fit_is_named_with_its_line(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.yaml", "base: tiny\ntrain: {compile: !!bool maybe}\n")
    error("cannot be read as YAML (line 2 has 'maybe', which is no bool)", base=path)
    error("optimizer.ema_more=[!!float '']: cannot be read as YAML (line 1 has '', which is no float)",
          "optimizer.ema_more=[!!float '']")  # fmt: skip


@pytest.mark.parametrize(("text", "read"), [("2012", "2012"), ("no", "false"), ("null", "null")])
def test_a_string_that_yaml_has_changed_is_refused_in_a_file(tmp_path: Path, text: str, read: str) -> None:
    path = write(tmp_path / "mine.yaml", f"base: tiny\ndata: {{split: {text}}}\n")
    error(f"data.split={read}: expected str, got ", base=path)
    error("; write it in quotes", base=path)
    path = write(tmp_path / "mine.yaml", f"base: tiny\ndata: {{split: '{text}'}}\n")
    assert load_config(path).data.split == text


def test_a_section_on_the_command_line_keeps_what_it_does_not_name() -> None:
    whole = load_config("digits", ["model={depth: 2}", "moe={router: {top_k: 2}}", "train={steps: 7, seed: 3}"])
    parts = ["model.depth=2", "moe.router.top_k=2", "train.steps=7", "train.seed=3"]
    assert whole == load_config("digits", parts) and whole.model.width == 128
    guidance = load_config("digits", ["guidance={interval: [1, 2]}", "guidance={channels: all}"]).guidance
    assert guidance.interval == (1, 2), "the second keeps what the first has set"
    assert load_config("digits", ["train.steps=7", "train={seed: 3}"]).train == whole.train
    assert load_config("digits", ["train={}"]) == load_config("digits")


def test_a_router_of_another_name_starts_from_its_own_defaults() -> None:
    def router(*overrides: str) -> dict[str, Any]:
        moe = load_config("imagenet256_promoe_b_ddpm", overrides).moe
        assert moe is not None
        return encode(moe.router)

    assert router("moe.router={name: promoe, top_k: 2}")["contrastive_weight"] == 10, "it is the same one"
    assert router("moe.router={name: promoe_ec}")["contrastive_weight"] == 1
    assert router("moe={router: {name: promoe_ec}}") == router("moe.router={name: promoe_ec}")
    assert "contrastive_weight" not in router("moe.router={name: uniform}")


def test_a_section_or_list_that_is_no_yaml_says_why() -> None:
    text = "moe={num_experts: 6, num_experts: 12}: cannot be read as YAML (the key 'num_experts' is written twice"
    error(text, "moe={num_experts: 6, num_experts: 12}")
    error("model={depth: 4: cannot be read as YAML (while parsing a flow mapping", "model={depth: 4")
    error("optimizer.ema_more=[0.5: cannot be read as YAML (while parsing a flow sequence", "optimizer.ema_more=[0.5")
    error("moe='#a': expected a mapping", "moe=#a")


@pytest.mark.parametrize("text", ["010", "0x10", "0b11", "1:30", "1:30.5"])
def test_numbers_that_yaml_reads_as_others_are_refused_in_a_file(tmp_path: Path, text: str) -> None:
    path = write(tmp_path / "mine.yaml", f"base: tiny\ntrain:\n  steps: {text}\n")
    way_out = "); write the number you mean, or quotes if it is text"
    error(f"--config={path}: cannot be read as YAML (line 3 has {text}, which YAML reads as ", base=path)
    error(way_out, base=path)
    error(way_out, f"train={{steps: {text}}}")


@pytest.mark.parametrize(("text", "number"), [("007", 7), ("1_000", 1000), ("+5", 5)])
def test_numbers_that_yaml_reads_as_they_are_written(tmp_path: Path, text: str, number: int) -> None:
    path = write(tmp_path / "mine.yaml", f"base: tiny\ntrain: {{steps: {text}}}\noptimizer: {{lr: .5}}\n")
    config = load_config(str(path), ["optimizer.beta1=0.10"])
    assert (config.train.steps, config.optimizer.lr) == (number, 0.5)


def test_what_is_too_large_or_too_deep_is_one_line(tmp_path: Path) -> None:
    for text, shown in (("1" + "0" * 400, "100000000... (401 digits)"), ("1e300", "100000000... (301 digits)"),
                        ("9223372036854775808", "922337203... (19 digits)")):  # fmt: skip
        for path in ("train.steps", "model.width", "moe.router.top_k"):
            error(f"{path}={shown}: does not fit into 64 bits; choose a smaller number", f"{path}={text}")
        mine = write(tmp_path / "mine.yaml", f"base: tiny\ntrain: {{steps: {text}}}\n")
        error("does not fit into 64 bits", base=mine)
    assert load_config("tiny", ["train.seed=18446744073709551615"]).train.seed == 2**64 - 1
    error("optimizer.lr='1000", "optimizer.lr=1" + "0" * 400)
    deep = "[" * sys.getrecursionlimit()  # torch's compiler raises it
    error("maximum recursion depth exceeded", base=write(tmp_path / "deep.yaml", f"train: {deep}"))
    error("maximum recursion depth exceeded", f"moe={deep}")
    error("train.steps='[[[", f"train.steps={deep}")


def test_what_contains_itself_is_refused(tmp_path: Path) -> None:
    endless = "&a {router: *a}"
    error("found unconstructable recursive node", f"moe={endless}", f"moe={endless}")
    error("found unconstructable recursive node", base=write(tmp_path / "mine.yaml", f"moe: {endless}"))


def test_overrides_win_and_the_last_one_most() -> None:
    overrides = ["train.steps=5", "moe.router.top_k=3", "train.steps=7", "data.path=/data/x", "name=mine"]
    config = load_config("imagenet256_promoe_s", overrides)
    assert (config.train.steps, config.data.path, config.name) == (7, "/data/x", "mine")
    assert config.moe is not None and encode(config.moe.router)["top_k"] == 3


def test_null_turns_the_moe_off_and_a_mapping_on() -> None:
    assert load_config("imagenet256_promoe_s", ["moe=null"]).moe is None
    moe = load_config("imagenet256_dense_s", ["moe={num_experts: 6}"]).moe
    assert moe is not None and moe.num_experts == 6


def test_values_may_hold_equals_signs() -> None:
    assert load_config("imagenet256_promoe_s", ["data.path=a=b"]).data.path == "a=b"


def test_bad_overrides() -> None:
    error("override='train.steps': is not section.key=value", "train.steps")
    error("override='=3': is not section.key=value", "=3")
    error("`steps` is not a section", "train.steps.more=1")
    error("`moe` is null in this recipe", "moe.num_experts=6", base="imagenet256_dense_s")
    error("train.steps='[': expected int, got str", "train.steps=[")


def test_decoding_needs_no_torch_and_knows_the_routers_that_were_made() -> None:
    """Their classes tell the schema; no module is imported by its name in a string."""
    code = """
import sys
from dataclasses import dataclass
from promoe_ds.config import decode, errors, schema
assert not {"torch", "numpy", "deepspeed"} & set(sys.modules)
assert decode.decode({"moe": None, "model": {"depth": 2}}).model.depth == 2
try:
    decode.decode({"moe": {"router": {"name": "mine"}}})
except errors.ConfigError as error:
    assert str(error).startswith("moe.router.name=mine: no such router (known: none: "), error
@dataclass(frozen=True, kw_only=True)
class Mine(schema.RouterConfig):
    name: str = "mine"
schema.ROUTER_CONFIGS["mine"] = Mine
assert decode.decode({"moe": {"router": {"name": "mine"}}}).moe.router == Mine()
"""
    run([sys.executable, "-c", code])
