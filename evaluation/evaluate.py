"""From a sample set on disk to its scores.

A sample set is an .npz with `arr_0` (uint8 [N, H, W, C]) and `arr_1` (integer labels [N]), and beside it, when the
sampler wrote one, `sampling.json`: how the images were made (cfg, steps, seed, precision, checkpoint step ...).
Every user's mistake raises `ConfigError` with a one-line message.
"""

from __future__ import annotations

import json
import math
import os
import re
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.lib.npyio import NpzFile

from evaluation.features import Classifier, FeatureExtractor, load_extractor
from evaluation.metrics import Array64, frechet_distance, gaussian_statistics, label_agreement
from evaluation.reference import Images, ImageSet, load_reference, noise_images
from promoe_ds.config import reject

NOISE_SEED = 0
"""the noise of `fd_over_noise` is the same for every sample set of a size"""

_UNREADABLE = (OSError, ValueError, EOFError, KeyError, RuntimeError, MemoryError, zipfile.BadZipFile, zlib.error)
"""what numpy and zipfile raise for damaged, truncated, encrypted or pickled archives"""


@dataclass(frozen=True, eq=False)
class SampleSet(ImageSet):
    """Generated images with the labels they were made for; `sampling` is the content of sampling.json, {} if absent."""

    sampling: dict[str, Any] = field(default_factory=dict)

    @property
    def cfg(self) -> float | None:
        """Guidance scale: from sampling.json, else from a folder called cfg1.5 or the like, else None."""
        value = self.sampling.get("cfg")
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        return _folder_scale(Path(self.name))


def _folder_scale(path: Path) -> float | None:
    match = re.fullmatch(r"cfg[-_=]?(\d+(?:\.\d+)?)", path.parent.name)
    return float(match.group(1)) if match else None


def _arrays(path: Path) -> tuple[Any, Any]:
    if not path.exists():
        reject("SAMPLES", path, "no such file", "draw samples first: launchers/sample.py, or name an existing .npz")
    try:
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            keys = list(archive.keys()) if isinstance(archive, NpzFile) else []
            if {"arr_0", "arr_1"} <= set(keys):
                return archive["arr_0"], archive["arr_1"]
    except _UNREADABLE as error:
        reject(
            "SAMPLES",
            path,
            f"is no readable .npz: damaged, truncated or pickled ({type(error).__name__})",
            "draw the samples again or name another file",
        )
    reject(
        "SAMPLES",
        path,
        f"holds {', '.join(keys) or 'no named arrays'}, needs arr_0 and arr_1",
        "save uint8 NHWC images as arr_0 and integer labels as arr_1",
    )


