#!/usr/bin/env python
"""Kill a training run again and again, restart it at other topologies, and compare its loss curve with a calm run.

    python benchmarks/chaos.py --kills 20 --seed 0 [--max-world 4] [--keep DIR] [--out benchmarks/results/chaos.md]

Ranks are started one by one with RANK, WORLD_SIZE and MASTER_ADDR, as plain `srun` does: nobody ends the others when
one dies. A blow is kill -9, SIGTERM or SIGUSR2, to one rank or to all, at a random step, during a save, or during the
start, on a disk slow enough that a save takes a second (`slow_disk.py`); the first blow meets the first save of the
run. The calm run is launchers/train.py as it is. Exit code 1 for each of these:

- a loss deviates from the calm run's by more than 1e-5 (relative), or a final EMA weight by more than 1e-5;
- a step of the calm run is missing in the log after the last restart, or is there twice;
- a signal does not end every rank with 85 and the marker, or costs a step; a kill costs more than two intervals;
- after kill -9 to one rank another ends with 0 or 85, or, if all were connected, anything but one message names it;
- a kill during a save leaves no half-written checkpoint; a job does not end by itself.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.common import ema_difference, page, read_log, table  # noqa: E402
from benchmarks.processes import free_port, wait_until  # noqa: E402

LOSS_TOLERANCE, EMA_TOLERANCE = 1e-5, 1e-5
"""relative; absolute: topologies alone differ by 2.2e-6 (Adam enlarges the rounding of small gradients), one optimizer
step by 1.2e-3"""
CHECKPOINT_EVERY = 5
STEPS_PER_KILL = 5
DISK_SECONDS = 0.6
"""that every file of a checkpoint takes; rank 0 writes two"""
TIMEOUT_MINUTES = 3
"""of the runs: how long ranks wait for one that dies before all are connected; later the watchdog needs a second"""
SLOW = "benchmarks/slow_disk.py"
TOPOLOGIES = [  # world, ep, ZeRO stage
    *((1, 1, 0), (1, 1, 1), (1, 1, 2), (2, 1, 1), (2, 2, 0), (2, 2, 1), (2, 2, 2), (2, 2, 3), (2, 1, 3)),
    *((4, 1, 2), (4, 2, 0), (4, 2, 1), (4, 2, 2), (4, 2, 3), (4, 4, 2)),
]


@dataclass(frozen=True)
class Blow:
    number: signal.Signals
    everyone: bool
    moment: str
    """step, save or start"""

    def __str__(self) -> str:
        whom = "all ranks" if self.everyone else "one rank"
        when = {"step": "", "save": " during a save", "start": " while starting"}[self.moment]
        return f"{self.number.name} to {whom}{when}"


BLOWS = [
    *(Blow(signal.SIGKILL, everyone, moment) for everyone in (False, True) for moment in ("step", "save")),
    *(Blow(signal.SIGTERM, False, "step"), Blow(signal.SIGTERM, True, "save"), Blow(signal.SIGKILL, False, "start")),
    *(Blow(signal.SIGUSR2, False, "step"), Blow(signal.SIGUSR2, True, "step"), Blow(signal.SIGUSR2, True, "start")),
]


class Job:
    """Ranks of a script like launchers/train.py without a launcher above them; their output lies in `outputs`.

    A context that leaves no process behind.

    Args:
        start: a process, as `subprocess.Popen` does.
    """

    def __init__(
        self,
        arguments: list[str],
        world: int,
        outputs: Path,
        script: str = "launchers/train.py",
        start: Callable[..., Any] = subprocess.Popen,
    ):
        outputs.mkdir(parents=True, exist_ok=True)
        self.files = [outputs / f"rank{rank}.txt" for rank in range(world)]
        port, self.began = free_port(), time.time()
        self.ranks = [
            start(
                [sys.executable, "-u", str(ROOT / script), *arguments],
                env=os.environ | {
                    "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT),
                    "SLOW_DISK_SECONDS": str(DISK_SECONDS),
                },
                stdin=subprocess.DEVNULL, stdout=file.open("w"), stderr=subprocess.STDOUT,
            )
            for rank, file in enumerate(self.files)
        ]  # fmt: skip

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.ranks:
            process.kill()
            process.wait()

    def output(self) -> str:
        return "".join(file.read_text(errors="replace") for file in self.files)

    def step(self) -> int:
        """The last step that rank 0 has logged."""
        return max((int(n) for n in re.findall(r"^step (\d+)/", self.files[0].read_text(), re.MULTILINE)), default=0)

    def resumed_at(self) -> int | None:
        """The step that this job started from; None if it never came to training."""
        text = self.files[0].read_text()
        found = re.search(r"resuming at step (\d+) of", text)
        return int(found[1]) if found else 0 if ": starting of" in text else None

    def connected(self) -> bool:
        """Whether every rank's watchdog is up (slow_disk.py says so)."""
        return all(re.search("^connected$", file.read_text(), re.MULTILINE) for file in self.files)

    def saving(self, run: Path) -> bool:
        """Whether files of a checkpoint that this job has begun lie in its temporary folder."""
        with suppress(FileNotFoundError):  # renamed meanwhile
            files = (run / "checkpoints").glob("tmp_step_*/*.safetensors")
            return any(path.stat().st_mtime > self.began for path in files)
        return False

    def running(self) -> bool:
        return any(process.poll() is None for process in self.ranks)

    def listening(self) -> bool:
        """Whether every rank has its handlers (Linux: the mask of caught signals)."""
        bit = 1 << (signal.SIGUSR2 - 1)
        masks = (Path(f"/proc/{p.pid}/status").read_text() for p in self.ranks)
        return all(int(re.search(r"SigCgt:\s*(\w+)", mask)[1], 16) & bit for mask in masks)  # type: ignore[index]

    def written(self) -> int:
        """Bytes of output so far: the job's sign of life."""
        return sum(file.stat().st_size for file in self.files)

    def wait_until(self, condition: Callable[[], bool]) -> None:
        if wait_until(lambda: "true" if condition() else not self.running(), self.written, self.output) != "true":
            raise RuntimeError(f"ended early, with {self.codes()}:\n{self.output()[-3000:]}")

    def send(self, number: signal.Signals, ranks: list[int]) -> None:
        for rank in ranks:
            if self.ranks[rank].poll() is None:
                self.ranks[rank].send_signal(number)

    def codes(self) -> list[int | None]:
        return [process.poll() for process in self.ranks]

    def wait(self) -> list[int]:
        """Exit codes of all ranks, which must end by themselves."""
        wait_until(lambda: not self.running(), self.written, self.output)
        return [process.wait() for process in self.ranks]


