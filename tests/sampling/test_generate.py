"""Images from weights: of (seed, index) alone, whatever the batch; options that matter, and precision."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from promoe_ds.config.decode import encode
from promoe_ds.config.errors import ConfigError
from promoe_ds.config.schema import Config
from promoe_ds.diffusion.flow_sde import SDE
from promoe_ds.models.dit import DiT
from promoe_ds.recipes.load import load_tree
from promoe_ds.sampling import generate
from promoe_ds.sampling.generate import (
    SamplingOptions,
    check_channels,
    choose_precision,
    class_labels,
    draw_batches,
    forwards_per_image,
    image_noise,
    pixel_batches,
    to_pixels,
)
from tests.small_model import CPU, MODEL, draw_pixels, tiny


def draw(
    dit: DiT, config: Config, indices: np.ndarray, batch: int = 16, cfg: float = 1.5, seed: int = 5, **more: Any
) -> np.ndarray:
    options = SamplingOptions(cfg, 4, seed, batch, **more)
    return draw_pixels(dit, config, class_labels(200, 10)[indices], indices, options)


def test_labels_are_balanced() -> None:
    labels = class_labels(25, 10)
    assert labels.dtype == np.int64 and np.bincount(labels).tolist() == [3] * 5 + [2] * 5


def test_noise_depends_on_seed_and_index_alone() -> None:
    together = image_noise(3, np.array([0, 5, 9]), (1, 8, 8))
    assert together.dtype == torch.float32 and together.shape == (3, 1, 8, 8)
    torch.testing.assert_close(image_noise(3, np.array([5]), (1, 8, 8))[0], together[1], rtol=0, atol=0)
    assert not torch.equal(image_noise(4, np.array([5]), (1, 8, 8))[0], together[1])
    many = image_noise(2**64 - 1, np.arange(2000), (1, 8, 8))
    assert abs(many.mean()) < 0.01 and abs(many.std() - 1) < 0.01
    assert abs(torch.corrcoef(many.flatten(1)[:2])[0, 1]) < 0.5


def test_pixels_are_clamped_and_truncated() -> None:
    x = torch.tensor([-2.0, -1.0, 0.0, 0.5, 1.0, 9.0]).view(1, 1, 1, 6)
    assert to_pixels(x).reshape(-1).tolist() == [0, 0, 128, 191, 255, 255]
    assert to_pixels(torch.zeros(2, 3, 4, 5)).shape == (2, 4, 5, 3)
    with pytest.raises(ConfigError, match="values that are not finite"):
        to_pixels(torch.tensor([[[[torch.nan]]]]))


@pytest.mark.parametrize("cfg", [1.0, 2.0])
def test_images_do_not_depend_on_the_batch(cfg: float) -> None:
    dit, config = tiny()
    indices = np.arange(16)
    whole = draw(dit, config, indices, batch=16, cfg=cfg)
    assert whole.dtype == np.uint8 and whole.shape == (16, 8, 8, 1) and whole.std() > 20
    for batch in (1, 7):
        other = draw(dit, config, indices, batch=batch, cfg=cfg)
        assert np.abs(whole.astype(int) - other).max() <= 1  # rounding may cross the border of a grey level
    shares = np.empty_like(whole)
    shares[0::2], shares[1::2] = draw(dit, config, indices[0::2], cfg=cfg), draw(dit, config, indices[1::2], cfg=cfg)
    assert np.abs(whole.astype(int) - shares).max() <= 1


def test_label_guidance_and_seed_matter() -> None:
    dit, config = tiny()
    first = np.arange(4)
    base = draw(dit, config, first)
    assert (draw(dit, config, first, cfg=4.0) != base).any()
    assert (draw_pixels(dit, config, np.full(4, 3), first, SamplingOptions(1.5, 4, 5)) != base).any()
    assert (draw_pixels(dit, config, class_labels(4, 10), first, SamplingOptions(1.5, 4, 6)) != base).any()


def test_the_noise_of_a_step_is_a_stream_of_its_own() -> None:
    """(seed, index, step) decide it: neither the images beside it nor the steps before."""
    shape, indices = (1, 8, 8), np.array([0, 5, 9])
    steps = [image_noise(3, indices, shape, step) for step in (None, 0, 1, 2)]
    for step, noise in zip((None, 0, 1, 2), steps, strict=True):
        assert torch.equal(image_noise(3, np.array([5]), shape, step)[0], noise[1])
    values = torch.cat(steps).flatten(1)
    assert float((torch.corrcoef(values) - torch.eye(12)).abs().max()) < 0.5
    assert torch.equal(steps[0], image_noise(3, indices, shape))


DDPM = {"name": "ddpm", "ddpm": {"clip_denoised": True}}


@pytest.mark.parametrize(
    "options", [{}, {"sampler": "ddpm"}, {"sampler": "ddim"}, {"sampler": "ddim", "eta": 1.0}], ids=str
)
def test_ddpm_images_do_not_depend_on_the_batch(options: dict[str, Any]) -> None:
    """Also the noise that the sampler adds on the way belongs to the image, whatever the batch and the process."""
    dit, config = tiny(diffusion=DDPM)
    indices = np.arange(8)
    whole = draw(dit, config, indices, **options)
    assert whole.dtype == np.uint8 and whole.std() > 20
    parts = np.empty_like(whole)
    parts[0::2], parts[1::2] = (draw(dit, config, indices[i::2], batch=3, **options) for i in (0, 1))
    assert np.abs(whole.astype(int) - parts).max() <= 1
    assert (draw(dit, config, indices, **options, seed=6) != whole).any()


@pytest.mark.parametrize(
    "options",
    [{"sampler": "heun"}, {"sampler": "sde"}, {"sampler": "sde", "sde": SDE("constant", 0.5, "none")}],
    ids=str,
)
def test_flow_images_do_not_depend_on_the_batch(options: dict[str, Any]) -> None:
    """The SDE's noise too belongs to (seed, image, step), whatever the batch and the process."""
    dit, config = tiny()
    indices, interval = np.arange(8), (200.0, 900.0)
    whole = draw(dit, config, indices, **options, interval=interval)
    assert whole.std() > 20
    parts = np.empty_like(whole)
    parts[0::2], parts[1::2] = (draw(dit, config, indices[i::2], batch=3, **options, interval=interval) for i in (0, 1))
    assert np.abs(whole.astype(int) - parts).max() <= 1
    assert (draw(dit, config, indices, **options) != whole).any(), "the interval matters"
    assert (draw(dit, config, indices, **options, seed=6, interval=interval) != whole).any()


