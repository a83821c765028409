"""Images in, micro-batches out: data sets (`dataset`: `digits`, `images`, `latents`), the global order (`order`), the
stream (`batches`); `codecs` turn images into latents and back, `shards` is how latents lie on disk."""

from __future__ import annotations

import hashlib
import json

import numpy as np

from promoe_ds.config.schema import Config, reject
from promoe_ds.data.codecs import find_codec
from promoe_ds.data.dataset import ImageDataset
from promoe_ds.data.images import PackedImages, open_images
from promoe_ds.data.latents import open_latents


def fingerprint(dataset: ImageDataset) -> str:
    """What a resumed run must find again: so many images, with these labels in this order, of these classes.

    Not the pixels, which would take hours to read: "1281167 images of 1000 classes, 5f3e...".
    """
    digest = hashlib.blake2b(json.dumps(dataset.classes).encode(), digest_size=8)
    digest.update(np.ascontiguousarray(dataset.label_B, dtype="<i8").tobytes())
    return f"{len(dataset)} images of {dataset.num_classes} classes, {digest.hexdigest()}"


def build_dataset(config: Config) -> ImageDataset:
    """The data set `config.data` names, agreeing with `config.model` in classes, channels and size.

    Raises:
        ConfigError: it cannot be read, or it disagrees with the model.
    """
    if config.data.vae is not None:
        if config.data.name != "latents":
            reject("data.vae", config.data.vae, f"data.name={config.data.name} has no latents to decode", "remove it")
        find_codec(config.data.vae, "data.vae")
    dataset = _open(config)
    source = "data.name=digits" if config.data.name == "digits" else f"data.path={config.data.path}"
    for key, what in (
        ("num_classes", "class(es)"),
        ("channels", "channel(s)"),
        ("image_size", f"{dataset.unit} per side"),
    ):
        wanted, found = getattr(config.model, key), getattr(dataset, key)
        if wanted != found:
            way_out = f"set model.{key}={found} or choose other data"
            reject(f"model.{key}", wanted, f"{source} has {found} {what}", way_out)
    return dataset.hold() if isinstance(dataset, PackedImages) else dataset  # last: it takes seconds


def _open(config: Config) -> ImageDataset:
    data, model = config.data, config.model
    if data.name == "digits":
        if data.path is not None:
            reject("data.path", data.path, "data.name=digits is embedded and reads no files", "add data.name=images")
        from promoe_ds.data.digits import Digits  # late: scikit-learn takes a second to import

        return Digits()
    if data.path is None:
        reject("data.path", "null", f"data.name={data.name} needs one", "add data.path=PATH")
    if data.name == "latents":
        return open_latents(data.path)
    return open_images(data.path, split=data.split, channels=model.channels, image_size=model.image_size)
