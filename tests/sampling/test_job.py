"""A folder of samples: its record, and finishing what was interrupted."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tqdm import TqdmWarning

from promoe_ds.config.errors import ConfigError
from promoe_ds.config.schema import Config
from promoe_ds.sampling.job import claim_folder, codec_of_run, run_of
from promoe_ds.sampling.store import PngStore
from tests.sample_folder import Command, read_npz, sample_command, write_run


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Command:
    return sample_command(monkeypatch)


# --------------------------------------------------------------------------------------------------------------- record


def test_the_record_names_the_sampler(command: Command, tmp_path: Path) -> None:
    def record(name: str, *words: object) -> tuple[object, ...]:
        assert command("--model", file, "--out", tmp_path / name, *words) == 0
        found = json.loads((tmp_path / name / "sampling.json").read_text())
        return tuple(found[key] for key in ("sampler", "eta", "guidance_channels", "steps"))

    file = write_run(tmp_path, channels=3, objective="ddpm")
    assert record("default") == ("ddpm", 0.0, "all", 2)
    words = ("--sampler", "ddim", "--eta", 0.5, "--guidance-channels", "3", "--steps", "ddim4")
    assert record("ddim", *words) == ("ddim", 0.5, 3, "ddim4")
    assert command("--model", file, "--out", tmp_path / "ddim", *words, "--eta", 0) == 2
    images, again = (read_npz(tmp_path / name / "samples.npz")[0] for name in ("default", "ddim"))
    assert (images != again).any()


@pytest.mark.parametrize(
    ("words", "difference"),
    [
        (["--seed", 1], "holds samples of seed=0, this command has seed=1"),
        (["--steps", 3], "steps=2, this command has steps=3"),
        (["--cfg", 2], "cfg=1.5, this command has cfg=2.0"),
        (["--num", 13], "num=12, this command has num=13"),
        (["--precision", "bf16"], "precision=fp32, this command has precision=bf16"),
        (["--sampler", "heun"], "sampler=euler, this command has sampler=heun"),
    ],
)
def test_other_samples_are_not_overwritten(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list, difference: str
) -> None:
    file, out = write_run(tmp_path), tmp_path / "out"
    assert command("--model", file, "--out", out) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    capsys.readouterr()
    assert command("--model", file, "--out", out, *words) == 2
    error = capsys.readouterr().err
    assert difference in error and error.startswith("error: --out=") and error.count("\n") == 1
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_other_weights_of_the_same_step_are_noticed(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("--model", write_run(tmp_path), "--out", tmp_path / "out") == 0
    assert command("--model", write_run(tmp_path, seed=1), "--out", tmp_path / "out") == 2
    assert "checkpoint_blake2b=" in capsys.readouterr().err


def test_folders_are_checked_before_the_first_image(command: Command, tmp_path: Path) -> None:
    file, out = write_run(tmp_path), tmp_path / "out"
    (out / "cfg3.0").mkdir(parents=True)
    (out / "cfg3.0/grid.png").write_bytes(b"")
    assert command("--model", file, "--out", out, "--cfg", "1,3") == 2
    assert [path.name for path in out.iterdir()] == ["cfg3.0"]


def test_unclaimable_folders_are_one_line(tmp_path: Path) -> None:
    record = {"seed": 0}
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is not a folder; name another one"):
        claim_folder(tmp_path / "file", record, Config())
    with pytest.raises(ConfigError, match="file is not a folder; name a place in one"):
        claim_folder(tmp_path / "file/below", record, Config())
    (tmp_path / "000001_class1.png").write_bytes(b"")
    with pytest.raises(ConfigError, match="holds 000001_class1.png but no sampling.json"):
        claim_folder(tmp_path, record, Config())
    (tmp_path / "sampling.json").write_text("{")
    with pytest.raises(ConfigError, match="its sampling.json cannot be read"):
        claim_folder(tmp_path, record, Config())
    (tmp_path / "sampling.json").write_text("[]")
    with pytest.raises(ConfigError, match="holds samples of config=null"):
        claim_folder(tmp_path, {"config": "tiny"}, Config())


def test_a_run_folder_is_no_place_for_samples(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its config.yaml would be overwritten. A folder whose config.yaml was not reached gets it later."""
    run = tmp_path / "run"
    write_run(run)
    (run / "config.yaml").write_text("of the run")
    assert command("--run", str(run), "--out", str(run), "--num", "2", "--steps", "1") == 2
    assert "holds config.yaml but no sampling.json; name another folder" in capsys.readouterr().err
    assert (run / "config.yaml").read_text() == "of the run"
    options = ["--run", str(run), "--out", str(tmp_path / "out"), "--num", "2", "--steps", "1", "--format", "npz"]
    assert command(*options) == 0
    (tmp_path / "out/config.yaml").unlink()
    (tmp_path / "out/made-00000000.npy").write_bytes(b"of a process killed before it could clear")
    assert command(*options) == 0
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"samples.npz", "grid.png", "config.yaml", "sampling.json"}


