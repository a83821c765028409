"""From a sample set to its scores: `Evaluator` joins an extractor, a reference and the metrics.

Numbers on the public Inception weights are called FID, sFID, KID, IS, precision and so on; on any other features
`FD[name]`, `sFD[name]`, `KD[name]`, `IS[name]`. Every user's mistake raises `ConfigError`.
"""

from __future__ import annotations

import functools
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from promoe_ds.config.errors import reject
from promoe_ds.evaluation.collect import Collector, FeatureSet, check_extractor, check_network, collect
from promoe_ds.evaluation.digits import noise_images
from promoe_ds.evaluation.extractors import BATCH, load_extractor
from promoe_ds.evaluation.features import FeatureExtractor
from promoe_ds.evaluation.images import ImageSet
from promoe_ds.evaluation.kernel_distance import SUBSET_SIZE, SUBSETS, kernel_distance
from promoe_ds.evaluation.manifold import DENSITY_NEIGHBOURS, NEIGHBOURS, Distances, manifold
from promoe_ds.evaluation.metrics import IS_SPLIT, Gaussian, frechet_distance, inception_score, label_agreement
from promoe_ds.evaluation.reference import Source, find_reference, reference_features
from promoe_ds.evaluation.samples import Samples, cfg_of
from promoe_ds.utils.ranks import ALONE, Ranks

NOISE_SEED = 0
"""the noise of `fd_over_noise` is the same for every sample set of a size"""


