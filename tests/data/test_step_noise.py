from __future__ import annotations

import time

import numpy as np

from promoe_ds.data.step_noise import Purpose, coins, normal, row_generator


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


def test_rows_are_drawn_each_from_its_stream():
    rows = np.array([7, 0, 2**40])
    drawn = normal(3, 5, rows, Purpose.NOISE, (2, 4))
    flips = coins(3, 5, rows, Purpose.FLIP, 0.5)
    assert drawn.dtype == np.float32 and flips.dtype == bool
    for row, noise, flip in zip(rows, drawn, flips, strict=True):
        expected = row_generator(3, 5, int(row), Purpose.NOISE).standard_normal((2, 4), dtype=np.float32)
        np.testing.assert_array_equal(noise, expected)
        assert flip == (row_generator(3, 5, int(row), Purpose.FLIP).random() < 0.5)
    assert normal(3, 5, rows, Purpose.TIME, ()).shape == (3,)


def test_golden_numbers():
    """A NumPy that draws otherwise would silently change every run that is resumed under it."""
    drawn = row_generator(1, 2, 3, Purpose.NOISE).standard_normal(3, dtype=np.float32)
    np.testing.assert_allclose(drawn, [-1.2031482, -0.20574203, 0.5045525], rtol=1e-6)


def test_speed_of_the_noise():
    """64 images of latent size cost a few times what NumPy's own generator takes, which is not keyed by image."""
    generator, ours, numpys = np.random.default_rng(0), [], []
    for step in range(20):
        start = time.perf_counter()
        normal(0, step, np.arange(64), Purpose.NOISE, (4, 32, 32))
        between = time.perf_counter()
        generator.standard_normal((64, 4, 32, 32))
        ours.append(between - start)
        numpys.append(time.perf_counter() - between)
    print(f"noise of 64 x 4x32x32: {1e3 * min(ours):.2f} ms, NumPy's: {1e3 * min(numpys):.2f} ms")
    assert min(ours) < 10 * min(numpys)
