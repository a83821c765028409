"""launchers/train.py as a person meets it: every mistake is one line on stderr, exit code 2, and nothing is touched."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest

from launchers import train as launcher
from promoe_ds.checkpoint import layout
from promoe_ds.config.option import options
from promoe_ds.recipes.load import load_config
from tests.checkpoint.state import save
from tests.disk import loop, resize, tmpfs
from tests.launch import ROOT, deepspeed, run, train
from tests.photographs import write_tree


def mistake(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """Run in this process (these errors come before any process group) and return the one line."""
    assert launcher.main(list(args)) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1 and "Traceback" not in captured.err
    return captured.err


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


BAD = {
    "unknown key": (["train.stepz=5"], "train.stepz=5: unknown key", "did you mean 'steps'?"),
    "unknown section": (["trian.steps=5"], "trian=", "did you mean 'train'?"),
    "wrong type": (["train.steps=many"], "train.steps='many': expected int, got str", ""),
    "unknown recipe": (["--config", "digit"], "--config=digit: no such recipe", "did you mean 'digits'?"),
    "run is not UTF-8": (["--run", "x\udcff"], "--run='x\\udcff': is not UTF-8", "rename"),
    "no such file": (["--config", "nowhere.yaml"], "--config=nowhere.yaml: cannot be read", ""),
    "ep 8": (
        ["parallel.expert_parallel=8"],
        "parallel.expert_parallel=8: does not divide moe.num_experts=12",
        "1, 2, 3",
    ),
    "ep and world": (["parallel.expert_parallel=2"], "does not divide the world size 1", ""),
    "batch": (["train.micro_batch_size=7"], "train.micro_batch_size=7", "choose one of"),
    "router": (["moe.router.name=promo"], "moe.router.name=promo: no such router", "did you mean 'promoe'?"),
    "top-k": (["moe.router.top_k=13"], "moe.router.top_k=13: is not in 1..moe.num_experts=12", "lower it"),
    "quota": (["moe.router.name=expert_choice", "moe.num_experts=24"], "quota of an image", "lower it to at most 16"),
    "centroids": (
        ["moe.router.name=kmeans", "moe.num_experts=24", "train.micro_batch_size=1"],
        "fewer than centroids",
        "raise the batch size",
    ),
    "superclasses": (["moe.router.name=classification"], "moe.router.superclasses=null", "add moe.router.superclasses"),
    "superclasses and experts": (
        ["--config", "digits_classification", "moe.num_experts=5"],
        "moe.router.superclasses=digits: has 4 superclasses, one expert each, but moe.num_experts=5",
        "set moe.num_experts=4",
    ),
    "missing data": (["--config", "cifar10_promoe_s"], "data.path=null", "add data.path=PATH"),
    "wrong data": (["--config", "cifar10_promoe_s", "data.path=nowhere.npz"], "data.path=nowhere.npz", ""),
    "data in a dry run": (["--config", "cifar10_promoe_s", "--dry-run", "--check-files"], "data.path=null", "add data"),
    "class count": (["model.num_classes=11"], "model.num_classes=11", "10"),
    "a run elsewhere": (["name=../x"], "name=../x: is the name of the run folder in runs/", "with --run"),
    "unknown option": (["--rum", "x"], "unrecognized arguments: --rum;", "did you mean '--run'?"),
    "no override": (["steps"], "override='steps': is not section.key=value", ""),
    "no ds_config": (["--ds_config", "nowhere.json"], "--ds_config=nowhere.json: cannot be read", ""),
    "world": (["--dry-run", "--world", "0"], "world size=0", ""),
    "scores of nothing": (
        ["--config", "cifar10_promoe_s", "train.score_every=5"],
        "train.score_ref=null: train.score_every needs real images",
        "name what launchers/evaluate.py --ref accepts",
    ),
    "scores of one image": (
        ["train.score_every=5", "train.score_images=1"],
        "train.score_images=1: must lie in [2, 1e+08)",
        "",
    ),
    "no reference": (
        ["train.score_every=5", "train.score_ref=nowhere.npz"],
        "error: train.score_ref=nowhere.npz: no such file",
        "name an existing .npz",
    ),
    "no network": (
        ["train.score_every=5", "train.score_features=net.onnx"],
        "error: train.score_features=net.onnx: no such file",
        "name an existing",
    ),
    "no guide": (
        ["guidance.model=nowhere"],
        "guidance.model=nowhere: no such file or folder",
        "name a run folder",
    ),
    "no guide in a dry run": (
        ["guidance.model=nowhere", "--dry-run", "--check-files"],
        "guidance.model=nowhere: no such file or folder",
        "name a run folder",
    ),
    "nothing to start from in a dry run": (
        ["train.init=nowhere", "--dry-run", "--check-files"],
        "train.init=nowhere: no such file or folder",
        "name a run folder",
    ),
    "a split of digits": (
        ["data.split=foo", "--dry-run", "--check-files"],
        "data.split=foo: data.name=digits has no splits",
        "remove it",
    ),
    "no weights of a network": (
        ["train.score_every=5", "train.score_features=inception"],
        "error: train.score_features=inception: no Inception weights in ",
        "then name it with $INCEPTION_WEIGHTS, or put it into ",
    ),
    "scores in a dry run": (
        ["train.score_every=5", "train.score_features=fid", "--dry-run", "--check-files"],
        "train.score_features=fid: no such feature extractor",
        "choose one of digits-cnn",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_mistakes(
    name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.delenv("INCEPTION_WEIGHTS", raising=False)
    arguments, message, way_out = BAD[name]
    line = mistake(capsys, *arguments)
    assert message in line and way_out in line
    assert not list(tmp_path.iterdir()), "a rejected command leaves nothing behind"


def test_scores_are_spoken_of_in_keys_of_a_recipe() -> None:
    for text, expected in (
        ("--ref=a.npz: no such file; name it", "train.score_ref=a.npz: no such file; name it"),
        (
            "--ref=a.safetensors: holds features of digits-cnn, --features is inception; add --features digits-cnn",
            "train.score_ref=a.safetensors: holds features of digits-cnn, train.score_features is inception; "
            "set train.score_features=digits-cnn",
        ),
        ("--inception-weights=x.pth: is none; name y", "INCEPTION_WEIGHTS=x.pth: is none; name y"),
        ("--dinov2-weights=(none): none; name it, with --dinov2-weights or $DINOV2_WEIGHTS",
         "train.score_features=inception: none; name it, with $DINOV2_WEIGHTS"),
    ):  # fmt: skip
        assert launcher.in_keys(text, "inception") == expected


@pytest.mark.parametrize(("name", "text"), [("LOCAL_WORLD_SIZE", "two"), ("LOCAL_SIZE", "0")])
def test_numbers_of_a_launcher_that_are_none(
    name: str, text: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setenv(name, text)
    assert f"environment {name}='{text}': is not a number of processes; unset it" in mistake(capsys, "--dry-run")


@pytest.mark.parametrize("name", ["foo", "", "cuda"])
def test_a_device_that_deepspeed_would_not_find(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", name)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    conflict = "cuda: this machine offers no CUDA device" if name == "cuda" else f"'{name}': is neither cpu nor cuda"
    for words in ([], ["--dry-run"] * (name != "cuda")):  # a dry run may plan for a machine that has one
        line = mistake(capsys, "--config", "tiny", *words)
        assert f"environment DS_ACCELERATOR={conflict}; unset it" in line


def test_a_superclass_map_that_misses_classes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    groups = tmp_path / "groups.yaml"
    groups.write_text("superclasses: {a: [0, 1, 2], b: [3, 4], c: [5, 6], d: [8]}")
    arguments = ["--config", "digits_classification", "--run", str(tmp_path / "run")]
    line = mistake(capsys, *arguments, f"moe.router.superclasses={groups}")
    assert f"moe.router.superclasses={groups}: has no superclass for class 7, 9; add them to the file" in line
    assert not (tmp_path / "run").exists()


DS_BAD = {
    "unknown key": ({"zero_optimisation": {"stage": 2}}, "zero_optimisation", "did you mean 'zero_optimization'?"),
    "unknown inner key": ({"zero_optimization": {"stag": 2}}, "zero_optimization.stag", "did you mean 'stage'?"),
    "contradiction": ({"gradient_clipping": 1.0}, "gradient_clipping", "optimizer.clip_grad_norm"),
    "batch": ({"train_batch_size": 7}, "train_batch_size", "train.global_batch_size"),
    "optimizer": ({"optimizer": {"type": "Adam"}}, "optimizer", "section `optimizer` of the recipe"),
}


@pytest.mark.parametrize("name", DS_BAD)
def test_mistakes_in_the_ds_config(name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    tree, key, way_out = DS_BAD[name]
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(tree))
    line = mistake(capsys, "--ds_config", str(path), "--run", str(tmp_path / "run"))
    assert f"{path}: {key}" in line and way_out in line
    assert not (tmp_path / "run").exists()


def test_a_dry_run_tells_a_damaged_checkpoint(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """By the sizes of its files: it is the start that reads every byte."""
    save(tmp_path, 5)
    words = ["--config", "tiny", "--run", str(tmp_path), "--dry-run", "--check-files"]
    assert launcher.main(words) == 0
    capsys.readouterr()
    (layout.folder(tmp_path, 5) / "manifest.json").write_text("[" * sys.getrecursionlimit())
    line = mistake(capsys, *words)
    assert "step_00000005: is damaged: manifest.json is not JSON (it is nested too deeply); no whole one" in line


def test_a_run_folder_that_cannot_be_written(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    line = mistake(capsys, "--config", "tiny", "--run", str(tmp_path / "file" / "run"))
    assert f"--run={tmp_path}/file/run: {tmp_path}/file is not a folder; name a place in one" in line
    assert (tmp_path / "file").read_text() == "precious"


def test_a_run_folder_of_another_configuration(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from promoe_ds.config.decode import dump
    from promoe_ds.recipes.load import load_config

    (tmp_path / "config.yaml").write_text(dump(load_config("tiny")))
    before = sorted((p.name, p.read_bytes()) for p in tmp_path.iterdir())
    line = mistake(capsys, "--config", "tiny", "--run", str(tmp_path), "optimizer.beta1=0.5")
    assert "optimizer.beta1=0.5" in line and "was made with optimizer.beta1=0.9" in line and "another --run" in line
    assert sorted((p.name, p.read_bytes()) for p in tmp_path.iterdir()) == before


def test_checkpoints_that_cannot_be_read(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Neither a fresh start nor damage."""
    save(tmp_path, 5)
    for path in (layout.folder(tmp_path, 5) / "ema.safetensors", tmp_path / "config.yaml"):
        loop(path)
        line = mistake(capsys, "--config", "tiny", "--run", str(tmp_path))
        assert f"={path}: cannot be read (" in line and "Too many levels" in line and "prune" not in line


