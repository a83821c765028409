"""The diffusers folder in a fresh process that knows nothing of this project, against our sampler."""

from __future__ import annotations

import ast
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor

import promoe_ds
from promoe_ds.checkpoint.layout import damage
from promoe_ds.config.errors import ConfigError
from promoe_ds.diffusion.guidance import guided_prediction
from promoe_ds.diffusion.objective import Solver, make_objective
from promoe_ds.formats.bundle import bundle, imported, needed
from promoe_ds.formats.diffusers_export import model_code, write_diffusers
from promoe_ds.formats.importing import import_checkpoint
from promoe_ds.formats.weights import Weights, write
from promoe_ds.models.dit import DiT
from promoe_ds.models.init import build, materialize
from promoe_ds.moe import experts, fused
from promoe_ds.moe.routers import ROUTERS
from promoe_ds.recipes.load import load_config
from promoe_ds.sampling.generate import image_noise, to_pixels
from tests.launch import ENVIRONMENT, run

LABELS, SCALE, STEPS, SEED = [0, 3, 10], 2.0, 5, 4
LATENTS = [
    "model.channels=4",
    "diffusion.shift=1.5",
    "sample.shift=2",
    "guidance.channels=3",
    "guidance.interval=[300,900]",
]
DDPM = ["diffusion.name=ddpm", "model.learn_sigma=true", "moe.router={name: diffmoe}", "diffusion.ddpm.num_steps=500"]

STRANGER = """
import sys
sys.modules["promoe_ds"] = None  # whoever imports it fails
import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, LCMScheduler, UniPCMultistepScheduler

flow, ddpm, edm2, vae, out = sys.argv[1:]
kind = dict(class_labels=[0, 3, 10], guidance_scale=2.0, num_inference_steps=5)

def pipe(path, **options):
    return DiffusionPipeline.from_pretrained(path, custom_pipeline=path, trust_remote_code=True, **options)

with_vae, without = pipe(flow), pipe(ddpm)
given = pipe(flow, vae=AutoencoderKL.from_pretrained(vae))
np.savez(
    out,
    flow=with_vae(**kind, seed=4, output_type="latent").images,
    answer=with_vae.transformer(torch.ones(3, 4, 8, 8), torch.full((3,), 500.0), torch.tensor([0, 3, 10])),
    batch=with_vae(**kind, latents=torch.ones(3, 4, 8, 8), output_type="latent").images,
    decoded=with_vae(**kind, seed=4, output_type="pt").images,
    again=given(**kind, seed=4, output_type="pt").images,
    pixels=np.stack([np.asarray(image) for image in with_vae(**kind, seed=4).images]),
    per_channel=pipe(edm2)(**kind, seed=4, output_type="pt").images,
    ddpm=without(**kind, seed=4, generator=torch.Generator().manual_seed(9), output_type="latent").images,
)
try:
    without(class_labels=11)
except ValueError as error:
    assert "0..10" in str(error)
for one in (with_vae, without):
    one.scheduler = UniPCMultistepScheduler.from_config(one.scheduler.config)
    one(**kind, generator=torch.Generator())
try:
    with_vae.scheduler = LCMScheduler.from_config(without.scheduler.config)
    with_vae(**kind)
    raise SystemExit("LCMScheduler was not refused")
except ValueError as error:
    assert str(error).startswith("LCMScheduler does not draw from this model in 5 steps"), error
"""


