#!/usr/bin/env bash
# datasets: load_dataset("webdataset") takes the columns of a data set from the first five samples of the first tar. What
# the sixth sample and all later ones call otherwise is dropped, and what they lack is None, without a word.
#
# Within the first five it is an error ("the files in the archive don't share the same prefix or the same types"). ImageNet
# is full of .JPEG beside tools that write .jpg: samples from another tool, in a later tar, load as labels without pictures.
#
# Seen with datasets 5.2.0, Python 3.11; one tar of 12 samples KEY.jpg + KEY.cls:
#   .jpeg instead of .jpg from sample 6 on: 12 samples, 5 pictures
#   .JPEG instead of .jpg from sample 6 on: 12 samples, 5 pictures
#   sample 6 has no .cls:                   12 samples, 12 pictures, label 6 is None
#   sample 5 has no .cls:                   ValueError
# Exits with 1 if that changes.
set -euo pipefail
# shellcheck source=findings/environment.sh
. "$(dirname "$0")/environment.sh"
install datasets==5.2.0 pillow==13.0.0
cd "$folder"
HF_HUB_OFFLINE=1 HF_HOME="$folder/home" HF_DATASETS_DISABLE_PROGRESS_BARS=1 "$folder/venv/bin/python" - <<'PYTHON'
import io
import sys
import tarfile

from datasets import load_dataset
from PIL import Image

Image.new("RGB", (16, 16), "red").save(buffer := io.BytesIO(), "jpeg")


def loaded(title, suffix="jpg", without=None):
    """Samples 1 to 12; the suffix of pictures from sample 6 on, and the sample that has no label."""
    name = title.replace(" ", "_") + ".tar"
    with tarfile.open(name, "w") as tar:
        for number in range(1, 13):
            files = {suffix if number > 5 else "jpg": buffer.getvalue(), "cls": b"7"}
            if number == without:
                del files["cls"]
            for kind, data in files.items():
                entry = tarfile.TarInfo(f"{number:04d}.{kind}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    try:
        samples = load_dataset("webdataset", data_files=name, split="train")
    except ValueError as error:
        assert "the same prefix or the same types" in str(error)
        found = "ValueError"
    else:
        pictures = sum(picture is not None for picture in samples["jpg"])
        nones = [number for number, label in enumerate(samples["cls"], 1) if label is None]
        found = (len(samples), pictures, nones)
    print(f"{title}: {found}")
    return found


found = [
    loaded("jpeg from sample 6 on", "jpeg"),
    loaded("JPEG from sample 6 on", "JPEG"),
    loaded("sample 6 has no label", without=6),
    loaded("sample 5 has no label", without=5),
]
sys.exit(found != [(12, 5, []), (12, 5, []), (12, 12, [6]), "ValueError"])
PYTHON
