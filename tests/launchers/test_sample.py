"""launchers/sample.py: its words, its mistakes, several processes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from promoe_ds.data.codecs import open_codec
from tests.data.test_codecs import write_taef2
from tests.launch import run, torchrun
from tests.photographs import tiny_kl
from tests.sample_folder import LAUNCHER, Command, assert_same_images, read_npz, sample_command, start_two, write_run


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Command:
    return sample_command(monkeypatch)


def test_several_scales_get_a_folder_each(command: Command, tmp_path: Path) -> None:
    write_run(tmp_path)
    assert command("--run", tmp_path, "--cfg", "1,2.5", "--out", tmp_path / "out") == 0
    plain, _ = read_npz(tmp_path / "out/cfg1.0/samples.npz")
    guided, _ = read_npz(tmp_path / "out/cfg2.5/samples.npz")
    assert (plain != guided).any()
    assert command("--run", tmp_path, "--cfg", "1") == 0
    default, _ = read_npz(tmp_path / "samples/cfg1.0/samples.npz")
    np.testing.assert_array_equal(default, plain)


def test_help_ends_with_examples(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        command("--help")
    assert stopped.value.code == 0 and "launchers/sample.py --run runs/digits" in capsys.readouterr().out


def test_sampling_imports_no_deepspeed() -> None:
    code = (
        f"import runpy, sys; runpy.run_path({str(LAUNCHER)!r}); import promoe_ds.checkpoint.layout; "
        "sys.exit('deepspeed' in sys.modules)"
    )
    run([sys.executable, "-c", code])


# ---------------------------------------------------------------------------------------------------- several processes


def test_a_mistake_of_several_processes_is_one_line(tmp_path: Path) -> None:
    done = run(torchrun(2, LAUNCHER, "--model", str(tmp_path / "absent")), check=False)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode != 0 and len(errors) == 1 and "no such" in errors[0]


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


# ------------------------------------------------------------------------------------------------------------ bad input


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
        (["--features", "digits-cnn"], "--features=digits-cnn: --format png,npz makes no features; add"),
        (
            ["--format", "npz", "--inception-weights", "w"],
            "--inception-weights=w: --format npz makes no features; add --format features, or leave it out",
        ),
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
