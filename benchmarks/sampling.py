"""Speed of sampling against another checkout of this project, window by window in turns.

    git worktree add ../before COMMIT
    OMP_NUM_THREADS=1 python benchmarks/sampling.py --against ../before

Each system is a process of its own that holds the model and draws when it is told to. Of 5 Euler steps the interval
[100, 900] guides 4, as it does 201 of 250. Weights are random: the arithmetic does not depend on them, and routing is
as skewed as when training begins. Wall time says what a busy machine let through, so the process's own seconds (user
and system, all threads) are compared too.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
STEPS, SCALE = 5, 1.5
INTERVAL = (100.0, 900.0)

CHILD = """
import sys, time, hashlib
import numpy as np, torch
from promoe_ds.models.init import build, materialize
try:
    from promoe_ds.recipes.load import load_config
    from promoe_ds.sampling.generate import SamplingOptions, draw_batches
except ImportError:  # where they were at 329fab2
    from promoe_ds.config import load_config
    from promoe_ds.sampling import How as SamplingOptions, draw_batches

recipe, images, steps, scale, interval, how = sys.argv[1:]
config = load_config(recipe)
model = materialize(build(config), 0)
generator = torch.Generator().manual_seed(0)
with torch.no_grad():
    for p in model.parameters():
        p.add_(0.02 * torch.randn(p.shape, generator=generator))
model.eval().requires_grad_(False)
if how == "compiled":
    from promoe_ds.models.compiled import compile_model
    compile_model(model, frozen=True)
more = {} if interval == "none" else {"interval": tuple(map(float, interval.split(",")))}
options = SamplingOptions(float(scale), int(steps), batch=int(images), **more)
labels = indices = np.arange(int(images))
for line in sys.stdin:
    begin, cpu = time.perf_counter(), time.process_time()
    ((_, x),) = draw_batches(model, config, labels, indices, options, torch.device("cpu"))
    digest = hashlib.blake2b(x.numpy().tobytes(), digest_size=8).hexdigest()
    print(time.perf_counter() - begin, time.process_time() - cpu, digest, flush=True)
"""


class System:
    """A checkout that draws in a process of its own."""

    def __init__(self, checkout: Path, recipe: str, images: int, interval: str, how: str = "eager"):
        words = [recipe, str(images), str(STEPS), str(SCALE), interval, how]
        self.child = subprocess.Popen(
            [sys.executable, "-c", CHILD, *words],
            cwd=checkout,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def draw(self) -> tuple[float, float, str]:
        """Seconds of the clock and of the process, and a digest of the images."""
        assert self.child.stdin and self.child.stdout
        self.child.stdin.write("draw\n")
        self.child.stdin.flush()
        wall, cpu, digest = self.child.stdout.readline().split()
        return float(wall), float(cpu), digest

    def end(self) -> None:
        assert self.child.stdin
        self.child.stdin.close()
        self.child.wait()


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--against", type=Path, required=True, metavar="DIR", help="checkout of another commit")
    p.add_argument("--recipe", default="imagenet256_promoe_s")
    p.add_argument("--images", type=int, default=4)
    p.add_argument("--rounds", type=int, default=7)
    p.add_argument("--compile", action="store_true", help="the same by launchers/sample.py --compile, too")
    args = p.parse_args()
    interval = ",".join(f"{end:g}" for end in INTERVAL)
    systems = {
        "before": System(args.against, args.recipe, args.images, "none"),
        "now": System(ROOT, args.recipe, args.images, "none"),
        f"now, guided in [{interval}]": System(ROOT, args.recipe, args.images, interval),
    }
    if args.compile:
        systems["now, compiled"] = System(ROOT, args.recipe, args.images, "none", "compiled")
        systems[f"now, compiled, guided in [{interval}]"] = System(ROOT, args.recipe, args.images, interval, "compiled")
    try:
        digests = {name: system.draw()[2] for name, system in systems.items()}  # warm-up
        seconds = [[system.draw()[:2] for system in systems.values()] for _ in range(args.rounds)]
    finally:
        for system in systems.values():
            system.end()
    times_RST = np.array(seconds)
    ratio_RST = times_RST[:, :1] / times_RST
    print("| system | process seconds per image | times as fast | by the clock | images |\n|---|---|---|---|---|")
    for s, name in enumerate(systems):
        wall, cpu = (
            f"{np.median(r):.3f} ({r.min():.3f} to {r.max():.3f})" for r in (ratio_RST[:, s, 0], ratio_RST[:, s, 1])
        )
        per_image = np.median(times_RST[:, s, 1]) / args.images
        same = "the same to the bit" if digests[name] == digests["before"] else "others"
        print(f"| {name} | {per_image:.3f} | {cpu} | {wall} | {same} |")


if __name__ == "__main__":
    main()
