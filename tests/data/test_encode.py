from __future__ import annotations

import io
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file

from benchmarks.processes import PATIENCE, wait_until
from launchers import encode_latents
from promoe_ds.config.errors import ConfigError
from promoe_ds.data.caches import open_latents
from promoe_ds.data.caches.npz_tree import LatentTree
from promoe_ds.data.codecs import Identity, open_codec
from promoe_ds.data.encode import ConvertedLatents, EncodedImages, EncodeJob, Encoder, run_encoding
from promoe_ds.data.images import FolderImages
from promoe_ds.data.shards import Index
from promoe_ds.utils.ranks import ALONE, Ranks
from tests.data.cache_files import write_mean_std
from tests.data.cache_files import write_tree as cache_tree
from tests.data.test_codecs import write_taef2
from tests.photographs import write_tree


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tree(tmp_path_factory.mktemp("photographs") / "tree", 15, 40)


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_taef2(tmp_path_factory.mktemp("vae"))


def encoder(tree: Path, vae: str, out: Path, pause: float = 0.0, **job: object) -> Encoder:
    """Shards of 4 of the photographs at 32 pixels; `pause` seconds an image, to be interrupted in."""

    class Slow(EncodedImages):
        def read(self, items: range) -> Iterator[np.ndarray | str]:
            for value in super().read(items):
                time.sleep(pause)
                yield value

    images = FolderImages(tree, channels=3, image_size=32)
    source = Slow(images, open_codec(vae), 4, torch.device("cpu"))
    return Encoder(source, EncodeJob(out, shard_size=4, **job), "command", {})  # type: ignore[arg-type]


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# ----------------------------------------------------------------------------------------------------- many processes


def _work(tree: Path, vae: str, out: Path, ranks: Ranks, pause: float) -> None:
    torch.set_num_threads(1)
    run_encoding(encoder(tree, vae, out, pause), ranks)


def start(tree: Path, vae: str, out: Path, world: int, pause: float) -> list[multiprocessing.process.BaseProcess]:
    fork = multiprocessing.get_context("fork")  # spares each the import of torch; the launcher is run elsewhere
    workers = [fork.Process(target=_work, args=(tree, vae, out, Ranks(r, world), pause)) for r in range(world)]
    for worker in workers:
        worker.start()
    return workers


def shards(folder: Path) -> int:
    return len(list(folder.glob("shard-*")))


@pytest.mark.slow
def test_three_processes_killed_twice_write_the_bytes_of_one(tree: Path, vae: Path, tmp_path: Path) -> None:
    alone, shared, threads = tmp_path / "alone", tmp_path / "shared", torch.get_num_threads()
    torch.set_num_threads(1)
    index = run_encoding(encoder(tree, str(vae), alone), ALONE)
    torch.set_num_threads(threads)
    assert index is not None and index.items == 30 and len(index.shards) == 8
    for kill_at in (2, 4):
        workers = start(tree, str(vae), shared, 3, 0.05)
        wait_until(lambda n=kill_at: shards(shared) >= n, lambda: shards(shared))
        for worker in workers:
            os.kill(worker.pid or 0, signal.SIGKILL)
        for worker in workers:
            worker.join()
        assert kill_at <= shards(shared) < 8 and not (shared / "index.json").exists()
    times = {path: path.stat().st_mtime_ns for path in shared.glob("shard-*")}
    for worker in start(tree, str(vae), shared, 3, 0.0):
        worker.join(PATIENCE)
        assert worker.exitcode == 0
    assert all(path.stat().st_mtime_ns == time for path, time in list(times.items())[:1])
    assert files(shared) == files(alone)
    items = load_file(alone / "items.safetensors")
    names = items["names"].tobytes().decode().split("\n")
    assert names == [f"{c}/{i:03d}.jpg" for c in ("china", "flower") for i in range(15)]  # none missing, none twice
    assert items["label"].tolist() == [0] * 15 + [1] * 15
    data, codec, images = open_latents(str(shared)), open_codec(str(vae)), FolderImages(tree, 3, 32)
    x, _ = images.get(np.array([0, 20, 29]))
    with torch.inference_mode():
        torch.testing.assert_close(data.get(np.array([0, 20, 29]))[0], codec.encode(x), rtol=2e-3, atol=2e-3)
        mirror = data.draw(np.array([0, 20, 29]), np.ones(3, bool), lambda shape: np.zeros(0))[0]
        torch.testing.assert_close(mirror, codec.encode(x.flip(-1)), rtol=2e-3, atol=2e-3)


