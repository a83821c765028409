"""On one rank DeepSpeed's copies of gradients are left out, and the losses stay as they are, to the bit."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.launch import ROOT, run


def rows(out: Path, *words: str) -> list[list[str]]:
    """Cells of the table: ZeRO stage, bytes per parameter, by operator, losses."""
    command = [
        sys.executable,
        str(ROOT / "benchmarks/gradient_copies.py"),
        "--recipe",
        "tiny",
        "--out",
        str(out),
        *words,
    ]
    run(command)
    lines = [line for line in out.read_text().splitlines() if line[:3] in ("| 0", "| 1", "| 2")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_copies_and_losses(tmp_path: Path) -> None:
    own, spared = rows(tmp_path / "own.md", "--own"), rows(tmp_path / "spared.md")
    assert [row[0] for row in own] == [row[0] for row in spared] == ["0", "1", "2"]
    for before, after in zip(own, spared, strict=True):
        assert before[3:] == after[3:], "losses before and after an update"
    assert [float(row[1]) for row in spared] == pytest.approx([0, 44, 44], abs=1)
    assert [float(row[1]) for row in own] == pytest.approx([24, 80, 80], abs=1)
