"""What samples are compared with: the embedded digits, published statistics, a features file, or any real images."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from promoe_ds.config.errors import did_you_mean, reject
from promoe_ds.evaluation.collect import SUFFIX, FeatureSet, check_extractor, collect, load_features
from promoe_ds.evaluation.digits import digits_images, digits_split
from promoe_ds.evaluation.features import FeatureExtractor
from promoe_ds.evaluation.images import Folder, ImageSet, brief, npz_names, pictures_in, read_npz
from promoe_ds.evaluation.metrics import Gaussian
from promoe_ds.evaluation.pickled_statistics import read_pickled_statistics
from promoe_ds.utils.files import file_digest
from promoe_ds.utils.ranks import ALONE, Ranks

REFERENCES = ("digits",)
KEEP = 10_000
"""images of a reference whose features are kept for precision and recall, as many as in ADM's"""


@dataclass(frozen=True, eq=False)
class Source:
    """A reference as it lies on disk, checked: images, statistics of ADM, or a features file."""

    name: str
    path: Path | None = None
    images: ImageSet | None = None
    features: FeatureSet | None = None
    arrays: dict[str, np.ndarray] | None = None
    """mu, sigma and, where present, ADM's mu_s, sigma_s"""
    of_networks: dict[str, dict[str, np.ndarray]] | None = None
    """edm2's arrays by network, of which `of` chooses"""
    real_pair: tuple[ImageSet, ImageSet] | None = None
    """two disjoint sets of real images: the scale on which to read the distance of samples; None where unknown"""

    def of(self, extractor: str, option: str) -> Source:
        """With the arrays of an extractor. Raises `ConfigError` if edm2's file has none of its kind."""
        if self.of_networks is None:
            return self
        network = extractor.split(":")[0]
        if network not in self.of_networks:
            fault = f"holds statistics of {', '.join(self.of_networks)}, --features is {extractor}"
            reject(option, self.name, fault, "name statistics of these features")
        return replace(self, arrays=self.of_networks[network], of_networks=None)


def find_reference(name: str, option: str = "--ref", size: int | None = None) -> Source:
    """`digits`, an .npz (statistics, images, or both), edm2's .pkl, a features file, or a folder of pictures.

    Statistics in an .npz are named mu and sigma, as those of ADM, MAR, JiT and edm are.
    `size` crops a folder's pictures. Raises `ConfigError` for anything else.
    """
    if name == "digits":
        return Source(name, images=ImageSet(name, *digits_images()), real_pair=digits_split())
    path = Path(name)
    if path.is_dir():
        paths = pictures_in(path, option)
        if not paths:
            reject(option, path, "holds no pictures", "name a folder of .png, .jpg or .webp files")
        return Source(name, path, ImageSet(name, Folder(path, paths, option, size), None))
    if path.suffix == SUFFIX and path.exists():
        return Source(name, path, features=load_features(path, option))
    if path.suffix == ".npz":
        return _npz(path, option)
    if path.suffix == ".pkl" and path.exists():
        return _pickled(path, option)
    fault = (
        "no such reference set" if not path.exists() else "is neither a folder, an .npz, a .pkl nor a .safetensors file"
    )
    way_out = f"choose one of {', '.join(REFERENCES)}, or name an .npz, features file or folder"
    reject(option, name, fault, did_you_mean(name, REFERENCES, way_out))


def _npz(path: Path, option: str) -> Source:
    arrays = read_npz(path, ("mu", "sigma", "mu_s", "sigma_s", "arr_0"), option)
    pixels = arrays.pop("arr_0", None)
    _check_arrays(path, arrays, option)
    if pixels is None and "mu" not in arrays:
        way_out = "ImageNet-256 is compared with VIRTUAL_imagenet256_labeled.npz of ADM's evaluations"
        reject(option, path, f"holds {npz_names(path)}, needs mu and sigma, or images as arr_0", way_out)
    images = None if pixels is None else ImageSet(str(path), pixels, None)
    return Source(str(path), path, images, arrays=arrays if "mu" in arrays else None)


NETWORKS = {"fid": "inception", "fd_dinov2": "dinov2"}
"""edm2's metrics, each with the network of its statistics"""


def _pickled(path: Path, option: str) -> Source:
    try:
        found = read_pickled_statistics(path)
    except (OSError, ValueError) as error:
        reject(option, path, f"is no file of statistics ({brief(error)})", "name a .pkl of edm2's dataset-refs")
    known = {NETWORKS[metric]: arrays for metric, arrays in found.items() if metric in NETWORKS}
    if not known or not all("mu" in arrays for arrays in known.values()):
        held = ", ".join(found) or "no statistics"
        reject(option, path, f"holds {held}, needs mu and sigma of {' or '.join(NETWORKS)}", "name a .pkl of edm2's")
    for arrays in known.values():
        _check_arrays(path, arrays, option)
    return Source(str(path), path, of_networks=known)


def _check_arrays(path: Path, arrays: dict[str, np.ndarray], option: str) -> None:
    for mu, sigma in (("mu", "sigma"), ("mu_s", "sigma_s")):
        shapes = [arrays[key].shape if key in arrays else None for key in (mu, sigma)]
        if shapes != [None, None] and (shapes[0] is None or len(shapes[0]) != 1 or shapes[1] != shapes[0] * 2):
            fault = f"{mu} is {shapes[0]}, {sigma} is {shapes[1]}"
            reject(option, path, fault, "statistics are a mean [d] and a covariance [d, d]")
    for key, array in arrays.items():
        if array.dtype.kind not in "fiu" or not np.isfinite(array).all():
            reject(option, path, f"{key} holds what is no finite number", "copy the file again")


def reference_features(
    source: Source,
    extractor: FeatureExtractor,
    *,
    keep: int = KEEP,
    ranks: Ranks = ALONE,
    progress: bool = False,
) -> FeatureSet | None:
    """Features of a reference, on rank 0; None elsewhere. At most `keep` rows are kept for precision and recall.

    Statistics are taken as they are; the images beside ADM's serve for precision and recall alone.
    Raises `ConfigError` if the statistics are not of this extractor's features.
    """
    source = source.of(extractor.name, "--ref")
    if source.features is not None:
        check_extractor(source.features, extractor.name, "--ref")
        return source.features.for_reference(keep) if ranks.rank == 0 else None
    drawn = None
    if source.images is not None:
        drawn = collect(extractor, source.images, ranks=ranks, progress=progress)
    if ranks.rank > 0:
        return None
    kept = drawn.for_reference(keep) if drawn else None
    if source.arrays is None or source.path is None:
        return kept
    a = {key: array.astype(np.float64) for key, array in source.arrays.items()}
    return FeatureSet(
        name=source.name,
        extractor=extractor.name,
        num=None,
        sha256=file_digest(source.path, state=hashlib.sha256()),
        gaussian=Gaussian(a["mu"], a["sigma"]),
        spatial=Gaussian(a["mu_s"], a["sigma_s"]) if "mu_s" in a else None,
        features_Nd=kept.features_Nd if kept else None,
    )
