"""The model card of an exported folder: what the weights are, how they were trained, what was measured."""

from __future__ import annotations

from typing import Any

from promoe_ds.accounting import count_parameters
from promoe_ds.config import Config

CITATION = "Routing Matters in MoE: Scaling Diffusion Transformers with Explicit Routing Guidance (arXiv:2510.24711)"
SCORES = ("FID", "sFID", "IS", "precision", "recall", "FD", "label_agreement")
USE = """```python
import promoe_ds

model = promoe_ds.load_model("DIR")          # this folder
x = promoe_ds.generate(model, labels=[0, 1, 2, 3], cfg=%g, steps=%s, seed=0)    # [4, C, H, W]
```"""
USE_DIFFUSERS = """```python
from diffusers import AutoencoderKL, DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("DIR", custom_pipeline="DIR", trust_remote_code=True)    # this folder
images = pipe(class_labels=[0, 1, 2, 3], guidance_scale=%g, num_inference_steps=%s, seed=0).images
```

A model of latents needs its autoencoder: the folder `vae/`, or `vae=AutoencoderKL.from_pretrained(PATH)` above."""


def _table(rows: dict[str, Any], head: tuple[str, str]) -> str:
    lines = [f"| {head[0]} | {head[1]} |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())]
    return "\n".join(lines)


def recipe_rows(config: Config, facts: dict[str, Any]) -> dict[str, Any]:
    """What a reader compares models by."""
    m, moe, t, o, d = config.model, config.moe, config.train, config.optimizer, config.diffusion
    size = count_parameters(config)
    experts = "none (dense)"
    if moe is not None:
        experts = f"{moe.num_experts} routed by `{moe.router.name}`, {moe.num_shared} shared, "
        experts += (
            f"{moe.num_unconditional if moe.conditional else 0} unconditional, in {len(config.moe_layers())} layers"
        )
    return {
        "recipe": f"`{config.name}`",
        "weights": f"{facts['weights']}, {facts['dtype']}, after {facts['step']:,} steps (from `{facts['source']}`)",
        "parameters": f"{size.total:,} in total, {size.activated:,} activated",
        "model": f"depth {m.depth}, width {m.width}, {m.heads} heads, patch {m.patch}",
        "input": f"{m.channels}x{m.image_size}x{m.image_size} {'latents' if m.channels > 3 else 'pixels'}, "
        f"{m.num_classes} classes (label {m.num_classes} is none)",
        "experts": experts,
        "objective": f"{d.name}, label drop {d.label_drop:g}; timestep embedding of {m.time}",
        "data": f"`{config.data.name}`",
        "training": f"AdamW lr {o.lr:g}, betas {o.beta1:g} {o.beta2:g}, weight decay {o.weight_decay:g}, "
        f"global batch {t.global_batch_size}, EMA {o.ema_decay:g}, clip {o.clip_grad_norm:g}, {t.precision}, "
        f"seed {t.seed}",
    }


def score_rows(metrics: dict[str, Any] | None) -> str:
    """A line a sample set of RUN/metrics.json."""
    rows = []
    for scores in (metrics or {}).get("sets", []):
        known = [
            f"{key} {scores[key]:.4g}" for key in scores if key.split("[")[0] in SCORES and scores[key] is not None
        ]
        rows.append(f"- guidance {scores.get('cfg')}, {scores.get('num'):,} images: {', '.join(known)}")
    return "\n".join(rows) or "None was recorded with these weights."


def model_card(config: Config, facts: dict[str, Any], metrics: dict[str, Any] | None, diffusers: bool = False) -> str:
    """README.md of an exported folder, with the metadata block of model hubs.

    Args:
        facts: weights, dtype, step, source.
        metrics: RUN/metrics.json, or None.
        diffusers: the folder is a diffusers pipeline.
    """
    library = "diffusers" if diffusers else "promoe_ds"
    use = (USE_DIFFUSERS if diffusers else USE) % (config.sample.cfg, config.sample.steps)
    tags = ["class-conditional-image-generation", "diffusion", "mixture-of-experts" if config.moe else "dit"]
    head = "\n".join(["---", f"library_name: {library}", "tags:", *(f"- {tag}" for tag in tags), "---"])
    experts = f"mixture of experts, router `{config.moe.router.name}`" if config.moe else "dense"
    return f"""{head}

# {config.name}

A class-conditional diffusion transformer ({experts}), written by promoe_ds. Method: {CITATION}.

## Use

{use}

## Recipe

{_table(recipe_rows(config, facts), ("what", "value"))}

The complete configuration is in `config.yaml`.

## Metrics

{score_rows(metrics)}

## Licence and limits

The licence is that of the data and of the weights this model started from; whoever publishes it states it here.
"""
