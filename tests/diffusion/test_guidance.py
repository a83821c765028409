from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from promoe_ds.diffusion.guidance import guided_prediction

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
