"""One expert-parallel MoE layer on 2 and 4 real processes: equal to one device, and not a row more than needed sent."""

from __future__ import annotations

import json

import pytest

from tests.launch import run, torchrun

D, FP32, BF16 = 16, 4, 2


@pytest.fixture(scope="module", params=[(2, 2), (4, 2)], ids=["world 2, ep 2", "world 4, ep 2"])
def launched(request: pytest.FixtureRequest) -> list[dict]:
    """What each rank found."""
    world, ep = request.param
    done = run(torchrun(world, "tests/distributed/expert_parallel_worker.py", str(ep)))
    (line,) = [text for text in done.stdout.splitlines() if text.startswith("RESULT ")]
    everyone = json.loads(line.removeprefix("RESULT "))
    assert len(everyone) == world
    return everyone


@pytest.fixture
def results(launched: list[dict]) -> list[dict]:
    return [rank["cases"] for rank in launched]


def test_sharded_equals_one_device(results: list[dict]) -> None:
    """Outputs and all gradients, with ranks that have no routed row, all-null batches and a single busy expert."""
    for cases in results:
        for name, case in cases.items():
            for what in ("output", "input grad", "gradients"):
                assert case[what] < (0.2 if name == "bf16 autocast" else 3e-5), (name, what, case)


def test_exactly_the_rows_that_belong_elsewhere_travel(results: list[dict]) -> None:
    """Forward and backward; null-label images send nothing; every rank still joins every exchange."""
    for cases in results:
        for name, case in cases.items():
            assert case["rows sent"] == case["rows needed"], name
            assert case["row bytes"] == [D * (BF16 if name == "bf16 autocast" else FP32)], name
            assert case["counts exchanges"] == 1, name
            assert case["all-reduces"] == [12 * (D + 1)] * 2, name  # centroids of the contrastive loss
        assert cases["all null, top-1"]["rows sent"] == [0, 0, 0, 0]
    assert any(sum(cases["mixed, top-1"]["rows sent"]) for cases in results)


def test_one_all_reduce_serves_the_losses_of_all_layers(launched: list[dict]) -> None:
    """Two layers and two losses: one in the forward pass, one in the backward pass, however blocks are recomputed."""
    for rank in launched:
        assert rank["reductions"] == dict.fromkeys(("none", "block", "selective"), [2 * 12 * (D + 2)] * 2)


def test_experts_that_do_not_travel_work_while_rows_do(results: list[dict]) -> None:
    """Forward and backward, on every rank alike, whatever its tokens."""
    forward = "leave shared arrive routed leave unconditional arrive".split()
    backward = "leave unconditional arrive routed leave shared arrive".split()
    for cases in results:
        for name, case in cases.items():
            again = ["shared", "routed", "unconditional"] if name == "selective checkpointing" else []
            assert case["events"] == forward + again + backward, name
