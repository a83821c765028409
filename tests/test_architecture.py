"""Who may import what: read from the source, so that the boundaries hold without anyone watching."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(p for folder in ("promoe_ds", "evaluation", "launchers") for p in (ROOT / folder).rglob("*.py"))
OURS = [p for p in SOURCES if p.is_relative_to(ROOT / "promoe_ds")]
LEVELS = (
    {"config"},
    {"utils"},
    {"data", "moe", "diffusion"},
    {"models", "recipes"},
    {"costs"},
    {"parallel", "checkpoint"},
    {"sampling"},
    {"train"},
    {"api", "formats", "analysis"},
    {"evaluation", "cli"},
)
"""rooms of promoe_ds; each imports from its own level and from those above it in this list"""
WITHOUT_DISTRIBUTED = (
    "promoe_ds/models",
    "promoe_ds/moe",
    "promoe_ds/diffusion",
    "promoe_ds/data",
    "promoe_ds/sampling",
    "promoe_ds/checkpoint",
    "promoe_ds/analysis",
    "evaluation/metrics.py",
)


def imports(path: Path) -> set[str]:
    """Every module imported anywhere in a file, functions included."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def within(module: str, name: str) -> bool:
    return module == name or module.startswith(f"{name}.")


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_boundaries(path: Path) -> None:
    name, found = str(path.relative_to(ROOT)), imports(path)
    if not name.startswith("promoe_ds/parallel/"):
        assert not any(within(module, "deepspeed") for module in found), "only promoe_ds/parallel imports deepspeed"
    if name.startswith(WITHOUT_DISTRIBUTED):
        assert not any(within(module, "torch.distributed") for module in found)
    if not name.startswith(("promoe_ds/analysis/", "launchers/")):
        assert not any(within(module, "promoe_ds.analysis") for module in found), (
            "analysis is the last before launchers"
        )
    assert not any(within(module, "evaluation") or within(module, "launchers") for module in found), (
        "say promoe_ds.evaluation, promoe_ds.cli: a file of the working directory may have the short name"
    )
    if name.startswith("evaluation/"):
        known = ("promoe_ds.config", "promoe_ds.utils.files", "promoe_ds.evaluation")
        ours = {module for module in found if within(module, "promoe_ds")}
        assert all(any(within(module, part) for part in known) for module in ours), ours
    if name == "promoe_ds/utils/files.py":
        assert all(module.partition(".")[0] in sys.stdlib_module_names for module in found), "evaluation/ uses it"


@pytest.mark.parametrize("path", OURS, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    def level(module: str) -> int:
        return next((i for i, parts in enumerate(LEVELS) if module.split(".")[1] in parts), -1)

    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    if name != "promoe_ds.__init__":
        assert level(name) >= 0, "add it to LEVELS"
        assert not [m for m in imports(path) if m.startswith("promoe_ds.") and level(m) > level(name)]


def test_tensors_are_written_by_the_one_writer() -> None:
    """safetensors makes files of mode 0600; `files.atomic` gives them the mode of any other."""
    saves = inside = 0
    for path in (*SOURCES, *(ROOT / "benchmarks").glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        blocks = [node for node in ast.walk(tree) if isinstance(node, ast.With)]
        written = [block for block in blocks if "atomic(" in ast.unparse(block.items[0])]
        saves += count_saves(tree)
        inside += sum(map(count_saves, written))
    assert inside == saves > 0


def count_saves(tree: ast.AST) -> int:
    calls = (ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call))
    return sum(name.rpartition(".")[2] == "save_file" for name in calls)


def test_only_the_parallel_package_touches_process_groups() -> None:
    for path in SOURCES:
        name = str(path.relative_to(ROOT))
        if name.startswith(("promoe_ds/models", "promoe_ds/moe", "promoe_ds/diffusion", "promoe_ds/train")):
            assert "torch.distributed" not in path.read_text(encoding="utf-8"), name


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_house_sizes(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert source.count("\n") <= 400
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 60, f"{node.name} is longer than 60 lines"
