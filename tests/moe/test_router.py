"""The split by label, and the registry."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from promoe_ds.config.schema import ROUTER_CONFIGS, ConfigError, RouterConfig
from promoe_ds.moe.router import Router, Routing, register_router
from promoe_ds.moe.routers import ROUTERS
from promoe_ds.moe.split import Split, split_by_label


def test_conditional_images_come_first_and_order_is_restored() -> None:
    labels = torch.tensor([10, 3, 10, 1, 2])
    split = split_by_label(labels, 10, "cpu")
    assert split.num_conditional == 3
    assert split.label_B.tolist() == [3, 1, 2, 10, 10]
    assert torch.equal(split.label_B[split.restore_B], labels)
    assert torch.equal(labels[split.order_B], split.label_B)


def test_two_routers_cannot_share_a_name() -> None:
    with pytest.raises(ConfigError, match="two routers are named 'promoe'"):
        register_router("promoe")(Router)
    assert ROUTERS["promoe"] is not Router


@dataclass(frozen=True, kw_only=True)
class WideConfig(RouterConfig):
    name: str = "wide"


def test_a_router_with_a_mistake_is_not_registered() -> None:
    class Mine(Router):
        pass

    with pytest.raises(ConfigError, match="router 'mine' of tests.*: set Config to a class of its own"):
        register_router("mine")(Mine)

    @dataclass(frozen=True, kw_only=True)
    class MyConfig(RouterConfig):
        name: str = "mine"

    class Old(Router):
        Config = MyConfig

        def forward(self, x_BSD: torch.Tensor, split: Split) -> Routing:  # type: ignore[override]
            raise AssertionError

    class Keywords(Router):
        Config = MyConfig

        def forward(self, x_TD: torch.Tensor, S: int, *, split: Split) -> Routing:  # type: ignore[override]
            raise AssertionError

    for wrong in (Old, Keywords):
        with pytest.raises(ConfigError, match=r"router 'mine' of tests.*: forward must take \(self, x_TD, S, split\)"):
            register_router("mine")(wrong)
    assert "mine" not in ROUTERS


def test_a_router_may_take_more_than_it_is_given() -> None:
    class Wide(Router):
        Config = WideConfig

        def forward(self, *args: object, scale: float = 1.0) -> Routing:  # type: ignore[override]
            raise AssertionError

    try:
        assert register_router("wide")(Wide) is ROUTERS["wide"] and ROUTER_CONFIGS["wide"] is WideConfig
    finally:
        ROUTERS.pop("wide", None)
        ROUTER_CONFIGS.pop("wide", None)
