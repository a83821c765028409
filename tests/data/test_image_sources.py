"""Parquet, tars, and pictures with dataset.json: the same labels and pixels as the folder tree, or one line why not."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import sys
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from benchmarks.image_layouts import (
    SOURCES,
    add,
    as_old_parquet,
    encoded,
    picture,
    some_items,
    write_folders,
    write_numbered,
    write_parquet,
    write_tars,
    write_zip,
)
from benchmarks.image_sources import MANY, index_of
from benchmarks.processes import PATIENCE
from promoe_ds.config.schema import Config, ConfigError, DataConfig, ModelConfig, TrainConfig
from promoe_ds.data import archive, build_dataset, fingerprint
from promoe_ds.data.batches import Batch, BatchMaker
from promoe_ds.data.caches import open_latents
from promoe_ds.data.codecs import open_codec
from promoe_ds.data.encode import EncodedImages, EncodeJob, Encoder, run_encoding
from promoe_ds.data.images import DecodedImages, image_kinds, open_images
from promoe_ds.data.images import parquet as parquet_images
from promoe_ds.moe import routers as routers  # a Config holds the one of a router
from promoe_ds.utils.ranks import ALONE
from tests.data.test_images import PACKS

ITEMS = some_items()
LABELS, NAMES = [label for *_, label in ITEMS], ["n01", "n02", "n03"]


def opened(path: Path, split: str = "train", num_classes: int | None = 3) -> DecodedImages:
    return open_images(str(path), split=split, channels=3, image_size=8, num_classes=num_classes)


def told(path: Path, **more: Any) -> str:
    """The one line that refuses it, when it is opened or read."""
    with pytest.raises(ConfigError) as caught:
        data = opened(path, **more)
        data.get(np.arange(len(data)))
    assert "\n" not in str(caught.value)
    return str(caught.value)


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


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tars_of_all_kinds(tmp_path: Path, format: int) -> None:
    """Long names, folders in names, capitals, hidden files, folders."""
    long, deep = "k" * 90, f"{'d' * 80}/{'e' * 60}"
    with tarfile.open(tmp_path / "a.tar", "w", format=format) as tar:
        folder = tarfile.TarInfo("./x")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        add(tar, "./x/._a.jpg", b"what macOS leaves")
        for number, (stem, kind) in enumerate([("./x/a", "JPEG"), (f"{deep}/{long}", "jpg"), ("ä", "Png")]):
            add(tar, f"{stem}.{kind}", encoded(picture(number), "png" if kind == "Png" else "jpeg"))
            add(tar, f"{stem}.CLS", f" {number}\n".encode())
    data = opened(tmp_path / "a.tar")
    assert [data.name(i) for i in range(3)] == ["a.tar/./x/a", f"a.tar/{deep}/{long}", "a.tar/ä"]
    assert data.label_B.tolist() == [0, 1, 2] and data.left_out == 1
    assert [data.read(i) for i in range(2)] == [encoded(picture(i)) for i in range(2)]


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


def test_columns_of_other_names(tmp_path: Path) -> None:
    """CIFAR-10 at Hugging Face: `img`, and the one ClassLabel; pictures as plain bytes."""
    features = {"img": {"_type": "Image"}, "coarse": {"names": ["a", "b", "c"], "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    for column in (kind, pa.large_binary()):
        schema = pa.schema([("img", column), ("coarse", pa.int8()), ("text", pa.string())], metadata)
        rows = [data if column != kind else {"bytes": data} for _, data, _ in ITEMS]
        columns = {"img": rows, "coarse": LABELS, "text": ["x"] * 11}
        for how in ({}, {"use_dictionary": False, "compression": "none"}):
            pq.write_table(pa.table(columns, schema), tmp_path / "a.parquet", **how)
            data = opened(tmp_path / "a.parquet")
            assert data.classes == ["a", "b", "c"] and [data.read(i) for i in range(11)] == [d for _, d, _ in ITEMS]


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


def test_more_tars_than_files_may_be_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_tars(tmp_path, ITEMS, files=11)
    data = opened(root)
    monkeypatch.setattr(archive, "_opened", archive.lru_cache(maxsize=2)(archive.Descriptor))
    before = len(os.listdir("/proc/self/fd"))
    assert [data.read(i) for i in range(11)] == [content for _, content, _ in ITEMS]
    assert len(os.listdir("/proc/self/fd")) <= before + 2


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


# --------------------------------------------------------------------------------------------------------- parquet


def test_row_groups_are_read_once_in_order_and_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[int] = []
    read = pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        pq.ParquetFile, "read_row_group", lambda self, i, *a, **k: decoded.append(i) or read(self, i, *a, **k)
    )
    data = opened(as_old_parquet(tmp_path / "old", ITEMS))
    for index in range(11):
        data.read(index)
    assert decoded == [0, 1, 0, 1] and data.note == ""  # 6 and 5 rows, four of them a group
    plain = opened(write_parquet(tmp_path / "plain", ITEMS))
    plain.get(np.arange(11))
    assert len(decoded) == 4
    monkeypatch.setattr(parquet_images, "DEAR", 1000)
    assert "one that is drawn at random costs a row group, up to 0 MB" in opened(tmp_path / "old").note
    assert opened(tmp_path / "plain").note == ""


def test_values_of_all_sizes_are_found(tmp_path: Path) -> None:
    """Statistics of short values make long headers of pages; content-defined chunks, checksums, an index of pages."""
    sizes = [1, 5, 127, 128, 4_000, 4_097, 70_000, 3]
    values = [np.random.default_rng(size).bytes(size) for size in sizes] * 3
    items = [(f"{i:05d}.jpeg", value, i % 3) for i, value in enumerate(values)]
    for number, how in enumerate([
        {}, {"data_page_version": "2.0"}, {"data_page_size": 5_000, "write_batch_size": 2},
        {"use_content_defined_chunking": True, "write_page_index": True, "write_page_checksum": True},
    ]):  # fmt: skip
        data = opened(write_parquet(tmp_path / str(number), items, files=1, row_group_size=24, **how))
        assert data._groups["plain"].all()
        assert [data.read(i) for i in range(24)] == values and data._known.all()
    other = {"column_encoding": {"image.bytes": "DELTA_LENGTH_BYTE_ARRAY"}}
    data = opened(write_parquet(tmp_path / "other", items, files=1, **other))
    assert [data.read(i) for i in range(24)] == values and not data._known.any()


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


def test_cut_and_damaged_parquet(tmp_path: Path) -> None:
    for write in (write_parquet, as_old_parquet):
        file = sorted(write(tmp_path / write.__name__, ITEMS).iterdir())[0]
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
        assert f"data.path={file}: is no whole Parquet file (" in told(file.parent)
        file.write_bytes(b"")
        assert f"data.path={file}: is no whole Parquet file (" in told(file.parent)
        file.write_bytes(whole)
        data = opened(file.parent)
        place = whole.index(ITEMS[1][1][:40]) if write is write_parquet else 30
        file.write_bytes(whole[: place - 4] + b"\xff\xff\xff\x7f" + whole[place:])
        os.utime(file, ns=(1, data._archives[0].modified_ns))
        with pytest.raises(ConfigError, match=r"\(row 1\): cannot be read"):
            data.read(1)


def test_parquet_without_what_is_needed(tmp_path: Path) -> None:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = [{"bytes": data, "path": name} for name, data, _ in ITEMS]
    path = tmp_path / "a.parquet"

    def refused(message: str, **columns: Any) -> None:
        pq.write_table(pa.table(columns), path, use_dictionary=False, compression="none")
        assert f"data.path={path}" in (text := told(path)) and message in text

    empty = pa.array([{"bytes": None, "path": "/somewhere/a.jpg"}, *rows[1:]], kind)
    refused("has 1 picture(s) without bytes in row group 0; embed the pictures' files", image=empty, label=LABELS)
    refused("has no column of pictures (`image` with `bytes`), but label", label=LABELS)
    refused("has no column `label` of integers, but image", image=rows)
    refused("has no column `label` of integers, but image, label", image=rows, label=["cat"] * 11)
    refused("has 1 rows without a label", image=rows, label=[None, *LABELS[1:]])
    refused("(row 3): has the label -1, and labels begin at 0", image=rows, label=[0, 1, 2, -1, *LABELS[4:]])
    refused("(row 2): holds no bytes", image=[*rows[:2], {"bytes": b"", "path": "x"}, *rows[3:]], label=LABELS)
    refused("(row 2): is not an image", image=[*rows[:2], {"bytes": b"text", "path": "x"}, *rows[3:]], label=LABELS)
    pq.write_table(pa.table({"image": pa.array([], kind), "label": pa.array([], pa.int64())}), path)
    assert "its 1 Parquet file(s) have no rows" in told(path)
    root = write_parquet(tmp_path / "two", ITEMS)
    write_parquet(tmp_path / "other", ITEMS, classes=0)
    os.replace(tmp_path / "other/train-00001-of-00002.parquet", root / "train-00001-of-00002.parquet")
    assert "00001-of-00002.parquet: has other columns or class names than train-00000-of-00002.parquet" in told(root)
    write_parquet(root, [(name, data, label + 1) for name, data, label in ITEMS], classes=3)
    assert "(row 2): has the label 3, outside the 3 classes; give every row one of the classes" in told(root)


def test_a_cut_tar_is_refused_wherever_it_is_cut(tmp_path: Path) -> None:
    """webdataset reads what is there and says nothing in two of five cases."""
    whole = next(write_tars(tmp_path / "whole", ITEMS[:3], files=1).iterdir()).read_bytes()
    end = len(whole.rstrip(b"\0"))
    file = tmp_path / "a.tar"
    for size in {*range(0, end, 97), end, -(-end // 512) * 512, -(-end // 512) * 512 + 512}:
        file.write_bytes(whole[:size])
        assert f"data.path={file}: is no whole tar of samples (it is cut off" in told(file), size
    file.write_bytes(whole[: -(-end // 512) * 512 + 1024])
    assert len(opened(file)) == 3
    file.write_bytes(whole + whole)
    assert "it has more behind its end: tars that were joined are read to the first end only" in told(file)
    at = whole.index(b"n01_00001")
    file.write_bytes(whole[:at] + b"N" + whole[at + 1 :])
    assert "the header of N01_00001" in told(file) and "does not match its checksum" in told(file)
    file.write_bytes(whole[: at + 124] + b"x" + whole[at + 125 :])
    assert "is no whole tar of samples (a header in it is damaged)" in told(file)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.jpg", b"x"), ("b.jpg", b"x"), ("b.cls", b"1")], "a has no label (.cls)"),
        ([("a.jpg", b"x"), ("b.cls", b"1")], "a has no label (.cls)"),
        ([("a.cls", b"1"), ("a.txt", b"x")], "a has no picture"),
        ([("a.jpg", b"x"), ("a.cls", b"cat")], "a.cls is not one number but b'cat'"),
        ([("a.jpg", b"x"), ("a.cls", b"")], "a.cls is not one number but b''"),
        ([("a.jpg", b"x"), ("a.PNG", b"x"), ("a.cls", b"1")], "a has two pictures, the second is a.PNG"),
        ([("a.jpg", b"x"), ("a.cls", b"1"), ("a.cls", b"1")], "or a second label"),
        (
            [("a.0.jpg", b"x"), ("a.0.cls", b"1")],
            "a has no picture; a.0.cls is none of it, because",
        ),
        ([("a.json", b"{}")], "hold no pictures"),
        ([("a.jpg", b"x"), ("a.cls", b"-1")], "a.cls is not one number"),
        ([("a.jpg", b"x"), ("a.cls", b"1")], "(a): is not an image"),
    ],
)
def test_tars_with_odd_samples(tmp_path: Path, members: list[tuple[str, bytes]], message: str) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in members:
            add(tar, name, data)
    assert f"data.path={tmp_path}/a.tar" in (text := told(tmp_path / "a.tar")) and message in text


def test_tars_that_cannot_be_indexed(tmp_path: Path) -> None:
    for name, mode in (("a.tar.gz", "w:gz"), ("a.tar", "w:gz")):
        with tarfile.open(tmp_path / name, mode) as tar:  # type: ignore[call-overload]
            add(tar, "a.jpg", b"x")
        assert "it is compressed, so nothing in it can be found without reading all: unpack it" in told(tmp_path / name)
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        link = tarfile.TarInfo("a.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "b.jpg"
        tar.addfile(link)
    assert "a.jpg is a link, or no plain file (type 2)" in told(tmp_path / "a.tar")


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
@pytest.mark.parametrize("name", list(MANY)[:2])  # that of a zip is looked at in test_caches.py
def test_the_index_of_a_twentieth_of_imagenet_fits(tmp_path: Path, name: str) -> None:
    items, _, seconds, opened_mb, later_mb, _ = index_of(MANY[name](tmp_path / "many", 64_000))
    text = f"{items} items, {seconds} s, {opened_mb} MB, {later_mb} MB"
    print(text)
    assert items == 64_000 and later_mb < 40 and seconds < 5, text
