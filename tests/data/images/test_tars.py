"""Pictures in tars: of all kinds and in numbers, and what is refused."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

import pytest

from benchmarks.image_layouts import add, encoded, picture, write_tars
from promoe_ds.data import archive
from tests.data.image_files import ITEMS, opened, told


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


def test_more_tars_than_files_may_be_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_tars(tmp_path, ITEMS, files=11)
    data = opened(root)
    monkeypatch.setattr(archive, "_opened", archive.lru_cache(maxsize=2)(archive.Descriptor))
    before = len(os.listdir("/proc/self/fd"))
    assert [data.read(i) for i in range(11)] == [content for _, content, _ in ITEMS]
    assert len(os.listdir("/proc/self/fd")) <= before + 2


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
        ([("a.jpg", b"x"), ("a.cls", b"9" * 20)], "a.cls is no class but 99999999999999999999"),
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


def test_names_in_capitals_are_tars_too(tmp_path: Path) -> None:
    (file,) = write_tars(tmp_path, ITEMS, files=1).iterdir()
    assert len(opened(file.rename(file.with_suffix(".TAR")))) == len(opened(tmp_path)) == 11


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
