"""Parameters, floating-point operations and memory, from the configuration alone: no model is built.

Legend: D width, S tokens per image, H hidden width of a dense MLP, F hidden width of an expert, E routed experts,
K experts per token, W world size, ep expert-parallel degree. A MAC is one multiply-add; FLOPs = 2 * MACs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from promoe_ds.config.schema import Config
from promoe_ds.moe.router import ROUTERS, Router

TIMESTEP_FREQUENCIES = 256
DEFAULT_BUCKET = 500_000_000
"""elements that DeepSpeed 0.19.8 reduces at once, at ZeRO stage 0 and where the JSON names no bucket"""

PEAK_FLOPS = {
    "GB200": 2500e12,
    "B200": 2250e12,
    "GH200": 989e12,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H800": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX A6000": 155e12,
    "RTX 4090": 165e12,
    "V100": 125e12,
}
"""Part of a CUDA device name -> dense bf16 FLOP/s of the vendor's data sheet (V100: fp16, it has no bf16)."""


def device_peak(name: str) -> float | None:
    """Peak dense bf16 FLOP/s of `torch.cuda.get_device_name()`; None where it is not known (a CPU, say)."""
    words = f" {name.replace('-', ' ').lower()} "
    known = [part for part in PEAK_FLOPS if f" {part.lower()} " in words]
    return PEAK_FLOPS[max(known, key=len)] if known else None


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of parameters; `total` and `activated` include the fixed position table, as the paper's counts do."""

    by_part: dict[str, int]
    """named parts, whose sum is `total`"""
    activated: int
    """used by one token of a conditional image: K routed experts, all shared ones, no unconditional one"""

    @property
    def total(self) -> int:
        return sum(self.by_part.values())

    @property
    def routed(self) -> int:
        """The part that expert parallelism shards."""
        return self.by_part["routed"]

    @property
    def trainable(self) -> int:
        return self.total - self.by_part["positions"]


def _linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def _mlp(width: int, hidden: int) -> int:
    return _linear(width, hidden) + _linear(hidden, width)


def expert_hidden(config: Config) -> int:
    """F; 0 in a dense model."""
    return int(config.moe.hidden_ratio * config.model.width) if config.moe else 0


def _dense_hidden(config: Config) -> int:
    """H."""
    return int(config.model.mlp_ratio * config.model.width)


def experts_per_token(config: Config) -> int:
    """K, routed experts that a token meets on average (before a quota is rounded down); 0 in a dense model."""
    return getattr(config.moe.router, "top_k", 1) if config.moe else 0


def _router(config: Config) -> Router:
    """One layer's router on `meta`, where sizes cost nothing."""
    assert config.moe is not None
    with torch.device("meta"):
        width = config.moe.router_width(config.model.width)
        return ROUTERS[config.moe.router.name](config.moe.router, config.moe.num_experts, width)


