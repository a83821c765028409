"""Training through DeepSpeed and NCCL on one rank: fp32 losses are those of tests/golden, at every ZeRO stage."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

from benchmarks.common import ROOT, read_log
from benchmarks.gpu.figures import Figure, Stage

GOLDEN = ROOT / "tests/golden/tiny_losses.json"
RUNS = {
    **{zero: (zero, "fp32") for zero in ("zero0", "zero1", "zero2", "zero3")},
    "autocast": ("zero0", "bf16_autocast"),
    "bf16 weights": ("zero1", "bf16"),
}
"""DeepSpeed's JSON and `train.precision`"""
LIMIT_FP32, LIMIT_BF16 = 1e-3, 0.1
START_SECONDS = 90.0
"""at most for one run of 20 steps"""


def run(stage: Stage) -> None:
    for name, (zero, precision) in RUNS.items():
        stage.measure(name, partial(losses, stage, zero, precision))


def losses(stage: Stage, zero: str, precision: str) -> Figure:
    """The run, and its furthest loss from the golden ones, relative.

    Raises:
        RuntimeError: it ended with an error; its last words.
    """
    if importlib.util.find_spec("deepspeed") is None:
        return {"skipped": "DeepSpeed is not installed"}
    with tempfile.TemporaryDirectory() as folder:
        words = ["--config", "tiny", "--ds_config", zero, "--run", folder, f"train.precision={precision}"]
        done = train(words, START_SECONDS)
        if done.returncode:
            raise RuntimeError(f"exit {done.returncode}: {done.stdout[-600:]}")
        found = [record["loss"] for record in read_log(Path(folder))]
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    furthest = max(abs(loss - g) / g for loss, g in zip(found, golden, strict=True))
    limit = LIMIT_FP32 if precision == "fp32" else LIMIT_BF16
    return {"furthest": furthest, "first": found[0], "last": found[-1], "ok": furthest < limit}


def train(words: list[str], timeout: float) -> subprocess.CompletedProcess[str]:
    """launchers/train.py on one rank; raises subprocess.TimeoutExpired."""
    command = [sys.executable, str(ROOT / "launchers/train.py"), *words]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)}
    return subprocess.run(
        command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout
    )
