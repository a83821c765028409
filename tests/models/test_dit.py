"""The transformer: exact sizes, adaLN-zero start, order of the batch, checkpointing, initialisation by expert."""

from __future__ import annotations

import pytest
import torch

from benchmarks.op_counting import OperatorCount, host_syncs
from promoe_ds.config.decode import encode
from promoe_ds.config.schema import Config
from promoe_ds.models.dit import DiT
from promoe_ds.models.init import build, materialize
from promoe_ds.parallel.expert_parallel import parallelize
from promoe_ds.parallel.topology import Topology
from promoe_ds.recipes.load import load_config, load_tree


def tiny(*overrides: str) -> Config:
    return load_config("tiny", overrides)


def inputs(images: int = 5, side: int = 8) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(images, 1, side, side, generator=generator)
    return x, torch.rand(images, generator=generator) * 1000, torch.tensor([1, 10, 3, 10, 5])[:images]


def awake(config: Config, seed: int = 0) -> DiT:
    """A model whose zero-initialised parts are random, so that every path shows in the output."""
    model = materialize(build(config), seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator) * 0.05)
    return model


SIZES = {
    "imagenet256_promoe_s": 75543584,
    "imagenet256_promoe_b": 300607520,
    "imagenet256_promoe_l": 1062684704,
    "imagenet256_promoe_xl": 1567733792,
    "imagenet256_dense_s": 32963360,
    "imagenet256_dense_b": 130512416,
    "imagenet256_dense_l": 458102816,
    "imagenet256_dense_xl": 675129632,
}


@pytest.mark.parametrize(("recipe", "total"), SIZES.items())
def test_sizes_are_those_of_the_official_code(recipe: str, total: int) -> None:
    assert sum(p.numel() for p in build(load_config(recipe)).parameters()) == total


def test_starts_at_zero() -> None:
    """adaLN-zero and a zero last layer: the prediction is 0, and blocks are the identity."""
    x, t, labels = inputs()
    model = materialize(build(tiny()), 0)
    assert (model(x, t, labels).prediction == 0).all()


