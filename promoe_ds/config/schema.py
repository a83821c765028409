"""One configuration tree: frozen dataclasses whose every field is an `option`.

What is said of an option is said here and nowhere else: its default, its line in docs/options.md, its range, and
whether a resumed run or a fine-tune may change it. The batch sizes, optimizer, precision and clipping live here too;
`parallel/ds_config.py` derives the DeepSpeed JSON from them. `decode.py` reads a tree strictly, `recipes/validate.py`
checks the ranges, and what must hold between options.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from promoe_ds.config.errors import did_you_mean, reject
from promoe_ds.config.option import option, section

Channels = Literal["all", 3]
"""which channels classifier-free guidance moves"""
Interval = tuple[float, ...]
"""(lo, hi): times in 0..1000 in which guidance acts"""
CacheFormat = Literal["shards", "npz", "lightningdit", "repa", "edm2", "fast-dit"]
"""who wrote latents: `promoe_ds/data/caches`"""
Reset = Literal["labels", "experts"]
"""parts of weights that start anew: `promoe_ds/checkpoint/init_from.py`"""
SHIFTS = (1e-3, 1e3)
"""shifts of noise levels: below and above, all levels would be data or noise, and then no numbers"""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The diffusion transformer (DiT, arXiv:2212.09748) that all families share."""

    depth: int = option(12, "number of blocks", above=0)
    width: int = option(384, "D, hidden width", above=0)
    heads: int = option(6, "attention heads; must divide the width", above=0)
    patch: int = option(2, "side of a patch in pixels, or in latent cells", above=0)
    image_size: int = option(32, "side of the input in pixels, or in latent cells", above=0)
    channels: int = option(4, "channels of the input", above=0)
    num_classes: int = option(
        1000, "real classes; label `num_classes` is the null label of classifier-free guidance", above=0
    )
    qk_norm: bool = option(False, "LayerNorm on queries and keys, per head")
    mlp_ratio: float = option(4.0, "hidden width of a dense MLP over D", above=0)
    learn_sigma: bool = option(True, "predict 2C channels: DDPM learns its variance there; rectified flow ignores them")
    time: Literal["t", "sigma", "1-sigma"] = option(
        "t",
        "what the timestep embedding is given: t in 0..1000, where 1000 is noise; or sigma = t / 1000, or 1 - sigma, "
        "for imported weights that were trained so (REPA; SiT, DiffMoE)",
    )
    time_divisor: Literal[128, 127] = option(
        128, "the 128 periods of the timestep embedding are 1e4^(i / this); 127 in weights of diffusers"
    )

    @property
    def tokens(self) -> int:
        """S, tokens per image."""
        return (self.image_size // self.patch) ** 2

    @property
    def out_channels(self) -> int:
        return self.channels * (2 if self.learn_sigma else 1)


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """Base of every router's own `Config`; `name` picks the class from the registry."""

    name: str = option("promoe", "which router")

    def validate(self, config: Any) -> None:
        """What must hold of the options in the whole configuration. Raises ConfigError."""

    def validate_files(self, config: Any) -> None:
        """What must hold of files that training reads, and a dry run does not. Raises ConfigError."""


ROUTER_CONFIGS: dict[str, type[RouterConfig]] = {}
"""by name; `moe.router.register_router` adds a router's when its class is made"""


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """The mixture-of-experts layer; `moe: null` in a recipe gives Dense-DiT."""

    layers: Literal["every_other", "all"] | tuple[int, ...] = option(
        "every_other", "which blocks are MoE: those of odd index, all, or a list of indices"
    )
    num_experts: int = option(12, "E, routed experts (sharded under expert parallelism)", above=0)
    num_shared: int = option(1, "N_s, experts that process every token (replicated)", at_least=0)
    num_unconditional: int = option(
        1, "N_u, experts of null-label images (replicated); built only if `conditional`", at_least=0
    )
    hidden_ratio: float = option(2.0, "F over D, hidden width of one expert", above=0)
    conditional: bool = option(True, "conditional routing (Sec. 4.1): null-label images bypass the router")
    router_input: Literal["modulated", "plain", "plain+t"] = option(
        "modulated",
        "what the router looks at: the experts' input (the normalised token after adaLN); the token before adaLN; or "
        "that beside the embedding of the timestep, 2D wide (Nucleus-Image, arXiv:2604.12163)",
    )
    experts_backend: Literal["loop", "grouped_mm", "megablocks"] = option(
        "grouped_mm", "how the experts' products are computed (docs/performance.md)", change="resume"
    )
    router: RouterConfig = section(lambda: router_config_class("promoe", "moe.router.name")(), "never")

    def router_width(self, width: int) -> int:
        """Of what the router looks at, in a model of width D."""
        return 2 * width if self.router_input == "plain+t" else width


@dataclass(frozen=True, kw_only=True)
class DDPMConfig:
    """Noise prediction with a learned variance range (arXiv:2102.09672); needs `model.learn_sigma: true`."""

    num_steps: int = option(
        1000,
        "T, steps of the linear noise schedule that is trained, of which 20 would need betas of 1 or more; t is given "
        "to the model as 1000 t / T",
        at_least=21,
        below=1e6,
    )
    clip_denoised: bool = option(
        False, "samplers clip the predicted image to [-1, 1]: for pixels, never for latents", change="resume"
    )


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    """Training objective: rectified flow or DDPM, whose timesteps are uniform.

    `timesteps` to `shift` are read by rectified flow alone, `ddpm` by DDPM alone. A noise level sigma of 0 is data, 1
    is noise: a larger `logit_mean`, or a shift above 1, means more noise.
    """

    name: Literal["rectified_flow", "ddpm"] = option("rectified_flow", "velocity or noise prediction")
    timesteps: Literal["logit_normal", "uniform", "mix"] = option(
        "logit_normal",
        "how noise levels are drawn: logit-normal (arXiv:2403.03206), uniform (SiT, REPA, DiffMoE), or uniform for "
        "`uniform_share` of the images and logit-normal for the rest",
    )
    uniform_share: float = option(0.1, "mix: the share of uniform levels", at_least=0, below=1)
    logit_mean: float = option(0.0, "mean of the logit of the noise level; above 0 is more noise")
    logit_std: float = option(1.0, "its standard deviation", above=0)
    shift: float = option(1.0, "sigma = shift * u / (1 + (shift - 1) * u)", at_least=SHIFTS[0], below=SHIFTS[1])
    label_drop: float = option(0.1, "probability that an image is trained with the null label", at_least=0, below=1)
    ddpm: DDPMConfig = section(DDPMConfig, "finetune")


@dataclass(frozen=True, kw_only=True)
class GuidanceConfig:
    """Guidance while sampling: by the null label (classifier-free), or by a weaker model (autoguidance)."""

    channels: Channels = option(
        "all", "all, or 3: guide the first three channels only, as DiT and DiffMoE sample their DDPM models"
    )
    interval: Interval = option(
        (0.0, 1000.0), "[lo, hi]: the t in which guidance acts; outside, a step is one conditional forward"
    )
    model: str | None = option(
        None,
        "a weaker model of the same classes and sizes that guides in place of the null label: a run, a checkpoint or a "
        "weights folder",
    )


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """The sample grids drawn while training, and their scores. `launchers/sample.py` has defaults of its own."""

    steps: int | str = option(
        250,
        'solver steps; DDPM also takes ADM\'s notation of respacing, such as "10,15,20" or ddim50',
        at_least=1,
        below=1e6,
    )
    cfg: float = option(1.5, "classifier-free guidance scale; at <= 1 one conditional forward per step", at_least=0)
    shift: float | None = option(
        None,
        "shift of the noise levels of a flow's sampler; null: `diffusion.shift`, as it was trained",
        at_least=SHIFTS[0],
        below=SHIFTS[1],
    )
    per_class: int = option(8, "columns of the grid", at_least=1, below=1000)
    classes: int = option(10, "rows of the grid: the first classes", above=0)
    seed: int = option(0, "seed of the noise", at_least=0, below=2**64)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the images come from: `digits` is embedded (scikit-learn), `images` and `latents` are read from `path`."""

    name: Literal["digits", "images", "latents"] = option("digits", "which source")
    path: str | None = option(
        None,
        "images: a folder per class, Parquet, tars, zip or packed .npz (docs/training.md); latents: shards or another "
        "project's cache (docs/imagenet.md)",
        change="resume",
    )
    format: CacheFormat | None = option(None, "latents: who wrote them; null: found by looking", change="resume")
    scale: float | tuple[float, ...] | None = option(
        None,
        "latents: x = (z - shift) * scale, one for all channels or one per channel, where the format does not say",
        change="resume",
    )
    shift: float | tuple[float, ...] | None = option(None, "latents: as `data.scale`", change="resume")
    vae: str | None = option(
        None,
        "a codec: decodes the sample grids drawn while training (latents without one: no grids); images with one are "
        "encoded by it in the step, and the model is one of latents",
        change="resume",
    )
    vae_precision: Literal["fp32", "bf16"] = option(
        "fp32", "images with `data.vae`: how they are encoded; bf16 is autocast"
    )
    split: str = option("train", "images: which split of a packed .npz, or of files whose names say one")
    hflip: bool = option(False, "random horizontal flips")
    prefetch: int = option(2, "batches prepared ahead of the step, on a thread", above=0, change="resume")
    workers: int | None = option(
        None,
        "images: processes per rank that decode them, 0: threads; null: with a GPU as many as the rank has CPU cores, "
        "less one, at most 16; without a GPU, 0",
        at_least=0,
        below=1000,
        change="resume",
    )


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with an exponential moving average (EMA) of the fp32 master weights as one more state."""

    lr: float = option(1e-4, "learning rate; of a schedule its peak", above=0, change="resume")
    schedule: Literal["constant", "cosine", "linear", "wsd"] = option(
        "constant",
        "the learning rate after warm-up: constant; down to the floor as half a cosine or linearly; or constant, then "
        "linearly down over the last `decay_steps` (wsd: warm-up, stable, decay)",
        change="resume",
    )
    warmup_steps: int = option(0, "steps in which the learning rate rises linearly", at_least=0, change="resume")
    schedule_steps: int | None = option(
        None,
        "steps until a schedule is at its floor, where it stays; null: train.steps",
        above=0,
        change="resume",
    )
    decay_steps: int | None = option(
        None, "wsd: steps of the decay; null: a tenth of the schedule", above=0, change="resume"
    )
    lr_floor: float = option(
        0.0, "where a schedule ends, as a share of the learning rate", at_least=0, below=1, change="resume"
    )
    beta1: float = option(0.9, "decay of the first moment", at_least=0, below=1)
    beta2: float = option(0.999, "decay of the second moment", at_least=0, below=1)
    eps: float = option(1e-8, "added to the root of the second moment", above=0)
    weight_decay: float = option(0.0, "decoupled weight decay", at_least=0)
    clip_grad_norm: float = option(
        0.5, "global L2 norm at which gradients are clipped; 0 turns clipping off", at_least=0
    )
    ema_decay: float = option(0.9999, "decay of the EMA that is sampled and scored", at_least=0, below=1)
    ema_more: tuple[float, ...] = option(
        (), "decays of further EMAs, kept beside it: `promoe-export --ema DECAY`", at_least=0, below=1
    )

    def averages(self) -> dict[str, float]:
        """Decay of each EMA by the name of its state; "ema" is the one that is sampled."""
        return {"ema": self.ema_decay} | {f"ema_{decay}": decay for decay in self.ema_more}


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Expert parallelism and waiting; the ZeRO stage is in the DeepSpeed JSON."""

    expert_parallel: int = option(
        1, "ep: ranks over which the routed experts are sharded; must divide the experts and the world size", above=0
    )
    timeout_minutes: float = option(
        30.0,
        "how long ranks wait for one that stands still; a rank that dies ends the others at once",
        at_least=0.01,
        below=20_000,
    )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Length, batch, precision and bookkeeping of a run."""

    steps: int = option(500_000, "optimizer steps", above=0, change="resume")
    init: str | None = option(
        None,
        "weights to start from, without optimizer state: an imported or exported folder, a checkpoint or another run",
        change="resume",
    )
    init_reset: tuple[Reset, ...] = option(
        (),
        "parts of `train.init` that start anew: labels (drawn, but for the null label), experts (routers and routed "
        "experts: drawn, or split from the MLPs of a dense model)",
        change="resume",
    )
    seed: int = option(0, "seed of weights, noise, labels dropped and order of the data", at_least=0, below=2**64)
    global_batch_size: int = option(256, "images per optimizer step, over all ranks", above=0)
    micro_batch_size: int | None = option(
        None,
        "images per rank per forward; null means global_batch_size / world size (no accumulation)",
        above=0,
        change="resume",
    )
    precision: Literal["fp32", "bf16_autocast", "bf16"] = option(
        "bf16_autocast", "fp32; fp32 weights under bf16 autocast; bf16 weights with fp32 masters in ZeRO"
    )
    residual: Literal["fp32", "bf16"] = option(
        "fp32", "bf16_autocast: the stream between the parts of the model; norms and what is added are computed in fp32"
    )
    activation_checkpointing: Literal["none", "block", "selective"] = option(
        "none",
        "recomputed in the backward pass: nothing, each block, or each block but choices of experts, attention and "
        "what other ranks sent",
        change="resume",
    )
    compile: bool | None = option(
        None,
        "torch.compile of the blocks: whole where experts are all on this rank, else in parts; null: as the device's "
        "gradients were found right, which on no device they were yet (docs/performance.md)",
        change="resume",
    )
    profile: str | None = option(
        None, "A:B, the steps of which rank 0 writes a trace and a table of costs", change="resume"
    )
    log_every: int = option(100, "steps between records of the log", above=0, change="resume")
    checkpoint_every: int = option(5000, "steps between checkpoints", above=0, change="resume")
    keep_last: int = option(
        2, "checkpoints kept; older ones are deleted after a newer one is complete", above=0, change="resume"
    )
    on_save_error: Literal["stop", "continue"] = option(
        "stop", "when a checkpoint cannot be written; the last one of a run always stops it", change="resume"
    )
    measure: bool = option(
        False,
        "log seconds by part of a step and bytes sent by kind; waits for the device between parts, which costs speed",
        change="resume",
    )
    on_nonfinite: Literal["stop", "skip"] = option(
        "stop",
        "a loss or gradient norm that is not finite: end the run, or make no update in that step (10 in a row end it)",
        change="resume",
    )
    sample_every: int = option(
        0, "steps between EMA sample grids; 0 draws one at the end only", at_least=0, change="resume"
    )
    score_every: int = option(
        0,
        "steps between scores of the EMA, which draws with `sample.steps`, `sample.cfg` and `sample.seed`; 0: none",
        at_least=0,
        change="resume",
    )
    score_images: int = option(
        5000, "images that are drawn and scored, over all ranks", at_least=2, below=1e8, change="resume"
    )
    score_ref: str | None = option(
        None, "what they are compared with, as `launchers/evaluate.py --ref`; null: digits, of digits", change="resume"
    )
    score_features: str | None = option(
        None,
        "the network, as `launchers/evaluate.py --features`, whose weights are where its environment variables say; "
        "null: inception, or digits-cnn against digits",
        change="resume",
    )


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole recipe."""

    name: str = option("custom", "name of the recipe, and of the run folder", change="resume")
    model: ModelConfig = section(ModelConfig, "never")
    moe: MoEConfig | None = section(MoEConfig, "never")
    diffusion: DiffusionConfig = section(DiffusionConfig, "finetune")
    data: DataConfig = section(DataConfig, "finetune")
    optimizer: OptimizerConfig = section(OptimizerConfig, "finetune")
    parallel: ParallelConfig = section(ParallelConfig, "resume")
    train: TrainConfig = section(TrainConfig, "finetune")
    sample: SampleConfig = section(SampleConfig, "resume")
    guidance: GuidanceConfig = section(GuidanceConfig, "resume")

    def moe_layers(self) -> tuple[int, ...]:
        """Block indices that hold a MoE layer."""
        if self.moe is None:
            return ()
        if isinstance(self.moe.layers, tuple):
            return self.moe.layers
        first, stride = (1, 2) if self.moe.layers == "every_other" else (0, 1)
        return tuple(range(first, self.model.depth, stride))


def router_config_class(name: str, path: str) -> type[RouterConfig]:
    """The `Config` of a registered router; `path` is what a `ConfigError` calls the name."""
    if name not in ROUTER_CONFIGS:
        known = ", ".join(sorted(ROUTER_CONFIGS)) or "none: promoe_ds.recipes.load imports them"
        reject(path, name, f"no such router (known: {known})", did_you_mean(name, ROUTER_CONFIGS))
    return ROUTER_CONFIGS[name]
