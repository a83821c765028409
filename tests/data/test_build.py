from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from promoe_ds.config.errors import ConfigError
from promoe_ds.config.schema import Config, DataConfig, ModelConfig
from promoe_ds.data import build_dataset, fingerprint
from promoe_ds.data.images import FolderImages, PackedImages
from promoe_ds.moe import routers as routers  # a Config holds the one of a router

DIGITS = Config(moe=None, model=ModelConfig(image_size=8, channels=1, num_classes=10))


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8), "red").save(tmp_path / name / "0.png")
    return tmp_path


def images_config(path: Path | None, num_classes: int = 2) -> Config:
    model = ModelConfig(image_size=8, channels=3, num_classes=num_classes)
    return Config(moe=None, model=model, data=DataConfig(name="images", path=path and str(path)))


def test_digits_are_built():
    assert len(build_dataset(DIGITS)) == 1797


@pytest.mark.parametrize(
    ("key", "value", "found"),
    [
        ("num_classes", 1000, "10 class(es)"),
        ("channels", 3, "1 channel(s)"),
        ("image_size", 32, "8 pixels per side"),
    ],
)
def test_digits_that_disagree_with_the_model(key: str, value: int, found: str):
    config = replace(DIGITS, model=replace(DIGITS.model, **{key: value}))
    with pytest.raises(ConfigError) as caught:
        build_dataset(config)
    right = found.split()[0]
    assert str(caught.value) == (
        f"model.{key}={value}: data.name=digits has {found}; set model.{key}={right} or choose other data"
    )


def test_digits_with_a_path_are_a_mistake():
    config = replace(DIGITS, data=DataConfig(path="photos"))
    with pytest.raises(ConfigError) as caught:
        build_dataset(config)
    assert str(caught.value) == (
        "data.path=photos: data.name=digits is embedded and reads no files; add data.name=images"
    )


def test_images_without_a_path_are_a_mistake():
    with pytest.raises(ConfigError, match=r"^data\.path=null: data\.name=images needs one; add data\.path=PATH$"):
        build_dataset(images_config(None))


def test_a_folder_is_read_on_demand(tree: Path):
    dataset = build_dataset(images_config(tree))
    assert isinstance(dataset, FolderImages) and dataset.classes == ["cat", "dog"]


def test_a_folder_with_another_number_of_classes(tree: Path):
    with pytest.raises(ConfigError) as caught:
        build_dataset(images_config(tree, num_classes=1000))
    assert str(caught.value) == (
        f"model.num_classes=1000: data.path={tree} has 2 class(es); set model.num_classes=2 or choose other data"
    )


def test_a_fingerprint_tells_data_sets_apart(tree: Path):
    first = fingerprint(build_dataset(images_config(tree)))
    assert first.startswith("2 images of 2 classes, ") and first == fingerprint(build_dataset(images_config(tree)))
    Image.new("RGB", (8, 8), "red").save(tree / "dog" / "1.png")
    more = fingerprint(build_dataset(images_config(tree)))
    (tree / "dog").rename(tree / "eel")
    assert len({first, more, fingerprint(build_dataset(images_config(tree)))}) == 3
    assert fingerprint(build_dataset(DIGITS)).startswith("1797 images of 10 classes, ")


def test_a_pack_is_held(tree: Path):
    data = np.frombuffer((tree / "cat" / "0.png").read_bytes(), dtype=np.uint8)
    path = tree / "pack.npz"
    np.savez(
        path,
        classes=np.array(["cat", "dog"]),
        train_jpeg=data,
        train_offsets=np.array([0, len(data)]),
        train_labels=np.array([1]),
    )
    dataset = build_dataset(images_config(path))
    assert isinstance(dataset, PackedImages) and dataset.held_BHWC is not None
    assert dataset.get(np.array([0]))[1].tolist() == [1]
