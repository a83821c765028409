"""Eleven pictures of three classes, and how tests open a data set of them or are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.image_layouts import some_items
from promoe_ds.config.errors import ConfigError
from promoe_ds.data.images import DecodedImages, open_images

ITEMS = some_items()
LABELS, NAMES = [label for *_, label in ITEMS], ["n01", "n02", "n03"]


def opened(path: Path, split: str = "train", num_classes: int | None = 3) -> DecodedImages:
    return open_images(str(path), split=split, channels=3, image_size=8, num_classes=num_classes)


def told(path: Path, **more: Any) -> str:
    """The one line that refuses it, when it is opened or read."""
    with pytest.raises(ConfigError) as caught:
        data = opened(path, **more)
        data.get(np.arange(len(data)))
    assert "\n" not in str(caught.value)
    return str(caught.value)
