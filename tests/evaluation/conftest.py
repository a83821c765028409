from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from evaluation.collect import FeatureSet, load_features
from tests.evaluation.random_inception import BATCH, pictures, write_weights
from tests.evaluation.torch_fidelity_oracle import REFERENCE, SAMPLES
from tests.launch import ROOT


class Scored(NamedTuple):
    """What the command line made of the oracle's pictures with random Inception weights."""

    folder: Path
    weights: Path
    features: FeatureSet
    metrics: dict[str, Any]


@pytest.fixture(scope="session")
def launcher() -> Callable[[list[str]], int]:
    """`main` of launchers/evaluate.py."""
    spec = importlib.util.spec_from_file_location("launchers_evaluate", ROOT / "launchers" / "evaluate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture(scope="session")
def scored(launcher: Callable[[list[str]], int], tmp_path_factory: pytest.TempPathFactory) -> Scored:
    folder = tmp_path_factory.mktemp("inception")
    weights = write_weights(folder)
    np.savez(folder / "samples.npz", arr_0=pictures(*SAMPLES), arr_1=np.arange(SAMPLES[0]))
    np.savez(folder / "reference.npz", arr_0=pictures(*REFERENCE))
    (folder / "sampling.json").write_text(json.dumps({"cfg": 1.5, "sampler": "heun", "steps": 10, "precision": "bf16"}))
    common = ["--inception-weights", str(weights), "--batch", str(BATCH), "--device", "cpu"]
    reference, features, out = folder / "reference.safetensors", folder / "features.safetensors", folder / "m.json"
    assert launcher(["ref", str(folder / "reference.npz"), "--out", str(reference), *common]) == 0
    assert launcher(["features", str(folder / "samples.npz"), "--out", str(features), *common]) == 0
    assert launcher([str(features), "--ref", str(reference), "--out", str(out), *common]) == 0
    return Scored(folder, weights, load_features(features, "SAMPLES"), json.loads(out.read_text()))
