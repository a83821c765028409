from __future__ import annotations

import numpy as np
import pytest
from sklearn.datasets import load_digits

from promoe_ds.config.errors import ConfigError
from promoe_ds.evaluation.digits import digits_images, digits_split, noise_images, pixels_from_model
from promoe_ds.evaluation.images import digests
from promoe_ds.evaluation.reference import find_reference


def test_pixels_truncate_and_saturate():
    x = np.array([-9.0, -1.0, -0.5, 0.0, 0.5, 1.0, 9.0])
    assert pixels_from_model(x).tolist() == [0, 0, 64, 128, 191, 255, 255]
    assert pixels_from_model(x).dtype == np.uint8


def test_digits_follow_the_sampler_convention():
    images, labels = digits_images()
    values = load_digits().images  # type: ignore[attr-defined]
    assert images.shape == (1797, 8, 8, 1) and images.dtype == np.uint8
    assert labels.dtype == np.int64 and set(labels.tolist()) == set(range(10))
    for value in range(17):
        expected = int(min(max(127.5 * (value / 8 - 1) + 128, 0), 255))
        assert (images[..., 0][values == value] == expected).all()


def test_split_is_fixed_stratified_and_disjoint():
    train, held_out = digits_split()
    assert (len(train), len(held_out)) == (1347, 450)
    assert np.bincount(held_out.labels_N).min() >= 43 and np.bincount(held_out.labels_N).max() <= 46
    assert (digits_split()[1].images_NHWC == held_out.images_NHWC).all()
    pixels = np.concatenate([train.images_NHWC, held_out.images_NHWC]).reshape(1797, -1)
    everything = digits_images()[0].reshape(1797, -1)
    assert sorted(map(bytes, pixels)) == sorted(map(bytes, everything))


def test_noise_is_seeded_saturated_normal():
    noise = noise_images(2000, (8, 8, 1), seed=3)
    assert noise.shape == (2000, 8, 8, 1) and noise.dtype == np.uint8
    assert (noise == noise_images(2000, (8, 8, 1), seed=3)).all()
    assert (noise != noise_images(2000, (8, 8, 1), seed=4)).any()
    tail = 0.1587  # P(z > 1): what saturates on each side
    assert (noise == 255).mean() == pytest.approx(tail, abs=0.01)
    assert (noise == 0).mean() == pytest.approx(tail, abs=0.01)


def test_unknown_reference_lists_the_known_ones():
    with pytest.raises(ConfigError, match="--ref=mnist: no such reference set; choose one of digits"):
        find_reference("mnist")


def test_digests_see_pixels_and_shape():
    images = digits_images()[0][:3]
    assert len(digests(images)) == 3 * 32 and digests(images[1:2]) == digests(images)[32:64]
    assert digests(images.reshape(3, 4, 16, 1)) != digests(images)