def _brief(error: Exception) -> str:
    """The first line of an exception's text, or its type's name when it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _sampling(npz_path: Path) -> dict[str, Any]:
    path = npz_path.with_name("sampling.json")
    if not path.exists():
        return {}
    try:
        description = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except (OSError, ValueError) as error:
        reject("SAMPLES", path, f"cannot be read as JSON ({_brief(error)})", "draw the samples again or remove it")
    if not isinstance(description, dict):
        reject("SAMPLES", path, "is not a JSON object", "draw the samples again or remove it")
    return description


def _refuse_constant(name: str) -> NoReturn:
    """NaN and Infinity, which Python reads, could not be written to a valid metrics.json."""
    raise ValueError(f"{name} is not JSON")


def load_samples(path: Path) -> SampleSet:
    """Read and check one .npz (at least two images; no pickles). Raises `ConfigError` naming the file and the fault."""
    images_NHWC, labels_N = _arrays(path)
    if images_NHWC.dtype != np.uint8 or images_NHWC.ndim != 4:
        reject(
            "SAMPLES",
            path,
            f"arr_0 is {images_NHWC.dtype} {list(images_NHWC.shape)}, needs uint8 [N, H, W, C]",
            "save pixels 0..255, channels last",
        )
    if labels_N.dtype.kind not in "iu" or labels_N.ndim != 1:
        reject(
            "SAMPLES",
            path,
            f"arr_1 is {labels_N.dtype} {list(labels_N.shape)}, needs integers [N]",
            "save one class index an image",
        )
    if len(images_NHWC) != len(labels_N):
        reject("SAMPLES", path, f"{len(images_NHWC)} images, {len(labels_N)} labels", "save one class index an image")
    if len(images_NHWC) < 2:
        reject("SAMPLES", path, f"{len(images_NHWC)} image(s), a covariance needs at least 2", "draw more samples")
    return SampleSet(str(path), images_NHWC, labels_N.astype(np.int64), _sampling(path))


def find_samples(path: Path) -> list[Path]:
    """The sample sets meant by a command-line argument.

    An .npz is itself; a folder is its samples.npz, or else every cfg*/samples.npz in order of the scale.
    Raises `ConfigError` for a folder without any.
    """
    if not path.is_dir():
        return [path]
    if (path / "samples.npz").exists():
        return [path / "samples.npz"]
    found = list(path.glob("cfg*/samples.npz"))
    if not found:
        reject("SAMPLES", path, "holds no samples.npz nor cfg*/samples.npz", "draw samples first: launchers/sample.py")
    return sorted(found, key=_scale_then_name)


def _scale_then_name(path: Path) -> tuple[float, str]:
    scale = _folder_scale(path)
    return (math.inf if scale is None else scale, str(path))


def run_samples(run: Path) -> list[SampleSet]:
    """Every samples.npz below RUN/samples, lowest guidance scale first. Raises `ConfigError` if there is none."""
    if not run.is_dir():
        reject("--run", run, "no such folder", "name a run folder of launchers/train.py")
    found = sorted((run / "samples").rglob("samples.npz"))
    if not found:
        reject("--run", run, "no samples.npz below its samples folder", f"run launchers/sample.py --run {run} first")
    sets = [load_samples(path) for path in found]
    return sorted(sets, key=lambda s: (math.inf if s.cfg is None else s.cfg, s.name))


class Evaluator:
    """An extractor and a reference set, ready to score any number of sample sets (the reference is read once)."""

    def __init__(self, features: str = "digits-cnn", reference: str = "digits") -> None:
        """Builds both by name. Raises `ConfigError` for unknown names."""
        self.reference = load_reference(reference)
        self.extractor: FeatureExtractor = load_extractor(features)
        self._reference_statistics = self._statistics(self.reference.images_NHWC)
        self.fd_real = self._fd_real()

    @property
    def accuracy(self) -> float | None:
        """The classifier's accuracy on held-out real images, in [0, 1]; None if the extractor has no classes."""
        return self.extractor.accuracy if isinstance(self.extractor, Classifier) else None

    def _statistics(self, images_NHWC: Images) -> tuple[Array64, Array64]:
        return gaussian_statistics(self.extractor.features(images_NHWC))

    def _fd_real(self) -> float | None:
        """Real against real, for digits the 450 held out against the 1347 trained on: the scale to read an FD on.

        It holds the noise of small sets and the classifier's memory of its train split, so good samples may be below.
        """
        if self.reference.real_pair is None:
            return None
        first, second = (self._statistics(real.images_NHWC) for real in self.reference.real_pair)
        return frechet_distance(*first, *second)

    def fd(self, images_NHWC: Images) -> float:
        """Frechet distance of uint8 [N >= 2, H, W, C] from the reference set."""
        return frechet_distance(*self._statistics(images_NHWC), *self._reference_statistics)

    def check(self, samples: SampleSet) -> None:
        """Raises `ConfigError` if the extractor cannot take these images or has no such classes."""
        shape = samples.images_NHWC.shape[1:]
        if self.extractor.image_shape not in (None, shape):
            reject(
                "SAMPLES",
                samples.name,
                f"images are {list(shape)} (H, W, C), {self.extractor.name} takes "
                f"{list(self.extractor.image_shape or ())}",
                "choose samples of a model of that data set",
            )
        low, high = int(samples.labels_N.min()), int(samples.labels_N.max())
        if isinstance(self.extractor, Classifier) and not 0 <= low <= high < self.extractor.num_classes:
            reject(
                "SAMPLES",
                samples.name,
                f"labels span {low}..{high}, {self.extractor.name} knows classes 0..{self.extractor.num_classes - 1}",
                "draw class-conditional samples of that data set",
            )

    def score(self, samples: SampleSet) -> dict[str, Any]:
        """All numbers of one set, ready for JSON. Shares and accuracies lie in [0, 1]; FDs are squared distances.

        `fd_over_noise` divides by the FD of as many noise images, so that it does not depend on the extractor's scale.
        Raises `ConfigError` as `check` does.
        """
        self.check(samples)
        images_NHWC = samples.images_NHWC
        fd = self.fd(images_NHWC)
        height, width, channels = images_NHWC.shape[1:]
        fd_noise = self.fd(noise_images(len(samples), (height, width, channels), NOISE_SEED))
        return {
            "label_agreement": self._agreement(samples),
            f"FD[{self.extractor.name}]": fd,
            "fd_over_noise": fd / fd_noise,
            "num": len(samples),
            "classifier_accuracy": self.accuracy,
            "FD_noise": fd_noise,
            "FD_real": self.fd_real,
            "cfg": samples.cfg,
            "samples": samples.name,
            "sampling": samples.sampling,
            "features": self.extractor.name,
            "reference": {"name": self.reference.name, "num": len(self.reference), "sha256": self.reference.sha256},
        }

    def _agreement(self, samples: SampleSet) -> float | None:
        if not isinstance(self.extractor, Classifier):
            return None
        return label_agreement(self.extractor.logits(samples.images_NHWC), samples.labels_N)


