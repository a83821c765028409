#!/usr/bin/env bash
# grain: ranks that take their share as its tutorial does, data[rank::ranks], and then call random_map draw the same random numbers.
# The generator depends on the seed and on the place in what random_map is given, which is now the rank's own: the first image of
# each rank has one crop, one time, one noise. Of the 256 times of a batch on 8 ranks 32 differ. grain takes care of its worker
# processes, not of ranks. With random_map before the slice all differ, at no cost, since a MapDataset is lazy; its DataLoader is
# right, too.
#
# DataLoader's IndexSampler, and a shuffle after the slice, do the like to the order of images: each rank keeps its share and puts it
# in the same order as the others. An image then meets the same images of the other ranks in each epoch.
#
# 4,096 images, 8 ranks, batches of 256. Seen with grain 0.2.18, Python 3.11:
#                                        images   different times
#   slice, random_map                       256                32
#   shuffle, slice, random_map              256                32
#   slice, to_iter_dataset, random_map      256                32
#   random_map, slice                       256               256
#   DataLoader                              256               256
#   Groups of 8 images that meet in 3 epochs of 512 steps: shuffle, slice 1,536; slice, shuffle 512; DataLoader 512
# Exits with 1 if that changes.
set -euo pipefail
# shellcheck source=findings/environment.sh
. "$(dirname "$0")/environment.sh"
install numpy grain==0.2.18
cat >"$folder/ranks.py" <<'PYTHON'
from itertools import islice

import grain

IMAGES, RANKS, BATCH, EPOCHS = 4096, 8, 256, 3


def draw(image, generator):
    """An image and the time at which it is trained."""
    return int(image), generator.random()


class Draw(grain.transforms.RandomMap):
    def random_map(self, element, rng):
        return draw(element, rng)


def images():
    return grain.MapDataset.range(IMAGES).seed(1)


def loader(rank, epochs=1):
    share = grain.sharding.ShardOptions(rank, RANKS, drop_remainder=True)
    sampler = grain.samplers.IndexSampler(IMAGES, shard_options=share, shuffle=True, num_epochs=epochs, seed=1)
    return grain.DataLoader(data_source=range(IMAGES), sampler=sampler, operations=[Draw()])


ways = {
    "slice, random_map": (32, lambda rank: images()[rank::RANKS].random_map(draw)),
    "shuffle, slice, random_map": (32, lambda rank: images().shuffle()[rank::RANKS].random_map(draw)),
    "slice, to_iter_dataset, random_map": (32, lambda rank: images()[rank::RANKS].to_iter_dataset().random_map(draw)),
    "random_map, slice": (256, lambda rank: images().random_map(draw)[rank::RANKS]),
    "DataLoader": (256, loader),
}
changed = False
for name, (seen, way) in ways.items():
    batch = [pair for rank in range(RANKS) for pair in islice(way(rank), BATCH // RANKS)]
    seen_images, times = ({pair[k] for pair in batch} for k in (0, 1))
    print(f"{name:35s} images {len(seen_images)}, different times {len(times)}")
    changed |= len(seen_images) != BATCH or len(times) != seen

orders = {
    "shuffle, slice": (1536, lambda rank: images().shuffle()[rank::RANKS].repeat(EPOCHS)),
    "slice, shuffle": (512, lambda rank: images()[rank::RANKS].shuffle().repeat(EPOCHS)),
    "DataLoader": (512, lambda rank: (image for image, _ in loader(rank, EPOCHS))),
}
for name, (seen, order) in orders.items():
    steps = list(zip(*([int(image) for image in order(rank)] for rank in range(RANKS)), strict=True))
    groups = {frozenset(step) for step in steps}
    print(f"{name:15s} {len(groups)} groups of {RANKS} images in {len(steps)} steps")
    changed |= len(groups) != seen
raise SystemExit(changed)
PYTHON
"$folder/venv/bin/python" "$folder/ranks.py" 2>/dev/null
