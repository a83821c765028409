"""promoe_ds.load_model and promoe_ds.generate, and what importing costs."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import promoe_ds
from promoe_ds.formats.weights import write
from promoe_ds.sampling.generate import SamplingOptions, to_pixels
from tests.formats.test_diffusers import model, weights
from tests.launch import run
from tests.small_model import draw_pixels

LIGHT = """
import sys
import promoe_ds
assert not {"torch", "numpy", "yaml", "deepspeed"} & set(sys.modules), "importing promoe_ds is not light"
sys.modules["deepspeed"] = None
model = promoe_ds.load_model(sys.argv[1])
assert promoe_ds.generate(model, [1], 1.0, 1).shape == (1, 1, 8, 8)
"""


def test_generate_draws_the_images_of_the_sampler(tmp_path: Path) -> None:
    write(weights(model()), tmp_path / "model")
    loaded = promoe_ds.load_model(tmp_path / "model")
    labels = np.array([3, 10, 0])
    made = promoe_ds.generate(loaded, labels.tolist(), 2.0, 3, 5)
    assert made.dtype == torch.float32
    known = draw_pixels(loaded, loaded.config, labels, np.arange(3), SamplingOptions(2.0, 3, 5))
    assert np.array_equal(to_pixels(made), known)
    one_by_one = promoe_ds.generate(loaded, torch.from_numpy(labels), 2.0, 3, 5, batch=1)
    torch.testing.assert_close(one_by_one, made, rtol=1e-4, atol=1e-4)
    default = promoe_ds.generate(loaded, labels)
    c = loaded.config.sample
    assert torch.equal(default, promoe_ds.generate(loaded, labels, c.cfg, c.steps, 0, sampler="euler"))
    sde = promoe_ds.SDE("constant", 0.5)
    more = {"sampler": "sde", "shift": 2.0, "sde": sde, "interval": (300.0, 900.0)}
    options = SamplingOptions(2.0, 3, 5, sampler="sde", shift=2.0, sde=sde, interval=(300.0, 900.0))
    known = draw_pixels(loaded, loaded.config, labels, np.arange(3), options)
    assert np.array_equal(to_pixels(promoe_ds.generate(loaded, labels, 2.0, 3, 5, **more)), known)  # type: ignore[arg-type]
    itself = promoe_ds.generate(loaded, labels, 2.0, 3, 5, guidance_model=loaded)
    torch.testing.assert_close(itself, promoe_ds.generate(loaded, labels, 1.0, 3, 5), rtol=1e-4, atol=1e-4)
    for options, text in (
        ({"interval": (9.0, 1.0)}, r"interval=\[9,1\]: is not \[lo, hi\]"),
        ({"guidance_model": model("model.channels=3")}, "guidance_model=.*: has model.channels=3"),
        ({"sde": sde}, "--sampler=euler: has no diffusion"),
        ({"labels": [11]}, "labels=11: is not in 0..10"),
        ({"labels": [0.5]}, "labels=0.5"),
        ({"seed": -1}, "seed=-1"),
        ({"batch": 0}, "batch=0"),
        ({"sampler": "ddim"}, "choose euler or heun"),
        ({"steps": "ddim50"}, "takes a number of steps"),
        ({"steps": 0}, "steps=0: must be positive"),
        ({"labels": ["cat"]}, "are no numbers"),
        ({"seed": 0.5}, "seed=0.5"),
        ({"cfg": float("nan")}, "cfg=nan"),
        ({"cfg": -1.0}, "cfg=-1.0: is negative"),
        ({"precision": "fp8"}, "must be one of fp32, bf16"),
        ({"model": 5}, "^model=int: is no model"),
        ({"guidance_model": 5}, "^guidance_model=int: is no model"),
        ({"cfg": "x"}, "^cfg='x': is no number"),
        ({"cfg": [1, 2]}, r"^cfg=\[1, 2\]: is no number"),
        ({"cfg": torch.ones(2)}, "^cfg=.*: is no number"),
        ({"cfg": 10**400}, "^cfg=1000.*: is no number"),
        ({"eta": None}, "^eta=None: is no number"),
        ({"shift": "x"}, "^shift='x': is no number"),
        ({"interval": 5}, "^interval=5: is not two numbers"),
        ({"interval": (1, "b")}, "^interval='b': is no number"),
        ({"sde": 5}, "^sde=5: is no promoe_ds.SDE"),
        ({"sampler": "sde", "sde": promoe_ds.SDE(diffusion_norm="x")}, "^sde.diffusion_norm='x': is no number"),  # type: ignore[arg-type]
        ({"sampler": np.array(["euler", "sde"])}, "^sampler=.*: is no name"),
        ({"precision": 5}, "^precision=5: must be one of"),
        ({"batch": "x"}, "^batch=x: must be a positive number"),
        ({"batch": 1.5}, "^batch=1.5: must be a positive number"),
        ({"seed": None}, "^seed=None"),
        ({"labels": None}, "^labels=None: are no numbers"),
    ):
        with pytest.raises(promoe_ds.ConfigError, match=text):
            promoe_ds.generate(**({"model": loaded, "labels": [1]} | options))  # type: ignore[arg-type]
    numpy = promoe_ds.generate(loaded, labels, np.float32(2), np.int64(3), 5, batch=np.int64(2))  # type: ignore[arg-type]
    torch.testing.assert_close(numpy, made, rtol=1e-4, atol=1e-4)
    run([sys.executable, "-c", LIGHT, str(tmp_path / "model")])


@pytest.mark.parametrize(
    ("path", "device", "message"),
    [
        ("no", "cpu", "no: no such file or folder"),
        ("a\0b", "cpu", "a\0b: no such file or folder"),
        (5, "cpu", "^path=5: is no path"),
        (None, "cpu", "^path=None: is no path"),
        ("model", "foo", "^device=foo: is no device; write cpu, cuda or cuda:N"),
        ("model", None, "^device=None: is no device"),
        ("model", "cpu:3", "^device=cpu:3: is no device"),
        ("model", "meta", "^device=meta: is not supported"),
        ("model", "cuda:99", "^device=cuda:99: this machine offers [0-9]+ CUDA devices; write cpu, or a lower number"),
    ],
)
def test_what_is_no_path_or_no_device(tmp_path: Path, path: Any, device: Any, message: str) -> None:
    write(weights(model()), tmp_path / "model")
    place = tmp_path / path if isinstance(path, str) else path
    with pytest.raises(promoe_ds.ConfigError, match=message):
        promoe_ds.load_model(place, device)
    assert promoe_ds.load_model(tmp_path / "model", "cpu:0").config.name


def test_damaged_indices_are_one_line(tmp_path: Path) -> None:
    write(weights(model()), tmp_path / "model", limit=100_000)
    index = tmp_path / "model" / "model.safetensors.index.json"
    promoe_ds.load_model(index)  # named as a file: a folder's sizes are compared first
    text = index.read_text()
    for bad in ("{", '{"weight_map": {}}', '{"weight_map": {"a": "../b"}}', "[]"):
        index.write_text(bad)
        with pytest.raises(promoe_ds.ConfigError, match="is no index of weights"):
            promoe_ds.load_model(index)
    index.write_text(text)
    first = next((tmp_path / "model").glob("model-00001*"))
    write(dataclasses.replace(weights(model()), step=8), tmp_path / "other", limit=100_000)
    first.write_bytes((tmp_path / "other" / first.name).read_bytes())
    with pytest.raises(promoe_ds.ConfigError, match="shards of different models"):
        promoe_ds.load_model(index)
    first.unlink()
    with pytest.raises(promoe_ds.ConfigError, match="is damaged or no safetensors file"):
        promoe_ds.load_model(index)
    with pytest.raises(AttributeError):
        promoe_ds.nothing  # noqa: B018
