"""What samples are compared with: the embedded digits, ADM's statistics, a features file, or any real images."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from promoe_ds.config.schema import reject
from promoe_ds.evaluation.collect import SUFFIX, FeatureSet, check_extractor, collect, load_features
from promoe_ds.evaluation.digits import digits_images, digits_split
from promoe_ds.evaluation.features import FeatureExtractor
from promoe_ds.evaluation.images import Folder, ImageSet, check_count, check_pixels, npz_keys, pictures_in, read_npz
from promoe_ds.evaluation.metrics import Gaussian
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
    """ADM's mu, sigma and, where present, mu_s, sigma_s"""
    real_pair: tuple[ImageSet, ImageSet] | None = None
    """two disjoint sets of real images: the scale on which to read the distance of samples; None where unknown"""


def find_reference(name: str, option: str = "--ref", size: int | None = None) -> Source:
    """`digits`, an .npz of ADM (statistics, images, or both), a .safetensors features file, or a folder of pictures.

    `size` crops a folder's pictures. Raises `ConfigError` for anything else.
    """
    if name == "digits":
        return Source(name, images=ImageSet(name, *digits_images()), real_pair=digits_split())
    path = Path(name)
    if path.is_dir():
        paths = pictures_in(path, option)
        if not paths:
            reject(option, path, "holds no pictures", "name a folder of .png, .jpg or .webp files")
        check_count(path, len(paths), option)
        return Source(name, path, ImageSet(name, Folder(paths, option, size), None))
    if path.suffix == SUFFIX and path.exists():
        return Source(name, path, features=load_features(path, option))
    if path.suffix == ".npz":
        return _npz(path, option)
    fault = "no such reference set" if not path.exists() else "is neither a folder, an .npz nor a .safetensors file"
    reject(option, name, fault, f"choose one of {', '.join(REFERENCES)}, or name an .npz, features file or folder")


def _npz(path: Path, option: str) -> Source:
    arrays = read_npz(path, ("mu", "sigma", "mu_s", "sigma_s", "arr_0"), option)
    pixels = arrays.pop("arr_0", None)
    if pixels is not None:
        check_pixels(path, pixels, option)
        check_count(path, len(pixels), option)
    for mu, sigma in (("mu", "sigma"), ("mu_s", "sigma_s")):
        shapes = [arrays[key].shape if key in arrays else None for key in (mu, sigma)]
        if shapes != [None, None] and (shapes[0] is None or len(shapes[0]) != 1 or shapes[1] != shapes[0] * 2):
            fault = f"{mu} is {shapes[0]}, {sigma} is {shapes[1]}"
            reject(option, path, fault, "statistics are a mean [d] and a covariance [d, d]")
    for key, array in arrays.items():
        if array.dtype.kind not in "fiu" or not np.isfinite(array).all():
            reject(option, path, f"{key} holds what is no finite number", "copy the file again")
    if pixels is None and "mu" not in arrays:
        held = ", ".join(npz_keys(path)) or "no named arrays"
        way_out = "ImageNet-256 is compared with VIRTUAL_imagenet256_labeled.npz of ADM's evaluations"
        reject(option, path, f"holds {held}, needs mu and sigma, or images as arr_0", way_out)
    images = None if pixels is None else ImageSet(str(path), pixels, None)
    return Source(str(path), path, images, arrays=arrays if "mu" in arrays else None)


def reference_features(
    source: Source,
    extractor: FeatureExtractor,
    *,
    keep: int = KEEP,
    ranks: Ranks = ALONE,
    progress: bool = False,
) -> FeatureSet | None:
    """Features of a reference, on rank 0; None elsewhere. At most `keep` rows are kept for precision and recall.

    ADM's statistics are taken as they are; the images beside them serve for precision and recall alone.
    Raises `ConfigError` if the statistics are not of this extractor's features.
    """
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
