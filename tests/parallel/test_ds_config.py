"""The DeepSpeed JSON: what is filled in, what is refused, and whether the known keys are the installed DeepSpeed's."""

from __future__ import annotations

import ast
import json
import math
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from promoe_ds.config.batching import batch_plan, check_topology
from promoe_ds.config.errors import ConfigError
from promoe_ds.config.schema import Config
from promoe_ds.models.init import build
from promoe_ds.parallel import ds_config
from promoe_ds.parallel.ds_config import resolve
from promoe_ds.parallel.ds_values import LEVELS, PASSED, FlopsProfiler
from promoe_ds.recipes.load import load_config

SHIPPED = sorted((Path(__file__).parents[2] / "ds_configs").glob("*.json"))
STAGES = {
    "zero0": (0, False),
    "zero1": (1, False),
    "zero2": (2, False),
    "zero3": (3, False),
    "zero2_offload": (2, True),
    "zero3_offload": (3, True),
}


def config(*overrides: str) -> Config:
    return load_config("imagenet256_promoe_s", overrides)


class Folder:
    """Writes a ds_config and resolves it, as a start does."""

    def __init__(self, path: Path):
        self.file = path / "ds.json"

    def resolve(self, tree: Any, *overrides: str, world: int = 2) -> ds_config.ResolvedDS:
        self.file.write_text(tree if isinstance(tree, str) else json.dumps(tree), encoding="utf-8")
        return resolve(str(self.file), config(*overrides), world)

    def error(self, tree: Any, *overrides: str, world: int = 2) -> str:
        with pytest.raises(ConfigError) as caught:
            self.resolve(tree, *overrides, world=world)
        message = str(caught.value)
        assert "\n" not in message and "; " in message
        return message


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


# ------------------------------------------------------------------------------------------------------- what is filled


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_the_shipped_files(path: Path) -> None:
    for precision in ("fp32", "bf16_autocast", *(["bf16"] if path.stem != "zero0" else [])):
        ds = resolve(str(path), config(f"train.precision={precision}", "parallel.expert_parallel=2"), 4)
        assert (ds.stage, ds.offload) == STAGES[path.stem]
        assert ds.json["bf16"]["enabled"] == (precision == "bf16")
        assert ds.json["torch_autocast"]["enabled"] == (precision == "bf16_autocast")


def test_all_stages_are_shipped() -> None:
    assert {path.stem for path in SHIPPED} == set(STAGES)


def test_our_keys(folder: Folder) -> None:
    ds = folder.resolve({"zero_optimization": {"stage": 2}}, "train.micro_batch_size=32", world=4)
    assert (ds.json["train_batch_size"], ds.json["train_micro_batch_size_per_gpu"]) == (256, 32)
    assert ds.json["gradient_accumulation_steps"] == 2 and ds.json["gradient_clipping"] == 0.5
    assert ds.json["zero_allow_untested_optimizer"] is True and ds.json["zero_force_ds_cpu_optimizer"] is False
    assert ds.json["torch_autocast"]["lower_precision_safe_modules"] == []


def test_without_a_file_it_is_stage_0() -> None:
    ds = resolve(None, config(), 1)
    assert (ds.stage, ds.offload, ds.json["zero_optimization"]) == (0, False, {"stage": 0})


def test_stage_0_leaves_clipping_to_the_engine(folder: Folder) -> None:
    assert folder.resolve({}).json["gradient_clipping"] == 0.0
    assert folder.resolve({"gradient_clipping": 0.5}).json["gradient_clipping"] == 0.0


def test_a_file_may_repeat_what_we_say(folder: Folder) -> None:
    tree = {
        "train_batch_size": 256,
        "gradient_clipping": 0.5,
        "train_micro_batch_size_per_gpu": "auto",
        "bf16": {"enabled": "auto"},
        "torch_autocast": {"enabled": True},
        "zero_optimization": {"stage": 1},
    }
    assert folder.resolve(tree).json["train_micro_batch_size_per_gpu"] == 128
    assert folder.resolve({"bf16": "auto"}).json["bf16"] == {"enabled": False}


def test_deepspeeds_own_keys_pass(folder: Folder) -> None:
    tree = {"comms_logger": {"enabled": True}, "wall_clock_breakdown": True}
    tree |= {"flops_profiler": {"enabled": False, "profile_step": 3, "output_file": None}, "disable_python_gc": False}
    assert folder.resolve(tree).json.items() >= tree.items()


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_deepspeed_reads_the_result(path: Path) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    ds = resolve(str(path), config(), 1)
    read = DeepSpeedConfig(ds.json)
    assert (read.train_batch_size, read.train_micro_batch_size_per_gpu) == (256, 256)
    assert read.gradient_accumulation_steps == 1
    assert read.zero_optimization_stage == ds.stage and read.torch_autocast_enabled
    assert read.torch_autocast_lower_precision_safe_modules == []
    assert read.gradient_clipping == (0.5 if ds.stage else 0.0)


