#!/usr/bin/env python
"""Kill a training run again and again, restart it at other topologies, and compare its loss curve with a calm run.

    python benchmarks/chaos.py --kills 20 --seed 0 [--max-world 4] [--keep DIR] [--out benchmarks/results/chaos.md]

Ranks are started one by one with RANK, WORLD_SIZE and MASTER_ADDR, as plain `srun` does: nobody ends the others when
one dies. A blow is kill -9, SIGTERM or SIGUSR2, to one rank or to all, at a random step, during a save, or during the
start. Exit code 1 if a loss differs by more than 1e-5 (relative), a step is lost, a step is repeated after a signal, or
a job does not end by itself.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOLERANCE = 1e-5
CHECKPOINT_EVERY = 5
STEPS_A_KILL = 5
TIMEOUT_MINUTES = 1
"""of the runs: how long ranks wait for one that dies before all are connected; later the watchdog needs a second"""
END_SECONDS = 300.0
"""by then a job must have ended after a blow, on a busy machine"""
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
    Blow(signal.SIGKILL, False, "step"),
    Blow(signal.SIGTERM, False, "step"),
    Blow(signal.SIGKILL, False, "save"),
    Blow(signal.SIGUSR2, True, "step"),
    Blow(signal.SIGKILL, True, "step"),
    Blow(signal.SIGUSR2, False, "step"),
    Blow(signal.SIGKILL, True, "save"),
    Blow(signal.SIGTERM, True, "save"),
    Blow(signal.SIGKILL, False, "start"),
    Blow(signal.SIGUSR2, True, "start"),
]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Job:
    """Ranks of a script like launchers/train.py without a launcher above them; their output lies in `outputs`."""

    def __init__(self, arguments: list[str], world: int, outputs: Path, script: str = "launchers/train.py"):
        outputs.mkdir(parents=True, exist_ok=True)
        self.files = [outputs / f"rank{rank}.txt" for rank in range(world)]
        port = free_port()
        self.ranks = [
            subprocess.Popen(
                [sys.executable, "-u", str(ROOT / script), *arguments],
                env=os.environ | {
                    "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT),
                },
                stdin=subprocess.DEVNULL, stdout=file.open("w"), stderr=subprocess.STDOUT,
            )
            for rank, file in enumerate(self.files)
        ]  # fmt: skip

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

    def running(self) -> bool:
        return any(process.poll() is None for process in self.ranks)

    def listening(self) -> bool:
        """Whether every rank has its handlers (Linux: the mask of caught signals)."""
        bit = 1 << (signal.SIGUSR2 - 1)
        masks = (Path(f"/proc/{p.pid}/status").read_text() for p in self.ranks)
        return all(int(re.search(r"SigCgt:\s*(\w+)", mask)[1], 16) & bit for mask in masks)  # type: ignore[index]

    def wait_until(self, condition: Callable[[], bool], seconds: float = 120.0) -> None:
        end = time.monotonic() + seconds
        while not condition():
            if not self.running():
                raise RuntimeError(f"ended early, with {self.codes()}:\n{self.output()[-3000:]}")
            if time.monotonic() > end:
                raise RuntimeError(f"nothing for {seconds} s:\n{self.output()[-3000:]}")
            time.sleep(0.002)

    def send(self, number: signal.Signals, ranks: list[int]) -> None:
        for rank in ranks:
            if self.ranks[rank].poll() is None:
                self.ranks[rank].send_signal(number)

    def codes(self) -> list[int | None]:
        return [process.poll() for process in self.ranks]

    def wait(self, seconds: float = END_SECONDS) -> list[int]:
        """Exit codes of all ranks, which must end by themselves."""
        end = time.monotonic() + seconds
        return [process.wait(max(0.0, end - time.monotonic())) for process in self.ranks]


@contextmanager
def job(arguments: list[str], world: int, outputs: Path, script: str = "launchers/train.py") -> Iterator[Job]:
    """A `Job` that leaves no process behind."""
    started = Job(arguments, world, outputs, script)
    try:
        yield started
    finally:
        for process in started.ranks:
            process.kill()
            process.wait()


@dataclass
class Strike:
    """What was done, and what came of it."""

    blow: Blow
    topology: tuple[int, int, int]
    victims: list[int]
    start: int | None = None
    last: int = 0
    """last step logged"""
    seconds: float = 0.0
    """from the blow to the end of the last rank"""
    codes: list[int] = field(default_factory=list)
    marker: bool = False
    told: str = ""
    """what the survivors said"""
    repeated: int = 0
    """steps that the next job had to make again"""


@dataclass
class Chaos:
    kills: int
    seed: int
    folder: Path
    max_world: int
    say: Callable[[str], None] = print

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.steps = STEPS_A_KILL * self.kills + 2 * CHECKPOINT_EVERY
        self.topologies = [t for t in TOPOLOGIES if t[0] <= self.max_world]
        self.strikes: list[Strike] = []
        self.reached = 0

    def arguments(self, run: str, ep: int, stage: int) -> list[str]:
        return [
            *("--config", "tiny", "--run", str(self.folder / run)),
            *("--ds_config", str(ROOT / f"ds_configs/zero{stage}.json"), f"parallel.expert_parallel={ep}"),
            *(f"train.steps={self.steps}", f"train.checkpoint_every={CHECKPOINT_EVERY}"),
            f"parallel.timeout_minutes={TIMEOUT_MINUTES}",
        ]

    def measure(self) -> float:
        """The largest relative deviation of the loss from the calm run's."""
        with job(self.arguments("calm", 1, 0), 1, self.folder / "outputs" / "calm") as calm:
            assert calm.wait(END_SECONDS + self.steps) == [0], calm.output()
        blows = [blow for _ in range(0, self.kills, len(BLOWS)) for blow in self.random.sample(BLOWS, len(BLOWS))]
        for i, blow in enumerate(blows[: self.kills]):
            self.strikes.append(self.strike(i, blow))
            self.say(f"{i + 1}/{self.kills} {line(self.strikes[-1])}")
        world, ep, stage = self.random.choice(self.topologies)
        with job(self.arguments("run", ep, stage), world, self.folder / "outputs" / "last") as last:
            assert last.wait(END_SECONDS + self.steps) == [0] * world, last.output()
            self.account(last)
        calm_curve, curve = losses(self.folder / "calm"), losses(self.folder / "run")
        self.lost = len(calm_curve.keys() - curve.keys())
        return max(abs(curve[s] - calm_curve[s]) / abs(calm_curve[s]) for s in calm_curve.keys() & curve.keys())

    def strike(self, i: int, blow: Blow) -> Strike:
        """Start at a random topology, wait for the moment, strike, and wait for the end of every rank."""
        world, ep, stage = self.random.choice(self.topologies)
        victims = list(range(world)) if blow.everyone else [self.random.randrange(world)]
        strike = Strike(blow, (world, ep, stage), victims)
        target = i * STEPS_A_KILL + self.random.randint(1, STEPS_A_KILL)
        with job(self.arguments("run", ep, stage), world, self.folder / "outputs" / str(i)) as running:
            self.await_moment(running, blow.moment, target)
            began = time.monotonic()
            running.send(blow.number, victims)
            strike.codes = running.wait()
            strike.seconds = time.monotonic() - began
            self.account(running)
            strike.start, strike.last = running.resumed_at(), running.step()
            strike.marker = (self.folder / "run" / "requeue").exists()
            errors = re.findall(r"^error: (.*)", running.output(), re.MULTILINE)
            strike.told = " | ".join(errors)
        return strike

    def await_moment(self, running: Job, moment: str, target: int) -> None:
        if moment == "start":
            running.wait_until(running.listening)
            time.sleep(self.random.uniform(0, 8))  # imports, connection, first steps
            return
        running.wait_until(lambda: running.step() >= target)
        if moment == "save":
            checkpoints = self.folder / "run" / "checkpoints"
            running.wait_until(lambda: any(checkpoints.glob("tmp_*")))
            time.sleep(self.random.uniform(0, 0.05))
        else:
            time.sleep(self.random.uniform(0, 0.1))

    def account(self, ended: Job) -> None:
        """How many of the steps reached before did this job make again? They count against the blow before it."""
        start = ended.resumed_at()
        if start is None:
            return
        if self.strikes:
            self.strikes[-1].repeated = self.reached - start
        self.reached = ended.step() or start

    def faults(self, deviation: float) -> list[str]:
        """What was promised and did not hold."""
        out = [f"loss deviates by {deviation:.1e}"] if deviation > TOLERANCE else []
        out += [f"{self.lost} steps lost"] if self.lost else []
        for i, strike in enumerate(self.strikes):
            stopped = strike.blow.number != signal.SIGKILL
            if stopped and (set(strike.codes) != {85} or not strike.marker or strike.repeated):
                out.append(f"kill {i + 1}: {line(strike)}")
            if (
                not stopped and strike.marker and strike.start is not None
            ):  # a start removes the marker of the one before
                out.append(f"kill {i + 1}: there is a marker after kill -9")
        return out


