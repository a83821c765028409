from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from promoe_ds.config.errors import ConfigError
from promoe_ds.config.schema import Config, DataConfig, DiffusionConfig, ModelConfig, TrainConfig
from promoe_ds.data import build_dataset, shards
from promoe_ds.data.batches import BatchMaker, item_path
from promoe_ds.data.caches import open_latents
from promoe_ds.data.caches.cache import SD_CODEC
from promoe_ds.data.caches.npz_tree import LatentTree
from promoe_ds.data.codecs import find_codec, open_codec
from promoe_ds.data.digits import Digits
from promoe_ds.data.encode import ConvertedLatents, EncodedImages, EncodeJob, Encoder, run_encoding
from promoe_ds.data.images import FolderImages
from promoe_ds.data.latents import LatentShards
from promoe_ds.data.step_noise import Purpose, row_generator
from promoe_ds.moe import routers as routers  # a Config holds the one of a router
from promoe_ds.utils.ranks import ALONE, Ranks
from tests.disk import loop
from tests.photographs import write_tree

CLASSES, ITEMS, SHAPE = ["cat", "dog", "owl"], 7, (8, 4, 4)


def moments_of(item: int) -> np.ndarray:
    """[2, M, h, w]: what is stored of an item, the mirror image's last."""
    return np.random.default_rng(item).standard_normal((2, *SHAPE)).astype(np.float32)


def write_official(root: Path, keys: tuple[str, str] = ("latent", "latent_flip")) -> Path:
    for item in range(ITEMS):
        folder = root / CLASSES[item % 3]
        folder.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(folder / f"{item}.JPEG.latent.npz", **dict(zip(keys, moments_of(item), strict=True)))
    return root


def write_shards(tmp_path: Path, dtype: str = "float32") -> Path:
    out = tmp_path / "shards"
    source = ConvertedLatents(LatentTree(write_official(tmp_path / "official")))
    run_encoding(Encoder(source, EncodeJob(out, shard_size=3, dtype=dtype), "", {}), ALONE)
    return out


ORDER = [0, 3, 6, 1, 4, 2, 5]
"""items in the order of the tree: cat cat cat dog dog owl owl"""


def config_for(path: Path, **data: object) -> Config:
    return Config(
        moe=None,
        model=ModelConfig(image_size=4, channels=4, num_classes=3, width=32, heads=2),
        data=DataConfig(name="latents", path=str(path), **data),  # type: ignore[arg-type]
        train=TrainConfig(global_batch_size=8, seed=5),
        diffusion=DiffusionConfig(label_drop=0.0),
    )


@pytest.mark.parametrize("keys", [("latent", "latent_flip"), ("moments", "moments_flip")])
def test_official_trees_and_shards_of_them_hold_the_same(tmp_path: Path, keys: tuple[str, str]) -> None:
    tree = open_latents(str(write_official(tmp_path / "a", keys)))
    packed = open_latents(str(write_shards(tmp_path)))
    assert isinstance(tree, LatentTree) and isinstance(packed, LatentShards)
    for data in (tree, packed):
        assert (data.classes, data.channels, data.image_size, data.num_classes, len(data)) == (CLASSES, 4, 4, 3, ITEMS)
        assert data.codec == SD_CODEC
        x, label = data.get(np.arange(ITEMS))
        assert label.tolist() == [0, 0, 0, 1, 1, 2, 2] and x.dtype == torch.float32
        for row, item in enumerate(ORDER):
            np.testing.assert_allclose(x[row], moments_of(item)[0, :4] * 0.18215, rtol=1e-6)


