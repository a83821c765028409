"""The small real caches, where ../shared/data has them: the x of each project's own reader, and a run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from promoe_ds.config.schema import DataConfig
from promoe_ds.data.caches import open_latents
from tests.data.cache_files import drawn
from tests.data.test_codecs import PACKS
from tests.launch import train

REAL = PACKS / "formats"
CACHES = {
    "LightningDiT": ("vavae_f16d32/imagenet_train_256", None),
    "fast-DiT": ("", None),
    "REPA": ("", "repa"),
    "edm2": ("img256-sd.zip", "edm2"),
    "MAR_DiffMoE": ("", None),
}
"""where each lies, and the format where random weights do not tell"""


@pytest.mark.parametrize("name", CACHES)
def test_a_real_cache_gives_the_x_of_its_own_reader(tmp_path: Path, name: str) -> None:
    if not (REAL / name).is_dir():
        pytest.skip(f"{REAL / name} is absent (set PROMOE_DS_DATA to the folder above formats)")
    inside, format = CACHES[name]
    path, expected = REAL / name / inside, np.load(REAL / name / "expected.npz")
    data = open_latents(path, DataConfig(format=format))  # type: ignore[arg-type]
    x, label = drawn(data)
    assert label == expected["label"].tolist()
    if data.content == "moments":
        for flip, more in ((False, ""), (True, "_flip")):
            mean, logvar = (expected[f"{key}{more}"].astype(np.float64) for key in ("mean", "logvar"))
            for noise in (0.0, 1.0):
                made = (mean + noise * np.exp(logvar / 2)) * 0.18215
                np.testing.assert_allclose(drawn(data, flip, noise)[0], made, rtol=0, atol=1e-6)
    elif data.content == "mean_std":
        np.testing.assert_allclose(x, expected["x_mean"], rtol=0, atol=1e-6)
        noisy = expected["x_mean"].astype(np.float64) + expected["x_std"]
        np.testing.assert_allclose(drawn(data, noise=1.0)[0], noisy, rtol=0, atol=1e-6)
    else:
        np.testing.assert_allclose(x, expected["x"], rtol=0, atol=1e-6)
        if data.flips == 2:
            np.testing.assert_allclose(drawn(data, True)[0], expected["x_flip"], rtol=0, atol=1e-6)
    model = [f"model.{key}={getattr(data, key)}" for key in ("channels", "image_size", "num_classes")]
    what = ["data.name=latents", f"data.path={path}", f"data.format={format or 'null'}", "model.patch=4"]
    run, steps = tmp_path / "run", ["train.steps=3", "train.global_batch_size=4", "train.checkpoint_every=3"]
    done = train("--config", "tiny", "--run", str(run), *what, *model, *steps, f"data.hflip={data.flips == 2}")
    assert "done: 3 steps" in done.stdout and json.loads((run / "codec.json").read_text()) == data.codec
