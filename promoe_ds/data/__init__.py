"""Images in, micro-batches out: data sets (`dataset`: `digits`, `images`, `latents`, and `coded_images`, which the step
encodes), the global order (`order`), the stream (`batches`, made by `workers`); `codecs` turn images into latents and
back, `shards` and `caches` are how latents lie on disk."""

from __future__ import annotations

import hashlib
import json

import numpy as np

from promoe_ds.config.errors import ConfigError, reject
from promoe_ds.config.schema import Config
from promoe_ds.data.caches import open_latents
from promoe_ds.data.codecs import find_codec, open_codec
from promoe_ds.data.coded_images import CodedImages
from promoe_ds.data.dataset import ImageDataset
from promoe_ds.data.images import DecodedImages, PackedImages, open_images
from promoe_ds.data.latents import Latents
from promoe_ds.utils.files import left_out_words
from promoe_ds.utils.pictures import IMAGE_MODES


def fingerprint(dataset: ImageDataset) -> str:
    """What a resumed run must find again: so many images, with these labels in this order, of these classes.

    Not the pixels, which would take hours to read: "1281167 images of 1000 classes, 5f3e...". Latents whose
    scale is not simply their codec's add it: "..., scaled 07c1...". Images that the step encodes add the codec.
    """
    digest = hashlib.blake2b(json.dumps(dataset.classes).encode(), digest_size=8)
    digest.update(np.ascontiguousarray(dataset.label_B, dtype="<i8").tobytes())
    text = f"{len(dataset)} images of {dataset.num_classes} classes, {digest.hexdigest()}"
    codec = dataset.codec or {"kind": "none", "scale": 1.0}
    if isinstance(dataset, CodedImages):
        return f"{text}, encoded by {codec['kind']} {codec['digest']}".rstrip()
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
    _check_options(config)
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
    images = dataset.images if isinstance(dataset, CodedImages) else dataset
    if isinstance(images, PackedImages):
        images.hold()  # last: it takes seconds
    return dataset


def _check_options(config: Config) -> None:
    """Raise `ConfigError` for options of `data` that would not be looked at."""
    data = config.data
    if data.vae is not None:
        if data.name == "digits":
            reject("data.vae", data.vae, "data.name=digits has no latents", "remove it")
        find_codec(data.vae, "data.vae")
    for key in ("format", "scale", "shift"):
        if (value := getattr(data, key)) is not None and data.name != "latents":
            reject(f"data.{key}", value, f"data.name={data.name} reads no latents", "remove it")
    if data.split != "train" and data.name != "images":
        reject("data.split", data.split, f"data.name={data.name} has no splits", "remove it")
    if data.workers and data.name != "images":
        reject("data.workers", data.workers, f"data.name={data.name} decodes no pictures", "remove it")
    if data.vae_precision != "fp32" and (data.name != "images" or data.vae is None):
        conflict = "nothing is encoded in the step"
        reject("data.vae_precision", data.vae_precision, conflict, "remove it, or train on images with data.vae")


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
    if data.vae is None:
        return _open_pictures(config, model.channels, model.image_size)
    codec = open_codec(data.vae, option="data.vae")
    if codec.channels != model.channels:  # before a million files are listed
        way_out = f"set model.channels={codec.channels} or name another codec"
        conflict = f"the latents of data.vae={data.vae} ({codec.kind}) have {codec.channels} channel(s)"
        reject("model.channels", model.channels, conflict, way_out)
    images = _open_pictures(config, max(IMAGE_MODES), model.image_size * codec.factor)
    return CodedImages(images, codec, data.vae_precision == "bf16")


def _open_pictures(config: Config, channels: int, side: int) -> DecodedImages:
    """`open_images`; a cache of latents is told as such."""
    path = str(config.data.path)
    sizes = {"channels": channels, "image_size": side, "num_classes": config.model.num_classes}
    try:
        return open_images(path, split=config.data.split, **sizes)
    except ConfigError:
        try:
            found = type(open_latents(path)).__name__
        except ConfigError:
            found = None
        if found is None:
            raise
    reject("data.path", path, f"holds latents, not pictures ({found})", "set data.name=latents")
