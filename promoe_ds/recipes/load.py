"""A recipe and the command line to a `Config`.

Order of precedence: dataclass default < recipe YAML < `section.key=value` from the command line. A recipe may start
from another one with the key `base: NAME`. A section changes what it names and keeps the rest, in a recipe with a base
and in `section={key: value}` alike. Unknown keys, wrong types and impossible combinations raise `ConfigError`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

from promoe_ds.config.decode import Override, decode, read_mapping, read_yaml
from promoe_ds.config.errors import did_you_mean, reject
from promoe_ds.config.option import options
from promoe_ds.config.schema import Config
from promoe_ds.moe import routers as routers  # their classes make them known to `decode`
from promoe_ds.recipes.validate import validate

RECIPES = Path(__file__).parent
SECTIONS = frozenset(path for path, _, value in options(Config()) if is_dataclass(value))
"""`model`, ..., `moe.router`"""


def _merge(base: dict[str, Any], top: dict[str, Any], router_anew: bool = False) -> dict[str, Any]:
    """`top` over `base`, section by section; `router_anew`: one of another name keeps no options of the one before."""
    out = dict(base)
    for key, value in top.items():
        old = out.get(key)
        if isinstance(value, dict) and isinstance(old, dict):
            other = key == "router" and value.get("name") not in (None, old.get("name", "promoe"))
            value = value if other and router_anew else _merge(old, value, router_anew)
        out[key] = value
    return out


def recipe_names() -> list[str]:
    return sorted(str(p.relative_to(RECIPES).with_suffix("")) for p in RECIPES.rglob("*.yaml"))


def _recipe_tree(name_or_path: str, seen: tuple[str, ...] = ()) -> dict[str, Any]:
    if not isinstance(name_or_path, str):
        reject("base", name_or_path, "is not the name of a recipe", "write base: NAME")
    path, option = Path(name_or_path), "base" if seen else "--config"
    if path.suffix not in (".yaml", ".yml"):
        path = RECIPES / f"{name_or_path}.yaml"
        if not path.is_file():
            names = recipe_names()
            listed = f"no such recipe (known: {', '.join(names)})"
            reject(option, name_or_path, listed, did_you_mean(name_or_path, names))
    if name_or_path in seen:
        reject("base", name_or_path, "the recipe is its own base", "remove the cycle")
    tree = read_mapping(option, path, read_yaml, "YAML", "write `section: {key: value}`")
    base = tree.pop("base", None)
    tree.setdefault("name", path.stem)
    return _merge(_recipe_tree(base, (*seen, name_or_path)), tree) if base else tree


def _apply_override(tree: dict[str, Any], text: str) -> None:
    key, equals, raw = text.partition("=")
    if not equals or not key:
        reject("override", repr(text), "is not section.key=value", "write for example train.steps=1000")
    *parents, leaf = key.split(".")
    node = tree
    for parent in parents:
        inner = node.setdefault(parent, {})
        if inner is None:
            way_out = f"override `{parent}` as a whole or choose another recipe"
            reject(key, raw, f"`{parent}` is null in this recipe", way_out)
        if not isinstance(inner, dict):
            reject(key, raw, f"`{parent}` is not a section", "remove the last part of the key")
        node = inner
    value = Override(raw)
    top = {leaf: value.structure(key) if key in SECTIONS else value}
    node.update(_merge({leaf: node.get(leaf)}, top, router_anew=True))


def load_tree(tree: dict[str, Any]) -> Config:
    """Strictly turn a plain tree into a validated `Config`; raises `ConfigError`."""
    config = decode(tree)
    validate(config)
    return config


def load_config(name_or_path: str, overrides: Sequence[str] = ()) -> Config:
    """Recipe name or YAML path, plus `section.key=value` overrides, to a validated `Config`.

    Raises:
        ConfigError: anything unknown, ill-typed or contradictory.
    """
    tree = _recipe_tree(name_or_path)
    for text in overrides:
        _apply_override(tree, text)
    return load_tree(tree)
