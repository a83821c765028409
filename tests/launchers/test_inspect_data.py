"""launchers/inspect_data.py: what it says of caches and images, and what it refuses."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.image_layouts import SOURCES, some_items, write_tars
from launchers.inspect_data import main
from promoe_ds.data.caches.cache import STATISTICS
from tests.data.cache_files import write_lightningdit, write_mean_std, write_tree
from tests.photographs import tiny_kl
from tests.photographs import write_tree as write_pictures


def said(capsys: pytest.CaptureFixture[str], *args: object, code: int = 0) -> str:
    assert main(list(map(str, args))) == code
    out, error = capsys.readouterr()
    assert (error == "") if code == 0 else "Traceback" not in error
    return out + error


def test_a_cache_is_described(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_mean_std(tmp_path / "a.zip", *(np.reshape(v, (-1, 1, 1)) for v in STATISTICS["edm2"]))
    text = said(capsys, path)
    for part in (
        f"{path}: 7 items of 3 classes, 2 to 3 of each",
        "read by MeanStd: mean_std 8x4x4 float32, no mirror images (data.hflip=false)",
        "note: read as data.format=edm2, because its means",
        "all channels are as they should be",
        f"data.path={path} model.channels=4 model.image_size=4 model.num_classes=3",
        "no damaged item (0 of the 7 looked at)",
    ):
        assert part in text
    (row,) = [line.split() for line in text.splitlines() if line.startswith("      2 ")]
    assert row[3:7] == ["0.120", "3.710", "0.13477", "0.120"]
    assert "channels 0, 1, 3 are not: another codec" in said(capsys, path, "--format", "repa")
    text = said(capsys, write_lightningdit(tmp_path / "b"), "--scale", "0.5")
    assert "codec: not named" in text and " 0.50000 " in text and "unknown" not in text
    text = said(capsys, write_tree(tmp_path / "c", channels=6), "--scale", *"123456", "--shift", "0", "--items", "2")
    assert "(0 of the 2 looked at)" in text and "     unknown    6.00000    0.000" in text


def test_damaged_items_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_tree(tmp_path / "tree")
    (root / "n01/n01_2.JPEG.npz").write_bytes(b"")
    bad = np.full((8, 4, 4), np.nan, np.float32)
    np.savez(root / "n02/n02_3.JPEG.npz", moments=bad, moments_flip=bad)
    text = said(capsys, root, code=2)
    assert f"damaged: PATH={root}/n01/n01_2.JPEG.npz: cannot be read" in text
    assert f"damaged: PATH={root}/n02/n02_3.JPEG.npz: holds values that are not finite" in text
    assert "(2 of the 7 looked at)" in text


def test_a_sheet_is_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for sheet in (tmp_path, "."):
        assert "is a folder; name a file in it" in said(capsys, tmp_path, "--sheet", sheet, code=2)
    (data := tmp_path / "data.npz").write_bytes(b"precious")
    text = f"error: --sheet={data}: the sheet is a PNG; choose a name that ends in .png\n"
    assert said(capsys, tmp_path, "--sheet", data, code=2) == text and data.read_bytes() == b"precious"
    (picture := tmp_path / "0.png").write_bytes(b"precious")
    text = f"error: --sheet={picture}: exists; nothing is overwritten; name another file, or remove this one\n"
    assert said(capsys, tmp_path, "--sheet", picture, code=2) == text and picture.read_bytes() == b"precious"


def test_a_sheet_without_a_name_overwrites_nothing_either(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("sheet.png").write_bytes(b"precious")
    text = "error: --sheet=sheet.png: exists; nothing is overwritten; name another file, or remove this one\n"
    assert said(capsys, write_tree(tmp_path / "tree"), "--vae", "identity", code=2) == text
    assert Path("sheet.png").read_bytes() == b"precious"


def test_a_sheet_shows_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sheet = tmp_path / "sheet.png"
    said(
        capsys,
        write_tree(tmp_path / "tree", suffix=".latent.npz"),
        "--vae",
        tiny_kl(tmp_path / "kl"),
        "--sheet",
        sheet,
        code=2,
    )
    assert not sheet.exists()  # an autoencoder of 2 pixels a cell is not the one of the tree
    said(
        capsys,
        write_mean_std(tmp_path / "a"),
        "--format",
        "edm2",
        "--scale",
        0.5,
        "--vae",
        tmp_path / "kl",
        "--sheet",
        sheet,
    )
    with Image.open(sheet) as image:
        assert image.size[0] > 4 * 8


def test_images_and_what_is_neither(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, write_pictures(tmp_path / "tree", 3, 24), "--sheet", tmp_path / "sheet.png")
    assert "6 items of 2 classes, 3 to 3 of each" in text and "classes: china, flower\n" in text
    assert "read by FolderImages: image files in a folder per class" in text
    assert "image files of 24x24 pixels: 6 JPEG RGB" in text and "6 of them" in text
    with Image.open(tmp_path / "sheet.png") as image:
        assert image.size == (4 * 258 + 2, 2 * 258 + 2)
    sheet = tmp_path / "no" / "sheet.png"
    text = f"error: --sheet={sheet}: there is no folder {sheet.parent}; make it, or name another file\n"
    assert said(capsys, tmp_path / "tree", "--sheet", sheet, code=2) == text
    (empty := tmp_path / "empty").mkdir()
    text = said(capsys, empty, code=2)
    assert text.startswith(f"error: PATH={empty}: holds neither latents nor images: looked for index.json")
    assert "of images: a folder per class, a packed npz" in text
    text = "does not exist; name the --out of launchers/encode_latents.py, or a cache of latents"
    assert said(capsys, tmp_path / "none", code=2) == f"error: PATH={tmp_path}/none: {text}\n"


def test_a_zip_is_told_by_all_its_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`zip -r` writes folders first, and dataset.json where it comes in the order of names."""
    pictures, path = SOURCES["zip"](tmp_path / "pictures", some_items()), tmp_path / "again.zip"
    with zipfile.ZipFile(pictures) as archive, zipfile.ZipFile(path, "w") as again:
        again.writestr("00000/", "")
        for name in sorted(archive.namelist(), key=lambda name: name != "dataset.json"):
            again.writestr(name, archive.read(name))
    assert "read by NumberedImages: image files with the labels of dataset.json" in said(capsys, path)


