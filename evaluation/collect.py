"""From images to what is kept of them: `FeatureSet`, in memory or in a .safetensors file.

A sampler can feed a `Collector` batch by batch and never write a picture; `collect` reads an image set, alone or with
other processes. Memory: 8 KB an image for Inception's features, 4 KB for its logits, 64 MB for the Gaussians.

Shape suffixes: N images, d features, s spatial features, K classes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from tqdm import tqdm

from promoe_ds.config.schema import reject
from promoe_ds.evaluation.features import FeatureExtractor, Features
from promoe_ds.evaluation.images import Images, ImageSet, Labels, digests
from promoe_ds.evaluation.metrics import Gaussian, Moments
from promoe_ds.utils.files import NOT_FOUND, atomic, check_readable
from promoe_ds.utils.ranks import ALONE, Ranks

FORMAT = "evaluation features 1"
SUFFIX = ".safetensors"


@dataclass(frozen=True, eq=False)
class FeatureSet:
    """What is kept of a set of images.

    The Gaussians are over all `num` images; `features_Nd` are of all of them or, in a reference, of some, for precision
    and recall. A field is None where nothing is known.
    """

    name: str
    extractor: str
    """name of the extractor that made it"""
    num: int | None
    sha256: str
    """of all pixels, whatever the batch size (`digests`); of the file for ADM's statistics"""
    gaussian: Gaussian
    spatial: Gaussian | None = None
    features_Nd: Features | None = None
    logits_NK: Features | None = None
    labels_N: Labels | None = None
    sampling: dict[str, Any] = field(default_factory=dict)
    """content of sampling.json, {} if absent"""

    def for_reference(self, keep: int) -> FeatureSet:
        """Without logits and labels, and with at most `keep` rows of features, evenly spaced over the set."""
        rows = self.features_Nd
        if rows is not None and len(rows) > keep:
            rows = rows[np.arange(keep) * len(rows) // keep]
        return replace(self, features_Nd=rows, logits_NK=None, labels_N=None)


@dataclass
class _Part:
    """What one process has seen."""

    digests: list[bytes] = field(default_factory=list)
    features: list[Features] = field(default_factory=list)
    logits: list[Features] = field(default_factory=list)
    moments: Moments | None = None
    spatial: Moments | None = None

    def merge(self, other: _Part) -> None:
        """Append what the next process has seen."""
        self.digests += other.digests
        self.features += other.features
        self.logits += other.logits
        for key in ("moments", "spatial"):
            mine, theirs = getattr(self, key), getattr(other, key)
            if mine is None or theirs is None:
                setattr(self, key, mine or theirs)
            else:
                mine.merge(theirs)


class Collector:
    """Takes images in order and keeps their features: `add` batches, then `result`."""

    def __init__(self, extractor: FeatureExtractor) -> None:
        self.extractor, self._part = extractor, _Part()

    def add(self, images_NHWC: Images) -> None:
        """uint8 [N, H, W, C], any N; the extractor sees at most its `batch` at once."""
        for start in range(0, len(images_NHWC), self.extractor.batch):
            images = images_NHWC[start : start + self.extractor.batch]
            found, part = self.extractor.extract(images), self._part
            part.digests.append(digests(images))
            part.features.append(found.features_Nd)
            part.moments = part.moments or Moments(found.features_Nd.shape[1])
            part.moments.add(found.features_Nd)
            if found.spatial_Ns is not None:
                part.spatial = part.spatial or Moments(found.spatial_Ns.shape[1])
                part.spatial.add(found.spatial_Ns)
            if found.logits_NK is not None:
                part.logits.append(found.logits_NK)

    def result(
        self,
        name: str,
        labels_N: Labels | None = None,
        sampling: Mapping[str, Any] | None = None,
        ranks: Ranks = ALONE,
    ) -> FeatureSet | None:
        """All processes' images in order of rank, on rank 0; None elsewhere. Raises ValueError below two images."""
        for moments in (self._part.moments, self._part.spatial):
            if moments is not None:
                moments.flush()
        parts = ranks.gather_to_first(self._part)
        if parts is None:
            return None
        whole = _Part()
        for part in parts:
            whole.merge(part)
        if whole.moments is None:
            raise ValueError("no images were added")
        return FeatureSet(
            name=name,
            extractor=self.extractor.name,
            num=sum(map(len, whole.features)),
            sha256=hashlib.sha256(b"".join(whole.digests)).hexdigest(),
            gaussian=whole.moments.gaussian(),
            spatial=whole.spatial.gaussian() if whole.spatial else None,
            features_Nd=np.concatenate(whole.features),
            logits_NK=np.concatenate(whole.logits) if whole.logits else None,
            labels_N=labels_N,
            sampling=dict(sampling or {}),
        )


def share_of(ranks: Ranks, num: int, batch: int) -> range:
    """Starts of this process's batches among those of `num` items: consecutive, shares within one batch of another.

    Batches are whole, so that one holds the same images at every world size.
    """
    starts = range(0, num, batch)
    return starts[len(starts) * ranks.rank // ranks.world : len(starts) * (ranks.rank + 1) // ranks.world]


def collect(
    extractor: FeatureExtractor,
    images: ImageSet,
    *,
    sampling: Mapping[str, Any] | None = None,
    ranks: Ranks = ALONE,
    progress: bool = False,
) -> FeatureSet | None:
    """Features of an image set, each process its share; the result on rank 0, None elsewhere.

    Features are those of one process to the bit, Gaussians to rounding in float64. `progress` shows a bar on rank 0.
    """
    collector, num = Collector(extractor), len(images)
    share = share_of(ranks, num, extractor.batch)
    who = f" (process 1/{ranks.world})" if ranks.world > 1 else ""
    total = min(num, share.stop) - share.start if len(share) else 0
    with tqdm(
        total=total, desc=f"{images.name}{who}", unit="image", disable=not progress or ranks.rank > 0, leave=False
    ) as bar:
        for start in share:
            batch = np.asarray(images.images_NHWC[start : min(num, start + extractor.batch)])
            collector.add(batch)
            bar.update(len(batch))
    return collector.result(images.name, images.labels_N, sampling, ranks)


# -------------------------------------------------------------------------------------------------------------- files


def save_features(path: Path, features: FeatureSet) -> None:
    """Write a .safetensors file, whole or not at all. Raises OSError."""
    arrays = {
        "mu": features.gaussian.mu_d,
        "sigma": features.gaussian.sigma_dd,
        "mu_s": features.spatial and features.spatial.mu_d,
        "sigma_s": features.spatial and features.spatial.sigma_dd,
        "features": features.features_Nd,
        "logits": features.logits_NK,
        "labels": features.labels_N,
    }
    described = {
        "format": FORMAT,
        "extractor": features.extractor,
        "num": json.dumps(features.num),
        "sha256": features.sha256,
        "sampling": json.dumps(features.sampling),
    }
    tensors = {key: np.ascontiguousarray(array) for key, array in arrays.items() if array is not None}
    with atomic(path) as temporary:
        safetensors.numpy.save_file(tensors, temporary, described)


def load_features(path: Path, option: str) -> FeatureSet:
    """Read what `save_features` wrote. Raises `ConfigError` otherwise, naming `option`."""
    way_out = "name a file that launchers/evaluate.py features or ref has written"
    try:
        check_readable(path)
    except NOT_FOUND:
        reject(option, path, "no such file", way_out)
    except OSError as error:
        reject(option, path, f"cannot be read ({error.strerror or error})", "look at its permissions")
    try:
        with safetensors.safe_open(path, "numpy") as file:
            described = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        if described.get("format") != FORMAT:
            reject(option, path, "is no features file", way_out)
        spatial = Gaussian(tensors["mu_s"], tensors["sigma_s"]) if "mu_s" in tensors else None
        return FeatureSet(
            name=str(path),
            extractor=described["extractor"],
            num=json.loads(described["num"]),
            sha256=described["sha256"],
            gaussian=Gaussian(tensors["mu"], tensors["sigma"]),
            spatial=spatial,
            features_Nd=tensors.get("features"),
            logits_NK=tensors.get("logits"),
            labels_N=tensors.get("labels"),
            sampling=json.loads(described["sampling"]),
        )
    except (safetensors.SafetensorError, OSError, KeyError, json.JSONDecodeError) as error:
        reject(option, path, f"is no readable features file ({type(error).__name__})", way_out)


def check_extractor(found: FeatureSet, extractor: str, option: str) -> None:
    """Raises `ConfigError` if a features file was made with another network."""
    if found.extractor != extractor:
        fault = f"holds features of {found.extractor}, --features is {extractor}"
        reject(option, found.name, fault, "make both with one extractor")