def test_the_interval_is_the_configurations_unless_one_is_given() -> None:
    dit, config = tiny()
    narrow = load_tree(encode(config) | {"guidance": {"interval": [300, 700]}})
    first = np.arange(4)
    always, within = draw(dit, config, first, cfg=4.0), draw(dit, narrow, first, cfg=4.0)
    assert (always != within).any()
    np.testing.assert_array_equal(within, draw(dit, config, first, cfg=4.0, interval=(300.0, 700.0)))
    np.testing.assert_array_equal(always, draw(dit, narrow, first, cfg=4.0, interval=(0.0, 1000.0)))
    np.testing.assert_array_equal(
        draw(dit, config, first, cfg=1.0), draw(dit, config, first, cfg=4.0, interval=(1.0, 1.0))
    )


def test_the_shift_is_the_configurations_unless_one_is_given() -> None:
    dit, config = tiny(diffusion={"shift": 3.0})
    own = load_tree(encode(config) | {"sample": {"shift": 0.5}})
    first = np.arange(4)
    trained, sampled = draw(dit, config, first), draw(dit, own, first)
    assert (trained != sampled).any()
    np.testing.assert_array_equal(sampled, draw(dit, config, first, shift=0.5))
    np.testing.assert_array_equal(trained, draw(dit, own, first, shift=3.0))


