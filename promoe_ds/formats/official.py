"""The key layout of the official checkpoints, to and from this project's state dict: pure renaming and stacking.

The official code keeps one module per expert; here the routed experts of a layer are stacked (w1, w2, w3 = [b1 | b2]).
The unconditional expert is the official list's last one. Nothing is computed but one sign: a flow checkpoint trained on
the velocity data - noise has its last linear layer negated, which is exact, and so is the way back.

Legend: E routed experts, F their hidden width.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from promoe_ds.config.errors import reject
from promoe_ds.config.schema import Config
from promoe_ds.formats.weights import Weights
from promoe_ds.moe.routers.diffmoe import DiffMoEConfig
from promoe_ds.utils.files import atomic, making
from promoe_ds.utils.outputs import check_new

State = dict[str, Tensor]

RENAMED = {
    "y_embedder.weight": "y_embedder.embedding_table.weight",
    "adaLN.linear.": "adaLN_modulation.1.",
    "mlp.router.prototypes": "mlp.cluster_centers",
    "mlp.router.hidden_": "mlp.capacity_predictor.0.",
    "mlp.router.out_": "mlp.capacity_predictor.2.",
    "mlp.router.threshold": "mlp.expert_threshold",
    "mlp.shared.0.fc1": "mlp.shared_expert.up_proj",
    "mlp.shared.0.fc2": "mlp.shared_expert.down_proj",
}
"""parts of names, ours -> theirs; the rest is the same, but for experts and gates"""
GATES = {"token_choice": "mlp.gate.weight", "expert_choice": "mlp.gate_weight", "diffmoe": "mlp.gate_weight"}
"""router -> the official name of `mlp.router.gate`"""
FAMILIES = ("dense", "promoe", "promoe_ec", "token_choice", "expert_choice", "diffmoe")
"""names of routers but for the first: what the official code can train"""


@dataclass(frozen=True)
class Convention:
    """How a checkpoint's time and prediction relate to ours: t in 0..1000 with noise at 1000, v = noise - data."""

    objective: str
    time: str
    """`model.time`"""
    sign: int
    """-1: the velocity is data - noise"""
    guided: str
    """`guidance.channels` of the code that samples such checkpoints"""
    timesteps: str
    """`diffusion.timesteps` of the code that trains them; DDPM has one way"""
    who: str


CONVENTIONS = {
    "promoe": Convention("rectified_flow", "t", 1, "all", "logit_normal", "ProMoE: t in 0..1000, v = noise - data"),
    "sit": Convention(
        "rectified_flow", "1-sigma", -1, "3", "uniform", "SiT, DiffMoE: t from 0 (noise) to 1, v = data - noise"
    ),
    "repa": Convention("rectified_flow", "sigma", 1, "all", "uniform", "REPA: t from 0 (data) to 1, v = noise - data"),
    "ddpm": Convention("ddpm", "t", 1, "3", "logit_normal", "DiT, DiffMoE-DDPM: t in 0..999, noise and variance range"),
}


def sign_of(config: Config) -> int:
    """The sign of the velocity in the layout that a model was, or can be, imported from."""
    return next(c.sign for c in CONVENTIONS.values() if c.time == config.model.time)


def _renamed(name: str, table: dict[str, str]) -> str:
    for old, new in table.items():
        if old in name:
            return name.replace(old, new)
    return name


def _expert_names(config: Config) -> tuple[str, str]:
    prototypes = config.moe is not None and config.moe.router.name.startswith("promoe")
    return ("up_proj", "down_proj") if prototypes else ("fc1", "fc2")


def _rules(config: Config) -> dict[str, str]:
    """`RENAMED` with what depends on the family."""
    if config.moe is None:
        return RENAMED
    first, second = _expert_names(config)
    last = f"mlp.experts.{config.moe.num_experts}"
    rules = {"mlp.unconditional.0.fc1": f"{last}.{first}", "mlp.unconditional.0.fc2": f"{last}.{second}"}
    gate = GATES.get(config.moe.router.name)
    return RENAMED | rules | ({"mlp.router.gate": gate} if gate else {})


def why_not(config: Config) -> str | None:
    """Why the official code has no such model; None if it has."""
    moe = config.moe
    if moe is None:
        return None
    prototypes = moe.router.name.startswith("promoe")
    extra = (1, 1) if prototypes else (0, 0)
    if moe.router.name not in FAMILIES:
        return f"it has no router {moe.router.name}"
    if moe.router_input != "modulated":
        return f"its routers see modulated tokens, not moe.router_input={moe.router_input}"
    usual = type(moe.router)()
    for key in ("score", "renormalise", "bias_rate"):
        if (value := getattr(moe.router, key, None)) != getattr(usual, key, None):
            return f"its routers do not compute moe.router.{key}={value}"
    if (moe.num_shared, moe.num_unconditional if moe.conditional else 0) != extra:
        return f"moe.num_shared and moe.num_unconditional must be {extra[0]} and {extra[1]} there"
    return None


