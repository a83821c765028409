from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from promoe_ds.config.errors import ConfigError
from promoe_ds.evaluation import features
from promoe_ds.evaluation.digits import digits_split
from promoe_ds.evaluation.extractors import load_extractor
from promoe_ds.evaluation.features import DigitsCNN
from promoe_ds.evaluation.metrics import label_agreement


@pytest.fixture(scope="module")
def cnn() -> DigitsCNN:
    return DigitsCNN()


def test_held_out_accuracy(cnn: DigitsCNN):
    held_out = digits_split()[1]
    assert cnn.accuracy >= 0.97
    assert cnn.accuracy == label_agreement(cnn.logits(held_out.images_NHWC), held_out.labels_N)


def test_shapes_and_dtypes(cnn: DigitsCNN):
    images = digits_split()[1].images_NHWC
    features, logits = cnn.features(images), cnn.logits(images)
    assert features.shape == (450, 64) and logits.shape == (450, 10)
    assert features.dtype == logits.dtype == np.float32
    assert cnn.num_classes == logits.shape[1] == 10


def test_no_feature_is_constant(cnn: DigitsCNN):
    assert (cnn.features(digits_split()[0].images_NHWC).std(axis=0) > 0.1).all()


def test_features_do_not_depend_on_the_batch(cnn: DigitsCNN):
    images = np.concatenate([split.images_NHWC for split in digits_split()])  # more than one internal batch
    alone = np.concatenate([cnn.features(images[i : i + 300]) for i in range(0, len(images), 300)])
    np.testing.assert_allclose(cnn.features(images), alone, atol=1e-4)


def test_read_only_images_are_accepted(cnn: DigitsCNN):
    images = digits_split()[1].images_NHWC.copy()
    images.setflags(write=False)
    assert cnn.features(images).shape == (450, 64)


def test_same_network_whatever_the_global_state():
    images = digits_split()[1].images_NHWC
    threads = torch.get_num_threads()
    features._trained.cache_clear()
    torch.manual_seed(1)
    first = DigitsCNN(epochs=2)
    assert DigitsCNN(epochs=2)._net is first._net
    one = first.logits(images)
    features._trained.cache_clear()
    torch.manual_seed(2)
    torch.set_num_threads(2)
    try:
        second = DigitsCNN(epochs=2)
        assert second._net is not first._net
        two = second.logits(images)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    np.testing.assert_allclose(one, two, rtol=0, atol=1e-5)
    assert (DigitsCNN(epochs=2, seed=1).logits(images) != one).any()


def test_global_generators_are_untouched():
    features._trained.cache_clear()
    before = torch.get_rng_state(), repr(np.random.get_state()), random.getstate()
    DigitsCNN(epochs=1)
    after = torch.get_rng_state(), repr(np.random.get_state()), random.getstate()
    assert torch.equal(after[0], before[0]) and after[1:] == before[1:]


def test_unknown_extractor_lists_the_known_ones():
    with pytest.raises(ConfigError, match="resnet: no such feature extractor; choose one of digits-cnn, inception"):
        load_extractor("resnet")
    with pytest.raises(ConfigError, match="incepton: no such feature extractor; did you mean 'inception'"):
        load_extractor("incepton")
