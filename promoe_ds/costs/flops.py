"""Parameters, floating-point operations and memory, from the configuration alone: no model is built.

Legend: D width, S tokens an image, H hidden width of a dense MLP, F hidden width of an expert, E routed experts,
K experts a token, W world size, ep expert-parallel degree. A MAC is one multiply-add; FLOPs = 2 * MACs.
"""

from __future__ import annotations

from dataclasses import dataclass

from promoe_ds.config.schema import Config
from promoe_ds.moe.router import ROUTERS

TIMESTEP_FREQUENCIES = 256
STAGE0_BUCKET = 500_000_000
"""elements that DeepSpeed 0.19.8 flattens for one all-reduce at ZeRO stage 0"""

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
    for part in sorted(PEAK_FLOPS, key=len, reverse=True):
        if f" {part.lower()} " in words:
            return PEAK_FLOPS[part]
    return None


# ---------------------------------------------------------------------------------------------------------- parameters


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


def dense_hidden(config: Config) -> int:
    """H."""
    return int(config.model.mlp_ratio * config.model.width)


def num_unconditional(config: Config) -> int:
    """Unconditional experts a layer that exist: none without the conditional split."""
    return config.moe.num_unconditional if config.moe and config.moe.conditional else 0


def experts_per_token(config: Config) -> int:
    """K, routed experts that a token meets on average (before a quota is rounded down); 0 in a dense model."""
    return getattr(config.moe.router, "top_k", 1) if config.moe else 0


def router_parameters(config: Config) -> int:
    """Parameters of one layer's router, stated by its class; 0 in a dense model."""
    if config.moe is None:
        return 0
    router = ROUTERS[config.moe.router.name]
    return router.num_parameters(config.moe.router, config.moe.num_experts, config.model.width)


def router_macs(config: Config) -> int:
    """MACs a token of one layer's router, stated by its class."""
    assert config.moe is not None
    router = ROUTERS[config.moe.router.name]
    return router.macs_per_token(config.moe.router, config.moe.num_experts, config.model.width)


