"""Starting from weights with other classes, sizes and experts, and from a dense model: what is kept, drawn, split."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from promoe_ds.checkpoint.init_from import InitialWeights, is_sine_cosine, resize
from promoe_ds.checkpoint.resume import load_weights
from promoe_ds.config.errors import ConfigError
from promoe_ds.config.schema import Config
from promoe_ds.formats.weights import Weights, load, write
from promoe_ds.models.dit import DiT
from promoe_ds.models.init import build, materialize
from promoe_ds.models.layers import grid_sinusoids
from promoe_ds.moe.experts import StackedExperts
from promoe_ds.moe.layer import MoELayer
from promoe_ds.recipes.load import load_config

DENSE = ("moe=null",)


def random_tensors(config: Config) -> dict[str, Tensor]:
    """All of them drawn, so that nothing is zero by rule."""
    generator = torch.Generator().manual_seed(3)
    made = {name: torch.randn(t.shape, generator=generator) * 0.2 for name, t in build(config).state_dict().items()}
    return made | {"pos_embed": grid_sinusoids(config.model.width, config.model.image_size // config.model.patch)}


@pytest.fixture
def folder(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A weights folder of the recipe `tiny`, changed by the parameters."""
    config = load_config("tiny", getattr(request, "param", ()))
    return write(Weights(random_tensors(config), config, 5, "ema", "test"), tmp_path / "weights")


def start(folder: Path, *overrides: str) -> tuple[DiT, InitialWeights, dict[str, Tensor]]:
    """-> (the model as a run starts with it, its weights, those of the folder)."""
    config = load_config("tiny", [f"train.init={folder}", *overrides])
    model = materialize(build(config), config.train.seed)
    source = InitialWeights(config)
    load_weights(source, model, lambda p, full: full)
    return model, source, load(folder).tensors


