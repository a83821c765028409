"""The benchmark of the optimizer runs, here not compiled."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import optimizer_step
from promoe_ds.parallel import one_pass
from promoe_ds.utils.command_line import guarded


def test_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(one_pass, "compiled", lambda: one_pass.update)
    out = tmp_path / "page.md"
    assert guarded(optimizer_step.run, ["--recipe", "tiny", "--rounds", "2", "--out", str(out)]) == 0
    page = out.read_text()
    assert "48 bytes per parameter apart, 36 in one pass" in page and "| one flat tensor |" in page


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(one_pass, "compiled", lambda: None)
    assert guarded(optimizer_step.run, ["--recipe", "tiny"]) == 2
    assert "the compiler finds no vector instructions" in capsys.readouterr().err
