"""Parquet, tars, and pictures with dataset.json: the same labels and pixels as the folder tree, or one line why not."""

from __future__ import annotations

import multiprocessing
import pickle
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.image_layouts import SOURCES, write_folders, write_numbered, write_parquet, write_tars, write_zip
from benchmarks.image_sources import MANY, index_of
from benchmarks.processes import PATIENCE
from promoe_ds.config.errors import ConfigError
from promoe_ds.config.schema import Config, DataConfig, ModelConfig, TrainConfig
from promoe_ds.data import archive, build_dataset, fingerprint
from promoe_ds.data.batches import Batch, BatchMaker
from promoe_ds.data.caches import open_latents
from promoe_ds.data.codecs import open_codec
from promoe_ds.data.encode import EncodedImages, EncodeJob, Encoder, run_encoding
from promoe_ds.data.images import image_kinds
from promoe_ds.data.images import parquet as parquet_images
from promoe_ds.moe import routers as routers  # a Config holds the one of a router
from promoe_ds.utils.ranks import ALONE
from tests.data.image_files import ITEMS, LABELS, NAMES, opened, told
from tests.data.test_images import PACKS

# -------------------------------------------------------------------------------------------------------- what is read


@pytest.mark.parametrize("source", SOURCES)
def test_labels_and_pixels_are_those_of_the_tree(tmp_path: Path, source: str) -> None:
    tree, data = opened(write_folders(tmp_path / "tree", ITEMS)), opened(SOURCES[source](tmp_path / source, ITEMS))
    assert len(data) == len(ITEMS) and data.label_B.tolist() == LABELS and data.label_B.dtype == np.int64
    for a, b in zip(data.get(np.arange(11)), tree.get(np.arange(11)), strict=True):
        assert a.equal(b)
    order = np.array([7, 0, 10, 7, 3])
    assert data.get(order)[0].equal(tree.get(order)[0]) and [data.read(i) for i in order] == [
        ITEMS[i][1] for i in order
    ]
    assert data.hold().get(order)[0].equal(tree.get(order)[0])
    assert data.classes == (NAMES if source.startswith("parquet") else ["0", "1", "2"])
    assert (fingerprint(data) == fingerprint(tree)) == source.startswith("parquet")
    assert len({data.name(i) for i in range(11)}) == 11 and data.note == ""
    with pytest.raises(IndexError):
        data.get(np.array([11]))


@pytest.mark.parametrize("source", SOURCES)
def test_shards_of_a_source_are_those_of_the_tree(tmp_path: Path, source: str) -> None:
    latents = []
    for path in (write_folders(tmp_path / "tree", ITEMS), SOURCES[source](tmp_path / source, ITEMS)):
        encoded_images = EncodedImages(opened(path), open_codec("identity"), 4, torch.device("cpu"))
        run_encoding(Encoder(encoded_images, EncodeJob(out := tmp_path / f"{path.name}-out", 4), "", {}), ALONE)
        latents.append(open_latents(out))
    for a, b in zip(*(data.get(np.arange(11)) for data in latents), strict=True):
        assert a.equal(b)


def test_training_draws_from_a_source_what_it_draws_from_the_tree(tmp_path: Path) -> None:
    def batches(path: Path) -> list[Batch]:
        config = Config(
            moe=None,
            model=ModelConfig(image_size=8, channels=3, num_classes=3),
            data=DataConfig(name="images", path=str(path), hflip=True),
            train=TrainConfig(global_batch_size=8, micro_batch_size=4),
        )
        maker = BatchMaker(config, build_dataset(config))
        return [batch for step in range(3) for batch in maker.step(step)]

    expected = batches(write_folders(tmp_path / "tree", ITEMS))
    for source, write in SOURCES.items():
        for batch, right in zip(batches(write(tmp_path / source, ITEMS)), expected, strict=True):
            assert batch.x_BCHW.equal(right.x_BCHW) and batch.label_B.equal(right.label_B)


