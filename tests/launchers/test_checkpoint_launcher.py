"""launchers/checkpoint.py as a person meets it, on checkpoints of a real model."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from launchers import checkpoint as launcher
from launchers import sample
from promoe_ds.checkpoint import layout
from promoe_ds.checkpoint.init_from import InitialWeights
from promoe_ds.checkpoint.load_weights import find_weights, load_ema
from promoe_ds.checkpoint.resume import Reader
from promoe_ds.config.errors import ConfigError
from promoe_ds.models.init import build, materialize
from promoe_ds.recipes.load import load_config
from tests.checkpoint.state import State, saver
from tests.disk import as_nobody, loop, tmpfs
from tests.launch import ENVIRONMENT, ROOT

CONFIG = load_config("tiny", ["train.keep_last=9"])


class ModelState(State):
    """The state of a whole model after a few imagined steps."""

    def __init__(self, seed: int):
        model = materialize(build(CONFIG), seed)
        self.fixed = {n: p.detach() for n, p in model.named_parameters() if not p.requires_grad}
        self.params = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
        self.values = {}
        for i, state in enumerate(("fp32", "exp_avg", "exp_avg_sq", "ema")):
            self.values |= {(n, state): p + 0.01 * i for n, p in self.params.items()}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with checkpoints of steps 10, 20 and 30."""
    for step in (10, 20, 30):
        state = ModelState(step)
        saver(tmp_path / "run", state, CONFIG).save(step, state.fixed, last=True)
    return tmp_path / "run"


