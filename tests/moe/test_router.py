"""The registry of routers, and what a router must define."""

from __future__ import annotations

import pytest
import torch

from promoe_ds.config.errors import ConfigError
from promoe_ds.config.schema import ROUTER_CONFIGS, RouterConfig
from promoe_ds.moe.conditional_routing import Split
from promoe_ds.moe.router import Router, Routing, register_router
from promoe_ds.moe.routers import ROUTERS


def test_two_routers_cannot_share_a_name() -> None:
    with pytest.raises(ConfigError, match="two routers are named 'promoe'"):
        register_router("promoe")(Router)
    assert ROUTERS["promoe"] is not Router


def test_a_router_with_a_mistake_is_not_registered() -> None:
    class Empty(Router):
        pass

    class Old(Router):
        def forward(self, x_BSD: torch.Tensor, split: Split) -> Routing:  # type: ignore[override]
            raise AssertionError

    class Keywords(Router):
        def forward(self, x_TD: torch.Tensor, S: int, *, split: Split) -> Routing:  # type: ignore[override]
            raise AssertionError

    for wrong in (Empty, Old, Keywords):
        with pytest.raises(ConfigError, match=r"router 'mine' of tests.*: forward must take \(self, x_TD, S, split\)"):
            register_router("mine")(wrong)
    assert "mine" not in ROUTERS


def test_a_router_with_parameters_must_draw_them() -> None:
    router = Router(RouterConfig(), 4, 8)
    router.init_weights(lambda name: torch.Generator())  # none to draw
    router.register_buffer("seen", torch.empty(4))
    with pytest.raises(TypeError, match="Router does not define init_weights"):
        router.init_weights(lambda name: torch.Generator())


def test_a_router_may_take_more_than_it_is_given() -> None:
    class Wide(Router):
        def forward(self, *args: object, scale: float = 1.0) -> Routing:  # type: ignore[override]
            raise AssertionError

    try:
        assert register_router("wide")(Wide) is ROUTERS["wide"] and ROUTER_CONFIGS["wide"] is Wide.Config
        assert Wide.Config().name == "wide" and Router.Config().name == "promoe", "it has a Config of its own"
    finally:
        ROUTERS.pop("wide", None)
        ROUTER_CONFIGS.pop("wide", None)
