"""Feature extractors by name."""

from __future__ import annotations

from pathlib import Path

import torch

from promoe_ds.config.schema import reject
from promoe_ds.evaluation.external import SUFFIXES, load_external
from promoe_ds.evaluation.features import DigitsCNN, FeatureExtractor
from promoe_ds.evaluation.inception import Inception, find_weights

EXTRACTORS = (DigitsCNN.name, "inception")
BATCH = 64


def load_extractor(
    name: str, *, weights: Path | None = None, device: torch.device | str = "cpu", batch: int = BATCH
) -> FeatureExtractor:
    """Build `digits-cnn`, `inception` (from the weight file `weights`, see `find_weights`), or a network from a file.

    `batch` images a forward, where the extractor has no size of its own.

    Raises:
        ConfigError: no such name or file, the weights are absent or not Inception's, or `weights` is given for another.
    """
    if weights is not None and name != "inception":
        reject("--inception-weights", weights, f"--features is {name}", "give one of the two")
    if name == "inception":
        return Inception(find_weights(weights), device, batch)
    if name == DigitsCNN.name:
        return DigitsCNN()
    if name.endswith(SUFFIXES):
        return load_external(Path(name), batch, device)
    known = f"{', '.join(EXTRACTORS)}, or name a .onnx or TorchScript .pt file"
    reject("--features", name, "no such feature extractor", f"choose one of {known}")
