"""The benchmark of gradient reduction by real ranks."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from benchmarks.gradient_reduction import run
from promoe_ds.utils.command_line import guarded
from tests.launch import run_forked


def test_half_the_bytes_and_the_same_losses(tmp_path: Path) -> None:
    out = tmp_path / "page.md"
    options = ["--recipe", "tiny", "--world", "2", "--ep", "2", "--bucket", "20000", "--steps", "1", "--rounds", "1"]
    assert guarded(partial(run, start=run_forked), [*options, "--count", "--out", str(out)]) == 0
    assert out.read_text().splitlines()[-1] == "| 2 | 2 | 1 | 20,000 | 354,064 | 1.00 | 2.00 | 12 | 11 | 0e+00 |"