def test_the_posterior_is_sampled_with_the_draws_given(tmp_path: Path) -> None:
    data = open_latents(str(write_shards(tmp_path)))
    gauss = np.random.default_rng(9).standard_normal((3, 4, 4, 4)).astype(np.float32)
    x, label = data.draw(np.array([6, 0, 3]), np.array([True, False, True]), lambda shape: gauss)
    assert label.tolist() == [2, 0, 1]
    for row, (item, flip) in enumerate(((5, 1), (0, 0), (1, 1))):
        mean, logvar = np.split(moments_of(item)[flip].astype(np.float64), 2)
        expected = 0.18215 * (mean + np.exp(logvar / 2) * gauss[row])
        np.testing.assert_allclose(x[row], expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(IndexError):
        data.get(np.array([ITEMS]))


def test_half_precision_storage_costs_little(tmp_path: Path) -> None:
    exact, half = (open_latents(str(write_shards(tmp_path / t, t))) for t in ("float32", "float16"))
    a, b = (data.get(np.arange(ITEMS))[0] for data in (exact, half))
    assert 0 < float((a - b).abs().max()) <= 0.18215 * 2**-11 * 4  # half a unit in the last place, of values below 4


def test_steps_draw_flips_and_posteriors_by_row_of_the_global_batch(tmp_path: Path) -> None:
    config = config_for(write_shards(tmp_path), hflip=True)
    data = build_dataset(config)
    alone = BatchMaker(config, data).step(3)[0]
    halves = [BatchMaker(config, data, Ranks(rank, 2)).step(3)[0] for rank in (0, 1)]
    assert torch.equal(alone.x_BCHW, torch.cat([half.x_BCHW for half in halves]))
    assert not torch.equal(alone.x_BCHW, BatchMaker(config, data).step(4)[0].x_BCHW)
    gauss = row_generator(5, 3, 2, Purpose.POSTERIOR).standard_normal((4, 4, 4), dtype=np.float32)
    flip = row_generator(5, 3, 2, Purpose.FLIP).random() < 0.5
    candidates = [moments_of(item)[int(flip)] for item in range(ITEMS)]
    made = [0.18215 * (m[:4] + np.exp(0.5 * m[4:]) * gauss) for m in candidates]
    assert any(np.allclose(alone.x_BCHW[2], x, rtol=1e-5, atol=1e-6) for x in made)


def test_pixels_through_shards_are_the_pixels(tmp_path: Path) -> None:
    images = FolderImages(write_tree(tmp_path / "tree", 4, 24), 3, 16)
    source = EncodedImages(images, open_codec("identity"), 3, torch.device("cpu"))
    run_encoding(Encoder(source, EncodeJob(tmp_path / "out", shard_size=5), "", {}), ALONE)
    packed = open_latents(str(tmp_path / "out"))
    assert packed.classes == ["china", "flower"] and packed.channels == 3
    expected, label = images.get(np.arange(8))
    x, found = packed.get(np.arange(8))
    assert torch.equal(label, found) and float((x - expected).abs().max()) <= 2**-12 + 1e-6
    mirrored, _ = packed.draw(np.arange(8), np.ones(8, bool), lambda shape: np.zeros(0))
    assert torch.equal(mirrored, x.flip(-1))


@pytest.mark.parametrize(
    ("key", "value", "found"), [("num_classes", 1000, "3 class(es)"), ("channels", 3, "4 channel(s)"),
                                ("image_size", 32, "4 cells a side")],
)  # fmt: skip
def test_latents_that_disagree_with_the_model(tmp_path: Path, key: str, value: int, found: str) -> None:
    config = config_for(write_shards(tmp_path))
    config = replace(config, model=replace(config.model, **{key: value}))
    with pytest.raises(ConfigError, match=rf"^model\.{key}={value}: data\.path=.* has {found.replace('(', '.')[:7]}"):
        build_dataset(config)


def test_vae_of_the_grids_is_looked_for_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="^--vae=identty: no such folder; did you mean 'identity'"):
        find_codec("identty")
    with pytest.raises(ConfigError, match="^data.vae=nowhere: no such folder; put config.json and"):
        build_dataset(config_for(tmp_path, vae="nowhere"))


def test_damaged_shards_are_one_line(tmp_path: Path) -> None:
    def rejected(folder: Path, items: tuple[int, ...] = ()) -> str:
        with pytest.raises(ConfigError) as caught:
            open_latents(str(folder)).get(np.array(items))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "does not exist; name the --out of launchers/encode_latents.py" in rejected(tmp_path / "none")
    out = write_shards(tmp_path)
    first, index = sorted(out.glob("shard-*"))[0], out / "index.json"
    whole, text = first.read_bytes(), index.read_text()
    first.write_bytes(whole[:-1])
    assert f"data.path={first}: has {len(whole) - 1} bytes, the index says {len(whole)}" in rejected(out)
    first.unlink()
    assert "cannot be read (No such file or directory); copy it back" in rejected(out)
    first.write_bytes(whole[:-1] + b"\xff")
    with pytest.raises(ConfigError, match="shard-00000-of-00003.safetensors: does not match its checksum"):
        shards.verify(out)
    first.write_bytes(b"\xff" * len(whole))
    assert "cannot be opened" in rejected(out, (0,))
    other = sorted(out.glob("shard-*"))[2]  # one item, where three are expected
    tree = json.loads(text)
    tree["shards"][0] |= {"file": other.name, "bytes": other.stat().st_size}
    index.write_text(json.dumps(tree))
    assert "holds [1, 2, 8, 4, 4], the index says [3, 2, 8, 4, 4]" in rejected(out, (0,))
    index.write_text(text.replace("promoe_ds_latents/1", "promoe_ds_latents/9"))
    assert "its format is not promoe_ds_latents/1" in rejected(out)
    tree = json.loads(text)
    del tree["codec"]["stochastic"]
    index.write_text(json.dumps(tree))
    assert "index.json: cannot be used (its codec has no stochastic)" in rejected(out)
    tree = json.loads(text)
    index.write_text(json.dumps(tree | {"items": 6, "shards": tree["shards"][:2]}))
    assert "index.json and items.safetensors disagree about items" in rejected(out)
    index.write_text(json.dumps(tree | {"classes": ["cat"]}))
    assert "(dog/1.JPEG.latent.npz): has the label 1, outside the 1 classes; restore index.json" in rejected(out)
    index.unlink()
    assert "has no index.json: no latents, or not all of them are encoded; run launchers/encode" in rejected(out)


