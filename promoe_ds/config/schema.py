"""One configuration tree: frozen dataclasses, every option a field with a one-line docstring; imports nothing of ours.

The batch sizes, optimizer, precision and clipping live here and nowhere else; `parallel/ds_config.py` derives the
DeepSpeed JSON from them. `decode.py` reads a tree strictly, `recipes/validate.py` says what must hold.
"""

from __future__ import annotations

import difflib
import typing
from dataclasses import dataclass, field
from typing import Any, Literal

Channels = Literal["all", 3]
"""which channels classifier-free guidance moves"""


class ConfigError(Exception):
    """A user's mistake; the message is one line and the process exits with code 2."""


def reject(path: str, value: Any, conflict: str, way_out: str) -> typing.NoReturn:
    """Raise `ConfigError` in the one form used everywhere: path, value, conflict, way out."""
    raise ConfigError(" ".join(f"{path}={value}: {conflict}; {way_out}".splitlines()))


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The diffusion transformer (DiT, arXiv:2212.09748) shared by all families."""

    depth: int = 12
    """number of blocks"""
    width: int = 384
    """D, hidden width"""
    heads: int = 6
    patch: int = 2
    """side of a patch in pixels (or latent cells)"""
    image_size: int = 32
    """side of the input in pixels (or latent cells)"""
    channels: int = 4
    num_classes: int = 1000
    """real classes; label `num_classes` is the null label of classifier-free guidance"""
    mlp_ratio: float = 4.0
    """hidden width of a dense MLP over D"""
    qk_norm: bool = False
    """LayerNorm on queries and keys, per head"""
    learn_sigma: bool = True
    """predict 2C channels: DDPM learns its variance there; rectified flow ignores them (kept for compatibility)"""
    time: Literal["t", "sigma", "1-sigma"] = "t"
    """what the timestep embedding is given: t in 0..1000, where 1000 is noise; or sigma = t / 1000, or 1 - sigma, for
    imported weights that were trained so (REPA; SiT, DiffMoE)"""

    @property
    def tokens(self) -> int:
        """S, tokens an image."""
        return (self.image_size // self.patch) ** 2

    @property
    def out_channels(self) -> int:
        return self.channels * (2 if self.learn_sigma else 1)


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """Base of every router's own `Config`; `name` picks the class from the registry."""

    name: str = "promoe"

    def validate(self, config: Any) -> None:
        """What must hold of the options in the whole configuration. Raises ConfigError."""

    def validate_files(self, config: Any) -> None:
        """What must hold of files that training reads, and a dry run does not. Raises ConfigError."""


ROUTER_CONFIGS: dict[str, type[RouterConfig]] = {}
"""by name; `moe.router.register_router` adds a router's when its class is made"""


def _default_router() -> RouterConfig:
    return router_config_class("promoe", "moe.router.name")()


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """The mixture-of-experts layer; `moe: null` in a recipe gives Dense-DiT."""

    layers: Literal["every_other", "all"] | tuple[int, ...] = "every_other"
    """which blocks are MoE: odd indices, all, or a list of indices"""
    num_experts: int = 12
    """E, routed experts (sharded under expert parallelism)"""
    num_shared: int = 1
    """N_s, experts that process every token (replicated)"""
    num_unconditional: int = 1
    """N_u, experts of null-label images (replicated); built only if `conditional`"""
    hidden_ratio: float = 2.0
    """F over D, hidden width of one expert"""
    conditional: bool = True
    """conditional routing (Sec. 4.1): null-label images bypass the router"""
    experts_backend: Literal["loop", "grouped_mm", "megablocks"] = "grouped_mm"
    router: RouterConfig = field(default_factory=_default_router)


@dataclass(frozen=True, kw_only=True)
class DDPMConfig:
    """Noise prediction with a learned variance range (arXiv:2102.09672); needs `model.learn_sigma: true`."""

    num_steps: int = 1000
    """T, steps of the linear noise schedule that is trained; t is given to the model as 1000 t / T"""
    clip_denoised: bool = False
    """samplers clip the predicted image to [-1, 1]: for pixels, never for latents"""


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    """Training objective: rectified flow with logit-normal timesteps (Esser et al. 2024, arXiv:2403.03206) or DDPM.

    `logit_mean`, `logit_std` and `shift` are read by rectified flow alone, `ddpm` by DDPM alone.
    """

    name: Literal["rectified_flow", "ddpm"] = "rectified_flow"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    shift: float = 1.0
    """sigma = shift*u / (1 + (shift-1)*u)"""
    label_drop: float = 0.1
    """probability that an image is trained with the null label"""
    ddpm: DDPMConfig = field(default_factory=DDPMConfig)


