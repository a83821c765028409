"""launchers/sample.py: its words, its mistakes, several processes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch._inductor.config as inductor

from promoe_ds.data.codecs import open_codec
from promoe_ds.models.compiled import compile_model
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


def test_the_number_of_forwards_is_told(command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", write_run(tmp_path), "--num", 2, "--steps", 4, "--cfg", "1,1.5"]
    assert command(*words, "--guidance-interval", "300,800", "--out", tmp_path / "out") == 0
    told = capsys.readouterr().out
    assert f"2 images at cfg 1.0 in {tmp_path / 'out/cfg1.0'}, 4 forwards per image\n" in told
    assert f"2 images at cfg 1.5 in {tmp_path / 'out/cfg1.5'}, 6 forwards per image\n" in told


def test_a_weaker_model_guides_and_is_recorded(command: Command, tmp_path: Path) -> None:
    file, weak = write_run(tmp_path / "run"), write_run(tmp_path / "weak", seed=1)
    words = ["--model", file, "--cfg", 3]
    for name, more in (("null", []), ("weak", ["--guidance-model", tmp_path / "weak"]), ("none", ["--cfg", 1])):
        assert command(*words, *more, "--out", tmp_path / name) == 0
    null, guided, none = (read_npz(tmp_path / name / "samples.npz")[0] for name in ("null", "weak", "none"))
    assert (guided != null).any() and (guided != none).any()
    found = json.loads((tmp_path / "weak/sampling.json").read_text())
    assert found["guidance_model"]["checkpoint"] == "checkpoints/step_00000007/ema.safetensors"
    assert found["guidance_model"]["checkpoint_blake2b"] != found["checkpoint_blake2b"]
    assert command(*words, "--guidance-model", file, "--out", tmp_path / "itself") == 0
    assert_same_images(read_npz(tmp_path / "itself/samples.npz")[0], none)
    assert command(*words, "--guidance-model", weak, "--out", tmp_path / "null") == 2


def test_compiled_models_draw_the_same(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs without a compiler behind them, which would take a minute: batches of 4 and 2, guided or not."""
    made = []

    def graphs(model: Any, frozen: bool) -> Any:
        made.append(compile_model(model, "aot_eager", frozen=frozen))
        assert inductor.freezing, "weights are constants of the graphs on a CPU"

    write_run(tmp_path)
    words = ("--run", tmp_path, "--num", 6, "--batch", 4, "--cfg", 3, "--guidance-interval", "300,700")
    words = (*words, "--guidance-model", tmp_path, "--steps", 4)
    assert command(*words, "--out", tmp_path / "plain") == 0
    monkeypatch.setattr("launchers.sample.compile_model", graphs)
    with inductor.patch(freezing=False):  # and afterwards as it was
        assert command(*words, "--out", tmp_path / "compiled", "--compile") == 0
    assert len(made) == 2
    plain, compiled = (read_npz(tmp_path / name / "samples.npz")[0].astype(int) for name in ("plain", "compiled"))
    assert abs(plain - compiled).max() <= 1 and plain.std() > 10