INDICES = [
    ({"classes": 5}, "it has classes=5"),
    ({"classes": []}, "it has classes=[]"),
    ({"items": "7"}, "it has items=7"),
    ({"items": 6}, "it has items=6"),
    ({"shape": [3]}, "it has shape=[3]"),
    ({"shape": None}, "it has shape=null"),
    ({"shape": [2, 4, 4, 4]}, "it has shape=[2, 4, 4, 4]"),
    ({"dtype": "int8"}, "it has dtype=int8"),
    ({"image_size": True}, "it has image_size=true"),
    ({"skipped": [1]}, "it has skipped=[1]"),
    ({"shards": []}, "it has items=7"),
    ({"shards": None}, "'NoneType' object is not iterable"),
    ({"shards": [{"file": "../a", "items": 7, "bytes": 1, "blake2b": ""}]}, "a shard of it has file=../a"),
    ({"shards": [{"file": "a", "items": 7, "blake2b": ""}]}, "a shard of it has no bytes"),
    ({"codec": SD_CODEC | {"scale": [1.0, 2.0]}}, "its codec has scale=[1.0, 2.0]"),
    ({"codec": SD_CODEC | {"shift": 10**400}}, "its codec has shift=1000"),
    ({"codec": SD_CODEC | {"stochastic": 1}}, "its codec has stochastic=1"),
    ({"codec": SD_CODEC | {"pixel_range": 2}}, "its codec has pixel_range=2"),
    ({"codec": None}, "its codec is no record of one"),
    ({"more": 1}, "unexpected keyword argument 'more'"),
]


@pytest.mark.parametrize(("change", "message"), INDICES, ids=str)
def test_a_damaged_index_is_one_line(tmp_path_factory: pytest.TempPathFactory, change: dict, message: str) -> None:
    """Whoever reads it; also where all files match their checksums, which the index itself has not."""
    index = write_shards(tmp_path_factory.mktemp("damaged")) / "index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | change))
    for read in (lambda: open_latents(str(index.parent)), lambda: shards.verify(index.parent)):
        with pytest.raises(ConfigError, match=f"{index}: cannot be used .*; run launchers/encode") as caught:
            read()
        assert message in str(caught.value) and "\n" not in str(caught.value)


def test_shapes_are_verified_with_the_checksums(tmp_path: Path) -> None:
    index = write_shards(tmp_path) / "index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"shape": [2, 8, 4, 5]}))
    with pytest.raises(ConfigError, match=r"^--verify=.*: holds \[3, 2, 8, 4, 4\], the index says \[3, 2, 8, 4, 5\]"):
        shards.verify(index.parent, "--verify")


def test_items_are_found_again(tmp_path: Path) -> None:
    """Whichever row of whichever step an item is in; a latent that is not finite is told by it."""
    tree, packed = open_latents(str(write_official(tmp_path / "a"))), open_latents(str(write_shards(tmp_path)))
    assert tree.where(4) == f"{tmp_path}/a/dog/4.JPEG.latent.npz"
    assert packed.where(4) == f"{tmp_path}/shards/shard-00001-of-00003.safetensors (dog/4.JPEG.latent.npz)"
    config = config_for(tmp_path)
    labels = BatchMaker(config, packed).step(3)[0].label_B.tolist()
    paths = [item_path(config, packed, 3, row) for row in range(8)]
    assert [path.partition("(")[2].partition("/")[0] for path in paths] == [CLASSES[label] for label in labels]
    assert item_path(config, Digits(), 3, 0) == ""


def test_damaged_official_files_are_one_line(tmp_path: Path) -> None:
    data = LatentTree(write_official(tmp_path))
    path = tmp_path / data.name(1)
    for content, message in (
        ({"latent": moments_of(0)[0]}, "has the arrays latent, needs latent and latent_flip"),
        ({"latent": np.zeros((8, 2, 2)), "latent_flip": np.zeros((8, 2, 2))}, "holds [8, 2, 2], other files [8, 4, 4]"),
        ({"latent": np.array([{}]), "latent_flip": np.array([{}])}, "cannot be read (Object arrays cannot be loaded"),
        (None, "cannot be read"),
    ):
        if content is None:
            path.write_bytes(path.read_bytes()[:50])
        else:
            np.savez(path, **content)
        with pytest.raises(ConfigError) as caught:
            data.get(np.array([1]))
        assert message in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_latents_that_cannot_be_read_are_not_to_be_removed(tmp_path: Path) -> None:
    out = write_shards(tmp_path)
    for path in (out / "items.safetensors", sorted(out.glob("shard-*"))[0]):
        loop(path)
        with pytest.raises(ConfigError, match=rf"={path}: cannot be read \(Too many levels.*\); copy it back, or run"):
            open_latents(str(out))
