"""Scores as a table and as metrics.json."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from promoe_ds.config.errors import reject
from promoe_ds.evaluation.images import brief
from promoe_ds.utils.files import parse_json, write_text
from promoe_ds.utils.outputs import check_new, check_place

METRICS = {"label_agreement": ".4f", "FID": ".3f", "FD": ".3f", "sFID": ".3f", "sFD": ".3f", "KID": ".3g",
           "KD": ".3g", "IS": ".2f", "precision": ".4f", "recall": ".4f", "density": ".4f", "coverage": ".4f",
           "fd_over_noise": ".4f"}  # fmt: skip
"""columns in this order, each with its format; a name in brackets may follow"""
HEADERS = {"label_agreement": "label agreement", "fd_over_noise": "FD/noise"}
PUBLISHED = 50_000
"""images that published FIDs are computed from"""


def format_table(scores: list[dict[str, Any]]) -> str:
    """Aligned table: one line per sample set, then real against real as a scale, if the reference has that."""
    metrics = _columns(scores)
    origin = [key for key in ("sampler", "steps") if any(key in s["sampling"] for s in scores)]
    rows = [("samples", *origin, "cfg", "n", *(HEADERS.get(key, key) for key in metrics))]
    for s in scores:
        made = (str(s["sampling"].get(key, "-")) for key in origin)
        values = (_number(s.get(key), spec) for key, spec in metrics.items())
        rows.append((s["samples"], *made, _number(s["cfg"], "g"), str(s["num"]), *values))
    if scores[0].get("FD_real") is not None:
        rows.append(("real, held out", *("-" for _ in origin), "-", "-", *_real(scores[0], metrics)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    line = "  ".join([f"{{:<{widths[0]}}}", *(f"{{:>{width}}}" for width in widths[1:])])
    return "\n".join(line.format(*row) for row in rows)


def notes(scores: list[dict[str, Any]]) -> list[str]:
    """What a reader must know before comparing FIDs: sets too small for published numbers."""
    small = sum("FID" in s and s["num"] < PUBLISHED for s in scores)
    text = f"note: {small} of {len(scores)} sets hold fewer than {PUBLISHED:,} images; their FID is not comparable with"
    lines = [f"{text} published ones (it falls as images are added)"] if small else []
    return lines + list(dict.fromkeys(line for s in scores for line in protocol_notes(s)))


def protocol_notes(score: dict[str, Any]) -> list[str]:
    """Whose protocol a set was drawn by, what was changed, and whether it is scored as that project scores."""
    found = score["sampling"].get("protocol")
    if not isinstance(found, dict):
        return []
    changed = found.get("changed")
    changes = ", ".join(f"{key}={value}" for key, value in changed.items()) if isinstance(changed, dict) else ""
    lines = [f"protocol: {found.get('name')} ({found.get('source')}), {f'but {changes}' if changes else 'unchanged'}"]
    reference = found.get("reference")
    if Path(str(score["reference"]["name"])).name != reference:
        lines.append(f"note: {found.get('name')} scores by {found.get('metric')} against {reference}")
    return lines


def _columns(scores: list[dict[str, Any]]) -> dict[str, str]:
    """Metric keys that any set has, in the order of METRICS, with their formats."""
    keys = dict.fromkeys(key for s in scores for key in s if s[key] is not None)
    return {key: spec for metric, spec in METRICS.items() for key in keys if key.split("[")[0] == metric}


def _real(score: dict[str, Any], metrics: dict[str, str]) -> list[str]:
    known = {
        "label_agreement": score["classifier_accuracy"],
        "FD": score["FD_real"],
        "fd_over_noise": score["FD_real"] / score["FD_noise"],
    }
    return [_number(known.get(key.split("[")[0]), spec) for key, spec in metrics.items()]


def _number(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)


def check_output(path: Path, suffix: str = ".json", holds: str = "the scores are JSON") -> None:
    """Raises `ConfigError` if a file cannot be written at `path`; to be called before any work is done.

    Earlier scores are replaced; nothing else that exists is.
    """
    check_place(path)
    if path.is_dir():
        reject("--out", path, "is a folder", f"name a file, for example metrics{suffix} in it")
    if path.suffix != suffix:  # a slip of the hand must not overwrite an .npz
        reject("--out", path, holds, f"choose a name that ends in {suffix}")
    if not path.parent.is_dir():
        reject("--out", path, f"folder {path.parent} does not exist", "create it or choose another file")
    if not os.access(path.parent, os.W_OK):
        reject("--out", path, f"folder {path.parent} is not writable", "choose another file")
    if not (suffix == ".json" and _holds_scores(path)):
        check_new(path, "name another file, or remove this one")


def _holds_scores(path: Path) -> bool:
    """Whether it is what `write_metrics` writes, or nothing yet."""
    try:
        text = path.read_text(encoding="utf-8")
        tree = parse_json(text or '{"sets": []}')
    except (OSError, ValueError):
        return False
    return isinstance(tree, dict) and isinstance(tree.get("sets"), list)


def write_metrics(path: Path, scores: list[dict[str, Any]]) -> None:
    """Write the first set's keys at top level plus `sets`, all of them. The file is complete or untouched."""
    text = json.dumps({**scores[0], "sets": scores}, indent=2, allow_nan=False)
    try:
        write_text(path, text + "\n")
    except OSError as error:
        reject("--out", path, f"cannot be written ({brief(error)})", "choose another file")