def test_run_of_a_checkpoint(tmp_path: Path) -> None:
    assert run_of(write_run(tmp_path)) == tmp_path.resolve()
    assert run_of(tmp_path / "ema.safetensors") is None


# --------------------------------------------------------------------------------------------------------------- resume


def test_interrupted_folder_is_finished_and_finished_images_are_kept(command: Command, tmp_path: Path) -> None:
    file, out = write_run(tmp_path), tmp_path / "out"
    assert command("--model", file, "--out", out) == 0
    whole, _ = read_npz(out / "samples.npz")
    marked = np.full((8, 8), 77, np.uint8)
    Image.fromarray(marked).save(out / "000003_class3.png")  # would be redrawn, if finished images were
    (out / "000004_class4.png").write_bytes((out / "000004_class4.png").read_bytes()[:40])
    for name in ("samples.npz", "000005_class5.png", "000011_class1.png"):
        (out / name).unlink()
    (out / ".000009_class9.png.host-1.tmp").write_bytes(b"half")
    assert command("--model", file, "--out", out, "--batch", 2) == 0
    again, _ = read_npz(out / "samples.npz")
    assert (again[3, :, :, 0] == 77).all()
    others = np.delete(np.arange(12), 3)
    assert np.abs(again[others].astype(int) - whole[others]).max() <= 1
    assert not list(out.glob(".*"))


def test_interrupt_is_resumable(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stop after the first batch leaves its images and the record; the same command then draws the rest only."""
    file, out = write_run(tmp_path), tmp_path / "out"
    kept = PngStore.path

    def stop_at_sixth(self: PngStore, index: int) -> Path:
        if index == 6 and kept(self, 4).exists():
            raise KeyboardInterrupt
        return kept(self, index)

    with monkeypatch.context() as patch:
        patch.setattr(PngStore, "path", stop_at_sixth)
        assert command("--model", file, "--out", out) == 130
    times = {path: path.stat().st_mtime_ns for path in out.glob("*.png")}
    assert len(times) == 6 and not (out / "samples.npz").exists() and not list(out.glob(".*"))
    assert command("--model", file, "--out", out) == 0
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())


@pytest.mark.parametrize("damage", ["5", "{}", "[]", '{"kind": "AutoencoderKL"}', "{"])
def test_a_damaged_record_of_the_codec_is_one_line(tmp_path: Path, damage: str) -> None:
    file = write_run(tmp_path)
    assert codec_of_run(file) is None
    (tmp_path / "codec.json").write_text(damage)
    with pytest.raises(ConfigError, match=r"its codec.json cannot be read \(.*\); restore it or remove it$"):
        codec_of_run(file)


@pytest.mark.parametrize(("num", "steps"), [(4, 9), (12, 5), (12, 7)])
def test_the_bar_ends_at_the_number_of_images(
    command: Command,
    tmp_path: Path,
    num: int,
    steps: int,
    capsys: pytest.CaptureFixture[str],
    recwarn: pytest.WarningsRecorder,
) -> None:
    """Also of an interrupted folder. With so many steps, their shares of an image sum up to more than one."""
    file = write_run(tmp_path)
    for _ in ("new", "again"):
        assert command("--model", file, "--out", tmp_path / "out", "--num", num, "--steps", steps) == 0
        last = capsys.readouterr().err.splitlines()[-1]
        assert "100%" in last and f" {num}/{num} [" in last and "<00:00, " in last
        (tmp_path / "out/samples.npz").unlink()
        (tmp_path / "out/000001_class1.png").unlink()
    assert [str(found.message) for found in recwarn if found.category is TqdmWarning] == []
