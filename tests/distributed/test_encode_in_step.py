"""Training that encodes in the step, against training on shards of the same images: real processes, real codecs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from benchmarks.common import ema_difference, read_log
from benchmarks.processes import PATIENCE
from launchers import encode_latents, sample
from launchers import train as launcher
from promoe_ds.data.codecs import TAEF2_FILES, WEIGHTS, open_codec
from promoe_ds.data.encode import EncodedImages, EncodeJob, Encoder, run_encoding
from promoe_ds.data.images import FolderImages
from promoe_ds.utils.ranks import ALONE
from tests.data.test_codecs import PACKS
from tests.launch import ENVIRONMENT, ROOT, train
from tests.launchers.test_pipeline import subset
from tests.photographs import tiny_kl, write_tree

RECIPE = {
    "base": "tiny",
    "model": {"depth": 2, "channels": 4, "num_classes": 2},
    "moe": {"num_experts": 4},
    "data": {"hflip": True},
    "train": {"steps": 20, "global_batch_size": 8, "checkpoint_every": 10, "sample_every": 10},
    "sample": {"steps": 2, "cfg": 1.0, "per_class": 2, "classes": 2},
}


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launcher that is called in this process is a job of one."""
    for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(key, raising=False)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe, photographs, an autoencoder with a posterior, and their shards in float32."""
    root = tmp_path_factory.mktemp("work")
    (root / "mine.yaml").write_text(yaml.safe_dump(RECIPE))
    write_tree(root / "tree", 9, 24)
    tiny_kl(root / "vae")
    codec = open_codec(str(root / "vae"))
    source = EncodedImages(FolderImages(root / "tree", 3, 16), codec, 4, torch.device("cpu"))
    run_encoding(Encoder(source, EncodeJob(root / "shards", 7, "float32"), "", {}), ALONE)
    return root


def run(work: Path, name: str, *words: str, processes: int = 1) -> Path:
    train("--config", str(work / "mine.yaml"), "--run", str(work / name), *words, processes=processes)
    return work / name


def in_step(work: Path, name: str, *words: str, processes: int = 1) -> Path:
    data = f"data.name=images data.path={work}/tree data.vae={work}/vae".split()
    return run(work, name, *data, *words, processes=processes)


def losses(folder: Path) -> list[float]:
    return [record["loss"] for record in read_log(folder)]


@pytest.fixture(scope="module")
def cached(work: Path) -> Path:
    words = f"data.name=latents data.path={work}/shards data.vae={work}/vae".split()
    return run(work, "cached", *words)


@pytest.mark.parametrize(
    ("processes", "words"),
    [
        (1, ["data.workers=2"]),
        (2, ["data.workers=0"]),
        (2, ["parallel.expert_parallel=2", "data.workers=1", "data.prefetch=1"]),
    ],
)
def test_losses_are_those_of_cached_moments(work: Path, cached: Path, processes: int, words: list[str]) -> None:
    folder = in_step(work, "-".join(map(str, (processes, *words))), *words, processes=processes)
    expected, found = losses(cached), losses(folder)
    assert len(expected) == len(found) == 20 and len(set(expected)) == 20
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    assert ema_difference(folder, cached, 20) < 1e-4
    for name in ("codec.json", "samples/grid_00000010.png"):
        assert (folder / name).is_file(), name
    assert (folder / "codec.json").read_text() == (cached / "codec.json").read_text()


def test_a_run_that_stops_in_the_middle_goes_on_at_another_topology(work: Path, cached: Path) -> None:
    name = "resumed"
    in_step(work, name, "train.steps=10", "data.workers=1")
    folder = in_step(work, name, "train.steps=20", "parallel.expert_parallel=2", processes=2)
    np.testing.assert_allclose(losses(folder), losses(cached), rtol=0, atol=1e-5)
    codec = tiny_kl(work / "other") / WEIGHTS
    save_file({key: value * 1.01 for key, value in load_file(codec).items()}, codec)
    words = f"data.name=images data.path={work}/tree data.vae={work}/other train.steps=30".split()
    done = train("--config", str(work / "mine.yaml"), "--run", str(folder), *words, check=False, fork=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "encoded by AutoencoderKL" in done.stderr and "was trained on 18 images of 2 classes" in done.stderr


def test_sigterm_to_every_process_of_the_job_lets_it_save(work: Path) -> None:
    """As Slurm sends it: the processes that decode leave it to their rank."""
    words = f"data.name=images data.path={work}/tree data.vae={work}/vae data.workers=2 train.steps=1000000".split()
    command = [sys.executable, "launchers/train.py", "--config", work / "mine.yaml", "--run", work / "stopped", *words]
    job = subprocess.Popen([*map(str, command), "train.sample_every=0", "train.checkpoint_every=1000000"], cwd=ROOT,
                           env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                           start_new_session=True)  # fmt: skip
    assert job.stdout is not None
    assert any(line.startswith("step ") for line in job.stdout)
    os.killpg(job.pid, signal.SIGTERM)
    out, errors = job.communicate(timeout=PATIENCE)
    assert job.returncode == 85, errors
    assert "stopped by a signal at step" in out and "Traceback" not in errors
    with pytest.raises(ProcessLookupError):
        os.killpg(job.pid, 0)  # nobody is left in the session


def test_samples_are_decoded_without_further_options(work: Path, cached: Path, tmp_path: Path, alone: None) -> None:
    folder = in_step(work, "sampled", "train.steps=2")
    words = ["--run", folder, "--num", 4, "--steps", 2, "--device", "cpu", "--out", tmp_path, "--format", "npz"]
    assert sample.main([str(word) for word in words]) == 0
    with np.load(tmp_path / "samples.npz", allow_pickle=False) as pack:
        assert pack["arr_0"].shape == (4, 16, 16, 3)
    assert json.loads((tmp_path / "sampling.json").read_text())["vae"].startswith("AutoencoderKL ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.vae=nowhere"], "error: data.vae=nowhere: no such folder; put config.json and diffusion_pytorch_model"),
        (["data.vae={work}/tree"], "error: data.vae={work}/tree: has no config.json; put config.json and"),
        (["model.channels=3"], "error: model.channels=3: the latents of data.vae={work}/vae (AutoencoderKL) have 4"),
        (["data.path={work}/shards"], "error: data.path={work}/shards: holds latents, not pictures (LatentShards); "),
        (["model.image_size=7"], "error: model.image_size=7: is not divisible by model.patch=2; change one of them"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(
    work: Path, tmp_path: Path, words: list[str], message: str, alone: None, capsys: pytest.CaptureFixture[str]
) -> None:
    data = f"data.name=images data.path={work}/tree data.vae={work}/vae".split()
    run, said = tmp_path / "run", [word.format(work=work) for word in words]
    assert launcher.main(["--config", str(work / "mine.yaml"), "--run", str(run), *data, *said]) == 2
    out, errors = capsys.readouterr()
    assert out == "" and errors.count("\n") == 1
    assert errors.startswith(message.format(work=work)) and not run.exists()


def test_tiny_imagenet_through_taef2(tmp_path: Path, alone: None) -> None:
    """Must hold: the losses of shards in float32, on two ranks that share the experts."""
    pack = PACKS / "tinyimagenet50_jpeg.npz"
    if not (pack.is_file() and (PACKS / TAEF2_FILES[0]).is_file()):
        pytest.skip(f"{pack} or {TAEF2_FILES[0]} beside it is absent (set PROMOE_DS_DATA to their folder)")
    images, vae = subset(pack, tmp_path / "subset.npz", 3, 6), tmp_path / "vae"
    vae.mkdir()
    for name in TAEF2_FILES:
        (vae / name).symlink_to(PACKS / name)
    words: list[Any] = [
        "--images",
        images,
        "--vae",
        vae,
        "--size",
        64,
        "--out",
        tmp_path / "shards",
        "--dtype",
        "float32",
    ]
    assert encode_latents.main([*map(str, words), "--device", "cpu"]) == 0
    recipe = RECIPE | {"model": {"depth": 2, "channels": 32, "num_classes": 3, "image_size": 8}}
    recipe["train"] = {"steps": 6, "global_batch_size": 4, "checkpoint_every": 6}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(recipe))
    cached = run(tmp_path, "cached", "data.name=latents", f"data.path={tmp_path}/shards")
    coded = f"data.name=images data.path={images} data.vae={vae} data.workers=1 parallel.expert_parallel=2".split()
    ours = run(tmp_path, "coded", *coded, processes=2)
    np.testing.assert_allclose(losses(ours), losses(cached), rtol=0, atol=1e-5)
    assert (ours / "samples/grid.png").is_file()