# --------------------------------------------------------------------------------------------------- what is a conflict


@pytest.mark.parametrize(
    ("tree", "text"),
    [
        ({"train_batch_size": 64}, "train_batch_size=64: contradicts 256 from train.global_batch_size"),
        ({"train_micro_batch_size_per_gpu": 1}, "contradicts 128 from train.micro_batch_size"),
        ({"gradient_accumulation_steps": 2}, "contradicts 1 from train.global_batch_size / "),
        ({"gradient_clipping": 1.0}, "gradient_clipping=1.0: contradicts 0.5 from optimizer.clip_grad_norm"),
        ({"bf16": {"enabled": True}}, 'contradicts {"enabled": false} from train.precision'),
        ({"bf16": {"check_grad_overflow": True}}, "from train.precision"),
        ({"torch_autocast": {"enabled": False}}, "from train.precision"),
        ({"steps_per_print": 10}, "the trainer does this itself (train.log_every)"),
        ({"zero_allow_untested_optimizer": 1}, "contradicts true"),
        ({"optimizer": {"type": "Adam"}}, "the optimizer lives in the section `optimizer`"),
        ({"scheduler": {}}, "lives in optimizer.lr and optimizer.schedule"),
        ({"fp16": {"enabled": True}}, "precision lives in train.precision"),
        ({"expert_parallel": {"enabled": True}}, "experts are sharded by parallel.expert_parallel"),
        ({"tensor_parallel": {}}, "there is no tensor parallelism"),
        ({"pipeline": {}}, "there is no pipeline parallelism"),
        ({"activation_checkpointing": {}}, "it lives in train.activation_checkpointing"),
        ({"prescale_gradients": True}, "it changes how expert gradients are averaged"),
        ({"elasticity": {}}, "elasticity={}: unknown key, which DeepSpeed would ignore or stumble over"),
        ({"zero_optimisation": {"stage": 2}}, "did you mean 'zero_optimization'?"),
        ({"quokka": 1}, "quokka=1: unknown key, which DeepSpeed would ignore or stumble over; remove it"),
        ({"zero_optimization": {"stage": 2, "overlap_com": True}}, "did you mean 'overlap_comm'?"),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage=4: is not a ZeRO stage"),
        ({"zero_optimization": {"stage": "2"}}, 'zero_optimization.stage="2": is not a ZeRO stage'),
        ({"zero_optimization": {"stage": "auto"}}, 'zero_optimization.stage="auto": is not a ZeRO stage'),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": "auto"}}, "nobody decides it"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "auto"}}}, "nobody decides it"),
        ({"zero_optimization": True}, "zero_optimization=true: expected an object"),
        ({"zero_optimization": {"stage": 3, "zero_quantized_weights": True}}, "no quantised communication"),
        ({"zero_optimization": {"stage": 2, "compute_grad_norm": False}}, "clipped by optimizer.clip_grad_norm"),
        ({"zero_optimization": {"stage": 2, "cpu_offload": True}}, "write offload_optimizer"),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "ZeRO stage 0 shards nothing to offload"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": "cpu"}}, "expected an object"),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "gpu"}}},
            "be 'none', 'cpu' or 'nvme'",
        ),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"pin_memry": 1}}}, "did you mean 'pin_memory'?"),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, "needs ZeRO stage 3, the stage is 2"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"super_offload": True}}}, "brings its own optimizer"),
        ({"communication_data_type": "bf16"}, "gradients travel in the precision that train.precision implies"),
        ({"aio": {"block_size": 1024}}, "it is for offload to NVMe, which is untested here"),
        ({"torch_autocast": {"enabled": True, "zebra": 1}}, "from train.precision"),
        ({"zero_optimization": {"stage": 2, "parameter_alignment": True}}, "it pads the parameters that travel"),
    ],
)
def test_conflicts_name_the_file_and_the_owner(folder: Folder, tree: dict[str, Any], text: str) -> None:
    message = folder.error(tree)
    assert text in message, message
    assert message.startswith(f"{folder.file}: ")


def test_untested_offload_is_refused_with_sharded_experts(folder: Folder) -> None:
    tree = {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}
    assert "is untested with parallel.expert_parallel=2" in folder.error(tree, "parallel.expert_parallel=2")
    assert folder.resolve(tree).stage == 3


def test_nvme_is_refused(folder: Folder) -> None:
    tree = {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}
    assert "device=nvme: is untested here; offload to the cpu" in folder.error(tree)