def test_a_finished_folder_is_left_alone_and_a_lost_shard_made_again(tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_encoding(encoder(tree, "identity", out), ALONE)
    before, times = files(out), {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()}
    assert run_encoding(encoder(tree, "identity", out), ALONE) is not None
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()} == times
    (out / "shard-00003-of-00008.safetensors").unlink()
    run_encoding(encoder(tree, "identity", out), Ranks(1, 3))  # not its shard
    assert not (out / "shard-00003-of-00008.safetensors").exists()
    run_encoding(encoder(tree, "identity", out), Ranks(0, 3))
    assert files(out) == before
    for name in ("items.safetensors", "index.json"):  # the way out of their messages is to encode again
        for damage in (lambda path: path.unlink(), lambda path: path.write_bytes(b"damaged")):
            damage(out / name)
            assert run_encoding(encoder(tree, "identity", out), Ranks(2, 3)) is not None
            assert files(out) == before
    note = out / "progress/00003.json"
    for key in ("shard", "skipped"):  # a note that says less is none
        note.write_text(json.dumps({k: {} if k == key else v for k, v in json.loads(note.read_text()).items()}))
        note.write_text(note.read_text().replace('"skipped": {}', '"skipped": []'))
        assert encoder(tree, "identity", out).done(3) is None
        run_encoding(encoder(tree, "identity", out), ALONE)
        assert files(out) == before


@pytest.mark.parametrize(
    ("job", "message"),
    [
        ({"dtype": "float32"}, "holds latents of dtype=float16, this command has dtype=float32"),
        ({"precision": "bf16"}, "precision=fp32, this command has precision=bf16"),
    ],
)
def test_another_job_is_refused(tree: Path, tmp_path: Path, job: dict[str, object], message: str) -> None:
    run_encoding(encoder(tree, "identity", tmp_path / "out"), ALONE)
    with pytest.raises(ConfigError, match=message):
        encoder(tree, "identity", tmp_path / "out", **job)


def test_other_images_and_foreign_folders_are_refused(tree: Path, vae: Path, tmp_path: Path) -> None:
    other = write_tree(tmp_path / "other", 14, 40)
    encoder(tree, "identity", tmp_path / "out")
    with pytest.raises(ConfigError, match="holds latents of items=30, this command has items=28"):
        encoder(other, "identity", tmp_path / "out")
    record = "{kind: identity, .*, stochastic: false, digest: }"
    with pytest.raises(ConfigError, match=f"holds latents of codec={record}, this command has codec={{kind: TAEF2, "):
        encoder(tree, str(vae), tmp_path / "out")
    with pytest.raises(ConfigError, match=r"holds china but no encoding.json; name another folder"):
        encoder(tree, "identity", other)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--out=.*file: cannot be used"):
        encoder(tree, "identity", tmp_path / "file")


# ----------------------------------------------------------------------------------------------------- strange images


def strange_tree(root: Path) -> Path:
    """Two classes of good photographs; a CMYK, a grey, a transparent and a 1x1 one, and two damaged files."""
    write_tree(root, 4, 40)
    good = Image.open(root / "china/000.jpg")
    good.convert("CMYK").save(root / "china/cmyk.jpg")
    good.convert("L").save(root / "china/grey.jpg")
    good.convert("RGBA").save(root / "flower/alpha.png")
    Image.new("RGB", (1, 1), (255, 0, 0)).save(root / "flower/one.png")
    whole = io.BytesIO()
    good.save(whole, "JPEG")
    (root / "china/truncated.jpg").write_bytes(whole.getvalue()[:-200])
    (root / "flower/text.jpg").write_bytes(b"not an image")
    return root


def test_strange_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree, out = strange_tree(tmp_path / "tree"), tmp_path / "out"
    with pytest.raises(ConfigError, match=r"^--out=.*: 2 damaged image\(s\), named above; their shards are"):
        run_encoding(encoder(tree, "identity", out), ALONE)
    complaints = [line for line in capsys.readouterr().err.splitlines() if line.startswith("damaged: ")]
    assert len(complaints) == 2
    assert complaints[0].startswith(f"damaged: --images={tree}/china/truncated.jpg: is damaged (OSError: ")
    assert complaints[1].startswith(f"damaged: --images={tree}/flower/text.jpg: is not an image")
    done = {p.name for p in out.glob("shard-*")}
    assert len(done) == 2  # of four; both damaged ones lie in others
    run_encoding(encoder(tree, "identity", out, skip_damaged=True), ALONE)
    data = open_latents(str(out))
    index = json.loads((out / "index.json").read_text())
    assert len(data) == 12 and [s["name"] for s in index["skipped"]] == ["china/truncated.jpg", "flower/text.jpg"]
    names = load_file(out / "items.safetensors")["names"].tobytes().decode().split("\n")
    assert names == sorted(names) and len(set(names)) == 12
    pictures = {name: data.get(np.array([i]))[0][0] for i, name in enumerate(names)}
    colour, grey = pictures["china/000.jpg"], pictures["china/grey.jpg"]
    assert torch.equal(grey[0], grey[1]) and torch.equal(grey[0], grey[2]) and float((grey - colour).abs().mean()) < 0.3
    assert float((pictures["china/cmyk.jpg"] - colour).abs().mean()) < 0.1
    assert torch.equal(pictures["flower/one.png"], torch.tensor([1.0, -1, -1]).view(3, 1, 1).expand(3, 32, 32))
    assert float((pictures["flower/alpha.png"] - colour).abs().mean()) < 0.05


