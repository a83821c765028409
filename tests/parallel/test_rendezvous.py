"""Where processes cannot meet: one line that names address, port and the option, soon, from every launcher alike."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from promoe_ds.config.errors import ConfigError
from promoe_ds.parallel import rendezvous
from promoe_ds.utils.ranks import Ranks
from tests.launch import ENVIRONMENT, ROOT, free_port, run
from tests.sample_folder import write_run

A_DAY = 24 * 60
A_MOMENT = 0.01
"""minutes"""
PORT_OPTION = "choose another: deepspeed --master_port, torchrun --master-port, or MASTER_PORT"


@pytest.fixture
def stranger() -> Iterator[int]:
    """The port of another program on this machine, which never answers."""
    with rendezvous.listen(0) as server:
        yield server.getsockname()[1]


def refusal(monkeypatch: pytest.MonkeyPatch, host: str, port: object, rank: int = 0, minutes: float = A_DAY) -> str:
    """What the rank of a job of two is told, in this process."""
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("MASTER_ADDR", host)
    monkeypatch.setenv("MASTER_PORT", str(port))
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    with pytest.raises(ConfigError) as caught:
        rendezvous.join("gloo", Ranks(rank, 2), minutes=A_DAY, meeting_minutes=minutes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(("host", "where"), [("localhost", "localhost:"), ("::1", "[::1]:")])
def test_a_taken_port(host: str, where: str, stranger: int, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = f"rank 0 cannot listen at {where}{stranger} (Address already in use)"
    assert refusal(monkeypatch, host, stranger) == f"environment MASTER_PORT={stranger}: {problem}; {PORT_OPTION}"


def test_a_name_without_an_address_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for the day that these ranks would wait for each other."""
    port = free_port()
    way_out = "name the machine of rank 0: deepspeed --master_addr, torchrun --master-addr, or MASTER_ADDR"
    for host, rank in (("no-such-host.invalid", 1), ("no-such-host.invalid", 0), ("[::1]", 1), ("x..y", 1)):
        where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        text = refusal(monkeypatch, host, port, rank)
        assert text.startswith(f"environment MASTER_ADDR={host}: the name in {where} has no address (")
        assert text.endswith(f"; {way_out}")
        monkeypatch.setattr(rendezvous, "NAME_SECONDS", 0.0)