@pytest.mark.parametrize(
    ("tree", "name"),
    [
        ({"flops_profiler": {"enabled": False, "profile_stop": 3}}, "flops_profiler.profile_stop=3"),
        ({"timers": {"throughputs": {"enabled": False}}}, 'timers.throughputs={"enabled": false}'),
        ({"timers": {"throughput": {"enable": "auto"}}}, 'timers.throughput.enable="auto"'),
        ({"comms_logger": {"verbos": True}}, "comms_logger.verbos=true"),
        ({"zero_optimization": {"stage": 1, "overlap_com": "auto"}}, 'zero_optimization.overlap_com="auto"'),
        ({"zero_optimization": {"stage": 1, "prefetch_bucket_size": 9}}, "zero_optimization.prefetch_bucket_size=9"),
        ({"zero_optimization": {"stage": 1, "offload_optimizer": {"pin_memry": "auto"}}}, 'pin_memry="auto"'),
        ({"zero_optimization": {"stage": 3, "leaf_module": {"class": []}}}, "leaf_module.class=[]"),
        ({"dump_state": {"enabled": True}}, "dump_state.enabled=true"),
    ],
)
def test_unknown_keys_are_refused_at_every_depth(folder: Folder, tree: dict[str, Any], name: str) -> None:
    message = folder.error(tree)
    assert f"{name}: unknown key, which DeepSpeed would ignore or stumble over; " in message, message
    assert message.startswith(f"{folder.file}: {next(iter(tree))}.")
    assert "did you mean '" in message or "dump_state" in name


@pytest.mark.parametrize("key", ["contiguous_gradients", "reduce_scatter"])
@pytest.mark.parametrize("off", [False, 0, "false"])
def test_what_sharded_experts_need(folder: Folder, key: str, off: Any) -> None:
    tree = {"zero_optimization": {"stage": 1, key: off}}
    assert "DeepSpeed needs it for sharded experts" in folder.error(tree, "parallel.expert_parallel=2")
    assert folder.resolve(tree).stage == 1
    tree["zero_optimization"]["use_multi_rank_bucket_allreduce"] = False
    assert "DeepSpeed then ignores use_multi_rank_bucket_allreduce=false; remove one of them" in folder.error(tree)


def test_bf16_weights_need_zero(folder: Folder) -> None:
    message = folder.error({}, "train.precision=bf16")
    assert message.startswith("train.precision=bf16: ZeRO stage 0") and "zero1.json" in message
    with pytest.raises(ConfigError, match="no --ds_config"):
        resolve(None, config("train.precision=bf16"), 1)


def test_unreadable_files(folder: Folder, tmp_path: Path) -> None:
    assert "cannot be read as JSON" in folder.error("{")
    assert "the key 'bf16' is written twice" in folder.error('{"bf16": "auto", "bf16": "auto"}')
    assert "is not a mapping; write {" in folder.error("[]")
    with pytest.raises(ConfigError, match="cannot be read"):
        resolve(str(tmp_path / "absent.json"), config(), 1)
    with pytest.raises(ConfigError, match="cannot be read"):
        resolve(str(tmp_path), config(), 1)


# ------------------------------------------------------------------------------------------------------------ topology


def test_batch_plan() -> None:
    assert batch_plan(config(), 8) == (32, 1)
    assert batch_plan(config("train.micro_batch_size=4"), 8) == (4, 8)


