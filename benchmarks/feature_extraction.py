"""Images a second of Inception's feature extraction: random weights, 256x256 pictures, hashing and moments included.

python benchmarks/feature_extraction.py --batch 8 --num 16 --repeats 5
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np  # noqa: E402
import torch  # noqa: E402

from promoe_ds.evaluation.collect import Collector  # noqa: E402
from promoe_ds.evaluation.inception import Inception, InceptionV3  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--num", type=int, default=256, help="images a repetition")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "random.pth"
        torch.save(InceptionV3().state_dict(), path)
        extractor = Inception(path, args.device, args.batch)
    images = np.random.default_rng(0).integers(0, 256, (args.num, 256, 256, 3), np.uint8)
    Collector(extractor).add(images[: args.batch])
    rates = []
    for _ in range(args.repeats):
        start = time.perf_counter()
        Collector(extractor).add(images)
        rates.append(args.num / (time.perf_counter() - start))
    print(
        f"{args.device}, {torch.get_num_threads()} threads, batch {args.batch}: median {statistics.median(rates):.2f} "
        f"images/s, {min(rates):.2f} to {max(rates):.2f} over {args.repeats} repetitions of {args.num} images"
    )


if __name__ == "__main__":
    main()