class Evaluator:
    """An extractor and a reference set, ready to score any number of sample sets (the reference is read once).

    Several processes may build one each and call the same methods in the same order; rank 0 holds the results.
    """

    def __init__(
        self,
        features: str = "digits-cnn",
        reference: str = "digits",
        *,
        weights: Path | None = None,
        dinov2_weights: Path | None = None,
        device: torch.device | str = "cpu",
        batch: int = BATCH,
        distances: Distances = "fp32",
        ranks: Ranks = ALONE,
        progress: bool = False,
    ) -> None:
        """Finds the reference and builds the extractor by name; its features are extracted by the first `score`.

        Raises `ConfigError` for unknown names, absent or unfit files, and features of another extractor.
        """
        source = find_reference(reference)
        if source.features is not None:
            check_network(Path(reference), features, "--ref")
        self.extractor: FeatureExtractor = load_extractor(
            features, weights=weights, dinov2_weights=dinov2_weights, device=device, batch=batch
        )
        self._source: Source = source.of(self.extractor.name, "--ref")
        if self._source.features is not None:
            check_extractor(self._source.features, self.extractor.name, "--ref")
        if self._source.images is not None:
            check_shape(self._source.images, self.extractor, "--ref")
        self._distances: Distances = distances
        self._device, self._ranks, self._progress = device, ranks, progress

    @functools.cached_property
    def reference(self) -> FeatureSet | None:
        """Features of the reference, on rank 0; None elsewhere. All processes ask for it together."""
        return reference_features(self._source, self.extractor, ranks=self._ranks, progress=self._progress)

    @functools.cached_property
    def fd_real(self) -> float | None:
        """Real against real, where the reference comes with a pair of real sets: the scale to read an FD on.

        It holds the noise of small sets and the classifier's memory of its train split, so good samples may be below.
        """
        if self._source.real_pair is None:
            return None
        first, second = map(self._gaussian, self._source.real_pair)
        return frechet_distance(*first, *second)

    def collector(self) -> Collector:
        """Takes images batch by batch, for who draws them; its result can be scored."""
        return Collector(self.extractor)

    def metric(self, name: str) -> str:
        """`FID` as it is called on this extractor: itself on the public weights, else `FD[extractor]` and the like."""
        called = {"FID": "FD", "sFID": "sFD", "KID": "KD"}.get(name, name)
        return name if self.extractor.is_public else f"{called}[{self.extractor.name}]"

    def check(self, samples: Samples) -> None:
        """Raises `ConfigError` if the extractor cannot take these images or features, has no such classes, or makes
        features of other lengths than ADM's statistics of the reference."""
        if isinstance(samples, FeatureSet):
            check_extractor(samples, self.extractor.name, "SAMPLES")
        else:
            check_shape(samples, self.extractor, "SAMPLES")
        if self._source.arrays is not None:
            self._check_statistics(samples, self._source.arrays)
        classes = self.extractor.num_classes
        if classes is not None and samples.labels_N is not None:
            low, high = int(samples.labels_N.min()), int(samples.labels_N.max())
            if not 0 <= low <= high < classes:
                fault = f"labels span {low}..{high}, {self.extractor.name} knows classes 0..{classes - 1}"
                reject("SAMPLES", samples.name, fault, "draw class-conditional samples of that data set")

    def _check_statistics(self, samples: Samples, arrays: dict[str, np.ndarray]) -> None:
        """One image tells how long the features are."""
        if isinstance(samples, FeatureSet):
            ours = samples.gaussian.mu_d, samples.spatial.mu_d if samples.spatial else None
        else:
            found = self.extractor.extract(np.asarray(samples.images_NHWC[:1]))
            ours = found.features_Nd[0], found.spatial_Ns[0] if found.spatial_Ns is not None else None
        for name, key, mine in zip(("FID", "sFID"), ("mu", "mu_s"), ours, strict=True):
            if mine is not None and key in arrays and len(mine) != len(arrays[key]):
                fault = f"its {name} statistics have {len(arrays[key])} numbers, {self.extractor.name} makes"
                reject("--ref", self._source.name, f"{fault} {len(mine)}", "name a reference of these features")

    def score(self, samples: Samples) -> dict[str, Any]:
        """All numbers of one set, ready for JSON; {} on ranks above 0. Shares and accuracies lie in [0, 1].

        A number is absent where the extractor, the reference or the set lacks what it needs.
        Raises `ConfigError` as `check` does.
        """
        self.check(samples)
        reference, found = self.reference, samples
        if not isinstance(samples, FeatureSet):
            made_by, ranks = samples.sampling, self._ranks
            found = collect(self.extractor, samples, sampling=made_by, ranks=ranks, progress=self._progress)
        if not isinstance(found, FeatureSet) or reference is None:
            return {}
        scores: dict[str, Any] = {}
        if self.extractor.num_classes is not None:
            logits, labels = found.logits_NK, found.labels_N
            scores["label_agreement"] = None if logits is None or labels is None else label_agreement(logits, labels)
        scores |= self._distances_from(found, reference)
        return {
            **scores,
            "num": found.num,
            **self._scale(found.num, scores, reference),
            "cfg": cfg_of(found),
            "samples": found.name,
            "samples_sha256": found.sha256,
            "sampling": found.sampling,
            "features": self.extractor.name,
            "reference": {"name": reference.name, "num": reference.num, "sha256": reference.sha256},
            "evaluation": self._how(reference),
        }

    def _gaussian(self, images: ImageSet) -> Gaussian:
        found = collect(self.extractor, images)
        assert found is not None
        return found.gaussian

    def _distances_from(self, found: FeatureSet, reference: FeatureSet) -> dict[str, Any]:
        pairs = {"FID": (found.gaussian, reference.gaussian), "sFID": (found.spatial, reference.spatial)}
        scores: dict[str, Any] = {}
        for name, (ours, theirs) in pairs.items():
            if ours is not None and theirs is not None:
                scores[self.metric(name)] = frechet_distance(*ours, *theirs)
        if found.logits_NK is not None:
            scores[self.metric("IS")] = inception_score(found.logits_NK)
        u, v = found.features_Nd, reference.features_Nd
        if u is not None and v is not None:
            scores[self.metric("KID")] = kernel_distance(u, v, device=self._device)
        if u is not None and v is not None and min(len(u), len(v)) > NEIGHBOURS:
            shares = manifold(u, v, distances=self._distances, device=self._device)._asdict()
            scores |= {self.metric(name): share for name, share in shares.items() if share is not None}
        return scores

    def _scale(self, num: int | None, scores: dict[str, Any], reference: FeatureSet) -> dict[str, Any]:
        """What an FD on unpublished features is read against, where the reference comes with a pair of real sets.

        `fd_over_noise` divides by the FD of as many noise images, so that it does not depend on the extractor's scale.
        """
        if self._source.real_pair is None or num is None:
            return {}
        height, width, channels = self._source.real_pair[0].images_NHWC.shape[1:]
        noise = ImageSet("noise", noise_images(num, (height, width, channels), NOISE_SEED), None)
        fd_noise = frechet_distance(*self._gaussian(noise), *reference.gaussian)
        return {
            "fd_over_noise": scores[self.metric("FID")] / fd_noise,
            "classifier_accuracy": self.extractor.accuracy,
            "FD_noise": fd_noise,
            "FD_real": self.fd_real,
        }

    def _how(self, reference: FeatureSet) -> dict[str, Any]:
        """What decides the numbers besides images and reference."""
        return {
            "weights_sha256": self.extractor.weights_sha256,
            **self.extractor.how,
            "neighbours": NEIGHBOURS,
            "density_neighbours": DENSITY_NEIGHBOURS,
            "kid_subsets": SUBSETS,
            "kid_subset_size": SUBSET_SIZE,
            "distances": self._distances,
            "reference_features": None if reference.features_Nd is None else len(reference.features_Nd),
            "inception_score_split": IS_SPLIT,
            "device": str(self._device),
            "world": self._ranks.world,
            "torch": str(torch.__version__),
            "numpy": np.__version__,
            "python": platform.python_version(),
        }


def check_shape(images: ImageSet, extractor: FeatureExtractor, option: str) -> None:
    """Raises `ConfigError` if the extractor cannot take images of this height, width and number of channels."""
    shape = images.images_NHWC.shape[1:]
    if wanted := extractor.wants(shape):
        way_out = "choose samples of a model of that data set" if option == "SAMPLES" else "choose other images"
        reject(option, images.name, f"images are {list(shape)} (H, W, C), {extractor.name} takes {wanted}", way_out)


def score_all(evaluator: Evaluator, sets: Sequence[Samples]) -> list[dict[str, Any]]:
    """Scores of every set, all of them checked before the first image is read; [] on ranks above 0."""
    for samples in sets:
        evaluator.check(samples)
    return [score for score in map(evaluator.score, sets) if score]