def losses(folder: Path) -> dict[int, float]:
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {record["step"]: record["loss"] for record in records}


def line(s: Strike) -> str:
    world, ep, stage = s.topology
    start = "not yet training" if s.start is None else f"steps {s.start} to {max(s.last, s.start)}"
    return (
        f"{s.blow} {s.victims} of (world {world}, ep {ep}, ZeRO-{stage}), {start}: "
        f"ended after {s.seconds:.1f} s with {s.codes}{', marker' if s.marker else ''}{f'; {s.told}' if s.told else ''}"
    )


def summary(chaos: Chaos, deviation: float) -> str:
    repeated = sum(s.repeated for s in chaos.strikes)
    return (
        f"{len(chaos.strikes)} kills, {len(chaos.strikes)} restarts, {chaos.steps} steps, {repeated} steps repeated, "
        f"lost steps = {chaos.lost}, largest deviation of the loss {deviation:.1e}"
    )


def report(chaos: Chaos, deviation: float, seconds: float) -> str:
    import deepspeed
    import torch

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    python = ".".join(map(str, sys.version_info[:3]))
    rows = [
        f"| {i + 1} | {s.blow} | {', '.join(map(str, s.topology))} | {'-' if s.start is None else s.start} "
        f"| {'-' if s.start is None else max(s.last, s.start)} | {s.seconds:.1f} | {' '.join(map(str, s.codes))} "
        f"| {s.repeated} |"
        for i, s in enumerate(chaos.strikes)
    ]
    command = f"python benchmarks/chaos.py --kills {chaos.kills} --seed {chaos.seed} --max-world {chaos.max_world}"
    return "\n".join([
        "# Chaos", "", "| | |", "|---|---|", f"| command | `{command}` |", f"| commit | {commit.strip()} |",
        f"| versions | Python {python}, torch {torch.__version__}, deepspeed {deepspeed.__version__} |",
        f"| device | {os.cpu_count()} CPU cores, gloo, shared with other work |",
        f"| time | {seconds / 60:.0f} min |", "",
        f"Recipe `tiny`, fp32, a checkpoint every {CHECKPOINT_EVERY} steps; the calm run is one process at ZeRO-0.", "",
        f"**{summary(chaos, deviation)}.**", "",
        "`seconds`: from the blow to the end of the last rank, with nobody above the ranks to end them (a rank that "
        f"dies before all are connected is waited for: `parallel.timeout_minutes={TIMEOUT_MINUTES}`). `repeated`: "
        "steps that the next job made again.", "",
        "| | blow | world, ep, ZeRO | from step | to step | seconds | exit codes | repeated |", "|---" * 8 + "|",
        *rows, "",
    ])  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-world", type=int, default=4, help="most ranks of a job (4)")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep runs and outputs in this new folder")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the report to this file")
    args = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        chaos = Chaos(args.kills, args.seed, args.keep or Path(temporary), args.max_world)
        deviation = chaos.measure()
    print(summary(chaos, deviation))
    for fault in (faults := chaos.faults(deviation)):
        print(f"FAULT: {fault}", file=sys.stderr)
    if args.out and not faults:
        args.out.write_text(report(chaos, deviation, time.monotonic() - began), encoding="utf-8")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
