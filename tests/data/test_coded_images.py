from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from promoe_ds.config.errors import ConfigError
from promoe_ds.config.schema import Config, DataConfig, DiffusionConfig, ModelConfig, TrainConfig
from promoe_ds.data import build_dataset, fingerprint, notes
from promoe_ds.data.batch import Batch
from promoe_ds.data.batches import BatchMaker, BatchStream, item_path, worker_count
from promoe_ds.data.codecs import open_codec
from promoe_ds.data.coded_images import CodedImages
from promoe_ds.data.digits import Digits
from promoe_ds.data.encode import EncodedImages, EncodeJob, Encoder, run_encoding
from promoe_ds.data.images import FolderImages
from promoe_ds.data.step_encoder import StepEncoder
from promoe_ds.moe import routers as routers  # a Config holds the one of a router
from promoe_ds.utils.ranks import ALONE, Ranks
from tests.data.test_codecs import write_taef2
from tests.photographs import tiny_kl, write_tree

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree of 14 photographs, an AutoencoderKL of 1/2 the side, a TAEF2, and shards of either at 16 pixels."""
    root = tmp_path_factory.mktemp("work")
    write_tree(root / "tree", 7, 24)
    tiny_kl(root / "kl")
    write_taef2(root / "taef2")
    for name in ("kl", "taef2"):
        source = EncodedImages(FolderImages(root / "tree", 3, 16), open_codec(str(root / name)), 4, CPU)
        run_encoding(Encoder(source, EncodeJob(root / f"{name}_shards", 5, "float32"), "", {}), ALONE)
    return root


def config_of(work: Path, codec: str = "kl", cached: bool = False, **data: Any) -> Config:
    size, channels = (8, 4) if codec == "kl" else (2, 32)
    source = {"name": "images", "path": str(work / "tree"), "vae": str(work / codec)}
    if cached:
        source = {"name": "latents", "path": str(work / f"{codec}_shards")}
    return Config(
        moe=None,
        model=ModelConfig(image_size=size, channels=channels, num_classes=2),
        data=DataConfig(**{"hflip": True, **source, **data}),
        diffusion=DiffusionConfig(label_drop=0.25),
        train=TrainConfig(global_batch_size=6, seed=3),
    )


def taken(config: Config, steps: int, ranks: Ranks = ALONE, first: int = 0) -> list[Batch]:
    with BatchStream(config, build_dataset(config), ranks, first) as stream:
        return [batch for step in itertools.islice(stream, steps) for batch in step]


def assert_equal(ours: list[Batch], theirs: list[Batch], tolerance: float = 0.0) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.x_BCHW, b.x_BCHW, rtol=0, atol=tolerance)
        assert a.posterior_BCHW is None and b.posterior_BCHW is None
        for field in ("label_B", "noise_BCHW", "gauss_B", "rows"):
            assert torch.equal(getattr(a, field), getattr(b, field)), field


@pytest.mark.parametrize("codec", ["kl", "taef2"])
@pytest.mark.parametrize("workers", [0, 2])
def test_the_model_sees_what_shards_of_the_same_images_give(work: Path, codec: str, workers: int) -> None:
    """Item, flip, posterior, label drop and noise are the same; x differs by the codec's rounding."""
    ours, theirs = taken(config_of(work, codec, workers=workers), 6), taken(config_of(work, codec, cached=True), 6)
    assert_equal(ours, theirs, 2e-6)
    assert len({batch.x_BCHW.std().item() for batch in ours}) == 6


def test_neither_processes_nor_ranks_nor_a_resume_change_a_bit_of_the_order(work: Path) -> None:
    config = config_of(work, workers=0)
    whole = taken(config, 5)
    split = replace(config, data=replace(config.data, workers=3), train=replace(config.train, micro_batch_size=1))
    halves = [taken(split, 3, Ranks(rank, 2), first=2) for rank in (0, 1)]
    for step in range(3):
        parts = [batch for half in halves for batch in half[3 * step : 3 * step + 3]]
        order = torch.cat([b.rows for b in parts]).argsort()
        merged = Batch(**{k: torch.cat([getattr(b, k) for b in parts])[order] for k in parts[0].tensors()})
        assert_equal([merged], [whole[step + 2]], 2e-6)


