"""A pickle with code in it is refused wherever a file from outside is read, and the code never runs; and JSON that is
nested deeper than Python reads is a damaged file like another."""

from __future__ import annotations

import ast
import io
import pickle
import re
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch

from launchers import export, pipeline
from promoe_ds.analysis import report
from promoe_ds.checkpoint import layout, resume
from promoe_ds.checkpoint.load_weights import find_weights, load_ema, shard_files
from promoe_ds.config.errors import ConfigError
from promoe_ds.data.codecs import find_codec
from promoe_ds.data.images import PackedImages
from promoe_ds.data.labelled import LabelledFiles
from promoe_ds.data.shards import read_index
from promoe_ds.evaluation.collect import FORMAT, load_features
from promoe_ds.evaluation.samples import load_samples, read_sampling
from promoe_ds.formats.diffusers_export import vae_class
from promoe_ds.formats.diffusers_import import read_folder
from promoe_ds.recipes.load import load_config
from promoe_ds.sampling.job import check_folder, codec_of_run
from promoe_ds.utils.files import file_digest
from promoe_ds.utils.ranks import ALONE
from tests.checkpoint.state import save
from tests.sample_folder import write_run

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(p for folder in ("promoe_ds", "evaluation", "launchers") for p in (ROOT / folder).rglob("*.py"))


class Exploit:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, str]]:
        return open, (str(self.mark), "w")


def as_pickle(mark: Path) -> bytes:
    return pickle.dumps(Exploit(mark))


def as_torch(mark: Path) -> bytes:
    file = io.BytesIO()
    torch.save({"weight": Exploit(mark)}, file)
    return file.getvalue()


def as_npy(mark: Path) -> bytes:
    file = io.BytesIO()
    np.save(file, np.array([Exploit(mark)], dtype=object), allow_pickle=True)
    return file.getvalue()


