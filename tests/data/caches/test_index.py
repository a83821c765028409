"""The index of a cache of ImageNet takes little memory and time."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.data.cache_files import posterior
from tests.launch import ROOT

INDEX = """
import resource, sys, time
from promoe_ds.config.schema import DataConfig
from promoe_ds.data.caches import open_latents
memory = lambda: int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
before, start = memory(), time.perf_counter()
data = open_latents(sys.argv[1], DataConfig(format=sys.argv[2]))
print(len(data), memory() - before, time.perf_counter() - start)
"""
MANY = 1_281_167


def write_many_lightningdit(root: Path) -> Path:
    """128 files of labels, whose latents are holes."""
    root.mkdir()
    torch.save({"mean": torch.zeros(4), "std": torch.ones(4)}, root / "latents_stats.pt")
    for number, n in enumerate(np.diff(np.linspace(0, MANY, 129).astype(int)).tolist()):
        size = n * 4 * 4 * 4 * 4
        head = {"labels": {"dtype": "I64", "shape": [n], "data_offsets": [2 * size, 2 * size + 8 * n]}}
        for k, key in enumerate(("latents", "latents_flip")):
            head[key] = {"dtype": "F32", "shape": [n, 4, 4, 4], "data_offsets": [k * size, (k + 1) * size]}
        text = json.dumps(head).encode()
        with (root / f"latents_rank00_shard{number:03d}.safetensors").open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.seek(2 * size, 1)
            file.write((np.arange(n) % 1000).astype("<i8").tobytes())
    return root


def write_many_zip(path: Path) -> Path:
    """A directory of so many names, all of which are the one item that lies at the beginning."""
    item = io.BytesIO()
    np.save(item, posterior(0))
    names = [f"{i // 1000:05d}/img-mean-std-{i:08d}.npy" for i in range(MANY)]
    labels = json.dumps({"labels": [[name, i % 1000] for i, name in enumerate(names)]}).encode()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(names[0], item.getvalue())
        archive.writestr("dataset.json", labels)
    with path.open("r+b") as file:
        data = file.read()
        end = data.rindex(b"PK\5\6")
        start = int.from_bytes(data[end + 16 : end + 20], "little")
        length = 46 + len(names[0])
        first, last = data[start : start + length], data[start + length : end]
        file.seek(start)
        for name in names:
            file.write(first[:46] + name.encode())
        file.write(last)
        size, at = file.tell() - start, file.tell()
        file.write(b"PK\6\6" + (44).to_bytes(8, "little") + bytes(12))
        for number in (MANY + 1, MANY + 1, size, start):
            file.write(number.to_bytes(8, "little"))
        file.write(b"PK\6\7" + bytes(4) + at.to_bytes(8, "little") + (1).to_bytes(4, "little"))
        file.write(b"PK\5\6" + bytes(4) + b"\xff" * 12 + bytes(2))
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("format", "write"), [("lightningdit", write_many_lightningdit), ("edm2", write_many_zip)], ids=["files", "zip"]
)
def test_the_index_of_imagenet_fits(tmp_path: Path, format: str, write: Callable[[Path], Path]) -> None:
    command = [sys.executable, "-c", INDEX, str(write(tmp_path / "a.zip")), format]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    print(done.stdout)
    items, memory, seconds = map(float, done.stdout.split())
    assert items == MANY and memory < 300e6 and seconds < 60, done.stdout  # 20 s on a machine of one's own
