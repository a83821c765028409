#!/usr/bin/env bash
# datasets: a function given to Dataset.map that looks at a picture, if only at its width, has every picture stored anew: a
# JPEG as a JPEG of Pillow's default quality, 75, whatever it had, one with an EXIF rotation turned and as a PNG, and all
# without the names of their files. Nothing is said. An FID against such pictures is another.
#
# They are kept with input_columns=["image"], by a function that does not look at them, by filter, and where the column is cast
# to Image(decode=False) before and the function opens the bytes.
#
# Seen with datasets 5.2.0, Pillow 13.0.0, Python 3.11; two JPEGs of quality 95, the second with an EXIF rotation:
#   before: 49101 bytes, 1.JPEG, JPEG 256x256; 24882 bytes, 2.JPEG, JPEG 256x128
#   map(whole_row): 17184 bytes, None, JPEG 256x256; 72533 bytes, None, PNG 128x256
#   map(what_it_adds): 17184 bytes, None, JPEG 256x256; 72533 bytes, None, PNG 128x256
#   map(what_it_adds, batched): 17184 bytes, None, JPEG 256x256; 72533 bytes, None, PNG 128x256
#   map(input_columns), map(another_column), filter, decode=False and map(of_bytes): as before
#   levels by which the first changed in map(whole_row): up to 48
# Exits with 1 if that changes.
set -euo pipefail
# shellcheck source=findings/environment.sh
. "$(dirname "$0")/environment.sh"
install datasets==5.2.0 pillow==13.0.0 numpy
cd "$folder"
HF_HUB_OFFLINE=1 HF_HOME="$folder/home" HF_DATASETS_DISABLE_PROGRESS_BARS=1 "$folder/venv/bin/python" - <<'PYTHON'
import io
import sys

import numpy as np
from datasets import Dataset, Features, Image, Value
from PIL import Image as Pillow

# A photograph's spectrum, quality 95.
draw = np.random.default_rng(0)
waves = np.fft.fftfreq(256)
spectrum = draw.standard_normal((256, 256, 3)) / np.maximum(np.hypot(waves[:, None], waves), 1 / 256)[..., None]
levels = np.fft.ifft2(spectrum, axes=(0, 1)).real
levels = ((levels - levels.min()) / np.ptp(levels) * 255).astype(np.uint8)
Pillow.fromarray(levels).save(buffer := io.BytesIO(), "jpeg", quality=95)
turned = Pillow.Exif()
turned[0x0112] = 6  # Orientation: a camera held upright
Pillow.fromarray(levels[:128]).save(upright := io.BytesIO(), "jpeg", quality=95, exif=turned)
files = [{"bytes": buffer.getvalue(), "path": "1.JPEG"}, {"bytes": upright.getvalue(), "path": "2.JPEG"}]
row = {"image": files, "label": [0, 1]}
pictures = Dataset.from_dict(row, features=Features({"image": Image(), "label": Value("int64")}))


def whole_row(row):
    row["width"] = row["image"].width
    return row


def what_it_adds(row):
    return {"width": row["image"].width}


def another_column(row):
    return {"label": row["label"] + 1}


def of_bytes(row):
    return {"width": Pillow.open(io.BytesIO(row["image"]["bytes"])).width}


def stored(dataset):
    images = [(x["path"], x["bytes"]) for x in dataset.with_format("arrow")[:]["image"].to_pylist()]
    opened = [Pillow.open(io.BytesIO(data)) for _, data in images]
    told = "; ".join(
        f"{len(data)} bytes, {path}, {x.format} {x.width}x{x.height}" for (path, data), x in zip(images, opened, strict=True)
    )
    return told, np.asarray(opened[0]).astype(int)


maps = {
    "before": pictures,
    "map(whole_row)": pictures.map(whole_row),
    "map(what_it_adds)": pictures.map(what_it_adds),
    "map(what_it_adds, batched)": pictures.map(lambda rows: {"width": [x.width for x in rows["image"]]}, batched=True),
    "map(input_columns)": pictures.map(lambda image: {"width": image.width}, input_columns=["image"]),
    "map(another_column)": pictures.map(another_column),
    "filter": pictures.filter(lambda row: row["image"].width > 0),
    "decode=False, map(of_bytes)": pictures.cast_column("image", Image(decode=False)).map(of_bytes),
}
found = {name: stored(dataset) for name, dataset in maps.items()}
for name, (told, _) in found.items():
    print(f"{name}: {told}")
far = int(abs(found["map(whole_row)"][1] - found["before"][1]).max())
print(f"levels by which the first changed in map(whole_row): up to {far}")
anew = [name for name, (told, _) in found.items() if told != found["before"][0]]
sys.exit(anew != ["map(whole_row)", "map(what_it_adds)", "map(what_it_adds, batched)"] or far < 10)
PYTHON