def test_a_run_folder_in_use(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        line = mistake(capsys, "--config", "tiny", "--run", str(tmp_path))
    assert "another process is training in it" in line and not (tmp_path / "config.yaml").exists()


def test_bad_options_exit_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--frobnicate"], ["--config"], ["--json"], ["--check-files"], ["--world", "4"]):
        assert arguments[0] in mistake(capsys, *arguments)


def test_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        launcher.main(["--help"])
    out = capsys.readouterr().out
    assert caught.value.code == 0 and "deepspeed --num_gpus 2 launchers/train.py" in out and "resumes" in out


@pytest.mark.parametrize(("size", "total", "activated"), [("s", 75543584, 32993312), ("xl", 1567733792, 675339296)])
def test_dry_run_for_machines(size: str, total: int, activated: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert launcher.main(["--config", f"imagenet256_promoe_{size}", "--dry-run", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["params"]["total"] == total and facts["params"]["activated"] == activated


def test_dry_run_counts_names_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = write_tree(tmp_path / "tree", 1, 8)
    (tree / ".thumbnails").mkdir()
    words = ["data.name=images", f"data.path={tree}", "model.channels=3", "model.num_classes=2"]
    assert launcher.main(["--config", "tiny", "--dry-run", "--check-files", "--json", *words]) == 0
    captured = capsys.readouterr()
    note = f"data.path={tree}: 1 name is left out: hidden, or links to folders that are read already\n"
    assert captured.err == note and json.loads(captured.out)


def test_dry_run_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--config", "imagenet256_promoe_xl", "--dry-run", "--world", "64", "parallel.expert_parallel=4"]
    assert launcher.main([*arguments, "--ds_config", str(ROOT / "ds_configs/zero1.json")]) == 0
    out = capsys.readouterr().out
    assert "1,567,733,792" in out and "reduce_bucket_size" in out


def test_no_number_that_may_be_chosen_breaks_a_dry_run(capsys: pytest.CaptureFixture[str]) -> None:
    floats = [path for path, _, value in options(load_config("tiny")) if isinstance(value, float)]
    for path in (*floats, "sample.shift"):
        for number in ("2e-38", "3e38"):
            assert launcher.main(["--config", "tiny", "--dry-run", f"{path}={number}"]) in (0, 2)
            assert "nan" not in capsys.readouterr().out


def test_one_process_by_the_deepspeed_launcher_with_nothing_else(tmp_path: Path) -> None:
    """`deepspeed launchers/train.py --ds_config ds_configs/zero2.json`, shortened; then damage and exit codes."""
    folder = tmp_path / "run"
    command = deepspeed(
        1, "launchers/train.py", "--ds_config", str(ROOT / "ds_configs/zero2.json"), "--run", str(folder)
    )
    short = ["train.steps=4", "train.checkpoint_every=2", "sample.steps=2", "sample.per_class=1"]
    assert "1 x cpu, ep 1, ZeRO-2" in run([*command, *short]).stdout
    assert [layout.step_of(p) for p in layout.candidates(folder)] == [2, 4]

    weights = layout.folder(folder, 4) / "ema.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and "tensorboard" not in str(p)}
    done = run([*command, *short], check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    line = next(text for text in done.stderr.splitlines() if text.startswith("error: "))
    assert "step_00000004" in line and "ema.safetensors has" in line
    assert "remove it to continue from step_00000002" in line
    after = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and "tensorboard" not in str(p)}
    assert after == before

    shutil.rmtree(layout.folder(folder, 4))
    alone = ("--ds_config", str(ROOT / "ds_configs/zero2.json"), "--run", str(folder), *short)
    assert "resuming at step 2 of 4" in train(*alone).stdout
    finished = train(*alone)
    assert "resuming at step 4 of 4" in finished.stdout and "done: 4 steps" in finished.stdout


def test_a_value_that_deepspeed_refuses(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2, "reduce_bucket_size": "abc"}}))
    folder = tmp_path / "run"
    done = train("--config", "tiny", "--ds_config", str(path), "--run", str(folder), check=False, fork=True)
    (line,) = done.stderr.strip().splitlines()[-1:]
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert line.startswith(f'error: {path}: zero_optimization.reduce_bucket_size="abc": ')
    assert not (folder / "config.yaml").exists() and not (folder / "ds_config.json").exists()


def test_errors_of_many_ranks_are_one_line(tmp_path: Path) -> None:
    done = train("--config", "tiny", "--run", str(tmp_path), "parallel.expert_parallel=4", processes=2, check=False)
    errors = [text for text in done.stderr.splitlines() if text.startswith("error: ")]
    assert done.returncode != 0 and len(errors) == 1 and "does not divide the world size 2" in errors[0]


def test_launchers_run_from_anywhere(tmp_path: Path) -> None:
    assert os.getcwd() != str(tmp_path)
    done = run(["env", "-C", str(tmp_path), "python3", str(ROOT / "launchers/train.py"), "--help"], check=False)
    assert done.returncode == 0


def test_a_full_disk_costs_no_checkpoint_and_with_more_room_the_run_continues(tmp_path: Path) -> None:
    """A real file system that holds one checkpoint and not two; `train.on_save_error=continue`."""
    run = tmp_path / "disk" / "run"
    command = ("--config", "tiny", "--run", str(run), "train.steps=12", "train.checkpoint_every=5")
    with tmpfs(tmp_path / "disk", "5m") as disk:
        done = train(*command, "train.on_save_error=continue", check=False, fork=True)
        warning, error = (t for t in done.stderr.splitlines() if t.startswith(("warning: checkpoint", "error: ")))
        assert done.returncode == 2 and "step 12/12" in done.stdout
        for line, step in ((warning, 10), (error, 12)):
            assert f"step_{step:08d}: cannot be written (it needs " in line
            assert re.search(r"needs 3\.\d MiB, the disk has 2\.\d MiB free\); step_00000005 is unharmed", line)
        assert [p.name for p in (run / "checkpoints").iterdir()] == ["step_00000005"]
        resize(disk, "10m")
        resumed = train(*command)
        assert "resuming at step 5 of 12" in resumed.stdout
        assert [layout.step_of(p) for p in layout.candidates(run)] == [10, 12]