def count_parameters(config: Config) -> ParameterCount:
    """Exact sizes, equal to those of the built model (tests compare them)."""
    m, moe, D = config.model, config.moe, config.model.width
    layers = len(config.moe_layers())
    qk_norm = 4 * (D // m.heads) if m.qk_norm else 0
    pixels, expert, router = m.patch**2, _mlp(D, expert_hidden(config)), 0
    experts = {"shared": 0, "unconditional": 0, "routed": 0}
    if moe:
        unconditional = moe.num_unconditional if moe.conditional else 0
        experts = {"shared": moe.num_shared, "unconditional": unconditional, "routed": moe.num_experts}
        router = sum(p.numel() for p in _router(config).parameters())
    by_part = {
        "patch_embedding": _linear(m.channels * pixels, D),
        "positions": m.tokens * D,
        "timestep_embedding": _linear(TIMESTEP_FREQUENCIES, D) + _linear(D, D),
        "label_embedding": (m.num_classes + 1) * D,
        "attention": m.depth * (_linear(D, 3 * D) + _linear(D, D) + qk_norm),
        "adaln": m.depth * _linear(D, 6 * D),
        "dense_mlp": (m.depth - layers) * _mlp(D, _dense_hidden(config)),
        **{name: layers * number * expert for name, number in experts.items()},
        "router": layers * router,
        "final": _linear(D, 2 * D) + _linear(D, pixels * m.out_channels),
    }
    idle = by_part["routed"] + by_part["unconditional"] - layers * experts_per_token(config) * expert
    return ParameterCount(by_part, sum(by_part.values()) - idle)


def forward_macs(config: Config, null_fraction: float = 0.0) -> float:
    """Multiply-adds of one image's forward pass: matrix products only, activated experts only.

    Args:
        null_fraction: share of null-label images, which meet the unconditional experts instead of K routed ones.
    """
    m, moe, D, S = config.model, config.moe, config.model.width, config.model.tokens
    moe_layers, patch = len(config.moe_layers()), m.patch**2
    per_image = TIMESTEP_FREQUENCIES * D + D * D + m.depth * 6 * D * D + 2 * D * D
    per_token = m.channels * patch * D + D * patch * m.out_channels
    per_token += m.depth * (4 * D * D + 2 * S * D)  # projections; Q K^T and A V
    per_token += (m.depth - moe_layers) * 2 * D * _dense_hidden(config)
    if moe and moe_layers:
        expert, null = 2 * D * expert_hidden(config), null_fraction if moe.conditional else 0.0
        routed = experts_per_token(config) * expert + _router(config).macs_per_token()
        unconditional = moe.num_unconditional * expert
        per_token += moe_layers * (moe.num_shared * expert + (1 - null) * routed + null * unconditional)
    return per_image + S * per_token


def forward_flops(config: Config, null_fraction: float = 0.0) -> float:
    """FLOPs of one image's forward pass, 2 * MACs."""
    return 2 * forward_macs(config, null_fraction)


def train_flops(config: Config, null_fraction: float = 0.0) -> float:
    """FLOPs of one image's training step, 3x forward (backward is two products for each one forward).

    Recomputation under activation checkpointing is not counted: MFU is about the model's own work.
    """
    return 3 * forward_flops(config, null_fraction)


def _held_and_share(config: Config, world: int, ep: int) -> tuple[float, float]:
    """Trained parameters held by one rank, and its even share of all of them under ZeRO.

    The routed part is sharded by ep first and by ZeRO over the expert-data-parallel group W/ep after that, so its ZeRO
    share is (P_routed / ep) / (W / ep) = P_routed / W, like that of the rest.
    """
    count = count_parameters(config)
    return count.trainable - count.routed + count.routed / ep, count.trainable / world


def _optimizer_states(config: Config, world: int, ep: int, stage: int) -> dict[str, float]:
    """fp32 states of one rank. ZeRO keeps a master copy even of fp32 weights; stage 0 steps the weights themselves."""
    held, share = _held_and_share(config, world, ep)
    elements = share if stage else held
    return {
        "master_weights": 4 * elements if stage else 0.0,
        "adam_moments": 8 * elements,
        "ema": 4 * elements * len(config.optimizer.averages()),
    }


def _block_activations(config: Config, is_moe: bool, wide: int, narrow: int) -> float:
    """Bytes that autograd keeps of one block per token; `wide`: residual stream, `narrow`: matrix products.

    The block's input, results of products, and those of GELU; the rest is computed again (`moe/recompute.py`).
    """
    D = config.model.width
    # input; q k v, attention output before and after its projection; logarithms of attention's sums
    kept = D * (wide + 5 * narrow) + 4 * config.model.heads
    if not is_moe or config.moe is None:
        return kept + narrow * (2 * _dense_hidden(config) + D)
    F, E, K = expert_hidden(config), config.moe.num_experts, experts_per_token(config)
    router = E * (8 + narrow) + 36 * K  # scores and memberships; orders, indices and weights of edges
    received = K * narrow * D if config.parallel.expert_parallel > 1 else 0  # else rows are picked again
    return kept + router + received + (K + config.moe.num_shared) * narrow * (2 * F + D)


def activation_bytes(config: Config, images: int) -> float:
    """Estimate of what autograd keeps for the backward pass of `images` images on one rank, balanced load.

    With activation checkpointing: each block's input, plus everything of one block; `selective` also keeps attention's
    output, the choice of experts and, where they come from other ranks, the rows of the experts before and after.
    """
    precision, checkpointing = config.train.precision, config.train.activation_checkpointing
    wide = 2 if "bf16" in (precision, config.train.residual) else 4
    narrow = 4 if precision == "fp32" else 2
    m, moe_layers = config.model, set(config.moe_layers())
    blocks = [_block_activations(config, i in moe_layers, wide, narrow) for i in range(m.depth)]
    per_token = wide * m.width  # the final layer
    if checkpointing == "none":
        return images * m.tokens * (per_token + sum(blocks))
    per_token += m.depth * wide * m.width + max(blocks)
    if checkpointing == "selective":
        K = experts_per_token(config)
        per_token += m.depth * (narrow * m.width + 4 * m.heads) + len(moe_layers) * 28 * K
        sharded = len(moe_layers) if config.parallel.expert_parallel > 1 else 0
        per_token += narrow * m.width * 2 * K * sharded
    return images * m.tokens * per_token


def _largest_block(config: Config, ep: int) -> float:
    count, m = count_parameters(config).by_part, config.model
    layers = len(config.moe_layers())
    common = (count["attention"] + count["adaln"]) / m.depth
    if layers == 0:
        return common + count["dense_mlp"] / m.depth
    return common + (count["shared"] + count["unconditional"] + count["router"] + count["routed"] / ep) / layers


def memory_per_gpu(
    config: Config, world: int, ep: int, stage: int, offload: bool, bucket_elements: int = 0
) -> dict[str, float]:
    """Bytes on one device by part, an estimate: what must be held, without fragmentation or temporaries.

    Args:
        stage: ZeRO stage 0 to 3. The routed part is sharded by ep, its ZeRO group is the world / ep replicas.
        offload: optimizer states (and the gradient shards of stages 2 and 3) in host memory.
        bucket_elements: elements in the gradient buckets of ZeRO (twice the bucket size if they overlap).
    """
    held, share = _held_and_share(config, world, ep)
    size = 2 if config.train.precision == "bf16" else 4
    # whole weights alive beside the shards: two blocks at stage 3; under autocast also the bf16 copies
    copies = min(held, 2 * _largest_block(config, ep)) * size if stage == 3 else 0.0
    if config.train.precision == "bf16_autocast":
        copies += 2 * held
    buckets = bucket_elements if stage else min(DEFAULT_BUCKET, held) if world > 1 else 0
    gradients = held if stage < 2 else share if not offload else 0.0
    states = _optimizer_states(config, world, ep, stage)
    micro = config.train.micro_batch_size or max(1, config.train.global_batch_size // world)
    return {
        "weights": size * ((share if stage == 3 else held) + count_parameters(config).by_part["positions"]),
        "weight_copies": copies,
        "gradients": size * gradients,
        "gradient_buckets": float(size * buckets),
        **{name: 0.0 if offload else value for name, value in states.items()},
        "activations": activation_bytes(config, micro),
    }


def host_memory_per_rank(config: Config, world: int, ep: int, stage: int, offload: bool) -> dict[str, float]:
    """Bytes of host memory that one rank needs for offloaded state; empty without offload."""
    if not offload:
        return {}
    _, share = _held_and_share(config, world, ep)
    return {**_optimizer_states(config, world, ep, stage), "gradients": 4 * share}