def evaluate_samples(npz_path: str | Path, features: str = "digits-cnn", reference: str = "digits") -> dict[str, Any]:
    """Score one .npz; see `Evaluator.score` for the keys. Raises `ConfigError` for bad input or unknown names."""
    samples = load_samples(Path(npz_path))
    return Evaluator(features, reference).score(samples)


def format_table(scores: list[dict[str, Any]]) -> str:
    """Aligned table: one line a sample set, then real against real as a scale, if the reference has that."""
    fd_key = f"FD[{scores[0]['features']}]"
    rows = [("samples", "cfg", "n", "label agreement", fd_key, "FD/noise")]
    for s in scores:
        rows.append(
            (
                s["samples"],
                _number(s["cfg"], "g"),
                str(s["num"]),
                _number(s["label_agreement"], ".4f"),
                _number(s[fd_key], ".3f"),
                _number(s["fd_over_noise"], ".4f"),
            )
        )
    first = scores[0]
    if first["FD_real"] is not None:
        rows.append(
            (
                "real, held out",
                "-",
                "-",
                _number(first["classifier_accuracy"], ".4f"),
                _number(first["FD_real"], ".3f"),
                _number(first["FD_real"] / first["FD_noise"], ".4f"),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(_aligned(row, widths) for row in rows)


def _number(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)


def _aligned(row: tuple[str, ...], widths: list[int]) -> str:
    """First column to the left, numbers to the right."""
    cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
    return "  ".join(cells)


def check_output(path: Path) -> None:
    """Raises `ConfigError` if a file cannot be written at `path`; to be called before any work is done."""
    if path.is_dir():
        reject("--out", path, "is a folder", "name a file, for example metrics.json in it")
    if path.suffix != ".json":  # a slip of the hand must not overwrite an .npz
        reject("--out", path, "the scores are JSON", "choose a name that ends in .json")
    if not path.parent.is_dir():
        reject("--out", path, f"folder {path.parent} does not exist", "create it or choose another file")
    if not os.access(path.parent, os.W_OK):
        reject("--out", path, f"folder {path.parent} is not writable", "choose another file")


def write_metrics(path: Path, scores: list[dict[str, Any]]) -> None:
    """Write the first set's keys at top level plus `sets`, all of them. The file is complete or untouched."""
    text = json.dumps({**scores[0], "sets": scores}, indent=2, allow_nan=False)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text + "\n", encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        reject("--out", path, f"cannot be written ({_brief(error)})", "choose another file")
    finally:
        temporary.unlink(missing_ok=True)
