"""A user's mistake: one line that says what is wrong, and the way out."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any, NoReturn


class ConfigError(Exception):
    """A user's mistake; the message is one line and the process exits with code 2."""


def written(value: Any) -> str:
    """A value as it is written in a recipe and on the command line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {written(item)}' for key, item in value.items())}}}"
    return f"[{', '.join(map(written, value))}]" if isinstance(value, list | tuple) else str(value)


def reject(path: str, value: Any, conflict: str, way_out: str) -> NoReturn:
    """Raise `ConfigError` in the one form used everywhere: path, value, conflict, way out."""
    raise ConfigError(" ".join(f"{path}={written(value)}: {conflict}; {way_out}".splitlines()))


def did_you_mean(word: Any, known: Iterable[Any], otherwise: str = "choose a known one", cutoff: float = 0.5) -> str:
    """The way out of a word that is none of the known ones: the nearest of them, or `otherwise` if none is near.

    Args:
        cutoff: how alike they must be, of 0 to 1 (`difflib`).
    """
    close = difflib.get_close_matches(str(word), list(map(str, known)), n=1, cutoff=cutoff)
    return f"did you mean {close[0]!r}?" if close else otherwise


def unfit(text: str) -> str:
    """Why no path and no file of ours can hold this text; empty if they can."""
    if "\0" in text:
        return "holds a NUL character"
    try:
        text.encode()
    except UnicodeEncodeError:  # bytes of a command line, or half of a pair in YAML or JSON
        return "is not UTF-8"
    return ""


def check_text(path: str, text: str) -> str:
    """The text; raises `ConfigError`, naming `path`, if it is `unfit`."""
    if conflict := unfit(text):
        reject(path, repr(text), conflict, "choose another, or rename what it names")
    return text