def count_parameters(config: Config) -> ParameterCount:
    """Exact sizes, equal to those of the built model (the dry run compares them)."""
    m, moe, D = config.model, config.moe, config.model.width
    layers = len(config.moe_layers())
    expert = _mlp(D, expert_hidden(config))
    qk_norm = 4 * (D // m.heads) if m.qk_norm else 0
    pixels = m.patch**2
    by_part = {
        "patch_embedding": _linear(m.channels * pixels, D),
        "positions": m.tokens * D,
        "timestep_embedding": _linear(TIMESTEP_FREQUENCIES, D) + _linear(D, D),
        "label_embedding": (m.num_classes + 1) * D,
        "attention": m.depth * (_linear(D, 3 * D) + _linear(D, D) + qk_norm),
        "adaln": m.depth * _linear(D, 6 * D),
        "dense_mlp": (m.depth - layers) * _mlp(D, dense_hidden(config)),
        "shared": layers * (moe.num_shared if moe else 0) * expert,
        "unconditional": layers * num_unconditional(config) * expert,
        "routed": layers * (moe.num_experts if moe else 0) * expert,
        "router": layers * router_parameters(config),
        "final": _linear(D, 2 * D) + _linear(D, pixels * m.out_channels),
    }
    idle = by_part["routed"] + by_part["unconditional"] - layers * experts_per_token(config) * expert
    return ParameterCount(by_part, sum(by_part.values()) - idle)


# --------------------------------------------------------------------------------------------------------------- FLOPs


def _moe_macs(config: Config, null_fraction: float) -> float:
    """MACs a token in one MoE layer."""
    assert config.moe is not None
    one_expert = 2 * config.model.width * expert_hidden(config)
    routed = experts_per_token(config) * one_expert + router_macs(config)
    null = num_unconditional(config) * one_expert
    if not config.moe.conditional:
        null_fraction = 0.0
    return config.moe.num_shared * one_expert + (1 - null_fraction) * routed + null_fraction * null


def forward_macs(config: Config, null_fraction: float = 0.0) -> float:
    """Multiply-adds of one image's forward pass: matrix products only, activated experts only.

    Args:
        null_fraction: share of null-label images, which meet the unconditional experts instead of K routed ones.
    """
    m, D, S = config.model, config.model.width, config.model.tokens
    moe_layers = len(config.moe_layers())
    patch = m.patch**2
    per_image = TIMESTEP_FREQUENCIES * D + D * D + m.depth * 6 * D * D + 2 * D * D
    per_token = m.channels * patch * D + D * patch * m.out_channels
    per_token += m.depth * (4 * D * D + 2 * S * D)  # projections; Q K^T and A V
    per_token += (m.depth - moe_layers) * 2 * D * dense_hidden(config)
    if moe_layers:
        per_token += moe_layers * _moe_macs(config, null_fraction)
    return per_image + S * per_token


def forward_flops(config: Config, null_fraction: float = 0.0) -> float:
    """FLOPs of one image's forward pass, 2 * MACs."""
    return 2 * forward_macs(config, null_fraction)


def train_flops(config: Config, null_fraction: float = 0.0) -> float:
    """FLOPs of one image's training step, 3x forward (backward is two products for each one forward).

    Recomputation under activation checkpointing is not counted: MFU is about the model's own work.
    """
    return 3 * forward_flops(config, null_fraction)


# -------------------------------------------------------------------------------------------------------------- memory


@dataclass(frozen=True)
class _Shard:
    """Parameters held by one rank, and its even share of all of them under ZeRO.

    The routed part is sharded by ep first and by ZeRO over the expert-data-parallel group W/ep after that, so its ZeRO
    share is (P_routed / ep) / (W / ep) = P_routed / W, like that of the rest.
    """

    held: float
    share: float
    fixed: int

    @staticmethod
    def of(config: Config, world: int, ep: int) -> _Shard:
        count = count_parameters(config)
        trainable, fixed = count.trainable, count.by_part["positions"]
        return _Shard(trainable - count.routed + count.routed / ep, trainable / world, fixed)


def _optimizer_states(shard: _Shard, stage: int) -> dict[str, float]:
    """fp32 states of one rank. ZeRO keeps a master copy even of fp32 weights; stage 0 steps the weights themselves."""
    elements = shard.share if stage else shard.held
    return {
        "master_weights": 4 * elements if stage else 0.0,
        "adam_moments": 8 * elements,
        "ema": 4 * elements,
    }


def micro_batch(config: Config, world: int) -> int:
    """Images a rank a forward."""
    return config.train.micro_batch_size or max(1, config.train.global_batch_size // world)


def _block_activations(config: Config, is_moe: bool, wide: int, narrow: int) -> float:
    """Bytes that autograd keeps of one block, a token. `wide`: residual stream and norms; `narrow`: matrix products."""
    D = config.model.width
    # wide: both norms' inputs and outputs; narrow: qkv and MLP inputs, q k v, attention output, both gated outputs
    kept = D * (4 * wide + 8 * narrow)
    if not is_moe or config.moe is None:
        return kept + 2 * narrow * dense_hidden(config)
    F, K = expert_hidden(config), experts_per_token(config)
    router = D * (4 if narrow == 4 else 8)  # normalised tokens, and their fp32 source where it is not kept anyway
    rows = K * (2 * narrow * D + 2 * narrow * F)  # rows in, hidden before and after GELU, rows out
    return kept + router + rows + config.moe.num_shared * 2 * narrow * F


def activation_bytes(config: Config, images: int) -> float:
    """Estimate of what autograd keeps for the backward pass of `images` images on one rank, balanced load.

    With activation checkpointing: each block's input, plus everything of one block; `selective` also keeps attention's
    output and, counted as if all came from other ranks, the rows of the experts before and after.
    """
    wide = 2 if config.train.precision == "bf16" else 4
    narrow = 4 if config.train.precision == "fp32" else 2
    m, moe_layers = config.model, set(config.moe_layers())
    blocks = [_block_activations(config, i in moe_layers, wide, narrow) for i in range(m.depth)]
    per_token = 2 * wide * m.width + narrow * m.width  # the final layer
    if config.train.activation_checkpointing != "none":
        per_token += m.depth * wide * m.width + max(blocks)
        if config.train.activation_checkpointing == "selective":
            sharded = len(moe_layers) if config.parallel.expert_parallel > 1 else 0
            per_token += narrow * m.width * (m.depth + 2 * experts_per_token(config) * sharded)
    else:
        per_token += sum(blocks)
    return images * m.tokens * per_token


def _gradient_bytes(shard: _Shard, stage: int, offload: bool, narrow: int) -> float:
    if stage < 2:
        return narrow * shard.held
    return 0.0 if offload else narrow * shard.share


def _largest_block(config: Config, ep: int) -> float:
    count, m = count_parameters(config).by_part, config.model
    layers = len(config.moe_layers())
    common = (count["attention"] + count["adaln"]) / m.depth
    if layers == 0:
        return common + count["dense_mlp"] / m.depth
    return common + (count["shared"] + count["unconditional"] + count["router"] + count["routed"] / ep) / layers


def _gathered_bytes(config: Config, shard: _Shard, ep: int, stage: int, weight: int) -> float:
    """Whole weights alive beside the shards: two blocks at stage 3; under autocast also the bf16 copies."""
    whole = min(shard.held, 2 * _largest_block(config, ep)) * weight if stage == 3 else 0.0
    return whole + (2 * shard.held if config.train.precision == "bf16_autocast" else 0.0)


def memory_per_gpu(
    config: Config, world: int, ep: int, stage: int, offload: bool, bucket_elements: int = 0
) -> dict[str, float]:
    """Bytes on one device by part, an estimate: what must be held, without fragmentation or temporaries.

    Args:
        stage: ZeRO stage 0 to 3. The routed part is sharded by ep, its ZeRO group is the world / ep replicas.
        offload: optimizer states (and the gradient shards of stages 2 and 3) in host memory.
        bucket_elements: elements in the gradient buckets of ZeRO (twice the bucket size if they overlap).
    """
    shard = _Shard.of(config, world, ep)
    size = 2 if config.train.precision == "bf16" else 4
    states = _optimizer_states(shard, stage)
    buckets = bucket_elements if stage else (min(STAGE0_BUCKET, shard.held) if world > 1 else 0)
    return {
        "weights": size * ((shard.share if stage == 3 else shard.held) + shard.fixed),
        "weight_copies": _gathered_bytes(config, shard, ep, stage, size),
        "gradients": _gradient_bytes(shard, stage, offload, size),
        "gradient_buckets": float(size * buckets),
        **{name: 0.0 if offload else value for name, value in states.items()},
        "activations": activation_bytes(config, micro_batch(config, world)),
    }


def host_memory_per_rank(config: Config, world: int, ep: int, stage: int, offload: bool) -> dict[str, float]:
    """Bytes of host memory that one rank needs for offloaded state; empty without offload."""
    if not offload:
        return {}
    shard = _Shard.of(config, world, ep)
    return {**_optimizer_states(shard, stage), "gradients": 4 * shard.share}
