"""Caches of other projects, written from their layouts: what the model sees of them, and what is refused."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from promoe_ds.config.errors import ConfigError
from promoe_ds.config.schema import Config, DataConfig, ModelConfig
from promoe_ds.data import build_dataset, fingerprint
from promoe_ds.data.caches import LOOKED_FOR, open_latents
from promoe_ds.data.caches.cache import SD_CODEC, STATISTICS
from promoe_ds.data.encode import ConvertedLatents, EncodeJob, Encoder, run_encoding
from promoe_ds.moe import routers as routers  # a Config holds the one of a router
from promoe_ds.utils.ranks import ALONE
from tests.data.cache_files import (
    LABELS,
    drawn,
    normal,
    posterior,
    told,
    write_fast_dit,
    write_lightningdit,
    write_mean_std,
    write_tree,
)

FILE = "latents_rank00_shard000.safetensors"


def test_trees_of_mar_and_diffmoe(tmp_path: Path) -> None:
    data = open_latents(write_tree(tmp_path / "a"))
    assert (data.classes, data.content, data.codec, data.flips) == (["n00", "n01", "n02"], "moments", SD_CODEC, 2)
    order = sorted(range(len(LABELS)), key=lambda i: (LABELS[i], i))
    for flip in (False, True):
        moments = np.stack([normal(i + 50 * flip, 8).astype(np.float64) for i in order])
        expected = (moments[:, :4] + 2 * np.exp(moments[:, 4:] / 2)) * 0.18215
        x, label = drawn(data, flip, 2.0)
        assert label == sorted(LABELS)
        np.testing.assert_allclose(x, expected, rtol=1e-6, atol=1e-6)


def test_a_codec_that_is_not_named_has_its_scale_said(tmp_path: Path) -> None:
    root = write_tree(tmp_path, channels=16)
    assert f"data.scale=null: {root} has latents of 16 channels, not sd-vae-ft-mse's 4, and names no" in told(root)
    data = open_latents(root, DataConfig(scale=0.2325))
    assert data.codec == SD_CODEC | {"kind": "", "factor": 0, "channels": 16, "scale": 0.2325}
    plain = drawn(data)[0]
    shift = tuple(i / 16 for i in range(16))
    data = open_latents(root, DataConfig(scale=(0.5, 0.25) * 8, shift=shift))
    expected = (plain / 0.2325 - np.reshape(shift, (-1, 1, 1))) * np.reshape((0.5, 0.25) * 8, (-1, 1, 1))
    np.testing.assert_allclose(drawn(data)[0], expected, rtol=1e-5, atol=1e-6)
    assert "data.scale=[0.5, 0.25]: has 2 numbers, the latents 16 channels" in told(root, scale=(0.5, 0.25))
    assert "data.scale=0.0: 0 leaves nothing" in told(root, scale=0.0)


def test_lightningdit(tmp_path: Path) -> None:
    data = open_latents(write_lightningdit(tmp_path))
    order, mean, std = [0, 2, 4, 6, 1, 3, 5], np.arange(6).reshape(-1, 1, 1) / 8, np.arange(1, 7).reshape(-1, 1, 1) / 4
    assert (data.content, data.channels, data.image_size, data.classes) == ("sample", 6, 4, ["0", "1", "2"])
    assert data.codec["scale"] == (1 / std).ravel().tolist() and data.codec["shift"] == mean.ravel().tolist()
    for flip in (False, True):
        x, label = drawn(data, flip, 5.0)
        np.testing.assert_allclose(x, [(normal(i + 50 * flip, 6) - mean) / std for i in order], rtol=1e-6, atol=1e-6)
        assert label == [LABELS[i] for i in order]
    assert data.name(4) == "latents_rank01_shard000.safetensors/0"
    assert data.where(4) == f"{tmp_path}/latents_rank01_shard000.safetensors (item 0)"
    with_multiplier = open_latents(tmp_path, DataConfig(scale=0.18215))
    np.testing.assert_allclose(drawn(with_multiplier)[0], drawn(data)[0] * 0.18215, rtol=1e-6)
    unnormalised = open_latents(tmp_path, DataConfig(scale=0.5, shift=0.0))
    np.testing.assert_allclose(drawn(unnormalised)[0], [normal(i, 6) / 2 for i in order], rtol=1e-6)


def test_rejected_lightningdit(tmp_path: Path) -> None:
    stats, file = write_lightningdit(tmp_path) / "latents_stats.pt", tmp_path / FILE
    whole = file.read_bytes()
    for content, message in (
        ({"mean": torch.zeros(1, 4, 1, 1), "std": torch.ones(1, 4, 1, 1)}, "is not mean and std of 6 channels"),
        ({"mean": torch.zeros(6), "std": torch.zeros(6)}, "a std is not above 0"),
        (
            [os.system],
            "is not mean and std of 6 channels (it holds more than tensors (posix.system), which could run code",
        ),
    ):
        torch.save(content, stats)
        assert f"data.path={stats}: " in (error := told(tmp_path)) and message in error
    stats.unlink()
    assert f"data.path={stats}: does not exist, and only it says mean and std" in told(tmp_path)
    write_lightningdit(tmp_path)
    assert f"data.path={file} (item 2): has the label 2, outside the 2 classes" in told(tmp_path, num_classes=2)
    file.write_bytes(whole[:-1])
    assert f"data.path={file}: cannot be opened" in told(tmp_path)
    x = np.zeros((2, 6, 4, 4), np.float32)
    for tensors, message in (
        ({"latents": x, "labels": np.zeros(2, int)}, "holds labels, latents, not labels, latents, latents_flip"),
        ({"latents": x, "latents_flip": x, "labels": np.zeros(3, int)}, "and labels int64 [3] disagree"),
        ({"latents": x, "latents_flip": x, "labels": np.zeros(2)}, "and labels float64 [2] disagree"),
        ({"latents": x[..., :3, :3], "latents_flip": x[..., :3, :3], "labels": np.zeros(2, int)}, "files [6, 3, 3]"),
    ):
        save_file(tensors, file)
        assert message in told(tmp_path)


@pytest.mark.parametrize("name", ["vae-sd", "cache.zip"])
@pytest.mark.parametrize("format", ["repa", "edm2"])
def test_repa_and_edm2_are_told_apart_by_their_means(tmp_path: Path, format: str, name: str) -> None:
    mean, std = (np.reshape(values, (-1, 1, 1)) for values in STATISTICS[format])
    path = write_mean_std(tmp_path / name, mean, std)
    data = open_latents(path)
    assert data.note.startswith(f"read as data.format={format}, because its means (average [")
    assert (data.content, data.flips, data.classes) == ("mean_std", 1, ["0", "1", "2"])
    x, label = drawn(data, noise=-1.5)
    assert label == LABELS
    stored = np.stack([posterior(i, mean, std) for i in range(len(LABELS))]).astype(np.float64)
    z = stored[:, :4] - 1.5 * stored[:, 4:]
    expected = z * 0.18215 if format == "repa" else (z - mean) * (0.5 / std)
    np.testing.assert_allclose(x, expected, rtol=1e-5, atol=1e-6)
    assert data.codec.get("pixel_range") == (None if format == "repa" else [0.0, 1.0])
    other = open_latents(path, DataConfig(format={"repa": "edm2", "edm2": "repa"}[format]))  # type: ignore[arg-type]
    assert not np.allclose(drawn(other)[0], x)
    assert fingerprint(data).partition(", scaled")[0] == fingerprint(other).partition(", scaled")[0]
    assert fingerprint(data) != fingerprint(other), "a run that is resumed must not change its scale"


def test_means_of_neither(tmp_path: Path) -> None:
    path = write_mean_std(tmp_path / "images_and_latents" / "vae-sd", 0, 0.2).parent
    assert "like neither's; set data.format=repa (of pictures in [-1, 1]) or data.format=edm2 (in [0, 1])" in told(path)
    assert open_latents(path, DataConfig(format="repa")).where(5).endswith("/vae-sd/00001/img-mean-std-00000005.npy")
    config = Config(
        moe=None,
        model=ModelConfig(image_size=4, channels=4, num_classes=3),
        data=DataConfig(name="latents", path=str(path), format="repa", hflip=True),
    )
    with pytest.raises(ConfigError, match="^data.hflip=true: .* holds no mirror images; set data.hflip=false"):
        build_dataset(config)


def test_rejected_mean_std(tmp_path: Path) -> None:
    path = write_mean_std(tmp_path / "vae-sd")
    first, labels = path / "00000/img-mean-std-00000000.npy", path / "dataset.json"
    np.save(first, normal(0, 8))
    assert f"data.path={first}: holds a standard deviation below 0: a log-variance is no" in told(path, "repa")
    np.save(first, np.zeros((8, 4, 4), int))
    assert f"data.path={first}: holds int64, not floats" in told(path, "repa")
    np.save(first, np.zeros((8, 2, 2), np.float32))
    assert "img-mean-std-00000001.npy: holds [8, 4, 4], other files [8, 2, 2]" in told(path, "repa")
    np.save(first, np.zeros((7, 4, 4), np.float32))
    assert f"data.path={first}: holds [7, 4, 4], not mean and std [2C, h, h]" in told(path, "repa")
    for shape in ((), (8,), (8, 0, 0)):
        np.save(first, np.zeros(shape, np.float32))
        assert f"data.path={first}: holds {list(shape)}, not mean and std [2C, h, h]" in told(path, "repa")
    np.save(first, posterior(0))
    np.save(first.with_name("img-mean-std-00000003.npy"), np.zeros((8, 2, 2), np.float32))
    assert "img-mean-std-00000003.npy: holds [8, 2, 2], other files [8, 4, 4]" in told(path), "to tell whose it is"
    first.write_bytes(first.read_bytes()[:100])
    assert f"data.path={first}: cannot be read" in told(path, "repa")
    first.unlink()
    assert "dataset.json and its files disagree about 00000/img-mean-std-00000000.npy" in told(path, "repa")
    write_mean_std(path)
    np.save(path / "00001/img-mean-std-00000009.npy", normal(0))
    assert "disagree about 00001/img-mean-std-00000009.npy" in told(path, "repa")
    for text in ('{"labels": null}', "[", '{"labels": [["a", 1.5]]}', '{"labels": []}'):
        labels.write_text(text)
        assert f"data.path={labels}: is not names and labels" in told(path, "repa")
    labels.write_text('{"labels": [["00000/img-mean-std-00000000.npy", 1], ["00000/img-mean-std-00000000.npy", 1]]}')
    assert "its files disagree about 00000/img-mean-std-00000001.npy" in told(path, "repa")
    labels.unlink()
    assert f"data.path={labels}: is not names and labels (FileNotFoundError" in told(path, "repa")


def test_fast_dit(tmp_path: Path) -> None:
    data = open_latents(write_fast_dit(tmp_path))
    assert (data.content, data.flips, data.codec) == ("scaled_sample", 1, SD_CODEC | {"stochastic": False})
    x, label = drawn(data, noise=3.0)
    np.testing.assert_array_equal(x, [normal(i) for i in range(12)])  # 2 before 10
    assert label == (LABELS * 2)[:12] and data.where(10) == f"{tmp_path}/imagenet256_features/10.npy"
    assert open_latents(tmp_path, num_classes=1000).num_classes == 1000  # a part of them is no mistake


def test_fast_dit_that_cannot_be_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_fast_dit(tmp_path)
    for total, note in ((12, ""), (24, "its 12 items are 1/2 of ImageNet's 24: 2 extracting processes overwrote"),
                        (23, "its 12 items are 1/2"), (20, "")):  # fmt: skip
        monkeypatch.setattr("promoe_ds.data.caches.fast_dit.IMAGENET", total)
        assert open_latents(tmp_path).note.startswith(note) and bool(open_latents(tmp_path).note) == bool(note)
    label, feature = (tmp_path / f"imagenet256_{kind}/11.npy" for kind in ("labels", "features"))
    np.save(label, np.array([1.0]))
    assert f"data.path={label}: is not a label (it holds float64 [1])" in told(tmp_path)
    first = label.with_name("0.npy")
    whole = first.read_bytes()
    for damaged in (b"", whole[-8:]):
        first.write_bytes(damaged)
        assert f"data.path={first}: is not a label (" in told(tmp_path), "it would be taken for class 0"
    first.write_bytes(whole)
    label.unlink()
    assert "holds 12 features and 11 labels; extract the features again, with one process" in told(tmp_path)
    np.save(label, np.array([1]))
    feature.rename(feature.with_name("12.npy"))
    assert "imagenet256_features: has 12 files and no 11.npy" in told(tmp_path)
    (tmp_path / "imagenet512_features").mkdir()
    assert f"data.path={tmp_path}: holds imagenet256_features and imagenet512_features" in told(tmp_path)


def test_what_is_none_of_these_or_two_of_them(tmp_path: Path) -> None:
    (tmp_path / "pictures/cat").mkdir(parents=True)
    (tmp_path / "pictures/cat/0.png").write_bytes(b"")
    assert told(tmp_path / "pictures") == (
        f"data.path={tmp_path}/pictures: is no cache of latents: {LOOKED_FOR}; name another path or set data.format"
    )
    assert "/dev/null: is neither a file nor a folder; name what" in told(Path("/dev/null"))
    both = write_fast_dit(write_lightningdit(tmp_path / "both"))
    assert "both: holds what LightningDiT and FastDiT read; set data.format" in told(both)
    assert len(open_latents(both, DataConfig(format="fast-dit"))) == 12
    mixed = write_tree(write_tree(tmp_path / "mixed"), suffix=".latent.npz")
    assert "7 files end in .latent.npz, 7 do not: two caches in one tree; keep one" in told(mixed)


def test_a_folder_of_caches_names_them(tmp_path: Path) -> None:
    write_lightningdit(tmp_path / "vavae")
    write_fast_dit(tmp_path / "fast")
    write_mean_std(tmp_path / "edm2.zip")
    (tmp_path / "notes" / "old").mkdir(parents=True)
    (tmp_path / "pictures.zip").write_bytes(b"")
    text = f"data.path={tmp_path}: is no cache of latents, but holds some: edm2.zip, fast, vavae; name one of them"
    assert told(tmp_path) == text
    write_tree(tmp_path / "mar")  # its folders look like those of a class
    assert told(tmp_path) == text.replace("fast,", "fast, mar,")
    many = write_tree(tmp_path / "many" / "tree").parent
    assert open_latents(many).classes == ["tree"], "a class may have folders"


@pytest.mark.parametrize("write", [write_tree, write_lightningdit, write_mean_std, write_fast_dit])
def test_shards_of_a_cache_give_its_x(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    said = DataConfig(format="edm2") if write is write_mean_std else None
    data, out = open_latents(write(tmp_path / "cache"), said), tmp_path / "shards"
    run_encoding(Encoder(ConvertedLatents(data), EncodeJob(out, 3, "float32"), "", {}), ALONE)
    packed = open_latents(out)
    assert (packed.flips, packed.codec, packed.classes) == (data.flips, data.codec, data.classes)
    for flip in range(data.flips):
        for a, b in zip(drawn(packed, bool(flip), 0.5), drawn(data, bool(flip), 0.5), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert "data.scale=2.0: index.json of" in told(out, scale=2.0)
