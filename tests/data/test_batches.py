from __future__ import annotations

import gc
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.processes import wait_until
from promoe_ds.config.errors import ConfigError
from promoe_ds.config.schema import Config, DataConfig, DiffusionConfig, ModelConfig, TrainConfig
from promoe_ds.data import build_dataset
from promoe_ds.data.batches import Batch, BatchMaker, BatchStream
from promoe_ds.data.digits import Digits
from promoe_ds.data.images import FolderImages
from promoe_ds.data.order import step_indices
from promoe_ds.moe import routers as routers  # a Config holds the one of a router
from promoe_ds.utils.ranks import Ranks

FIELDS = ("x_BCHW", "label_B", "noise_BCHW", "gauss_B", "rows")
DIGITS = Digits()


def make_config(
    global_batch: int = 24, micro: int | None = None, *, seed: int = 0, hflip: bool = True, label_drop: float = 0.25
) -> Config:
    return Config(
        moe=None,
        model=ModelConfig(image_size=8, channels=1, num_classes=10),
        data=DataConfig(hflip=hflip),
        diffusion=DiffusionConfig(label_drop=label_drop),
        train=TrainConfig(global_batch_size=global_batch, micro_batch_size=micro, seed=seed),
    )


def take(config: Config, steps: int, rank: int = 0, world: int = 1, start_step: int = 0) -> list[list[Batch]]:
    with BatchStream(config, DIGITS, Ranks(rank, world), start_step) as stream:
        return [next(stream) for _ in range(steps)]


def assert_same(a: Batch, b: Batch) -> None:
    for field in FIELDS:
        assert torch.equal(getattr(a, field), getattr(b, field)), field


def union(micros: list[Batch]) -> Batch:
    """The micro-batches of all ranks, put in the order of their rows."""
    order = torch.cat([b.rows for b in micros]).argsort()
    return Batch(**{field: torch.cat([getattr(b, field) for b in micros])[order] for field in FIELDS})


@pytest.mark.parametrize(("world", "micro"), [(1, 24), (1, 6), (2, None), (2, 3), (3, 4), (4, 6), (4, 1), (24, None)])
def test_ranks_hold_slices_of_one_global_batch(world: int, micro: int | None):
    whole = take(make_config(), 2)
    held = [take(make_config(micro=micro), 2, rank, world) for rank in range(world)]
    for step in range(2):
        accumulation = 24 // (world * (micro or 24 // world))
        assert all(len(rank[step]) == accumulation for rank in held)
        merged = union([batch for rank in held for batch in rank[step]])
        assert merged.rows.tolist() == list(range(24))
        assert_same(merged, whole[step][0])


def test_rows_of_a_micro_batch():
    maker = BatchMaker(make_config(micro=3), DIGITS, Ranks(rank=1, world=2))
    assert [maker.rows(j).tolist() for j in range(maker.accumulation)] == [
        [3, 4, 5],
        [9, 10, 11],
        [15, 16, 17],
        [21, 22, 23],
    ]


def test_resuming_equals_skipping():
    straight = take(make_config(micro=4), 90, 1, 2)  # 1797 / 24 is below 75: into the second epoch
    resumed = take(make_config(micro=4), 17, 1, 2, start_step=73)
    for a, b in zip(straight[73:], resumed, strict=True):
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)


def test_shapes_and_types():
    (batch,) = take(make_config(), 1)[0]
    assert batch.x_BCHW.shape == batch.noise_BCHW.shape == (24, 1, 8, 8)
    assert batch.label_B.shape == batch.gauss_B.shape == batch.rows.shape == (24,)
    assert batch.x_BCHW.dtype == batch.noise_BCHW.dtype == batch.gauss_B.dtype == torch.float32
    assert batch.label_B.dtype == batch.rows.dtype == torch.int64
    assert all(getattr(batch, field).is_contiguous() for field in FIELDS)


def test_images_and_labels_come_from_the_data_set():
    config = make_config(hflip=False, label_drop=0.0, seed=5)
    for step, (batch,) in enumerate(take(config, 3)):
        x, label = DIGITS.get(step_indices(5, step, 24, len(DIGITS)))
        assert torch.equal(batch.x_BCHW, x) and torch.equal(batch.label_B, label)


def test_flips_and_drops_are_fair_and_touch_nothing_else():
    plain = union([b for s in take(make_config(1200, hflip=False, label_drop=0.0), 1) for b in s])
    noisy = union([b for s in take(make_config(1200, label_drop=0.1), 1) for b in s])
    dropped = noisy.label_B == 10
    assert abs(dropped.double().mean() - 0.1) < 4 * (0.09 / 1200) ** 0.5
    assert torch.equal(noisy.label_B[~dropped], plain.label_B[~dropped])
    kept = (noisy.x_BCHW == plain.x_BCHW).flatten(1).all(1)
    mirrored = (noisy.x_BCHW == plain.x_BCHW.flip(-1)).flatten(1).all(1)
    assert (kept | mirrored).all() and abs(mirrored.double().mean() - 0.5) < 4 * (0.25 / 1200) ** 0.5
    assert abs(torch.corrcoef(torch.stack([dropped.double(), mirrored.double()]))[0, 1]) < 4 / 1200**0.5
    assert torch.equal(noisy.noise_BCHW, plain.noise_BCHW) and torch.equal(noisy.gauss_B, plain.gauss_B)


