"""What is known of an option beside its name, type and default: its line in docs/options.md, its range, who may change
it. `schema.py` says it of every field, and nobody says it again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, Literal, NamedTuple

from promoe_ds.config.errors import written

Change = Literal["never", "finetune", "resume"]
"""Who may change an option of trained weights: nobody, because the weights compute something else with it; a fine-tune
(`train.init`), which is a new run; or the same run when it is resumed, and so a fine-tune too."""


@dataclass(frozen=True, kw_only=True)
class Option:
    """What is known of a field beside its type and default: its line in the docs, its range, who may change it."""

    doc: str = ""
    above: float | None = None
    at_least: float | None = None
    below: float | None = None
    change: Change | None = None
    """None: as its section"""
    almost_off: float | None = None
    """If given, nobody changes it to or from 0, with which parts of the model come or go; it does almost what 0 does"""

    def range(self) -> str:
        """The numbers that are allowed, in words that follow "must"; empty if all are."""
        if self.below is not None:
            return f"lie in [{self.at_least:g}, {'2**64' if self.below == 2**64 else f'{self.below:g}'})"
        if self.above is not None:
            return "be positive" if self.above == 0 else f"be above {self.above:g}"
        return "not be negative" if self.at_least == 0 else ""

    def allows(self, number: float) -> bool:
        low = (self.above is None or number > self.above) and (self.at_least is None or number >= self.at_least)
        return low and (self.below is None or number < self.below)


def option(default: Any, doc: str, **more: Any) -> Any:
    """A field of a section; `more` is what `Option` holds."""
    return field(default=default, metadata={"option": Option(doc=doc, **more)})


def section(kind: Callable[[], Any], change: Change) -> Any:
    """A field that holds a section; `change` is for those of its options that do not say."""
    return field(default_factory=kind, metadata={"option": Option(change=change)})


def options(config: Any, path: str = "", change: Change = "never") -> Iterator[tuple[str, Option, Any]]:
    """(path, what is known of it, value) of every option and section in `config`, a section before its options."""
    for f in fields(config):
        inner, value = f"{path}.{f.name}" if path else f.name, getattr(config, f.name)
        known: Option = f.metadata.get("option", Option())
        allowed = known.change or change
        yield inner, replace(known, change=allowed), value
        if is_dataclass(value):
            yield from options(value, inner, allowed)


class Difference(NamedTuple):
    """An option in which two configurations differ, with both values as they are written."""

    path: str
    old: str
    new: str
    way_out: str
    """how to come near the old one"""


def differences(old: Any, new: Any, free: Collection[Change]) -> Iterator[Difference]:
    """Where two configurations differ, but for options that `free` may change."""
    before, after = ({path: (o, value) for path, o, value in options(c)} for c in (old, new))
    for path, (known, _) in (before | after).items():
        a, b = (found[path][1] if path in found else None for found in (before, after))
        comes_or_goes = known.almost_off is not None and bool(a) != bool(b)
        if a == b or (is_dataclass(a) and is_dataclass(b)) or (known.change in free and not comes_or_goes):
            continue
        was, now = ("a section" if is_dataclass(value) else written(value) for value in (a, b))
        way_out = "name its recipe" if is_dataclass(a) else f"set {path}={was}"
        if comes_or_goes and a:
            way_out = f"set {path}={written(known.almost_off)} to all but stop it"
        yield Difference(path, was, now, way_out)
