"""The process groups of real ranks."""

from __future__ import annotations

import json
from pathlib import Path

from tests.launch import run, torchrun


def test_the_timeout_reaches_every_group(tmp_path: Path) -> None:
    """torch's groups do not inherit it, and its own is 10 minutes on NCCL, 30 on gloo."""
    done = run(torchrun(4, "tests/distributed/groups_worker.py", str(tmp_path / "run")))
    (line,) = [text for text in done.stdout.splitlines() if text.startswith("RESULT ")]
    everyone = json.loads(line.removeprefix("RESULT "))
    assert (
        len(everyone) == 4 and {"world", "experts", "replicas of experts", "experts of sampling"} <= everyone[0].keys()
    )
    for rank in everyone:
        assert rank == dict.fromkeys(rank, 77.0)
