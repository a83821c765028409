from __future__ import annotations

import pytest

from promoe_ds.diffusion.spacing import spaced_timesteps


def slow_sections(num_steps: int, counts: list[int]) -> list[int]:
    """The rule written out: walk through each section with a float position."""
    base, extra = num_steps // len(counts), num_steps % len(counts)
    kept, first = [], 0
    for number, count in enumerate(counts):
        length = base + 1 if number < extra else base
        step = 1 if count <= 1 else (length - 1) / (count - 1)
        position = 0.0
        for _ in range(count):
            kept.append(first + round(position))
            position += step
        first += length
    return kept


@pytest.mark.parametrize("num_steps", [1000, 997, 4000])
@pytest.mark.parametrize("counts", [[250], [1], [2], [50], [100], [333], [10, 15, 20], [1, 1, 1], [3, 200, 7, 100]])
def test_sections_follow_the_rule(num_steps: int, counts: list[int]) -> None:
    kept = spaced_timesteps(num_steps, ",".join(map(str, counts)))
    assert kept == slow_sections(num_steps, counts)
    assert kept == sorted(set(kept)) and kept[0] == 0 and kept[-1] < num_steps


def test_250_of_1000() -> None:
    kept = spaced_timesteps(1000, 250)
    assert kept == spaced_timesteps(1000, "250") == [round(i * 999 / 249) for i in range(250)]
    assert kept[:4] == [0, 4, 8, 12] and kept[31:34] == [124, 128, 132] and kept[-3:] == [991, 995, 999]
    assert spaced_timesteps(1000, 1000) == list(range(1000))
    assert spaced_timesteps(1000, 1) == [0]


def test_whole_strides() -> None:
    assert spaced_timesteps(1000, "ddim50") == list(range(0, 1000, 20))
    assert spaced_timesteps(1000, "ddim250") == list(range(0, 1000, 4))
    assert spaced_timesteps(1000, "ddim1000") == list(range(1000))
    assert spaced_timesteps(1000, "ddim1") == [0]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (1001, "keeps 1001 of the 1000 timesteps of a section"),
        ("10,600", "keeps 600 of the 500 timesteps of a section"),
        ("ddim300", "no whole stride gives 300 of 1000 timesteps"),
        (0, "is not a number of steps"),
        ("", "is not a number of steps"),
        ("10,,5", "is not a number of steps"),
        ("ddim", "is not a number of steps"),
        ("many", "nor a list like 10,15,20, nor ddimN"),
    ],
)
def test_impossible_spacings(spec: int | str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        spaced_timesteps(1000, spec)
