"""A plain tree to a `Config` and back, strictly: unknown keys and wrong types raise `ConfigError`, whose message is one
line: config path, value, conflict, way out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import yaml

from promoe_ds.config.errors import ConfigError, check_text, did_you_mean, reject
from promoe_ds.config.schema import Config, RouterConfig, router_config_class

BAD_YAML = (yaml.YAMLError, ValueError, RecursionError)
"""what `read_yaml` raises; the last two for no dates or numbers, such as 2024-02-30 or 0x_, and for deep nesting"""


def read_mapping(option: str, path: Path, parse: Callable[[str], Any], kind: str, example: str) -> dict[str, Any]:
    """A YAML or JSON file that `option` names. Raises ConfigError if it cannot be read or parsed, or is no mapping."""
    try:
        tree = parse(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reject(option, path, f"cannot be read ({error})", f"name another {kind} file")
    except BAD_YAML as error:
        way_out = getattr(error, "way_out", "fix the file")
        reject(option, path, f"cannot be read as {kind} ({' '.join(str(error).split())})", way_out)
    if not isinstance(tree, dict):
        reject(option, path, "is not a mapping", example)
    return tree


INT, FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"


class Misread(ValueError):
    """YAML would read a number as another one."""

    way_out = "write the number you mean, or quotes if it is text"


class _AsWritten(yaml.SafeLoader):
    """Refuses what YAML would read as other than what is written, without a word."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        """Of two equal keys the second would win."""
        node = super().compose_mapping_node(anchor)
        seen: set[Any] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise ValueError(f"the key {key.value!r} is written twice, again in line {key.start_mark.line + 1}")
                seen.add(key.value)
        return node

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        """PyYAML stumbles in many ways over text that its tag does not fit, such as `!!bool maybe`."""
        try:
            return super().construct_object(node, deep=True)  # which refuses what contains itself
        except (LookupError, AttributeError, TypeError, ArithmeticError) as error:
            kind = node.tag.rpartition(":")[2]
            raise ValueError(f"line {node.start_mark.line + 1} has {node.value!r}, which is no {kind}") from error

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        """YAML 1.1 has octal, binary and sexagesimal numbers, which people write without meaning them."""
        whole = node.tag == INT
        value = self.construct_yaml_int(node) if whole else self.construct_yaml_float(node)
        try:
            plain = type(value)(node.value.replace("_", "")) == value
        except ValueError:
            plain = not whole and ":" not in node.value  # .inf
        if not plain:
            raise Misread(f"line {node.start_mark.line + 1} has {node.value}, which YAML reads as {value}")
        return value


for _tag in (INT, FLOAT):
    _AsWritten.add_constructor(_tag, _AsWritten.construct_number)


def read_yaml(text: str) -> Any:
    """Plain values alone; raises one of `BAD_YAML`."""
    return _AsWritten(text).get_single_data()


class Override(str):
    """What stands after `section.key=`; the type of the field decides how it is read."""

    def yaml(self) -> Any:
        with contextlib.suppress(*BAD_YAML):
            if (read := read_yaml(self)) is not None or self.strip().lower() in ("", "~", "null"):
                return read
        return str(self)  # YAML reads comments and anchors as null, too

    def structure(self, path: str) -> Any:
        """As `yaml`, for a section or a list, which no bare text is. Raises ConfigError if YAML cannot read it."""
        try:
            read_yaml(self)
        except BAD_YAML as error:
            conflict = f"cannot be read as YAML ({' '.join(str(error).split())})"
            reject(path, self, conflict, getattr(error, "way_out", "write [a, b] or {key: value}"))
        return self.yaml()


def _decode_dataclass(kind: type, value: Any, path: str) -> Any:
    if not isinstance(value, dict):
        reject(path or "config", _quoted(value), "expected a mapping", "write it as `key: value` lines")
    prefix = f"{path}." if path else ""
    if kind is RouterConfig:
        name = _decode(str, value.get("name", "promoe"), f"{prefix}name")
        kind = router_config_class(name, f"{prefix}name")
    hints = typing.get_type_hints(kind)
    known = [f.name for f in dataclasses.fields(kind)]
    for key in value:
        if key not in known:
            listed = f"unknown key (known: {', '.join(known)})"
            shown = "{...}" if isinstance(value[key], dict) else value[key]
            reject(f"{prefix}{key}", shown, listed, did_you_mean(key, known))
    return kind(**{key: _decode(hints[key], item, f"{prefix}{key}") for key, item in value.items()})


def _decode_union(kind: Any, value: Any, path: str) -> Any:
    members = typing.get_args(kind)
    if types.NoneType in members and (value.yaml() if isinstance(value, Override) else value) is None:
        return None
    errors = []
    for member in [member for member in members if member is not types.NoneType]:
        try:
            return _decode(member, value, path)
        except ConfigError as error:
            errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    reject(path, _quoted(value), f"expected {' or '.join(map(_spell, members))}", "write one of these")


def _spell(kind: Any) -> str:
    """A type as a user would say it."""
    if typing.get_origin(kind) is Literal:
        return " or ".join(map(str, typing.get_args(kind)))
    if kind is types.NoneType:
        return "null"
    if typing.get_origin(kind) is tuple:
        return f"a list of {_spell(typing.get_args(kind)[0])}"
    return getattr(kind, "__name__", str(kind))


def _quoted(value: Any) -> Any:
    """Text is told from what looks alike."""
    return repr(value) if isinstance(value, str) else value


def _decode(kind: Any, value: Any, path: str) -> Any:
    """Turn plain YAML data into `kind` or raise `ConfigError` naming `path`."""
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        return _decode_union(kind, value, path)
    read = value
    if isinstance(value, Override):
        read = value.structure(path) if origin is tuple else value.yaml()
        text = read if value[:1] in ("'", '"') and isinstance(read, str) else str(value)  # quotes are YAML's
        if text and read is not None and (kind is str or (origin is Literal and text in typing.get_args(kind))):
            return check_text(path, text)
        value = text if kind in (int, float) and type(read) in (int, float) else read  # 2**53 + 1 as a float
    if dataclasses.is_dataclass(kind):
        return _decode_dataclass(typing.cast(type, kind), value, path)
    if origin is Literal:
        choices = typing.get_args(kind)
        if any(value == choice and type(value) is type(choice) for choice in choices):  # 1 is no True
            return value
        listed = ", ".join(map(str, choices))
        way_out = did_you_mean(value, choices) if str(value) not in map(str, choices) else "write it without quotes"
        reject(path, _quoted(value), f"must be one of {listed}", way_out)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            reject(path, _quoted(value), "expected a list", "write [a, b, c]")
        return tuple(_decode(typing.get_args(kind)[0], item, f"{path}[{i}]") for i, item in enumerate(value))
    if type(value) is kind and kind is not float:
        return check_text(path, value) if kind is str else value
    number = _number(str(value)) if kind in (int, float) else None
    if number is not None and (kind is float or number == int(number)):
        with contextlib.suppress(OverflowError):  # a whole number that no float holds
            return kind(number)
    if kind in (int, float) and isinstance(read, float) and (number is not None or not math.isfinite(read)):
        expected, got = "int" if kind is int else "a finite float", "float" if math.isfinite(read) else str(read)
        reject(path, value, f"expected {expected}, got {got}", "change the value")  # as it was written
    way_out = "write it in quotes" if kind is str and not isinstance(value, list | dict) else "change the value"
    reject(path, _quoted(value), f"expected {kind.__name__}, got {_spell(type(value))}", way_out)


def _number(text: str) -> float | None:
    """A finite number, whole ones exactly (YAML 1.1 reads 1e-4 and 1e5 as text); None if it is not one."""
    with contextlib.suppress(ValueError):
        return int(text)
    with contextlib.suppress(ValueError):
        if math.isfinite(number := float(text)):
            return number
    return None


def decode(tree: dict[str, Any]) -> Config:
    """Strictly turn a plain tree into a `Config`, with the routers that are known so far; raises `ConfigError`.

    What must hold of the values is not looked at: `recipes.load.load_tree` does both.
    """
    return _decode_dataclass(Config, tree, "")


def encode(config: Any) -> Any:
    """The plain tree of a config: `decode(encode(c)) == c`."""
    if dataclasses.is_dataclass(config):
        return {f.name: encode(getattr(config, f.name)) for f in dataclasses.fields(config)}
    return list(config) if isinstance(config, tuple) else config


def dump(config: Config) -> str:
    """The resolved configuration as YAML."""
    return yaml.safe_dump(encode(config), sort_keys=False)
