#!/usr/bin/env bash
# mosaicml-streaming and litdata: a picture that PIL has opened from a JPEG file is stored as the bytes of that file, whatever
# was done to it in place. `picture.thumbnail((256, 256))`, or drawing on it, leaves a shard of the original pictures, at their
# original size, without a word. What is opened from memory (datasets, webdataset, zip) is compressed again, at quality 75.
#
# One picture of 512x512, JPEG at quality 95. Seen with mosaicml-streaming 0.13.0 (a column "jpeg" of MDSWriter), litdata 0.2.76
# (the serializer of optimize()), Pillow 13.0.0, Python 3.11: width, mean grey, whether the pixels are those of the file.
#   picture             given                what both have stored
#   as opened           (512, 127, True)     (512, 127, True)
#   thumbnail in place  (256, 127, False)    (512, 127, True)
#   painted white       (512, 255, False)    (512, 127, True)
#   from memory         (512, 127, True)     (512, 127, False)
# Exits with 1 if that changes.
set -euo pipefail
# shellcheck source=findings/environment.sh
. "$(dirname "$0")/environment.sh"
install torch==2.13.0 numpy pillow==13.0.0 litdata==0.2.76 mosaicml-streaming==0.13.0
cat >"$folder/write.py" <<'PYTHON'
import importlib.util
import io
import sys
import tempfile
import types
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

# streaming/__init__.py imports torchvision for data sets of its own; the writer and the reader need none of them
package = types.ModuleType("streaming")
package.__path__ = importlib.util.find_spec("streaming").submodule_search_locations
sys.modules["streaming"] = package

from litdata.streaming.serializers import JPEGSerializer  # noqa: E402
from streaming.base import MDSWriter, StreamingDataset  # noqa: E402

top = Path(sys.argv[1])
file = top / "picture.jpg"
ramp = np.linspace(0, 255, 512) + np.zeros((512, 1))
pixels = np.stack([ramp, ramp.T, ramp], -1) + np.random.default_rng(0).normal(0, 8, (512, 512, 3))
Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, quality=95)


def thumbnail():
    picture = Image.open(file)
    picture.thumbnail((256, 256))
    return picture


def painted():
    picture = Image.open(file)
    ImageDraw.Draw(picture).rectangle((0, 0, 511, 511), fill="white")
    return picture


PICTURES = {
    "as opened": lambda: Image.open(file),
    "thumbnail in place": thumbnail,
    "painted white": painted,
    "from memory": lambda: Image.open(io.BytesIO(file.read_bytes())),
}


def mds(picture):
    folder = tempfile.mkdtemp(dir=top)
    with MDSWriter(out=folder, columns={"x": "jpeg"}) as writer:
        writer.write({"x": picture})
    (row,) = StreamingDataset(local=folder, batch_size=1)
    return row["x"]


def litdata(picture):
    """By what optimize() picks for such a picture."""
    assert JPEGSerializer().can_serialize(picture)
    return Image.open(io.BytesIO(JPEGSerializer().serialize(picture)[0]))


def seen(picture):
    values = np.asarray(picture)
    return picture.width, round(float(values.mean())), np.array_equal(values, np.asarray(Image.open(file)))


table = {}
for name, make in PICTURES.items():
    table[name] = [seen(make()), seen(mds(make())), seen(litdata(make()))]
    print(name, *table[name])
expected = {
    "as opened": [(512, 127, True)] * 3,
    "thumbnail in place": [(256, 127, False), (512, 127, True), (512, 127, True)],
    "painted white": [(512, 255, False), (512, 127, True), (512, 127, True)],
    "from memory": [(512, 127, True), (512, 127, False), (512, 127, False)],
}
raise SystemExit(table != expected)
PYTHON
"$folder/venv/bin/python" "$folder/write.py" "$folder" 2>/dev/null