def test_who_does_not_come_is_waited_for_until_the_timeout(stranger: int, monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    text = refusal(monkeypatch, "127.0.0.1", port, rank=1, minutes=A_MOMENT)
    assert f"environment MASTER_ADDR=127.0.0.1: nobody listens at 127.0.0.1:{port} for 0.01 minutes (" in text
    text = refusal(monkeypatch, "127.0.0.1", port, rank=0, minutes=A_MOMENT)
    assert f"environment WORLD_SIZE=2: not all came together at 127.0.0.1:{port} (" in text
    assert "1/2 clients joined" in text
    monkeypatch.setattr(rendezvous, "GRACE_SECONDS", 0.0)
    text = refusal(monkeypatch, "127.0.0.1", stranger, rank=1, minutes=A_MOMENT)
    assert f"MASTER_PORT={stranger}: what listens at 127.0.0.1:{stranger} is not rank 0 of this job" in text


@pytest.mark.parametrize("port", ["abc", "0", "-1", "65536", "1e4", "²"])
def test_no_port(port: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = f"environment MASTER_PORT={port!r}: is no port; choose a number from 1 to 65535"
    assert refusal(monkeypatch, "127.0.0.1", port) == text


@pytest.mark.parametrize(("host", "port", "missing"), [("", "1", "MASTER_ADDR"), ("x", "", "MASTER_PORT")])
def test_half_an_address(host: str, port: str, missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert f"environment {missing}=(not set): WORLD_SIZE=2 processes" in refusal(monkeypatch, host, port)


def meet(world: int, host: str, port: int) -> list[str]:
    """What each process of a job says after a collective."""
    code = (
        "import os, torch; from promoe_ds.parallel import rendezvous; from promoe_ds.utils.ranks import Ranks; "
        f"rendezvous.join('gloo', Ranks(int(os.environ['RANK']), {world}), minutes=1.0); x = torch.ones(1); "
        "torch.distributed.all_reduce(x); print(x.item(), flush=True); torch.distributed.barrier(); os._exit(0)"
    )
    address = {"MASTER_ADDR": host, "MASTER_PORT": str(port)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env=ENVIRONMENT | address | {"RANK": str(r)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for r in range(world)
    ]
    return [rank.communicate()[0].strip() for rank in ranks]


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


@pytest.mark.skipif(not has_ipv6(), reason="no IPv6 on this machine")
def test_processes_meet_by_ipv6() -> None:
    assert meet(2, "::1", free_port()) == ["2.0", "2.0"]


def test_a_process_alone_needs_no_address(stranger: int) -> None:
    assert meet(1, "no-such-host.invalid", stranger) == ["1.0"]


def test_ranks_that_torchrun_starts_again_meet_again(tmp_path: Path) -> None:
    """Its store keeps the addresses of the ranks that died. Rank 1 comes late, when rank 0 might have read them."""
    script = tmp_path / "rank.py"
    script.write_text(
        "import os, time, torch; from promoe_ds.parallel import rendezvous; from promoe_ds.utils.ranks import Ranks\n"
        "rank, attempt = int(os.environ['RANK']), int(os.environ['TORCHELASTIC_RESTART_COUNT'])\n"
        "time.sleep(2 * rank * attempt)\n"
        "rendezvous.join('gloo', Ranks(rank, 2), minutes=1.0); x = torch.ones(1); torch.distributed.all_reduce(x)\n"
        "os.write(1, f'attempt {attempt} rank {rank} {x.item()}\\n'.encode())\n"  # one write: the ranks share a file
        "torch.distributed.barrier(); os._exit(0 if attempt else 1)\n"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = run([*torchrun, "--max-restarts=1", str(script)])
    assert all(f"attempt {attempt} rank {rank} 2.0" in done.stdout for attempt in (0, 1) for rank in (0, 1))


def test_a_name_that_is_lost_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Known at first, when nobody listened yet."""
    answers: list[OSError] = [ConnectionRefusedError(111, "Connection refused")]

    def connect(*_: object, **__: object) -> None:
        raise answers.pop() if answers else socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "create_connection", connect)
    text = refusal(monkeypatch, "localhost", free_port(), rank=1, minutes=A_MOMENT)
    assert "nobody listens at localhost" in text


def commands(folder: Path) -> dict[str, list[str]]:
    """One of each launcher whose ranks meet."""
    model, samples = write_run(folder / "run"), folder / "samples.npz"
    np.savez(samples, arr_0=np.zeros((4, 8, 8, 1), np.uint8))
    sample = ["sample.py", "--model", model, "--num", 2, "--steps", 2, "--device", "cpu", "--out", folder / "drawn"]
    features = ["--features", "digits-cnn", "--out", folder / "features.safetensors"]
    found = {
        "train": ["train.py", "--config", "tiny", "--run", folder / "new"],
        "sample": sample,
        "share experts": [*sample, "--expert-parallel", 2],
        "evaluate": ["evaluate.py", "features", samples, *features],
    }
    return {name: [str(ROOT / f"launchers/{words[0]}"), *map(str, words[1:])] for name, words in found.items()}


def test_every_launcher_tells_it_alike(stranger: int, tmp_path: Path) -> None:
    """Started as plain srun does: by nothing but variables."""
    rank0 = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    environment = ENVIRONMENT | rank0 | {"MASTER_PORT": str(stranger)}
    problem = f"rank 0 cannot listen at 127.0.0.1:{stranger} (Address already in use)"
    expected = f"error: environment MASTER_PORT={stranger}: {problem}; {PORT_OPTION}\n"
    for name, command in commands(tmp_path).items():
        done = run([sys.executable, *command], check=False, env=environment, cwd=tmp_path, fork=True)
        assert (done.returncode, done.stderr) == (2, expected), name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "samples.npz"], "nothing is written"


def test_ranks_of_the_deepspeed_launcher_tell_it_once(stranger: int, tmp_path: Path) -> None:
    """Rank 1 meets the stranger, which tells it nothing."""
    deepspeed = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus=2", f"--master_port={stranger}", "--"]
    command = [*deepspeed, *commands(tmp_path)["sample"]]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, cwd=tmp_path)
    output = done.stdout + done.stderr
    told = [line for line in output.splitlines() if "error: " in line]
    assert done.returncode == 2 and len(told) == 1, output
    assert f"127.0.0.1:{stranger} (Address already in use); {PORT_OPTION}" in told[0]
    assert "Traceback" not in output and "frame #" not in output
