"""Reading checkpoints: all of the state comes back, and nothing of another run is accepted."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from promoe_ds.checkpoint import layout, resume
from promoe_ds.checkpoint.resume import Reader
from promoe_ds.checkpoint.save import Saver
from promoe_ds.config.decode import dump, encode
from promoe_ds.config.errors import ConfigError
from promoe_ds.config.option import options
from promoe_ds.config.schema import Config
from promoe_ds.recipes.load import load_config
from promoe_ds.utils.ranks import ALONE
from tests.checkpoint.state import CONFIG, State, save, save_on
from tests.disk import loop


@pytest.mark.parametrize("world", [1, 2, 5])
def test_round_trip_is_bit_exact(tmp_path: Path, world: int) -> None:
    """Also with more ranks than parameters: some files are empty."""
    state = State(7)
    assert save_on(world, tmp_path, 7) == [None] * world
    found = layout.find_whole(tmp_path, ALONE)
    assert found == layout.folder(tmp_path, 7) == layout.newest(tmp_path)
    other = State(99)
    resume.restore(Reader(found), other, 7)
    assert other.step == 7 and other.values.keys() == state.values.keys()
    assert all(torch.equal(other.values[key], state.values[key]) for key in state.values)


def test_another_configuration_is_refused_by_key(tmp_path: Path) -> None:
    save(tmp_path, 5)
    found = layout.folder(tmp_path, 5)
    saved = layout.manifest(found)["config"]
    resume.check_same_run(saved, load_config("tiny", ["train.steps=99", "parallel.expert_parallel=4"]), found)
    with pytest.raises(ConfigError, match=r"optimizer.eps=0.5: .*was made with optimizer.eps=1e-08; set optimizer"):
        resume.check_same_run(saved, load_config("tiny", ["optimizer.eps=0.5"]), found)
    with pytest.raises(ConfigError, match="moe=null: .* was made with moe=a section; name its recipe or"):
        resume.check_same_run(saved, load_config("tiny", ["moe=null"]), found)


@pytest.mark.parametrize(
    ("made", "now"),
    [
        ("optimizer.ema_more=[0.5, 0.7]", "optimizer.ema_more=[]"),
        ("optimizer.ema_more=[]", "optimizer.ema_more=[0.5]"),
        ("moe.layers=[0, 1]", "moe.layers=every_other"),
        ("model.learn_sigma=false", "model.learn_sigma=true"),
        ("moe=null", "moe={}"),
        ("optimizer.eps=0.00001", "optimizer.eps=0.5"),
    ],
)
def test_the_way_out_of_another_option_is_written_as_it_is_typed(made: str, now: str) -> None:
    saved = encode(load_config("tiny", [made]))
    with pytest.raises(ConfigError) as caught:
        resume.check_same_run(saved, load_config("tiny", [now]), Path("run"))
    way_out = re.search(r"; set (.*) or choose another --run", str(caught.value))
    assert way_out, caught.value
    resume.check_same_run(saved, load_config("tiny", [now, way_out[1]]), Path("run"))


def test_the_rate_of_biases_may_change_but_not_to_or_from_0(tmp_path: Path) -> None:
    """The bias is a buffer that comes and goes with 0. A change is told if there are steps to make with it."""

    def rate(text: str, *more: str) -> Config:
        return load_config("tiny", [f"moe.router.bias_rate={text}", *more])

    save(tmp_path, 5, rate("0.01"))
    found = layout.folder(tmp_path, 5)
    saved = layout.manifest(found)["config"]
    for text in ("0.001", "0.5", "1e-09"):
        resume.check_same_run(saved, rate(text), found)
        assert resume.changed_rates(found, rate(text)) == [f"moe.router.bias_rate {text} instead of 0.01"]
    assert resume.changed_rates(found, rate("0.5", "train.steps=5")) == []
    out = "set moe.router.bias_rate=1e-09 to all but stop it or choose another --run$"
    with pytest.raises(ConfigError, match=f"^moe.router.bias_rate=0.0: .*made with moe.router.bias_rate=0.01; {out}"):
        resume.check_same_run(saved, CONFIG, found)
    with pytest.raises(ConfigError, match="^moe.router.bias_rate=0.01: .* set moe.router.bias_rate=0.0 or choose anot"):
        resume.check_same_run(encode(CONFIG), rate("0.01"), found)


def test_an_edited_configuration_is_told_from_another_one(tmp_path: Path) -> None:
    """Whichever of the two values the command has: no command is to be followed into a loop."""
    resume.check_run(tmp_path, CONFIG)
    other = load_config("tiny", ["model.width=64"])
    (tmp_path / "config.yaml").write_text(dump(other))
    resume.check_run(tmp_path, other)
    with pytest.raises(ConfigError, match="model.width=32: .* was made with model.width=64; set model.width=64 or"):
        resume.check_run(tmp_path, CONFIG)
    save(tmp_path, 5)
    told = (
        rf"^model.width=64: {tmp_path}/config.yaml was edited or damaged, its .* were made with model.width=32; put the"
    )
    for config in (CONFIG, other):
        with pytest.raises(ConfigError, match=told):
            resume.check_run(tmp_path, config)
    (tmp_path / "config.yaml").write_text(dump(load_config("tiny", ["train.steps=99"])))
    resume.check_run(tmp_path, CONFIG)
    (layout.folder(tmp_path, 5) / "manifest.json").write_text("{")
    (tmp_path / "config.yaml").write_text(dump(other))
    with pytest.raises(ConfigError, match="set model.width=64 or choose another --run"):
        resume.check_run(tmp_path, CONFIG)


def test_a_folder_of_weights_is_no_run(tmp_path: Path) -> None:
    """It has a config.yaml, too, which a run would replace."""
    for name, text in (("config.yaml", dump(CONFIG)), ("manifest.json", "{}")):
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=rf"^--run={tmp_path}: holds weights that .*; train.init={tmp_path} starts"):
        resume.check_run(tmp_path, CONFIG)


def test_another_learning_rate_needs_a_step_to_make_with_it(tmp_path: Path) -> None:
    save(tmp_path, 5)
    found, other = layout.folder(tmp_path, 5), ["optimizer.lr=0.5"]
    resume.check_same_run(layout.manifest(found)["config"], load_config("tiny", other), found)
    assert resume.changed_rates(found, load_config("tiny", other)) == ["optimizer.lr 0.5 instead of 0.001"]
    assert resume.changed_rates(found, CONFIG) == resume.changed_rates(None, load_config("tiny", other)) == []
    with pytest.raises(ConfigError, match=r"optimizer.lr=0.5: .*at the last step, .*; raise train.steps, or"):
        resume.changed_rates(found, load_config("tiny", [*other, "train.steps=5"]))


@pytest.mark.parametrize(
    ("made", "now", "told"),
    [
        ("wsd decay_steps=4", "wsd decay_steps=12", ["decay_steps 12 instead of 4"]),  # from step 9 on
        ("wsd decay_steps=2", "wsd", []),  # a tenth of 20
        ("cosine", "cosine decay_steps=3", []),
        ("cosine", "cosine schedule_steps=20", []),
        ("cosine", "cosine schedule_steps=30", ["schedule_steps 30 instead of null"]),
        ("cosine schedule_steps=30", "cosine", ["schedule_steps null instead of 30"]),
        ("constant", "constant lr_floor=0.1 schedule_steps=9", []),
        ("constant", "wsd decay_steps=3 lr_floor=0.1", ["schedule wsd instead of constant",
                                                        "decay_steps 3 instead of null",
                                                        "lr_floor 0.1 instead of 0.0"]),
        ("wsd warmup_steps=2", "wsd warmup_steps=3", []),  # it is over
        ("wsd warmup_steps=2", "wsd warmup_steps=7", ["warmup_steps 7 instead of 2"]),
        ("cosine warmup_steps=2", "cosine warmup_steps=3", ["warmup_steps 3 instead of 2"]),  # it falls from then on
        ("cosine schedule_steps=5", "linear schedule_steps=5", []),
        ("wsd", "linear decay_steps=20", ["schedule linear instead of wsd",
                                            "decay_steps 20 instead of null"]),  # neither alone
    ],
)  # fmt: skip
def test_changes_of_a_schedule_that_steps_to_come_feel(tmp_path: Path, made: str, now: str, told: list[str]) -> None:
    """After 5 of 20 steps. Those that none of them feels are not told."""

    def scheduled(text: str) -> Config:
        return load_config("tiny", [f"optimizer.{word}" for word in f"schedule={text}".split()])

    save(tmp_path, 5, scheduled(made))
    assert resume.changed_rates(layout.folder(tmp_path, 5), scheduled(now)) == [f"optimizer.{text}" for text in told]


def test_a_change_is_told_by_a_run_that_stops_before_it_is_felt(tmp_path: Path) -> None:
    """It may be made longer, and its checkpoints know the new schedule alone. Without a step to come none is told."""
    wsd = ["optimizer.schedule=wsd", "optimizer.schedule_steps=20", "train.steps=6"]
    save(tmp_path, 5, load_config("tiny", [*wsd, "optimizer.decay_steps=4"]))
    found, now = layout.folder(tmp_path, 5), [*wsd, "optimizer.decay_steps=12"]
    assert resume.changed_rates(found, load_config("tiny", now)) == ["optimizer.decay_steps 12 instead of 4"]
    assert resume.changed_rates(found, load_config("tiny", [*now, "train.steps=5"])) == []


def test_a_longer_run_must_not_change_the_rates_of_the_steps_before(tmp_path: Path) -> None:
    """A schedule's end is told apart from the run's, or the run goes on within its stable phase."""
    decay = ["optimizer.schedule=wsd", "optimizer.decay_steps=10"]
    config = load_config("tiny", ["train.steps=30", *decay])
    for step in (20, 25):
        Saver(tmp_path, State(1), config, ALONE, {}, say=lambda text: None).save(step, {}, last=True)
    stable, decaying = layout.candidates(tmp_path)
    longer = ["train.steps=60", *decay]
    assert resume.changed_rates(stable, load_config("tiny", longer)) == ["train.steps 60 instead of 30"]
    assert resume.changed_rates(decaying, config) == []
    message = r"train.steps=60: the 25 steps before were made for a wsd schedule of 30 steps; set optimizer.schedule_"
    for beside in ("train.steps=60", "optimizer.decay_steps=9", "optimizer.lr=0.5", "optimizer.lr_floor=0.1"):
        with pytest.raises(ConfigError, match=message + r"steps=30 to keep it, or 60 to change it from here on"):
            resume.changed_rates(decaying, load_config("tiny", [*longer, beside]))
    kept = load_config("tiny", [*longer, "optimizer.schedule_steps=30"])
    moved = load_config("tiny", [*longer, "optimizer.schedule_steps=60"])
    assert resume.changed_rates(decaying, kept) == []
    assert resume.changed_rates(decaying, moved) == ["optimizer.schedule_steps 60 instead of null"]
    other = load_config("tiny", ["train.steps=60", "optimizer.schedule=linear"])
    told = {"optimizer.schedule linear instead of wsd", "train.steps 60 instead of 30"}
    assert set(resume.changed_rates(decaying, other)) == told


def test_a_longer_run_tells_that_the_end_of_its_schedule_moves(tmp_path: Path) -> None:
    """No step of the warm-up, or of the stable phase, would have had another rate."""
    cosine = ["optimizer.schedule=cosine", "optimizer.warmup_steps=5", "train.steps=8"]
    save(tmp_path, 5, load_config("tiny", cosine))
    found = layout.folder(tmp_path, 5)
    longer = load_config("tiny", [*cosine, "train.steps=12"])
    assert resume.changed_rates(found, longer) == ["train.steps 12 instead of 8"]
    kept = load_config("tiny", [*cosine, "train.steps=12", "optimizer.schedule_steps=8"])
    assert resume.changed_rates(found, kept) == []


def test_a_stable_phase_may_end_early_by_another_decay(tmp_path: Path) -> None:
    wsd = ["optimizer.schedule=wsd", "train.steps=20", "optimizer.decay_steps=16"]
    save(tmp_path, 4, load_config("tiny", wsd))
    finished = load_config("tiny", [*wsd, "train.steps=7", "optimizer.decay_steps=3"])
    told = ["train.steps 7 instead of 20", "optimizer.decay_steps 3 instead of 16"]
    assert sorted(resume.changed_rates(layout.folder(tmp_path, 4), finished)) == sorted(told)


def test_a_longer_run_needs_the_end_that_its_schedule_had_by_name(tmp_path: Path) -> None:
    """It was given at first, and is not any more."""
    save(tmp_path, 5, load_config("tiny", ["optimizer.schedule=cosine", "optimizer.schedule_steps=9"]))
    with pytest.raises(ConfigError, match=r"train.steps=30: the 5 steps .* a cosine schedule of 9 steps; .*steps=9 to"):
        resume.changed_rates(
            layout.folder(tmp_path, 5), load_config("tiny", ["optimizer.schedule=cosine", "train.steps=30"])
        )


def test_what_is_advised_after_a_nan_may_change_on_resume() -> None:
    page = (Path(__file__).parents[2] / "docs/troubleshooting.md").read_text(encoding="utf-8")
    (row,) = [line for line in page.splitlines() if "loss/diffusion is nan" in line]
    advised = re.findall(r"`(\w+\.\w+)", row.rsplit("|", 2)[1])
    free = {path for path, option, _ in options(CONFIG) if option.change == "resume"}
    assert len(advised) == 2 and set(advised) <= free


def test_other_data_is_refused(tmp_path: Path) -> None:
    state = State(1)
    Saver(tmp_path, state, CONFIG, ALONE, {"data": "7 images of 2 classes, ab"}, say=lambda text: None).save(
        1, {}, last=True
    )
    (found,) = layout.candidates(tmp_path)
    resume.check_same_data(found, "7 images of 2 classes, ab")
    message = "data.path=7 images of 2 classes, cd: .* was trained on 7 images of 2 classes, ab; bring that data back"
    with pytest.raises(ConfigError, match=message):
        resume.check_same_data(found, "7 images of 2 classes, cd")


def test_missing_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    save(tmp_path, 5)
    reader = Reader(layout.folder(tmp_path, 5))
    with pytest.raises(ConfigError, match="holds no zebra/fp32"):
        resume.load_weights(reader, nn.ParameterDict({"zebra": torch.zeros(3, 2)}), lambda p, full: full)
    with pytest.raises(ConfigError, match=r"a has shape \[3, 2\], the model \[4, 2\]"):
        resume.load_weights(reader, nn.ParameterDict({"a": torch.zeros(4, 2)}), lambda p, full: full)


def test_buffers_come_back_from_the_ema_file(tmp_path: Path) -> None:
    save(tmp_path, 5)
    reader, model = Reader(layout.folder(tmp_path, 5)), nn.Module()
    model.register_buffer("fixed", torch.zeros(2))
    resume.load_weights(reader, model, lambda p, full: full)
    assert (model.fixed == 1).all()
    model.register_buffer("zebra", torch.zeros(2))
    with pytest.raises(ConfigError, match="holds no ema/zebra"):
        resume.load_weights(reader, model, lambda p, full: full)


def test_unreadable_run_configuration(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match="config.yaml: cannot be read"):
        resume.saved_config(tmp_path)


@pytest.mark.parametrize("content", [b"\xff\xfe", b"", b"[1]"])
def test_a_damaged_run_configuration_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match="config.yaml: .*choose another --run"):
        resume.saved_config(tmp_path)


def test_a_run_that_cannot_be_read_is_not_a_fresh_start(tmp_path: Path) -> None:
    for name, look in (("config.yaml", resume.saved_config), ("metrics.jsonl", resume.logged)):
        assert not look(tmp_path), "nothing is there"
        loop(tmp_path / name)
        with pytest.raises(ConfigError, match=rf"^--run={tmp_path / name}: cannot be read \(.*Too many levels"):
            look(tmp_path)


@pytest.mark.parametrize("name", ["state-00000-of-00001.safetensors", "ema.safetensors"])
def test_a_file_that_cannot_be_opened_is_not_said_to_be_missing(tmp_path: Path, name: str) -> None:
    save(tmp_path, 5)
    found = layout.folder(tmp_path, 5)
    loop(found / name)
    with pytest.raises(ConfigError, match=rf"={found / name}: cannot be read \(Too many levels"):
        Reader(found)


def test_a_run_configuration_of_another_version_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds a configuration that this version cannot read .*foo"):
        resume.check_same_run({"foo": 1}, CONFIG, tmp_path)


def test_lost_checkpoints_are_not_a_fresh_start(tmp_path: Path) -> None:
    """However short the run was; one that was killed before its first checkpoint was complete may start again."""
    (tmp_path / "checkpoints" / "tmp_step_00000005").mkdir(parents=True)
    (tmp_path / "config.yaml").write_text(dump(CONFIG))
    (tmp_path / "metrics.jsonl").write_text('{"step": 5}\n')
    assert resume.check_history(tmp_path, None, CONFIG) == 0
    save(tmp_path, 5)
    assert resume.check_history(tmp_path, layout.newest(tmp_path), CONFIG) == 5
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(ConfigError, match=rf"^--run={tmp_path}: had checkpoints, and checkpoints/ is empty; "):
        resume.check_history(tmp_path, None, CONFIG)


def test_a_run_past_its_end_is_refused(tmp_path: Path) -> None:
    found = tmp_path / "checkpoints" / "step_00000030"
    with pytest.raises(ConfigError, match=r"train.steps=20: .* is at step 30 already; raise it"):
        resume.check_history(tmp_path, found, load_config("tiny"))
    assert resume.check_history(tmp_path, found, load_config("tiny", ["train.steps=30"])) == 30
