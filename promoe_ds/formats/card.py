"""The model card of an exported folder: what the weights are, how they were trained, what was measured."""

from __future__ import annotations

from typing import Any

from promoe_ds.config.schema import Config
from promoe_ds.costs.flops import count_parameters

BASE = "imagenet256"
"""the recipe whose training options an imported model gets; its sizes come from the weights"""
CITATION = "Routing Matters in MoE: Scaling Diffusion Transformers with Explicit Routing Guidance (arXiv:2510.24711)"
SCORES = ("FID", "sFID", "KID", "IS", "precision", "recall", "density", "coverage", "FD", "label_agreement")
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
    """What a reader compares models by; of imported weights, nothing that they do not tell."""
    m, moe, d, imported = config.model, config.moe, config.diffusion, facts.get("imported")
    size = count_parameters(config)
    experts = "none (dense)"
    if moe is not None:
        alone = moe.num_unconditional if moe.conditional else 0
        experts = f"{moe.num_experts} routed by `{moe.router.name}`, {moe.num_shared} shared, "
        experts += f"{alone} unconditional, in {len(config.moe_layers())} layers"
    after = "an unknown number of steps" if imported and not facts["step"] else f"{facts['step']:,} steps"
    rows = {
        "name" if imported else "recipe": f"`{config.name}`",
        "weights": f"{facts['weights']}, {facts['dtype']}, after {after} (from `{facts['source']}`)",
        "parameters": f"{size.total:,} in total, {size.activated:,} activated",
        "model": f"depth {m.depth}, width {m.width}, {m.heads} heads, patch {m.patch}",
        "input": f"{m.channels}x{m.image_size}x{m.image_size} {'latents' if m.channels > 3 else 'pixels'}, "
        f"{m.num_classes} classes (label {m.num_classes} is none)",
        "experts": experts,
        "objective": f"{d.name}; timestep embedding of {m.time}",
    }
    if imported:
        return rows | {"training": f"not here: imported from `{imported}`, which does not say its data and recipe"}
    t, o = config.train, config.optimizer
    decay = facts.get("ema_decay", o.ema_decay)
    schedule = "" if o.schedule == "constant" else f" ({o.schedule})"
    rows["data"] = f"`{config.data.name}`"
    rows["training"] = (
        f"AdamW lr {o.lr:g}{schedule}, betas {o.beta1:g} {o.beta2:g}, weight decay {o.weight_decay:g}, "
        f"global batch {t.global_batch_size}, label drop {d.label_drop:g}, EMA {decay:g}, "
        f"clip {o.clip_grad_norm:g}, {t.precision}, seed {t.seed}"
    )
    return rows | ({"started from": f"the weights `{t.init}`"} if t.init else {})


def score_rows(metrics: dict[str, Any] | None, step: int) -> str:
    """A line per sample set of RUN/metrics.json, of those that the weights of `step` have drawn."""
    rows, others = [], []
    for scores in (metrics or {}).get("sets", []):
        drawn_at = scores.get("sampling", {}).get("checkpoint_step")
        if drawn_at not in (None, step):
            others.append(drawn_at)
            continue
        known = {key: value for key, value in scores.items() if key.split("[")[0] in SCORES and value is not None}
        text = ", ".join(f"{key} {value:.4g}" for key, value in known.items())
        cfg, doubt = scores.get("cfg"), ", of an unknown step" if drawn_at is None else ""
        scale = "unknown" if cfg is None else cfg
        rows.append(f"- guidance {scale}, {scores.get('num'):,} images{doubt}: {text}")
    steps = sorted(set(others))
    sets = "1 set" if len(others) == 1 else f"{len(others)} sets"
    left = f"{sets} of samples of step{'s' * (len(steps) > 1)} {', '.join(map(str, steps))} left out." if others else ""
    if rows:
        return "\n".join(rows) + (f"\n\n{left}" if left else "")
    return "None was recorded with these weights" + (f"; {left}" if left else ".")


def model_card(config: Config, facts: dict[str, Any], metrics: dict[str, Any] | None, diffusers: bool = False) -> str:
    """README.md of an exported folder, with the metadata block of model hubs.

    Args:
        facts: weights, dtype, step, source; imported, the published file that they come from, if any.
        metrics: RUN/metrics.json, or None.
        diffusers: the folder is a diffusers pipeline.
    """
    library = "diffusers" if diffusers else "promoe_ds"
    use = (USE_DIFFUSERS if diffusers else USE) % (config.sample.cfg, config.sample.steps)
    tags = ["class-conditional-image-generation", "diffusion", "mixture-of-experts" if config.moe else "dit"]
    head = "\n".join(["---", f"library_name: {library}", "tags:", *(f"- {tag}" for tag in tags), "---"])
    options = f", its training options those of the recipe `{BASE}`, for fine-tuning" if facts.get("imported") else ""
    experts = f"mixture of experts, router `{config.moe.router.name}`" if config.moe else "dense"
    return f"""{head}

# {config.name}

A class-conditional diffusion transformer ({experts}), written by promoe_ds. Method: {CITATION}.

## Use

{use}

## Recipe

{_table(recipe_rows(config, facts), ("what", "value"))}

The complete configuration is in `config.yaml`{options}.

## Metrics

{score_rows(metrics, facts["step"])}

## Licence and limits

The licence is that of the data and of the weights this model started from; whoever publishes it states it here.
"""
