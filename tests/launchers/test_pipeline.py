from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from benchmarks.processes import PATIENCE, wait_until
from launchers import pipeline as launcher
from promoe_ds.checkpoint.layout import newest
from promoe_ds.config.decode import dump
from promoe_ds.data.caches import open_latents
from promoe_ds.data.codecs import TAEF2_FILES, open_codec
from promoe_ds.data.images import open_images
from promoe_ds.evaluation.metrics import frechet_distance, gaussian_statistics
from promoe_ds.recipes.load import load_config
from promoe_ds.sampling.generate import image_noise, to_pixels
from tests.checkpoint.state import save
from tests.data.test_codecs import PACKS
from tests.launch import ENVIRONMENT, ROOT, deepspeed, start_child
from tests.photographs import psnr, tiny_kl, write_tree

Pipeline = Callable[..., tuple[int, str, str]]
TINY = {
    "base": "tiny",
    "model": {"depth": 2, "image_size": 8, "channels": 4, "num_classes": 2},
    "moe": {"num_experts": 4},
    "data": {"name": "latents", "hflip": True},
    "train": {"steps": 4, "global_batch_size": 8, "checkpoint_every": 4},
    "sample": {"steps": 2, "cfg": 1.0, "per_class": 2},
}


IN_STEP = ["--vae=identity", "imagenet256_promoe_b", "data.name=images", "data.path=i"]


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Pipeline:
    """Runs the launcher in this process, those it starts in theirs; returns exit code, output, errors."""
    for key in ("OMP_NUM_THREADS", "DS_ACCELERATOR", "PYTHONPATH"):
        monkeypatch.setenv(key, ENVIRONMENT[key])

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["pipeline.py", *map(str, words)])
        return launcher.main(), *capfd.readouterr()

    return call