def test_names_and_places(tmp_path: Path) -> None:
    cases = {
        "parquet": ("train-00001-of-00002.parquet/2", "train-00001-of-00002.parquet (row 2)"),
        "tars": ("pictures-train-0001.tar/n03_00008", "pictures-train-0001.tar (n03_00008)"),
        "numbered": ("00002/img00000008.png", "00002/img00000008.png"),
        "zip": ("00002/img00000008.png", "pictures.zip (00002/img00000008.png)"),
    }
    for source, (name, where) in cases.items():
        data = opened(SOURCES[source](tmp_path / source, ITEMS))
        assert (data.name(8), data.where(8)) == (name, f"{tmp_path}/{source}/{where}")


def test_numbers_have_as_many_classes_as_the_model(tmp_path: Path) -> None:
    for source in ("tars", "numbered"):
        path = SOURCES[source](tmp_path / source, ITEMS)
        assert opened(path, num_classes=None).num_classes == 3 and opened(path, num_classes=1000).num_classes == 1000
        assert "has the label 2, outside the 2 classes; set model.num_classes=3 if" in told(path, num_classes=2)
    path = write_parquet(tmp_path / "unnamed", ITEMS, classes=0)
    assert opened(path, num_classes=5).classes == list("01234")
    assert opened(write_parquet(tmp_path / "named", ITEMS), num_classes=5).classes == NAMES


def test_a_split_is_chosen_by_the_names_of_files(tmp_path: Path) -> None:
    for write, suffix in ((write_parquet, "parquet"), (write_tars, "tar")):
        root = write(tmp_path / suffix / "data", ITEMS).parent
        (root / "README.md").write_text("about it")
        val = write(tmp_path / f"other-{suffix}", ITEMS[:4], files=1)
        (file,) = val.iterdir()
        file.rename(root / "data" / file.name.replace("train", "validation"))
        assert len(opened(root)) == 11 and len(opened(root, "validation")) == len(opened(root, "val")) == 4
        assert f"data.split=test: {root} has the splits train, validation; choose one" in told(root, split="test")
        assert "the splits train, validation; did you mean 'train'?" in told(root, split="training")
        (one,) = (root / "data").glob(f"*validation*.{suffix}")
        assert len(opened(one)) == 4  # a file is what it is


def test_pictures_of_repa_lie_beside_its_latents(tmp_path: Path) -> None:
    write_numbered(tmp_path / "images", ITEMS)
    (tmp_path / "vae-sd/00000").mkdir(parents=True)
    assert opened(tmp_path).where(0) == f"{tmp_path}/images/00000/img00000000.jpeg"
    (tmp_path / "images/00000/._img00000000.jpeg").write_bytes(b"")
    assert opened(tmp_path / "images").left_out == 1


def test_the_real_pictures_of_repa() -> None:
    """Read as one class, 00000, before their labels were looked at."""
    root = PACKS / "formats" / "REPA"
    if not root.is_dir():
        pytest.skip(f"{root} is absent (set PROMOE_DS_DATA to the folder above formats)")
    data = opened(root / "images")
    assert data.label_B.tolist() == np.load(root / "expected.npz")["label"].tolist() == [0, 0, 1, 1, 2, 2]
    assert data.get(np.arange(6))[0].std() > 0.1


# ------------------------------------------------------------------------------------------------- threads, processes