def test_images_do_not_see_each_other_nor_their_order() -> None:
    x, t, labels = inputs()
    model = awake(tiny()).eval()
    whole = model(x, t, labels).prediction
    for i in range(len(x)):
        one = model(x[i : i + 1], t[i : i + 1], labels[i : i + 1]).prediction
        torch.testing.assert_close(one[0], whole[i], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_labels_lie_on_the_host_or_on_the_device(device: str) -> None:
    """On the host they make no forward wait for the device; from the device they are copied to the host once."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    model = awake(tiny()).eval().to(device)
    x, t, labels = inputs()
    x, t, there = x.to(device), t.to(device), labels.to(device, torch.int32)
    with torch.no_grad():
        assert torch.equal(model(x, t, labels).prediction, model(x, t, there).prediction)
        assert host_syncs(lambda: model(x, t, labels), torch.device(device)) == 0
        assert host_syncs(lambda: model(x, t, there), torch.device(device)) == int(device == "cuda")


@pytest.mark.parametrize(
    "override", ["moe.num_shared=1", "moe=null", "model.qk_norm=true", "moe.layers=all", "moe.layers=[0, 3]"]
)
def test_variants_train(override: str) -> None:
    x, t, labels = inputs()
    model = awake(tiny(override))
    out = model(x, t, labels)
    (out.prediction.square().mean() + sum(loss_L.sum() for loss_L in out.aux_losses.values())).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert out.tokens_per_expert_LE.shape == ((len(model.config.moe_layers()), 12) if model.config.moe else (0, 0))


def gradients(model: DiT) -> list[torch.Tensor]:
    """Gradients of a step."""
    x, t, labels = inputs()
    out = model(x, t, labels)
    (out.prediction.square().mean() + sum(loss_L.sum() for loss_L in out.aux_losses.values())).backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def test_activation_checkpointing_changes_no_gradient() -> None:
    plain = gradients(awake(tiny()))
    chosen = {}
    for mode in ("none", "block", "selective"):
        with OperatorCount() as count:
            found = gradients(awake(tiny(f"train.activation_checkpointing={mode}")))
        attention = sum(n for name, n in count.names.items() if name.endswith("attention_for_cpu"))
        chosen[mode] = [count.names["max"], attention]
        assert len(found) == len(plain) and all(map(torch.equal, found, plain)), mode
    # 2 MoE layers and 4 attentions; a block decides and attends again, selective does not
    assert chosen["none"] == chosen["selective"] == [2, 4]
    assert chosen["block"] == [4, 8]


def test_learn_sigma_doubles_the_output() -> None:
    x, t, labels = inputs()
    model = awake(tiny("model.learn_sigma=true"))
    assert model(x, t, labels).prediction.shape == (5, 2, 8, 8)


def test_initial_experts_do_not_depend_on_the_sharding() -> None:
    whole = materialize(build(tiny()), 3).state_dict()
    for ep in (2, 3, 4):
        for rank in range(ep):
            part = materialize(parallelize(build(tiny()), Topology(rank, ep, rank, ep)), 3).state_dict()
            assert part.keys() == whole.keys()
            for name, tensor in part.items():
                expected = whole[name].chunk(ep)[rank] if ".routed.experts." in name else whole[name]
                assert torch.equal(tensor, expected), name


def test_seed_changes_the_model_and_experts_differ() -> None:
    a, b = (materialize(build(tiny()), seed).state_dict() for seed in (0, 1))
    w1 = "blocks.1.mlp.routed.experts.w1"
    assert not torch.equal(a[w1], b[w1]) and not torch.equal(a[w1][0], a[w1][1])
    assert not torch.equal(a[w1], a["blocks.3.mlp.routed.experts.w1"])


def test_initialisation_follows_the_table() -> None:
    config = load_tree({**encode(tiny()), "model": {**encode(tiny())["model"], "width": 256}})
    state = materialize(build(config), 0).state_dict()
    xavier = lambda fan_in, fan_out: (6 / (fan_in + fan_out)) ** 0.5  # noqa: E731
    assert state["blocks.0.attn.qkv.weight"].abs().max() == pytest.approx(xavier(256, 768), rel=1e-3)
    assert state["blocks.1.mlp.routed.experts.w1"].abs().max() == pytest.approx(xavier(256, 512), rel=1e-3)
    assert state["x_embedder.proj.weight"].abs().max() == pytest.approx(xavier(4, 256), rel=2e-2)
    normal = (
        "y_embedder.weight",
        "t_embedder.mlp.0.weight",
        "t_embedder.mlp.2.weight",
        "blocks.1.mlp.router.prototypes",
    )
    for name in normal:
        assert state[name].std() == pytest.approx(0.02, rel=0.1), name
    for name in ("blocks.0.adaLN.linear.weight", "final_layer.adaLN.linear.weight", "final_layer.linear.weight"):
        assert (state[name] == 0).all(), name
    assert all((tensor == 0).all() for name, tensor in state.items() if name.endswith(("bias", "w3")))
    assert not build(config).pos_embed.requires_grad and state["pos_embed"].abs().max() <= 1


def test_a_narrow_stream_is_near_the_wide_one() -> None:
    """`train.residual=bf16`: under autocast alone, and every gradient is there."""
    torch.manual_seed(0)
    x, t, y = torch.randn(4, 1, 8, 8), torch.rand(4) * 1000, torch.tensor([1, 3, 5, 10])
    found = {}
    for residual in ("fp32", "bf16"):
        model = awake(load_config("tiny", ["train.precision=bf16_autocast", f"train.residual={residual}"]))
        with torch.no_grad():
            exact = model(x, t, y).prediction
        with torch.autocast("cpu", torch.bfloat16):
            found[residual] = model(x, t, y).prediction
        found[residual].float().square().mean().backward()
        assert all(p.grad is not None for p in model.blocks.parameters() if p.requires_grad)
        assert float((found[residual].detach() - exact).norm()) <= 0.05 * float(exact.norm())
    assert not torch.equal(found["fp32"], found["bf16"])