def test_get_is_the_mean_and_draw_the_posterior(work: Path) -> None:
    ours, theirs = (build_dataset(config_of(work, cached=cached)) for cached in (False, True))
    assert isinstance(ours, CodedImages) and ours.codec == theirs.codec and ours.latent == (4, 8, 8)
    index_B, flip_B = np.array([0, 9, 13]), np.array([True, False, True])
    torch.testing.assert_close(ours.get(index_B), theirs.get(index_B), rtol=0, atol=2e-6)
    gauss = lambda shape: np.random.default_rng(1).standard_normal((3, *shape), "f4")  # noqa: E731
    torch.testing.assert_close(
        ours.draw(index_B, flip_B, gauss), theirs.draw(index_B, flip_B, gauss), rtol=0, atol=2e-6
    )
    assert ours.where(9) == f"{work}/tree/flower/002.jpg"


def test_encoding_in_bf16_is_near_and_not_the_same(work: Path) -> None:
    fp32, bf16 = (taken(config_of(work, vae_precision=name), 1)[0].x_BCHW for name in ("fp32", "bf16"))
    assert 0 < float((fp32 - bf16).abs().max()) < 0.05 * float(fp32.abs().max()) and bf16.dtype == torch.float32


def test_large_micro_batches_are_encoded_in_parts(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = build_dataset(config_of(work))
    assert isinstance(data, CodedImages)
    whole = data.get(np.arange(14))[0]
    monkeypatch.setattr("promoe_ds.data.coded_images.ENCODED_AT_ONCE", 4)
    torch.testing.assert_close(data.get(np.arange(14))[0], whole, rtol=0, atol=2e-6)


# --------------------------------------------------------------------------------------------------------- step ahead


class Counted(CodedImages):
    """Counts encoded images; from `fail_at` on there is no memory for more than a step at a time."""

    encoded, fail_at = 0, 10**9

    def encode(self, pixels_BHWC: torch.Tensor, gauss_BChw: torch.Tensor | None) -> torch.Tensor:
        if self.encoded == self.fail_at:
            self.fail_at = 10**9
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.encoded += len(pixels_BHWC)
        return super().encode(pixels_BHWC, gauss_BChw)


def counted(work: Path) -> tuple[Config, Counted]:
    config = config_of(work)
    return config, Counted(FolderImages(work / "tree", 3, 16), open_codec(str(work / "kl")))


@pytest.mark.parametrize("fail_at", [10**9, 6, 12])
def test_a_step_ahead_gives_the_same_and_falls_back_where_memory_does_not_allow_it(
    work: Path, fail_at: int, capsys: pytest.CaptureFixture[str]
) -> None:
    config, data = counted(work)
    maker = BatchMaker(config, data)
    encoder, plain = StepEncoder(data, CPU, ahead=True), StepEncoder(data, CPU)
    expected = [plain(maker.step(step)) for step in range(4)]
    data.encoded, data.fail_at = 0, fail_at
    steps = [maker.step(step) for step in range(4)]
    for step, following in enumerate([*steps[1:], None]):
        got = encoder(steps[step], following)
        assert_equal(got, expected[step])
        assert data.encoded == 6 * min(4, step + 1 + encoder.ahead)
    assert encoder.ahead == (fail_at > 100)
    assert ("no memory to encode a step ahead" in capsys.readouterr().err) == (fail_at < 100)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_picture_is_an_error_of_its_own_step(tmp_path: Path, work: Path, workers: int) -> None:
    """Also where the step before looks ahead."""
    tree = write_tree(tmp_path / "tree", 2, 24)
    (damaged := tree / "flower/001.jpg").write_bytes((tree / "flower/001.jpg").read_bytes()[:300])
    config = config_of(work, path=str(tree), workers=workers)
    config = replace(config, train=replace(config.train, global_batch_size=1))
    data = build_dataset(config)
    assert isinstance(data, CodedImages)
    bad = next(step for step in range(9) if item_path(config, data, step, 0) == str(damaged))
    stream = BatchStream(config, data)
    stream._encoder = StepEncoder(data, CPU, ahead=True)
    with stream:
        for _ in range(bad):
            next(stream)
        for _ in range(2):
            with pytest.raises(ConfigError, match=f"^data.path={damaged}: is damaged"):
                next(stream)


# ------------------------------------------------------------------------------------------------------------ mistakes


def rejected(config: Config) -> str:
    with pytest.raises(ConfigError) as caught:
        build_dataset(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_codecs_that_are_not_there_or_do_not_fit(work: Path, tmp_path: Path) -> None:
    assert rejected(config_of(work, "nowhere")).startswith(f"data.vae={work}/nowhere: no such folder; put config.json")
    assert rejected(config_of(work, "tree")).startswith(f"data.vae={work}/tree: has no config.json; ")
    config = config_of(work)
    wrong = replace(config, model=replace(config.model, channels=16))
    assert rejected(wrong) == (
        f"model.channels=16: the latents of data.vae={work}/kl (AutoencoderKL) have 4 channel(s); "
        "set model.channels=4 or name another codec"
    )
    assert rejected(replace(config, model=replace(config.model, num_classes=1000))).startswith(
        f"model.num_classes=1000: data.path={work}/tree has 2 class(es)"
    )


def test_a_cache_of_latents_is_not_encoded(work: Path) -> None:
    config = config_of(work)
    for vae in (config.data.vae, None):
        wrong = replace(config, model=replace(config.model, channels=4 if vae else 3),
                        data=replace(config.data, vae=vae, path=str(work / "kl_shards")))  # fmt: skip
        assert rejected(wrong) == (
            f"data.path={work}/kl_shards: holds latents, not pictures (LatentShards); set data.name=latents"
        )


def test_options_that_nothing_looks_at(work: Path) -> None:
    config = config_of(work)
    digits = replace(config, data=DataConfig(vae="identity"))
    assert rejected(digits) == "data.vae=identity: data.name=digits has no latents; remove it"
    assert rejected(config_of(work, cached=True, vae_precision="bf16")) == (
        "data.vae_precision=bf16: nothing is encoded in the step; remove it, or train on images with data.vae"
    )
    assert rejected(config_of(work, cached=True, workers=2)) == (
        "data.workers=2: data.name=latents decodes no pictures; remove it"
    )


def test_the_side_of_the_pictures_is_the_models_in_cells_times_the_factor(work: Path) -> None:
    config = config_of(work)
    data = build_dataset(replace(config, model=replace(config.model, image_size=12)))
    assert isinstance(data, CodedImages) and data.images.image_size == 24 and data.image_size == 12
    assert notes(data) == ["pictures of 24x24 pixels become 4x12x12 latents in the step, by AutoencoderKL"]
    assert data.get(np.arange(2))[0].shape == (2, 4, 12, 12)


def test_another_codec_is_another_data_set_to_a_resumed_run(work: Path) -> None:
    coded, cached = (fingerprint(build_dataset(config_of(work, cached=cached))) for cached in (False, True))
    digest = open_codec(str(work / "kl")).digest
    assert coded == f"{cached}, encoded by AutoencoderKL {digest}"


def test_who_decodes(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes for a GPU, threads beside a model that computes on the CPU; none for what is held in memory."""
    config, gpu = config_of(work), torch.device("cuda")
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(64))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    data = build_dataset(config)
    assert [worker_count(config, data, device) for device in (CPU, gpu)] == [0, 7]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert worker_count(config, data, gpu) == 16
    assert worker_count(config_of(work, workers=5), data, CPU) == 5
    assert worker_count(config, Digits(), gpu) == 0
    assert isinstance(data, CodedImages)
    data.images.hold()
    assert worker_count(config_of(work, workers=5), data, gpu) == 0
