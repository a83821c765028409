from __future__ import annotations

import itertools

import numpy as np
import pytest

from promoe_ds.data.order import Purpose, row_generator, step_indices


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


def test_a_stream_depends_on_its_four_words_alone():
    first = row_generator(1, 2, 3, Purpose.NOISE).standard_normal(100)
    row_generator(1, 2, 4, Purpose.NOISE).standard_normal(100)
    np.testing.assert_array_equal(first, row_generator(1, 2, 3, Purpose.NOISE).standard_normal(100))


def test_streams_that_differ_in_one_word_share_no_numbers():
    seeds = steps = rows = (0, 1, 2, 255, 2**63)
    streams = [
        row_generator(seed, step, row, purpose).integers(0, 2**63, size=64)
        for seed in seeds
        for step in steps
        for row in rows
        for purpose in Purpose
    ]
    drawn = np.concatenate(streams)
    assert len(np.unique(drawn)) == len(drawn)


def test_moments_and_correlation_across_rows_and_purposes():
    draws = np.array(
        [
            [row_generator(0, 5, row, purpose).standard_normal(64) for row in range(256)]
            for purpose in (Purpose.NOISE, Purpose.TIME)
        ]
    )
    n = draws[0].size
    assert abs(draws.mean()) < 4 / np.sqrt(2 * n)
    assert abs(draws.var() - 1) < 4 * np.sqrt(2 / (2 * n))
    assert abs((draws[0] * draws[1]).mean()) < 4 / np.sqrt(n)  # between purposes
    assert abs((draws[0, 1:] * draws[0, :-1]).mean()) < 4 / np.sqrt(n)  # between neighbouring rows
    firsts = np.array([row_generator(0, i // 50, i % 50, Purpose.DROP).random() for i in range(2000)])
    assert abs(firsts.mean() - 0.5) < 4 * np.sqrt(1 / 12 / 2000)
    assert abs(np.mean(firsts < 0.1) - 0.1) < 4 * np.sqrt(0.09 / 2000)


def test_words_must_fit_in_64_bits():
    with pytest.raises(OverflowError):
        row_generator(2**64, 0, 0, Purpose.NOISE)
    with pytest.raises(OverflowError):
        row_generator(0, 0, -1, Purpose.NOISE)


def test_golden_numbers():
    """A NumPy that shuffles or draws otherwise would silently change every run that is resumed under it."""
    assert step_indices(0, 0, 8, 100).tolist() == [94, 77, 56, 85, 32, 22, 45, 37]
    assert step_indices(0, 13, 8, 100).tolist() == [90, 0, 72, 51, 49, 47, 98, 14]  # 104 to 111: the second epoch
    normal = row_generator(1, 2, 3, Purpose.NOISE).standard_normal(3, dtype=np.float32)
    np.testing.assert_allclose(normal, [-1.2031482, -0.20574203, 0.5045525], rtol=1e-6)
