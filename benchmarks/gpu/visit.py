"""Every stage in its own process and time, then the table.

    make bench-gpu              one GPU, 560 s at most, figures into $OUT or runs/gpu; the same command goes on
    make bench-gpu DRY=1        tiny models on the CPU, into runs/gpu_dry

    ceilings                    what the card can do: TB/s of a copy, TFLOP/s at XL's shapes
    smoke, engine, warm         at once: is it right, is it right through DeepSpeed, and the compiler's cache on disk
    speed                       images per second and memory of whole models
    profile                     tables of kernels
    layer                       the MoE layer, its products and its memory-bound kernels

A stage that is late is stopped; one that breaks the device is started again behind what broke it. SIGTERM and Ctrl-C
end the visit with a page of what was found; after a kill the same command goes on.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.common import ROOT
from benchmarks.gpu.figures import FILE, append, read
from benchmarks.gpu.stages import MARGIN, STAGES
from benchmarks.gpu.tables import page
from promoe_ds.config.errors import reject
from promoe_ds.utils.command_line import Parser
from promoe_ds.utils.files import write_text

SECONDS = 560.0
STARTS = 4
"""of one stage, at most"""
LAST_WORDS = 4.0
"""seconds at the end for the table"""


@dataclass
class Visit:
    folder: Path
    dry: bool
    seconds: float
    begin: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        return self.seconds - LAST_WORDS - (time.monotonic() - self.begin)

    def begin_stage(self, name: str, seconds: float) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "benchmarks.gpu.stages", name, "--out", str(self.folder)]
        command += ["--seconds", str(max(0.0, seconds - MARGIN)), *(["--dry"] if self.dry else [])]
        print(f"{time.monotonic() - self.begin:4.0f} s: {name}", flush=True)
        with (self.folder / f"{name}.log").open("ab") as log:
            return subprocess.Popen(
                command, cwd=ROOT, env=environment(self.dry), stdout=log, stderr=log, start_new_session=True
            )

    def run(self, names: list[str]) -> None:
        """The stages in order; those that name another run beside it."""
        for name in names:
            beside = [other for other in names if STAGES[other].beside == name]
            if STAGES[name].beside not in names:
                self.together([*beside, name])

    def together(self, names: list[str]) -> None:
        """Run these at once, each to its end or until its time is over."""
        ends = {name: time.monotonic() + min(STAGES[name].seconds, self.left) for name in names}
        starts = dict.fromkeys(names, 1)
        live = {name: self.begin_stage(name, ends[name] - time.monotonic()) for name in names}
        try:
            while live:
                time.sleep(0.05)
                for name, process in list(live.items()):
                    late = process.poll() is None and time.monotonic() > ends[name]
                    if process.poll() is None and not late:
                        continue
                    del live[name]
                    end(process)
                    if self.closed(name, process.returncode, late) and starts[name] < STARTS and not late:
                        starts[name] += 1
                        live[name] = self.begin_stage(name, ends[name] - time.monotonic())
        finally:
            for process in live.values():
                end(process)

    def closed(self, name: str, code: int, late: bool) -> bool:
        """Keep what a stage was at when it was stopped or died; returns whether to start it again."""
        now = self.folder / f"{name}.now"
        if code and not now.exists():
            print(f"        {name}: exit {code}, see {name}.log", flush=True)
        if now.exists():
            words = "stopped, its stage was late" if late else f"the process died with {code}"
            card = next((f["device"] for f in reversed(read(self.folder)) if f["stage"] == name), "unknown")
            append(self.folder, {"stage": name, "name": now.read_text(), "device": card, "failed": words})
            now.unlink()
        return code != 0


def end(process: subprocess.Popen[bytes]) -> None:
    """The process and all that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def environment(dry: bool) -> dict[str, str]:
    """One cache of the compiler for all stages; it is large, and stays out of what comes back."""
    cache = os.environ.get("TORCHINDUCTOR_CACHE_DIR", f"/tmp/bench_gpu_inductor_{os.getuid()}")
    chosen = {"TORCHINDUCTOR_CACHE_DIR": cache, "PYTHONUNBUFFERED": "1"}
    chosen |= {"OMP_NUM_THREADS": "1"} if dry else {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    return os.environ | chosen


def forget_failures(folder: Path) -> None:
    """They are tried again by a new visit."""
    figures = read(folder)
    for now in folder.glob("*.now"):
        now.unlink()
    if any("failed" in f for f in figures):
        kept = [f for f in figures if "failed" not in f]
        (folder / FILE).rename(folder / f"{FILE}.before")
        for figure in kept:
            append(folder, figure)


def check_device(dry: bool) -> None:
    """Raises ConfigError without a GPU."""
    import torch

    if not dry and not torch.cuda.is_available():
        reject("make bench-gpu", torch.__version__, "torch sees no CUDA GPU", "add DRY=1 to try it on the CPU")


def run(words: list[str]) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="tiny models on the CPU")
    parser.add_argument("--out", type=Path, metavar="DIR", help="(default: $OUT, else runs/gpu or runs/gpu_dry)")
    text = f"comma-separated, of {','.join(STAGES)} (default all)"
    parser.add_argument("--stages", default=",".join(STAGES), metavar="NAME[,NAME]", help=text)
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"in all (default {SECONDS:.0f})")
    args = parser.parse_args(words)
    names = args.stages.split(",")
    for name in names:
        if name not in STAGES:
            reject("--stages", name, "is no stage", f"choose of {','.join(STAGES)}")
    if args.seconds <= MARGIN:
        reject("--seconds", args.seconds, "is too short", f"choose more than {MARGIN:.0f}")
    folder = args.out or Path(os.environ.get("OUT") or ("runs/gpu_dry" if args.dry else "runs/gpu"))
    if folder.exists() and not folder.is_dir():
        reject("--out", folder, "is not a folder", "choose another")
    check_device(args.dry)
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    forget_failures(folder)
    # `timeout` and schedulers send it: the stages end, and the page has what they found.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        Visit(folder, args.dry, args.seconds).run([name for name in STAGES if name in names])
    finally:
        text = page(read(folder))
        write_text(folder / "page.md", text)
        print(text)