@pytest.mark.parametrize(
    ("more", "forwards"),
    [
        ({}, 8),
        ({"cfg": 1.0}, 4),
        ({"interval": (100.0, 600.0)}, 6),
        ({"sampler": "heun"}, 16),
        ({"sampler": "heun", "interval": (100.0, 600.0)}, 12),
        ({"sampler": "sde"}, 8),
        ({"sampler": "sde", "interval": (0.0, 50.0)}, 5),
    ],
    ids=str,
)
def test_forwards_are_counted_as_they_happen(more: dict[str, Any], forwards: int) -> None:
    dit, config = tiny()
    rows: list[int] = []

    def counting(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> Any:
        rows.append(len(x))
        return dit(x, t, y)

    options = SamplingOptions(**{"cfg": 1.5, "steps": 4, "batch": 3} | more)
    draw_pixels(counting, config, class_labels(3, 10), np.arange(3), options)
    assert sum(rows) == 3 * forwards == 3 * forwards_per_image(config, options)


def test_forwards_of_ddpm_are_counted_too() -> None:
    _, config = tiny(diffusion=DDPM)
    assert forwards_per_image(config, SamplingOptions(1.5, "10,15,20")) == 90
    assert forwards_per_image(config, SamplingOptions(1.5, 10, interval=(0.0, 500.0), sampler="ddim")) == 15


def test_a_weaker_model_guides() -> None:
    """By itself a model guides nothing; by another it does, and in no more batches."""
    dit, config = tiny()
    other, _ = tiny(diffusion={"shift": 2.0}, width=16)
    labels, first = class_labels(4, 10), np.arange(4)

    def drawn(cfg: float, weak: Any) -> torch.Tensor:
        ((_, x),) = draw_batches(dit, config, labels, first, SamplingOptions(cfg, 4, 5), CPU, weak=weak)
        return x

    alone, itself, guided = drawn(1.0, None), drawn(3.0, dit), drawn(3.0, other)
    torch.testing.assert_close(itself, alone, rtol=0, atol=1e-5)
    assert not torch.allclose(guided, alone, atol=0.01) and not torch.allclose(guided, drawn(3.0, None), atol=0.01)


def test_samplers_differ_and_ddpm_is_its_objectives_default() -> None:
    dit, config = tiny(diffusion=DDPM)
    first = np.arange(4)
    ancestral = draw(dit, config, first)
    np.testing.assert_array_equal(ancestral, draw(dit, config, first, sampler="ddpm"))
    assert (ancestral != draw(dit, config, first, sampler="ddim")).any()
    flow_dit, flow_config = tiny()
    euler = draw(flow_dit, flow_config, first)
    np.testing.assert_array_equal(euler, draw(flow_dit, flow_config, first, sampler="euler"))
    assert (euler != draw(flow_dit, flow_config, first, sampler="heun")).any()


def test_three_guided_channels_of_four() -> None:
    dit, config = tiny(diffusion=DDPM, channels=4)
    first = np.arange(4)
    every, three = (draw(dit, config, first, cfg=4.0, sampler="ddim", channels=c) for c in ("all", 3))
    assert (every != three).any()
    by_config = load_tree(encode(config) | {"guidance": {"channels": 3}})
    np.testing.assert_array_equal(
        draw(dit, by_config, first, cfg=4.0), draw(dit, config, first, cfg=4.0, sampler="ddpm", channels=3)
    )


def test_bfloat16_is_close_to_float32() -> None:
    dit, config = tiny()
    exact, rough = draw(dit, config, np.arange(8)), draw(dit, config, np.arange(8), precision="bf16")
    assert 0 < np.abs(exact.astype(int) - rough).mean() < 5


def test_precision_is_bfloat16_on_cuda_alone() -> None:
    assert choose_precision(None, torch.device("cuda", 1)) == "bf16" and choose_precision(None, CPU) == "fp32"
    assert choose_precision("fp32", torch.device("cuda")) == "fp32" and choose_precision("bf16", CPU) == "bf16"


def test_hooks_see_every_step_and_batch() -> None:
    dit, config = tiny()
    ticks: list[int] = []
    indices = np.arange(10)
    labels = class_labels(10, 10)
    batches = draw_batches(
        dit, config, labels, indices, SamplingOptions(1.5, 4, 5, 4), CPU, on_step=ticks.append, rounds=5
    )
    seen = list(pixel_batches(batches))
    assert ticks == [4] * 8 + [2] * 4
    assert [rows for rows, _ in seen] == [slice(0, 4), slice(4, 8), slice(8, 10)]
    np.testing.assert_array_equal(np.concatenate([made for _, made in seen]), draw(dit, config, indices, batch=4))


def test_pixels_before_rounding_do_not_depend_on_batch_or_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """200 images by batches of 7 and of 32, alone and as two processes share them: 1e-4 in pixels of [-1, 1]."""
    dit, config = tiny()
    made: list[torch.Tensor] = []

    def keep(x_BCHW: torch.Tensor, pixels: str) -> np.ndarray:
        made.append(x_BCHW)
        return to_pixels(x_BCHW)

    def pixels(batch: int, world: int) -> torch.Tensor:
        out = torch.empty(200, 1, 8, 8)
        for rank in range(world):
            made.clear()
            draw(dit, config, np.arange(rank, 200, world), batch)
            out[rank::world] = torch.cat(made)
        return out

    monkeypatch.setattr(generate, "to_pixels", keep)
    alone = pixels(32, 1)
    assert float((pixels(7, 2) - alone).abs().max()) < 1e-4 and alone.std() > 0.2


def test_random_labels_depend_on_seed_and_index_alone() -> None:
    labels = class_labels(1000, 10, "random", 3)
    np.testing.assert_array_equal(class_labels(10, 10, "random", 3), labels[:10])
    assert (class_labels(10, 10, "random", 4) != labels[:10]).any() and set(labels) == set(range(10))
    assert np.bincount(labels).std() < 20


def test_no_images_are_no_work() -> None:
    dit, config = tiny()
    nobody = np.empty(0, np.int64)
    assert list(draw_batches(dit, config, nobody, nobody, SamplingOptions(1.5, 4), CPU)) == []


def test_latents_are_no_pictures() -> None:
    with pytest.raises(ConfigError, match="^model.channels=4: the model makes latents"):
        check_channels(load_tree({"model": MODEL | {"channels": 4}}))
