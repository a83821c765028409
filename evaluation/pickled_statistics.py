"""Statistics in a pickle, which is how edm2 keeps them, without running what else a pickle may hold.

The reader knows the few names by which NumPy pickles an array and stands in for each of them, so that a file can do
no more than describe arrays, numbers, strings, lists and dictionaries.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np

KINDS = "fiu"
"""of NumPy's kinds, those that are numbers"""


class _Dtype:
    """Stands in for `numpy.dtype`: code, such as f8, and byte order."""

    def __init__(self, code: str, *_: object) -> None:
        self.dtype = np.dtype(str(code))
        if self.dtype.kind not in KINDS:
            raise pickle.UnpicklingError(f"an array of {code}")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.dtype = self.dtype.newbyteorder(state[1] if state[1] in "<>" else "=")


class _Array:
    """Stands in for `numpy.ndarray`."""

    array = np.empty(0)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, data = state
        self.array = _decoded(data, dtype, shape, "F" if fortran else "C")


def _decoded(data: bytes, dtype: _Dtype, shape: tuple[int, ...], order: Any) -> np.ndarray:
    return np.frombuffer(data, dtype.dtype).reshape(shape, order=order)


def _reconstruct(*_: object) -> _Array:
    return _Array()


def _frombuffer(data: bytes, dtype: _Dtype, shape: tuple[int, ...], order: str) -> _Array:
    made = _Array()
    made.array = _decoded(data, dtype, shape, order)
    return made


def _encode(text: str, encoding: str) -> bytes:
    """How protocols below 3 write bytes."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes in {encoding}")
    return text.encode("latin1")


CORES = "numpy.core", "numpy._core"
"""before NumPy 2 and since"""
STAND_INS: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): "ndarray",
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _encode,
    **{(f"{core}.multiarray", "_reconstruct"): _reconstruct for core in CORES},
    **{(f"{core}.numeric", "_frombuffer"): _frombuffer for core in CORES},
}


class _Reader(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        if (module_name, global_name) not in STAND_INS:
            raise pickle.UnpicklingError(f"{module_name}.{global_name} is refused")
        return STAND_INS[module_name, global_name]


def read_pickled_statistics(path: Path) -> dict[str, dict[str, np.ndarray]]:
    """Name of a metric -> its arrays: the dictionaries of arrays in a pickled dictionary; other entries are left out.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no such file, or holds what is refused; says what.
    """
    with path.open("rb") as file:
        try:
            found = _Reader(file).load()
        except OSError:
            raise
        except Exception as error:  # a damaged pickle may raise anything
            raise ValueError(" ".join(str(error).split()) or type(error).__name__) from error
    if not isinstance(found, dict):
        raise ValueError(f"is a {type(found).__name__}, no dictionary")
    return {
        str(metric): {str(key): value.array for key, value in arrays.items() if isinstance(value, _Array)}
        for metric, arrays in found.items()
        if isinstance(arrays, dict)
    }
