"""A folder that `diffusers.DiffusionPipeline.from_pretrained` runs, without this project installed.

OUT/model_index.json                          what the parts are
    pipeline.py                               ProMoEPipeline, one self-contained file (`bundle.py`)
    transformer/promoe_transformer.py         ProMoETransformer2DModel, likewise
    transformer/config.json, diffusion_pytorch_model.safetensors
    scheduler/scheduler_config.json           a stock scheduler
    vae/                                      a copy of the autoencoder, if one was given
    config.yaml, manifest.json, README.md     as in a weights folder
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

from promoe_ds.checkpoint.convert import made
from promoe_ds.checkpoint.layout import file_entry
from promoe_ds.config.decode import encode
from promoe_ds.config.errors import reject
from promoe_ds.config.schema import Config
from promoe_ds.formats.bundle import bundle
from promoe_ds.formats.weights import SHARD_BYTES, Weights, as_json, cast, finish, write_safetensors
from promoe_ds.moe.router import ROUTERS
from promoe_ds.utils.files import read_json, write_text

PIPELINE = "pipeline"
"""diffusers looks for this name"""
TRANSFORMER = "ProMoETransformer2DModel"
"""the class of `diffusers_model.py`, by which an exported folder is known"""
VAE_CLASSES = ("AutoencoderKL", "AutoencoderTiny")
VAE_FILES = ("config.json", "diffusion_pytorch_model.safetensors")


def model_code(config: Config) -> str:
    """The source of the transformer: the model, with its own router and no other."""
    router = (ROUTERS[config.moe.router.name].__module__,) if config.moe else ()
    title = f"The transformer of {config.name}, as a diffusers model."
    return bundle(title, "promoe_ds.formats.diffusers_model", TRANSFORMER, router)


def pipeline_code() -> str:
    return bundle("Sampling as a diffusers pipeline.", "promoe_ds.formats.diffusers_pipeline", "ProMoEPipeline")


def scheduler_of(config: Config) -> Any:
    """The stock scheduler with this model's noise schedule."""
    import diffusers  # late: an optional extra

    d = config.diffusion
    if d.name == "rectified_flow":
        shift = d.shift if config.sample.shift is None else config.sample.shift
        return diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    steps = d.ddpm.num_steps
    return diffusers.DDPMScheduler(
        num_train_timesteps=steps,
        beta_start=1e-4 * 1000 / steps,
        beta_end=0.02 * 1000 / steps,
        beta_schedule="linear",
        variance_type="learned_range",
        clip_sample=d.ddpm.clip_denoised,
        timestep_spacing="linspace",
    )


def vae_class(path: Path) -> str:
    """The diffusers class of an autoencoder folder; raises ConfigError."""
    if missing := [name for name in VAE_FILES if not (path / name).is_file()]:
        reject("--vae", path, f"holds no {missing[0]}", "name a folder of an autoencoder in diffusers' layout")
    try:
        name = read_json(path / "config.json").get("_class_name")
    except (OSError, ValueError, AttributeError) as error:
        reject("--vae", path, f"its config.json cannot be read ({error})", "restore it")
    if name not in VAE_CLASSES:
        reject("--vae", path, f"holds a {name}", f"name a folder of {' or '.join(VAE_CLASSES)}")
    return name


def _decoding(codec: dict[str, Any] | None) -> dict[str, Any]:
    """What the pipeline must know to invert the latents, from their record."""
    return {"codec": {k: codec[k] for k in ("scale", "shift", "pixel_range") if k in codec}} if codec else {}


def write_diffusers(
    weights: Weights,
    out: Path,
    dtype: str = "fp32",
    vae: Path | None = None,
    limit: int = SHARD_BYTES,
    metrics: dict[str, Any] | None = None,
    codec: dict[str, Any] | None = None,
) -> Path:
    """Write a diffusers pipeline folder; arguments as of `weights.write`.

    Args:
        vae: folder of an autoencoder in diffusers' layout, copied; None: for pixels, or to be given when loading.
        codec: the record of the latents that the weights were trained on, if it is known: decoding inverts it.

    Raises:
        ConfigError: the target exists or cannot be written; the autoencoder cannot be used.
    """
    import diffusers

    kind, config = vae_class(vae) if vae else None, weights.config
    tensors = {f"dit.{name}": tensor for name, tensor in cast(weights, dtype).items()}
    code = model_code(config)
    module = f"promoe_transformer_{hashlib.blake2b(code.encode()).hexdigest()[:8]}"
    with made(out, sum(t.nbytes for t in tensors.values()) * 101 // 100) as temporary:
        transformer = temporary / "transformer"
        transformer.mkdir()
        parts = write_safetensors(transformer, "diffusion_pytorch_model", tensors, {"format": "pt"}, limit)
        files = {f"transformer/{name}": entry for name, entry in parts.items()}
        scheduler = scheduler_of(config)
        scheduler.save_pretrained(temporary / "scheduler")
        if vae:
            (temporary / "vae").mkdir()
            for name in VAE_FILES:
                shutil.copyfile(vae / name, temporary / "vae" / name)
        index: dict[str, Any] = {
            "_class_name": [PIPELINE, "ProMoEPipeline"],
            "_diffusers_version": diffusers.__version__,
            "transformer": [module, TRANSFORMER],
            "scheduler": ["diffusers", type(scheduler).__name__],
            "vae": ["diffusers", kind] if kind else [None, None],
        } | _decoding(codec)
        tree, d = encode(config), config.diffusion
        arguments = {
            "_class_name": TRANSFORMER,
            "_diffusers_version": diffusers.__version__,
            "model": tree["model"],
            "moe": tree["moe"],
            "guidance_channels": config.guidance.channels,
            "guidance_interval": list(config.guidance.interval),
            "ddpm_steps": d.ddpm.num_steps if d.name == "ddpm" else None,
        }
        for name, text in (
            (f"transformer/{module}.py", code),
            ("transformer/config.json", as_json(arguments)),
            ("model_index.json", as_json(index)),
            (f"{PIPELINE}.py", pipeline_code()),
        ):
            (files[name],) = file_entry(write_text(temporary / name, text, durable=True)).values()
        return finish(temporary, out, weights, dtype, files, metrics, diffusers=True)