def mistake(folder: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        start(folder, *overrides)
    assert "\n" not in str(error.value)
    return str(error.value)


def as_drawn(source: InitialWeights) -> dict[str, Tensor]:
    return materialize(build(source.config), source.config.train.seed).state_dict()


@pytest.mark.parametrize("classes", [5, 12, 10])
def test_labels_start_anew_and_the_null_label_stays(folder: Path, classes: int) -> None:
    """Also with as many classes as before: they may be others."""
    model, source, before = start(folder, f"model.num_classes={classes}", "train.init_reset=[labels]", "train.seed=4")
    table = model.y_embedder.weight
    assert table.shape == (classes + 1, 32)
    assert torch.equal(table[-1], before["y_embedder.weight"][-1])
    assert torch.equal(table[:-1], as_drawn(source)["y_embedder.weight"][:-1])
    for name, tensor in model.state_dict().items():
        assert name == "y_embedder.weight" or torch.equal(tensor, before[name]), name
    record = source.record()
    assert record["drawn"] == ["y_embedder.weight"] and not record["resized"] + record["split"] + record["left_out"]
    assert "drawn y_embedder.weight (the null label keeps its row)" in source.summary()
    assert f"kept {len(before) - 1} of {len(before)} tensors" in source.summary()


def test_another_image_size_resizes_the_table_of_positions(folder: Path) -> None:
    model, source, _ = start(folder, "model.image_size=12", "data.name=images", "data.path=x")
    assert torch.equal(model.pos_embed, grid_sinusoids(32, 6))
    assert source.record()["resized"] == ["pos_embed"]
    assert "resized pos_embed (4x4 to 6x6 tokens, computed anew)" in source.summary()
    assert model.state_dict()["x_embedder.proj.weight"].equal(load(folder).tensors["x_embedder.proj.weight"])


def test_a_learned_table_is_interpolated(tmp_path: Path) -> None:
    """Bicubic: what is constant stays, and off the border what is linear. bf16 does not make a table learned."""
    assert is_sine_cosine(grid_sinusoids(32, 7).bfloat16().float())
    row, column = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    table = torch.stack([torch.ones(64), row.flatten(), column.flatten()], dim=1)[None]
    assert not is_sine_cosine(table)
    for side in (16, 24):
        made = resize(table, side).view(side, side, 3)
        place = (torch.arange(side) + 0.5) * 8 / side - 0.5
        inner = slice(side // 4, -side // 4)
        torch.testing.assert_close(made[..., 0], torch.ones(side, side))
        torch.testing.assert_close(made[inner, 0, 1], place[inner], rtol=0, atol=1e-4)
        torch.testing.assert_close(made[0, inner, 2], place[inner], rtol=0, atol=1e-4)
    config = load_config("tiny")
    learned = torch.randn(1, 16, 32, generator=torch.Generator().manual_seed(0))
    tensors = random_tensors(config) | {"pos_embed": learned}
    write(Weights(tensors, config, 5, "ema", "test"), tmp_path / "learned")
    model, source, _ = start(tmp_path / "learned", "model.image_size=16", "data.name=images", "data.path=x")
    assert (
        torch.equal(model.pos_embed, resize(learned, 8))
        and "4x4 to 8x8 tokens, learned, so bicubic" in source.summary()
    )
    same, _, _ = start(tmp_path / "learned")
    assert torch.equal(same.pos_embed, learned)


@pytest.mark.parametrize(
    "overrides",
    [
        ("moe.num_experts=4",),
        (),
        ("moe.router={name: token_choice}", "moe.num_experts=16"),
        ("moe.router={name: kmeans}", "model.num_classes=3", "train.init_reset=[experts,labels]"),
    ],
)
def test_experts_start_anew(folder: Path, overrides: tuple[str, ...]) -> None:
    """Routers too, also of another kind; shared and unconditional experts are kept."""
    model, source, before = start(folder, "train.init_reset=[experts]", *overrides)
    drawn = as_drawn(source)
    for name, tensor in model.state_dict().items():
        if ".router." in name or ".routed." in name:
            assert torch.equal(tensor, drawn[name]), name
        elif name != "y_embedder.weight":
            assert torch.equal(tensor, before[name]), name
    record = source.record()
    assert {name.split(".mlp.")[1].split(".")[0] for name in record["drawn"] if "mlp" in name} == {"router", "routed"}
    assert all(".mlp.rout" in name for name in record["left_out"]) and len(record["left_out"]) == 8


def one_gates(model: DiT) -> None:
    """Gate weights of 1, whatever the router chooses."""
    for module in model.modules():
        if isinstance(module, MoELayer):
            route = module.router.forward
            module.router.forward = lambda *args, route=route: (  # type: ignore[method-assign]
                (r := route(*args))._replace(weight_N=torch.ones_like(r.weight_N))
            )


def predictions(model: DiT, labels: list[int]) -> Tensor:
    model = model.double().eval()
    for module in model.modules():
        if isinstance(module, StackedExperts):
            module.backend = "loop"  # grouped GEMM has no float64
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(len(labels), 1, 8, 8, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        return model(x, torch.linspace(50, 900, len(labels)), torch.tensor(labels)).prediction


@pytest.mark.parametrize("folder", [DENSE], indirect=True)
@pytest.mark.parametrize(
    ("overrides", "forced"),
    [
        ((), True),
        (("moe.layers=all", "moe.num_experts=4"), True),
        (("moe.router={name: promoe, top_k: 2}",), True),
        (
            ("moe.router={name: token_choice}", "moe.num_shared=0", "moe.hidden_ratio=4", "moe.num_unconditional=2"),
            True,
        ),
        (("moe.num_shared=3", "moe.hidden_ratio=1"), True),
        (("moe.router={name: kmeans}",), False),  # its gate weights are 1
    ],
)
def test_upcycling_keeps_what_the_dense_model_computes(folder: Path, overrides: tuple[str, ...], forced: bool) -> None:
    """Identical routed copies with gate weights of 1 add up to the dense MLP, for labelled and null-label images."""
    labels = [0, 3, 10, 9, 10, 1]
    dense, _, before = start(folder, *DENSE)
    model, source, _ = start(folder, "train.init_reset=[experts]", *overrides)
    layers = [module for module in model.modules() if isinstance(module, MoELayer)]
    for layer in layers:
        w1: Any = layer.routed.get_parameter("experts.w1")
        assert torch.equal(w1, w1[:1].expand_as(w1))
    expected, raw = predictions(dense, labels), predictions(model, labels)
    if forced:
        null = [i for i, label in enumerate(labels) if label == 10]
        torch.testing.assert_close(raw[null], expected[null], rtol=0, atol=1e-12)  # they meet no gate
        assert float((raw - expected).abs().max()) > 1e-3  # as they are, gates break the identity
        one_gates(model)
    torch.testing.assert_close(predictions(model, labels), expected, rtol=0, atol=1e-12)
    record = source.record()
    assert not record["left_out"] and len(record["split"]) >= 7 * len(layers)
    assert all(".router." in name for name in record["drawn"])
    assert all(torch.equal(dense.state_dict()[name].float(), tensor) for name, tensor in before.items())


@pytest.mark.parametrize("folder", [DENSE], indirect=True)
def test_the_heaviest_units_are_shared(folder: Path) -> None:
    """No gate weakens them."""
    model, _, _ = start(folder, "train.init_reset=[experts]")
    weights = model.state_dict()
    for layer in ("blocks.1.mlp", "blocks.3.mlp"):
        shared = weights[f"{layer}.shared.0.fc1.weight"].norm(dim=1) * weights[f"{layer}.shared.0.fc2.weight"].norm(
            dim=0
        )
        routed = [weights[f"{layer}.routed.experts.w{i}"][0] for i in (1, 2)]
        assert float(shared.min()) >= float((routed[0].norm(dim=1) * routed[1].norm(dim=0)).max())


@pytest.mark.parametrize("folder", [("moe.layers=[1]",)], indirect=True)
def test_more_layers_become_mixtures(folder: Path) -> None:
    """Of a model that has some, further dense blocks are split; those there start anew."""
    _, source, _ = start(folder, "train.init_reset=[experts]", "moe.layers=[1,2]")
    record = source.record()
    assert all(name.startswith("blocks.2.mlp.") for name in record["split"])
    assert "blocks.1.mlp.shared.0.fc1.weight" in record["kept"] and "blocks.1.mlp.routed.experts.w1" in record["drawn"]
    assert "moe.layers=[2]: the weights in" in mistake(folder, "train.init_reset=[experts]", "moe.layers=[2]")


def test_mistakes(folder: Path, tmp_path: Path) -> None:
    more = "or add train.init_reset=[labels]"
    assert mistake(folder, "model.num_classes=5").endswith(more)
    assert "model.num_classes=5: the weights in" in mistake(folder, "model.num_classes=5", "train.init_reset=[experts]")
    assert mistake(folder, "moe.num_experts=4").endswith("or add train.init_reset=[experts]")
    for never in ("model.width=64", "model.depth=2", "model.patch=4", "moe.num_shared=2", "moe.hidden_ratio=1"):
        text = mistake(folder, never, "train.init_reset=[experts,labels]")
        assert text.startswith(f"{never}") and text.endswith("config.yaml") and "the weights in train.init" in text
    assert "moe=null: the weights in" in mistake(folder, "moe=null")
    assert "must be one of labels, experts" in mistake(folder, "train.init_reset=[heads]")
    assert "expected a list" in mistake(folder, "train.init_reset=labels")
    assert "leave out experts" in mistake(folder, "train.init_reset=[experts]", "moe=null")
    with pytest.raises(ConfigError, match=r"train.init_reset=\[labels\]: there are no weights to reset"):
        load_config("tiny", ["train.init_reset=[labels]"])
    dense = load_config("tiny", DENSE)
    write(Weights(random_tensors(dense), dense, 5, "ema", "test"), tmp_path / "dense")
    assert mistake(tmp_path / "dense").endswith("or add train.init_reset=[experts]")
    text = mistake(tmp_path / "dense", "train.init_reset=[experts]", "moe.hidden_ratio=4")
    assert "moe.hidden_ratio=4.0: a dense MLP of model.mlp_ratio=4 is split into" in text and "set it to 2" in text


@pytest.mark.parametrize("folder", [("moe.router.bias_rate=0.01",)], indirect=True)
def test_biases_go_on_at_another_rate_but_do_not_go(folder: Path) -> None:
    model, source, before = start(folder, "moe.router.bias_rate=0.001")
    assert torch.equal(model.state_dict()["blocks.1.mlp.router.bias"], before["blocks.1.mlp.router.bias"])
    assert len(source.record()["kept"]) == len(before)
    text = mistake(folder)
    assert text.startswith("moe.router.bias_rate=0.0: the weights in train.init")
    assert "; set moe.router.bias_rate=1e-09 to all but stop it, or start from " in text
    assert text.endswith("or add train.init_reset=[experts]")


@pytest.mark.parametrize(("name", "text"), [("blocks.0.mlp.fc1.bias", "is missing"), ("more", "is unexpected")])
def test_weights_that_do_not_fit_their_own_config(folder: Path, tmp_path: Path, name: str, text: str) -> None:
    made: Any = load(folder)
    tensors = dict(made.tensors)
    tensors.pop(name) if name in tensors else tensors.update({name: torch.zeros(1)})
    write_config = dataclasses.replace(made, tensors={k: v.clone() for k, v in tensors.items()})
    write(write_config, tmp_path / "bad")
    assert f"does not fit its own config: {name} {text}" in mistake(tmp_path / "bad")


def test_exported_weights_do_not_ask_for_another_reset(folder: Path, tmp_path: Path) -> None:
    """`--config OUT/config.yaml train.init=OUT` must not draw the labels that were just trained."""
    config = load_config("tiny", [f"train.init={folder}", "train.init_reset=[labels]"])
    write(Weights(random_tensors(config), config, 5, "ema", "test"), tmp_path / "one")
    again = load_config(str(tmp_path / "one" / "config.yaml"))
    assert again.train.init == str(folder) and again.train.init_reset == ()
    assert load(tmp_path / "one").config == again