def test_noise_is_standard_normal_and_new_at_every_step():
    batches = [step[0] for step in take(make_config(240), 4)]
    noise = torch.stack([b.noise_BCHW for b in batches]).double()
    n = noise.numel()
    assert abs(noise.mean()) < 4 / n**0.5 and abs(noise.var() - 1) < 4 * (2 / n) ** 0.5
    assert abs((noise**4).mean() - 3) < 4 * (96 / n) ** 0.5
    assert abs((noise[0] * noise[1]).mean()) < 4 * (4 / n) ** 0.5
    gauss = torch.cat([b.gauss_B for b in batches]).double()
    assert abs(gauss.mean()) < 4 / len(gauss) ** 0.5 and len(gauss.unique()) == len(gauss)


def test_another_seed_draws_everything_anew():
    a, b = take(make_config(seed=0), 1)[0][0], take(make_config(seed=1), 1)[0][0]
    assert all(not torch.equal(getattr(a, field), getattr(b, field)) for field in FIELDS if field != "rows")


def test_one_epoch_visits_every_image_once():
    config = make_config(599, hflip=False, label_drop=0.0)  # 3 * 599 = 1797
    seen = torch.cat([batch.x_BCHW for step in take(config, 3) for batch in step])
    everything, _ = DIGITS.get(np.arange(1797))
    assert sorted(seen.flatten(1).tolist()) == sorted(everything.flatten(1).tolist())


@pytest.mark.parametrize(("micro", "world", "key"), [(None, 5, "global_batch_size"), (5, 2, "micro_batch_size")])
def test_batches_that_do_not_divide(micro: int | None, world: int, key: str):
    with pytest.raises(ConfigError, match=f"^train.{key}="):
        BatchStream(make_config(24, micro), DIGITS, Ranks(0, world))


@pytest.mark.parametrize("rank", [-1, 2])
def test_programming_errors(rank: int):
    with pytest.raises(ValueError):
        BatchStream(make_config(), DIGITS, Ranks(rank, 2))


# ------------------------------------------------------------------------------------------------------------ thread


def threads() -> int:
    return sum(thread.name == "batches" for thread in threading.enumerate())


def test_an_exception_reaches_the_consumer_and_stays(tmp_path: Path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        Image.new("L", (8, 8)).save(tmp_path / name / "0.png")
    images = FolderImages(tmp_path, channels=1, image_size=8)
    broken = tmp_path / "dog" / "0.png"
    broken.write_bytes(b"")
    first_bad = next(s for s in range(10) if 1 in step_indices(0, s, 1, 2))
    with BatchStream(make_config(1), images) as stream:
        for _ in range(first_bad):
            next(stream)
        for _ in range(2):
            with pytest.raises(ConfigError, match=f"^data.path={broken}: is not an image"):
                next(stream)
    assert threads() == 0


def test_close_ends_a_thread_that_waits_and_the_iteration():
    stream = BatchStream(make_config(), DIGITS)
    next(stream)
    time.sleep(0.05)  # the queue is full now
    assert threads() == 1
    stream.close()
    stream.close()
    assert threads() == 0
    assert list(stream) == []


def test_close_at_once_and_a_forgotten_stream():
    for _ in range(20):
        BatchStream(make_config(), DIGITS).close()
    stream = BatchStream(make_config(), DIGITS)
    next(stream)
    del stream
    gc.collect()
    assert threads() == 0


def test_the_queue_is_bounded():
    config = replace(make_config(), data=DataConfig(prefetch=3))
    with BatchStream(config, DIGITS) as stream:
        next(stream)
        wait_until(lambda: stream._ready.qsize() == 3)
        time.sleep(0.2)
        assert stream._ready.qsize() == 3


def test_a_pack_streams(tmp_path: Path):
    Image.new("RGB", (8, 8), "blue").save(tmp_path / "one.png")
    data = np.frombuffer((tmp_path / "one.png").read_bytes(), dtype=np.uint8)
    path = tmp_path / "pack.npz"
    np.savez(
        path,
        classes=np.array(["a"]),
        train_jpeg=data,
        train_offsets=np.array([0, len(data)]),
        train_labels=np.array([0]),
    )
    config = replace(
        make_config(4),
        model=ModelConfig(image_size=8, channels=3, num_classes=1),
        data=DataConfig(name="images", path=str(path)),
    )
    with BatchStream(config, build_dataset(config)) as stream:
        assert next(stream)[0].x_BCHW.shape == (4, 3, 8, 8)
