from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from launchers import evaluate as launcher
from promoe_ds.config.errors import ConfigError
from promoe_ds.evaluation.images import Folder, ImageSet, pictures_in, read_npz
from promoe_ds.evaluation.reference import find_reference
from promoe_ds.evaluation.samples import SampleSet, find_samples, load_samples, run_samples
from promoe_ds.utils.pictures import centre_crop

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 6, 4, 3), np.uint8)


def write(folder: Path, pixels: np.ndarray = PIXELS, name: str = "{:06d}_class{}.png") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(pixels):
        Image.fromarray(image.squeeze()).save(folder / name.format(i, i % 3))
    return folder


def message(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        samples = load_samples(path)
        assert isinstance(samples, SampleSet)
        samples.images_NHWC[0 : len(samples)]
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder_of_samples(tmp_path: Path):
    folder = write(tmp_path / "cfg1.5")
    Image.fromarray(PIXELS[0]).resize((90, 90)).save(folder / "grid.png")
    (folder / "sampling.json").write_text('{"num": 5, "seed": 3}')
    assert find_samples(tmp_path) == find_samples(folder) == [folder]
    samples = load_samples(folder)
    assert isinstance(samples, SampleSet) and samples.labels_N is not None
    assert samples.images_NHWC.shape == (5, 6, 4, 3) and samples.labels_N.tolist() == [0, 1, 2, 0, 1]
    assert (samples.images_NHWC[1:4] == PIXELS[1:4]).all() and samples.images_NHWC[5:9].shape == (0, 6, 4, 3)
    (folder / "sampling.json").write_text('{"num": 9}')
    assert "holds 5 of the 9 pictures" in message(folder)


def test_other_pictures_have_no_labels_and_grey_stays_grey(tmp_path: Path):
    samples = load_samples(write(tmp_path, PIXELS[..., :1], "{}-{}.png"))
    assert isinstance(samples, SampleSet) and samples.labels_N is None
    assert (samples.images_NHWC[0:5] == PIXELS[..., :1]).all()
    Image.fromarray(PIXELS[0]).save(tmp_path / "9.png")
    assert "is RGB, 0-0.png is grey" in message(tmp_path)


def test_grey_among_colour_is_expanded_and_faults_are_named(tmp_path: Path):
    write(tmp_path)
    Image.fromarray(PIXELS[1, ..., 0]).save(tmp_path / "000001_class1.png")
    folder = Folder(tmp_path, pictures_in(tmp_path), "SAMPLES")
    assert (folder[1:2][0] == PIXELS[1, ..., :1]).all()
    Image.fromarray(PIXELS[0][:3]).save(tmp_path / "000002_class2.png")
    assert "000002_class2.png: is [3, 4, 3] (H, W, C), 000000_class0.png is [6, 4, 3]" in message(tmp_path)
    (tmp_path / "000002_class2.png").write_bytes((tmp_path / "000000_class0.png").read_bytes()[:60])
    assert "000002_class2.png: is no readable picture" in message(tmp_path)
    deep = Image.fromarray(np.full((8, 8), 40_000, np.uint16))  # Pillow would make 255 of it
    deep.save(tmp_path / "000002_class2.png")
    assert "its pixels are of mode I;16, not of 8 bits per channel" in message(tmp_path)


def test_trees_of_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As samples and as a reference: at every depth, without hidden names, each real folder once."""
    tree = tmp_path / "tree"
    parts = {"000000": PIXELS[:2], "000001/deep": PIXELS[2:4], "../far": PIXELS[4:]}
    for name, pixels in parts.items():
        write(tree / name, pixels, "{:06d}_{}.png")
    (tree / "000002").symlink_to(tmp_path / "far")  # a folder on another disk
    (tree / "000000/again").symlink_to(tree)
    (tree / "000001/alias").symlink_to("deep")
    for name in (".ipynb_checkpoints/0.png", "000000/._000000_0.png", "000001/.trash/x.PNG", "__MACOSX/._0.png"):
        (tree / name).parent.mkdir(exist_ok=True)
        (tree / name).write_bytes(b"no picture")
    (tree / "000000/.DS_Store").write_bytes(b"")
    assert find_samples(tree) == [tree]
    for found in (load_samples(tree), find_reference(str(tree)).images):
        assert isinstance(found, ImageSet)
        assert len(found) == 5 and (found.images_NHWC[0:5] == PIXELS).all()
    assert launcher.main([str(tree), "--ref", str(tree), "--features", "digits-cnn", "--dry-run"]) == 0
    words = "6 names are left out: hidden, or links to folders that are read already"
    assert capsys.readouterr().err == f"note: {tree}: {words}\n"


def test_sets_below_others_are_no_part_of_them(tmp_path: Path) -> None:
    """Sets of two scales are never scored as one; nor are the sheets that training draws."""
    run = tmp_path / "run"
    for folder in ("cfg1.0", "cfg2.0", "cfg2.0/.ipynb_checkpoints", "other"):
        write(run / "samples" / folder)
        (run / "samples" / folder / "sampling.json").write_text('{"num": 5}')
    for sheet in ("grid.png", "grid_00000010.png", "grid_00000020.png", "experts.png"):
        Image.fromarray(PIXELS[0]).save(run / "samples" / sheet)
    scales = [run / "samples" / name for name in ("cfg1.0", "cfg2.0")]
    assert find_samples(run / "samples") == scales
    assert [s.name for s in run_samples(run)] == [str(path) for path in (*scales, run / "samples/other")]
    with pytest.raises(ConfigError, match=r"holds no samples.npz, pictures nor cfg\* folders"):
        find_samples(run)
    write(scales[0] / "best")
    assert len(load_samples(scales[0]).images_NHWC) == 5  # type: ignore[union-attr]
    write(run / "samples", PIXELS[:3], "mine{}_{}.png")
    assert find_samples(run / "samples") == [run / "samples"] and len(load_samples(run / "samples").images_NHWC) == 3  # type: ignore[union-attr]


def test_the_figures_of_a_run_are_no_samples(tmp_path: Path) -> None:
    write(tmp_path / "analysis", name="load_{}{}.png")
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ConfigError, match=f"is a run folder; write --run {tmp_path}"):
        find_samples(tmp_path)


def test_empty_and_single(tmp_path: Path):
    assert "holds no pictures" in message(tmp_path)
    assert "needs at least 2" in message(write(tmp_path / "one", PIXELS[:1]))


def test_runs_of_pictures_count_with_their_record(tmp_path: Path):
    write(tmp_path / "samples" / "cfg2.0")
    with pytest.raises(ConfigError, match="no finished samples"):
        run_samples(tmp_path)
    (tmp_path / "samples" / "cfg2.0" / "sampling.json").write_text(json.dumps({"num": 5, "cfg": 2.0}))
    assert [len(s.images_NHWC) for s in run_samples(tmp_path) if isinstance(s, SampleSet)] == [5]


def test_crop_to_any_size(tmp_path: Path):
    for i, (height, width) in enumerate([(40, 90), (7, 5), (16, 16), (33, 20)]):
        Image.fromarray(np.full((height, width, 3), 50 * i, np.uint8)).save(tmp_path / f"{i}.png")
    folder = Folder(tmp_path, pictures_in(tmp_path), "IMAGES", size=16)
    assert folder[0:4].shape == (4, 16, 16, 3)
    assert [int(image.mean()) for image in folder[0:4]] == [0, 50, 100, 150]
    ramp = np.zeros((16, 64, 3), np.uint8)
    ramp[:, 24:40] = 255  # exactly the centre
    assert (np.asarray(centre_crop(Image.fromarray(ramp), 16)) == 255).all()


def test_npz_is_mapped_where_it_can_be(tmp_path: Path):
    stored, packed = tmp_path / "a.npz", tmp_path / "b.npz"
    np.savez(stored, arr_0=PIXELS, arr_1=np.arange(5))
    np.savez_compressed(packed, arr_0=PIXELS)
    for path, kind in ((stored, np.memmap), (packed, np.ndarray)):
        array = read_npz(path, ("arr_0", "absent"), "--ref")["arr_0"]
        assert type(array) is kind and (array == PIXELS).all()
    np.savez(stored, arr_0=np.asfortranarray(PIXELS))
    assert (read_npz(stored, ("arr_0",), "--ref")["arr_0"] == PIXELS).all()


def test_npz_header_that_lies(tmp_path: Path):
    np.save(tmp_path / "arr_0.npy", PIXELS)
    content = (tmp_path / "arr_0.npy").read_bytes().replace(b"(5, 6", b"(9, 6")
    with zipfile.ZipFile(tmp_path / "s.npz", "w") as archive:
        archive.writestr("arr_0.npy", content)
    assert "is no readable .npz" in message(tmp_path / "s.npz")
