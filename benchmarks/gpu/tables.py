"""The page of a visit, from its figures."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from benchmarks.common import table

Figure = dict[str, Any]
CARD_PRODUCT = "8192x8192x8192"
"""whose rate is the card's own"""


def page(figures: list[Figure]) -> str:
    """Markdown: faults first, then a table for each kind of figure. The last line of a name counts."""
    by_stage: dict[str, dict[str, Figure]] = {}
    for f in figures:
        by_stage.setdefault(f["stage"], {})[f["name"]] = f
    parts = ["# One visit to a GPU", head(by_stage.get("ceilings", {}), figures), faults(by_stage)]
    parts += [checks(name, by_stage[name]) for name in ("smoke", "engine") if name in by_stage]
    if "speed" in by_stage:
        parts.append(speed(by_stage["speed"], by_stage.get("ceilings", {})))
    parts += [plain(name, by_stage[name]) for name in ("ceilings", "profile", "layer") if name in by_stage]
    return "\n\n".join(part for part in parts if part) + "\n"


def head(ceilings: dict[str, Figure], figures: list[Figure]) -> str:
    versions = {k: v for k, v in ceilings.get("versions", {}).items() if k not in ("stage", "name", "took_s")}
    cards = ", ".join(dict.fromkeys(f["device"] for f in figures))
    return table(["", ""], ({"device": cards} | versions).items())


def faults(by_stage: dict[str, dict[str, Figure]]) -> str:
    rows = [(stage, name, f.get("failed") or "not ok: " + values(f))
            for stage, those in by_stage.items() for name, f in those.items()
            if "failed" in f or f.get("ok") is False]  # fmt: skip
    return "## Faults\n\n" + (table(["stage", "figure", "what"], rows) if rows else "None.")


def values(f: Figure, but: Iterable[str] = ("stage", "name", "device", "took_s")) -> str:
    return ", ".join(f"{key} {shown(value)}" for key, value in f.items() if key not in but)


def shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def checks(stage: str, figures: dict[str, Figure]) -> str:
    passed = sum(f.get("ok") is True for f in figures.values())
    skipped = {f["skipped"] for f in figures.values() if "skipped" in f}
    return f"## {stage}: {passed} of {len(figures)} are right{''.join(f'; {text}' for text in sorted(skipped))}\n\n" + (
        table(["figure", "values"], ((name, values(f)) for name, f in figures.items()))
    )


def speed(points: dict[str, Figure], ceilings: dict[str, Figure]) -> str:
    """A row per model, micro-batch and way; shares are of the card's own measured bf16 rate."""
    card = ceilings.get(CARD_PRODUCT, {}).get("TFLOP_s")
    columns = ["model", "micro-batch", "way", "images/s", "forward / backward / update, ms", "host, ms", "share",
               "share without update", "over dense", "over dense without update", "over loop",
               "peak GiB", "of it states"]  # fmt: skip
    rows = []
    for name, f in points.items():
        if "failed" in f:
            rows.append([*name.split(), f["failed"], *[""] * (len(columns) - 4)])
        else:
            rows.append([*name.split(), *measured(name, f, points, card)])
    return "## speed\n\n" + table(columns, rows)


def measured(name: str, f: Figure, points: dict[str, Figure], card: float | None) -> list[str]:
    recipe, images, way = name.split()
    size = recipe.split("_")[1]
    dense = points.get(f"dense_{size} {images} {way}", {}) if recipe.startswith("promoe") else {}
    loop = points.get(f"{recipe} {images} loop", {}) if way != "loop" else {}
    step: Callable[[Figure], float] = lambda p: p["forward_ms"] + p["backward_ms"]  # noqa: E731
    return [
        shown(f["images_s"]),
        " / ".join(f"{f[f'{part}_ms']:.4g}" for part in ("forward", "backward", "update")),
        shown(f["host_ms"]),
        f"{f['TFLOP_s'] / card:.1%}" if card else "",
        f"{f['TFLOP_s_without_update'] / card:.1%}" if card else "",
        f"{f['images_s'] / dense['images_s']:.2f}" if "images_s" in dense else "",
        f"{step(dense) / step(f):.2f}" if "images_s" in dense else "",
        f"{f['images_s'] / loop['images_s']:.2f}" if "images_s" in loop else "",
        shown(f.get("peak_gib", "")),
        shown(f.get("states_gib", "")),
    ]


def plain(stage: str, figures: dict[str, Figure]) -> str:
    rows = ((name, values(f)) for name, f in figures.items() if name != "versions")
    return f"## {stage}\n\n" + table(["figure", "values"], rows)
