"""Waiting for jobs: work may take as long as it likes, silence may not."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path

import pytest

from benchmarks import processes
from benchmarks.processes import wait_until
from tests.launch import run, run_to_end


def test_a_job_that_speaks_is_waited_for_and_its_outputs_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "PATIENCE", 3.0)
    talk = "for i in 1 2 3 4 5; do sleep 1; echo $i; done; echo end >&2; exit 3"
    done = run_to_end(["sh", "-c", talk])
    assert (done.returncode, done.stdout, done.stderr) == (3, "1\n2\n3\n4\n5\n", "end\n")


def test_a_silent_job_ends_with_all_its_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "PATIENCE", 2.0)
    with pytest.raises(AssertionError, match=r"^2 s without a sign of life: .*\n\d+\n") as error:
        run_to_end(["sh", "-c", "sleep 3600 & echo $!; wait"])
    rank = int(str(error.value).splitlines()[1])
    wait_until(lambda: not alive(rank))


def alive(pid: int) -> bool:
    """Whether it runs; killed, it may stay in the table until its new parent has asked for its end."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_a_sign_of_life_renews_the_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "PATIENCE", 0.5)
    start = time.monotonic()
    assert wait_until(lambda: time.monotonic() - start > 1.5 and "there", lambda: int((time.monotonic() - start) * 10))
    with pytest.raises(AssertionError, match="0 s without a sign of life: a tale of two ranks"):
        wait_until(lambda: False, what=lambda: "a tale of two ranks")


ENDS = [  # last words of a script, exit code, stdout, the end of stderr
    ("pass", 0, "begun\nthread\nat exit\n", ""),
    ("sys.exit('no such file')", 1, "begun\nthread\nat exit\n", "no such file\n"),
    ("sys.exit(85)", 85, "begun\nthread\nat exit\n", ""),
    ("raise KeyError('oops')", 1, "begun\nthread\nat exit\n", "KeyError: 'oops'\n"),
    ("os.kill(os.getpid(), 9)", -signal.SIGKILL, "begun\n", ""),
]


@pytest.mark.parametrize(("words", "code", "out", "err"), ENDS, ids=range(len(ENDS)))
def test_a_forked_script_ends_as_a_started_one(tmp_path: Path, words: str, code: int, out: str, err: str) -> None:
    """Its threads first, then what it registered, and nothing of the server's is left of it."""
    script = tmp_path / "script.py"
    script.write_text(
        "import atexit, os, sys, threading, time\nprint('begun', flush=True)\natexit.register(print, 'at exit')\n"
        f"threading.Thread(target=lambda: (time.sleep(0.2), print('thread'))).start()\n{words}\n"
    )
    for fork in (True, False):
        done = run([sys.executable, str(script)], check=False, fork=fork)
        assert (done.returncode, done.stdout) == (code, out) and done.stderr.endswith(err), (fork, done)
        assert bool(err) == bool(done.stderr), (fork, done)