def hurt(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def steps(run: Path) -> list[int]:
    return [layout.step_of(path) for path in layout.candidates(run)]


def mistake(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    capsys.readouterr()
    assert launcher.main([str(arg) for arg in args]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1
    return err


def test_inspect_says_what_it_is(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert launcher.main(["inspect", "--run", str(run)]) == 0
    out = capsys.readouterr().out
    for text in ("step_00000030", "30 of 20", "189,636", "router promoe", "1 process, ep 1, ZeRO-0", "torch 2."):
        assert text in out
    assert "(0 minutes ago)" in out and " KiB  ema.safetensors" in out
    assert launcher.main(["inspect", str(layout.folder(run, 10)), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["step"] == 10 and facts["parameters"] == 189_636 and facts["problem"] is None
    assert facts["config_blake2b"] == layout.tree_digest(facts["config"])
    (layout.folder(run, 10) / "ema.safetensors").unlink()
    assert launcher.main(["inspect", str(layout.folder(run, 10))]) == 0
    assert "state       ema.safetensors is missing" in capsys.readouterr().out


def test_verify_names_every_fault(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert launcher.main(["verify", "--run", str(run)]) == 0
    assert capsys.readouterr().out.count("whole    ") == 3
    hurt(layout.folder(run, 20) / "ema.safetensors")
    (layout.folder(run, 30) / "manifest.json").unlink()
    (run / "checkpoints" / "tmp_step_00000040").mkdir()
    assert launcher.main(["verify", "--run", str(run)]) == 2
    captured = capsys.readouterr()
    whole, first, second, ignored = captured.out.splitlines()
    assert whole.startswith("whole    ") and "step_00000010" in whole and "MiB" in whole
    assert first == f"damaged  {layout.folder(run, 20)}: ema.safetensors does not match its checksum"
    assert second == f"damaged  {layout.folder(run, 30)}: manifest.json is missing"
    assert ignored.startswith("ignored  ") and "tmp_step_00000040" in ignored
    assert f"prune --run {run} --damaged" in captured.err
    assert launcher.main(["verify", str(layout.folder(run, 10))]) == 0
    assert launcher.main(["verify", *(str(layout.folder(run, step)) for step in (10, 20))]) == 2


def test_prune_keeps_what_is_whole(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A damaged newest one does not count as kept, and is deleted on request only."""
    hurt(layout.folder(run, 30) / "ema.safetensors")
    (run / "checkpoints" / "tmp_step_00000040").mkdir()
    (run / "checkpoints" / "tmp_step_00000050").touch()
    command = ["prune", "--run", str(run), "--keep", "1"]
    assert launcher.main([*command, "--dry-run"]) == 0
    assert capsys.readouterr().out.count("would delete") == 3 and steps(run) == [10, 20, 30]
    assert launcher.main(command) == 0
    assert steps(run) == [20, 30] and not layout.leftovers(run)
    assert launcher.main(["prune", "--run", str(run), "--damaged"]) == 0
    assert steps(run) == [20]
    hurt(layout.folder(run, 20) / "ema.safetensors")
    assert "no checkpoint of it is whole" in mistake(capsys, "prune", "--run", run, "--damaged")
    assert steps(run) == [20]


def test_what_cannot_be_read_is_neither_called_damaged_nor_deleted(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hurt(layout.folder(run, 10) / "ema.safetensors")
    newest = layout.folder(run, 30)
    for path in (newest / "ema.safetensors", newest / "manifest.json", newest):
        loop(path)
        for words in (
            ["verify"],
            ["prune", "--damaged"],
            ["prune", "--keep", 1],
            ["convert", "--files", 2, "--out", tmp_path / "out"],
        ):
            line = mistake(capsys, *words, "--run", run)
            assert f"={path}" in line and ": cannot be read (Too many levels" in line and "prune" not in line
            assert steps(run) == [10, 20, 30]
        for words in (["verify", newest], ["inspect", newest]):
            assert "cannot be read (Too many levels" in mistake(capsys, *words)
    loop(run / "checkpoints")
    for words in (["verify"], ["inspect"], ["prune", "--damaged"]):
        assert f"checkpoint={run / 'checkpoints'}: cannot be read (Too many" in mistake(capsys, *words, "--run", run)


def test_another_users_files_are_safe(run: Path, shared: Path) -> None:
    """As safetensors would leave them: the folder may be written by all, one file be read by its owner alone."""
    shutil.copytree(run, shared / "run")
    for path in (shared / "run").rglob("*"):
        path.chmod(0o777 if path.is_dir() else 0o644)
    (shared / "run").chmod(0o777)
    old, new = (layout.folder(shared / "run", step) for step in (20, 30))

    def told(*words: object) -> tuple[int, str]:
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            code = launcher.main([str(word) for word in words])
        return code, said.getvalue()

    whole = ["--run", shared / "run"]
    assert as_nobody(lambda: told("verify", *whole))[0] == 0
    for path, mode in ((new / "ema.safetensors", 0), (new / "manifest.json", 0), (new, 0), (new, 0o444)):
        before = path.stat().st_mode
        path.chmod(mode)
        hurt(old / "ema.safetensors")
        for words in (["verify"], ["prune", "--damaged"], ["prune", "--keep", 1]):
            code, said = as_nobody(lambda words=words: told(*words, *whole))
            place = new / "manifest.json" if path == new else path
            assert code == 2 and f"error: checkpoint={place}: cannot be read (Permission denied)" in said
            assert f"damaged  {new}" not in said and "prune" not in said
        with pytest.raises(ConfigError, match=r"cannot be read \(Permission denied\)"):
            as_nobody(lambda: find_weights(shared / "run"))
        path.chmod(before)
        hurt(old / "ema.safetensors")  # and well again
    (shared / "run" / "checkpoints").chmod(0)
    for words in (["verify"], ["inspect"], ["prune", "--damaged"]):
        code, said = as_nobody(lambda words=words: told(*words, *whole))
        assert code == 2 and said.startswith(f"error: checkpoint={shared / 'run/checkpoints'}: cannot be read (Perm")
    (shared / "run" / "checkpoints").chmod(0o755)
    assert steps(shared / "run") == [10, 20, 30]


def test_prune_waits_for_nobody(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with layout.claim(run):
        assert "another process is training in it" in mistake(capsys, "prune", "--run", run, "--keep", 1)
    assert steps(run) == [10, 20, 30]


@pytest.mark.parametrize("source", ["ema", "raw"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_weights_alone_are_sampled_from(run: Path, tmp_path: Path, source: str, dtype: str) -> None:
    out = tmp_path / "weights"
    made = ["convert", "--run", str(run), "--weights", source, "--dtype", dtype, "--out", str(out)]
    assert launcher.main(made) == 0
    assert {p.name for p in out.iterdir()} == {
        *("model.safetensors", "config.json", "config.yaml", "manifest.json", "README.md")
    }
    model, config, step = load_ema(out)
    assert (config, step) == (CONFIG, 30) and load_config(str(out / "config.yaml"), []) == CONFIG
    expected = ModelState(30)
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    for name, tensor in model.state_dict().items():
        want = expected.fixed.get(name)
        want = expected.values[name, "fp32" if source == "raw" else "ema"] if want is None else want
        assert tensor.dtype == torch.float32 and torch.equal(tensor, want.to(kind).float()), name
    assert launcher.main(["verify", str(out)]) == 0
    assert launcher.main(["inspect", str(out)]) == 0
    sample.sample(["--model", str(out), "--num", "2", "--steps", "2", "--out", str(tmp_path / "images")])
    assert np.asarray(Image.open(tmp_path / "images" / "000000_class0.png")).shape == (8, 8)
    hurt(out / "model.safetensors")
    assert launcher.main(["verify", str(out)]) == 2


def test_damaged_weights_start_no_training(run: Path) -> None:
    config = load_config("tiny", [f"train.init={run}"])
    InitialWeights(config)
    hurt(layout.folder(run, 30) / "ema.safetensors")
    with pytest.raises(ConfigError, match="train.init=.*ema.safetensors: is damaged: it does not match its checksum"):
        InitialWeights(config)


def test_another_number_of_files_is_the_same_state(run: Path, tmp_path: Path) -> None:
    assert launcher.main(["convert", "--run", str(run), "--files", "3", "--out", str(tmp_path / "fork")]) == 0
    made = layout.folder(tmp_path / "fork", 30)
    assert len(list(made.glob("state-*-of-00003.safetensors"))) == 3 and layout.damage(made) is None
    old, new = Reader(layout.folder(run, 30)), Reader(made)
    assert old.where.keys() == new.where.keys()
    for key in old.where:
        file, inner = old.where[key]
        assert torch.equal(file.get_tensor(inner), new.where[key][0].get_tensor(inner))
    assert load_config(str(tmp_path / "fork" / "config.yaml"), []) == CONFIG


def test_a_disk_too_small_is_left_as_it_was(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with tmpfs(tmp_path / "disk", "100k") as disk:
        for form in (["--files", 2], ["--weights", "ema"]):
            text = mistake(capsys, "convert", "--run", run, "--out", disk / "new" / "fork", *form)
            assert "cannot be written (it needs" in text and not list(disk.iterdir())


def test_mistakes_are_one_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "there").mkdir()
    convert = ["convert", "--run", run, "--out"]
    assert "exists; nothing is overwritten" in mistake(capsys, *convert, tmp_path / "there", "--weights", "ema")
    assert "exists; nothing is overwritten; name another folder" in mistake(capsys, *convert, run, "--files", 2)
    assert "choose 1 to " in mistake(capsys, *convert, tmp_path / "new", "--files", 0)
    assert "--dtype=bf16: belongs to --weights" in mistake(
        capsys, *convert, tmp_path / "new", "--files", 2, "--dtype", "bf16"
    )
    assert "one of the arguments --weights --files is required" in mistake(capsys, *convert, tmp_path / "new")
    assert "holds no checkpoint" in mistake(capsys, "verify", "--run", tmp_path / "there")
    assert "name either" in mistake(capsys, "inspect")
    assert "command='verfy': must be one of inspect, verify, convert, prune; did you mean 'verify'?" in mistake(
        capsys, "verfy"
    )
    assert "name either" in mistake(capsys, "verify", "--run", run, layout.folder(run, 10))
    assert "no such folder" in mistake(capsys, "inspect", tmp_path / "nowhere")
    assert "manifest.json is missing" in mistake(capsys, "inspect", tmp_path / "there")
    assert "say what to delete" in mistake(capsys, "prune", "--run", run)
    assert "keep 1 or more" in mistake(capsys, "prune", "--run", run, "--keep", 0)
    hurt(layout.folder(run, 30) / "ema.safetensors")
    assert "is damaged: ema.safetensors" in mistake(capsys, *convert, tmp_path / "new", "--weights", "ema")
    assert not (tmp_path / "new").exists() and not list(tmp_path.glob("tmp_*"))


@pytest.mark.slow
def test_it_starts_without_deepspeed_and_has_examples() -> None:
    code = "import sys; from launchers import checkpoint; print('deepspeed' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT, cwd=ROOT)
    assert done.stdout.strip() == "False", done.stderr
    with pytest.raises(SystemExit):
        launcher.main(["convert", "--help"])
