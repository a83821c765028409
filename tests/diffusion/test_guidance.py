from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from promoe_ds.diffusion.guidance import ALWAYS, guided_prediction, guides

NULL = 9
CPU = torch.device("cpu")


class Output(NamedTuple):
    prediction: torch.Tensor


class LabelModel:
    """label + t + x, in the caller's order, and the same again as variance channels; notes every forward's batch."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.labels: list[list[int]] = []

    def __call__(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> Output:
        self.batches.append(len(x))
        self.labels.append(y.tolist())
        assert t.dtype == torch.float32 and t.shape == (len(x),)
        p = x + (y + t).view(-1, 1, 1, 1)
        return Output(torch.cat([p, p], 1))


def test_scale_above_one_extrapolates_from_null_to_label() -> None:
    model, label, x = LabelModel(), torch.tensor([3, 7, 0]), torch.zeros(3, 1, 2, 2, dtype=torch.float64)
    p = guided_prediction(model, label, NULL, 2.5, CPU)(x, 250.0)
    expected = 250 + NULL + 2.5 * (label.double() - NULL)
    torch.testing.assert_close(p[:, :1], expected.view(-1, 1, 1, 1).expand_as(x), rtol=0, atol=1e-12)
    assert model.batches == [6]


@pytest.mark.parametrize(("channels", "moved"), [("all", [0, 1, 2, 3]), (3, [0, 1, 2])])
def test_unguided_and_variance_channels_are_those_of_the_label(channels: int, moved: list[int]) -> None:
    """Of a latent's 4 channels all or the first 3 are guided; channels 4 to 7 hold the variance."""
    label, x = torch.tensor([3]), torch.zeros(1, 4, 1, 1)
    p = guided_prediction(LabelModel(), label, NULL, 2.0, CPU, channels)(x, 0.0)  # type: ignore[arg-type]
    assert p.flatten().tolist() == [NULL + 2 * (3 - NULL) if i in moved else 3 for i in range(8)]


@pytest.mark.parametrize("scale", [1.0, 0.0])
def test_no_null_half_at_scale_one_or_below(scale: float) -> None:
    model, label, x = LabelModel(), torch.tensor([3, 7, 0]), torch.ones(3, 2, 2, 2)
    p = guided_prediction(model, label, NULL, scale, CPU)(x, 500.0)
    torch.testing.assert_close(p[:, :2], x + 500 + label.view(-1, 1, 1, 1), rtol=0, atol=0)
    assert model.batches == [3]


def test_the_null_half_comes_after_the_labelled_one() -> None:
    model = LabelModel()
    predict = guided_prediction(model, torch.tensor([3, NULL]), NULL, 4.0, CPU)
    for time in (999.0, 500.0):
        predict(torch.zeros(2, 1, 2, 2), time)
    assert model.labels == [[3, NULL, NULL, NULL]] * 2


def test_state_dtype_is_kept_when_the_model_answers_in_bfloat16() -> None:
    def model(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> Output:
        return Output(x.bfloat16())

    predict = guided_prediction(model, torch.tensor([1]), NULL, 2.0, CPU)
    assert predict(torch.ones(1, 1, 2, 2), 1000.0).dtype == torch.float32


@pytest.mark.parametrize(("time", "forwards"), [(99.9, 3), (100.0, 6), (500.0, 6), (900.0, 6), (900.1, 3)])
def test_outside_the_interval_the_prediction_is_the_conditional_one(time: float, forwards: int) -> None:
    model, label, x = LabelModel(), torch.tensor([3, 7, 0]), torch.randn(3, 1, 2, 2, dtype=torch.float64)
    p = guided_prediction(model, label, NULL, 2.5, CPU, interval=(100.0, 900.0))(x, time)
    scale = 2.5 if forwards == 6 else 1.0
    mixed = NULL + scale * (label.double() - NULL)
    expected = x + torch.tensor(time).float().double() + mixed.view(-1, 1, 1, 1)
    torch.testing.assert_close(p[:, :1], expected, rtol=0, atol=1e-12)
    assert model.batches == [forwards]


def test_the_whole_interval_is_bit_equal_to_none() -> None:
    label, x = torch.tensor([3, 7]), torch.randn(2, 1, 2, 2)
    for time in (0.0, 0.1, 1000.0):
        plain = guided_prediction(LabelModel(), label, NULL, 1.7, CPU)(x, time)
        assert torch.equal(
            guided_prediction(LabelModel(), label, NULL, 1.7, CPU, interval=(0.0, 1000.0))(x, time), plain
        )


def test_ends_of_the_interval_count_in_spite_of_rounding() -> None:
    """1 - 225/250 is a little below 0.1, and float32 knows 900 to 6e-5."""
    assert guides(1.5, (100.0, 900.0), 1000 * (1 - 225 / 250)) and 1000 * (1 - 225 / 250) < 100
    assert guides(1.5, (100.0, 900.0), 900.00006)
    assert not guides(1.0, ALWAYS, 500.0) and guides(1.5, ALWAYS, 0.0) and guides(1.5, ALWAYS, 1000.0)


def test_a_model_that_guides_itself_guides_nothing() -> None:
    model, label, x = LabelModel(), torch.tensor([3, 7]), torch.randn(2, 4, 2, 2, dtype=torch.float64)
    alone = guided_prediction(model, label, NULL, 1.0, CPU)(x, 300.0)
    assert torch.equal(guided_prediction(model, label, NULL, 3.0, CPU, weak=model)(x, 300.0), alone)


@pytest.mark.parametrize(("channels", "moved"), [("all", [0, 1, 2, 3]), (3, [0, 1, 2])])
def test_a_weaker_model_takes_the_place_of_the_null_label(channels: int, moved: list[int]) -> None:
    """It is shown the labels, B images; variance channels and those not guided are the better model's."""
    better, weak = LabelModel(), LabelModel()

    def halved(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> Output:
        return Output(weak(x, t, y).prediction / 2)

    label, x = torch.tensor([3, 8]), torch.zeros(2, 4, 1, 1)
    p = guided_prediction(better, label, NULL, 2.0, CPU, channels, weak=halved)(x, 0.0)  # type: ignore[arg-type]
    for row, y in zip(p, (3, 8), strict=True):
        assert row.flatten().tolist() == [y / 2 + 2 * (y - y / 2) if i in moved else y for i in range(8)]
    assert better.labels == weak.labels == [[3, 8]]
    guided_prediction(better, label, NULL, 2.0, CPU, interval=(0.0, 500.0), weak=halved)(x, 501.0)
    assert len(better.batches) == 2 and len(weak.batches) == 1
