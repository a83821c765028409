from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from promoe_ds.config.errors import ConfigError
from promoe_ds.evaluation.digits import digits_images, noise_images
from promoe_ds.evaluation.evaluate import Evaluator
from promoe_ds.evaluation.report import check_output, format_table, write_metrics
from promoe_ds.evaluation.samples import cfg_of, find_samples, load_samples, run_samples

IMAGES = np.zeros((4, 8, 8, 1), np.uint8)
LABELS = np.arange(4)


@pytest.fixture(scope="module")
def evaluator() -> Evaluator:
    return Evaluator()


def save(path: Path, images: Any = IMAGES, labels: Any = LABELS, sampling: dict[str, Any] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, arr_0=images, arr_1=labels)
    if sampling is not None:
        path.with_name("sampling.json").write_text(json.dumps(sampling), encoding="utf-8")
    return path


def message(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        load_samples(path)
    text = str(caught.value)
    assert str(path.parent) in text and "\n" not in text
    return text


def test_real_digits_score_perfectly(evaluator: Evaluator, tmp_path: Path):
    images, labels = digits_images()
    score = evaluator.score(load_samples(save(tmp_path / "samples.npz", images, labels, {"cfg": 1.5, "steps": 50})))
    assert score["label_agreement"] >= 0.99
    assert score["FD[digits-cnn]"] < 1e-3 and score["fd_over_noise"] < 1e-5
    assert score["num"] == 1797 and score["cfg"] == 1.5 and score["sampling"]["steps"] == 50
    assert score["classifier_accuracy"] == evaluator.extractor.accuracy
    assert 0 < score["FD_real"] < 0.05 * score["FD_noise"]
    json.dumps(score, allow_nan=False)


def test_noise_is_the_unit(evaluator: Evaluator, tmp_path: Path):
    path = save(tmp_path / "samples.npz", noise_images(500, (8, 8, 1), 9), np.arange(500) % 10)
    score = evaluator.score(load_samples(path))
    assert score["fd_over_noise"] == pytest.approx(1.0, abs=0.1)
    assert score["label_agreement"] < 0.3


def test_score_worsens_with_noise_and_wrong_labels(evaluator: Evaluator, tmp_path: Path):
    images, labels = (rows[::3] for rows in digits_images())
    rng = np.random.default_rng(0)
    ratios = []
    for scale in (0, 20, 40, 80):
        noisy = np.clip(images + scale * rng.standard_normal(images.shape), 0, 255).astype(np.uint8)
        score = evaluator.score(load_samples(save(tmp_path / "samples.npz", noisy, (labels + 1) % 10)))
        ratios.append(score["fd_over_noise"])
    assert ratios == sorted(ratios) and ratios[-1] > 0.05
    assert score["label_agreement"] < 0.1


def test_another_evaluator_scores_the_same(evaluator: Evaluator, tmp_path: Path):
    images, labels = digits_images()
    path = save(tmp_path / "samples.npz", images[:300], labels[:300])
    score = Evaluator().score(load_samples(path))
    assert {"label_agreement", "FD[digits-cnn]", "fd_over_noise", "num", "classifier_accuracy"} <= set(score)
    assert evaluator.score(load_samples(path))["FD[digits-cnn]"] == pytest.approx(score["FD[digits-cnn]"], rel=1e-6)


def test_guidance_scale_falls_back_to_the_folder(tmp_path: Path):
    assert cfg_of(load_samples(save(tmp_path / "cfg1.5" / "samples.npz"))) == 1.5
    assert cfg_of(load_samples(save(tmp_path / "other" / "samples.npz"))) is None
    assert cfg_of(load_samples(save(tmp_path / "cfg4" / "samples.npz", sampling={"cfg": 2}))) == 2.0


def test_find_samples(tmp_path: Path):
    for scale in ("10", "2", "1.5"):
        save(tmp_path / f"cfg{scale}" / "samples.npz")
    assert [p.parent.name for p in find_samples(tmp_path)] == ["cfg1.5", "cfg2", "cfg10"]
    top = save(tmp_path / "samples.npz")
    assert find_samples(tmp_path) == [top] == find_samples(top)


def test_find_samples_in_an_empty_folder(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"holds no samples\.npz"):
        find_samples(tmp_path)


def test_run_samples_in_order_of_guidance(tmp_path: Path):
    save(tmp_path / "samples" / "a" / "samples.npz", sampling={"cfg": 4.0})
    save(tmp_path / "samples" / "z" / "samples.npz", sampling={"cfg": 1.0})
    save(tmp_path / "samples" / "cfg2" / "samples.npz")
    assert [cfg_of(s) for s in run_samples(tmp_path)] == [1.0, 2.0, 4.0]


def test_run_samples_without_any(tmp_path: Path):
    with pytest.raises(ConfigError, match="no finished samples below"):
        run_samples(tmp_path)
    with pytest.raises(ConfigError, match="no such folder"):
        run_samples(tmp_path / "absent")


def test_missing_file(tmp_path: Path):
    assert "no such file; draw samples first" in message(tmp_path / "absent.npz")


def test_missing_arrays(tmp_path: Path):
    path = tmp_path / "samples.npz"
    np.savez(path, images=IMAGES, arr_1=LABELS)
    assert "holds images, arr_1, needs arr_0" in message(path)
    np.savez(path)
    assert "holds no named arrays" in message(path)
    with path.open("wb") as file:
        np.save(file, IMAGES)
    assert "is no readable .npz" in message(path)


@pytest.mark.parametrize("images", [IMAGES.astype(np.float32), IMAGES[..., 0], IMAGES.astype(np.int64)])
def test_wrong_images(tmp_path: Path, images: np.ndarray):
    assert "needs uint8 [N, H, W, C]" in message(save(tmp_path / "s.npz", images))


@pytest.mark.parametrize("labels", [LABELS.astype(np.float64), LABELS[:, None], np.array(["a", "b", "c", "d"])])
def test_wrong_labels(tmp_path: Path, labels: np.ndarray):
    assert "needs integers [N]" in message(save(tmp_path / "s.npz", IMAGES, labels))


def test_lengths_that_differ(tmp_path: Path):
    assert "4 images, 3 labels" in message(save(tmp_path / "s.npz", IMAGES, LABELS[:3]))


@pytest.mark.parametrize("n", [0, 1])
def test_too_few_images(tmp_path: Path, n: int):
    assert "needs at least 2" in message(save(tmp_path / "s.npz", IMAGES[:n], LABELS[:n]))
    assert "needs at least 2" in message(save(tmp_path / "s.npz", IMAGES[:n], LABELS[:3])), "before the labels"


def test_truncated_at_any_place(tmp_path: Path):
    whole = save(tmp_path / "s.npz", np.random.default_rng(0).integers(0, 256, (4, 8, 8, 1), np.uint8)).read_bytes()
    path = tmp_path / "cut.npz"
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        assert "is no readable .npz" in message(path)


def test_flipped_bytes_never_escape_as_other_errors(tmp_path: Path):
    whole = save(tmp_path / "s.npz").read_bytes()
    path = tmp_path / "bad.npz"
    rng = np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[rng.integers(len(whole))] ^= int(rng.integers(1, 256))
        path.write_bytes(damaged)
        try:
            load_samples(path)
        except ConfigError as error:
            assert "\n" not in str(error)


def test_pickles_are_refused(tmp_path: Path):
    path = save(tmp_path / "s.npz", np.array([{}, {}], dtype=object))
    assert "is no readable .npz" in message(path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "cannot be read as JSON"),
        ('{"cfg": NaN}', "NaN is not JSON"),
        ("[1]", "is not a JSON object"),
    ],
)
def test_bad_sampling_json(tmp_path: Path, text: str, expected: str):
    path = save(tmp_path / "samples.npz")
    path.with_name("sampling.json").write_text(text, encoding="utf-8")
    assert expected in message(path)