@dataclass
class Strike:
    """What is to be done, and what came of it."""

    blow: Blow
    topology: tuple[int, int, int]
    victims: list[int]
    target: int
    """step from which on to strike"""
    delay: float
    """from the moment to the blow, as a share of the longest: a step, half a file, a start"""
    start: int | None = None
    last: int = 0
    """last step logged"""
    connected: bool = False
    """every rank, when the blow fell"""
    half_written: bool = False
    """a checkpoint, at the end"""
    seconds: float = 0.0
    """from the blow to the end of the last rank"""
    codes: list[int] = field(default_factory=list)
    marker: bool = False
    told: list[str] = field(default_factory=list)
    """the error messages of all ranks"""
    repeated: int = 0
    """steps that later jobs had to make again"""

    def cells(self) -> list[Any]:
        steps = ("-", "-") if self.start is None else (self.start, max(self.last, self.start))
        lists = [", ".join(map(str, each)) for each in (self.victims, self.topology, self.codes)]
        return [self.blow, *lists, *steps, f"{self.seconds:.1f}", "yes" if self.half_written else "", self.repeated,
                "<br>".join(self.told)]  # fmt: skip

    def faults(self) -> Iterator[str]:
        """What was promised and did not hold."""
        if self.blow.number != signal.SIGKILL:
            if set(self.codes) != {85} or not self.marker or self.repeated:
                yield "not every rank ended with 85, the marker, and every step saved"
            return
        others = [code for rank, code in enumerate(self.codes) if rank not in self.victims]
        if any(self.codes[rank] != -signal.SIGKILL for rank in self.victims) or {0, 85} & set(others):
            yield "the survivors ended as if nothing had happened"
        if others and self.connected:
            named = rf"rank {self.victims[0]} (\(.*, pid \d+\) )?died without a word"
            if len(self.told) != 1 or not re.match(named, self.told[0]):
                yield f"not one message that names rank {self.victims[0]}"
        if not 0 <= self.repeated <= 2 * CHECKPOINT_EVERY:
            yield f"{self.repeated} steps repeated"
        if self.blow.moment == "save" and not self.half_written:
            yield "no half-written checkpoint: the blow missed the save"
        if self.marker and self.start is not None:  # a start removes the marker of the one before
            yield "a marker after kill -9"