@pytest.fixture
def forking(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> Pipeline:
    """The launchers that it starts have their imports."""
    monkeypatch.setattr(launcher, "Popen", start_child)
    return pipeline


def test_a_dry_run_prints_the_commands(pipeline: Pipeline) -> None:
    words = ["imagenet256_promoe_b", "--images", "train", "--vae", "vae", "--processes", 8, "--ds_config", "z.json"]
    more = ["--ref", "ref.npz", "--inception-weights", "pt.pth", "--dry-run", "parallel.expert_parallel=4"]
    code, text, _ = pipeline(*words, *more)
    lines = text.splitlines()
    assert code == 0 and [line.split("]")[0] for line in lines] == ["[1 encode", "[2 train", "[3 sample", "[4 evaluate"]
    assert "--nproc-per-node=8 -- " in lines[0]
    assert "--images train --size 256 --out runs/imagenet256_promoe_b/latents" in lines[0]
    assert "--ds_config z.json data.path=runs/imagenet256_promoe_b/latents parallel.expert_parallel=4" in lines[1]
    assert "--num 50000 --cfg 1.0,1.5 --steps 250 --batch 64 --format npz --vae vae" in lines[2]
    assert lines[3].endswith("evaluate.py --run runs/imagenet256_promoe_b --ref ref.npz --inception-weights pt.pth")
    code, text, _ = pipeline("digits", "--until", "train", "--dry-run", "--run", "nowhere")
    assert code == 0 and text.count("\n") == 1 and text.endswith("train.py --config digits --run nowhere\n")


def test_images_that_the_step_encodes_need_no_stage(pipeline: Pipeline) -> None:
    words = ["imagenet256_promoe_b", "data.name=images", "--images", "train", "--vae", "vae", "--until", "sample"]
    code, text, _ = pipeline(*words, "--dry-run")
    lines = text.splitlines()
    assert code == 0 and [line.split("]")[0] for line in lines] == ["[1 train", "[2 sample"]
    assert lines[0].endswith(" data.path=train data.vae=vae data.name=images") and lines[1].endswith("--vae vae")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["imagenet256_promoe_b"], "--vae=(none): imagenet256_promoe_b trains on latents; add --vae DIR, and --images"),
        (["imagenet256_promoe_b", "--vae", "v"], "--images=(none): imagenet256_promoe_b trains on latents; add --vae"),
        (["imagenet256_promoe_b", "--vae", "v", "--images", "i"], "--vae=v: no such folder; put config.json and"),
        (["imagenet256_promoe_b", "--vae", "identity", "--latents", "l"], "--latents=l: does not exist, and no images"),
        (["digits", "--vae", "v"], "--vae=v: data.name=digits has no latents; remove it"),
        (IN_STEP[:3], "--images=(none): there is nothing to encode in the step; add --images PATH"),
        ([*IN_STEP[1:], "--images", "i"], "--vae=(none): pixels are trained on with data.path=PATH; add --vae DIR"),
        ([*IN_STEP, "--latents", "l"], "--latents=l: data.name=images has no latents; remove it"),
        ([*IN_STEP, "--vae", "v"], "--vae=v: no such folder; put config.json and"),
        (
            [*IN_STEP, "--size", "64"],
            "--size=64: model.image_size=32 cells of 1 pixels are 32; set model.image_size=64",
        ),
        (["digits", "--ref", "none.npz"], "--ref=none.npz: no such file; it would be missed only later"),
        (["digits", "--inception-weights", "w"], "--inception-weights=w: no such file"),
        (["digits", "--cfg", "one"], "--cfg='one': is not a list of numbers"),
        (["digits", "--num", "0"], "--num=0: must be positive"),
        (["digits", "--batch", "0"], "--batch=0: must be positive"),
        (["digits", "--cfg", "1,1"], "--cfg='1,1': names a scale twice"),
        (["digits", "--steps", "many"], "--steps=many: "),
        (["digits", "--features", "my.onnx"], "--features=my.onnx: no such file"),
        (["digits", "train.score_every=5", "train.score_ref=a/b"], "train.score_ref=a/b: no such file"),
        (["digits", "train.score_every=5", "train.score_features=n.onnx"], "train.score_features=n.onnx: no such file"),
        (["digits", "--ref", "."], "the Inception weights are not there"),
        (["imagenet256_promoe_b", "--vae", "identity", "--images", "."], "--ref=(none): imagenet256_promoe_b is not"),
        (
            ["imagenet256_promoe_b", "--vae", "identity", "--images", "i"],
            "--images=i: does not exist; name a folder per",
        ),
        (IN_STEP, "data.path=i: does not exist; name a folder per class"),
        (["digits", "train.init=nowhere"], "train.init=nowhere: no such file or folder; name a run folder"),
        (["digits", "guidance.model=nowhere"], "guidance.model=nowhere: no such file or folder; name a run folder"),
        (["digits_classification", "moe.router.superclasses=no.yaml"], "moe.router.superclasses=no.yaml: is no file"),
        (["digit"], "did you mean 'digits'?"),
        (["digits", "--ds_config", "no.json"], "--ds_config=no.json: cannot be read"),
        (["digits", "--processes", "3"], "train.global_batch_size=128: "),
        (["digits", "parallel.expert_parallel=2"], "parallel.expert_parallel=2: does not divide the world size 1"),
    ],
)
def test_what_is_missing_is_told_before_any_work(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.setenv("INCEPTION_WEIGHTS", "none.pth")
    for more in ([], ["--dry-run", "--check-files"]):
        code, text, error = pipeline(*words, *more)
        assert code == 2 and text == "" and message in error and error.startswith("error: ") and error.count("\n") == 1


def test_files_are_looked_at_by_a_start_or_where_it_is_asked_for(pipeline: Pipeline) -> None:
    code, text, error = pipeline("digits", "--check-files")
    assert code == 2 and text == "" and "--check-files is for --dry-run" in error and error.count("\n") == 1
    code, text, _ = pipeline("digits", "--dry-run", "--check-files", "--run", "nowhere")
    assert code == 0 and text.count("\n") == 3


def test_a_device_that_deepspeed_would_not_find_is_told(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "foo")
    code, text, error = pipeline("digits")
    assert code == 2 and text == "" and error.startswith("error: environment DS_ACCELERATOR='foo': is neither cpu nor")


def test_a_run_of_another_configuration_is_not_taken_for_done(pipeline: Pipeline, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(dump(load_config("tiny")))
    save(tmp_path, 20)
    assert pipeline("tiny", "--run", tmp_path, "--until", "train")[1].startswith("[1 train: done] ")
    for key, value in (("eps", "1.0"), ("lr", "1.0")):
        code, text, error = pipeline("tiny", "--run", tmp_path, "--until", "train", f"optimizer.{key}={value}")
        assert code == 2 and text == "" and error.startswith(f"error: optimizer.{key}=1.0: ") and error.count("\n") == 1


def test_a_damaged_checkpoint_is_told_before_any_work(pipeline: Pipeline, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(dump(load_config("tiny")))
    save(tmp_path, 20)
    file = next(tmp_path.glob("checkpoints/*/*.safetensors"))
    file.write_bytes(file.read_bytes()[:100])
    for more in ([], ["--dry-run", "--check-files"]):
        code, text, error = pipeline("tiny", "--run", tmp_path, *more)
        assert code == 2 and text == "" and "is damaged: " in error and file.name in error


def test_a_trained_run_needs_its_images_no_more(pipeline: Pipeline, tmp_path: Path) -> None:
    images = ["tiny", "data.name=images", "data.path=gone", "model.channels=3"]
    (tmp_path / "config.yaml").write_text(dump(load_config("tiny", images[1:])))
    save(tmp_path, 20, load_config("tiny", images[1:]))
    assert pipeline(*images, "--run", tmp_path, "--until", "train")[1].startswith("[1 train: done] ")
    code, _, error = pipeline(*images, "train.steps=21", "--run", tmp_path, "--until", "train")
    assert code == 2 and "data.path=gone: does not exist" in error


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 85), (signal.SIGINT, 130)])
def test_a_stop_lets_the_training_save(tmp_path: Path, number: signal.Signals, code: int) -> None:
    """A scheduler's reaches the pipeline alone, Ctrl-C the whole process group."""
    command = [sys.executable, "launchers/pipeline.py", "tiny", "--run", str(tmp_path / "run"), "train.steps=1000000"]
    words = ["train.checkpoint_every=1000000", "train.log_every=10"]
    process = subprocess.Popen([*command, *words], cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, start_new_session=True)  # fmt: skip
    assert process.stdout is not None
    assert any(line.startswith("step ") for line in process.stdout)
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
    out, errors = process.communicate(timeout=PATIENCE)
    assert "stopped by a signal at step" in out and errors.endswith("stopped; run the same command again\n")
    assert "Traceback" not in errors and process.returncode == code and (tmp_path / "run" / "requeue").is_file()
    assert newest(tmp_path / "run") is not None


