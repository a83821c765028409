from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from promoe_ds.config.errors import ConfigError
from promoe_ds.data.caches.npz_tree import LatentTree
from promoe_ds.data.images import LOOKED_FOR, FolderImages, PackedImages, decode, open_images
from promoe_ds.utils.pictures import centre_crop

PACKS = Path(os.environ.get("PROMOE_DS_DATA") or Path(__file__).parents[3] / "shared" / "data")


def rejected(call: Callable[..., object], *args: object, **kwargs: object) -> str:
    with pytest.raises(ConfigError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def picture(seed: int, width: int, height: int, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def encoded(image: Image.Image, kind: str = "jpeg") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Three classes, five suffixes, odd cases, a nested folder, and files that are not images."""
    root = tmp_path / "tree"
    names = ["b_dog/1.PNG", "b_dog/0.jpg", "a_cat/x.JPEG", "a_cat/deep/y.webp", "c_owl/z.bmp"]
    for seed, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(seed, 16, 16).save(path)
    (root / "a_cat" / "notes.txt").write_text("not an image")
    (root / "a_cat" / ".hidden.png").write_bytes(b"not an image either")
    (root / ".cache").mkdir()
    return root


def pack_arrays(n: int = 5, size: int = 16) -> dict[str, np.ndarray]:
    files = [encoded(picture(i, size, size)) for i in range(n)]
    return {
        "classes": np.array(["cat", "dog", "owl"]),
        "train_jpeg": np.frombuffer(b"".join(files), dtype=np.uint8),
        "train_offsets": np.cumsum([0] + [len(f) for f in files]),
        "train_labels": (np.arange(n) % 3).astype(np.int16),
    }


def write_pack(path: Path, **changes: np.ndarray | None) -> Path:
    arrays: dict[str, Any] = pack_arrays() | changes
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
    return path


# ------------------------------------------------------------------------------------------------------------ pixels


def test_an_image_of_the_right_size_is_untouched():
    image = picture(0, 16, 16)
    np.testing.assert_array_equal(decode(encoded(image, "png"), "x", 3, 16), np.asarray(image))


def test_halving_averages_and_the_crop_is_central():
    blocks = np.zeros((16, 48, 3), dtype=np.uint8)
    blocks[:, 16:32] = 200
    blocks[::2, 16:32] = 100
    np.testing.assert_array_equal(np.asarray(centre_crop(Image.fromarray(blocks), 4)), np.full((4, 4, 3), 150))


@pytest.mark.parametrize(("width", "height"), [(16, 16), (17, 31), (500, 375), (33, 129), (9, 40), (15, 15)])
def test_every_shape_becomes_the_square(width: int, height: int):
    assert centre_crop(picture(1, width, height), 16).size == (16, 16)


def test_a_thread_of_pixels_is_not_blown_up(monkeypatch: pytest.MonkeyPatch):
    """A picture of 1x10000 would be 256x2560000 on its way to 256x256."""
    made, resize = [], Image.Image.resize

    def watched(self: Image.Image, size: tuple[int, int], *args: Any) -> Image.Image:
        made.append(size[0] * size[1])
        return resize(self, size, *args)

    monkeypatch.setattr(Image.Image, "resize", watched)
    thread = np.zeros((1, 10_000, 3), dtype=np.uint8)
    thread[:, 4990:5010] = 200
    for pixels in (thread, thread.transpose(1, 0, 2)):
        out = np.asarray(centre_crop(Image.fromarray(np.ascontiguousarray(pixels)), 256))
        assert (out == 200).all() and out.shape == (256, 256, 3)
    assert max(made) <= 16 * 256 * 256
    wide = picture(3, 16 * 30, 30)  # at the limit nothing is cut
    np.testing.assert_array_equal(
        np.asarray(centre_crop(wide, 20)), np.asarray(resize(wide, (320, 20), 3).crop((150, 0, 170, 20)))
    )


def test_scaling_keeps_a_gradient():
    ramp = np.broadcast_to(np.arange(120, dtype=np.uint8)[None, :, None] * 2, (120, 120, 3))
    row = np.asarray(centre_crop(Image.fromarray(np.ascontiguousarray(ramp)), 40))[20, :, 0].astype(float)
    np.testing.assert_allclose(row[2:-2], (np.arange(40)[2:-2] * 3 + 1) * 2, atol=1.5)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1", "LA", "CMYK"])
@pytest.mark.parametrize("channels", [1, 3])
def test_pixel_types_are_converted(mode: str, channels: int):
    data = encoded(picture(2, 16, 16, mode), "tiff" if mode == "CMYK" else "png")
    pixels = decode(data, "x", channels, 16)
    assert pixels.shape == (16, 16, channels) and pixels.dtype == np.uint8


def test_sixteen_bit_pixels_are_refused():
    image = Image.fromarray(np.full((16, 16), 40_000, dtype=np.uint16))
    message = rejected(decode, encoded(image, "png"), "deep.png", 1, 16)
    assert message == "data.path=deep.png: has pixels of mode I;16; convert it to 8 bits per channel"


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "bmp"])
def test_half_a_file_is_an_error(kind: str):
    data = encoded(picture(3, 64, 64), kind)
    message = rejected(decode, data[: len(data) // 2], "half." + kind, 3, 64)
    assert message.startswith(f"data.path=half.{kind}: is ") and message.endswith("; replace the file")


@pytest.mark.parametrize("data", [b"", b"no image", bytes(1000)])
def test_bytes_that_are_no_image(data: bytes):
    assert "x.png: is not an image or its head is damaged" in rejected(decode, data, "x.png", 3, 8)


# ----------------------------------------------------------------------------------------------------------- folders


def test_folder_classes_are_the_sorted_names(tree: Path):
    images = open_images(str(tree), split="train", channels=3, image_size=16)
    assert images.classes == ["a_cat", "b_dog", "c_owl"] and len(images) == 5 and images.num_classes == 3
    x, label = images.get(np.arange(5))
    assert x.shape == (5, 3, 16, 16) and x.dtype == torch.float32 and label.tolist() == [0, 0, 1, 1, 2]
    png, bmp = (np.asarray(Image.open(tree / name)) for name in ("b_dog/1.PNG", "c_owl/z.bmp"))
    np.testing.assert_allclose(x[3].permute(1, 2, 0).numpy(), png / 127.5 - 1, atol=1e-6)
    np.testing.assert_allclose(x[4].permute(1, 2, 0).numpy(), bmp / 127.5 - 1, atol=1e-6)


@pytest.mark.parametrize("kind", ["images", "latents"])
def test_hidden_names_and_links_of_a_tree(tmp_path: Path, kind: str):
    """What notebooks, macOS and links leave in a tree is no data, and moves none: checkpoints resume by index."""
    root, suffix = tmp_path / "tree", {"images": ".png", "latents": ".latent.npz"}[kind]

    def write(name: str) -> None:
        path = root / (name + suffix)
        path.parent.mkdir(parents=True, exist_ok=True)
        if kind == "images":
            return picture(0, 8, 8).save(path)
        np.savez(path, latent=np.zeros((8, 4, 4)), latent_flip=np.zeros((8, 4, 4)))

    def listed() -> tuple[list[str], list[str], list[int], int]:
        data = FolderImages(root, 3, 8) if kind == "images" else LatentTree(root)
        names = [os.path.relpath(data.where(i), root) for i in range(len(data))]
        return data.classes, [name.removesuffix(suffix) for name in names], data.label_B.tolist(), data.left_out

    for name in ("cat/b", "cat/a-b", "cat/a/x", "cat/z/deep/y", "dog/1", "../far/2"):
        write(name)
    (root / "far").symlink_to(tmp_path / "far")  # a class on another disk
    (root / "dog" / f"linked{suffix}").symlink_to(tmp_path / "far" / f"2{suffix}")
    names = ["cat/a-b", "cat/a/x", "cat/b", "cat/z/deep/y", "dog/1", "dog/linked", "far/2"]
    plain = ["cat", "dog", "far"], names, [0, 0, 0, 0, 1, 1, 2]
    assert listed() == (*plain, 0)

    (root / "cat/.DS_Store").write_bytes(b"")  # would not be read under any name
    (root / "._cat").write_bytes(b"")
    for name in (".trash/9", "cat/._b", "cat/.ipynb_checkpoints/b-checkpoint", "cat/z/.cache/8", "dog/__MACOSX/._1"):
        write(name)
    assert listed() == (*plain, 5)

    (root / "self").symlink_to(root)
    (root / "cat/up").symlink_to("..")
    (root / "cat/a/loop").symlink_to(".")
    (root / "cat/0").symlink_to("z/deep")  # comes before z, which keeps its name all the same
    (root / "dog/ring").symlink_to("ring")
    (tmp_path / "far/top").symlink_to(tmp_path)
    assert listed() == (*plain, 10)

    (root / "cow").symlink_to("dog")  # each class has its files
    (root / "cat/more").symlink_to("../dog")
    more = ["cat/a-b", "cat/a/x", "cat/b", "cat/more/1", "cat/more/linked", "cat/z/deep/y"]
    classes, found, label, left_out = listed()
    assert classes == ["cat", "cow", "dog", "far"] and label == [0] * 6 + [1, 1, 2, 2, 3]
    assert found == [*more, "cow/1", "cow/linked", "dog/1", "dog/linked", "far/2"] and left_out == 12

    write("__MACOSX/cat/._b")  # not hidden: a class, and an empty one
    assert f"data.path={root}/__MACOSX: a class folder without images" in rejected(listed)


def test_folder_in_grey_and_another_size(tree: Path):
    images = open_images(str(tree), split="train", channels=1, image_size=8)
    x, _ = images.get(np.array([4, 0]))
    assert x.shape == (2, 1, 8, 8) and -1 <= x.min() and x.max() <= 1


def test_path_that_does_not_exist(tmp_path: Path):
    message = rejected(open_images, str(tmp_path / "no"), split="train", channels=3, image_size=8)
    assert message == f"data.path={tmp_path}/no: does not exist; name {LOOKED_FOR}"


def test_folder_without_classes(tmp_path: Path):
    picture(0, 8, 8).save(tmp_path / "loose.png")
    assert "has no class folders" in rejected(FolderImages, tmp_path, 3, 8)


def test_class_folder_without_images(tree: Path):
    (tree / "d_empty").mkdir()
    assert f"data.path={tree}/d_empty: a class folder without images" in rejected(FolderImages, tree, 3, 8)


def test_damaged_and_missing_files_are_named(tree: Path):
    images = FolderImages(tree, 3, 16)
    (tree / "b_dog" / "1.PNG").write_bytes((tree / "b_dog" / "1.PNG").read_bytes()[:80])
    assert f"data.path={tree}/b_dog/1.PNG: is damaged" in rejected(images.get, np.arange(5))
    (tree / "a_cat" / "x.JPEG").unlink()
    message = rejected(images.get, np.arange(5))
    assert f"data.path={tree}/a_cat/x.JPEG: cannot be read (No such file or directory)" in message
    images.get(np.array([0, 2, 4]))  # the others are still there


def test_number_of_channels(tree: Path):
    message = rejected(open_images, str(tree), split="train", channels=4, image_size=8)
    assert message == "model.channels=4: images have 1 channel (grey) or 3 (RGB); choose one of these"


# ------------------------------------------------------------------------------------------------------------- packs


def test_pack_held_and_on_demand_agree(tmp_path: Path):
    images = PackedImages(write_pack(tmp_path / "p.npz"), "train", 3, 16)
    held = PackedImages(tmp_path / "p.npz", "train", 3, 16).hold()
    assert held.held_BHWC is not None and images.hold(memory_limit=10).held_BHWC is None
    indices = np.array([4, 0, 4, 2])
    for a, b in zip(images.get(indices), held.get(indices), strict=True):
        assert torch.equal(a, b)
    x, label = held.get(np.arange(5))
    assert label.tolist() == [0, 1, 2, 0, 1] and len(held) == 5 and held.classes == ["cat", "dog", "owl"]
    jpeg = np.asarray(Image.open(io.BytesIO(encoded(picture(3, 16, 16)))))
    np.testing.assert_allclose(x[3].permute(1, 2, 0).numpy(), jpeg / 127.5 - 1, atol=1e-6)


def test_unknown_split(tmp_path: Path):
    path = write_pack(tmp_path / "p.npz")
    message = rejected(PackedImages, path, "val", 3, 16)
    assert message == f"data.split=val: {path} has the splits train; choose one of them"
    assert rejected(PackedImages, path, "tran", 3, 16).endswith("the splits train; did you mean 'train'?")


@pytest.mark.parametrize(
    ("changes", "conflict"),
    [
        ({"classes": None}, "lacks the arrays classes"),
        ({"train_labels": None, "train_offsets": None}, "lacks the arrays train_offsets, train_labels"),
        ({"train_jpeg": None}, "lacks the arrays train_jpeg"),
        ({"classes": np.arange(3)}, "classes is not a list of names"),
        ({"classes": np.array(["cat", "dog"])}, "label 2 of image 2 is outside the 2 classes"),
        ({"train_labels": np.array([0, 1, -1, 0, 0])}, "label -1 of image 2 is outside the 3 classes"),
        ({"train_labels": np.zeros(5)}, "labels is not a row of integers"),
        ({"train_labels": np.zeros(0, dtype=int)}, "labels is not a row of integers"),
        ({"train_jpeg": np.zeros(5)}, "jpeg is not a row of uint8"),
        ({"train_offsets": np.arange(5)}, "offsets is not a row of 6 integers, one more than the labels"),
        ({"train_offsets": np.arange(6)}, "offsets do not rise from 0 to the"),
        ({"train_offsets": np.array([0, 9, 5, 20, 30, 40], dtype=np.uint64)}, "offsets do not rise from 0 to the"),
    ],
)
def test_packs_that_contradict_themselves(tmp_path: Path, changes: dict, conflict: str):
    path = write_pack(tmp_path / "p.npz", **changes)
    message = rejected(PackedImages, path, "train", 3, 16)
    assert message.startswith(f"data.path={path}: ") and conflict in message


def test_pickled_names_are_not_unpickled(tmp_path: Path):
    path = write_pack(tmp_path / "p.npz", classes=np.array(["cat", "dog", "owl"], dtype=object))
    assert "cannot be read (Object arrays cannot be loaded when allow_pickle=False)" in rejected(
        PackedImages, path, "train", 3, 16
    )


def test_files_that_are_no_packs(tmp_path: Path):
    path = write_pack(tmp_path / "p.npz")
    (tmp_path / "half.npz").write_bytes(path.read_bytes()[:2000])
    (tmp_path / "text.npz").write_text("hello")
    np.save(tmp_path / "bare.npy", np.zeros(3))
    for name in ("half.npz", "text.npz"):
        message = rejected(open_images, str(tmp_path / name), split="train", channels=3, image_size=8)
        assert message == (
            f"data.path={tmp_path}/{name}: is neither a folder nor a complete npz; name a folder or a packed npz"
        )
    message = rejected(open_images, str(tmp_path / "bare.npy"), split="train", channels=3, image_size=8)
    assert message == f"data.path={tmp_path}/bare.npy: is none of the kinds of images; name {LOOKED_FOR}"


def test_flipped_bytes_in_a_pack(tmp_path: Path):
    path = write_pack(tmp_path / "p.npz")
    data = bytearray(path.read_bytes())
    data[600:640] = bytes(40)
    path.write_bytes(data)
    assert "cannot be read (Bad CRC-32 for file" in rejected(PackedImages, path, "train", 3, 16)


def test_a_damaged_image_in_a_pack_is_named(tmp_path: Path):
    arrays = pack_arrays()
    jpeg, (start, end) = arrays["train_jpeg"].copy(), arrays["train_offsets"][3:5]
    jpeg[start:end] = 0
    path = write_pack(tmp_path / "p.npz", train_jpeg=jpeg)
    images = PackedImages(path, "train", 3, 16)
    for call in (images.hold, lambda: images.get(np.array([3]))):
        assert f"data.path={path} (train image 3): is not an image" in rejected(call)


@pytest.mark.parametrize(
    ("name", "train", "test", "classes", "size"),
    [
        ("cifar10_jpeg.npz", 50_000, 10_000, 10, 32),
        ("tinyimagenet50_jpeg.npz", 25_000, 2_500, 50, 64),
    ],
)
def test_real_packs(name: str, train: int, test: int, classes: int, size: int):
    path = PACKS / name
    if not path.is_file():
        pytest.skip(f"{path} is absent (set PROMOE_DS_DATA to its folder)")
    images = open_images(str(path), split="train", channels=3, image_size=size)
    assert len(images) == train and images.num_classes == classes
    x, label = images.get(np.arange(0, train, train // 500))
    assert x.shape[1:] == (3, size, size) and len(label.unique()) == classes
    assert abs(x.mean()) < 0.3 and 0.3 < x.std() < 0.8  # photographs
    held = PackedImages(path, "test", 3, size).hold()
    assert len(held) == test and held.held_BHWC is not None