class Overflows(Identity):
    """A codec whose latents of bright pictures are not finite, and of brighter ones too large for float16."""

    def encode(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        mean_B = x_BCHW.mean((1, 2, 3)).view(-1, 1, 1, 1)
        return torch.where(mean_B > 0.9, 1e5, torch.where(mean_B > 0, float("nan"), x_BCHW))


def test_a_latent_that_is_not_finite_is_a_damaged_item(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No `--dtype` can hold it, so none is asked for; one that float16 alone cannot hold is no damage."""
    tree = tmp_path / "tree"
    for number, grey in enumerate((0, 180, 60, 90)):
        (tree / "a").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (grey,) * 3).save(tree / f"a/{number}.png")

    def encode(out: Path, **job: object) -> Index | None:
        source = EncodedImages(FolderImages(tree, 3, 8), Overflows(), 4, torch.device("cpu"))
        return run_encoding(Encoder(source, EncodeJob(out, 2, **job), "", {}), ALONE)  # type: ignore[arg-type]

    line = f"--images={tree}/a/1.png: its latent is not finite; replace the file"
    for dtype in ("float16", "float32"):
        with pytest.raises(ConfigError, match=r"^--out=.*: 1 damaged image\(s\), named above"):
            encode(tmp_path / dtype, dtype=dtype)
        assert f"damaged: {line}" in capsys.readouterr().err.splitlines()
        index = encode(tmp_path / dtype, dtype=dtype, skip_damaged=True)
        assert index is not None and index.items == 3 and index.skipped == [{"name": "a/1.png", "reason": line}]
        assert torch.isfinite(open_latents(str(tmp_path / dtype)).get(np.arange(3))[0]).all()
    Image.new("RGB", (8, 8), "white").save(tree / "a/2.png")
    too_large = "^--dtype=float16: the latent of a/2.png is not finite in float16; use --dtype float32"
    with pytest.raises(ConfigError, match=too_large):
        encode(tmp_path / "half", skip_damaged=True)
    index = encode(tmp_path / "full", skip_damaged=True, dtype="float32")
    assert index is not None and index.items == 3


def test_an_official_latent_that_is_not_finite_is_a_damaged_item(tmp_path: Path) -> None:
    for item in range(4):
        (tmp_path / "tree/a").mkdir(parents=True, exist_ok=True)
        moments = np.full((2, 8, 4, 4), [np.nan if item == 2 else item], "f4")
        moments[0] = item  # the mirror image counts, too
        np.savez(tmp_path / f"tree/a/{item}.latent.npz", latent=moments[0], latent_flip=moments[1])
    job = EncodeJob(tmp_path / "out", dtype="float32", skip_damaged=True)
    index = run_encoding(Encoder(ConvertedLatents(LatentTree(tmp_path / "tree")), job, "", {}), ALONE)
    reason = f"--from-latents={tmp_path}/tree/a/2.latent.npz: its latent is not finite; replace the file"
    assert index is not None and index.skipped == [{"name": "a/2.latent.npz", "reason": reason}]


@pytest.mark.parametrize("name", [b"\xe9.png", b"a\nb.png"])
def test_names_that_the_index_cannot_hold(tmp_path: Path, name: bytes) -> None:
    tree = write_tree(tmp_path / "tree", 1, 8)
    picture = next(tree.rglob("*.png"), None) or next(p for p in tree.rglob("*") if p.is_file())
    os.rename(picture, os.fsencode(picture.parent) + b"/" + name)
    with pytest.raises(ConfigError, match="the name is not UTF-8, or holds a newline; rename it"):
        encoder(tree, "identity", tmp_path / "out")  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()
    latents = cache_tree(tmp_path / "latents")
    file = next(latents.rglob("*.npz"))
    file.rename(file.with_name("a\n.npz"))
    with pytest.raises(ConfigError, match="^--from-latents='n.*: the name is not UTF-8"):
        Encoder(ConvertedLatents(LatentTree(latents)), EncodeJob(tmp_path / "out"), "", {})


def test_damage_mended_is_encoded_by_the_same_command(tmp_path: Path) -> None:
    tree, out = write_tree(tmp_path / "tree", 6, 40), tmp_path / "out"
    whole = (tree / "china/002.jpg").read_bytes()
    (tree / "china/002.jpg").write_bytes(whole[:300])
    with pytest.raises(ConfigError, match="1 damaged image"):
        run_encoding(encoder(tree, "identity", out), ALONE)
    assert len(list(out.glob("shard-*"))) == 2 and not (out / "index.json").exists()
    (tree / "china/002.jpg").write_bytes(whole)
    index = run_encoding(encoder(tree, "identity", out), ALONE)
    assert index is not None and index.items == 12 and not index.skipped


# ------------------------------------------------------------------------------------------------------------ launcher


def test_launcher(
    tree: Path, vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(key, raising=False)

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["encode_latents.py", *map(str, words)])
        code = encode_latents.main()
        return code, *capsys.readouterr()

    words = ["--images", tree, "--vae", vae, "--size", 16, "--out", out, "--batch", 8, "--device", "cpu"]
    copy = shutil.copytree(tree, tmp_path / "copy")
    for name in ("china/._000.jpg", ".thumbnails/000.jpg"):
        (copy / name).parent.mkdir(exist_ok=True)
        shutil.copy(tree / "china/000.jpg", copy / name)
    code, text, _ = call(*words, "--dry-run", "--images", copy)
    assert "30 items of 2 classes" in text
    assert f"{copy}: 2 names are left out: hidden, or links to folders that are read already\n" in text
    code, text, _ = call(*words, "--dry-run")
    assert "left out" not in text
    assert code == 0 and not out.exists()
    assert "30 items of 2 classes, 2 x 32x2x2 each (TAEF2, one point, scale 1.0), float16: 0.00 GB in 1 shards" in text
    code, text, progress = call(*words)
    assert code == 0 and f"30 items in 1 shards in {out}" in text and "30/30" in progress
    assert json.loads((out / "encoding.json").read_text())["command"].startswith("launchers/encode_latents.py --images")
    assert call("--verify", out)[:2] == (0, "30 items in 1 shards match their checksums\n")
    cache, lost = write_mean_std(tmp_path / "cache.zip"), shutil.copytree(out, tmp_path / "lost")
    (lost / "items.safetensors").unlink()
    for wrong, message in (
        (["--images", tree, "--vae", tmp_path / "none", "--out", "x"], "no such folder; put config.json and diffusion"),
        (["--images", tmp_path / "none", "--vae", vae, "--out", "x"], f"--images={tmp_path}/none: does not exist"),
        (["--images", tree, "--vae", vae], "--out is required"),
        (["--images", tree, "--out", "x"], "--vae is required with --images"),
        (["--images", tree, "--vae", vae, "--out", "x", "--size", 20], "--size=20: is not divisible by the 8 pixels"),
        (["--images", tree, "--vae", vae, "--out", "x", "--batch", 0], "--batch=0: must be positive"),
        (["--from-latents", tree, "--out", "x"], "tree: is no cache of latents: looked for index.json"),
        (["--from-latents", tree, "--vae", vae, "--out", "x"], "copies latents as they are; remove it"),
        (["--from-latents", tree, "--size", 512, "--out", "x"], "--size=512: --from-latents copies latents"),
        (["--from-latents", cache, "--out", "x"], "neither's; set --format repa (of pictures in [-1, 1]) or --format"),
        (["--images", tree, "--vae", vae, "--out", "x", "--scale", 2], "--scale=[2.0]: belongs to --from-latents"),
        (["--verify", tmp_path], "has no index.json"),
        (["--verify", out, "--vae", vae], f"--vae={vae}: --verify reads shards and writes nothing; remove it"),
        (["--verify", out, "--out", "x"], "--out=x: --verify reads shards and writes nothing; remove it"),
        (["--from-latents", out, "--scale", 2, "--out", "x"], f"--scale=2.0: index.json of {out} says its own; remove"),
        (["--from-latents", out, "--format", "npz", "--out", "x"], f"--format=npz: {out} holds shards of launchers/"),
        (["--verify", lost], f"--verify={lost}/items.safetensors: cannot be read (No such file or directory); copy"),
        (["--vae", vae], "one of the arguments --images --from-latents --verify is required"),
    ):
        code, _, error = call(*wrong)
        assert code == 2 and error.startswith("error: ") and error.count("\n") == 1 and message in error
        assert not Path("x").exists()
    words = ["--from-latents", cache, "--format", "repa", "--scale", 0.5, "--dtype", "float32", "--out", tmp_path / "z"]
    code, text, _ = call(*words)
    assert code == 0 and "7 items in 1 shards" in text and len(open_latents(tmp_path / "z")) == 7
    assert "7 items of 3 classes, 1 x 8x4x4 each (codec not named, mean and log-variance, scale 0.5)" in text