def as_npz(mark: Path, *names: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in names:
            archive.writestr(f"{name}.npy", as_npy(mark))
    return file.getvalue()


def test_the_exploit_works_where_nobody_is_careful(tmp_path: Path) -> None:
    """Otherwise the tests below would prove nothing."""
    for i, make in enumerate((as_pickle, as_torch, as_npy)):
        mark, data = tmp_path / str(i), make(tmp_path / str(i))
        if make is as_pickle:
            pickle.loads(data)
        elif make is as_torch:
            torch.load(io.BytesIO(data), weights_only=False)
        else:
            np.load(io.BytesIO(data), allow_pickle=True)
        assert mark.exists()


@pytest.mark.parametrize("make", [as_pickle, as_torch, as_npy])
def test_in_the_place_of_weights(tmp_path: Path, make: Callable[[Path], bytes]) -> None:
    mark = tmp_path / "mark"
    (tmp_path / "ema.safetensors").write_bytes(make(mark))
    with pytest.raises(ConfigError, match="is damaged or no safetensors file"):
        load_ema(tmp_path / "ema.safetensors")
    assert not mark.exists()


@pytest.mark.parametrize("victim", ["ema.safetensors", "state-00000-of-00001.safetensors"])
@pytest.mark.parametrize("make", [as_pickle, as_torch, as_npy])
def test_in_a_checkpoint_whose_manifest_vouches_for_it(
    tmp_path: Path, make: Callable[[Path], bytes], victim: str
) -> None:
    """Checksums are no help against somebody who can write the manifest too."""
    save(tmp_path, 5)
    mark, found = tmp_path / "mark", layout.folder(tmp_path, 5)
    tree = layout.manifest(found)
    (found / victim).write_bytes(make(mark))
    entry = {"bytes": (found / victim).stat().st_size, "blake2b": file_digest(found / victim)}
    layout.write_manifest(found, tree | {"files": tree["files"] | {victim: entry}})
    assert layout.find_whole(tmp_path, ALONE) == found
    with pytest.raises(ConfigError, match=f"{victim}: is damaged or no safetensors file"):
        resume.Reader(found)
    assert not mark.exists()


def test_in_packed_images_and_samples(tmp_path: Path) -> None:
    mark, file = tmp_path / "mark", tmp_path / "evil.npz"
    keys = ("classes", "train_jpeg", "train_offsets", "train_labels")
    for data in (as_npz(mark, *keys), as_npz(mark, "arr_0", "arr_1"), as_pickle(mark), as_npy(mark)):
        file.write_bytes(data)
        with pytest.raises(ConfigError):
            PackedImages(file, "train", 3, 16)
        with pytest.raises(ConfigError):
            load_samples(file)
        assert not mark.exists()


def test_in_yaml(tmp_path: Path) -> None:
    mark, file = tmp_path / "mark", tmp_path / "evil.yaml"
    file.write_text(f"name: !!python/object/apply:builtins.open [{mark}, w]\n")
    with pytest.raises(ConfigError):
        load_config(str(file), [])
    (tmp_path / "config.yaml").write_text(file.read_text())
    with pytest.raises(ConfigError):
        resume.saved_config(tmp_path)
    assert not mark.exists()


READERS: list[tuple[str, Callable[[Path], Any], str]] = [
    ("checkpoints/step_00000007/manifest.json", load_ema, "is damaged: manifest.json is not JSON (it is nested too"),
    ("codec.json", lambda run: codec_of_run(find_weights(run)), "its codec.json cannot be read (it is nested too"),
    ("metrics.json", lambda run: export.export(["--run", str(run), "--out", f"{run}_out"]), "holds no scores"),
    ("metrics.json", report.recorded_scores, "holds no scores"),
    ("files.json", report.check_folder, "holds files but no files.json of a report"),
    ("sampling.json", lambda out: check_folder(out, {}), "its sampling.json cannot be read (it is nested too"),
    ("sampling.json", read_sampling, "cannot be read as JSON (it is nested too"),
    ("weights/manifest.json", lambda run: find_weights(run / "weights"), "is damaged: manifest.json is not JSON"),
    ("model.safetensors.index.json", lambda run: shard_files(run / layout.WEIGHTS_INDEX), "is no index of weights"),
    ("index.json", read_index, "index.json: cannot be used (it is nested too deeply)"),
    ("dataset.json", lambda path: LabelledFiles(path, (".png",), "write it"), "dataset.json: is not names and labels"),
    ("config.json", lambda path: vae_class(path), "its config.json cannot be read (it is nested too"),
    ("config.json", lambda path: find_codec(str(path)), "config.json: cannot be read (it is nested too"),
    ("config.json", read_folder, "config.json: cannot be used (ValueError('it is nested too"),
]


@pytest.mark.parametrize(("name", "read", "message"), READERS)
def test_json_that_is_nested_too_deeply(tmp_path: Path, name: str, read: Callable[[Path], Any], message: str) -> None:
    write_run(tmp_path)
    (tmp_path / "weights").mkdir()
    for beside in ("weights/model.safetensors", "diffusion_pytorch_model.safetensors"):
        (tmp_path / beside).touch()
    (tmp_path / name).write_text("[" * sys.getrecursionlimit())  # torch's compiler raises it
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        read(tmp_path)
    assert "\n" not in str(caught.value)


def test_deep_json_that_is_passed_over(tmp_path: Path) -> None:
    """In logs, and where what is damaged is made again."""
    deep = "[" * sys.getrecursionlimit()
    (tmp_path / "metrics.jsonl").write_text(f'{deep}\n{{"step": Infinity}}\n{{"step": 3}}\n')
    assert resume.logged(tmp_path) == [(3, '{"step": 3}')]
    (tmp_path / "metrics.json").write_text(deep)
    assert pipeline.read(tmp_path / "metrics.json") == {}


def test_deep_json_in_the_header_of_a_features_file(tmp_path: Path) -> None:
    header = {"format": FORMAT, "extractor": "digits", "num": "[" * sys.getrecursionlimit()}
    tensors = {"mu": np.zeros(2), "sigma": np.eye(2)}
    safetensors.numpy.save_file(tensors, tmp_path / "a.safetensors", header | {"sha256": "", "sampling": "{}"})
    with pytest.raises(ConfigError, match="is no readable features file"):
        load_features(tmp_path / "a.safetensors", "SAMPLES")


def calls(path: Path) -> list[tuple[str, dict[str, str]]]:
    """Every `module.function(...)` of a file, with its keyword arguments."""
    found = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    return [(ast.unparse(c.func), {k.arg: ast.unparse(k.value) for k in c.keywords if k.arg}) for c in found]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_careless_reader_in_the_sources(path: Path) -> None:
    """Also in readers that no test above knows."""
    for name, keywords in calls(path):
        if name == "torch.load":
            assert keywords.get("weights_only") == "True", "torch.load(..., weights_only=True)"
        if name in ("np.load", "numpy.load"):
            assert keywords.get("allow_pickle") == "False", "np.load(..., allow_pickle=False)"
        if name in ("json.load", "json.loads"):
            assert path.name == "files.py", "utils.files.read_json or parse_json, which knows what nesting may do"
        assert name not in ("yaml.load", "yaml.unsafe_load", "yaml.full_load", "joblib.load"), name
    source = path.read_text(encoding="utf-8")
    if path.name == "pickled_statistics.py":  # the one that is asked before each name; tests/evaluation has its tests
        used = {node.attr for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)
                and ast.unparse(node.value) == "pickle"}  # fmt: skip
        assert used == {"Unpickler", "UnpicklingError"} and "def find_class(" in source
        return
    if path.name == "workers.py":  # what this process's own children answer, in memory that no other can write
        return
    modules = {word for line in source.splitlines() for word in line.split()[:2]}
    assert not modules & {"pickle", "dill", "cloudpickle", "shelve", "joblib"}, "no module that unpickles"