def test_a_compiler_is_needed_to_compile(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert command("--model", write_run(tmp_path), "--compile", "--device", "cpu", "--out", tmp_path / "out") == 2
    assert "--compile=true: on a CPU torch.compile calls a C++ compiler, and there is no" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_shift_that_is_asked_for_comes_before_the_runs_own(command: Command, tmp_path: Path) -> None:
    """Also where it is that of the training."""
    file = write_run(tmp_path)
    own = write_run(tmp_path / "own", sample={"shift": 3.0})
    for name, words in (
        ("trained", [file]),
        ("own", [own]),
        ("asked", [own, "--shift", 1]),
        ("three", [file, "--shift", 3]),
    ):
        assert command("--out", tmp_path / name, "--model", *words) == 0
    trained, run, asked, three = (
        read_npz(tmp_path / name / "samples.npz")[0] for name in ("trained", "own", "asked", "three")
    )
    assert (run != trained).any()
    np.testing.assert_array_equal(asked, trained)
    np.testing.assert_array_equal(three, run)
    shifts = [
        json.loads((tmp_path / name / "sampling.json").read_text())["shift"] for name in ("trained", "own", "asked")
    ]
    assert shifts == [None, 3.0, 1.0]


def test_a_folder_of_an_older_version_is_continued(command: Command, tmp_path: Path) -> None:
    """Its record lacks what could not be chosen then."""
    words = ["--model", write_run(tmp_path), "--out", tmp_path / "out"]
    assert command(*words) == 0
    record = tmp_path / "out/sampling.json"
    newer = ("guidance_interval", "guidance_model", "shift", "sde", "pixels", "protocol", "forwards_per_image")
    found = json.loads(record.read_text())
    record.write_text(json.dumps({key: value for key, value in found.items() if key not in newer}))
    assert command(*words) == 0
    assert command(*words, "--guidance-interval", "0,900") == 2 and command(*words, "--pixels", "repa") == 2


# ---------------------------------------------------------------------------------------------------- several processes


def test_a_mistake_of_several_processes_is_one_line(tmp_path: Path) -> None:
    done = run(torchrun(2, LAUNCHER, "--model", str(tmp_path / "absent")), check=False)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode != 0 and len(errors) == 1 and "no such" in errors[0]


def test_two_processes_make_the_images_of_one(command: Command, tmp_path: Path) -> None:
    """200 images, by batches of 7 and of 32."""
    file = write_run(tmp_path)
    words = ["--model", file, "--num", 200, "--steps", 2, "--cfg", "1,1.5", "--sampler", "sde", "--shift", 2]
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
    """Rank 0 has two batches to make, rank 1 only one: it must help with the other. Each holds the weaker one whole."""
    file, weak = write_run(tmp_path), write_run(tmp_path / "weak", seed=1)
    words = ["--model", file, "--num", 9, "--steps", 3, "--cfg", "1.5", "--batch", 4]
    words += ["--sampler", "sde", "--guidance-interval", "0,900", "--guidance-model", weak]
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
        (
            ["--guidance-interval", "900,100"],
            "--guidance-interval=[900,100]: is not [lo, hi] with 0 <= lo <= hi <= 1000",
        ),
        (["--guidance-interval", "0,1001"], "--guidance-interval=[0,1001]: is not [lo, hi]"),
        (["--guidance-interval", "nan,5"], "--guidance-interval=[nan,5]: is not [lo, hi]"),
        (["--guidance-interval", "500"], "--guidance-interval=[500]: is not [lo, hi]"),
        (["--guidance-interval", "low,high"], "--guidance-interval='low,high': is not two numbers; write for example"),
        (["--guidance-interval", "1,9", "--cfg", "1"], "--guidance-interval=1,9: guides nothing at scale 1; add --cfg"),
        (["--guidance-model", "weak", "--cfg", "1"], "--guidance-model=weak: guides nothing at scale 1; add --cfg"),
        (["--guidance-model", "nowhere"], "--guidance-model=nowhere: no such file or folder"),
        (["--shift", "0"], "--shift=0.0: must lie in [0.001, 1000)"),
        (
            ["--last-step", "mean"],
            "--sampler=euler: has no diffusion and no last step, which belong to the sampler sde",
        ),
        (["--sampler", "sde", "--last-step", "two"], "--last-step=two: is not known; choose mean, euler"),
        (["--sampler", "sde", "--diffusion-norm=-1"], "--diffusion-norm=-1.0: is negative"),
        (["--sampler", "sde", "--last-step-size", "2"], "--last-step-size=2.0: does not lie in (0, 1)"),
        (["--sampler", "sde", "--steps", 1], "--steps=1: a last step needs a step before it; choose another number"),
        (["--pixels", "round"], "--pixels='round': must be one of adm, repa; choose a known one"),
        (["--seed", -1], "--seed=-1: must lie in [0, 2**64)"),
        (["--features", "digits-cnn"], "--features=digits-cnn: --format png,npz makes no features; add"),
        (
            ["--format", "npz", "--inception-weights", "w"],
            "--inception-weights=w: --format npz makes no features; add --format features, or leave it out",
        ),
        (["--format", "png,gif"], "--format='png,gif': is no such format; write png, npz, png,npz or features"),
        (["--labels", "all"], "--labels='all': must be one of balanced, random; choose"),
        (["--expert-parallel", 3], "parallel.expert_parallel=3: does not divide moe.num_experts=4; choose one of"),
        (["--expert-parallel", 2], "--expert-parallel=2: does not divide the 1 processes; change one of them"),
        (["--cfg", "1,,2"], "--cfg='1,,2': is not a list of numbers"),
        (["--cfg", "nan"], "--cfg='nan': has a scale that is negative or not finite"),
        (["--cfg=-1"], "--cfg='-1': has a scale that is negative"),
        (["--cfg", "1,1.0"], "--cfg='1,1.0': names a scale twice"),
        (["--device", "abacus"], "--device=abacus: is no device"),
        (["--device", "cpu:3"], "--device=cpu:3: is no device"),
        (["--device", "meta"], "--device=meta: is not supported"),
        (["--device", "cuda:99"], "--device=cuda:99: this machine offers"),
        (["--precision", "fp64"], "--precision='fp64': must be one of fp32, bf16; did you mean 'fp32'?"),
        (["--smapler", "heun"], "unrecognized arguments: --smapler heun; did you mean '--sampler'?"),
        (["--cfgs=2"], "unrecognized arguments: --cfgs=2; did you mean '--cfg'?"),
        (["heun"], "unrecognized arguments: heun; see --help"),
        ([""], "unrecognized arguments: ; see --help"),
        (
            ["--sampler", "hein"],
            "--sampler=hein: the model was trained with diffusion.name=rectified_flow; did you mean",
        ),
        (["--sampler", "sde", "--diffusion", "sigm"], "--diffusion=sigm: is not known; did you mean 'sigma'?"),
        (["--sampler", "sde", "--last-step", "men"], "--last-step=men: is not known; did you mean 'mean'?"),
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


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"channels": 3}, "has model.channels=3, the model that it is to guide has 1; name a weaker model of the same"),
        ({"classes": 7}, "has model.num_classes=7, the model that it is to guide has 10"),
        ({"objective": "ddpm"}, "has diffusion.name=ddpm, the model that it is to guide has rectified_flow"),
    ],
)
def test_a_model_that_cannot_guide_is_refused(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str], other: dict, message: str
) -> None:
    file, weak = write_run(tmp_path / "run"), write_run(tmp_path / "weak", **other)
    assert command("--model", file, "--out", tmp_path / "out", "--guidance-model", weak) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: --guidance-model={weak}: {message}") and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_an_sde_for_a_ddpm_is_refused(command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_run(tmp_path, objective="ddpm")
    for words, message in (
        (["--sampler", "sde"], "--sampler=sde: the model was trained with diffusion.name=ddpm; choose ddpm or ddim"),
        (
            ["--diffusion", "sigma"],
            "--sampler=ddpm: has no diffusion and no last step, which belong to the sampler sde",
        ),
    ):
        assert command("--model", file, "--out", tmp_path / "out", *words) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


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


class Whole(torch.nn.Module):
    """A network that gives no floats."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3)).long()


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_network_is_tried_before_anything_is_drawn(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.jit.save(torch.jit.script(Whole()), tmp_path / "net.pt")
    run, out = write_run(tmp_path / "run"), tmp_path / "out"
    words = ["--model", run, "--format", "features", "--features", tmp_path / "net.pt", "--out", out]
    assert command(*words) == command(*words, "--dry-run") == 2
    error = f"error: --features={tmp_path}/net.pt: gives int64 [1, 1] for 1 images; its first output must be float"
    assert capsys.readouterr().err.count(error) == 2 and not out.exists()


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
