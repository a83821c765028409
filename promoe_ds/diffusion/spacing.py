"""Which timesteps a sampler visits, in ADM's notation of respacing (arXiv:2102.09672, Sec. 4; arXiv:2105.05233).

Arithmetic without tensors, so that a configuration can be checked without importing torch.
"""

from __future__ import annotations

from itertools import accumulate, repeat


def spaced_timesteps(num_steps: int, spec: int | str) -> list[int]:
    """The timesteps kept out of 0..num_steps-1, increasing.

    - `250` (or "250"): that many, evenly spaced, first and last included.
    - "10,15,20": the range is cut into equal sections (the first ones longer by one where it does not divide), and
      each keeps that many steps, evenly spaced, its first and last included.
    - "ddim50": that many at a whole stride from 0 on; the smallest stride that gives exactly as many.

    Positions inside a section are running sums of a float stride, rounded half to even, as ADM computes them.

    Raises:
        ValueError: the notation is none of these, or asks for more steps than there are; says why, without the value.
    """
    text = str(spec).strip()
    if text.startswith("ddim"):
        return _strided(num_steps, _count(text.removeprefix("ddim")))
    counts = [_count(part) for part in text.split(",")]
    size, longer = divmod(num_steps, len(counts))
    kept, start = [], 0
    for section, count in enumerate(counts):
        length = size + (section < longer)
        if count > length:
            raise ValueError(f"keeps {count} of the {length} timesteps of a section")
        stride = (length - 1) / (count - 1) if count > 1 else 1.0
        kept += [start + round(position) for position in accumulate(repeat(stride, count - 1), initial=0.0)]
        start += length
    return kept


def _count(text: str) -> int:
    if not text.strip().isdecimal() or int(text) < 1:
        raise ValueError("is not a number of steps, nor a list like 10,15,20, nor ddimN")
    return int(text)


def _strided(num_steps: int, count: int) -> list[int]:
    for stride in range(1, num_steps + 1):
        if len(range(0, num_steps, stride)) == count:
            return list(range(0, num_steps, stride))
    raise ValueError(f"no whole stride gives {count} of {num_steps} timesteps")
