"""ONNX and TorchScript networks, and features files."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from promoe_ds.config.errors import ConfigError
from promoe_ds.evaluation.collect import Collector, FeatureSet, collect, load_features, save_features
from promoe_ds.evaluation.evaluate import Evaluator, score_all
from promoe_ds.evaluation.extractors import load_external, load_extractor
from promoe_ds.evaluation.features import Extracted, FeatureExtractor
from promoe_ds.evaluation.images import Images, ImageSet
from promoe_ds.evaluation.metrics import frechet_distance, gaussian_statistics
from promoe_ds.evaluation.reference import find_reference, reference_features
from promoe_ds.evaluation.samples import load_samples
from promoe_ds.utils.ranks import Ranks, share_of
from tests.evaluation.random_inception import pictures

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # the format is still in wide use

IMAGES = pictures(11, 5, (8, 16))
MEANS = IMAGES.mean((1, 2))

# x: uint8 [n, 3, 8, w] -> Cast to float -> GlobalAveragePool -> y [n, 3, 1, 1]; written with onnx 1.23, opset 13
ONNX = (
    b'\x08\x08:~\n\x17\n\x01x\x12\x01f"\x04Cast*\t\n\x02to\x18\x01\xa0\x01\x02\n\x19\n\x01f'
    b'\x12\x01y"\x11GlobalAveragePool\x12\x0bmean_colou'
    b"rZ\x1d\n\x01x\x12\x18\n\x16\x08\x02\x12\x12\n\x03\x12\x01n\n\x02\x08\x03\n\x02\x08\x08\n\x03\x12\x01wb\x1c"
    b"\n\x01y\x12\x17\n\x15\x08\x01\x12\x11\n\x03\x12\x01n\n\x02\x08\x03\n\x02\x08\x01\n\x02\x08\x01B\x04\n\x00\x10\r"
)


class MeanColour(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A TorchScript file whose features are the mean colour."""
    path = tmp_path_factory.mktemp("net") / "mean.pt"
    torch.jit.save(torch.jit.script(MeanColour()), path)
    return path


class Everything(FeatureExtractor):
    """An extractor with all three outputs, three images at a time."""

    name, is_public, image_shape, batch = "everything", True, (None, None, 3), 3

    def extract(self, images_NHWC: Images) -> Extracted:
        assert 1 <= len(images_NHWC) <= self.batch
        x = images_NHWC.mean((1, 2)).astype(np.float32)
        return Extracted(x, x[:, :2] * 2, -x)


def message(path: Path, batch: int = 4) -> str:
    with pytest.raises(ConfigError) as caught:
        load_external(path, batch, "cpu").extract(IMAGES)
    assert "\n" not in str(caught.value) and str(caught.value).startswith(f"--features={path}: ")
    return str(caught.value)


def test_torchscript(network: Path):
    extractor = load_extractor(str(network), batch=4)
    assert extractor.name.startswith("mean:") and not extractor.is_public and extractor.batch == 4
    np.testing.assert_allclose(extractor.extract(IMAGES).features_Nd, MEANS, rtol=1e-6)


def test_onnx(tmp_path: Path):
    pytest.importorskip("onnxruntime")
    path = tmp_path / "colour.onnx"
    path.write_bytes(ONNX)
    extractor = load_external(path, 4, "cpu")
    assert extractor.image_shape == (8, None, 3)
    np.testing.assert_allclose(extractor.extract(IMAGES).features_Nd, MEANS, rtol=1e-6)
    path.write_bytes(ONNX[:50])
    assert "is no ONNX model that onnxruntime can run" in message(path)


def test_onnx_without_its_runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    (tmp_path / "a.onnx").write_bytes(ONNX)
    assert "ONNX needs onnxruntime, which is not installed; pip install onnxruntime" in message(tmp_path / "a.onnx")


class Evil:
    def __reduce__(self):
        return print, ("this must not run",)


