"""Whole files: the umask decides who reads them, whoever writes them, in every tree that a command makes."""

from __future__ import annotations

import gc
import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from PIL import Image

from launchers import analyze, encode_latents, evaluate, export, sample
from launchers import checkpoint as checkpoint_launcher
from promoe_ds.formats.diffusers_export import VAE_FILES
from promoe_ds.utils.files import MOST_NESTED, atomic, in_threads, making, parse_json, write_text
from tests.launch import ENVIRONMENT, ROOT
from tests.photographs import tiny_kl, write_tree

MASKS = pytest.mark.parametrize("mask", [0o022, 0o027], ids=oct)
WRITERS: dict[str, Callable[[Path], object]] = {
    "safetensors from torch": lambda path: safetensors.torch.save_file({"a": torch.ones(2)}, path),
    "safetensors from numpy": lambda path: safetensors.numpy.save_file({"a": np.ones(2)}, path),
    "torch": lambda path: torch.save({"a": torch.ones(2)}, path),
    "pillow": lambda path: Image.new("L", (2, 2)).save(path, format="PNG"),
    "text": lambda path: path.write_text("a"),
}


def test_json_is_nested_as_deep_as_said_and_no_deeper() -> None:
    """Short of what Python can read: the tree is compared and written further down the stack."""
    for deep in ("[" * MOST_NESTED + "]" * MOST_NESTED, '{"a":' * MOST_NESTED + "1" + "}" * MOST_NESTED):
        assert parse_json(deep) == json.loads(deep)
        for deeper in (f"[{deep}]", f'{{"a": {deep}}}', "[" * sys.getrecursionlimit()):
            with pytest.raises(ValueError, match="nested too deeply"):
                parse_json(deeper)
    assert parse_json(b"[[], {}, NaN]", parse_constant=str) == [[], {}, "NaN"]


@pytest.fixture
def umask(mask: int) -> Iterator[int]:
    old = os.umask(mask)
    yield mask
    os.umask(old)


def wrong_modes(folder: Path, mask: int) -> dict[str, str]:
    """What does not have 0666 & ~umask (files) or 0777 & ~umask (folders)."""
    found = {p: p.stat().st_mode & 0o7777 for p in (folder, *folder.rglob("*"))}
    return {str(p): oct(mode) for p, mode in found.items() if mode != (0o777 if p.is_dir() else 0o666) & ~mask}


@MASKS
def test_whoever_writes_the_umask_decides_who_reads(tmp_path: Path, umask: int) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    left = folder / f".text.{os.uname().nodename}-{os.getpid()}.tmp"
    left.touch(0o600)  # by a process of this number that was killed
    for name, write in WRITERS.items():
        for _ in ("new", "again"):
            with atomic(folder / name, durable=True) as temporary:
                write(temporary)
    assert len(list(folder.iterdir())) == len(WRITERS) and wrong_modes(folder, umask) == {}


def test_what_fails_leaves_the_file_of_before(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "before")
    with pytest.raises(KeyError), atomic(tmp_path / "a") as temporary:
        temporary.write_text("half")
        raise KeyError
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a", "before")]


def test_a_folder_that_was_made_in_vain_goes_again(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    for kept in ([], ["old/new/file"]):
        with pytest.raises(KeyError), making(tmp_path / "old" / "new" / "inner"):
            assert (tmp_path / "old" / "new" / "inner").is_dir()
            for name in kept:
                (tmp_path / name).touch()
            raise KeyError
        assert [p.relative_to(tmp_path).as_posix() for p in sorted(tmp_path.rglob("*"))] == [
            "old", *(["old/new", *kept] if kept else [])
        ]  # fmt: skip
    with making(tmp_path / "old" / "new"):
        pass
    with pytest.raises(FileExistsError), making(tmp_path / "old" / "new" / "file"):
        pass


# ------------------------------------------------------------------------------------------------------------ commands


def train(run: Path, mask: int) -> None:
    words = ["train.steps=4", "train.checkpoint_every=2", "train.sample_every=2", "train.profile=1:2"]
    command = [sys.executable, str(ROOT / "launchers/train.py"), "--config", "tiny", "--run", str(run), *words]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, cwd=ROOT, umask=mask)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("trained") / "run"
    train(run, 0o027)
    return run


