"""Sample sets on disk, with how they were made.

A set is an .npz of ADM's layout, a folder of pictures, or a features file (.safetensors). Beside the first two may lie
`sampling.json`, in which the sampler says how the images were made (sampler, cfg, steps, seed, precision, checkpoint).
Every user's mistake raises `ConfigError`.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from promoe_ds.config.errors import reject
from promoe_ds.evaluation.collect import SUFFIX, FeatureSet, load_features
from promoe_ds.evaluation.images import (
    SAMPLED,
    Folder,
    ImageSet,
    brief,
    npz_names,
    picture_folders,
    pictures_in,
    read_npz,
)
from promoe_ds.utils.files import read_json
from promoe_ds.utils.outputs import RECORD, SAMPLES


@dataclass(frozen=True, eq=False)
class SampleSet(ImageSet):
    """Generated images with the labels they were made for; `sampling` is the content of sampling.json, {} if absent."""

    sampling: dict[str, Any] = field(default_factory=dict)


Samples = SampleSet | FeatureSet


def cfg_of(samples: Samples) -> float | None:
    """Guidance scale: from sampling.json, else from a folder called cfg1.5 or the like, else None."""
    value = samples.sampling.get("cfg")
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    path = Path(samples.name)
    return _folder_scale(path if path.is_dir() else path.parent)


def _folder_scale(path: Path) -> float | None:
    match = re.fullmatch(r"cfg[-_=]?(\d+(?:\.\d+)?)", path.name)
    return float(match.group(1)) if match else None


def _in_folder(folder: Path) -> Path | None:
    """The one set of a folder: its samples.npz, else its features file, else its pictures."""
    for path in (folder / SAMPLES, folder / f"features{SUFFIX}"):
        if path.exists():
            return path
    return folder if _pictures(folder) else None


def _pictures(folder: Path) -> list[Path]:
    """Those of one set. launchers/sample.py fills no folders below its own; others' may hold sets by themselves."""
    alone = (folder / RECORD).exists()
    return pictures_in(folder, skip=lambda path: alone or path.name.startswith("cfg") or (path / RECORD).exists())


def find_samples(path: Path) -> list[Path]:
    """The sample sets meant by a command-line argument.

    A file is itself; a folder is its samples.npz, features.safetensors or pictures (in folders below it, too), or else
    those of every cfg* below it in order of the scale. Raises `ConfigError` for a folder without any and a run folder.
    """
    if not path.is_dir():
        return [path]
    if (path / "checkpoints").is_dir():  # its pictures are figures and grids
        reject("SAMPLES", path, "is a run folder", f"write --run {path}")
    if own := _in_folder(path):
        return [own]
    folders = sorted(p for p in path.glob("cfg*") if p.is_dir())
    folders.sort(key=lambda folder: _ascending(_folder_scale(folder)))
    found = [inner for inner in map(_in_folder, folders) if inner]
    if not found:
        conflict = "holds no samples.npz, pictures nor cfg* folders with them"
        reject("SAMPLES", path, conflict, "draw samples first: launchers/sample.py")
    return found


def _ascending(scale: float | None) -> float:
    return math.inf if scale is None else scale


def run_samples(run: Path) -> list[Samples]:
    """Every set below RUN/samples, lowest guidance scale first. Raises `ConfigError` if there is none."""
    if not run.is_dir():
        reject("--run", run, "no such folder", "name a run folder of launchers/train.py")
    found = [path for path in map(_finished, _folders(run)) if path]
    if not found:
        reject("--run", run, "no finished samples below its samples folder", f"run launchers/sample.py --run {run}")
    sets = sorted(map(load_samples, found), key=lambda s: s.name)
    return sorted(sets, key=lambda s: _ascending(cfg_of(s)))


def unfinished(run: Path) -> list[Path]:
    """Folders below RUN/samples in which a sampler has begun, and which `run_samples` leaves out."""
    return [folder for folder in _folders(run) if (folder / RECORD).exists() and _finished(folder) is None]


def _folders(run: Path) -> list[Path]:
    """RUN/samples and the folders below it that are not hidden. Raises `ConfigError` if one cannot be listed."""
    base = run / "samples"
    return sorted(path for path, *_ in picture_folders(base, "--run")) if base.is_dir() else []


def _finished(folder: Path) -> Path | None:
    """The set of a folder; pictures count only where the sampler's record lies beside them."""
    path = _in_folder(folder)
    return path if path and (path.is_file() or (path / RECORD).exists()) else None


def load_samples(path: Path) -> Samples:
    """Read and check one .npz, folder of pictures or features file (at least two images; no pickles).

    Raises `ConfigError` naming the file and the fault.
    """
    if path.is_dir():
        return _load_folder(path)
    if path.suffix != SUFFIX:
        return _load_npz(path)
    found = load_features(path, "SAMPLES")
    if found.features_Nd is None or found.num != len(found.features_Nd):
        reject("SAMPLES", path, "is a reference: it keeps the features of some images", "write samples by `features`")
    return found


def _load_folder(path: Path) -> SampleSet:
    paths = _pictures(path)
    if not paths:
        reject("SAMPLES", path, "holds no pictures", "draw samples first: launchers/sample.py")
    sampling = read_sampling(path)
    if sampling.get("num", len(paths)) != len(paths):
        fault = f"holds {len(paths)} of the {sampling['num']} pictures that its sampling.json promises"
        reject("SAMPLES", path, fault, "run launchers/sample.py again to finish it")
    names = [SAMPLED.fullmatch(p.name) for p in paths]
    labels = np.array([int(m.group(1)) for m in names if m], np.int64)
    images = Folder(path, paths, "SAMPLES")
    return SampleSet(str(path), images, labels if len(labels) == len(paths) else None, sampling)


def _load_npz(path: Path) -> SampleSet:
    arrays = read_npz(path, ("arr_0", "arr_1"), "SAMPLES")
    if "arr_0" not in arrays:
        fault = f"holds {npz_names(path)}, needs arr_0"
        reject("SAMPLES", path, fault, "save uint8 NHWC images as arr_0, labels as arr_1")
    images_NHWC, labels_N = arrays["arr_0"], arrays.get("arr_1")
    if labels_N is not None and (labels_N.dtype.kind not in "iu" or labels_N.ndim != 1):
        fault = f"arr_1 is {labels_N.dtype} {list(labels_N.shape)}, needs integers [N]"
        reject("SAMPLES", path, fault, "save one class index per image")
    if labels_N is not None and len(images_NHWC) != len(labels_N):
        reject("SAMPLES", path, f"{len(images_NHWC)} images, {len(labels_N)} labels", "save one class index per image")
    labels_N = None if labels_N is None else labels_N.astype(np.int64)
    return SampleSet(str(path), images_NHWC, labels_N, read_sampling(path.parent))


def read_sampling(folder: Path) -> dict[str, Any]:
    """The sampler's record in a folder, {} if there is none. Raises `ConfigError` if it is no JSON object."""
    path = folder / RECORD
    if not path.exists():
        return {}
    try:
        description = read_json(path, parse_constant=_refuse_constant)
    except (OSError, ValueError) as error:
        reject("SAMPLES", path, f"cannot be read as JSON ({brief(error)})", "draw the samples again or remove it")
    if not isinstance(description, dict):
        reject("SAMPLES", path, "is not a JSON object", "draw the samples again or remove it")
    return description


def _refuse_constant(name: str) -> NoReturn:
    """NaN and Infinity, which Python reads, could not be written to a valid metrics.json."""
    raise ValueError(f"{name} is not JSON")