def test_options_that_would_be_left_aside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = write_tree(tmp_path / "tree", suffix=".latent.npz")
    text = said(capsys, tree, "--sheet", tmp_path / "sheet.png", code=2)
    assert (
        text == f"error: --sheet={tmp_path}/sheet.png: latents are drawn by their codec; add --vae, or leave it out\n"
    )
    pictures = write_pictures(tmp_path / "pictures", 3, 24)
    assert "error: --vae=identity: PATH holds pictures; leave it out\n" == said(
        capsys, pictures, "--vae", "identity", code=2
    )
    for number in ("nan", "inf"):
        text = f"error: --scale={number}: is not finite; say a number, or one per channel\n"
        assert said(capsys, tree, "--scale", 1, 1, 1, number, code=2) == text


@pytest.mark.parametrize("source", SOURCES)
def test_every_source_of_images_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str], source: str) -> None:
    path = SOURCES[source](tmp_path / source, some_items())
    text = said(capsys, path)
    reader = {
        "parquet": "ParquetImages: pictures in Parquet (Hugging Face), 2 file(s), ",
        "tars": "TarImages: pictures in tars (WebDataset), 2 of them",
    }.get(source.partition("_")[0], "NumberedImages: image files with the labels of dataset.json")
    assert f"{path}: 11 items of 3 classes, 3 to 4 of each\nread by {reader}" in text
    assert "image files of 20x16 pixels: 8 JPEG RGB, 3 PNG RGB" in text and "no damaged item (0 of the 11" in text
    assert f"train with data.name=images data.path={path} model.channels=3 model.num_classes=3" in text


def test_damaged_images_and_splits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    items = some_items()
    items[4] = (items[4][0], b"no picture", items[4][2])
    root = write_tars(tmp_path / "tars", items)
    text = said(capsys, root, code=2)
    assert f"damaged: PATH={root}/pictures-train-0000.tar (n02_00004): is not an image" in text
    assert "7 JPEG RGB, 3 PNG RGB" in text and "(1 of the 11 looked at)" in text
    text = said(capsys, root, "--split", "test", code=2)
    assert text == f"error: --split=test: {root} has the splits train; choose one of them\n"
    with (root / "pictures-train-0000.tar").open("r+b") as file:
        file.truncate(5000)
    assert "error: PATH=" in (text := said(capsys, root, code=2)) and "is no whole tar of samples" in text
