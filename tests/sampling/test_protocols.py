"""Presets against the projects they are named after: small checkpoints in their own formats, drawn by their own code.

`golden_protocols.npz` holds what that code makes of `checkpoint(name)`, labels and noise below, by the defaults or the
documented command of the source that the preset names: ProMoE's loop with diffusers' scheduler, DiT's `p_sample_loop`,
SiT's `sample_sde`, REPA's `euler_maruyama_sampler`, LightningDiT's `sample_ode` with torchdiffeq 0.2.5. Its random
numbers were replaced by those of `image_noise`, in the order in which it asks for them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from launchers import sample
from promoe_ds.formats.importing import import_checkpoint
from promoe_ds.formats.official import to_official
from promoe_ds.models.dit import DiT
from promoe_ds.models.init import build
from promoe_ds.recipes.load import load_config
from promoe_ds.sampling.generate import class_labels, draw_batches, to_pixels
from promoe_ds.sampling.protocols import PROTOCOLS
from promoe_ds.utils.philox import philox
from tests.sample_folder import Command, read_npz, sample_command, write_run

GOLDEN = Path(__file__).with_name("golden_protocols.npz")
SEED, IMAGES, CLASSES = 3, 3, 1000  # all of these projects write 1000 for "no class", ProMoE in its router too
SIZES = ["model.depth=2", "model.width=32", "model.heads=2", "model.image_size=8", f"model.num_classes={CLASSES}"]
DENSE = ["moe=null", *SIZES]
MODELS: dict[str, tuple[str, list[str]]] = {
    "promoe": ("promoe", [*SIZES, "moe.num_experts=4"]),
    "dit": ("ddpm", [*DENSE, "diffusion.name=ddpm"]),
    "sit": ("sit", [*DENSE, "model.time=1-sigma"]),
    "repa": ("repa", [*DENSE, "model.time=sigma", "model.learn_sigma=false"]),
    "lightningdit": ("sit", [*DENSE, "model.time=1-sigma", "model.learn_sigma=false"]),
}
"""preset -> (convention of its checkpoints, the model)"""


def state(name: str) -> dict[str, Tensor]:
    """A checkpoint's tensors, by the names of the project's own code."""
    config = load_config("imagenet256", MODELS[name][1])
    made = to_official(dict(build(config).state_dict()), config)
    return {
        key: torch.from_numpy(0.1 * philox(0, i, 0, 0).standard_normal(tuple(made[key].shape), dtype=np.float32))
        for i, key in enumerate(sorted(made))
    }


def imported(name: str, folder: Path) -> DiT:
    """Our model, by way of a file of theirs."""
    tensors: dict[str, Any] = state(name)
    file, convention = folder / f"{name}.pth", MODELS[name][0]
    torch.save({"ema_model_state_dict": tensors, "step": 1} if name == "promoe" else {"ema": tensors}, file)
    weights = import_checkpoint(file, convention=convention, overrides=["model.heads=2"])
    model = build(weights.config)
    model.load_state_dict(weights.tensors, assign=True)
    return model.eval().requires_grad_(False)


def drawn(name: str, model: DiT, *words: str) -> Tensor:
    """The first images, as the launcher would draw them with `--protocol`."""
    args = sample.parser().parse_args(["--model", "x", "--protocol", name, "--seed", str(SEED), *words])
    how, _ = sample.settle(args, model.config)
    options = sample.choose_hows(args, model.config, how)[-1]
    labels, device = class_labels(IMAGES, CLASSES, how["labels"], SEED), torch.device("cpu")
    ((_, x),) = draw_batches(model, model.config, labels, np.arange(IMAGES), options, device)
    return x


@pytest.mark.parametrize("name", PROTOCOLS)
def test_images_are_those_of_the_projects_own_code(name: str, tmp_path: Path) -> None:
    with np.load(GOLDEN) as golden:
        theirs = torch.from_numpy(golden[name])
    scale = theirs.std()  # random weights remove no noise, so that a DDPM's images grow to some hundreds
    assert theirs.shape == (IMAGES, 4, 8, 8) and 0.5 < scale < 1000
    torch.testing.assert_close(drawn(name, imported(name, tmp_path)) / scale, theirs / scale, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_every_part_of_a_preset_matters(tmp_path: Path) -> None:
    """The comparison above would notice another one."""
    with np.load(GOLDEN) as golden:
        theirs = {name: torch.from_numpy(golden[name]) for name in golden.files}
    for name, words in (
        ("lightningdit", ["--shift", "1"]),
        ("lightningdit", ["--steps", "250"]),
        ("lightningdit", ["--guidance-interval", "0,1000"]),
        ("repa", ["--guidance-interval", "0,1000", "--steps", "30"]),
        ("sit", ["--last-step", "euler"]),
        ("sit", ["--guidance-channels", "all"]),
        ("promoe", ["--steps", "200"]),
    ):
        other = drawn(name, imported(name, tmp_path), *words)
        assert float((other - theirs[name]).abs().max()) > 3e-4, (name, words)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Command:
    return sample_command(monkeypatch)


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "sampling.json").read_text())


def test_the_record_tells_the_protocol_and_what_was_changed(command: Command, tmp_path: Path) -> None:
    file = write_run(tmp_path, channels=3)
    assert command("--model", file, "--out", tmp_path / "out", "--protocol", "repa", "--steps", 4) == 0
    found = record(tmp_path / "out")
    assert found["protocol"] == {
        "name": "repa",
        "source": "sihyun-yu/REPA generate.py, samplers.py, README.md @67f7145",
        "vae": "sd-vae-ft-ema",
        "reference": "VIRTUAL_imagenet256_labeled.npz",
        "metric": "FID, sFID, IS, precision, recall (ADM)",
        "changed": {"num": 12, "steps": 4, "cfg": [1.5]},
    }
    assert (found["sampler"], found["labels"], found["pixels"]) == ("sde", "random", "repa")
    assert found["guidance_interval"] == [0, 700] and found["forwards_per_image"] == 4 + 3
    assert found["sde"] == {"diffusion": "sigma", "diffusion_norm": 1.0, "last_step": "mean", "last_step_size": 0.04}
    again = ["--sampler", "sde", "--labels", "random", "--guidance-interval", "0,700", "--pixels", "repa"]
    assert command("--model", file, "--out", tmp_path / "words", *again, "--steps", 4) == 0
    for one, two in zip(*(read_npz(tmp_path / name / "samples.npz") for name in ("out", "words")), strict=True):
        np.testing.assert_array_equal(one, two)


def test_another_sampler_leaves_the_presets_sde_behind(command: Command, tmp_path: Path) -> None:
    file = write_run(tmp_path, channels=3)
    assert command("--model", file, "--out", tmp_path / "out", "--protocol", "sit", "--sampler", "heun") == 0
    found = record(tmp_path / "out")
    assert (
        found["sde"] is None and found["guidance_channels"] == 3 and found["protocol"]["changed"]["sampler"] == "heun"
    )


def test_pixels_of_repa_are_half_a_level_darker() -> None:
    x = torch.linspace(-1.1, 1.1, 500).view(1, 1, 1, -1)
    expected = torch.clamp(255.0 * ((x + 1) / 2.0), 0, 255).to(torch.uint8).view(-1)
    assert to_pixels(x, "repa").reshape(-1).tolist() == expected.tolist()
    darker = to_pixels(x).reshape(-1).astype(int) - to_pixels(x, "repa").reshape(-1)
    assert set(darker) == {0, 1} and 0.4 < darker.mean() < 0.5


@pytest.mark.parametrize(
    ("objective", "channels", "words", "message"),
    [
        ("ddpm", 3, ["--protocol", "sit"], "--protocol=sit: it draws from rectified_flow, the model was trained with"),
        ("ddpm", 3, ["--protocol", "promoe"], "diffusion.name=ddpm; choose dit"),
        ("rectified_flow", 3, ["--protocol", "dit"], "choose promoe or sit or repa or lightningdit"),
        ("rectified_flow", 1, ["--protocol", "sit"], "--protocol=sit: it guides 3 channels, the model has"),
        ("rectified_flow", 3, ["--protocol", "edm2"], "--protocol=edm2: its sampler steps from noise level 80 down"),
        ("rectified_flow", 3, ["--protocol", "sit", "--eta", "0.5"], "--eta=0.5: the sampler sde has no eta"),
        ("ddpm", 3, ["--protocol", "dit", "--shift", "3"], "--shift=3.0: the sampler ddpm has no noise levels"),
        ("rectified_flow", 3, ["--protocol", "promoe", "--last-step", "euler"],
         "--sampler=euler: has no diffusion and no last step, which belong to the sampler sde; remove them, or add"),
        ("rectified_flow", 3, ["--protocol", "sit", "--diffusion", "SBDM"],
         "--diffusion=SBDM: is sigma / (1 - sigma), infinite where a straight path begins; choose sigma, linear"),
        ("rectified_flow", 3, ["--protocol", "adm"], "--protocol='adm': must be one of promoe, dit, sit"),
        ("rectified_flow", 3, ["--protocol", "prome"], "edm2; did you mean 'promoe'?"),
    ],
)  # fmt: skip
def test_presets_that_cannot_be(
    command: Command,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    objective: str,
    channels: int,
    words: list[str],
    message: str,
) -> None:
    file = write_run(tmp_path, channels=channels, objective=objective)
    assert command("--model", file, "--out", tmp_path / "out", *words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_three_channels_may_be_overridden(command: Command, tmp_path: Path) -> None:
    file = write_run(tmp_path, channels=1)
    assert command("--model", file, "--out", tmp_path / "out", "--protocol", "sit", "--guidance-channels", "all") == 0
