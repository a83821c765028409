"""The configuration tree: recipes, files, and every error message a user can meet."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from promoe_ds.config.decode import dump, encode
from promoe_ds.config.errors import ConfigError
from promoe_ds.config.schema import Config, ModelConfig, MoEConfig
from promoe_ds.recipes import load as module
from promoe_ds.recipes.load import load_config, load_tree, recipe_names
from promoe_ds.recipes.validate import validate_data

SIZES = {"s": (12, 384, 6), "b": (12, 768, 12), "l": (24, 1024, 16), "xl": (28, 1152, 16)}


def error(text: str, *overrides: str, base: str = "imagenet256_promoe_s") -> None:
    """Loading must fail with one line that contains `text`."""
    with pytest.raises(ConfigError) as caught:
        load_config(base, overrides)
    message = str(caught.value)
    assert text in message, message
    assert "\n" not in message


# ------------------------------------------------------------------------------------------------------------- recipes


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_loads_and_survives_a_round_trip(name: str) -> None:
    config = load_config(name)
    assert config.name == name.rsplit("/", 1)[-1]
    assert load_tree(encode(config)) == config
    assert load_tree(yaml.safe_load(dump(config))) == config


@pytest.mark.parametrize("size", SIZES)
def test_imagenet_recipes_are_those_of_the_paper(size: str) -> None:
    promoe, dense = load_config(f"imagenet256_promoe_{size}"), load_config(f"imagenet256_dense_{size}")
    assert (promoe.model.depth, promoe.model.width, promoe.model.heads) == SIZES[size]
    assert promoe.moe is not None and dense.moe is None
    assert (promoe.moe.num_experts, promoe.moe.num_shared, promoe.moe.num_unconditional) == (12, 1, 1)
    assert promoe.model == dense.model and promoe.model.tokens == 256 and promoe.model.out_channels == 8
    o, t = promoe.optimizer, promoe.train
    assert (o.lr, o.beta1, o.beta2, o.weight_decay, o.ema_decay, o.clip_grad_norm) == (1e-4, 0.9, 0.999, 0, 0.9999, 0.5)
    assert (t.global_batch_size, t.precision, promoe.diffusion.label_drop) == (256, "bf16_autocast", 0.1)
    assert promoe.data.hflip and t.steps == 500_000


def test_cifar_recipe_has_the_token_grid_of_imagenet() -> None:
    config = load_config("cifar10_promoe_s")
    m = config.model
    assert (m.image_size, m.channels, m.num_classes, m.patch, m.tokens) == (32, 3, 10, 2, 256)
    assert m.learn_sigma and config.data.hflip and config.data.name == "images" and config.data.path is None


def test_moe_layers() -> None:
    def layers(choice: Any) -> tuple[int, ...]:
        return Config(model=ModelConfig(depth=5), moe=MoEConfig(layers=choice)).moe_layers()

    assert layers("every_other") == (1, 3)
    assert layers("all") == (0, 1, 2, 3, 4)
    assert layers((4, 0)) == (4, 0)
    assert Config(moe=None).moe_layers() == ()


def test_a_list_of_layers_survives_a_round_trip() -> None:
    config = load_config("imagenet256_promoe_s", ["moe.layers=[1, 5]"])
    assert config.moe is not None and config.moe.layers == (1, 5)
    assert load_tree(yaml.safe_load(dump(config))) == config


def test_configurations_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().name = "other"  # type: ignore[misc]


# ------------------------------------------------------------------------------------------------- unknown, ill-typed


def test_unknown_keys_are_named_with_the_nearest_known_one() -> None:
    error("train.stpes=5: unknown key", "train.stpes=5")
    error("did you mean 'steps'?", "train.stpes=5")
    error("trian={...}: unknown key", "trian.steps=5")
    error("did you mean 'train'?", "trian.steps=5")
    error("did you mean 'top_k'?", "moe.router.topk=2")
    error("moe.router.zzz=1: unknown key", "moe.router.zzz=1")
    error("choose a known one", "moe.router.zzz=1")


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("train.steps=many", "train.steps='many': expected int, got str"),
        ("train.steps=1.5", "train.steps=1.5: expected int, got float"),
        ("train.steps=", "train.steps=null: expected int, got null"),
        ("train.steps=true", "train.steps=true: expected int, got bool"),
        ("optimizer.lr=fast", "optimizer.lr='fast': expected float, got str"),
        ("optimizer.lr=true", "optimizer.lr=true: expected float, got bool"),
        ("optimizer.lr=[1]", "optimizer.lr=[1]: expected float, got list"),
        ("optimizer.lr=.nan", "optimizer.lr=.nan: expected a finite float, got nan"),
        ("sample.cfg=.inf", "sample.cfg=.inf: expected a finite float, got inf"),
        ("data.workers=1.5", "data.workers=1.5: expected int, got float"),
        ("data.workers=-.inf", "data.workers=-.inf: expected int, got -inf"),
        ("optimizer.ema_more=[.inf]", "optimizer.ema_more[0]=inf: expected a finite float, got inf"),
        ("data.scale=large", "data.scale='large': expected float or a list of float or null"),
        ("data.hflip=1", "data.hflip=1: expected bool, got int"),
        ("model=3", "model=3: expected a mapping"),
        ("moe=yes", "moe=true: expected a mapping"),
        ("train.precision=fp16", "must be one of fp32, bf16_autocast, bf16; did you mean"),
        ("moe.layers=odd", "moe.layers='odd': expected every_other or all or a list of int"),
        ("moe.layers=[1, x]", "expected every_other or all or a list of int"),
        ("moe.router.name=promo", "moe.router.name=promo: no such router"),
        ("moe.router.name=promo", "did you mean 'promoe'?"),
    ],
)
def test_wrong_types_and_choices(override: str, text: str) -> None:
    error(text, override)


def test_numbers_of_a_file_are_named_as_what_they_are() -> None:
    for value, text in ((1.5, "train.steps=1.5: expected int, got float"), (math.inf, "expected int, got inf")):
        with pytest.raises(ConfigError, match=re.escape(text)):
            load_tree({"train": {"steps": value}})


def test_an_error_is_one_line_whatever_the_value() -> None:
    error("train.note=a b: unknown key", "train.note=a\nb")
    with pytest.raises(ConfigError) as caught:
        load_tree({"data": {"name": "digits", "nothing": "first\nsecond"}})
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------------------------------- validation


@pytest.mark.parametrize(
    ("override", "text"),
    [
        (
            "parallel.expert_parallel=8",
            "parallel.expert_parallel=8: does not divide moe.num_experts=12; "
            "choose one of 1, 2, 3, 4, 6, 12 that also divides the number of processes",
        ),
        ("name=../x", "name=../x: is the name of the run folder in runs/; choose one without `..`"),
        ("name=/x", "name=/x: is the name of the run folder in runs/"),
        ("name=", "name=null: expected str, got null"),
        ("name=null", "name=null: expected str, got null; write it in quotes"),
        ("name=''", "name=: is the name of the run folder in runs/"),
        ("name=.", "name=.: is the name of the run folder in runs/"),
        ("train.profile=²:³", "train.profile='²:³': is not A:B with steps"),
        ("parallel.expert_parallel=0", "parallel.expert_parallel=0: must be positive"),
        ("model.width=100", "model.width=100: is not divisible by model.heads=6"),
        ("model.width=390", "the 2-D sine-cosine table needs a multiple of 4"),
        ("model.patch=3", "model.image_size=32: is not divisible by model.patch=3"),
        ("model.depth=0", "model.depth=0: must be positive"),
        ("model.mlp_ratio=1.001", "model.mlp_ratio=1.001: times model.width=384 is not a whole number"),
        ("moe.hidden_ratio=0.7", "moe.hidden_ratio=0.7: times model.width=384 is not a whole number"),
        ("moe.hidden_ratio=0.2578125", "moe.hidden_ratio * model.width=99: grouped_mm under train.precision="),
        ("moe.num_experts=0", "moe.num_experts=0: must be positive"),
        ("moe.num_shared=-1", "moe.num_shared=-1: must not be negative"),
        ("moe.layers=[1, 12]", "moe.layers=[1, 12]: needs distinct indices below model.depth=12"),
        ("moe.layers=[1, 1]", "needs distinct indices"),
        ("moe.layers=[]", "moe.layers=[]: selects no block of model.depth=12"),
        ("model.depth=1", "moe.layers=every_other: selects no block of model.depth=1"),
        ("moe.router.top_k=13", "moe.router.top_k=13: is not in 1..moe.num_experts=12"),
        ("train.steps=0", "train.steps=0: must be positive"),
        ("train.micro_batch_size=-2", "train.micro_batch_size=-2: must be positive"),
        ("optimizer.lr=0", "optimizer.lr=0.0: must be positive"),
        ("optimizer.ema_more=[0.5, 1]", "optimizer.ema_more=1.0: must lie in [0, 1)"),
        ("optimizer.ema_more=[0.5, 0.5]", "optimizer.ema_more=[0.5, 0.5]: 0.5 is kept twice; leave it out"),
        ("optimizer.ema_more=0.5", "optimizer.ema_more=0.5: expected a list"),
        ("optimizer.beta2=1", "optimizer.beta2=1.0: must lie in [0, 1)"),
        ("optimizer.ema_decay=-0.1", "optimizer.ema_decay=-0.1: must lie in [0, 1)"),
        ("diffusion.label_drop=1", "diffusion.label_drop=1.0: must lie in [0, 1)"),
        ("optimizer.clip_grad_norm=-1", "optimizer.clip_grad_norm=-1.0: must not be negative"),
        ("train.seed=-1", "train.seed=-1: must lie in [0, 2**64)"),
        ("train.seed=18446744073709551616", "train.seed=18446744073709551616: must lie in [0, 2**64)"),
        ("sample.steps=0", "sample.steps=0: must lie in [1, 1e+06)"),
        ("sample.steps=1e12", "sample.steps=1000000000000: must lie in [1, 1e+06)"),
        ("sample.per_class=1e12", "sample.per_class=1000000000000: must lie in [1, 1000)"),
        ("parallel.timeout_minutes=1e300", "parallel.timeout_minutes=1e+300: must lie in [0.01, 20000)"),
        ("parallel.timeout_minutes=1e-300", "parallel.timeout_minutes=1e-300: must lie in [0.01, 20000)"),
        ("diffusion.ddpm.num_steps=1e12", "diffusion.ddpm.num_steps=1000000000000: must lie in [21, 1e+06)"),
        ("data.workers=1000", "data.workers=1000: must lie in [0, 1000)"),
        (
            "moe.router.temperature=1e-300",
            "moe.router.temperature=1e-300: is outside the normal range of float32; choose a num",
        ),
        ("sample.cfg=1e300", "sample.cfg=1e+300: is outside the normal range of float32"),
        ("optimizer.ema_more=[1e-300]", "optimizer.ema_more=1e-300: is outside the normal range of float32"),
        ("sample.cfg=-1", "sample.cfg=-1.0: must not be negative"),
        ("sample.steps=ddim50", "sample.steps=ddim50: rectified flow takes a number of steps; choose another"),
        ("sample.shift=0", "sample.shift=0.0: must lie in [0.001, 1000)"),
        ("sample.shift=1e-300", "sample.shift=1e-300: must lie in [0.001, 1000)"),
        ("diffusion.shift=1e-300", "diffusion.shift=1e-300: must lie in [0.001, 1000)"),
        ("diffusion.shift=1e39", "diffusion.shift=1e+39: must lie in [0.001, 1000)"),
        (
            "guidance.interval=[900,100]",
            "guidance.interval=[900,100]: is not [lo, hi] with 0 <= lo <= hi <= 1000; write",
        ),
        ("guidance.interval=[0,500,900]", "guidance.interval=[0,500,900]: is not [lo, hi]"),
        ("guidance.interval=[-1,900]", "guidance.interval=[-1,900]: is not [lo, hi]"),
        ("guidance.interval=500", "guidance.interval=500: expected a list"),
        ("guidance.channels=4", "guidance.channels=4: must be one of all, 3"),
        ("guidance.channels='3'", "guidance.channels='3': must be one of all, 3; write it without quotes"),
        ("diffusion.name=dppm", "diffusion.name='dppm': must be one of rectified_flow, ddpm; did you mean 'ddpm'?"),
    ],
)
def test_impossible_values(override: str, text: str) -> None:
    error(text, override)


def test_rows_of_grouped_products_are_whole_units() -> None:
    error("needs a multiple of 8", "moe.hidden_ratio=0.96875", "model.width=384", "train.precision=bf16_autocast")
    error("needs a multiple of 4", "moe.hidden_ratio=0.2578125", "train.precision=fp32")
    load_config("imagenet256_promoe_s", ["moe.hidden_ratio=0.96875", "train.precision=fp32"])
    load_config("imagenet256_promoe_s", ["moe.hidden_ratio=0.2578125", "moe.experts_backend=loop"])


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (("model.learn_sigma=false",), "model.learn_sigma=false: diffusion.name=ddpm learns a variance range; set"),
        (("diffusion.ddpm.num_steps=20",), "diffusion.ddpm.num_steps=20: must lie in [21, 1e+06)"),
        (("diffusion.ddpm.num_steps=0",), "diffusion.ddpm.num_steps=0: must lie in [21, 1e+06)"),
        (("sample.shift=2",), "sample.shift=2.0: diffusion.name=ddpm has no noise levels to shift; set"),
        (("sample.steps=1001",), "sample.steps=1001: keeps 1001 of the 1000 timesteps of a section; choose another"),
        (("sample.steps=0",), "sample.steps=0: must lie in [1, 1e+06)"),
        (("sample.steps=ddim300",), "sample.steps=ddim300: no whole stride gives 300 of 1000 timesteps"),
    ],
)  # fmt: skip
def test_impossible_ddpm(overrides: tuple[str, ...], text: str) -> None:
    error(text, *overrides, base="imagenet256_promoe_b_ddpm")


def test_three_guided_channels_need_three() -> None:
    error("guidance.channels=3: the model has model.channels=1; set guidance.channels=all", "guidance.channels=3",
          base="digits_ddpm")  # fmt: skip
    assert load_config("imagenet256_promoe_l_ddpm", ["guidance.channels=3"]).guidance.channels == 3


def test_respacing_is_a_number_or_adms_notation() -> None:
    for text, expected in (("100", 100), ("ddim50", "ddim50"), ("'10,15,20'", "10,15,20")):
        steps = load_config("imagenet256_promoe_b_ddpm", [f"sample.steps={text}"]).sample.steps
        assert steps == expected and type(steps) is type(expected)


@pytest.mark.parametrize("size", ["b", "l", "xl"])
def test_ddpm_recipes_of_table_4(size: str) -> None:
    for family in ("promoe", "dense"):
        plain, config = (load_config(f"imagenet256_{family}_{size}{tail}") for tail in ("", "_ddpm"))
        assert config.diffusion.name == "ddpm" and config.diffusion.ddpm.num_steps == 1000
        assert (config.model, config.optimizer, config.train) == (plain.model, plain.optimizer, plain.train)
        assert config.model.learn_sigma and config.sample.steps == 250 and (config.moe is None) == (family == "dense")
        if config.moe is not None:
            assert encode(config.moe.router)["contrastive_weight"] == (10 if size == "b" else 1)


def test_null_label_images_must_meet_an_expert() -> None:
    error("null-label images would meet no expert", "moe.num_shared=0", "moe.num_unconditional=0")
    assert load_config("imagenet256_promoe_s", ["moe.num_shared=0"]).moe is not None


def test_a_dense_model_has_no_expert_parallelism() -> None:
    error("parallel.expert_parallel=2: the model is dense", "parallel.expert_parallel=2", base="imagenet256_dense_s")


@pytest.mark.parametrize("ep", [1, 2, 3, 4, 6, 12])
def test_divisors_of_twelve_are_accepted(ep: int) -> None:
    config = load_config("imagenet256_promoe_s", [f"parallel.expert_parallel={ep}"])
    assert config.parallel.expert_parallel == ep


def test_the_data_path_is_needed_by_training_only() -> None:
    config = load_config("imagenet256_promoe_s")
    with pytest.raises(ConfigError, match=r"data\.path=null: data\.name=latents needs one; add data\.path=PATH"):
        validate_data(config)
    validate_data(load_config("imagenet256_promoe_s", ["data.path=somewhere"]))
    validate_data(Config())


# --------------------------------------------------------------------------------------------------------------- files


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_a_misspelt_section_of_a_file_is_named_without_what_it_holds(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.yaml", "base: tiny\noptimiser: {lr: 1.0e-3, beta1: 0.5, beta2: 0.9}\n")
    error("optimiser={...}: unknown key (known: name, model, ", base=path)
    error("; did you mean 'optimizer'?", base=path)


def test_a_file_may_start_from_a_recipe(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.yaml", "base: imagenet256_promoe_b\nmoe: {num_experts: 6}\n")
    config = load_config(path)
    assert (config.name, config.model.width) == ("mine", 768)
    assert config.moe is not None and (config.moe.num_experts, config.moe.num_shared) == (6, 1)


def test_unreadable_files(tmp_path: Path) -> None:
    error("no such recipe (known: ", base="imagenet256_promoe_x")
    error("did you mean 'imagenet256_promoe_xl'?", base="imagenet256_promoe_x")
    error("cannot be read", base=str(tmp_path / "absent.yaml"))
    error("cannot be read as YAML", base=write(tmp_path / "broken.yaml", "a: [1,\nb: 2"))
    twice = "train: {steps: 5}\nmodel:\n  width: 8\n  depth: 2\n  width: 16\n"
    error("the key 'width' is written twice, again in line 5", base=write(tmp_path / "twice.yaml", twice))
    error("is not a mapping", base=write(tmp_path / "list.yaml", "- 1"))
    error("is not a mapping", base=write(tmp_path / "empty.yaml", ""))
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00x: 1")
    error("--config=", base=str(tmp_path / "bytes.yaml"))


def test_merged_keys_may_be_overridden(tmp_path: Path) -> None:
    text = "base: tiny\ntrain: &a {steps: 5, log_every: 1}\nname: x\n"
    path = write(tmp_path / "merge.yaml", text.replace("&a {", "{<<: {steps: 7}, "))
    assert load_config(path).train.steps == 5


def test_bases_that_cannot_be(tmp_path: Path) -> None:
    path = tmp_path / "self.yaml"
    error("the recipe is its own base", base=write(path, f"base: {path}"))
    error("base=3: is not the name of a recipe", base=write(tmp_path / "number.yaml", "base: 3"))
    error("base=nowhere: no such recipe", base=write(tmp_path / "lost.yaml", "base: nowhere"))
    error(f"base={tmp_path}/none.yaml: cannot be read", base=write(path, f"base: {tmp_path}/none.yaml"))


def test_recipes_in_subfolders_are_named_by_their_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "paper").mkdir()
    write(tmp_path / "paper" / "tab1.yaml", "train: {steps: 3}")
    monkeypatch.setattr(module, "RECIPES", tmp_path)
    assert recipe_names() == ["paper/tab1"]
    assert load_config("paper/tab1").train.steps == 3


def test_a_choice_has_the_type_of_the_value_too() -> None:
    error("guidance.channels=3.0: must be one of all, 3", "guidance.channels=3.0")
    error("train.activation_checkpointing=true: must be one of none, block", "train.activation_checkpointing=true")


def test_a_narrow_stream_needs_autocast() -> None:
    error(
        "train.residual=bf16: is of bf16_autocast, and train.precision=fp32",
        "train.residual=bf16",
        "train.precision=fp32",
    )
    load_config("imagenet256_promoe_s", ["train.residual=bf16"])
