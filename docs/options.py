"""Write options.md, a table per section and per router, from the fields of the configuration. Run from anywhere."""

from __future__ import annotations

import inspect
import sys
import typing
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, Literal

PAGE = Path(__file__).with_suffix(".md")
sys.path.insert(0, str(PAGE.parents[1]))  # as `python docs/options.py`

from promoe_ds.config.errors import written  # noqa: E402
from promoe_ds.config.option import Option, options  # noqa: E402
from promoe_ds.config.schema import ROUTER_CONFIGS, Config, MoEConfig  # noqa: E402
from promoe_ds.recipes import load as load  # noqa: E402  (makes the routers known)

HEAD = """# Options

Every option of a recipe: `section: {key: value}` in its YAML, or `section.key=value` on the command line. The tables
are written by `python docs/options.py` from the fields in `promoe_ds/config/schema.py` and in the routers' `Config`.

A mapping on the command line changes the keys that it names and keeps the others: `'model={depth: 4}'` is the same as
`model.depth=4`. A router of another name, as in `'moe.router={name: kmeans}'`, starts from its own defaults.
`null` is nothing, where an option may be that, and never a name: `"name='null'"` is.

The last column says who may change an option once there are weights: *resume*, the same run when it goes on, and a
fine-tune too; *fine-tune*, only a new run that starts from the weights (`train.init`); *never*, nobody: the
weights mean something else with it. A change that is not allowed is refused with the key and both values.
"""
CHANGE = {"finetune": "fine-tune"}


def values(kind: Any, option: Option) -> str:
    """What may be written: the choices of a `Literal`, also of one in a union, or the range of a number."""
    if choices := [part for part in (kind, *typing.get_args(kind)) if typing.get_origin(part) is Literal]:
        listed = ", ".join(f"`{choice}`" for choice in typing.get_args(choices[0]))
        return f"a list of {listed}" if typing.get_origin(kind) is tuple else listed
    if option.above is not None:
        return f"> {option.above:g}"
    return ">= 0" if option.range() == "not be negative" else option.range().removeprefix("lie in ")


def default(value: Any) -> str:
    return f"`{written(value)}`"


def table(config: Config, path: str) -> str:
    """The options of the section at `path` and not of the sections in it."""
    known = {name: (option, value) for name, option, value in options(config)}
    hints = typing.get_type_hints(type(known[path][1] if path else config))
    rows = ["| option | default | values | meaning | change |", "|---|---|---|---|---|"]
    for name, (option, value) in known.items():
        above, _, key = name.rpartition(".")
        if above == path and option.doc:
            cells = (f"`{name}`", default(value), values(hints[key], option), option.doc)
            change = CHANGE.get(str(option.change), option.change)
            rows.append(f"| {' | '.join(cells)} | {change}{', not to or from 0' if option.almost_off else ''} |")
    return "\n".join(rows) if len(rows) > 2 else "It has no options."


def page() -> str:
    parts = [HEAD, table(Config(), "") + "\n"]
    for path, _, value in options(Config()):
        if is_dataclass(value) and path != "moe.router":
            parts.append(f"## {path}\n\n{inspect.getdoc(type(value))}\n\n{table(Config(), path)}\n")
    ours = {name: kind for name, kind in ROUTER_CONFIGS.items() if kind.__module__.startswith("promoe_ds.")}
    for name, kind in sorted(ours.items()):
        summary = (inspect.getdoc(sys.modules[kind.__module__]) or "").partition("\n\n")[0].replace("\n", " ")
        config = Config(moe=MoEConfig(router=kind()))
        parts.append(f"## moe.router.name: {name}\n\n{summary}\n\n{table(config, 'moe.router')}\n")
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