class Chaos:
    """A run under `kills` blows, and the calm run it is compared with; both lie in `folder`.

    Args:
        popen: starts the ranks, unless the blow is to fall while they start.
    """

    def __init__(
        self, kills: int, seed: int, folder: Path, max_world: int, popen: Callable[..., Any] = subprocess.Popen
    ):
        self.popen = popen
        self.folder, self.steps = folder, STEPS_PER_KILL * kills + 4 * CHECKPOINT_EVERY
        self.random = random.Random(seed)
        self.topologies = [t for t in TOPOLOGIES if t[0] <= max_world]
        blows = [blow for _ in range(0, kills, len(BLOWS)) for blow in self.random.sample(BLOWS, len(BLOWS))]
        first = next(b for b in blows if b.number == signal.SIGKILL and b.moment == "save")  # of the run's first save
        blows.remove(first)
        self.strikes = [self.plan(i, blow) for i, blow in enumerate([first, *blows][:kills])]
        self.reached, self.charged = 0, self.strikes[0]
        self.lost, self.disordered, self.loss_deviation, self.ema_deviation = self.steps, True, math.inf, math.inf

    def plan(self, i: int, blow: Blow) -> Strike:
        topology = self.random.choice(self.topologies)
        victims = list(range(topology[0])) if blow.everyone else [self.random.randrange(topology[0])]
        target = i * STEPS_PER_KILL + self.random.randint(1, STEPS_PER_KILL)
        return Strike(blow, topology, victims, target, self.random.random())

    def start(
        self,
        topology: tuple[int, int, int],
        name: str,
        run: str = "run",
        script: str = SLOW,
        popen: Callable[..., Any] | None = None,
    ) -> Job:
        world, ep, stage = topology
        arguments = [
            *("--config", "tiny", "--run", str(self.folder / run)),
            *("--ds_config", str(ROOT / f"ds_configs/zero{stage}.json"), f"parallel.expert_parallel={ep}"),
            *(f"train.steps={self.steps}", f"train.checkpoint_every={CHECKPOINT_EVERY}"),
            f"parallel.timeout_minutes={TIMEOUT_MINUTES}",
        ]
        return Job(arguments, world, self.folder / "outputs" / name, script, popen or self.popen)

    def measure(self) -> None:
        with self.start((1, 1, 0), "calm", "calm", "launchers/train.py") as calm:
            assert calm.wait() == [0], calm.output()
        for i, strike in enumerate(self.strikes):
            self.strike(i, strike)
            print(f"{i + 1}/{len(self.strikes)}", *strike.cells(), sep=" | ", flush=True)
        with self.start(self.random.choice(self.topologies), "last") as last:
            assert not any(last.wait()), last.output()
            self.account(last)
        self.compare()

    def strike(self, i: int, strike: Strike) -> None:
        """Start, wait for the moment, strike, and wait for the end of every rank."""
        popen = subprocess.Popen if strike.blow.moment == "start" else None
        with self.start(strike.topology, str(i), popen=popen) as running:
            self.await_moment(running, strike)
            strike.connected, began = running.connected(), time.monotonic()
            running.send(strike.blow.number, strike.victims)
            strike.codes = running.wait()
            strike.seconds = time.monotonic() - began
            self.account(running, strike)
            strike.start, strike.last = running.resumed_at(), running.step()
            strike.half_written = running.saving(self.folder / "run")
            strike.marker = (self.folder / "run" / "requeue").exists()
            strike.told = re.findall(r"^error: (.*)", running.output(), re.MULTILINE)

    def await_moment(self, running: Job, strike: Strike) -> None:
        if strike.blow.moment == "start":  # imports, connection, first step
            running.wait_until(running.listening)
            end = time.monotonic() + 8 * strike.delay
            running.wait_until(lambda: time.monotonic() > end or running.step() > 0)
            return
        running.wait_until(lambda: running.step() >= strike.target)
        if strike.blow.moment == "save":
            running.wait_until(lambda: running.saving(self.folder / "run"))
        time.sleep(strike.delay * (DISK_SECONDS / 2 if strike.blow.moment == "save" else 0.1))

    def account(self, ended: Job, strike: Strike | None = None) -> None:
        """Steps reached before that this job made again count against the last blow to a job that trained."""
        start = ended.resumed_at()
        if start is not None:
            self.charged.repeated = self.reached - start
            self.charged, self.reached = strike or self.charged, ended.step() or start

    def compare(self) -> None:
        """The log after the last restart and the last weights, with those of the calm run."""
        folders = self.folder / "calm", self.folder / "run"
        calm, log = map(read_log, folders)
        true, losses = ({record["step"]: record["loss"] for record in records} for records in (calm, log))
        self.lost = len(true.keys() - losses.keys())
        self.disordered = [record["step"] for record in log] != sorted(losses)
        self.loss_deviation = max(abs(losses[s] / true[s] - 1) if s in losses else math.inf for s in true)
        self.ema_deviation = ema_difference(*folders, self.steps)

    def faults(self) -> list[str]:
        """What was promised and did not hold."""
        out = [f"kill {i + 1}: {fault}" for i, strike in enumerate(self.strikes) for fault in strike.faults()]
        if not self.loss_deviation <= LOSS_TOLERANCE:  # nan is a fault, too
            out.append(f"a loss deviates by {self.loss_deviation:.1e}")
        if not self.ema_deviation <= EMA_TOLERANCE:
            out.append(f"an EMA weight deviates by {self.ema_deviation:.1e}")
        if self.lost or self.disordered:
            out.append(f"{self.lost} steps are lost{', steps are logged twice' if self.disordered else ''}")
        return out