@pytest.mark.slow
def test_a_run_folder(trained: Path) -> None:
    names = {p.name for p in trained.rglob("*")}
    assert {"state-00000-of-00001.safetensors", "manifest.json", "experts.png", "top_steps_1_to_2.txt"} <= names
    assert wrong_modes(trained, 0o027) == {}


def commands(run: Path, inputs: Path, out: Path) -> None:
    """Everything that writes for others, from a run folder, a tree of pictures and an autoencoder."""
    convert = ["convert", "--run", str(run), "--out"]
    assert checkpoint_launcher.main([*convert, str(out / "weights"), "--weights", "ema"]) == 0
    assert checkpoint_launcher.main([*convert, str(out / "fork"), "--files", "3"]) == 0
    export.export(["--run", str(run), "--out", str(out / "shards"), "--shard-gb", "0.0001"])
    vae = ["--format", "diffusers", "--vae", str(inputs / "vae")]
    export.export(["--run", str(run), "--out", str(out / "pipe"), *vae])
    export.export(["--run", str(run), "--out", str(out / "official.pth"), "--format", "official"])
    pictures = ["--images", str(inputs / "tree"), "--vae", "identity", "--size", "16"]
    encode_latents.encode([*pictures, "--out", str(out / "latents")])
    draw = ["--run", str(run), "--num", "12", "--steps", "2", "--cfg", "1", "--device", "cpu", "--out"]
    sample.sample([*draw, str(out / "samples")])
    sample.sample([*draw, str(out / "drawn"), "--format", "features", "--features", "digits-cnn"])
    features = ["--features", "digits-cnn", "--out", str(out / "f.safetensors")]
    assert evaluate.main(["features", str(out / "samples"), *features]) == 0
    assert evaluate.main([str(out / "f.safetensors"), "--ref", "digits", "--out", str(out / "metrics.json")]) == 0
    small = ["--images", "24", "--tokens", "60", "--maps", "1"]
    analyze.analyze(["--run", str(run), *small, "--out", str(out / "report")])


@pytest.mark.slow
@MASKS
def test_every_tree_that_a_command_writes(trained: Path, tmp_path: Path, umask: int) -> None:
    write_tree(tmp_path / "tree", 3, 20)
    tiny_kl(tmp_path / "vae")
    for name in VAE_FILES:
        (tmp_path / "vae" / name).chmod(0o600)  # a copy is ours
    out = tmp_path / "out"
    out.mkdir()
    commands(trained, tmp_path, out)
    assert {p.name for p in out.rglob("*")} >= {
        *("model.safetensors", "model.safetensors.index.json", "official.pth", "shard-00000-of-00001.safetensors"),
        *("samples.npz", "grid.png", "features.safetensors", "f.safetensors", "metrics.json", "report.html"),
    }
    assert wrong_modes(out, umask) == {}


@pytest.fixture
def busy_interpreter() -> Iterator[None]:
    """Threads take turns at every chance, also where an object is made: collecting garbage there runs Python."""
    interval, threshold = sys.getswitchinterval(), gc.get_threshold()
    sys.setswitchinterval(1e-6)
    gc.set_threshold(10, 1000, 1000)
    yield
    sys.setswitchinterval(interval)
    gc.set_threshold(*threshold)


class Garbage:
    def __init__(self) -> None:
        self.itself = self

    def __del__(self) -> None:
        sum(range(20))


def test_numpys_files_are_read_in_threads(busy_interpreter: None) -> None:
    """`np.load` alone raises some SystemErrors here on Python 3.11.2 and 3.11.7."""
    stream, failed = io.BytesIO(), []
    np.save(stream, np.zeros((4, 8, 8), np.float32))

    def read(depth: int) -> None:
        if depth:
            return read(depth - 1)
        for _ in range(300):
            Garbage()
            try:
                in_threads(lambda: np.load(io.BytesIO(stream.getvalue()), allow_pickle=False))
            except Exception as error:
                failed.append(error)

    threads = [threading.Thread(target=read, args=(depth,)) for depth in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


def test_other_errors_of_the_interpreter_are_told() -> None:
    def load() -> None:
        raise SystemError("error return without exception set")

    with pytest.raises(SystemError, match="without exception"):
        in_threads(load)
