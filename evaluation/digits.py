"""The embedded real images, scikit-learn's digits, and the noise that sampling starts from.

Shape suffixes: N images, H W pixels, C channels. Images are uint8 NHWC in 0..255.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from promoe_ds.evaluation.images import Images, ImageSet, Labels

HELD_OUT = 450
"""digits kept away from the classifier's training; the other 1347 are its train split"""


@dataclass(frozen=True, eq=False)
class Digits(ImageSet):
    """Digits in memory, all of them labelled."""

    images_NHWC: Images
    labels_N: Labels


def pixels_from_model(x: npt.NDArray[Any]) -> Images:
    """Model range [-1, 1] -> uint8 by clamp(127.5 x + 128, 0, 255), truncated; any shape. Same rule as the sampler's.

    Values outside the range saturate.
    """
    return np.clip(127.5 * x + 128.0, 0, 255).astype(np.uint8)


def digits_images() -> tuple[Images, Labels]:
    """All 1797 digits of scikit-learn as uint8 [1797, 8, 8, 1] and their classes 0..9, int64 [1797].

    A stored intensity v in 0..16 is v/8 - 1 for the model, hence `pixels_from_model(v/8 - 1)` here.
    """
    from sklearn.datasets import load_digits  # late: scikit-learn takes a second to import

    digits: Any = load_digits()
    return pixels_from_model(digits.images[..., None] / 8.0 - 1.0), digits.target.astype(np.int64)


def digits_split() -> tuple[Digits, Digits]:
    """The fixed stratified split of the digits: 1347 to train the classifier on, 450 held out."""
    from sklearn.model_selection import train_test_split  # late too

    images_NHWC, labels_N = digits_images()
    train, held_out = train_test_split(np.arange(len(labels_N)), test_size=HELD_OUT, stratify=labels_N, random_state=0)
    return (
        Digits("digits-train", images_NHWC[train], labels_N[train]),
        Digits("digits-held-out", images_NHWC[held_out], labels_N[held_out]),
    )


def noise_images(n: int, shape: tuple[int, int, int], seed: int) -> Images:
    """What sampling starts from, seen as pixels: standard normal noise, uint8 [n, *shape] with shape = (H, W, C).

    The distance of such images from the reference is the unit of `fd_over_noise`: an untrained model scores about 1.
    """
    noise = np.random.default_rng(seed).standard_normal((n, *shape), dtype=np.float32)
    return pixels_from_model(noise)
