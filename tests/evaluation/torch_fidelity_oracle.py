"""torch-fidelity 0.4.0 as an oracle of the evaluation; a test-only tool.

It is no dependency: it imports torchvision, which a CPU build of torch may not have, so a stub stands in for what it
does not use here. To run the comparison, or to write the golden file again:

    pip install --no-deps --target DIR torch-fidelity==0.4.0
    PYTHONPATH=.:DIR python -m pytest tests/evaluation/test_inception_oracle.py
    PYTHONPATH=.:DIR python -m tests.evaluation.torch_fidelity_oracle
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.evaluation.random_inception import pictures, write_weights

GOLDEN = Path(__file__).with_name("golden_inception.npz")
SAMPLES, REFERENCE = (8, 11), (9, 12)
"""(number, seed) of the pictures"""
VERSION = "0.4.0"


def available() -> bool:
    return importlib.util.find_spec("torch_fidelity") is not None


def import_torch_fidelity() -> None:
    """Make `torch_fidelity` importable where torchvision is not."""
    if importlib.util.find_spec("torchvision") is None:
        names = ("", ".datasets", ".transforms", ".transforms.functional", ".models")
        for name in (f"torchvision{end}" for end in names):
            module: Any = types.ModuleType(name)
            module.__spec__, module.__path__ = importlib.machinery.ModuleSpec(name, None, is_package=True), []
            sys.modules[name] = module
            parent, _, child = name.rpartition(".")
            if parent:
                setattr(sys.modules[parent], child, module)
        for name in ("CIFAR10", "CIFAR100", "STL10"):
            setattr(sys.modules["torchvision.datasets"], name, type(name, (), {}))
    import torch_fidelity

    assert torch_fidelity.__version__ == VERSION


def oracle_features(weights: Path, images_NHWC: np.ndarray) -> dict[str, np.ndarray]:
    """pool, spatial and logits of torch-fidelity's network, picture by picture; spatial by a hook, in NHWC order."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    net = FeatureExtractorInceptionV3(
        "oracle", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(weights)
    )
    spatial = []
    net.Mixed_6d.branch1x1.register_forward_hook(
        lambda module, inputs, y: spatial.append(y[:, :7].permute(0, 2, 3, 1).reshape(len(y), -1))
    )
    with torch.inference_mode():
        rows = [net(torch.tensor(image).permute(2, 0, 1)[None]) for image in images_NHWC]
    pool, logits = (torch.cat(column).numpy() for column in zip(*rows, strict=True))
    return {"pool": pool, "spatial": torch.cat(spatial).numpy(), "logits": logits}


def oracle_metrics(samples: dict[str, np.ndarray], reference: dict[str, np.ndarray]) -> dict[str, float]:
    """torch-fidelity's metric functions on given features; IS over one split and over two."""
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    def fid(key: str) -> float:
        both = [fid_features_to_statistics(torch.from_numpy(side[key])) for side in (samples, reference)]
        return fid_statistics_to_metric(*both, verbose=False)["frechet_inception_distance"]

    logits = torch.from_numpy(samples["logits"])
    scores = [isc_features_to_metric(logits, n, False, 0)["inception_score_mean"] for n in (1, 2)]
    pair = prc_features_to_metric(
        torch.from_numpy(samples["pool"]), torch.from_numpy(reference["pool"]),
        prc_neighborhood=3, prc_batch_size=5, save_cpu_ram=False, verbose=False,
    )  # fmt: skip
    return {
        "FID": fid("pool"), "sFID": fid("spatial"), "IS": scores[0], "IS2": scores[1],
        "precision": pair["precision"], "recall": pair["recall"],
    }  # fmt: skip


def oracle(weights: Path) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict[str, float]]:
    """Features of both sets of pictures, and the metrics."""
    import_torch_fidelity()
    samples, reference = (oracle_features(weights, pictures(*which)) for which in (SAMPLES, REFERENCE))
    return samples, reference, oracle_metrics(samples, reference)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        samples, _, metrics = oracle(write_weights(Path(folder)))
    first = {key: rows[:2] for key, rows in samples.items()}
    np.savez_compressed(GOLDEN, **first, metrics=json.dumps(metrics))  # type: ignore[arg-type]
    print(GOLDEN.name, GOLDEN.stat().st_size, "bytes", metrics)


if __name__ == "__main__":
    main()
