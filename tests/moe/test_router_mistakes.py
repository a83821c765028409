"""A user's errors in the options of routers."""

from __future__ import annotations

import pytest

from promoe_ds.config.errors import ConfigError
from promoe_ds.recipes.load import load_config
from promoe_ds.recipes.validate import validate_data


@pytest.mark.parametrize(
    ("router", "overrides", "message"),
    [
        ("token_choice", ["moe.router.top_k=13"], "moe.router.top_k=13: is not in 1..moe.num_experts=12; lower it"),
        ("expert_choice", ["moe.router.top_k=0"], "moe.router.top_k=0: is not in 1..moe.num_experts=12; raise it"),
        ("uniform", ["moe.router.top_k=13"], "moe.router.top_k=13: is not in 1..moe.num_experts=12"),
        ("diffmoe", ["moe.router.top_k=13"], "moe.router.top_k=13: is not in 1..moe.num_experts=12"),
        ("promoe_ec", ["moe.router.top_k=13"], "moe.router.top_k=13: is not in 1..moe.num_experts=12"),
        (
            "expert_choice",
            ["moe.num_experts=24"],
            "moe.num_experts=24: an expert's quota of an image is 16 tokens * top_k=1 // 24 experts = 0; "
            "lower it to at most 16, or raise moe.router.top_k",
        ),
        ("promoe_ec", ["moe.num_experts=24"], "an expert's quota of an image is 16 tokens"),
        ("diffmoe", ["moe.num_experts=24", "train.micro_batch_size=1"], "an expert's quota of the pool is 16 tokens"),
        (
            "kmeans",
            ["moe.num_experts=24", "train.micro_batch_size=1"],
            "moe.num_experts=24: a forward pass has 16 tokens, fewer than centroids; lower it, or raise the batch size",
        ),
        ("token_choice", ["moe.router.balance_weight=-1"], "moe.router.balance_weight=-1.0: must not be negative"),
        ("diffmoe", ["moe.router.capacity_weight=-1"], "moe.router.capacity_weight=-1.0: must not be negative"),
        ("diffmoe", ["moe.router.threshold_decay=1"], "moe.router.threshold_decay=1.0: must lie in [0, 1)"),
        ("promoe", ["moe.router.balance_weight=-1"], "moe.router.balance_weight=-1.0: must not be negative"),
        ("promoe_ec", ["moe.router.contrastive_weight=-1"], "contrastive_weight=-1.0: must not be negative"),
        ("promoe_ec", ["moe.router.temperature=0"], "moe.router.temperature=0.0: must be positive"),
        ("classification", ["moe.router.class_weight=-1"], "moe.router.class_weight=-1.0: must not be negative"),
        ("classification", [], "moe.router.superclasses=null: the classification router needs a superclass file; add"),
        (
            "classification",
            ["moe.router.superclasses=digits"],
            "moe.router.superclasses=digits: has 4 superclasses, one expert each, but moe.num_experts=12; "
            "set moe.num_experts=4 or use another file",
        ),
    ],
)
def test_mistakes_are_one_clear_line(router: str, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        validate_data(load_config("tiny", [f"moe.router.name={router}", *overrides]))
    assert message in str(error.value) and "\n" not in str(error.value)
