"""Gradients arrive during the backward pass, so that their reduction can run beside it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.launch import run, torchrun


@pytest.mark.parametrize("ds", ["zero1", "zero2"])
def test_copies_of_weights_do_not_hold_up_the_last_micro_batch(tmp_path: Path, ds: str) -> None:
    done = run(torchrun(2, "tests/distributed/arrivals_worker.py", str(tmp_path / "run"), ds))
    (line,) = [text for text in done.stdout.splitlines() if text.startswith("RESULT ")]
    first, last = json.loads(line.removeprefix("RESULT "))
    assert len(first) > 50 and last == first
    weights = [name for name in last if name.endswith("qkv.weight")]
    assert weights == sorted(weights, reverse=True) and last.index("x_embedder.proj.weight") > last.index(weights[-1])
