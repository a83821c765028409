from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from launchers import evaluate
from promoe_ds.evaluation.collect import FeatureSet, load_features
from tests.evaluation.random_inception import BATCH, pictures, write_weights
from tests.evaluation.torch_fidelity_oracle import REFERENCE, SAMPLES


class Scored(NamedTuple):
    """What the command line made of the oracle's pictures with random Inception weights."""

    folder: Path
    weights: Path
    features: FeatureSet
    metrics: dict[str, Any]


@pytest.fixture(scope="session")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Scored:
    folder = tmp_path_factory.mktemp("inception")
    weights = write_weights(folder)
    np.savez(folder / "samples.npz", arr_0=pictures(*SAMPLES), arr_1=np.arange(SAMPLES[0]))
    np.savez(folder / "reference.npz", arr_0=pictures(*REFERENCE))
    (folder / "sampling.json").write_text(json.dumps({"cfg": 1.5, "sampler": "heun", "steps": 10, "precision": "bf16"}))
    common = ["--inception-weights", str(weights), "--batch", str(BATCH), "--device", "cpu"]
    reference, features, out = folder / "reference.safetensors", folder / "features.safetensors", folder / "m.json"
    assert evaluate.main(["ref", str(folder / "reference.npz"), "--out", str(reference), *common]) == 0
    assert evaluate.main(["features", str(folder / "samples.npz"), "--out", str(features), *common]) == 0
    assert evaluate.main([str(features), "--ref", str(reference), "--out", str(out), *common]) == 0
    return Scored(folder, weights, load_features(features, "SAMPLES"), json.loads(out.read_text()))
