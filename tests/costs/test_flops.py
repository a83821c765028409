"""Sizes, FLOPs and memory from the configuration, against the paper, the built model and measured activations."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from promoe_ds.config.schema import Config
from promoe_ds.costs import dry_run, flops
from promoe_ds.models.init import build, materialize
from promoe_ds.moe.experts import StackedExperts
from promoe_ds.parallel.ds_config import resolve
from promoe_ds.recipes.load import load_config

DS_CONFIGS = Path(__file__).parents[2] / "ds_configs"
PROMOE = {
    "s": (75_543_584, 32_993_312, 6.06),
    "b": (300_607_520, 130_572_320, 23.0),
    "l": (1_062_684_704, 458_262_560, 80.7),
    "xl": (1_567_733_792, 675_339_296, 118.6),
}
"""total, activated (exact); 1e9 MACs an image"""
DENSE = {"s": 32_963_360, "b": 130_512_416, "l": 458_102_816, "xl": 675_129_632}
BASELINES = [
    ("tc_s", 82_607_648, None),
    ("tc_b", 328_891_424, None),
    ("tc_l", 1_163_274_272, 458_201_120),
    ("tc_xl", 1_716_272_672, None),
    ("ec_s", 82_607_648, None),
    ("ec_b", 328_891_424, None),
    ("ec_l", 1_163_274_272, 458_201_120),
    ("ec_xl", 1_716_272_672, None),
    ("diffmoe_s", 83_513_168, None),
    ("diffmoe_s_e16", 140_265_344, None),
    ("diffmoe_b", 332_471_888, None),
    ("diffmoe_l", 1_175_967_872, 470_894_720),
    ("diffmoe_l_e16", 1_981_962_464, 471_091_424),
    ("diffmoe_xl", 1_734_997_392, None),
    *((f"promoe_ec_{size}", total, activated) for size, (total, activated, _) in PROMOE.items()),
]
"""recipe, total, activated (exact)"""
EXPERT_SCALING = {4: 558.9, 6: 659.6, 8: 760.4, 10: 861.2, 12: 961.9, 14: 1062.7, 16: 1163.4}
"""experts of ProMoE-L, shared and unconditional included -> millions of parameters"""
MIXES = """
model.qk_norm=true model.learn_sigma=false moe=null moe.layers=all moe.conditional=false moe.num_shared=2
moe.num_unconditional=3 moe.hidden_ratio=1.5 moe.num_experts=5 moe.router_input=plain+t
""".split()


# ---------------------------------------------------------------------------------------------------------- parameters


@pytest.mark.parametrize("size", PROMOE)
def test_promoe_sizes_of_the_paper(size: str) -> None:
    config = load_config(f"imagenet256_promoe_{size}")
    count = flops.count_parameters(config)
    total, activated, macs = PROMOE[size]
    assert (count.total, count.activated) == (total, activated)
    assert flops.forward_macs(config) / 1e9 == pytest.approx(macs, rel=0.01)
    assert count.routed / count.total == pytest.approx(0.566, abs=0.004)


@pytest.mark.parametrize("size", DENSE)
def test_dense_sizes_of_the_paper(size: str) -> None:
    config = load_config(f"imagenet256_dense_{size}")
    count = flops.count_parameters(config)
    assert count.total == count.activated == DENSE[size] and count.routed == 0
    assert flops.forward_macs(config) / 1e9 == pytest.approx(PROMOE[size][2], rel=0.01)


def test_variants_of_the_paper() -> None:
    def count(*overrides: str) -> flops.ParameterCount:
        return flops.count_parameters(load_config("imagenet256_promoe_l", overrides))

    assert count("moe.router.top_k=3").activated == 558_999_584
    assert count("moe.router.top_k=3").total == PROMOE["l"][0]
    assert count("model.qk_norm=true").total == 1_062_690_848
    assert count().trainable == 1_062_422_560
    assert count("moe.num_experts=6").total == pytest.approx(760.4e6, rel=1e-4)


@pytest.mark.parametrize(("recipe", "total", "activated"), BASELINES)
def test_baseline_sizes_of_the_paper(recipe: str, total: int, activated: int | None) -> None:
    count = flops.count_parameters(load_config(f"imagenet256_{recipe}"))
    assert count.total == total and activated in (None, count.activated)


def count_built(config: Config) -> dict[str, int]:
    model = build(config)
    stacks = [module for module in model.modules() if isinstance(module, StackedExperts)]
    return {
        "total": sum(p.numel() for p in model.parameters()),
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "routed": sum(p.numel() for stack in stacks for p in stack.parameters()),
    }


@pytest.mark.parametrize("recipe", ["tc", "ec", "diffmoe", "promoe_ec", "kmeans", "classification"])
def test_count_equals_the_built_baseline(recipe: str) -> None:
    config = load_config(f"digits_{recipe}")
    built, count = count_built(config), flops.count_parameters(config)
    assert built == {"total": count.total, "trainable": count.trainable, "routed": count.routed}


@pytest.mark.parametrize(("total_experts", "size"), list(EXPERT_SCALING.items()))
def test_expert_scaling_of_the_paper(total_experts: int, size: float) -> None:
    config = load_config("imagenet256_promoe_l", [f"moe.num_experts={total_experts - 2}"])
    assert flops.count_parameters(config).total / 1e6 == pytest.approx(size, abs=0.05)


@pytest.mark.parametrize("override", MIXES)
def test_count_equals_the_built_model(override: str) -> None:
    config = load_config("digits", [override])
    built, count = count_built(config), flops.count_parameters(config)
    assert built == {"total": count.total, "trainable": count.trainable, "routed": count.routed}
    assert set(count.by_part) >= {"attention", "routed", "router"} and min(count.by_part.values()) >= 0


# --------------------------------------------------------------------------------------------------------------- FLOPs


def test_flops_follow_the_activated_experts() -> None:
    base = load_config("imagenet256_promoe_s")
    forward = flops.forward_flops(base)
    assert forward == 2 * flops.forward_macs(base) and flops.train_flops(base) == 3 * forward
    more = load_config("imagenet256_promoe_s", ["moe.router.top_k=3"])
    extra = 6 * 256 * 2 * 2 * 384 * 768 * 2  # layers, tokens, experts, matrices, their size, FLOPs a MAC
    assert flops.forward_flops(more) - forward == extra
    # images without a label meet one unconditional expert instead of three routed ones, and no router
    router = 6 * 256 * 12 * 384 * 2
    assert forward - flops.forward_flops(more, null_fraction=1.0) == router


def test_without_the_split_null_images_cost_the_same() -> None:
    config = load_config("imagenet256_promoe_s", ["moe.conditional=false"])
    assert flops.forward_flops(config, null_fraction=0.5) == flops.forward_flops(config)


@pytest.mark.parametrize("recipe", ["digits", "digits_tc", "digits_kmeans", "digits_ec"])
def test_flops_equal_those_torch_counts(recipe: str) -> None:
    config = load_config(recipe, ["moe.experts_backend=loop"])
    m, images = config.model, 3
    model = materialize(build(config), seed=0).eval()
    # the counter knows the plain products of attention, not the fused CPU kernel
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(torch.zeros(images, m.channels, m.image_size, m.image_size), torch.zeros(images), torch.arange(images))
    assert counter.get_total_flops() == pytest.approx(images * flops.forward_flops(config), rel=1e-6)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H20", 148e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("Tesla V100-SXM2-32GB", 125e12),
        ("NVIDIA L40", None),
        ("cpu", None),
    ],
)
def test_device_peaks(name: str, peak: float | None) -> None:
    assert flops.device_peak(name) == peak


# -------------------------------------------------------------------------------------------------------------- memory


def memory(stage: int, world: int = 1, ep: int = 1, offload: bool = False, *overrides: str) -> dict[str, float]:
    config = load_config("imagenet256_promoe_s", ["train.precision=fp32", *overrides])
    return flops.memory_per_gpu(config, world, ep, stage, offload)


def test_state_of_one_device_at_stage_0() -> None:
    count = flops.count_parameters(load_config("imagenet256_promoe_s"))
    parts = memory(0)
    assert parts["weights"] == 4 * count.total and parts["gradients"] == 4 * count.trainable
    assert parts["adam_moments"] == 2 * parts["ema"] == 8 * count.trainable and parts["master_weights"] == 0


def test_expert_parallelism_shards_the_routed_part_only() -> None:
    count = flops.count_parameters(load_config("imagenet256_promoe_s"))
    for stage in (0, 1, 2):
        assert memory(stage, 4)["weights"] - memory(stage, 4, 4)["weights"] == 4 * count.routed * 3 / 4
    assert memory(0, 4)["ema"] - memory(0, 4, 4)["ema"] == 4 * count.routed * 3 / 4
    for part in ("adam_moments", "ema", "master_weights"):  # ZeRO over W/ep replicas: the same share for every ep
        assert memory(2, 4)[part] == memory(2, 4, 4)[part]


def test_each_stage_shards_more() -> None:
    count = flops.count_parameters(load_config("imagenet256_promoe_s"))
    assert memory(1, 8)["ema"] == count.trainable / 2 and memory(1, 8)["gradients"] == 4 * count.trainable
    assert memory(2, 8)["gradients"] == count.trainable / 2
    assert memory(3, 8)["weights"] < memory(2, 8)["weights"] / 7
    assert 0 < memory(3, 8)["weight_copies"] < memory(2, 8)["weights"]


def test_offload_moves_the_states_to_the_host() -> None:
    config = load_config("imagenet256_promoe_s")
    parts, host = memory(2, 4, 2, True), flops.host_memory_per_rank(config, 4, 2, 2, True)
    assert parts["adam_moments"] == parts["ema"] == parts["master_weights"] == parts["gradients"] == 0
    assert host["adam_moments"] == memory(2, 4, 2)["adam_moments"] and host["ema"] == memory(2, 4, 2)["ema"]
    assert flops.host_memory_per_rank(config, 4, 2, 2, False) == {}


def test_precision_sets_the_width_of_the_weights() -> None:
    bf16, autocast = (memory(2, 2, 1, False, f"train.precision={p}") for p in ("bf16", "bf16_autocast"))
    assert 2 * bf16["weights"] == autocast["weights"] and bf16["master_weights"] == autocast["master_weights"]
    assert autocast["weight_copies"] > 0 and bf16["weight_copies"] == 0
    assert bf16["activations"] < autocast["activations"] < memory(2, 2)["activations"]


def test_activation_checkpointing_keeps_one_block() -> None:
    kept = memory(2, 1, 1, False, "train.activation_checkpointing=block")["activations"]
    assert kept < memory(2)["activations"] / 5


def saved_bytes(config: Config, images: int) -> int:
    """Bytes that autograd keeps in one forward pass, each storage once, parameters left out."""
    m, precision = config.model, config.train.precision
    model = materialize(build(config), seed=0).train()
    model = model.bfloat16() if precision == "bf16" else model
    skip = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        if x.untyped_storage().data_ptr() not in skip:
            kept[x.untyped_storage().data_ptr()] = x  # held, so that no address is used twice
        return x

    generator = torch.Generator().manual_seed(0)
    x_BCHW = torch.randn(images, m.channels, m.image_size, m.image_size, generator=generator)
    y_B = torch.arange(images) % m.num_classes
    cast: Any = torch.autocast("cpu", torch.bfloat16) if precision == "bf16_autocast" else nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), cast:
        output = model(x_BCHW, torch.full((images,), 500.0), y_B)
    assert output.prediction.requires_grad
    return sum(x.untyped_storage().nbytes() for x in kept.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16_autocast", "bf16"])
@pytest.mark.parametrize("family", ["moe={}", "moe={num_shared: 2, layers: all}", "moe=null"])
def test_activation_estimate_against_what_autograd_keeps(family: str, precision: str) -> None:
    config = load_config("digits", [family, f"train.precision={precision}", "model.image_size=16", "model.depth=3"])
    measured = (saved_bytes(config, 12) - saved_bytes(config, 4)) / 8  # the slope: copies of weights cancel
    assert measured == pytest.approx(flops.activation_bytes(config, 1), rel=0.05)


# ------------------------------------------------------------------------------------------------------------- dry run


def dry(config: Config, world: int, path: str | None = None) -> dict[str, Any]:
    return dry_run.report(config, resolve(path, config, world), world)


def test_the_report_is_json_and_complete() -> None:
    config = load_config("imagenet256_promoe_s", ["parallel.expert_parallel=2", "train.micro_batch_size=16"])
    facts = json.loads(json.dumps(dry(config, 4, str(DS_CONFIGS / "zero2.json"))))
    assert facts["params"]["total"] == PROMOE["s"][0] and facts["params"]["activated"] == PROMOE["s"][1]
    assert sum(facts["params"]["by_part"].values()) == facts["params"]["total"]
    groups = facts["groups"]
    assert groups["expert_parallel_groups"] == [[0, 1], [2, 3]] and groups["expert_data_parallel"] == 2
    assert (groups["micro_batch"], groups["accumulation"], groups["global_batch"]) == (16, 4, 256)
    assert facts["flops"]["forward_gflops_per_image"] == pytest.approx(12.12, rel=0.01)
    sizes = facts["memory_gib"]
    parts = [size for name, size in sizes.items() if name not in ("total", "host")]
    assert sum(parts) == pytest.approx(sizes["total"]) and sizes["gradient_buckets"] == 4e8 / 2**30
    assert facts["ds_config"]["train_batch_size"] == 256 and facts["config"]["name"] == "imagenet256_promoe_s"


def test_auto_is_deepspeeds_default(tmp_path: Path) -> None:
    """Buckets of 500 million elements, without overlap: as if the keys were not there."""
    reports = []
    for keys in ({}, {"reduce_bucket_size": "auto", "overlap_comm": "auto"}):
        (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 2, **keys}}))
        reports.append(dry(load_config("tiny"), 1, str(tmp_path / "ds.json"))["memory_gib"])
    assert reports[0] == reports[1] and reports[0]["gradient_buckets"] == 4 * 5e8 / 2**30


def test_the_largest_model_is_reported_without_building_it() -> None:
    facts = dry(load_config("imagenet256_promoe_xl", ["parallel.expert_parallel=4"]), 64)
    assert (facts["params"]["total"], facts["params"]["activated"]) == PROMOE["xl"][:2]


def test_the_page_names_what_matters() -> None:
    config = load_config("imagenet256_promoe_b", ["parallel.expert_parallel=4"])
    page = dry_run.render(dry(config, 64, str(DS_CONFIGS / "zero2_offload.json")))
    for text in (
        "300,607,520",
        "130,572,320",
        "adam_moments",
        "Host memory",
        "0-3 4-7 8-11 12-15 ... 60-63",
        "expert_parallel: 4",
        '"train_batch_size": 256',
    ):
        assert text in page, text


def test_a_dense_model_and_one_process_are_reported() -> None:
    facts = dry(Config(moe=None), 1)
    assert facts["params"]["routed"] == 0 and facts["groups"]["experts_per_rank"] == 0
    assert "Host memory" not in dry_run.render(facts)
