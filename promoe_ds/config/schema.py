"""One configuration tree: frozen dataclasses whose every field is an `option`; imports nothing of ours.

What is said of an option is said here and nowhere else: its default, its line in docs/options.md, its range, and
whether a resumed run or a fine-tune may change it. The batch sizes, optimizer, precision and clipping live here too;
`parallel/ds_config.py` derives the DeepSpeed JSON from them. `decode.py` reads a tree strictly, `recipes/validate.py`
checks the ranges, and what must hold between options.
"""

from __future__ import annotations

import difflib
import typing
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, Literal

Channels = Literal["all", 3]
"""which channels classifier-free guidance moves"""
Interval = tuple[float, ...]
"""(lo, hi): times in 0..1000 in which guidance acts"""
CacheFormat = Literal["shards", "npz", "lightningdit", "repa", "edm2", "fast-dit"]
"""who wrote latents: `promoe_ds/data/caches`"""
Change = Literal["never", "finetune", "resume"]
"""Who may change an option of trained weights: nobody, because the weights compute something else with it; a fine-tune
(`train.init`), which is a new run; or the same run when it is resumed, and so a fine-tune too."""


class ConfigError(Exception):
    """A user's mistake; the message is one line and the process exits with code 2."""


def reject(path: str, value: Any, conflict: str, way_out: str) -> typing.NoReturn:
    """Raise `ConfigError` in the one form used everywhere: path, value, conflict, way out."""
    raise ConfigError(" ".join(f"{path}={value}: {conflict}; {way_out}".splitlines()))


@dataclass(frozen=True, kw_only=True)
class Option:
    """What is known of a field beside its type and default: its line in the docs, its range, who may change it."""

    doc: str = ""
    above: float | None = None
    at_least: float | None = None
    below: float | None = None
    change: Change | None = None
    """None: as its section"""

    def range(self) -> str:
        """The numbers that are allowed, in words that follow "must"; empty if all are."""
        if self.below is not None:
            return f"lie in [{self.at_least:g}, {'2**64' if self.below == 2**64 else f'{self.below:g}'})"
        if self.above is not None:
            return "be positive" if self.above == 0 else f"be above {self.above:g}"
        return "not be negative" if self.at_least == 0 else ""

    def allows(self, number: float) -> bool:
        low = (self.above is None or number > self.above) and (self.at_least is None or number >= self.at_least)
        return low and (self.below is None or number < self.below)


def option(default: Any, doc: str, **more: Any) -> Any:
    """A field of a section; `more` is what `Option` holds."""
    return field(default=default, metadata={"option": Option(doc=doc, **more)})


def section(kind: Callable[[], Any], change: Change) -> Any:
    """A field that holds a section; `change` is for those of its options that do not say."""
    return field(default_factory=kind, metadata={"option": Option(change=change)})


def options(config: Any, path: str = "", change: Change = "never") -> Iterator[tuple[str, Option, Any]]:
    """(path, what is known of it, value) of every option and section in `config`, a section before its options."""
    for f in fields(config):
        inner, value = f"{path}.{f.name}" if path else f.name, getattr(config, f.name)
        known: Option = f.metadata.get("option", Option())
        allowed = known.change or change
        yield inner, replace(known, change=allowed), value
        if is_dataclass(value):
            yield from options(value, inner, allowed)


def differences(old: Config, new: Config, free: Collection[Change]) -> Iterator[tuple[str, Any, Any]]:
    """Options in which two configurations differ, with both values, but for those that `free` may change."""
    before, after = ({path: value for path, o, value in options(c) if o.change not in free} for c in (old, new))
    for path in before | after:
        a, b = before.get(path), after.get(path)
        if a != b and not (is_dataclass(a) and is_dataclass(b)):
            yield path, "a section" if is_dataclass(a) else a, "a section" if is_dataclass(b) else b


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
    experts_backend: Literal["loop", "grouped_mm", "megablocks"] = option(
        "grouped_mm", "how the experts' products are computed (docs/performance.md)", change="resume"
    )
    router: RouterConfig = section(lambda: router_config_class("promoe", "moe.router.name")(), "never")


