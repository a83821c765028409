"""ProMoE-S and Dense-S on CIFAR-10, a minute each, through DeepSpeed, loader and all.

    make bench-gpu-train DATA=cifar10_jpeg.npz             75 s each, start included; logs into $OUT or runs/gpu_train
    make bench-gpu-train DRY=1                             the smallest model on digits, on the CPU

Each run is stopped as a batch system would stop it, and saves. `--compile` only where the smoke stage found compiled
gradients right. Losses and images per second are those of the run's own log.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from benchmarks.common import ROOT, read_log, table
from benchmarks.gpu.visit import check_device, end
from promoe_ds.config.errors import reject
from promoe_ds.utils.command_line import STOPPED, Parser, launcher
from promoe_ds.utils.files import write_text

MODELS = {"promoe": [], "dense": ["moe=null"]}
SAVE_SECONDS = 30.0
"""to save after the signal"""
KEPT = ("metrics.jsonl", "config.yaml")


def command(name: str, folder: Path, args: argparse.Namespace) -> list[str]:
    words = ["--config", "tiny" if args.dry else "cifar10_promoe_s", "--ds_config", "zero0", "--run", str(folder)]
    words += ["train.steps=1000000", "train.checkpoint_every=1000000", "train.log_every=10", *MODELS[name]]
    words += [] if args.dry else [f"data.path={args.data}"]
    words += ["train.compile=true"] if args.compile else []
    return [sys.executable, str(ROOT / "launchers/train.py"), *words]


def train(name: str, args: argparse.Namespace) -> list[str]:
    """Run one model; a row of the table."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / name
        with (args.out / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                command(name, folder, args), cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
            try:
                if (code := waited(process, args.each)) is None:
                    process.send_signal(signal.SIGTERM)
                    code = waited(process, SAVE_SECONDS)
            finally:
                end(process)
                for file in KEPT:
                    if (folder / file).exists():
                        shutil.copy(folder / file, args.out / f"{name}_{file}")
        return [name, *summary(folder, code)]


def waited(process: subprocess.Popen[bytes], seconds: float) -> int | None:
    """The exit code, None if it does not end in this time."""
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None


def summary(folder: Path, code: int | None) -> list[str]:
    """Steps, first and last loss, images per second, and how it ended."""
    ended = "saved" if code == STOPPED else f"exit {code}, see the log"
    log = read_log(folder) if (folder / "metrics.jsonl").exists() else []
    if not log:
        return ["0", "", "", "", ended]
    rates = [record["images_per_s"] for record in log[1:] if record.get("images_per_s")]
    rate = f"{median(rates):.4g}" if rates else ""
    return [str(log[-1]["step"]), f"{log[0]['loss']:.4f}", f"{log[-1]['loss']:.4f}", rate, ended]


def run(words: list[str]) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="the smallest model on digits, on the CPU")
    parser.add_argument("--data", type=Path, metavar="FILE", help="CIFAR-10 as data.path takes it")
    parser.add_argument("--out", type=Path, metavar="DIR", help="(default: $OUT, else runs/gpu_train)")
    parser.add_argument("--each", type=float, default=75.0, help="seconds until a run is told to stop (default 75)")
    parser.add_argument("--compile", action="store_true", help="train.compile=true")
    args = parser.parse_args(words)
    if args.each <= 0:
        reject("--each", args.each, "must be positive", "choose 75")
    if not args.dry and (args.data is None or not args.data.exists()):
        reject("--data", args.data, "there is no CIFAR-10", "name a packed npz or a class-per-folder tree")
    if importlib.util.find_spec("deepspeed") is None:
        reject("make bench-gpu-train", "deepspeed", "is not installed", "install it; make bench-gpu does without")
    check_device(args.dry)
    args.out = (args.out or Path(os.environ.get("OUT") or "runs/gpu_train")).resolve()
    args.data = args.data and args.data.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    columns, rows = ["model", "steps", "first loss", "last loss", "images/s", "end"], []
    for name in MODELS:
        rows.append(train(name, args))
        text = f"# CIFAR-10, {args.each:.0f} s each\n\n{table(columns, rows)}\n"
        write_text(args.out / "cifar.md", text)
    print(text)


if __name__ == "__main__":
    _, console = launcher(run)
    console()
