"""Files that `torch.save` wrote, read without running code."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import torch


class MoreThanTensors(ValueError):
    """A file that asks for more than tensors and plain values."""

    way_out = "get one of tensors alone"


def load_tensors(path: Path, *classes: type, mmap: bool = False) -> Any:
    """The tensors and plain values of a file, on the CPU. torch advises to run the code of what it refuses: its words
    are not passed on.

    Args:
        classes: that are allowed besides.

    Raises:
        OSError: it cannot be read.
        MoreThanTensors: it holds more.
        ValueError: it is damaged, or another kind of file.
    """
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(list(classes)):
            warnings.simplefilter("ignore")  # of pickles that are refused then
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except OSError:
        raise
    except Exception as error:  # torch raises a dozen kinds for a damaged file
        text = " ".join(str(error).split())
        if found := re.search(r"GLOBAL (\S+) (?:was not|whose)", text):
            raise MoreThanTensors(f"it holds more than tensors ({found[1]}), which could run code") from error
        if "weights_only" in text:
            raise MoreThanTensors("it holds more than tensors, which could run code, or none at all") from error
        raise ValueError(f"{type(error).__name__}: {text[:200]}") from error