def children(pid: int, command: str = ".") -> list[int]:
    """Processes that this one started, whose command line has `command` in it."""
    found = subprocess.run(["pgrep", "-P", str(pid), "-f", command], capture_output=True)
    return [int(pid) for pid in found.stdout.split()]


def test_a_launcher_that_died_is_not_taken_for_success(
    pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The deepspeed command ends with 0 when its launch.py is killed, and its ranks go on."""
    run, endless, ranks = tmp_path / "run", "train.steps=1000000", []
    words = ["--config", "tiny", "--run", str(run), endless, "train.log_every=1"]
    monkeypatch.setattr(launcher.Stage, "command", lambda *_: deepspeed(2, "launchers/train.py", *words))

    def kill() -> None:
        while not (run / "metrics.jsonl").exists() or not (run / "metrics.jsonl").stat().st_size:
            time.sleep(0.1)
        (command,) = children(os.getpid(), "deepspeed")
        (launch,) = children(command)
        ranks.extend(children(launch))
        os.kill(launch, signal.SIGKILL)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    code, _, errors = pipeline("tiny", "--run", run, "--until", "train", endless)
    killer.join()
    assert len(ranks) == 2
    os.kill(ranks[0], signal.SIGTERM)
    wait_until((run / "requeue").exists, what=lambda: "the ranks had gone on")
    assert code == 1 and "stopped: train ended with exit code 0, without its result" in errors


def test_photographs_to_samples_and_nothing_twice(forking: Pipeline, tmp_path: Path) -> None:
    """Two real photographs in crops, a small autoencoder with random weights, a tiny ProMoE: every stage, for real."""
    tree, vae, recipe = write_tree(tmp_path / "tree", 8, 24), tiny_kl(tmp_path / "vae"), tmp_path / "mine.yaml"
    recipe.write_text(yaml.safe_dump(TINY | {"data": TINY["data"] | {"vae": str(vae)}}))  # type: ignore[operator]
    work = tmp_path / "run"
    words = [recipe, "--images", tree, "--size", 16, "--vae", vae, "--run", work, "--num", 6, "--cfg", "1.0,1.5"]
    words += ["--steps", 2, "--until", "sample"]
    code, text, errors = forking(*words)
    assert code == 0, errors
    assert "16 items of 2 classes, 2 x 8x8x8 each (AutoencoderKL, mean and log-variance, scale 0.18215)" in text
    assert "done: 4 steps" in text and "6 images at cfg 1.5" in text and "no sample grid" not in text
    assert (work / "samples/grid.png").exists()  # drawn while training, decoded
    codec = json.loads((work / "codec.json").read_text())
    assert codec == open_codec(str(vae)).record() == json.loads((work / "latents/index.json").read_text())["codec"]
    with np.load(work / "samples/cfg1.0/samples.npz", allow_pickle=False) as pack:
        assert pack["arr_0"].shape == (6, 16, 16, 3) and pack["arr_1"].tolist() == [0, 1] * 3
    code, text, _ = forking(*words)
    assert code == 0 and [line.split("]")[0] for line in text.splitlines()] == [
        "[1 encode: done", "[2 train: done", "[3 sample: done"]  # fmt: skip
    code, text, _ = forking(*words, "--dry-run", "--steps", 3)
    assert text.splitlines()[2].startswith("[3 sample] ")
    code, text, _ = forking(*words, "--dry-run", "train.steps=8")  # what depends on more training is not done
    assert [line.split("]")[0] for line in text.splitlines()] == ["[1 encode: done", "[2 train", "[3 sample"]
    assert forking(*words, "--dry-run", "--size", 32)[1].startswith("[1 encode] ")
    for file in (next((work / "latents").glob("shard-*")), work / "latents/items.safetensors"):
        whole = file.read_bytes()
        file.unlink()
        assert forking(*words, "--dry-run")[1].startswith("[1 encode] "), file
        file.write_bytes(whole[:-1])
        assert forking(*words, "--dry-run")[1].startswith("[1 encode] ") == file.name.startswith("shard"), file
        file.write_bytes(whole)
    assert forking(*words, "--dry-run")[1].startswith("[1 encode: done] ")


def test_photographs_to_samples_without_a_cache(forking: Pipeline, tmp_path: Path) -> None:
    tree, vae, recipe = write_tree(tmp_path / "tree", 8, 24), tiny_kl(tmp_path / "vae"), tmp_path / "mine.yaml"
    recipe.write_text(yaml.safe_dump(TINY | {"data": {"name": "images", "hflip": True}}))
    work = tmp_path / "run"
    words = [recipe, "--images", tree, "--vae", vae, "--run", work, "--num", 4, "--cfg", "1.0", "--steps", 2]
    assert "--size=15: is not divisible by the 2 pixels of a latent cell" in forking(*words, "--size", 15)[2]
    code, text, errors = forking(*words, "--size", 16, "--until", "sample")
    assert code == 0, errors
    assert "pictures of 16x16 pixels become 4x8x8 latents in the step, by AutoencoderKL" in text
    assert "done: 4 steps" in text and not (work / "latents").exists()
    with np.load(work / "samples/cfg1.0/samples.npz", allow_pickle=False) as pack:
        assert pack["arr_0"].shape == (4, 16, 16, 3)


# ----------------------------------------------------------------------------------------------------------- real data


def subset(pack: Path, out: Path, classes: int, each: int) -> Path:
    """The first `each` training images of the first `classes` classes of a pack, as another pack."""
    with np.load(pack, allow_pickle=False) as archive:
        label, offset, jpeg = archive["train_labels"], archive["train_offsets"].astype(np.int64), archive["train_jpeg"]
        names = archive["classes"][:classes]
    chosen = np.concatenate([np.flatnonzero(label == c)[:each] for c in range(classes)])
    parts = [jpeg[offset[i] : offset[i + 1]] for i in chosen]
    ends = np.cumsum([0, *(len(part) for part in parts)])
    np.savez(out, classes=names, train_jpeg=np.concatenate(parts), train_offsets=ends, train_labels=label[chosen])
    return out


def colours(images_NHWC: np.ndarray) -> np.ndarray:
    """Mean colours of the four quarters: float64 [N, 12]. Real features of little worth, good for telling noise."""
    n, side, _, _ = images_NHWC.shape
    return images_NHWC.reshape(n, 2, side // 2, 2, side // 2, 3).mean((2, 4)).reshape(n, 12)


def fd(a: np.ndarray, b: np.ndarray) -> float:
    return float(frechet_distance(*gaussian_statistics(colours(a)), *gaussian_statistics(colours(b))))


def test_tiny_imagenet_through_taef2(forking: Pipeline, tmp_path: Path) -> None:
    """Must hold: round trips of 28 dB at 128 pixels; samples of a model trained for a minute beat decoded noise."""
    pack = PACKS / "tinyimagenet50_jpeg.npz"
    if not (pack.is_file() and (PACKS / TAEF2_FILES[0]).is_file()):
        pytest.skip(f"{pack} or {TAEF2_FILES[0]} beside it is absent (set PROMOE_DS_DATA to their folder)")
    images, vae, work = subset(pack, tmp_path / "subset.npz", 3, 15), tmp_path / "vae", tmp_path / "run"
    vae.mkdir()
    for name in TAEF2_FILES:
        (vae / name).symlink_to(PACKS / name)
    recipe = tmp_path / "taef2.yaml"
    model = {"depth": 4, "width": 64, "heads": 4, "image_size": 16, "channels": 32, "num_classes": 3}
    train = {"steps": 150, "global_batch_size": 16, "log_every": 50, "checkpoint_every": 150}
    tree = TINY | {"model": model, "train": train, "optimizer": {"lr": 2e-3, "ema_decay": 0.95}}
    recipe.write_text(yaml.safe_dump(tree))
    words = [recipe, "--images", images, "--size", 128, "--vae", vae, "--run", work, "--num", 18, "--cfg", "1.0"]
    code, _, errors = forking(*words, "--steps", 20, "--batch", 9, "--until", "sample")
    assert code == 0, errors
    codec, data = open_codec(str(vae)), open_latents(str(work / "latents"))
    assert len(data) == 45 and (data.channels, data.image_size) == (32, 16)
    chosen = np.arange(0, 45, 2)
    x, _ = open_images(str(images), split="train", channels=3, image_size=128).get(chosen)
    with torch.inference_mode():
        restored = codec.to_pixels(data.get(chosen)[0]).clamp(-1, 1)
        noise = to_pixels(codec.to_pixels(image_noise(0, np.arange(18), (32, 16, 16))))
    quality = float(psnr(x, restored).mean())
    with np.load(work / "samples/cfg1.0/samples.npz", allow_pickle=False) as archive:
        samples = archive["arr_0"]
    scores = {"samples": fd(samples, to_pixels(x)), "noise": fd(noise, to_pixels(x))}
    print(f"round trip {quality:.2f} dB; FD[quarter-colours] {scores}")
    assert quality >= 28
    assert samples.shape == (18, 128, 128, 3) and scores["samples"] < 0.6 * scores["noise"]