def report(chaos: Chaos, seconds: float) -> str:
    half, repeated = (sum(getattr(s, name) for s in chaos.strikes) for name in ("half_written", "repeated"))
    kills = len(chaos.strikes)
    summary = (
        f"**{kills} kills, {kills} restarts, {chaos.steps} steps, {half} half-written checkpoints left, "
        f"{repeated} steps repeated, lost steps = {chaos.lost}, largest deviation of the loss "
        f"{chaos.loss_deviation:.1e} (relative), of the final EMA weights {chaos.ema_deviation:.1e} (absolute).**"
    )
    method = f"""\
It took {seconds / 60:.0f} min at a load of {os.getloadavg()[2]:.0f}. Recipe `tiny`, fp32, a checkpoint every
{CHECKPOINT_EVERY} steps, {DISK_SECONDS} s per file. The calm run is one process at ZeRO-0 with the disk as it is."""
    legend = f"""\
`seconds`: from the blow to the end of the last rank, with nobody above the ranks to end them. A rank that dies before
all are connected is waited for (`parallel.timeout_minutes={TIMEOUT_MINUTES}`). `half-written`: a checkpoint that the
blow cut off. `repeated`: steps made again later. `told`: every error message."""
    columns = "|blow|ranks|world, ep, ZeRO|exit codes|from step|to step|seconds|half-written|repeated|told".split("|")
    blows = table(columns, [[i + 1, *strike.cells()] for i, strike in enumerate(chaos.strikes)])
    faults = [f"FAULT: {fault}" for fault in chaos.faults()]
    return page("Chaos", "benchmarks/chaos.py", sys.argv[1:], method, summary, *faults, legend, blows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default, text in (("kills", 20, ""), ("seed", 0, ""), ("max-world", 4, "most ranks of a job (4)")):
        parser.add_argument(f"--{name}", type=int, default=default, help=text)
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep runs and outputs in this new folder")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the report to this file")
    args = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        chaos = Chaos(args.kills, args.seed, args.keep or Path(temporary), args.max_world)
        chaos.measure()
    text = report(chaos, time.monotonic() - began)
    print(text)
    if args.out:
        args.out.write_text(text, encoding="utf-8")
    return 1 if chaos.faults() else 0


if __name__ == "__main__":
    sys.exit(main())
