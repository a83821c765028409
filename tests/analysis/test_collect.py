"""What is counted, against one forward at a time."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from promoe_ds.analysis.collect import Plan, choose_images, observe, with_data
from promoe_ds.analysis.summary import csv_files, summarise
from promoe_ds.config.errors import ConfigError
from promoe_ds.data import build_dataset
from promoe_ds.diffusion.objective import make_objective
from promoe_ds.models.dit import DiT
from promoe_ds.models.init import build, materialize
from promoe_ds.moe.observe import top_expert, watching
from promoe_ds.moe.routers import ROUTERS
from promoe_ds.recipes.load import load_config
from promoe_ds.sampling.generate import image_noise

PLAN = Plan(images=10, timesteps=(200.0, 700.0, 900.0), tokens=50, maps=3, batch=4)
OPTIONS = {"classification": ["moe.router.superclasses=digits", "moe.num_experts=4"]}


def model_of(*overrides: str) -> DiT:
    return materialize(build(load_config("tiny", overrides)), 0).eval()


def test_observe_in_bfloat16_sees_nearly_the_same() -> None:
    model = model_of()
    exact, rough, default = (
        observe(model, model.config, 7, "x", dataclasses.replace(PLAN, precision=p)) for p in ("fp32", "bf16", None)
    )
    assert (default.token_LND == exact.token_LND).all(), "on a CPU"
    difference = np.abs(rough.token_LND - exact.token_LND)
    assert 0 < difference.max() and np.linalg.norm(difference) < 0.02 * np.linalg.norm(exact.token_LND)
    assert (rough.count_LTCE.sum() == exact.count_LTCE.sum()) and (rough.first_LIS == exact.first_LIS).mean() > 0.95


@pytest.mark.parametrize("router", ["promoe", "diffmoe", "promoe_ec"])
def test_observe_counts_every_edge(router: str) -> None:
    """One image, one timestep at a time: these routers look at no other image."""
    model = model_of(f"moe.router={{name: {router}}}")
    config = model.config
    o = observe(model, config, 7, "x", PLAN)
    count, position, nobody = np.zeros_like(o.count_LTCE), np.zeros_like(o.count_LSE), np.zeros(2, int)
    maps, weight = np.zeros_like(o.map_LMTS), np.zeros(2)
    heaviest: dict[tuple[int, int, int], list[int | None]] = {}  # layer, image, token -> an expert for each timestep
    dataset, objective = build_dataset(config), make_objective(config.diffusion)
    for i, index in enumerate(choose_images(dataset, PLAN)):
        z, label = dataset.get(np.array([index]))
        for t, time in enumerate(PLAN.timesteps):
            seen = []
            noisy = objective.noised(z, image_noise(0, np.array([index]), (1, 8, 8), t), time)
            with watching(model, lambda block, r, x, routing, seen=seen: seen.append(routing)), torch.no_grad():
                model(*noisy, label)
            for layer, routing in enumerate(seen):
                best: dict[int, tuple[float, int]] = {}
                for token, expert, w in zip(*(x.tolist() for x in routing[:3]), strict=True):
                    count[layer, t, int(label), expert] += 1
                    position[layer, token, expert] += 1
                    best[token] = max(best.get(token, (w, expert)), (w, expert))
                for token in range(16):
                    heaviest.setdefault((layer, i, token), []).append(best[token][1] if token in best else None)
                nobody[layer] += 16 - len(set(routing.token_N.tolist()))
                weight[layer] += float(routing.weight_N.sum())
                if i < 3:
                    maps[layer, i, t] = top_expert(routing, 16)
    assert (o.count_LTCE == count).all() and (o.count_LSE == position).all() and (o.nobody_L == nobody).all()
    by_class = np.stack([o.count_LIE[:, o.label_I == c].sum(1) for c in range(10)], axis=1)
    assert (by_class == count.sum(1)).all() and o.count_LIE.shape[1] == 10
    kept = {place: len(set(experts)) == 1 and None not in experts for place, experts in heaviest.items()}
    assert {place: bool(o.kept_LIS[place]) for place in np.ndindex(2, 10, 16)} == kept
    share = [sum(kept[place] for place in kept if place[0] == layer) / 160 for layer in range(2)]
    assert [row["kept"] for row in summarise(o).rows] == pytest.approx(share) and 0 < sum(share) < 0.9
    assert (router == "promoe_ec") == any(set(experts) == {None} for experts in heaviest.values())
    assert (o.map_LMTS == maps).all() and np.allclose(o.weight_L, weight, rtol=1e-4)
    assert o.token_LND.shape == (2, 50, 32) and o.class_N.shape == (50,) and o.images == 10
    assert o.pictures is not None and o.pictures.shape == (3, 8, 8, 1)


def test_sampled_tokens_carry_their_own_expert_and_class() -> None:
    """The nearest prototype of a sampled token is the expert that is said to have taken it."""
    model = model_of()
    o = observe(model, model.config, 0, "x", PLAN)
    for layer in range(2):
        x_ND, p_ED = (
            a / np.linalg.norm(a, axis=1, keepdims=True) for a in (o.token_LND[layer], o.prototype_LED[layer])
        )
        assert ((x_ND @ p_ED.T).argmax(1) == o.expert_LN[layer]).all()
    labels = build_dataset(model.config).get(choose_images(build_dataset(model.config), PLAN))[1].numpy()
    assert set(o.class_N) <= set(labels)


@pytest.mark.parametrize("router", [*sorted(set(ROUTERS) - {"hash"}), "dense"])
def test_every_router_can_be_summarised(router: str) -> None:
    model = model_of(*(["moe=null"] if router == "dense" else [f"moe.router.name={router}", *OPTIONS.get(router, [])]))
    summary = summarise(observe(model, model.config, 0, router, PLAN))
    means, files = summary.means(), csv_files(summary)
    assert means["ratio_kmeans"] > 0
    assert ("load_max" in means) == ("similar_out" in means) == ("use_by_class.csv" in files) == (router != "dense")
    assert ("by_class" in means) == ("class_chance" in means) == (router != "dense")
    assert ("prototype_cos" in means) == ("prototypes.csv" in files) == (router in ("promoe", "promoe_ec", "kmeans"))
    if router == "uniform":
        assert means["load_max"] < 1.2 and means["dead"] == 0
    if router == "expert_choice":
        assert means["load_max"] == 1 and means["by_class"] < 1e-12 and means["class_chance"] < 1e-12
    assert files["layers.csv"].count("\n") == len(summary.rows) + 1


def test_ddpm_is_shown_what_it_was_trained_on() -> None:
    config = load_config("digits_ddpm")
    z, eps = torch.randn(2, 1, 8, 8), torch.randn(2, 1, 8, 8)
    x, t_B = make_objective(config.diffusion).noised(z, eps, 1000.0)
    assert torch.allclose(x, eps, atol=0.05) and 990 < t_B[0] <= 1000 and t_B.dtype == torch.float32
    x, t_B = make_objective(config.diffusion).noised(z, eps, 0.0)
    assert torch.allclose(x, z, atol=0.1) and t_B[0] < 10


def test_digits_have_no_path() -> None:
    with pytest.raises(ConfigError, match="--data=x: the model was trained on the embedded digits; leave it out"):
        with_data(load_config("tiny"), "x")
    config = load_config("tiny", ["data={name: images, path: a}"])
    assert with_data(config, "b").data.path == "b" and with_data(config, None).data.path == "a"