@dataclass(frozen=True, kw_only=True)
class DDPMConfig:
    """Noise prediction with a learned variance range (arXiv:2102.09672); needs `model.learn_sigma: true`."""

    num_steps: int = option(
        1000,
        "T, steps of the linear noise schedule that is trained, of which 20 would need betas of 1 or more; t is given "
        "to the model as 1000 t / T",
        above=20,
    )
    clip_denoised: bool = option(
        False, "samplers clip the predicted image to [-1, 1]: for pixels, never for latents", change="resume"
    )


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    """Training objective: rectified flow with logit-normal timesteps (Esser et al. 2024, arXiv:2403.03206) or DDPM.

    `logit_mean`, `logit_std` and `shift` are read by rectified flow alone, `ddpm` by DDPM alone.
    """

    name: Literal["rectified_flow", "ddpm"] = option("rectified_flow", "velocity or noise prediction")
    logit_mean: float = option(0.0, "mean of the logit of the noise level")
    logit_std: float = option(1.0, "its standard deviation", above=0)
    shift: float = option(1.0, "sigma = shift * u / (1 + (shift - 1) * u)", above=0)
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
    """The sample grids drawn while training, and the defaults of `launchers/sample.py`."""

    steps: int | str = option(
        250, 'solver steps; DDPM also takes ADM\'s notation of respacing, such as "10,15,20" or ddim50', above=0
    )
    cfg: float = option(1.5, "classifier-free guidance scale; at <= 1 one conditional forward per step", at_least=0)
    shift: float | None = option(
        None, "shift of the noise levels of a flow's sampler; null: `diffusion.shift`, as it was trained", above=0
    )
    per_class: int = option(8, "columns of the grid", above=0)
    classes: int = option(10, "rows of the grid: the first classes", above=0)
    seed: int = option(0, "seed of the noise", at_least=0, below=2**64)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the images come from: `digits` is embedded (scikit-learn), `images` and `latents` are read from `path`."""

    name: Literal["digits", "images", "latents"] = option("digits", "which source")
    path: str | None = option(
        None,
        "images: class-per-folder tree or packed .npz; latents: shards or another project's cache (docs/imagenet.md)",
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
        None, "latents: the codec that decodes the sample grids drawn while training; none, no grids", change="resume"
    )
    split: str = option("train", "packed .npz: which split")
    hflip: bool = option(False, "random horizontal flips")
    prefetch: int = option(2, "batches prepared ahead of the step, on a thread", above=0, change="resume")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with an exponential moving average (EMA) of the fp32 master weights as one more state."""

    lr: float = option(1e-4, "learning rate, constant", above=0, change="resume")
    beta1: float = option(0.9, "decay of the first moment", at_least=0, below=1)
    beta2: float = option(0.999, "decay of the second moment", at_least=0, below=1)
    eps: float = option(1e-8, "added to the root of the second moment", above=0)
    weight_decay: float = option(0.0, "decoupled weight decay", at_least=0)
    clip_grad_norm: float = option(
        0.5, "global L2 norm at which gradients are clipped; 0 turns clipping off", at_least=0
    )
    ema_decay: float = option(0.9999, "decay of the EMA", at_least=0, below=1)


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Expert parallelism and waiting; the ZeRO stage is in the DeepSpeed JSON."""

    expert_parallel: int = option(
        1, "ep: ranks over which the routed experts are sharded; must divide the experts and the world size", above=0
    )
    timeout_minutes: float = option(
        30.0, "how long ranks wait for one that stands still; a rank that dies ends the others at once", above=0
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
    activation_checkpointing: Literal["none", "block", "selective"] = option(
        "none",
        "recomputed in the backward pass: nothing, each block, or each block but choices of experts, attention and "
        "what other ranks sent",
        change="resume",
    )
    compile: bool = option(
        False,
        "torch.compile of the blocks: whole where experts are all on this rank, else in parts (docs/performance.md)",
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


def did_you_mean(word: str, known: typing.Iterable[str]) -> str:
    close = difflib.get_close_matches(str(word), list(known), n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else "choose a known one"


def router_config_class(name: str, path: str) -> type[RouterConfig]:
    """The `Config` of a registered router; `path` is what a `ConfigError` calls the name."""
    if name not in ROUTER_CONFIGS:
        known = ", ".join(sorted(ROUTER_CONFIGS)) or "none: promoe_ds.recipes.load imports them"
        reject(path, name, f"no such router (known: {known})", did_you_mean(name, ROUTER_CONFIGS))
    return ROUTER_CONFIGS[name]