def test_files_that_are_no_networks(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert "no such file" in message(tmp_path / "absent.pt")
    for save in (lambda p: torch.save(Evil(), p), lambda p: p.write_bytes(pickle.dumps(Evil()))):
        save(tmp_path / "a.pt")
        assert "is no TorchScript archive" in message(tmp_path / "a.pt")
    assert "this must not run" not in capsys.readouterr().out


class Wrong(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sum()


class Endless(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3)) * float("inf")


class Failing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x @ torch.zeros(5, 5)


def test_networks_that_do_not_keep_the_contract(tmp_path: Path):
    path = tmp_path / "a.pt"
    torch.jit.save(torch.jit.script(Wrong()), path)
    assert "gives float32 [] for 11 images" in message(path)
    torch.jit.save(torch.jit.script(Failing()), path)
    assert "fails on images [11, 8, 16, 3]" in message(path)
    torch.jit.save(torch.jit.script(Endless()), path)
    assert "gives features that are not finite" in message(path)


def test_weights_belong_to_inception(network: Path):
    with pytest.raises(ConfigError, match="--inception-weights=w.pth: --features is digits-cnn"):
        load_extractor("digits-cnn", weights=Path("w.pth"))


def test_scores_on_a_network_are_named_after_it(network: Path, tmp_path: Path):
    np.savez(tmp_path / "a.npz", arr_0=IMAGES)
    np.savez(tmp_path / "b.npz", arr_0=IMAGES[3:] // 2)
    evaluator = Evaluator(str(network), str(tmp_path / "b.npz"), batch=4)
    score = evaluator.score(load_samples(tmp_path / "a.npz"))
    name = evaluator.extractor.name
    expected = frechet_distance(*gaussian_statistics(MEANS), *gaussian_statistics((IMAGES[3:] // 2).mean((1, 2))))
    assert score[f"FD[{name}]"] == pytest.approx(expected, rel=1e-5)
    assert {f"precision[{name}]", f"recall[{name}]"} < score.keys()
    assert not any(key.startswith(("FID", "sF", "IS", "label", "FD_")) for key in score)


# ------------------------------------------------------------------------------------------------------ features files


def gathered(images: ImageSet, world: int) -> FeatureSet | None:
    """`collect` as each of several processes would call it, rank 0 last."""
    parts = []

    class Process(Ranks):
        def gather_to_first(self, value):
            if self.rank == 0:
                return [value, *parts]
            parts.append(value)
            return None

    assert all(collect(Everything(), images, ranks=Process(rank, world)) is None for rank in range(1, world))
    return collect(Everything(), images, ranks=Process(0, world))


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_any_number_of_processes_gives_the_same(world: int):
    found = gathered(ImageSet("a", IMAGES, np.arange(11)), world)
    assert found is not None and found.spatial is not None and found.logits_NK is not None and found.num == 11
    np.testing.assert_array_equal(found.features_Nd, MEANS.astype(np.float32))
    np.testing.assert_array_equal(found.logits_NK, -MEANS.astype(np.float32))
    np.testing.assert_allclose(found.gaussian.sigma_dd, np.cov(MEANS.astype(np.float32), rowvar=False), rtol=1e-12)
    np.testing.assert_allclose(found.spatial.mu_d, 2 * MEANS.astype(np.float32)[:, :2].mean(0), rtol=1e-6)
    alone = gathered(ImageSet("a", IMAGES, np.arange(11)), 1)
    assert alone is not None and alone.sha256 == found.sha256


@pytest.mark.parametrize(("num", "batch", "world"), [(10, 3, 1), (10, 3, 2), (10, 3, 9), (0, 4, 2), (64, 64, 3)])
def test_shares_are_whole_batches_in_order(num: int, batch: int, world: int):
    starts = [start for rank in range(world) for start in share_of(Ranks(rank, world), num, batch)]
    assert starts == list(range(0, num, batch))
    sizes = [len(share_of(Ranks(rank, world), num, batch)) for rank in range(world)]
    assert max(sizes) - min(sizes) <= 1


def test_a_stream_is_the_same_as_a_set(tmp_path: Path):
    collector = Collector(Everything())
    for batch in (IMAGES[:4], IMAGES[4:5], IMAGES[5:]):
        collector.add(batch)
    streamed = collector.result("stream", np.arange(11), {"cfg": 4.0, "num": 11})
    whole = collect(Everything(), ImageSet("a", IMAGES, None))
    assert streamed is not None and whole is not None and streamed.sha256 == whole.sha256
    path = tmp_path / "features.safetensors"
    save_features(path, streamed)
    found = load_samples(tmp_path / "features.safetensors")
    assert isinstance(found, FeatureSet) and found.sampling == {"cfg": 4.0, "num": 11} and found.labels_N is not None
    np.testing.assert_array_equal(found.gaussian.sigma_dd, streamed.gaussian.sigma_dd)
    np.testing.assert_allclose(found.gaussian.sigma_dd, whole.gaussian.sigma_dd, rtol=1e-12)
    assert [p.name for p in tmp_path.iterdir()] == ["features.safetensors"]
    save_features(path, streamed.for_reference(4))
    with pytest.raises(ConfigError, match="is a reference: it keeps the features of some images"):
        load_samples(path)
    kept = load_features(path, "--ref")
    assert kept.logits_NK is None and kept.num == 11
    np.testing.assert_array_equal(kept.features_Nd, streamed.features_Nd[[0, 2, 5, 8]])  # type: ignore[index]


def test_nothing_collected():
    with pytest.raises(ValueError, match="no images"):
        Collector(Everything()).result("a")


def test_features_files_that_do_not_fit(tmp_path: Path, network: Path):
    found = collect(Everything(), ImageSet("a", IMAGES, None))
    assert found is not None
    path = tmp_path / "f.safetensors"
    save_features(path, found)
    np.savez(tmp_path / "r.npz", arr_0=IMAGES)
    with pytest.raises(ConfigError, match="SAMPLES=.*: holds features of everything, --features is mean:"):
        Evaluator(str(network), str(tmp_path / "r.npz")).check(load_samples(path))
    with pytest.raises(ConfigError, match="--ref=.*: holds features of everything, --features is mean:"):
        Evaluator(str(network), str(path))
    for content in (path.read_bytes()[:200], b""):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match="is no readable features file"):
            load_samples(path)
    with pytest.raises(ConfigError, match="no such file"):
        load_samples(tmp_path / "absent.safetensors")


# ---------------------------------------------------------------------------------------------------------- references


def test_statistics_of_adm_are_taken_as_they_are(tmp_path: Path):
    """`VIRTUAL_imagenet256_labeled.npz` holds statistics of more images than it shows."""
    path, rng = tmp_path / "virtual.npz", np.random.default_rng(0)
    shown = pictures(6, 8, (8, 16))
    large = rng.standard_normal((50, 3)), rng.standard_normal((50, 2))
    (mu, sigma), (mu_s, sigma_s) = map(gaussian_statistics, large)
    np.savez(path, mu=mu, sigma=sigma, mu_s=mu_s, sigma_s=sigma_s, arr_0=shown)
    found = reference_features(find_reference(str(path)), Everything())
    assert found is not None and found.spatial is not None and found.num is None and found.logits_NK is None
    np.testing.assert_array_equal(found.gaussian.sigma_dd, sigma)
    np.testing.assert_array_equal(found.spatial.mu_d, mu_s)
    np.testing.assert_allclose(found.features_Nd, shown.mean((1, 2)), rtol=1e-6)
    np.savez(path, mu=mu, sigma=sigma)
    alone = reference_features(find_reference(str(path)), Everything())
    assert alone is not None and alone.features_Nd is None and alone.spatial is None


def test_statistics_of_other_features_are_refused_before_any_image_is_read(tmp_path: Path, network: Path):
    path = tmp_path / "virtual.npz"
    np.savez(path, mu=np.zeros(2048), sigma=np.eye(2048), arr_0=IMAGES)
    np.savez(tmp_path / "a.npz", arr_0=IMAGES)
    evaluator, seen = Evaluator(str(network), str(path)), []
    extract = evaluator.extractor.extract
    evaluator.extractor.extract = lambda images: seen.append(len(images)) or extract(images)  # type: ignore[method-assign]
    with pytest.raises(ConfigError, match="its FID statistics have 2048 numbers, mean:.* makes 3; name a reference of"):
        score_all(evaluator, [load_samples(tmp_path / "a.npz")])
    assert seen == [1]  # to know what it makes
    found = collect(evaluator.extractor, ImageSet("a", IMAGES, None))
    assert found is not None
    save_features(tmp_path / "a.safetensors", found)
    with pytest.raises(ConfigError, match="its FID statistics have 2048 numbers"):
        evaluator.check(load_samples(tmp_path / "a.safetensors"))


@pytest.mark.parametrize(
    ("arrays", "expected"),
    [
        ({"mu": np.zeros(3)}, r"mu is \(3,\), sigma is None"),
        ({"mu": np.zeros(3), "sigma": np.eye(2)}, r"sigma is \(2, 2\)"),
        ({"mu": np.zeros(2), "sigma": np.eye(2) * np.nan}, "sigma holds what is no finite number"),
        ({"other": np.zeros(3)}, "holds other, needs mu and sigma, or images as arr_0"),
        ({"arr_0": np.zeros((3, 8, 8, 3))}, "needs uint8"),
        ({"arr_0": IMAGES[:1]}, "needs at least 2"),
    ],
)
def test_references_that_are_none(tmp_path: Path, arrays: dict[str, np.ndarray], expected: str):
    np.savez(tmp_path / "r.npz", **arrays)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=expected):
        find_reference(str(tmp_path / "r.npz"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="holds no pictures"):
        find_reference(str(tmp_path / "empty"))
    (tmp_path / "r.txt").touch()
    with pytest.raises(ConfigError, match="is neither a folder, an .npz, a .pkl nor a .safetensors file"):
        find_reference(str(tmp_path / "r.txt"))


def test_public_weights_give_the_public_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr("promoe_ds.evaluation.evaluate.load_extractor", lambda name, **options: Everything())
    np.savez(tmp_path / "a.npz", arr_0=IMAGES)
    score = Evaluator("inception", str(tmp_path / "a.npz")).score(load_samples(tmp_path / "a.npz"))
    assert {"FID", "sFID", "KID", "IS", "precision", "recall"} < score.keys()
    assert score["FID"] < 1e-6 and score["precision"] == score["recall"] == 1.0
