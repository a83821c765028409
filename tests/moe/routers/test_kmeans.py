"""The k-means router: nearest centroids and their update, wherever they start."""

from __future__ import annotations

from typing import Any

import torch

from tests.moe.routers.loops import LABELS, D, E, S, make, route, split_of, tokens


def test_kmeans_nearest_centroid_and_its_update() -> None:
    router: Any = make("kmeans")
    places = []
    for seed in range(4):
        x = tokens(seed=seed)
        before = router.centroids.clone()
        routing = route(router, x, split_of())
        if seed == 0:  # E distinct tokens of the first batch
            before = router.centroids.clone()
            places = [int((x.reshape(-1, D) - c).norm(dim=1).argmin()) for c in before]
            assert len(set(places)) == E and torch.equal(x.reshape(-1, D)[places], before)
        nearest = [min(range(E), key=lambda i: float((t - before[i]).norm())) for t in x.detach().reshape(-1, D)]  # noqa: B023
        assert routing.expert_N.tolist() == nearest and (routing.weight_N == 1).all()
        assert torch.equal(router.centroids, before), "centroids move after the step, not in it"
        router.after_step()
        for i in range(E):
            own = [t for t, j in zip(x.reshape(-1, D), nearest, strict=True) if j == i]
            torch.testing.assert_close(router.centroids[i], torch.stack(own).mean(0) if own else before[i])


def test_kmeans_empty_centroid_keeps_its_place() -> None:
    router: Any = make("kmeans")
    route(router, tokens(), split_of())
    router.centroids[2] = 1e3
    router.drop_step()
    route(router, tokens(), split_of())
    router.after_step()
    assert (router.centroids[2] == 1e3).all() and (router.centroids[[0, 1, 3]].abs() < 10).all()


def test_kmeans_forgets_centroids_placed_on_tokens_that_are_not_finite() -> None:
    router: Any = make("kmeans")
    route(router, tokens() * float("nan"), split_of())
    assert not router.centroids.isfinite().any()
    router.drop_step()
    assert not router.placed.any() and router.centroids.isfinite().all()
    route(router, tokens(), split_of())
    assert router.placed.all() and router.centroids.isfinite().all()


def test_kmeans_starts_the_same_however_the_batch_is_split() -> None:
    """Two ranks that gather each other's candidates, and a batch too small to place every centroid."""
    whole: Any = make("kmeans")
    x = tokens(4)
    route(whole, x, split_of(LABELS[:4]))
    halves, mine = [make("kmeans") for _ in range(2)], []
    parts = [(x[:2], torch.tensor([0, 1])), (x[2:], torch.tensor([2, 3]))]
    for router, (part, rows) in zip(halves, parts, strict=True):  # first pass: see what each rank offers
        router.all_gather = lambda v: mine.append(v) or v
        route(router, part, split_of(LABELS[:2], row_B=rows))
    for part, rows in parts:
        router: Any = make("kmeans")
        router.all_gather = lambda v: torch.cat(mine)
        route(router, part, split_of(LABELS[:2], row_B=rows))
        assert torch.equal(router.centroids, whole.centroids)
    few: Any = make("kmeans", experts=S + 3)
    route(few, tokens(1), split_of([1]))
    assert few.placed.sum() == S
    route(few, tokens(2, seed=3), split_of([1, 2]))
    assert few.placed.sum() == S + 3