@pytest.mark.parametrize("source", SOURCES)
def test_read_by_threads_and_by_forked_processes(tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An archive opened before a fork has one position for all of them; a tar object then gives wrong bytes."""
    monkeypatch.setattr(parquet_images, "HELD", 1)  # row groups come and go
    monkeypatch.setattr(parquet_images, "LEAST", 0)
    data = opened(SOURCES[source](tmp_path / source, ITEMS))
    reads = 200 if source == "parquet_snappy" else 2000
    orders = [np.random.default_rng(seed).integers(0, 11, reads).tolist() for seed in range(4)]
    data.read(0)  # opens it

    def right(order: list[int]) -> bool:
        return all(data.read(index) == ITEMS[index][1] for index in order)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # or threads of Python would rarely meet between two calls
    try:
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(right, orders)) == [True] * 4
    finally:
        sys.setswitchinterval(interval)
    # Forked while another thread reads on: a lock of ours that it holds then must not stay locked.
    stop = threading.Event()
    thread = threading.Thread(target=lambda: [right(orders[0]) for _ in iter(stop.is_set, True)])
    thread.start()
    fork = multiprocessing.get_context("fork")
    ends = [fork.Pipe(duplex=False) for _ in orders]
    children = [fork.Process(target=lambda *job: job[1].send(right(job[0])), args=(order, end))
                for order, (_, end) in zip(orders, ends, strict=True)]  # fmt: skip
    try:
        for child in children:
            child.start()
        assert all(end.poll(PATIENCE) and end.recv() for end, _ in ends)
    finally:
        stop.set()
        for child in children:
            child.kill()
            child.join()
        thread.join()


def test_an_archive_travels_by_its_path(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"0123456789")
    there = pickle.loads(pickle.dumps(archive.Archive.of(path)))
    assert there.read(3, 4) == b"456" and there.read(5, 8) == b"89"
    data = opened(write_tars(tmp_path / "tars", ITEMS))
    write_tars(tmp_path / "tars", ITEMS[::-1])
    archive._opened.cache_clear()
    with pytest.raises(ConfigError, match="cannot be read .it has changed since it was opened"):
        data.read(0)


# ----------------------------------------------------------------------------------------------------- what is refused


def test_what_is_none_or_two_of_them(tmp_path: Path) -> None:
    both = write_tars(write_parquet(tmp_path / "both", ITEMS), ITEMS)
    assert f"data.path={both}: holds images in two layouts (parquet and tar); keep one of them there" in told(both)
    both = write_folders(write_tars(tmp_path / "more", ITEMS), ITEMS)
    assert "two layouts (folders and tar)" in told(both)
    both = write_numbered(write_parquet(tmp_path / "third", ITEMS), ITEMS)
    assert "two layouts (numbered and parquet)" in told(both)
    (tmp_path / "text.txt").write_text("hello")
    assert "text.txt: is none of the kinds of images; name a folder per class, a packed npz, .parquet" in told(
        tmp_path / "text.txt"
    )
    assert image_kinds(write_folders(tmp_path / "tree", ITEMS)) == ["folders"]
    assert "/dev/null: is neither a file nor a folder; name what" in told(Path("/dev/null"))


def test_labels_and_files_that_disagree(tmp_path: Path) -> None:
    root = write_numbered(tmp_path / "a", ITEMS)
    (root / "00000/img00000001.jpeg").unlink()
    assert "its dataset.json and its files disagree about 00000/img00000001.jpeg" in told(root)
    write_numbered(root, ITEMS)
    (root / "00000/one.bmp").write_bytes(b"")
    assert "its dataset.json and its files disagree about 00000/one.bmp" in told(root)
    (root / "dataset.json").write_text('{"labels": null}')
    assert "dataset.json: is not names and labels (TypeError" in told(root) and "again, with labels" in told(root)
    unlabelled = write_numbered(tmp_path / "unlabelled", [(name, data, -1) for name, data, _ in ITEMS])
    assert "has the label -1, and labels begin at 0; -1 often means a split without labels: name another" in told(
        unlabelled
    )
    path = write_zip(tmp_path / "zip", ITEMS)
    whole = path.read_bytes()
    path.write_bytes(whole[:-30])
    assert f"data.path={path}: is not a whole zip" in told(path)
    at = whole.index(ITEMS[4][1]) + 60
    path.write_bytes(whole[:at] + b"\x00\x01\x02" + whole[at + 3 :])
    assert f"data.path={path} (00001/img00000004.jpeg): does not match its checksum" in told(path)
    root = write_numbered(tmp_path / "b", ITEMS)
    data = opened(root)
    (root / "00000/img00000001.jpeg").unlink()
    with pytest.raises(ConfigError, match=r"img00000001.jpeg: cannot be read \(No such file"):
        data.read(1)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(MANY)[:2])  # that of a zip is looked at in caches/test_index.py
def test_the_index_of_a_twentieth_of_imagenet_fits(tmp_path: Path, name: str) -> None:
    items, _, seconds, opened_mb, later_mb, _ = index_of(MANY[name](tmp_path / "many", 64_000))
    text = f"{items} items, {seconds} s, {opened_mb} MB, {later_mb} MB"
    print(text)
    assert items == 64_000 and later_mb < 40 and seconds < 5, text
