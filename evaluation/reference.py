"""What samples are compared with: real images, and the noise that sampling starts from.

Shape suffixes: N images, H W pixels, C channels. Images are uint8 NHWC in 0..255.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from promoe_ds.config import reject

Images = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]

HELD_OUT = 450
"""digits kept away from the classifier's training; the other 1347 are its train split"""


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Labelled images: `images_NHWC` uint8, `labels_N` int64."""

    name: str
    images_NHWC: Images
    labels_N: Labels

    def __len__(self) -> int:
        return len(self.images_NHWC)

    @property
    def sha256(self) -> str:
        """Hash of the pixels: two scores are comparable only if their references agree in it."""
        return hashlib.sha256(self.images_NHWC.tobytes()).hexdigest()


@dataclass(frozen=True, eq=False)
class Reference(ImageSet):
    """The images samples are compared with, and `real_pair`: two disjoint sets of real images of the same kind.

    The distance within the pair is the scale on which to read the distance of samples; None where there is no pair.
    """

    real_pair: tuple[ImageSet, ImageSet] | None = None


def pixels_from_model(x: npt.NDArray[Any]) -> Images:
    """Model range [-1, 1] -> uint8 by clamp(127.5 x + 128, 0, 255), truncated; any shape. Same rule as the sampler's.

    Values outside the range saturate.
    """
    return np.clip(127.5 * x + 128.0, 0, 255).astype(np.uint8)


def digits_images() -> tuple[Images, Labels]:
    """All 1797 digits of scikit-learn as uint8 [1797, 8, 8, 1] and their classes 0..9, int64 [1797].

    A stored intensity v in 0..16 is v/8 - 1 for the model, hence `pixels_from_model(v/8 - 1)` here.
    """
    digits: Any = load_digits()
    return pixels_from_model(digits.images[..., None] / 8.0 - 1.0), digits.target.astype(np.int64)


def digits_split() -> tuple[ImageSet, ImageSet]:
    """The fixed stratified split of the digits: 1347 to train the classifier on, 450 held out."""
    images_NHWC, labels_N = digits_images()
    train, held_out = train_test_split(np.arange(len(labels_N)), test_size=HELD_OUT, stratify=labels_N, random_state=0)
    return (
        ImageSet("digits-train", images_NHWC[train], labels_N[train]),
        ImageSet("digits-held-out", images_NHWC[held_out], labels_N[held_out]),
    )


def noise_images(n: int, shape: tuple[int, int, int], seed: int) -> Images:
    """What sampling starts from, seen as pixels: standard normal noise, uint8 [n, *shape] with shape = (H, W, C).

    The distance of such images from the reference is the unit of `fd_over_noise`: an untrained model scores about 1.
    """
    noise = np.random.default_rng(seed).standard_normal((n, *shape), dtype=np.float32)
    return pixels_from_model(noise)


def _digits() -> Reference:
    return Reference("digits", *digits_images(), real_pair=digits_split())


REFERENCES: dict[str, Callable[[], Reference]] = {"digits": _digits}
"""reference name -> its loader"""


def load_reference(name: str) -> Reference:
    """The reference set called `name`. Raises `ConfigError` listing the known ones."""
    if name not in REFERENCES:
        reject("--ref", name, "no such reference set", f"choose one of {', '.join(REFERENCES)}")
    return REFERENCES[name]()