@dataclass(frozen=True, kw_only=True)
class GuidanceConfig:
    """Classifier-free guidance while sampling."""

    channels: Channels = "all"
    """all, or 3: guide the first three channels only, as DiT and DiffMoE sample their DDPM models"""


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Defaults of the sample grids drawn while training."""

    steps: int | str = 250
    """solver steps; DDPM also takes ADM's notation of respacing, such as "10,15,20" or ddim50"""
    cfg: float = 1.5
    """classifier-free guidance scale; at <= 1 one conditional forward a step"""
    per_class: int = 8
    """columns of the grid"""
    classes: int = 10
    """rows of the grid: the first classes"""
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the images come from: `digits` is embedded (scikit-learn), `images` and `latents` are read from `path`."""

    name: Literal["digits", "images", "latents"] = "digits"
    path: str | None = None
    """images: class-per-folder tree or packed .npz; latents: what launchers/encode_latents.py wrote"""
    vae: str | None = None
    """latents: the codec that decodes the sample grids drawn while training; none, no grids"""
    split: str = "train"
    """packed npz: which split"""
    hflip: bool = False
    """random horizontal flips"""
    prefetch: int = 2
    """batches prepared ahead of the step, on a thread"""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with an exponential moving average (EMA) of the fp32 master weights as one more state."""

    lr: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_grad_norm: float = 0.5
    """global L2 norm at which gradients are clipped; 0 turns clipping off"""
    ema_decay: float = 0.9999


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    expert_parallel: int = 1
    """ep: ranks over which the routed experts are sharded; must divide the experts and the world size"""
    timeout_minutes: float = 30.0
    """how long ranks wait for one that stands still; a rank that dies ends the others at once"""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    steps: int = 500_000
    init: str | None = None
    """weights to start from, without optimizer state: an imported or exported folder, a checkpoint or another run"""
    seed: int = 0
    global_batch_size: int = 256
    """images an optimizer step, over all ranks"""
    micro_batch_size: int | None = None
    """images a rank a forward; null means global_batch_size / world size (no accumulation)"""
    precision: Literal["fp32", "bf16_autocast", "bf16"] = "bf16_autocast"
    """fp32; fp32 weights under bf16 autocast; bf16 weights with fp32 masters in ZeRO"""
    activation_checkpointing: Literal["none", "block", "selective", False, True] = "none"
    """recomputed in the backward pass: nothing, each block, or each block but choices of experts, attention and what
    other ranks sent; false and true mean none and block"""
    compile: bool = False
    """torch.compile of the blocks: whole where experts are all on this rank, else in parts (docs/performance.md)"""
    profile: str | None = None
    """A:B, the steps of which rank 0 writes a trace and a table of costs"""
    log_every: int = 100
    checkpoint_every: int = 5000
    keep_last: int = 2
    """checkpoints kept; older ones are deleted after a newer one is complete"""
    on_save_error: Literal["stop", "continue"] = "stop"
    """when a checkpoint cannot be written; the last one of a run always stops it"""
    measure: bool = False
    """log seconds by part of a step and bytes sent by kind; waits for the device between parts, which costs speed"""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """a loss or gradient norm that is not finite: end the run, or make no update in that step (10 in a row end it)"""
    sample_every: int = 0
    """steps between EMA sample grids; 0 draws one at the end only"""


@dataclass(frozen=True, kw_only=True)
class Config:
    name: str = "custom"
    model: ModelConfig = field(default_factory=ModelConfig)
    moe: MoEConfig | None = field(default_factory=MoEConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)

    def moe_layers(self) -> tuple[int, ...]:
        """Block indices that hold a MoE layer."""
        if self.moe is None:
            return ()
        if isinstance(self.moe.layers, tuple):
            return self.moe.layers
        first, stride = (1, 2) if self.moe.layers == "every_other" else (0, 1)
        return tuple(range(first, self.model.depth, stride))


def did_you_mean(word: str, known: typing.Iterable[str]) -> str:
    close = difflib.get_close_matches(str(word), list(known), n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else "choose a known one"


def router_config_class(name: str, path: str) -> type[RouterConfig]:
    """The `Config` of a registered router; `path` is what a `ConfigError` calls the name."""
    if name not in ROUTER_CONFIGS:
        known = ", ".join(sorted(ROUTER_CONFIGS)) or "none: promoe_ds.recipes.load imports them"
        reject(path, name, f"no such router (known: {known})", did_you_mean(name, ROUTER_CONFIGS))
    return ROUTER_CONFIGS[name]