def model(*overrides: str) -> DiT:
    """Random weights, small enough that five steps stay near 1."""
    made = materialize(build(load_config("tiny", list(overrides))), 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in made.named_parameters():
            if name != "pos_embed":
                p.copy_(torch.randn(p.shape, generator=generator) * 0.1)
    return made.eval()


def weights(made: DiT) -> Weights:
    return Weights(dict(made.state_dict()), made.config, 7, "ema", "test")


@torch.no_grad()
def ancestral_with_their_noise(made: DiT) -> Tensor:
    """Our DDPM sampler, its steps' noise drawn as DDPMScheduler draws it."""
    config, device, shape = made.config, torch.device("cpu"), (len(LABELS), 1, 8, 8)
    predict = guided_prediction(made, torch.tensor(LABELS), 10, SCALE, device, config.guidance.channels)
    generator = torch.Generator().manual_seed(9)

    def noise(step: int | None) -> Tensor:
        ours = image_noise(SEED, np.arange(len(LABELS)), shape[1:])
        return ours if step is None else torch.randn(shape, generator=generator)

    return make_objective(config.diffusion, device).sample(predict, noise, Solver("ddpm", STEPS))


def test_a_stranger_draws_our_images(tmp_path: Path) -> None:
    vae = AutoencoderKL(
        block_out_channels=(8,), norm_num_groups=4, latent_channels=4, scaling_factor=0.5, sample_size=8
    ).eval()
    vae.save_pretrained(tmp_path / "vae")
    flow, ddpm = model(*LATENTS), model(*DDPM)
    write_diffusers(weights(flow), tmp_path / "flow", vae=tmp_path / "vae", limit=100_000)
    write_diffusers(weights(ddpm), tmp_path / "ddpm")
    scale, shift = [0.5, 0.4, 0.3, 0.2], [0.1, 0.0, -0.3, 0.2]
    codec = {"kind": "AutoencoderKL", "scale": scale, "shift": shift, "pixel_range": [0.0, 1.0]}
    write_diffusers(weights(flow), tmp_path / "edm2", vae=tmp_path / "vae", codec=codec)
    assert (tmp_path / "flow/transformer/diffusion_pytorch_model.safetensors.index.json").is_file()
    environment = {k: v for k, v in ENVIRONMENT.items() if k != "PYTHONPATH"} | {"HF_HOME": str(tmp_path / "hf")}
    paths = [str(tmp_path / name) for name in ("flow", "ddpm", "edm2", "vae", "out.npz")]
    command = [sys.executable, "-c", STRANGER, *paths]
    run(command, env=environment, cwd=tmp_path)
    with np.load(tmp_path / "out.npz", allow_pickle=False) as found:
        theirs = {name: torch.from_numpy(found[name]) for name in found.files}
    write(weights(flow), tmp_path / "plain")
    loaded = promoe_ds.load_model(tmp_path / "plain")
    ours = promoe_ds.generate(loaded, LABELS, SCALE, STEPS, SEED)
    assert 0.1 < ours.std() < 10
    torch.testing.assert_close(theirs["flow"], ours, rtol=0, atol=1e-4)
    answer = loaded(torch.ones(3, 4, 8, 8), torch.full((3,), 500.0), torch.tensor(LABELS)).prediction  # model(x, t, y)
    torch.testing.assert_close(theirs["answer"], answer, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(theirs["batch"], ours, atol=0.1)
    with torch.no_grad():
        decoded = vae.decode(ours / 0.5).sample
        scale, shift = (torch.tensor(value).view(-1, 1, 1) for value in (scale, shift))
        per_channel = vae.decode(ours / scale + shift).sample.clamp(0, 1)
    torch.testing.assert_close(theirs["per_channel"], per_channel, rtol=0, atol=1e-4)
    torch.testing.assert_close(theirs["decoded"], (decoded / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-4)
    assert torch.equal(theirs["decoded"], theirs["again"])
    assert (theirs["pixels"].int() - torch.from_numpy(to_pixels(decoded)).int()).abs().max() <= 1
    torch.testing.assert_close(theirs["ddpm"], ancestral_with_their_noise(ddpm), rtol=1e-4, atol=1e-4)


def test_what_the_folder_says(tmp_path: Path) -> None:
    made = model("moe.router={name: token_choice}")
    metrics = {"sets": [{"cfg": 1.5, "num": 1000, "FID": 3.25, "IS": None, "sampling": {"checkpoint_step": 7}}]}
    write_diffusers(weights(made), tmp_path / "out", "bf16", metrics=metrics)
    index = json.loads((tmp_path / "out/model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "FlowMatchEulerDiscreteScheduler"] and index["vae"] == [None, None]
    assert damage(tmp_path / "out") is None
    part = tmp_path / "out/transformer/diffusion_pytorch_model.safetensors"
    part.write_bytes(part.read_bytes()[:-1] + b"?")
    assert "transformer/diffusion_pytorch_model.safetensors does not match" in str(damage(tmp_path / "out"))
    for path in (tmp_path / "out", tmp_path / "out/transformer"):
        with pytest.raises(
            ConfigError, match=f"^CHECKPOINT={path}: is a ProMoE pipeline, .*; draw from it with Diffusion"
        ):
            import_checkpoint(path)
    write(weights(made), tmp_path / "weights")
    with pytest.raises(ConfigError, match="weights: is a weights folder of this project; name it as it is: --model"):
        import_checkpoint(tmp_path / "weights")
    card = (tmp_path / "out/README.md").read_text()
    assert "library_name: diffusers" in card and "guidance 1.5, 1,000 images: FID 3.25" in card
    assert "ema, bf16, after 7 steps" in card and "`token_choice`" in card


@pytest.mark.parametrize("router", sorted(ROUTERS))
def test_the_code_of_every_family_stands_alone(router: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its modules run without ours, import nothing of ours by its name, and those of other routers stay behind."""
    code = model_code(load_config("tiny", [f"moe.router={{name: {router}}}"]))
    sources = next(node.value for node in ast.parse(code).body if isinstance(node, ast.Assign))
    modules = {name: "\n".join(lines) for name, lines in ast.literal_eval(sources).items()}
    for name, text in modules.items():
        compile(text, name, "exec")
        assert "import promoe_ds" not in text and "from promoe_ds" not in text
    monkeypatch.setitem(sys.modules, "promoe_ds", None)
    exec(compile(code, router, "exec"), {})
    found = {name for text in modules.values() for name in re.findall(r'^@register_router\("(\w+)"\)', text, re.M)}
    assert router in found <= {router, "promoe"}, "what its own imports may come along"


def test_classes_outlive_a_second_run_of_the_file() -> None:
    """diffusers runs a file again at every load, in the namespace of the first."""
    code = f"""
import sys
sys.modules["promoe_ds"] = None
text, here = {bundle("x", "promoe_ds.config.decode", "Override")!r}, {{}}
exec(text, here)
first = here["Override"]
exec(text, here)
assert here["Override"] is first and isinstance(first("a"), here["Override"])
assert first.__module__.startswith("exported_") and first("1").yaml() == 1
"""
    run([sys.executable, "-c", code])


def test_modules_are_in_an_order_in_which_they_can_be_made() -> None:
    order = list(needed(["promoe_ds.formats.diffusers_model"]))
    assert len(order) > 8 and order[-1] == "promoe_ds.formats.diffusers_model"
    for i, module in enumerate(order):
        assert set(imported(module)) <= set(order[:i]), module


def test_a_copy_of_the_sources_has_operators_of_its_own() -> None:
    """torch lets the last operator of a name win, and calls of the earlier one fail at some time from then on."""
    exec(bundle("a model", "promoe_ds.models.dit", "DiT"), {})
    for ours in (fused, experts):
        name = ours.__name__.removeprefix("promoe_ds")
        copies = [module for key, module in sys.modules.items() if key.startswith("exported_") and key.endswith(name)]
        assert copies and all(copy.OPERATORS != ours.OPERATORS for copy in copies)
