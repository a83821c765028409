"""Rewrite the tables of troubleshooting.md from the source: every `reject(...)` with its stage. Run from anywhere."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "troubleshooting.md"
STAGES = {
    "Configuration and recipes": ("promoe_ds/config/", "promoe_ds/recipes/", "promoe_ds/moe/", "promoe_ds/models/"),
    "Data": ("promoe_ds/data/",),
    "Encoding latents": ("promoe_ds/data/encode.py", "launchers/encode_latents.py"),
    "Starting processes, devices and DeepSpeed": ("promoe_ds/parallel/", "promoe_ds/utils/ranks.py"),
    "Training, resuming and checkpoints": ("promoe_ds/train/", "promoe_ds/checkpoint/", "launchers/train.py",
                                           "launchers/checkpoint.py", "promoe_ds/costs/"),
    "Import, export and loading": ("promoe_ds/formats/", "promoe_ds/checkpoint/load_weights.py", "promoe_ds/api.py",
                                   "launchers/export.py", "launchers/import_weights.py"),
    "Sampling": ("promoe_ds/sampling/", "promoe_ds/diffusion/", "promoe_ds/utils/command_line.py",
                 "launchers/sample.py"),
    "Evaluation": ("evaluation/", "launchers/evaluate.py"),
    "Analysis": ("promoe_ds/analysis/", "launchers/analyze.py"),
    "Everything else": ("promoe_ds/", "launchers/"),
}  # fmt: skip
"""stage -> beginnings of paths; the longest that fits"""


def words(node: ast.expr) -> str:
    """An argument as text: what is filled in when it runs is written as ‹name›."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(words(part) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        node = node.value
    if isinstance(node, ast.IfExp):
        return f"{words(node.body)} (or: {words(node.orelse)})"
    name = re.findall(r"[A-Za-z_]\w*", ast.unparse(node))
    return f"‹{name[-1] if name else '...'}›"


def resolved(node: ast.expr, names: dict[str, ast.expr]) -> str:
    return words(names.get(node.id, node) if isinstance(node, ast.Name) else node)


def messages(path: Path) -> Iterator[tuple[str, str, str]]:
    """(path of the setting, conflict, way out) of every call in a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for scope in [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]:
        assigned = [node for node in ast.walk(scope) if isinstance(node, ast.Assign) and len(node.targets) == 1]
        assigned.sort(key=lambda node: node.lineno)
        for call in ast.walk(scope):
            if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "reject" and len(call.args) == 4:
                key, _, conflict, way_out = call.args
                before = [
                    node for node in assigned if node.lineno <= call.lineno
                ]  # the last one before the call counts
                names = {t.id: n.value for n in before if isinstance(t := n.targets[0], ast.Name)}
                yield resolved(key, names), resolved(conflict, names), resolved(way_out, names)


def tables() -> str:
    found: dict[str, dict[tuple[str, str, str], None]] = {stage: {} for stage in STAGES}
    for path in sorted(p for folder in ("promoe_ds", "evaluation", "launchers") for p in (ROOT / folder).rglob("*.py")):
        name = str(path.relative_to(ROOT))
        fits = [(len(start), stage) for stage, starts in STAGES.items() for start in starts if name.startswith(start)]
        stage = max(fits)[1]
        found[stage] |= dict.fromkeys(messages(path))
    parts = []
    for stage, rows in found.items():
        lines = [
            "| `" + key + "` | " + " | ".join(cell.replace("|", "\\|") for cell in rest) + " |"
            for key, *rest in sorted(rows)
        ]
        if lines:
            parts.append(
                "\n".join([f"### {stage}", "", "| setting | what is wrong | what to do |", "|---|---|---|", *lines])
            )
    return "\n\n".join(parts)


def main() -> None:
    head, mark, _ = PAGE.read_text(encoding="utf-8").partition("<!-- messages -->\n")
    assert mark, "the page has lost its mark"
    PAGE.write_text(f"{head}{mark}\n{tables()}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
