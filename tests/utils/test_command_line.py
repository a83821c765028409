"""What launchers do when they are stopped: one line, a code that says by whom, and no traceback."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from benchmarks.processes import PATIENCE
from promoe_ds.config.errors import ConfigError
from promoe_ds.evaluation.digits import digits_images
from promoe_ds.utils.command_line import Parser, guarded
from tests.disk import as_nobody
from tests.launch import ENVIRONMENT, ROOT
from tests.photographs import tiny_kl, write_tree
from tests.sample_folder import write_run

LINE = "stopped; run the same command again\n"
WORK = """
    import time
    from promoe_ds.utils.command_line import guarded, leave

    def work(argv):
        try:
            print("ready", flush=True)
            time.sleep(60)
        finally:
            time.sleep(1)
            print("cleared up", flush=True)

    leave(lambda: guarded(work, []))
"""


def start(*command: object, **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, env=ENVIRONMENT | variables, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "rank", "errors"),
    [(signal.SIGINT, 130, "0", LINE), (signal.SIGTERM, 85, "0", LINE), (signal.SIGINT, 130, "1", "")],
)
def test_a_stop_and_the_copy_that_a_launcher_passes_on(
    number: signal.Signals, code: int, rank: str, errors: str
) -> None:
    process = start("-c", textwrap.dedent(WORK), RANK=rank, WORLD_SIZE="2")
    assert process.stdout and process.stdout.readline() == "ready\n"
    for each in (number, signal.SIGTERM, signal.SIGINT):
        process.send_signal(each)
        time.sleep(0.2)
    assert process.communicate(timeout=PATIENCE) == ("cleared up\n", errors)
    assert process.returncode == code


@pytest.mark.slow
def test_a_library_may_make_another_error_of_the_interrupt() -> None:
    """As torch does in `get_tensor`; or one of ours around it, which would call a file damaged."""
    body = textwrap.dedent("""
        import time
        from promoe_ds.utils.command_line import guarded, leave
        from promoe_ds.config.errors import ConfigError

        def work(argv):
            try:
                print("ready", flush=True)
                time.sleep(60)
            except KeyboardInterrupt:
                raise {error}("could not determine the shape")

        leave(lambda: guarded(work, []))
    """)
    for error in ("ValueError", "ConfigError"):
        process = start("-c", body.format(error=error))
        assert process.stdout and process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=PATIENCE) == ("", LINE) and process.returncode == 130


@pytest.mark.slow
def test_an_interrupt_that_gets_lost_comes_again() -> None:
    """Python only prints what a finalizer raises, and goes on. What clears up is not interrupted, however long."""
    process = start(
        "-c",
        textwrap.dedent("""
        import time
        from promoe_ds.utils.command_line import guarded, leave

        class Loses:
            def __del__(self):
                print("ready", flush=True)
                time.sleep(3600)

        def work(argv):
            try:
                Loses()
                time.sleep(3600)
            finally:
                time.sleep(2.5)
                print("cleared up", flush=True)

        leave(lambda: guarded(work, []))
    """),
    )
    assert process.stdout and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=PATIENCE)
    assert "Exception ignored in" in errors, "it was lost"
    assert out == "cleared up\n" and errors.endswith(LINE) and process.returncode == 130


def catches(process: subprocess.Popen[str], number: signal.Signals) -> bool:
    found = re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{process.pid}/status").read_text())
    return found is not None and bool(int(found[1], 16) >> (number - 1) & 1)


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)


@pytest.mark.slow
def test_ctrl_c_of_sampling_scoring_and_encoding(tmp_path: Path) -> None:
    """While libraries load there is nothing to say: the process dies of the signal, as shells expect."""
    images, labels = digits_images()
    np.savez(tmp_path / "samples.npz", arr_0=images, arr_1=labels)
    tree, vae, out = write_tree(tmp_path / "tree", 200, 24), tiny_kl(tmp_path / "vae"), tmp_path / "out"
    drawn = ["--model", write_run(tmp_path / "run"), "--out", out, "--num", 100_000, "--steps", 100]
    commands = [
        ["launchers/sample.py", *drawn, "--batch", 4],
        ["launchers/evaluate.py", tmp_path / "samples.npz", "--ref", "digits", "--out", tmp_path / "metrics.json"],
        ["launchers/encode_latents.py", "--images", tree, "--vae", vae, "--size", 16, "--out", tmp_path / "latents"],
    ]
    for command in commands:
        loading = start(*command)
        wait_until(lambda p=loading: not catches(p, signal.SIGINT), loading)
        loading.send_signal(signal.SIGINT)
        assert loading.communicate(timeout=PATIENCE) == ("", "") and loading.returncode == -signal.SIGINT
        working = start(*command)
        wait_until(lambda p=working: catches(p, signal.SIGTERM), working)
        working.send_signal(signal.SIGINT)
        errors = working.communicate(timeout=PATIENCE)[1]
        assert errors.endswith(LINE) and "Traceback" not in errors and working.returncode == 130, errors


def test_a_path_that_may_not_be_looked_at_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "closed" / "samples").mkdir(parents=True)
    (tmp_path / "closed").chmod(0)
    path = tmp_path / "closed" / "samples"
    assert as_nobody(lambda: guarded(lambda argv: path.is_dir() and None, [])) == 2
    assert capfd.readouterr().err == f"error: {path}: Permission denied; look at its permissions, or name another\n"
    (tmp_path / "closed").chmod(0o755)
    assert guarded(lambda argv: Path("x" * 300).exists() and None, []) == 2
    assert capfd.readouterr().err.endswith("xxx: File name too long; look at its permissions, or name another\n")


def test_an_empty_path_is_not_the_current_folder() -> None:
    parser = Parser()
    parser.add_argument("--out", type=Path)
    parser.add_argument("place", type=Path, metavar="PLACE", nargs="?")
    assert parser.parse_args(["--out", "."]).out == Path()
    for words, option in ((["--out", ""], "--out"), (["--out="], "--out"), ([""], "PLACE")):
        with pytest.raises(ConfigError, match=f'^{option}="": is empty; name a file or folder$'):
            parser.parse_args(words)


def test_options_are_written_out() -> None:
    parser = Parser()
    parser.add_argument("--compile", action="store_true")
    with pytest.raises(ConfigError, match="unrecognized arguments: --compil; did you mean '--compile'"):
        parser.parse_args(["--compil"])


def test_words_that_are_not_utf8_are_refused() -> None:
    parser = Parser()
    parser.add_argument("--run", type=Path)
    parser.add_argument("--both", nargs=2)
    parser.add_argument("overrides", nargs="*")
    for words, where in (
        (["--run", "x\udcff"], "--run='x\\udcff'"),
        (["--both", "a", "x\udcff"], "--both='x\\udcff'"),
        (["a", "x\udcff", "--run", "b"], "overrides='x\\udcff'"),
    ):
        with pytest.raises(ConfigError, match=re.escape(f"{where}: is not UTF-8; ")):
            parser.parse_intermixed_args(words)
