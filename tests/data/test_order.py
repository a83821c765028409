from __future__ import annotations

import itertools

import numpy as np
import pytest

from promoe_ds.data.order import step_indices
from promoe_ds.data.step_noise import Purpose, row_generator


def test_indices_are_a_pure_function_of_their_arguments():
    asked_in_order = [step_indices(7, step, 32, 100) for step in range(12)]
    asked_backwards = [step_indices(7, step, 32, 100) for step in reversed(range(12))][::-1]
    np.testing.assert_array_equal(asked_in_order, asked_backwards)
    assert asked_in_order[0].dtype == np.int64


@pytest.mark.parametrize(("global_batch", "n"), [(32, 100), (100, 32), (10, 10), (1, 7), (64, 3), (5, 1)])
def test_each_index_once_an_epoch(global_batch: int, n: int):
    steps = -(-4 * n // global_batch)
    visited = np.concatenate([step_indices(0, step, global_batch, n) for step in range(steps)])
    for epoch in range(4):
        assert sorted(visited[epoch * n : (epoch + 1) * n]) == list(range(n))


def test_indices_are_the_formula_of_the_docstring():
    seed, G, n = 3, 24, 50
    for step in range(7):
        for row, index in enumerate(step_indices(seed, step, G, n)):
            epoch, offset = divmod(step * G + row, n)
            assert index == row_generator(seed, epoch, 0, Purpose.ORDER).permutation(n)[offset]


def test_epochs_and_seeds_are_shuffled_differently():
    orders = [step_indices(seed, epoch, 500, 500) for seed in (0, 1) for epoch in (0, 1)]
    for a, b in itertools.combinations(orders, 2):
        assert np.mean(a == b) < 0.05


def test_the_batch_size_does_not_change_the_sequence():
    def sequence(global_batch: int) -> list[int]:
        return np.concatenate([step_indices(5, s, global_batch, 77) for s in range(240 // global_batch)]).tolist()

    assert sequence(8) == sequence(48) == sequence(240)


def test_a_step_far_into_training_needs_no_earlier_one():
    n = 1_280_000
    late = step_indices(0, 10**9 + 1, 256, n)
    assert len(np.unique(late)) == 256 and late.max() < n


def test_golden_numbers():
    """A NumPy that shuffles otherwise would silently change every run that is resumed under it."""
    assert step_indices(0, 0, 8, 100).tolist() == [94, 77, 56, 85, 32, 22, 45, 37]
    assert step_indices(0, 13, 8, 100).tolist() == [90, 0, 72, 51, 49, 47, 98, 14]  # 104 to 111: the second epoch
