"""A run to draw from, launchers/sample.py in this process or in two, and what it leaves in a folder."""

from __future__ import annotations

import hashlib
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from benchmarks.processes import PATIENCE, free_port
from launchers import sample
from promoe_ds.checkpoint import layout
from promoe_ds.config.decode import dump
from promoe_ds.models.init import build, materialize
from promoe_ds.recipes.load import load_tree
from tests.launch import ENVIRONMENT, ROOT, start_rank

LAUNCHER = ROOT / "launchers/sample.py"
Command = Callable[..., int]


def write_run(
    run: Path,
    seed: int = 0,
    channels: int = 1,
    objective: str = "rectified_flow",
    classes: int = 10,
    sample: dict[str, Any] | None = None,
) -> Path:
    """A run folder with one complete checkpoint of a tiny model whose every parameter is drawn."""
    config = load_tree(
        {
            "name": "tiny",
            "model": {
                "depth": 2,
                "width": 32,
                "heads": 2,
                "image_size": 8,
                "channels": channels,
                "num_classes": classes,
            },
            "moe": {"num_experts": 4},
            "diffusion": {"name": objective},
            "sample": sample or {},
        }
    )
    dit = materialize(build(config), seed)
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: tensor.detach() + 0.1 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in dit.state_dict().items()
    }
    file = run / "checkpoints/step_00000007/ema.safetensors"
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, file, {"format": "promoe_ds/1", "config": dump(config), "step": "7"})
    write_manifest(file)
    return file


def write_manifest(file: Path) -> None:
    entry = {"bytes": file.stat().st_size, "blake2b": hashlib.blake2b(file.read_bytes()).hexdigest()}
    tree = {"format": "promoe_ds/1", "step": 7, "files": {file.name: entry}}
    layout.write_manifest(file.parent, tree)


def sample_command(monkeypatch: pytest.MonkeyPatch) -> Command:
    """Runs the launcher in this process; small defaults that later words override. Returns the exit code."""
    for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(key, raising=False)

    def call(*words: object) -> int:
        small = ["--num", "12", "--steps", "2", "--batch", "5", "--cfg", "1.5", "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", ["sample.py", *small, *map(str, words)])
        return sample.main()

    return call


def start_two(*words: object, cwd: Path) -> None:
    """Two processes as torchrun would start them."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    command = [sys.executable, "-u", str(LAUNCHER), "--device", "cpu", *map(str, words)]
    with tempfile.TemporaryFile("w+") as out:
        workers = []
        for rank in range(2):
            environment = ENVIRONMENT | address | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            workers.append(start_rank([*command, f"--local_rank={rank}"], environment, out, cwd))
        codes = [worker.wait(PATIENCE) for worker in workers]
        out.seek(0)
        assert codes == [0, 0], out.read()


def read_npz(path: Path) -> tuple[np.ndarray, np.ndarray]:
    with np.load(path, allow_pickle=False) as npz:
        return npz["arr_0"], npz["arr_1"]


def assert_same_images(one: np.ndarray, two: np.ndarray) -> None:
    """At most one level apart, where rounding differs, and hardly ever."""
    difference = np.abs(one.astype(int) - two)
    assert difference.max() <= 1 and difference.mean() < 1e-3
