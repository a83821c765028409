"""What a failure while scoring does, and what is refused at the start; figures: tests/distributed/test_scores.py."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launchers.train import make_evaluator
from promoe_ds.config.errors import ConfigError
from promoe_ds.config.schema import Config, DataConfig, GuidanceConfig, TrainConfig
from promoe_ds.evaluation.evaluate import Evaluator
from promoe_ds.train.metrics import MetricsLog
from promoe_ds.train.scores import Scores
from promoe_ds.utils import signals
from promoe_ds.utils.ranks import ALONE, Ranks
from tests.small_model import save, tiny

NUM = 70


def scored(**more: Any) -> Config:
    _, config = tiny()
    return replace(config, train=TrainConfig(score_every=1, score_images=NUM), **more)


class Unable(Evaluator):
    """Sees every image, and cannot compare them."""

    def score(self, samples: Any) -> dict[str, Any]:
        assert samples.num == NUM
        raise MemoryError("no room for distances")


def test_scores_that_cannot_be_computed_are_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = MetricsLog(tmp_path, 0, 10)
    scores = Scores(scored(), ALONE, None, lambda *_: Unable())
    scores.prepare()
    assert scores.log(tiny()[0].state_dict(), 5, log)
    expected = "warning: no scores at step 5: MemoryError: no room for distances; training goes on\n"
    assert capsys.readouterr().err.endswith(expected) and (tmp_path / "metrics.jsonl").read_text() == ""
    scores = Scores(scored(), ALONE, None, make_evaluator)
    weights = dict(tiny()[0].state_dict())
    weights["pos_embed"] = weights["pos_embed"] * float("nan")
    assert scores.log(weights, 6, log) and "6: rank 0: ConfigError: weights=NaN: the model" in capsys.readouterr().err
    log.close()


def test_a_signal_ends_them_between_two_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, seen = MetricsLog(tmp_path, 0, 10), []

    class Seen(Evaluator):
        def collector(self) -> Any:
            collector = super().collector()
            monkeypatch.setattr(collector, "add", lambda images: seen.append(len(images)))
            return collector

    scores = Scores(scored(), ALONE, None, lambda *_: Seen())
    monkeypatch.setattr(signals, "requested", lambda: "SIGTERM")
    assert not scores.log(tiny()[0].state_dict(), 5, log) and seen == [64]
    log.close()


def test_a_signal_to_another_rank_ends_them_after_the_same_batch(tmp_path: Path) -> None:
    """This rank has two batches, of which it draws one."""
    log, seen = MetricsLog(tmp_path, 0, 10), []

    class Told(Ranks):
        def gather(self, value: Any) -> list[Any]:
            seen.append(value)
            return [value, (True, None)]

    config = scored()
    config = replace(config, train=replace(config.train, score_images=4 * 64))
    scores = Scores(config, Told(0, 2), None, lambda *_: Evaluator())
    assert not scores.log(tiny()[0].state_dict(), 5, log) and seen == [(False, None)]
    log.close()


def test_what_cannot_be_scored_is_refused_at_the_start(tmp_path: Path) -> None:
    config = scored()
    with pytest.raises(ConfigError, match=r"^train.score_every=1: this program has nothing that scores; start with"):
        Scores(config, ALONE, None, None)
    told = r"^train.score_features=digits-cnn: the model's images are \[32, 32, 3\] .* takes \[8, 8, 1\]; choose an"
    with pytest.raises(ConfigError, match=told):
        make_evaluator(config, ALONE, (32, 32, 3))
    with pytest.raises(ConfigError, match="cnn: the model's labels span 0..11, digits-cnn knows classes 0..9; choose"):
        make_evaluator(replace(config, model=replace(config.model, num_classes=12)), ALONE, (8, 8, 1))
    with pytest.raises(ConfigError, match=r"the model makes latents, not pixels; name the codec .* data.vae=DIR"):
        Scores(replace(config, data=DataConfig(name="latents", path="x")), ALONE, None, make_evaluator)
    weak, theirs = tiny(num_classes=3)
    file = save(tmp_path / "weak.safetensors", weak, theirs)
    with pytest.raises(ConfigError, match="^guidance.model=.*: has model.num_classes=3, the model that it is to"):
        Scores(replace(config, guidance=GuidanceConfig(model=str(file))), ALONE, None, make_evaluator)
