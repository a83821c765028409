"""The split by label, and the registry."""

from __future__ import annotations

import pytest
import torch

from promoe_ds.moe.routing import ROUTERS, Router, RoutingContext, register_router


def test_conditional_images_come_first_and_order_is_restored() -> None:
    labels = torch.tensor([10, 3, 10, 1, 2])
    ctx = RoutingContext.build(labels, 10, "cpu")
    assert ctx.num_conditional == 3
    assert ctx.label_B.tolist() == [3, 1, 2, 10, 10]
    assert torch.equal(ctx.label_B[ctx.restore_B], labels)
    assert torch.equal(labels[ctx.order_B], ctx.label_B)


def test_two_routers_cannot_share_a_name() -> None:
    with pytest.raises(ValueError, match="two routers are named 'promoe'"):
        register_router("promoe")(Router)
    assert ROUTERS["promoe"] is not Router
