"""From images to what is kept of them: `FeatureSet`, in memory or in a .safetensors file.

A sampler can feed a `Collector` batch by batch and never write a picture; `collect` reads an image set, alone or with
other processes. Memory: 8 KB per image for Inception's features, 4 KB for its logits, 64 MB for the Gaussians.

Shape suffixes: N images, d features, s spatial features, K classes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from tqdm import tqdm

from promoe_ds.config.errors import reject
from promoe_ds.evaluation.extractors import EXTRACTORS
from promoe_ds.evaluation.features import Extracted, FeatureExtractor, Features
from promoe_ds.evaluation.images import Images, ImageSet, Labels, digests
from promoe_ds.evaluation.metrics import Gaussian, Moments
from promoe_ds.utils.files import NOT_FOUND, atomic, check_readable, parse_json
from promoe_ds.utils.ranks import ALONE, Ranks, share_of

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


class Collector:
    """Takes images in order and keeps their features: `add` batches, then `result`."""

    def __init__(self, extractor: FeatureExtractor) -> None:
        self.extractor = extractor
        self._digests: list[bytes] = []
        self._kept: list[Extracted] = []
        self._moments: dict[str, Moments] = {}

    def add(self, images_NHWC: Images) -> None:
        """uint8 [N, H, W, C], any N; the extractor sees at most its `batch` at once."""
        for start in range(0, len(images_NHWC), self.extractor.batch):
            images = images_NHWC[start : start + self.extractor.batch]
            found = self.extractor.extract(images)
            self._digests.append(digests(images))
            self._kept.append(found._replace(spatial_Ns=None))
            for name, rows in (("features", found.features_Nd), ("spatial", found.spatial_Ns)):
                if rows is not None:
                    self._moments.setdefault(name, Moments(rows.shape[1])).add(rows)

    def result(
        self,
        name: str,
        labels_N: Labels | None = None,
        sampling: Mapping[str, Any] | None = None,
        ranks: Ranks = ALONE,
    ) -> FeatureSet | None:
        """All processes' images in order of rank, on rank 0; None elsewhere. Raises ValueError below two images."""
        for moments in self._moments.values():
            moments.flush()
        parts = ranks.gather_to_first((self._digests, self._kept, self._moments))
        if parts is None:
            return None
        whole: dict[str, Moments] = {}
        for *_, found in parts:
            for key, moments in found.items():
                whole.setdefault(key, Moments(len(moments.mean_d))).merge(moments)
        kept = [extracted for _, part, _ in parts for extracted in part]
        if not kept:
            raise ValueError("no images were added")
        logits = [extracted.logits_NK for extracted in kept if extracted.logits_NK is not None]
        features_Nd = np.concatenate([extracted.features_Nd for extracted in kept])
        return FeatureSet(
            name=name,
            extractor=self.extractor.name,
            num=len(features_Nd),
            sha256=hashlib.sha256(b"".join(digest for part, *_ in parts for digest in part)).hexdigest(),
            gaussian=whole["features"].gaussian(),
            spatial=whole["spatial"].gaussian() if "spatial" in whole else None,
            features_Nd=features_Nd,
            logits_NK=np.concatenate(logits) if logits else None,
            labels_N=labels_N,
            sampling=dict(sampling or {}),
        )


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
    collector, num, who = Collector(extractor), len(images), f" (process 1/{ranks.world})" if ranks.world > 1 else ""
    hide = not progress or ranks.rank > 0
    starts = share_of(ranks, num, extractor.batch)
    label = {"desc": f"{images.name}{who}", "unit": "image", "unit_scale": extractor.batch}
    for start in tqdm(starts, **label, disable=hide, leave=False):
        collector.add(np.asarray(images.images_NHWC[start : min(num, start + extractor.batch)]))
    return collector.result(images.name, images.labels_N, sampling, ranks)


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


@contextlib.contextmanager
def _opened(path: Path, option: str) -> Iterator[tuple[Any, dict[str, str]]]:
    """A file of `save_features` and its description. Raises `ConfigError`, naming `option`, for what is none."""
    way_out = "name a file that launchers/evaluate.py features or ref has written"
    try:
        check_readable(path)
        with safetensors.safe_open(path, "numpy") as file:
            described = file.metadata() or {}
            if described.get("format") != FORMAT:
                reject(option, path, "is no features file", way_out)
            yield file, described
    except NOT_FOUND:
        reject(option, path, "no such file", way_out)
    except OSError as error:
        reject(option, path, f"cannot be read ({error.strerror or error})", "look at its permissions")
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        reject(option, path, f"is no readable features file ({type(error).__name__})", way_out)


def load_features(path: Path, option: str) -> FeatureSet:
    """Read what `save_features` wrote. Raises `ConfigError` otherwise, naming `option`."""
    with _opened(path, option) as (file, described):
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return FeatureSet(
            name=str(path),
            extractor=described["extractor"],
            num=parse_json(described["num"]),
            sha256=described["sha256"],
            gaussian=Gaussian(tensors["mu"], tensors["sigma"]),
            spatial=Gaussian(tensors["mu_s"], tensors["sigma_s"]) if "mu_s" in tensors else None,
            features_Nd=tensors.get("features"),
            logits_NK=tensors.get("logits"),
            labels_N=tensors.get("labels"),
            sampling=parse_json(described["sampling"]),
        )


def check_network(path: Path, network: str, option: str) -> None:
    """As `check_extractor` of a file, before the network's weights are looked for, which may be of no use.

    Args:
        network: one of `EXTRACTORS`; that a file of the user's is another is only known once it is read.
    """
    with _opened(path, option) as (_, described):  # its arrays may be large, and are read later
        found = described["extractor"]
    made_by = found.partition(":")[0]
    if network in EXTRACTORS and made_by != network:
        fault = f"holds features of {found}, --features is {network}"
        way_out = f"add --features {made_by}" if made_by in EXTRACTORS else "name that network's file with --features"
        reject(option, path, fault, way_out)


def check_extractor(found: FeatureSet, extractor: str, option: str) -> None:
    """Raises `ConfigError` if a features file was made with another network."""
    if found.extractor != extractor:
        fault = f"holds features of {found.extractor}, --features is {extractor}"
        reject(option, found.name, fault, "make both with one extractor")
