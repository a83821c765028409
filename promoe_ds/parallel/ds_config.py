"""From a DeepSpeed JSON and our configuration to the one JSON that DeepSpeed gets.

A ds_config holds only what DeepSpeed alone understands (ZeRO stage, buckets, offload, profilers). Batch sizes,
precision and clipping come from the `Config`; a file that repeats them must agree. DeepSpeed 0.19.8 ignores unknown
top-level keys without a word, so everything is an error that is neither ours nor in `ds_values.PASSED`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from promoe_ds.config.batching import batch_plan, check_topology
from promoe_ds.config.decode import read_mapping
from promoe_ds.config.errors import did_you_mean, reject
from promoe_ds.config.schema import Config
from promoe_ds.parallel.ds_values import PASSED, check_keys, read_values, try_out, unknown

SHIPPED = Path(__file__).parents[1] / "ds_configs"
"""the folder of ready-made files"""
OWNERS = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size / (train.micro_batch_size * world size)",
    "gradient_clipping": "optimizer.clip_grad_norm",
    "bf16": "train.precision",
    "torch_autocast": "train.precision",
    "zero_allow_untested_optimizer": "the optimizer with its EMA state",
    "zero_force_ds_cpu_optimizer": "the optimizer with its EMA state",
}
"""Keys we write -> the place in our configuration that decides them."""

_WHY = {
    "the optimizer lives in the section `optimizer` of the recipe": "optimizer",
    "the learning rate lives in optimizer.lr and optimizer.schedule": "scheduler",
    "precision lives in train.precision (fp32, bf16_autocast, bf16)": "fp16 bfloat16 data_types",
    "gradients travel in the precision that train.precision implies": "communication_data_type",
    "it lives in train.activation_checkpointing": "activation_checkpointing",
    "experts are sharded by parallel.expert_parallel, over consecutive ranks": "expert_parallel "
    "use_data_before_expert_parallelism",
    "there is no tensor parallelism": "tensor_parallel",
    "there is no pipeline parallelism": "pipeline",
    "there is no sequence parallelism": "sequence_parallel_size seq_parallel_communication_data_type",
    "it changes how expert gradients are averaged, which is untested with expert parallelism": "prescale_gradients "
    "gradient_predivide_factor gradient_allreduce_op",
    "the trainer does this itself (train.log_every)": "steps_per_print",
    "the trainer does this itself (train.micro_batch_size)": "managed_gradient_accumulation",
    "the trainer does this itself (train.checkpoint_every)": "checkpoint datastates_ckpt",
    "the trainer does this itself (metrics.jsonl, TensorBoard)": "tensorboard wandb comet csv_monitor",
    "the data order is a function of train.seed": "data_efficiency dataloader_drop_last",
    "DeepCompile does not know mixture-of-experts layers": "compile",
    "DeepSpeed's autotuner writes keys that the recipe owns": "autotuning",
    "it is for language-model generation": "hybrid_engine",
    "it is for inference": "weight_quantization",
    "it is for offload to NVMe, which is untested here": "aio",
    "ZeRO needs the all-gather": "disable_allgather",
}
REFUSED = {key: why for why, keys in _WHY.items() for key in keys.split()}
"""Top-level keys that DeepSpeed knows and this project cannot honour -> why."""

_ZERO_WHY = {
    "the gradient norm is logged, and clipped by optimizer.clip_grad_norm": "compute_grad_norm",
    "the trainer's own checkpoints are elastic": "elastic_checkpoint",
    "it has no mixture-of-experts code": "zenflow",
    "it is deprecated: write offload_optimizer or offload_param": "cpu_offload cpu_offload_param "
    "cpu_offload_use_pin_memory",
    "it is deprecated: write stage3_gather_16bit_weights_on_model_save": "stage3_gather_fp16_weights_on_model_save",
    "DeepSpeed removed it in 0.5.9": "legacy_stage1",
    "expert parallelism under ZeRO-3 has no secondary partitions": "zero_hpz_partition_size",
    "expert parallelism has no quantised communication": "zero_quantized_weights "
    "zero_quantized_nontrainable_weights zero_quantized_gradients",
    "the optimizer is AdamW": "save_muon_momentum_buffer_in_memory",
    "it pads the parameters that travel by bytes that comm_volume.py does not know": "parameter_alignment",
}
ZERO_REFUSED = {key: why for why, keys in _ZERO_WHY.items() for key in keys.split()}
"""Keys of `zero_optimization` that this project cannot honour -> why."""


@dataclass(frozen=True)
class ResolvedDS:
    """What `deepspeed.initialize` gets."""

    json: dict[str, Any]
    stage: int
    """ZeRO stage, 0 to 3"""
    offload: bool
    """optimizer states live in host memory"""


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if twice := sorted({key for key in keys if keys.count(key) > 1}):
        raise ValueError(f"the key {twice[0]!r} is written twice")
    return dict(pairs)


def _read(path: str) -> dict[str, Any]:
    parse = partial(json.loads, object_pairs_hook=_no_duplicates)
    return read_mapping("--ds_config", Path(path), parse, "JSON", 'write {"zero_optimization": {"stage": 2}}')


def _check_top_level(file: str, tree: dict[str, Any]) -> None:
    for key, value in tree.items():
        if key in REFUSED:
            reject(f"{file}: {key}", json.dumps(value), REFUSED[key], "remove it from the file")
        if key not in PASSED and key not in OWNERS:
            unknown(f"{file}: {key}", value, key, [*PASSED, *OWNERS, *REFUSED])
    check_keys(f"{file}: ", {key: value for key, value in tree.items() if key in PASSED}, PASSED)


def _check_zero(file: str, zero: dict[str, Any], ep: int) -> None:
    for key, value in zero.items():
        if key in ZERO_REFUSED:
            reject(f"{file}: zero_optimization.{key}", json.dumps(value), ZERO_REFUSED[key], "remove it from the file")
    stage = zero.get("stage", 0)
    if type(stage) is not int or not 0 <= stage <= 3:  # DeepSpeed reads "auto" as 0
        reject(f"{file}: zero_optimization.stage", json.dumps(stage), "is not a ZeRO stage", "choose 0, 1, 2 or 3")
    for key, block in ((key, zero.get(key)) for key in ("offload_optimizer", "offload_param")):
        if block == "auto" or (isinstance(block, dict) and block.get("device") == "auto"):  # ... and this as none
            reject(
                f"{file}: zero_optimization.{key}", json.dumps(block), "nobody decides it", 'write {"device": "cpu"}'
            )
    needed, owner = ("contiguous_gradients", "reduce_scatter"), "use_multi_rank_bucket_allreduce"
    off = [key for key in (*needed, owner) if zero.get(key, True) not in (True, "auto")]
    for key in [key for key in needed if key in off]:
        if ep > 1:
            conflict = f"DeepSpeed needs it for sharded experts (parallel.expert_parallel={ep})"
            reject(f"{file}: zero_optimization.{key}", json.dumps(zero[key]), conflict, "write true")
        if owner in off:
            conflict = f"DeepSpeed then ignores {owner}={json.dumps(zero[owner])}"
            reject(f"{file}: zero_optimization.{key}", json.dumps(zero[key]), conflict, "remove one of them")


def _check_offload(file: str, zero: DeepSpeedZeroConfig, ep: int) -> bool:
    """True if the optimizer states go to the host."""
    optimizer = zero.offload_optimizer.device if zero.offload_optimizer else "none"
    weights = zero.offload_param.device if zero.offload_param else "none"
    stage, where = int(zero.stage), f"{file}: zero_optimization."
    if optimizer != "none" and stage == 0:
        conflict, way_out = "ZeRO stage 0 shards nothing to offload", "set zero_optimization.stage to 1, 2 or 3"
        reject(f"{where}offload_optimizer.device", optimizer, conflict, way_out)
    if weights != "none" and stage != 3:
        way_out = "set zero_optimization.stage to 3 or remove offload_param"
        reject(f"{where}offload_param.device", weights, f"needs ZeRO stage 3, the stage is {stage}", way_out)
    for key, device in (("offload_optimizer", optimizer), ("offload_param", weights)):
        if device == "nvme":
            reject(f"{where}{key}.device", device, "is untested here", "offload to the cpu")
    if ep > 1 and weights != "none":
        conflict = f"is untested with parallel.expert_parallel={ep}"
        way_out = "offload the optimizer instead, or set parallel.expert_parallel=1"
        reject(f"{where}offload_param.device", weights, conflict, way_out)
    if zero.offload_optimizer and zero.offload_optimizer.super_offload:
        conflict = "brings its own optimizer, without the EMA state"
        reject(f"{where}offload_optimizer.super_offload", "true", conflict, "remove it from the file")
    return optimizer != "none"


def _owned(config: Config, world: int, stage: int) -> dict[str, Any]:
    """The keys this project decides.

    Clipping: DeepSpeed's gradient norm at stage 0 averages expert parts over ranks and is wrong under expert
    parallelism (DeepSpeed #8475), so at stage 0 the engine clips by itself and DeepSpeed is told 0, which is also
    written out because its default is 1. Autocast: with no "safe" module classes gradients are reduced in fp32.
    """
    micro, accumulation = batch_plan(config, world)
    precision = config.train.precision
    owned: dict[str, Any] = {
        "train_batch_size": config.train.global_batch_size,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.optimizer.clip_grad_norm if stage else 0.0,
        "steps_per_print": 10**9,  # the trainer prints its own line
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": precision == "bf16"},
        "torch_autocast": {"enabled": precision == "bf16_autocast"},
    }
    if precision == "bf16_autocast":
        owned["torch_autocast"] |= {"dtype": "bfloat16", "lower_precision_safe_modules": []}
    return owned


def _agrees(theirs: Any, ours: Any) -> bool:
    if theirs == "auto":
        return True
    if isinstance(theirs, dict) and isinstance(ours, dict):
        return all(key in ours and _agrees(value, ours[key]) for key, value in theirs.items())
    return theirs == ours and isinstance(theirs, bool) == isinstance(ours, bool)


def _check_owned(file: str, tree: dict[str, Any], owned: dict[str, Any], config: Config) -> None:
    accepted = {**owned, "gradient_clipping": config.optimizer.clip_grad_norm}
    for key, ours in accepted.items():
        if key in tree and not (_agrees(tree[key], ours) or _agrees(tree[key], owned[key])):
            conflict = f"contradicts {json.dumps(ours)} from {OWNERS[key]}"
            way_out = f'remove it from the file or write "auto"; {OWNERS[key]} decides'
            reject(f"{file}: {key}", json.dumps(tree[key]), conflict, way_out)


def find(name_or_path: str) -> str:
    """A path as it is; the name of a shipped file (`zero2`) as its path."""
    if Path(name_or_path).suffix or "/" in name_or_path:
        return name_or_path
    path = SHIPPED / f"{name_or_path}.json"
    if not path.is_file():
        names = sorted(p.stem for p in SHIPPED.glob("*.json"))
        way_out = did_you_mean(name_or_path, names, "choose one, or name a path")
        reject("--ds_config", name_or_path, f"no such file is shipped (known: {', '.join(names)})", way_out)
    return str(path)


def resolve(path: str | None, config: Config, world: int) -> ResolvedDS:
    """The complete DeepSpeed JSON for `config` on `world` processes.

    Args:
        path: a ds_config, or the name of a shipped one; None stands for plain data parallelism at stage 0.

    Raises:
        ConfigError: unreadable file, a key that is unknown or refused, a value that DeepSpeed cannot read or that
            contradicts `config`, or a topology, precision or offload that cannot work.
    """
    path = None if path is None else find(path)
    file = path or "no --ds_config"
    tree = {"zero_optimization": {"stage": 0}} if path is None else _read(path)
    check_topology(config, world)
    _check_top_level(file, tree)
    zero = tree.get("zero_optimization", {})
    _check_zero(file, zero, config.parallel.expert_parallel)
    read = read_values(file, tree).zero_optimization
    stage, offload = int(read.stage), _check_offload(file, read, config.parallel.expert_parallel)
    if config.train.precision == "bf16" and stage == 0:
        # DeepSpeed's unfused 16-bit optimizer, taken at stage 0, leaves expert gradients out of its norm (#8613).
        conflict = f"ZeRO stage 0 ({file}) computes a wrong gradient norm with bf16 weights"
        way_out = "use --ds_config ds_configs/zero1.json or a higher stage, or train.precision=bf16_autocast"
        reject("train.precision", "bf16", conflict, way_out)
    if config.train.compile and stage == 3:
        conflict = f"ZeRO stage 3 ({file}) gathers weights module by module, which a compiled graph cannot see"
        reject("train.compile", "true", conflict, "use a lower stage, or train.compile=false")
    owned = _owned(config, world, stage)
    _check_owned(file, tree, owned, config)
    resolved = {**tree, **owned, "zero_optimization": {**zero, "stage": stage}}
    try_out(file, resolved)
    return ResolvedDS(resolved, stage, offload)
