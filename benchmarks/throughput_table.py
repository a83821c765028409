"""The page of throughput.py's figures: one table a section, medians over interleaved rounds (lowest to highest)."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import torch

from promoe_ds.costs import flops
from promoe_ds.recipes.load import load_config


def page(folder: Path, head: str, device: torch.device) -> str:
    """Markdown of everything found in `folder`, below where it comes from."""
    peak = flops.device_peak(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    parts = ["# Throughput", head]
    for name, table in (("step", _step), ("layer", _layer), ("counts", _counts), ("sampling", _sampling)):
        path = folder / f"{name}.json"
        if path.is_file():
            parts.append(table(json.loads(path.read_text(encoding="utf-8")), peak))
    return "\n\n".join(parts)


def _rows(header: str, rows: list[list[str]]) -> str:
    columns = header.split("|")
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _spread(values: list[float], form: str = ".3g") -> str:
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def ratio(slow: dict[str, Any], fast: dict[str, Any]) -> list[float]:
    """Time of one system over that of another, round by round: both saw the same machine."""
    return [sum(a) / sum(b) for a, b in zip(slow["rounds"], fast["rounds"], strict=True)]


def _ratio(slow: dict[str, Any] | None, fast: dict[str, Any]) -> str:
    return _spread(ratio(slow, fast), ".2f") if slow and "rounds" in slow and "rounds" in fast else ""


def _step(points: dict[str, Any], peak: float | None) -> str:
    rows = []
    for point, systems in points.items():
        size, _, _, micro = point.split()
        for name, found in systems.items():
            if "failed" in found:
                rows.append([point, name, found["failed"], *[""] * 6])
                continue
            config = load_config(f"imagenet256_{'dense' if name.startswith('dense') else 'promoe'}_{size}")
            rate = [int(micro) / sum(r) for r in found["rounds"]]
            mfu = statistics.median(rate) * flops.train_flops(config, 0.1) / peak if peak else None
            by_part = " / ".join(f"{1e3 * statistics.median(p):.3g}" for p in zip(*found["rounds"], strict=True))
            rows.append([point, name, _spread(rate), by_part, f"{mfu:.1%}" if mfu else "",
                         f"{found['gib']:.1f}" if found["gib"] else "", _ratio(systems.get("dense"), found),
                         _ratio(systems.get("promoe paper loop"), found)])  # fmt: skip
    header = ("point|system|images/s|forward / backward / optimizer, ms|MFU|peak GiB|speed over dense|"
              "speed over the paper's loop")  # fmt: skip
    return f"## Training step\n\n{_rows(header, rows)}"


def _layer(points: dict[str, Any], peak: float | None) -> str:
    rows = []
    for point, systems in points.items():
        for name, found in systems.items():
            if "failed" in found:
                rows.append([point, name, found["failed"], *[""] * 4])
                continue
            by_part = " / ".join(f"{1e3 * statistics.median(p):.3g}" for p in zip(*found["rounds"], strict=True))
            total = _spread([1e3 * sum(r) for r in found["rounds"]])
            floor = systems.get("gemms alone")
            over = _spread(ratio(found, floor), ".2f") if floor and "rounds" in floor else ""
            rows.append([point, name, total, "" if name == "gemms alone" else by_part,
                         _ratio(systems.get("paper loop"), found), over,
                         f"{found['gib']:.1f}" if found["gib"] else ""])  # fmt: skip
    header = "point|system|ms|forward / backward, ms|speed over the paper's loop|time over its GEMMs alone|peak GiB"
    return f"## MoE layer, forward and backward\n\n{_rows(header, rows)}"


def _counts(points: dict[str, Any], peak: float | None) -> str:
    keys = ("evaluation", "training", "kernels", "backward", "syncs")
    rows = []
    for size, systems in points.items():
        for name, found in systems.items():
            dense = systems["dense"]
            over = [f"{found[k]} ({found[k] / dense[k]:.2f}x)" for k in keys[:-1]]
            rows.append([size, name, *over, str(found["syncs"])])
    header = "size|model|forward, evaluation|forward, training|of it no views|backward|host syncs a step"
    return f"## Operators of one pass, and over Dense-DiT's\n\n{_rows(header, rows)}"


def _sampling(points: dict[str, Any], peak: float | None) -> str:
    rows = []
    for size, found in points.items():
        for name in ("dense", "promoe"):
            rate = [found["images"] * found["steps"] / 250 / sum(r) for r in found[name]["rounds"]]
            rows.append([size, name, str(found["images"]), _spread(rate)])
    return f"## Sampling: 250 Euler steps, guidance 1.5\n\n{_rows('size|model|batch|images/s', rows)}"