def test_images_of_another_size(evaluator: Evaluator, tmp_path: Path):
    samples = load_samples(save(tmp_path / "s.npz", np.zeros((4, 32, 32, 3), np.uint8)))
    with pytest.raises(ConfigError, match=r"images are \[32, 32, 3\].* digits-cnn takes \[8, 8, 1\]"):
        evaluator.score(samples)


@pytest.mark.parametrize("labels", [[0, 1, 2, 10], [-1, 0, 1, 2]])
def test_labels_of_other_classes(evaluator: Evaluator, tmp_path: Path, labels: list[int]):
    samples = load_samples(save(tmp_path / "s.npz", IMAGES, np.array(labels)))
    with pytest.raises(ConfigError, match=r"labels span .* knows classes 0\.\.9"):
        evaluator.score(samples)


def test_table_is_aligned_and_ends_with_real(evaluator: Evaluator, tmp_path: Path):
    images, labels = digits_images()
    paths = [save(tmp_path / f"cfg{c}" / "samples.npz", images[:n], labels[:n]) for c, n in ((1, 50), (1.5, 500))]
    lines = format_table([evaluator.score(load_samples(path)) for path in paths]).splitlines()
    assert len(lines) == 4 and len(set(map(len, lines))) == 1
    assert "FD[digits-cnn]" in lines[0] and lines[-1].startswith("real, held out")


def test_write_metrics_is_whole_or_untouched(tmp_path: Path):
    out = tmp_path / "metrics.json"
    write_metrics(out, [{"num": 1}, {"num": 2}])
    assert json.loads(out.read_text()) == {"num": 1, "sets": [{"num": 1}, {"num": 2}]}
    with pytest.raises(ValueError, match="JSON compliant"):
        write_metrics(out, [{"num": float("nan")}])
    assert json.loads(out.read_text())["num"] == 1
    with pytest.raises(ConfigError, match="cannot be written"):
        write_metrics(tmp_path / "absent" / "metrics.json", [{"num": 1}])
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.json"]


def test_bad_outputs(tmp_path: Path):
    (tmp_path / "file").write_text("")
    for path, expected in (
        (tmp_path, "is a folder"),
        (tmp_path / "a.npz", "ends in .json"),
        (tmp_path / "no" / "m.json", "does not exist"),
        (tmp_path / "file" / "m.json", "file is not a folder; name a place in one"),
    ):
        with pytest.raises(ConfigError, match=expected):
            check_output(path)
