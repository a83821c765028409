"""Images with a `dataset.json`, as the tools of StyleGAN, edm2 and REPA write them."""

from __future__ import annotations

from pathlib import Path

from promoe_ds.config.errors import reject
from promoe_ds.data.images.decoded import DecodedImages
from promoe_ds.data.labelled import LABELS, LabelledFiles, numbered_classes
from promoe_ds.utils.pictures import SUFFIXES


class NumberedImages(DecodedImages):
    """NNNNN/imgNNNNNNNN.png and `dataset.json` with their labels, in a folder or an uncompressed zip: dataset_tool.py
    of NVlabs/stylegan3 and NVlabs/edm2 @4bf8162, preprocessing/dataset_tools.py of sihyun-yu/REPA @67f7145 (the path is
    images/, or the folder above, which holds vae-sd/ too). The folders are a thousand files each, and no classes.

    Raises:
        ConfigError: no `dataset.json`, one without labels or that does not agree with the files, or a label outside the
            classes.
    """

    kind = f"image files with the labels of {LABELS}"

    def __init__(self, path: Path, channels: int, image_size: int, num_classes: int | None = None):
        root = path / "images" if (path / "images" / LABELS).is_file() else path
        self._files = LabelledFiles(root, SUFFIXES, "write the data set again")
        label_N = self._files.label_N
        classes = numbered_classes(label_N, num_classes, self._files.where)
        super().__init__(classes, label_N, channels, image_size, self._files.left_out)

    def name(self, index: int) -> str:
        return self._files.name(index)

    def where(self, index: int) -> str:
        return self._files.where(index)

    def read(self, index: int) -> bytes:
        try:
            return self._files.read(index)
        except OSError as error:
            reject("data.path", self.where(index), f"cannot be read ({error.strerror})", "put the file back")