@pytest.mark.parametrize(
    ("overrides", "world", "text"),
    [
        ([], 3, r"train\.global_batch_size=256: is not divisible by the world size 3; choose for example 255, 258"),
        (["train.global_batch_size=2"], 4, "choose for example 4, or another number of processes"),
        (["train.micro_batch_size=48"], 2, r"micro_batch_size=48: .*=256 .* = 48 \* 2; choose one of 1, 2, 4, 8, 16"),
        (["train.micro_batch_size=24"], 9, "is not divisible by the world size 9; choose for example 216, 432"),
        (["parallel.expert_parallel=4"], 2, r"expert_parallel=4: does not divide the world size 2; choose one of 1, 2"),
        (["parallel.expert_parallel=3"], 4, "choose one of 1, 2, 4, or a multiple of 3 processes"),
        ([], 0, "world size=0: is not a number of processes"),
    ],
)
def test_topologies_that_cannot_be(overrides: list[str], world: int, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        check_topology(config(*overrides), world)
    with pytest.raises(ConfigError, match=text):
        resolve(None, config(*overrides), world)


# --------------------------------------------------------------------------------------- the installed DeepSpeed's keys


def test_no_key_is_in_two_lists() -> None:
    assert not set(PASSED) & set(ds_config.OWNERS) and not set(PASSED) & set(ds_config.REFUSED)
    assert not set(ds_config.OWNERS) & set(ds_config.REFUSED)


def test_refused_zero_keys_are_those_of_deepspeed() -> None:
    assert set(ds_config.ZERO_REFUSED) <= set(PASSED["zero_optimization"])


def test_top_level_keys_are_known_to_deepspeed() -> None:
    """Each key we pass or write is a string somewhere in DeepSpeed's sources for configurations."""
    import deepspeed

    root = Path(deepspeed.__file__).parent
    files = [
        "runtime/constants.py",
        "runtime/config.py",
        "runtime/precision_config.py",
        "comm/constants.py",
        "profiling/constants.py",
        "runtime/zero/config.py",
        "runtime/swap_tensor/constants.py",
        "utils/config.py",
    ]
    words = {
        node.value
        for name in files
        for node in ast.walk(ast.parse((root / name).read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    assert set(PASSED) | set(ds_config.OWNERS) <= words


def test_the_removed_keys_are_refused() -> None:
    from deepspeed.runtime import config as theirs

    assert not set(theirs._REMOVED_TOP_LEVEL_CONFIG_KEYS) & {*PASSED, *ds_config.OWNERS}


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"zero_optimization": {"stage": 2, "reduce_bucket_size": -5}},
         "zero_optimization.reduce_bucket_size=-5: Input should be greater than 0; change the value"),
        ({"zero_optimization": {"stage": 3, "stage3_max_live_parameters": "many"}},
         'zero_optimization.stage3_max_live_parameters="many": Input should be a valid integer'),
        ({"wall_clock_breakdown": "maybe"}, 'wall_clock_breakdown="maybe": Input should be a valid boolean'),
        ({"memory_breakdown": 5}, "memory_breakdown=5: Input should be a valid boolean"),
        ({"dump_state": {}}, "dump_state={}: Input should be a valid boolean"),
        ({"disable_python_gc": None}, "disable_python_gc=null: Input should be a valid boolean"),
        ({"log_level": 5}, "log_level=5: Input should be a valid string"),
        ({"log_level": "loud"}, 'log_level="loud": Value error, loud is not one of the valid logging levels'),
        ({"comms_logger": {"verbose": "maybe"}}, 'comms_logger.verbose="maybe": Input should be a valid boolean'),
        ({"flops_profiler": {"enabled": True}, "comms_logger": {"enabled": "maybe"}}, 'comms_logger.enabled="maybe"'),
        ({"timers": {"throughput": {"enabled": "maybe"}}}, 'timers.throughput.enabled="maybe"'),
        ({"timers": {"throughput": None}}, "timers.throughput=null: Input should be a valid dictionary"),
        ({"flops_profiler": {"enabled": "auto"}}, 'flops_profiler.enabled="auto": Input should be a valid boolean'),
        ({"flops_profiler": {"enabled": True, "profile_step": "a"}}, 'flops_profiler.profile_step="a": Input should'),
        ({"flops_profiler": {"profile_step": -1}}, "flops_profiler.profile_step=-1: Input should be greater than"),
        ({"flops_profiler": {"profile_step": True}}, "flops_profiler.profile_step=true: Input should be a valid int"),
        ({"flops_profiler": {"module_depth": "x"}}, 'flops_profiler.module_depth="x": Input should be a valid int'),
        ({"flops_profiler": {"module_depth": 6}}, "flops_profiler.module_depth=6: Input should be less than or equal"),
        ({"flops_profiler": {"top_modules": -1}}, "flops_profiler.top_modules=-1: Input should be greater than"),
        ({"flops_profiler": {"detailed": "no"}}, 'flops_profiler.detailed="no": Input should be a valid boolean'),
        ({"flops_profiler": {"recompute_fwd_factor": math.nan}}, "recompute_fwd_factor=NaN: Input should be a finite"),
        ({"flops_profiler": {"output_file": "a\0"}}, 'output_file="a\\u0000": Value error, holds a NUL character'),
        ({"flops_profiler": {"output_file": 5}}, "flops_profiler.output_file=5: Input should be a valid string"),
    ],
)  # fmt: skip
def test_values_that_deepspeed_cannot_read_are_named(folder: Folder, tree: Any, message: str) -> None:
    assert folder.error(tree).startswith(f"{folder.file}: ") and message in folder.error(tree)


def test_every_model_has_the_levels_that_the_profiler_may_be_asked_for() -> None:
    def levels(module: nn.Module) -> int:
        return 1 + max(map(levels, module.children()), default=0)

    assert min(levels(build(load_config(name))) for name in ("digits", "digits_dense", "digits_ec")) == LEVELS


def test_the_model_of_the_profiler_is_deepspeeds_section() -> None:
    from deepspeed.profiling.config import DeepSpeedFlopsProfilerConfig

    assert FlopsProfiler().model_dump() == vars(DeepSpeedFlopsProfilerConfig({}))


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_deepspeed_reads_the_shipped_files_for_any_number_of_ranks(file: Path) -> None:
    for world in (1, 8):
        resolve(str(file), config(), world)
