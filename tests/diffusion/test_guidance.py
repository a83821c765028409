from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from promoe_ds.diffusion.guidance import guided_velocity
from promoe_ds.moe.routing import RoutingContext

NULL = 9
CPU = torch.device("cpu")


class Output(NamedTuple):
    prediction: torch.Tensor


class LabelModel:
    """v = label + t + x, in the caller's order, with C more channels of junk; notes the batch size of every forward."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.contexts: list[RoutingContext] = []

    def __call__(self, x: torch.Tensor, t: torch.Tensor, ctx: RoutingContext) -> Output:
        self.batches.append(len(x))
        self.contexts.append(ctx)
        assert t.dtype == torch.float32 and t.shape == (len(x),)
        label = ctx.label_B[ctx.restore_B]
        v = x + (label + t).view(-1, 1, 1, 1)
        return Output(torch.cat([v, torch.full_like(v, torch.nan)], 1))


def test_scale_above_one_extrapolates_from_null_to_label() -> None:
    model, label, x = LabelModel(), torch.tensor([3, 7, 0]), torch.zeros(3, 1, 2, 2, dtype=torch.float64)
    v = guided_velocity(model, label, NULL, 2.5, CPU)(x, 0.25)
    expected = 250 + NULL + 2.5 * (label.double() - NULL)
    torch.testing.assert_close(v, expected.view(-1, 1, 1, 1).expand_as(x), rtol=0, atol=1e-12)
    assert model.batches == [6]


@pytest.mark.parametrize("scale", [1.0, 0.0])
def test_no_null_half_at_scale_one_or_below(scale: float) -> None:
    model, label, x = LabelModel(), torch.tensor([3, 7, 0]), torch.ones(3, 2, 2, 2)
    v = guided_velocity(model, label, NULL, scale, CPU)(x, 0.5)
    torch.testing.assert_close(v, x + 500 + label.view(-1, 1, 1, 1), rtol=0, atol=0)
    assert model.batches == [3]


def test_routing_context_is_built_once_a_batch() -> None:
    model = LabelModel()
    velocity = guided_velocity(model, torch.tensor([3, NULL]), NULL, 4.0, CPU)
    for sigma in (1.0, 0.5):
        velocity(torch.zeros(2, 1, 2, 2), sigma)
    assert model.contexts[0] is model.contexts[1]
    assert model.contexts[0].num_conditional == 1


def test_state_dtype_is_kept_when_the_model_answers_in_bfloat16() -> None:
    def model(x: torch.Tensor, t: torch.Tensor, ctx: RoutingContext) -> Output:
        return Output(x.bfloat16())

    assert guided_velocity(model, torch.tensor([1]), NULL, 2.0, CPU)(torch.ones(1, 1, 2, 2), 1.0).dtype == torch.float32
