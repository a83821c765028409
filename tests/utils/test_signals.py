"""Requests to stop, in processes of their own that import nothing else."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.processes import PATIENCE, wait_until
from promoe_ds.utils import signals
from tests.launch import ENVIRONMENT, ROOT

pytestmark = pytest.mark.slow  # starts processes, and waits


@pytest.fixture(autouse=True)
def hangups_are_heard() -> Iterator[None]:
    """Under `nohup make test` processes would start with SIGHUP ignored."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def start(body: str, **how: Any) -> subprocess.Popen[str]:
    code = "import os, signal, sys, time\nfrom promoe_ds.utils import signals\n" + textwrap.dedent(body)
    return subprocess.Popen(
        [sys.executable, "-uc", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        cwd=ROOT,
        **how,
    )


def test_a_launcher_listens_before_the_slow_imports() -> None:
    source = (ROOT / "launchers/train.py").read_text()
    assert source.index("signals.listen()") < source.index("from promoe_ds.config.schema")
    process = start("print(sorted(m for m in sys.modules if m in ('torch', 'deepspeed', 'numpy', 'yaml')))")
    assert process.communicate(timeout=PATIENCE)[0] == "[]\n"


def test_first_repeated_and_second_signals() -> None:
    process = start("""
        signals.listen()
        print("ready")
        while signals.requested() is None:
            time.sleep(0.01)
        print(signals.requested())
        signals.REPEAT_SECONDS = 0.5
        time.sleep(60)
    """)
    assert process.stdout and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGUSR2)
    assert process.stdout.readline() == "SIGUSR2\n"
    process.send_signal(signal.SIGTERM)  # the launcher's copy
    time.sleep(1.0)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 128 + signal.SIGTERM
    assert errors == "SIGTERM again: leaving at once; the last checkpoint is unharmed\n"


@pytest.mark.parametrize("number", signals.STOP_SIGNALS)
def test_programs_that_are_started_outlive_a_request_to_the_group(number: signal.Signals) -> None:
    """As Slurm and launchers send it; g++ is one."""
    process = start(
        """
        import subprocess
        signals.listen()
        child = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
        print("ready")
        while signals.requested() is None:
            time.sleep(0.01)
        time.sleep(0.2)
        print(signals.requested(), child.poll())
        child.stdin.close()
        print(child.wait())
        """,
        start_new_session=True,
    )
    assert process.stdout and process.stdout.readline() == "ready\n"
    os.killpg(process.pid, number)
    assert process.communicate(timeout=PATIENCE)[0] == f"{number.name} None\n0\n"


def test_a_repeat_at_the_very_end_does_not_change_the_exit_code() -> None:
    """Python takes back its handlers before modules are cleared."""
    process = start("""
        class Late:
            def __del__(self):
                os.kill(os.getpid(), signal.SIGTERM)
        signals.listen()
        late = Late()
        sys.exit(85)
    """)
    process.communicate(timeout=PATIENCE)
    assert process.returncode == 85


def test_ctrl_c_is_known_behind_its_copy() -> None:
    """A process that comes late to both, as on a busy machine, gets the copy first."""
    process = start("signals.listen(); print('ready'); sys.stdin.readline(); print(signals.requested())")
    assert process.stdin and process.stdout and process.stdout.readline() == "ready\n"
    for number in (signal.SIGSTOP, signal.SIGINT, signal.SIGTERM, signal.SIGCONT):
        process.send_signal(number)
    wait_until(lambda: not pending(process))
    time.sleep(0.2)  # the thread reads what the handlers wrote
    assert process.communicate("\n", timeout=PATIENCE)[0] == "SIGINT\n"


def pending(process: subprocess.Popen[str]) -> int:
    """Signals that wait to be delivered (Linux)."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(status.split("ShdPnd:")[1].split()[0], 16)


def test_a_second_ctrl_c_leaves_at_once() -> None:
    """The SIGTERM by which the deepspeed launcher passes the first one on does not, nor `timeout -s INT`."""
    process = start("signals.CTRL_C_SECONDS = 3.0; signals.listen(); print('ready'); time.sleep(3600)")
    assert process.stdout and process.stderr and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline() == "Ctrl-C: stopping once this step is saved; again to leave at once\n"
    process.send_signal(signal.SIGINT)
    time.sleep(3.0)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert (
        process.communicate(timeout=PATIENCE)[1] == "SIGINT again: leaving at once; the last checkpoint is unharmed\n"
    )
    assert process.returncode == 128 + signal.SIGINT


def test_a_lost_terminal_is_a_request_and_printing_goes_on(tmp_path: Path) -> None:
    """What a closed laptop does to a run in an ssh session; a line printed to the old terminal would be an error."""
    pid, terminal = pty.fork()
    if pid == 0:
        code = f"""
import os, sys, time
from promoe_ds.utils import signals
signals.listen()
print("ready", flush=True)
while signals.requested() is None:
    time.sleep(0.01)
time.sleep(0.2)
print("saving", flush=True)
print("saving", file=sys.stderr, flush=True)
open({str(tmp_path / "saved")!r}, "w").write(signals.requested())
"""
        os.chdir(ROOT)
        os.execve(sys.executable, [sys.executable, "-c", code], ENVIRONMENT)
    said = b""
    while not said.endswith(b"\n"):  # the terminal may pass on a part of the line, and closing it then fails its print
        said += os.read(terminal, 100)
    assert said == b"ready\r\n"
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert (tmp_path / "saved").read_text() == "SIGHUP"


def test_nohup_is_left_as_it_is() -> None:
    process = start("""
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signals.listen()
        os.kill(os.getpid(), signal.SIGHUP)
        time.sleep(0.2)
        print(signals.requested())
    """)
    assert process.communicate(timeout=PATIENCE)[0] == "None\n"


def test_forked_workers_ignore_the_signals_and_do_not_stop_their_parent() -> None:
    process = start("""
        signals.listen()
        child = os.fork()
        if child == 0:
            time.sleep(1.5)
            os._exit(7)
        time.sleep(0.5)
        for number in signals.STOP_SIGNALS:
            os.kill(child, number)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), signals.requested())
    """)
    assert process.communicate(timeout=PATIENCE)[0] == "7 None\n"


def test_marker(tmp_path: Path) -> None:
    signals.remove_marker(tmp_path)  # nothing there, nothing wrong
    signals.write_marker(tmp_path, 12)
    assert (tmp_path / "requeue").read_text() == "stopped by a signal to another rank at step 12\n"
    assert [p.name for p in tmp_path.iterdir()] == ["requeue"]
    signals.remove_marker(tmp_path)
    assert not list(tmp_path.iterdir())