def to_official(state: State, config: Config) -> State:
    """This project's state dict in the official layout; also of meta tensors, to learn names and shapes.

    Tensors may share storage with `state`.
    """
    out: State = {}
    rules, (first, second) = _rules(config), _expert_names(config)
    for name, tensor in state.items():
        layer, _, part = name.partition("mlp.routed.experts.")
        if part == "w3":
            hidden = tensor.shape[-1] - config.model.width
            for e, bias in enumerate(tensor[:, 0]):
                out[f"{layer}mlp.experts.{e}.{first}.bias"] = bias[:hidden]
                out[f"{layer}mlp.experts.{e}.{second}.bias"] = bias[hidden:]
        elif part:
            which = first if part == "w1" else second
            out |= {f"{layer}mlp.experts.{e}.{which}.weight": weight for e, weight in enumerate(tensor)}
        elif name.endswith("mlp.router.updates"):  # theirs keeps the decay instead
            assert config.moe is not None and isinstance(config.moe.router, DiffMoEConfig)
            decay = config.moe.router.threshold_decay
            out[name.replace("router.updates", "ema_decay")] = torch.full_like(tensor, decay, dtype=torch.float32)
        else:
            out[_renamed(name, rules)] = tensor
    return _signed(out, sign_of(config))


def from_official(state: State, config: Config) -> State:
    """An official state dict, whose names and shapes have been checked, in this project's layout."""
    state = _signed(state, sign_of(config))
    back = {new: old for old, new in _rules(config).items()}
    first, second = _expert_names(config)
    out: State = {}
    experts = config.moe.num_experts if config.moe else 0
    for i in config.moe_layers():
        at, to = f"blocks.{i}.mlp.experts", f"blocks.{i}.mlp.routed.experts"
        for part, which in (("w1", first), ("w2", second)):
            out[f"{to}.{part}"] = torch.stack([state.pop(f"{at}.{e}.{which}.weight") for e in range(experts)])
        biases = [[state.pop(f"{at}.{e}.{which}.bias") for which in (first, second)] for e in range(experts)]
        out[f"{to}.w3"] = torch.stack([torch.cat(pair) for pair in biases])[:, None]
    for name, tensor in state.items():
        if name.endswith("mlp.ema_decay"):
            out[name.replace("ema_decay", "router.updates")] = torch.ones_like(tensor)  # the thresholds are set
        else:
            out[_renamed(name, back)] = tensor
    return out


def _signed(state: State, sign: int) -> State:
    flipped = [name for name in state if name.startswith("final_layer.linear.")] if sign < 0 else []
    return state | {name: -state[name] for name in flipped}


def problems(found: State, expected: State) -> list[str]:
    """Every key that is missing, extra, of another shape or no tensor of floats; one line each."""
    lines = [f"{name} is missing" for name in expected if name not in found]
    lines += [f"{name} is unexpected" for name in found if name not in expected]
    for name in found.keys() & expected.keys():
        got, want = found[name], expected[name]
        if got.shape != want.shape:
            lines.append(f"{name} has shape {list(got.shape)}, expected {list(want.shape)}")
        elif not got.dtype.is_floating_point:
            lines.append(f"{name} is {str(got.dtype).removeprefix('torch.')}, expected floats")
    return sorted(lines)


def check_layout(config: Config) -> None:
    """Raises ConfigError if the official code has no such model."""
    text = why_not(config)
    if text is None and config.model.time_divisor != 128:
        text = f"its timestep embedding has model.time_divisor=128, this one {config.model.time_divisor}"
    if text:
        reject("--format", "official", f"the official layout does not hold this model: {text}", "use another --format")


def write_official(ema: Weights, raw: Weights, out: Path) -> Path:
    """Write a .pth file that the official code samples from, and that `promoe-import` reads.

    It holds {step, model_state_dict, ema_model_state_dict}, without optimizer. Where only one kind of weights is known,
    it stands for both.

    Raises:
        ConfigError: the target exists or cannot be written; the official code has no such model.
    """
    check_layout(ema.config)
    check_new(out, "name another file")
    tree: dict[str, object] = {"step": ema.step}
    for key, weights in (("model_state_dict", raw), ("ema_model_state_dict", ema)):
        state = to_official(weights.tensors, weights.config)
        tree[key] = {name: tensor.clone() for name, tensor in state.items()}  # views would be saved whole
    try:
        with making(out.parent), atomic(out, durable=True) as temporary:
            torch.save(tree, temporary)
    except (OSError, RuntimeError) as error:  # torch tells a full disk as a RuntimeError
        reject("--out", out, f"cannot be written ({' '.join(str(error).split())[:200]})", "free space")
    return out
