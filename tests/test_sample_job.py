from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from evaluation.collect import FeatureSet, collect
from evaluation.feature_store import FeatureStore
from evaluation.features import DigitsCNN
from evaluation.samples import load_samples
from promoe_ds.config import Config, ConfigError, decode, dump
from promoe_ds.data.codecs import open_codec
from promoe_ds.diffusion.guidance import guided_prediction
from promoe_ds.diffusion.objective import make_objective
from promoe_ds.loading import load_ema
from promoe_ds.models.init import build, materialize
from promoe_ds.sample_job import Job, Sampler, claim_folder, run_job, run_of
from promoe_ds.sample_store import BatchStore, PngStore, read_image
from promoe_ds.sampling import How, image_noise, to_pixels
from promoe_ds.train import checkpoint
from promoe_ds.workers import Worker, worker_from
from tests.data.test_codecs import write_taef2
from tests.photographs import tiny_kl

LAUNCHER = Path(__file__).resolve().parents[1] / "launchers/sample.py"
Command = Callable[..., int]


def load_launcher() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sample_launcher", LAUNCHER)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_run(run: Path, seed: int = 0, channels: int = 1, objective: str = "rectified_flow") -> Path:
    """A run folder with one complete checkpoint of a tiny model whose every parameter is drawn."""
    config = decode(
        {
            "name": "tiny",
            "model": {"depth": 2, "width": 32, "heads": 2, "image_size": 8, "channels": channels, "num_classes": 10},
            "moe": {"num_experts": 4},
            "diffusion": {"name": objective},
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
    checkpoint.write_manifest(file.parent, tree)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Command:
    """Runs the launcher in this process; small defaults that later words override. Returns the exit code."""
    launcher = load_launcher()
    for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(key, raising=False)

    def call(*words: object) -> int:
        small = ["--num", "12", "--steps", "2", "--batch", "5", "--cfg", "1.5", "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", ["sample.py", *small, *map(str, words)])
        return launcher.main()

    return call


def read_npz(path: Path) -> tuple[np.ndarray, np.ndarray]:
    with np.load(path, allow_pickle=False) as npz:
        return npz["arr_0"], npz["arr_1"]


# ------------------------------------------------------------------------------------------------------------ output


def test_one_scale_fills_the_folder(command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, file = tmp_path / "out", write_run(tmp_path)
    assert command("--model", file, "--out", out) == 0
    images, labels = read_npz(out / "samples.npz")
    assert images.dtype == np.uint8 and images.shape == (12, 8, 8, 1) and images.std() > 20
    assert labels.dtype == np.int64 and labels.tolist() == [*range(10), 0, 1]
    assert read_image(out / "000011_class1.png", (8, 8, 1)) is not None
    names = {f"{i:06d}_class{i % 10}.png" for i in range(12)}
    names |= {"samples.npz", "grid.png", "sampling.json", "config.yaml"}
    assert {path.name for path in out.iterdir()} == names
    for i in range(12):
        np.testing.assert_array_equal(read_image(out / f"{i:06d}_class{i % 10}.png", (8, 8, 1)), images[i])
    with Image.open(out / "grid.png") as sheet:
        assert sheet.size == (10 * 50 + 2, 2 * 50 + 2)
    record = json.loads((out / "sampling.json").read_text())
    assert record["checkpoint"] == "checkpoints/step_00000007/ema.safetensors" and record["checkpoint_step"] == 7
    assert (record["config"], record["cfg"], record["steps"], record["seed"], record["num"], record["precision"]) == (
        "tiny",
        1.5,
        2,
        0,
        12,
        "fp32",
    )
    assert record["command"].startswith("launchers/sample.py --num 12") and record["versions"]["torch"]
    printed = capsys.readouterr()
    assert "12 images at cfg 1.5" in printed.out and "12/12" in printed.err


def test_several_scales_get_a_folder_each(command: Command, tmp_path: Path) -> None:
    write_run(tmp_path)
    assert command("--run", tmp_path, "--cfg", "1,2.5", "--out", tmp_path / "out") == 0
    plain, _ = read_npz(tmp_path / "out/cfg1.0/samples.npz")
    guided, _ = read_npz(tmp_path / "out/cfg2.5/samples.npz")
    assert (plain != guided).any()
    assert command("--run", tmp_path, "--cfg", "1") == 0
    default, _ = read_npz(tmp_path / "samples/cfg1.0/samples.npz")
    np.testing.assert_array_equal(default, plain)


def test_the_record_names_the_sampler(command: Command, tmp_path: Path) -> None:
    def record(name: str, *words: object) -> tuple[object, ...]:
        assert command("--model", file, "--out", tmp_path / name, *words) == 0
        found = json.loads((tmp_path / name / "sampling.json").read_text())
        return tuple(found[key] for key in ("sampler", "eta", "guidance_channels", "steps"))

    file = write_run(tmp_path, channels=3, objective="ddpm")
    assert record("default") == ("ddpm", 0.0, "all", 2)
    words = ("--sampler", "ddim", "--eta", 0.5, "--guidance-channels", "3", "--steps", "ddim4")
    assert record("ddim", *words) == ("ddim", 0.5, 3, "ddim4")
    assert command("--model", file, "--out", tmp_path / "ddim", *words, "--eta", 0) == 2
    images, again = (read_npz(tmp_path / name / "samples.npz")[0] for name in ("default", "ddim"))
    assert (images != again).any()


def test_folders_from_before_samplers_were_recorded_are_continued(command: Command, tmp_path: Path) -> None:
    file, out = write_run(tmp_path), tmp_path / "out"
    assert command("--model", file, "--out", out) == 0
    record = json.loads((out / "sampling.json").read_text())
    old = {k: v for k, v in record.items() if k not in ("sampler", "eta", "guidance_channels")}
    (out / "sampling.json").write_text(json.dumps(old))
    assert command("--model", file, "--out", out) == 0
    assert command("--model", file, "--out", out, "--sampler", "heun") == 2


def test_colour_images(command: Command, tmp_path: Path) -> None:
    assert command("--model", write_run(tmp_path, channels=3), "--out", tmp_path / "out", "--num", 3) == 0
    images, _ = read_npz(tmp_path / "out/samples.npz")
    np.testing.assert_array_equal(read_image(tmp_path / "out/000002_class2.png", (8, 8, 3)), images[2])


def start_two(*words: object, cwd: Path) -> list[int]:
    """Two processes as torchrun would start them; returns exit codes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    workers = [
        subprocess.Popen(
            [sys.executable, LAUNCHER, "--device", "cpu", *map(str, words), f"--local_rank={rank}"],
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | address | {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=cwd,
        )
        for rank in range(2)
    ]
    errors = [worker.communicate(timeout=120)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], errors
    return [worker.returncode for worker in workers]


def assert_same_images(one: np.ndarray, two: np.ndarray) -> None:
    """At most one level apart, where rounding differs, and hardly ever."""
    difference = np.abs(one.astype(int) - two)
    assert difference.max() <= 1 and difference.mean() < 1e-3


def test_two_processes_make_the_images_of_one(command: Command, tmp_path: Path) -> None:
    """200 images, by batches of 7 and of 32."""
    file = write_run(tmp_path)
    words = ["--model", file, "--num", 200, "--steps", 2, "--cfg", "1,1.5"]
    start_two(*words, "--batch", 7, "--out", tmp_path / "two", cwd=tmp_path)
    assert command(*words, "--batch", 32, "--out", tmp_path / "one") == 0
    for scale in ("cfg1.0", "cfg1.5"):
        alone, shared = tmp_path / "one" / scale, tmp_path / "two" / scale
        one, labels_one = read_npz(alone / "samples.npz")
        two, labels_two = read_npz(shared / "samples.npz")
        assert_same_images(one, two)
        np.testing.assert_array_equal(labels_one, labels_two)
        assert {path.name for path in alone.iterdir()} == {path.name for path in shared.iterdir()}
        assert "local_rank" not in json.loads((shared / "sampling.json").read_text())["command"]


def test_processes_that_share_experts_make_the_same_images(command: Command, tmp_path: Path) -> None:
    """Rank 0 has two batches to make, rank 1 only one: it must help with the other."""
    file = write_run(tmp_path)
    words = ["--model", file, "--num", 9, "--steps", 2, "--cfg", "1.5", "--batch", 4]
    start_two(*words, "--expert-parallel", 2, "--out", tmp_path / "two", cwd=tmp_path)
    assert command(*words, "--out", tmp_path / "one") == 0
    assert_same_images(*(read_npz(tmp_path / name / "samples.npz")[0] for name in ("one", "two")))


def test_sampling_imports_no_deepspeed() -> None:
    code = (
        f"import runpy, sys; runpy.run_path({str(LAUNCHER)!r}); import promoe_ds.train.checkpoint; "
        "sys.exit('deepspeed' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


# ------------------------------------------------------------------------------------------------------------ resume


def test_interrupted_folder_is_finished_and_finished_images_are_kept(command: Command, tmp_path: Path) -> None:
    file, out = write_run(tmp_path), tmp_path / "out"
    assert command("--model", file, "--out", out) == 0
    whole, _ = read_npz(out / "samples.npz")
    marked = np.full((8, 8), 77, np.uint8)
    Image.fromarray(marked).save(out / "000003_class3.png")  # would be redrawn, if finished images were
    (out / "000004_class4.png").write_bytes((out / "000004_class4.png").read_bytes()[:40])
    for name in ("samples.npz", "000005_class5.png", "000011_class1.png"):
        (out / name).unlink()
    for name in (".000009_class9.png.host-1.tmp", "part-1-of-2.npz"):
        (out / name).write_bytes(b"half")
    assert command("--model", file, "--out", out, "--batch", 2) == 0
    again, _ = read_npz(out / "samples.npz")
    assert (again[3, :, :, 0] == 77).all()
    others = np.delete(np.arange(12), 3)
    assert np.abs(again[others].astype(int) - whole[others]).max() <= 1
    assert not list(out.glob(".*")) and not list(out.glob("part*"))


@pytest.mark.parametrize(
    ("words", "difference"),
    [
        (["--seed", 1], "holds samples of seed=0, this command has seed=1"),
        (["--steps", 3], "steps=2, this command has steps=3"),
        (["--cfg", 2], "cfg=1.5, this command has cfg=2.0"),
        (["--num", 13], "num=12, this command has num=13"),
        (["--precision", "bf16"], "precision=fp32, this command has precision=bf16"),
        (["--sampler", "heun"], "sampler=euler, this command has sampler=heun"),
    ],
)
def test_other_samples_are_not_overwritten(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list, difference: str
) -> None:
    file, out = write_run(tmp_path), tmp_path / "out"
    assert command("--model", file, "--out", out) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    capsys.readouterr()
    assert command("--model", file, "--out", out, *words) == 2
    error = capsys.readouterr().err
    assert difference in error and error.startswith("error: --out=") and error.count("\n") == 1
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_other_weights_of_the_same_step_are_noticed(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("--model", write_run(tmp_path), "--out", tmp_path / "out") == 0
    assert command("--model", write_run(tmp_path, seed=1), "--out", tmp_path / "out") == 2
    assert "checkpoint_blake2b=" in capsys.readouterr().err


def test_folders_are_checked_before_the_first_image(command: Command, tmp_path: Path) -> None:
    file, out = write_run(tmp_path), tmp_path / "out"
    (out / "cfg3.0").mkdir(parents=True)
    (out / "cfg3.0/grid.png").write_bytes(b"")
    assert command("--model", file, "--out", out, "--cfg", "1,3") == 2
    assert [path.name for path in out.iterdir()] == ["cfg3.0"]


def test_unclaimable_folders_are_one_line(tmp_path: Path) -> None:
    record = {"seed": 0}
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is not a folder; name another one"):
        claim_folder(tmp_path / "file", record, Config())
    with pytest.raises(ConfigError, match="cannot be written"):
        claim_folder(tmp_path / "file/below", record, Config())
    (tmp_path / "000001_class1.png").write_bytes(b"")
    with pytest.raises(ConfigError, match="holds 000001_class1.png but no sampling.json"):
        claim_folder(tmp_path, record, Config())
    (tmp_path / "sampling.json").write_text("{")
    with pytest.raises(ConfigError, match="its sampling.json cannot be read"):
        claim_folder(tmp_path, record, Config())
    (tmp_path / "sampling.json").write_text("[]")
    with pytest.raises(ConfigError, match="holds samples of config=None"):
        claim_folder(tmp_path, record | {"config": "tiny"}, Config())


def test_interrupt_is_resumable(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stop after the first batch leaves its images and the record; the same command then draws the rest only."""
    file, out = write_run(tmp_path), tmp_path / "out"
    kept = PngStore.path

    def stop_at_sixth(self: PngStore, index: int) -> Path:
        if index == 6 and kept(self, 4).exists():
            raise KeyboardInterrupt
        return kept(self, index)

    with monkeypatch.context() as patch:
        patch.setattr(PngStore, "path", stop_at_sixth)
        assert command("--model", file, "--out", out) == 85
    times = {path: path.stat().st_mtime_ns for path in out.glob("*.png")}
    assert len(times) == 6 and not (out / "samples.npz").exists() and not list(out.glob(".*"))
    assert command("--model", file, "--out", out) == 0
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())


# --------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num", 0], "--num=0: must be positive"),
        (["--steps", -1], "--steps=-1: must be positive"),
        (["--batch", 0], "--batch=0: must be positive"),
        (["--num", "many"], "argument --num: invalid int value: 'many'"),
        (["--steps", "ddim50"], "--steps=ddim50: rectified flow takes a number of steps; choose another"),
        (["--sampler", "ddim"], "--sampler=ddim: the model was trained with diffusion.name=rectified_flow; choose"),
        (["--eta", "0.5"], "--eta=0.5: the sampler euler has no eta; remove it"),
        (["--guidance-channels", "3"], "--guidance-channels=3: the model has model.channels=1; set"),
        (["--seed", -1], "--seed=-1: must lie in [0, 2**64)"),
        (["--format", "png,gif"], "--format='png,gif': is no such format; write png, npz, png,npz or features"),
        (["--labels", "all"], "invalid choice: 'all'"),
        (["--expert-parallel", 3], "parallel.expert_parallel=3: does not divide moe.num_experts=4; choose one of"),
        (["--expert-parallel", 2], "--expert-parallel=2: does not divide the 1 processes; change one of them"),
        (["--cfg", "1,,2"], "--cfg='1,,2': is not a list of numbers"),
        (["--cfg", "nan"], "--cfg='nan': has a scale that is negative or not finite"),
        (["--cfg=-1"], "--cfg='-1': has a scale that is negative"),
        (["--cfg", "1,1.0"], "--cfg='1,1.0': names a scale twice"),
        (["--device", "abacus"], "--device=abacus: is no device"),
        (["--device", "meta"], "--device=meta: is not supported"),
        (["--device", "cuda:99"], "--device=cuda:99: this machine offers"),
        (["--precision", "fp64"], "invalid choice: 'fp64'"),
        (["--run", "elsewhere"], "argument --run: not allowed with argument --model"),
        (["--depth", 3], "unrecognized arguments: --depth 3"),
    ],
)
def test_misuse_is_one_line(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list, message: str
) -> None:
    assert command("--model", write_run(tmp_path), "--out", tmp_path / "out", *words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_missing_or_damaged_weights(command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damaged, flipped = write_run(tmp_path / "run"), write_run(tmp_path / "flipped")
    damaged.write_bytes(damaged.read_bytes()[:1000])
    flipped.write_bytes(flipped.read_bytes()[:-1] + b"\x01")
    (tmp_path / "empty").mkdir()
    for words, message in (
        ([], "one of the arguments --run --model is required"),
        (["--run", tmp_path / "none"], "no such file or folder"),
        (["--run", tmp_path / "empty"], "holds no complete checkpoint"),
        (["--run", tmp_path / "run"], "is damaged: ema.safetensors has 1000 bytes"),
        (["--run", tmp_path / "flipped"], "is damaged: it does not match its checksum"),
        (["--model", damaged], "is damaged or no safetensors file"),
    ):
        assert command(*words) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_latent_models_need_their_codec(command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, other = write_run(tmp_path, channels=4), write_taef2(tmp_path / "taef2")
    (tmp_path / "codec.json").write_text(json.dumps(open_codec("identity").record()))
    for words, message in (
        ([], "model.channels=4: the model makes latents, not pixels; name the codec that decodes them with --vae"),
        (["--vae", "nowhere"], "--vae=nowhere: no such folder; put config.json and diffusion_pytorch_model"),
        (["--vae", other], "--vae: TAEF2 has latents of 32 channel(s), the model model.channels=4; name the codec"),
        (["--vae", tiny_kl(tmp_path / "kl")], "has kind=AutoencoderKL, the latents of"),
    ):
        assert command("--model", file, "--out", tmp_path / "out", *words) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error and error.count("\n") == 1
        assert not (tmp_path / "out").exists()


def test_latents_are_decoded(command: Command, tmp_path: Path) -> None:
    file, vae = write_run(tmp_path, channels=4), tiny_kl(tmp_path / "kl")
    codec = open_codec(str(vae))
    (tmp_path / "codec.json").write_text(json.dumps(codec.record()))
    words = ["--model", file, "--vae", vae, "--num", 5, "--cfg", 1]
    assert command(*words, "--out", tmp_path / "out") == 0
    images, labels = read_npz(tmp_path / "out/samples.npz")
    assert images.shape == (5, 16, 16, 3)
    model, config, _ = load_ema(file)
    noise = image_noise(0, np.arange(5), (4, 8, 8))
    predict = guided_prediction(model, torch.from_numpy(labels), 10, 1.0, torch.device("cpu"))
    with torch.no_grad():
        x = make_objective(config.diffusion).sample(predict, noise, lambda step: noise, 2, "euler")
        drawn = to_pixels(codec.decode(x / 0.18215))
    assert_same_images(images, drawn)
    record = json.loads((tmp_path / "out/sampling.json").read_text())
    assert record["vae"] == f"AutoencoderKL {codec.digest}"
    assert yaml.safe_load((tmp_path / "out/config.yaml").read_text())["model"]["channels"] == 4


def test_packs_without_pictures_are_resumed(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, out = write_run(tmp_path), tmp_path / "out"
    words = ["--model", file, "--num", 23, "--labels", "random"]
    assert command(*words, "--out", tmp_path / "whole") == 0
    write, batches = BatchStore.write, []

    def stop_after_two(self: BatchStore, indices: np.ndarray, images: np.ndarray) -> None:
        if len(batches) == 2:
            raise KeyboardInterrupt
        batches.append(indices)
        write(self, indices, images)

    with monkeypatch.context() as patch:
        patch.setattr(BatchStore, "write", stop_after_two)
        assert command(*words, "--format", "npz", "--out", out, "--batch", 4) == 85
    kept = {path: path.stat().st_mtime_ns for path in out.glob("made-*.npy")}
    assert len(kept) == 2 and not (out / "samples.npz").exists()
    made: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(BatchStore, "write", lambda self, i, x: (made.extend(i.tolist()), write(self, i, x)))
        assert command(*words, "--format", "npz", "--out", out, "--batch", 7) == 0
    assert made == list(range(8, 23))
    assert {path.name for path in out.iterdir()} == {"samples.npz", "grid.png", "sampling.json", "config.yaml"}
    whole, labels = read_npz(tmp_path / "whole/samples.npz")
    again, labels_again = read_npz(out / "samples.npz")
    assert_same_images(whole, again)
    np.testing.assert_array_equal(labels, labels_again)
    assert len(set(labels.tolist())) > 1 and labels.tolist() != (np.arange(23) % 10).tolist()
    time = (out / "samples.npz").stat().st_mtime_ns
    assert command(*words, "--format", "npz", "--out", out) == 0
    assert (out / "samples.npz").stat().st_mtime_ns == time  # nothing was left to do


def test_batches_are_handed_to_a_callback_new_and_old(command: Command, tmp_path: Path) -> None:
    file = write_run(tmp_path)
    assert command("--model", file, "--out", tmp_path / "out") == 0
    whole, labels = read_npz(tmp_path / "out/samples.npz")
    (tmp_path / "out/000003_class3.png").unlink()
    model, config, _ = load_ema(file)
    seen: dict[int, tuple[int, np.ndarray]] = {}

    def take(indices: np.ndarray, label: np.ndarray, images: np.ndarray) -> None:
        assert images.dtype == np.uint8 and len(indices) == len(label) == len(images) <= 5
        seen.update({int(i): (int(c), x) for i, c, x in zip(indices, label, images, strict=True)})

    job = Job(tmp_path / "out", 12, How(1.5, 2, batch=5))
    record = json.loads((tmp_path / "out/sampling.json").read_text())
    run_job(Sampler(model, config, torch.device("cpu"), on_images=take), job, record)
    assert sorted(seen) == list(range(12)) and [seen[i][0] for i in range(12)] == labels.tolist()
    assert_same_images(whole, np.stack([seen[i][1] for i in range(12)]))


def test_worker_comes_from_the_environment() -> None:
    assert worker_from({}) == Worker(0, 1, 0)
    assert worker_from({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}) == Worker(5, 8, 1)
    for environ, message in (
        ({"RANK": "2", "WORLD_SIZE": "2"}, "^RANK=2: .*not below WORLD_SIZE=2"),
        ({"WORLD_SIZE": "2"}, "^WORLD_SIZE=2: is set in the environment without RANK"),
        ({"RANK": "x"}, "^RANK='x': the environment variable is not a number"),
        ({"SLURM_STEP_NUM_TASKS": "4"}, "^environment SLURM_STEP_NUM_TASKS=4: each task would make everything"),
    ):
        with pytest.raises(ConfigError, match=message):
            worker_from(environ)


def test_help_ends_with_examples(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        command("--help")
    assert stopped.value.code == 0 and "launchers/sample.py --run runs/digits" in capsys.readouterr().out


def test_run_of_a_checkpoint(tmp_path: Path) -> None:
    assert run_of(write_run(tmp_path)) == tmp_path.resolve()
    assert run_of(tmp_path / "ema.safetensors") is None


def test_straight_to_features(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No pictures: the features of the folder are those of the pictures it would have held; a run cut short goes on."""
    run = write_run(tmp_path / "run")
    options = ["--run", str(run), "--num", "23", "--steps", "2", "--cfg", "1", "--batch", "5"]
    assert command(*options, "--format", "npz", "--out", str(tmp_path / "npz")) == 0
    features = [*options, "--format", "features", "--features", "digits-cnn", "--out", str(tmp_path / "features")]
    calls = []

    def cut(self: FeatureStore, indices: np.ndarray, images: np.ndarray) -> None:
        calls.append(indices)
        if len(calls) == 3:
            raise KeyboardInterrupt
        write(self, indices, images)

    write = FeatureStore.write
    monkeypatch.setattr(FeatureStore, "write", cut)
    assert command(*features) == 85
    monkeypatch.setattr(FeatureStore, "write", write)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "features").glob("made-*")}
    assert len(before) == 2
    assert command(*features) == 0
    assert {p.name for p in (tmp_path / "features").iterdir()} == {
        "features.safetensors", "sampling.json", "config.yaml", "grid.png",
    }  # fmt: skip
    found = load_samples(tmp_path / "features/features.safetensors")
    wanted = collect(DigitsCNN(), load_samples(tmp_path / "npz/samples.npz"))  # type: ignore[arg-type]
    assert isinstance(found, FeatureSet) and wanted is not None
    np.testing.assert_allclose(found.features_Nd, wanted.features_Nd, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found.gaussian.sigma_dd, wanted.gaussian.sigma_dd, rtol=1e-4, atol=1e-5)
    assert found.sha256 == wanted.sha256 and found.sampling["features"] == "digits-cnn"
    np.testing.assert_array_equal(found.labels_N, np.arange(23) % 10)
    stamp = (tmp_path / "features/features.safetensors").stat().st_mtime_ns
    assert command(*features) == 0 and (tmp_path / "features/features.safetensors").stat().st_mtime_ns == stamp
    assert command(*options, "--format", "npz", "--out", str(tmp_path / "features")) == 2  # other content


def test_formats_are_checked(command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run")
    assert command("--run", str(run), "--format", "png,features") == 2
    assert "--format='png,features': is no such format; write png, npz, png,npz or features" in capsys.readouterr().err
    features = ["--run", str(run), "--format", "features", "--features", "digits-cnn"]
    assert command(*features, "--num", "1") == 2
    assert "--num=1: features of one image have no covariance; choose 2" in capsys.readouterr().err
    assert command(*features[2:], "--run", str(write_run(tmp_path / "colour", channels=3))) == 2
    assert "--features=digits-cnn: takes images of [8, 8, 1] (H, W, C), the model makes [8, 8, 3]" in (
        capsys.readouterr().err
    )
    assert command("--run", str(run), "--format", "features", "--features", "resnet") == 2
    assert "--features=resnet: no such feature extractor" in capsys.readouterr().err


def test_a_run_folder_is_no_place_for_samples(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its config.yaml would be overwritten. A folder whose config.yaml was not reached gets it later."""
    run = tmp_path / "run"
    write_run(run)
    (run / "config.yaml").write_text("of the run")
    assert command("--run", str(run), "--out", str(run), "--num", "2", "--steps", "1") == 2
    assert "holds config.yaml but no sampling.json; name another folder" in capsys.readouterr().err
    assert (run / "config.yaml").read_text() == "of the run"
    options = ["--run", str(run), "--out", str(tmp_path / "out"), "--num", "2", "--steps", "1", "--format", "npz"]
    assert command(*options) == 0
    (tmp_path / "out/config.yaml").unlink()
    (tmp_path / "out/made-00000000.npy").write_bytes(b"of a process killed before it could clear")
    assert command(*options) == 0
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"samples.npz", "grid.png", "config.yaml", "sampling.json"}
