"""One configuration tree: frozen dataclasses, strict decoding, pure validation.

Order of precedence: dataclass default < recipe YAML < `section.key=value` from the command line. A recipe may start
from another one with the key `base: NAME`. Unknown keys, wrong types and impossible combinations raise `ConfigError`,
whose message is one line: config path, value, conflict, way out.

The batch sizes, optimizer, precision and clipping live here and nowhere else; `parallel/ds_config.py` derives the
DeepSpeed JSON from them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import importlib
import math
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from promoe_ds.objective_config import DiffusionConfig, GuidanceConfig, SampleConfig

BAD_YAML = (yaml.YAMLError, ValueError, AttributeError)  # the others for 2024-02-30 or 0x_, no dates or numbers
RECIPES = Path(__file__).parent / "recipes"


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


def router_config_class(name: str, path: str) -> type[RouterConfig]:
    """The `Config` of a registered router. Imported late: the registry lives with the routers, which import torch."""
    registry = importlib.import_module("promoe_ds.moe.routers").ROUTERS
    if name not in registry:
        reject(path, name, f"no such router (known: {', '.join(sorted(registry))})", _did_you_mean(name, registry))
    return registry[name].Config


# ---------------------------------------------------------------------------------------------------------- decoding


class Override(str):
    """What stands after `section.key=`; the type of the field decides how it is read."""

    def yaml(self) -> Any:
        with contextlib.suppress(*BAD_YAML):
            if (read := yaml.safe_load(self)) is not None or self.strip().lower() in ("", "~", "null"):
                return read
        return str(self)  # YAML reads comments and anchors as null, too


def _did_you_mean(word: str, known: typing.Iterable[str]) -> str:
    close = difflib.get_close_matches(str(word), list(known), n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else "choose a known one"


def _decode_dataclass(kind: type, value: Any, path: str) -> Any:
    if not isinstance(value, dict):
        reject(path or "config", repr(value), "expected a mapping", "write it as `key: value` lines")
    prefix = f"{path}." if path else ""
    if kind is RouterConfig:
        name = _decode(str, value.get("name", "promoe"), f"{prefix}name")
        kind = router_config_class(name, f"{prefix}name")
    hints = typing.get_type_hints(kind)
    known = [f.name for f in dataclasses.fields(kind)]
    for key in value:
        if key not in known:
            listed = f"unknown key (known: {', '.join(known)})"
            reject(f"{prefix}{key}", value[key], listed, _did_you_mean(key, known))
    return kind(**{key: _decode(hints[key], item, f"{prefix}{key}") for key, item in value.items()})


def _decode_union(kind: Any, value: Any, path: str) -> Any:
    members = typing.get_args(kind)
    if types.NoneType in members and (value.yaml() if isinstance(value, Override) else value) is None:
        return None
    errors = []
    for member in [member for member in members if member is not types.NoneType]:
        try:
            return _decode(member, value, path)
        except ConfigError as error:
            errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    reject(path, repr(value), f"expected {' or '.join(map(_spell, members))}", "write one of these")


def _spell(kind: Any) -> str:
    """A type as a user would say it."""
    if typing.get_origin(kind) is Literal:
        return " or ".join(map(str, typing.get_args(kind)))
    if typing.get_origin(kind) is tuple:
        return f"a list of {_spell(typing.get_args(kind)[0])}"
    return getattr(kind, "__name__", str(kind))


def _decode(kind: Any, value: Any, path: str) -> Any:
    """Turn plain YAML data into `kind` or raise `ConfigError` naming `path`."""
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        return _decode_union(kind, value, path)
    if isinstance(value, Override):
        read = value.yaml()
        text = read if value[:1] in ("'", '"') and isinstance(read, str) else str(value)  # quotes are YAML's
        if text and (kind is str or (origin is Literal and text in typing.get_args(kind))):
            return text
        value = text if kind in (int, float) and type(read) in (int, float) else read  # YAML reads 0500 as 320
    if dataclasses.is_dataclass(kind):
        return _decode_dataclass(typing.cast(type, kind), value, path)
    if origin is Literal:
        choices = typing.get_args(kind)
        if any(value == choice and type(value) is type(choice) for choice in choices):  # 1 is no True
            return value
        listed = ", ".join(map(str, choices))
        reject(path, repr(value), f"must be one of {listed}", _did_you_mean(value, map(str, choices)))
    if origin is tuple:
        if not isinstance(value, list | tuple):
            reject(path, repr(value), "expected a list", "write [a, b, c]")
        return tuple(_decode(typing.get_args(kind)[0], item, f"{path}[{i}]") for i, item in enumerate(value))
    if type(value) is kind and kind is not float:
        return value
    number = _number(str(value)) if kind in (int, float) else None
    if number is not None and (kind is float or number == int(number)):
        return kind(number)
    way_out = "write it in quotes" if kind is str and not isinstance(value, list | dict) else "change the value"
    reject(path, repr(value), f"expected {kind.__name__}, got {type(value).__name__}", way_out)


def _number(text: str) -> float | None:
    """A finite number, whole ones exactly (YAML 1.1 reads 1e-4 and 1e5 as text); None if it is not one."""
    for kind in (int, float):
        with contextlib.suppress(ValueError, OverflowError):
            if math.isfinite(number := kind(text)):
                return number
    return None


def decode(tree: dict[str, Any]) -> Config:
    """Strictly turn a plain tree into a validated `Config`; raises `ConfigError`."""
    config = _decode_dataclass(Config, tree, "")
    importlib.import_module("promoe_ds.validate").validate(config)
    return config


def encode(config: Any) -> Any:
    """The plain tree of a config: `decode(encode(c)) == c`."""
    if dataclasses.is_dataclass(config):
        return {f.name: encode(getattr(config, f.name)) for f in dataclasses.fields(config)}
    return list(config) if isinstance(config, tuple) else config


# ----------------------------------------------------------------------------------------------------------- loading


def read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reject("--config", path, f"cannot be read ({error})", "name a recipe or a YAML file")
    except BAD_YAML as error:
        reject("--config", path, f"is not YAML ({' '.join(str(error).split())})", "mend the file")
    if not isinstance(tree, dict):
        reject("--config", path, "is not a mapping", "write `section: {key: value}`")
    return tree


def _merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    out = dict(base)
    for key, value in top.items():
        nested = isinstance(value, dict) and isinstance(out.get(key), dict)
        out[key] = _merge(out[key], value) if nested else value
    return out


def recipe_names() -> list[str]:
    return sorted(str(p.relative_to(RECIPES).with_suffix("")) for p in RECIPES.rglob("*.yaml"))


def _recipe_tree(name_or_path: str, seen: tuple[str, ...] = ()) -> dict[str, Any]:
    if not isinstance(name_or_path, str):
        reject("base", name_or_path, "is not the name of a recipe", "write base: NAME")
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        path = RECIPES / f"{name_or_path}.yaml"
        if not path.is_file():
            listed = f"no such recipe (known: {', '.join(names := recipe_names())})"
            reject("--config", name_or_path, listed, _did_you_mean(name_or_path, names))
    if name_or_path in seen:
        reject("base", name_or_path, "the recipe is its own base", "remove the cycle")
    tree = read_yaml(path)
    base = tree.pop("base", None)
    tree.setdefault("name", path.stem)
    return _merge(_recipe_tree(base, (*seen, name_or_path)), tree) if base else tree


def _apply_override(tree: dict[str, Any], text: str) -> None:
    key, equals, raw = text.partition("=")
    if not equals or not key:
        reject("override", repr(text), "is not section.key=value", "write for example train.steps=1000")
    *parents, leaf = key.split(".")
    node = tree
    for parent in parents:
        inner = node.setdefault(parent, {})
        node[parent] = inner = inner.yaml() if isinstance(inner, Override) else inner
        if inner is None:
            way_out = f"override `{parent}` as a whole or choose another recipe"
            reject(key, raw, f"`{parent}` is null in this recipe", way_out)
        if not isinstance(inner, dict):
            reject(key, raw, f"`{parent}` is not a section", "remove the last part of the key")
        node = inner
    node[leaf] = Override(raw)


def load_config(name_or_path: str, overrides: typing.Sequence[str] = ()) -> Config:
    """Recipe name or YAML path, plus `section.key=value` overrides, to a validated `Config`.

    Raises:
        ConfigError: anything unknown, ill-typed or contradictory.
    """
    tree = _recipe_tree(name_or_path)
    for text in overrides:
        _apply_override(tree, text)
    return decode(tree)


def dump(config: Config) -> str:
    """The resolved configuration as YAML."""
    return yaml.safe_dump(encode(config), sort_keys=False)
