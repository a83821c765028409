"""Images in, micro-batches out: data sets (`dataset`: `digits`, `images`, `latents`), the global order (`order`), the
stream (`batches`); `codecs` turn images into latents and back, `shards` and `caches` are how latents lie on disk."""

from __future__ import annotations

import hashlib
import json

import numpy as np

from promoe_ds.config.schema import Config, reject
from promoe_ds.data.caches import open_latents
from promoe_ds.data.codecs import find_codec
from promoe_ds.data.dataset import ImageDataset
from promoe_ds.data.images import PackedImages, open_images
from promoe_ds.data.latents import Latents
from promoe_ds.utils.files import left_out_words


def fingerprint(dataset: ImageDataset) -> str:
    """What a resumed run must find again: so many images, with these labels in this order, of these classes.

    Not the pixels, which would take hours to read: "1281167 images of 1000 classes, 5f3e...". Latents whose
    scale is not simply their codec's add it: "..., scaled 07c1...".
    """
    digest = hashlib.blake2b(json.dumps(dataset.classes).encode(), digest_size=8)
    digest.update(np.ascontiguousarray(dataset.label_B, dtype="<i8").tobytes())
    text = f"{len(dataset)} images of {dataset.num_classes} classes, {digest.hexdigest()}"
    codec = dataset.codec if isinstance(dataset, Latents) else {"kind": "none", "scale": 1.0}
    if codec["kind"] and not isinstance(codec["scale"], list):
        return text
    how = json.dumps([codec.get(key) for key in ("scale", "shift", "pixel_range")])
    return f"{text}, scaled {hashlib.blake2b(how.encode(), digest_size=4).hexdigest()}"


def notes(dataset: ImageDataset) -> list[str]:
    """What a user should know of data that was read: which names were left out, how its format was told."""
    left_out = left_out_words(dataset.left_out) if dataset.left_out else ""
    return [note for note in (left_out, dataset.note) if note]


def build_dataset(config: Config) -> ImageDataset:
    """The data set `config.data` names, agreeing with `config.model` in classes, channels and size.

    Raises:
        ConfigError: it cannot be read, or it disagrees with the model.
    """
    if config.data.vae is not None:
        if config.data.name != "latents":
            reject("data.vae", config.data.vae, f"data.name={config.data.name} has no latents to decode", "remove it")
        find_codec(config.data.vae, "data.vae")
    for key in ("format", "scale", "shift"):
        if (value := getattr(config.data, key)) is not None and config.data.name != "latents":
            reject(f"data.{key}", value, f"data.name={config.data.name} reads no latents", "remove it")
    dataset = _open(config)
    if config.data.hflip and isinstance(dataset, Latents) and dataset.flips == 1:
        reject("data.hflip", "true", f"{config.data.path} holds no mirror images", "set data.hflip=false")
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
        return open_latents(data.path, data, model.num_classes)
    size = {"channels": model.channels, "image_size": model.image_size, "num_classes": model.num_classes}
    return open_images(data.path, split=data.split, **size)
