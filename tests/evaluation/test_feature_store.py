from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from promoe_ds.config.errors import ConfigError
from promoe_ds.evaluation.collect import load_features
from promoe_ds.evaluation.feature_store import PACKED, FeatureStore
from promoe_ds.evaluation.features import Extracted, FeatureExtractor
from promoe_ds.evaluation.images import Images
from tests.disk import loop


class Means(FeatureExtractor):
    """Features and spatial features that are easy to know: a picture's first pixels."""

    name, is_public, image_shape, batch = "means", False, (2, 2, 1), 3

    def extract(self, images_NHWC: Images) -> Extracted:
        assert len(images_NHWC) <= self.batch
        x = images_NHWC.reshape(len(images_NHWC), -1).astype(np.float32)
        return Extracted(x[:, :3], x[:, 1:], x)


IMAGES = np.random.default_rng(0).integers(0, 256, (12, 2, 2, 1), dtype=np.uint8)


def fill(out: Path, *batches: range) -> None:
    for rows in batches:
        FeatureStore(out, Means()).write(np.array(rows), IMAGES[list(rows)])


def test_images_that_lie_in_two_files_are_counted_once(tmp_path: Path) -> None:
    """Two commands, of one process and of two, have filled the folder at once."""
    fill(tmp_path, range(0, 7), range(7, 12), range(2, 12, 2), range(1, 12, 2))
    FeatureStore(tmp_path, Means()).pack(np.arange(12), {})
    found = load_features(tmp_path / PACKED, "--ref")
    x = IMAGES.reshape(12, -1).astype(np.float64)
    np.testing.assert_array_equal(found.features_Nd, x[:, :3])
    assert found.spatial is not None
    np.testing.assert_allclose(found.gaussian.sigma_dd, np.cov(x[:, :3], rowvar=False))
    np.testing.assert_allclose(found.spatial.mu_d, x[:, 1:].mean(0))
    np.testing.assert_allclose(found.spatial.sigma_dd, np.cov(x[:, 1:], rowvar=False))


def test_a_file_that_vanishes_while_it_is_packed_is_missed(tmp_path: Path) -> None:
    fill(tmp_path, range(0, 7), range(7, 12))
    store = FeatureStore(tmp_path, Means())
    (tmp_path / "made-00000007.safetensors").write_bytes(b"damaged")
    with pytest.raises(LookupError, match="image 7 has disappeared"):
        store.pack(np.arange(12), {})
    store.clear()
    with pytest.raises(LookupError, match="image 0 has disappeared"):
        store.pictures()
    assert not list(tmp_path.iterdir())


def test_features_that_cannot_be_read_are_not_missing(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with pytest.raises(ConfigError, match="no such file"):
        load_features(path, "--ref")
    loop(path)
    with pytest.raises(ConfigError, match=r"^--ref=.*a.safetensors: cannot be read \(Too many levels"):
        load_features(path, "--ref")
