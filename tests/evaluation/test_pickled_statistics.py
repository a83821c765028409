"""Statistics in edm2's pickles: read as NumPy reads them, and nothing else in a pickle is run."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launchers import evaluate
from promoe_ds.config.errors import ConfigError
from promoe_ds.evaluation.metrics import frechet_distance
from promoe_ds.evaluation.pickled_statistics import read_pickled_statistics
from promoe_ds.evaluation.reference import find_reference
from tests.evaluation.random_dinov2 import SMALL, write_dinov2
from tests.evaluation.random_inception import pictures


def statistics(d: int, seed: int = 0) -> dict[str, np.ndarray]:
    factor = np.random.default_rng(seed).standard_normal((d, 2 * d))
    return {"mu": factor[:, 0], "sigma": factor @ factor.T / d}


@pytest.mark.parametrize("protocol", range(6))
def test_arrays_are_those_that_numpy_reads(protocol: int, tmp_path: Path):
    stats: dict[str, Any] = {"num_images": 10, "fid": statistics(3), "fd_dinov2": statistics(4, 1)}
    stats["fid"]["sigma"] = np.asfortranarray(np.arange(9.0).reshape(3, 3))
    stats["fid"]["mu"] = np.arange(3, dtype=">f4")
    (tmp_path / "s.pkl").write_bytes(pickle.dumps(stats, protocol))
    found = read_pickled_statistics(tmp_path / "s.pkl")
    assert list(found) == ["fid", "fd_dinov2"]
    for metric, arrays in found.items():
        for key, array in arrays.items():
            np.testing.assert_array_equal(array, stats[metric][key])
    old = pickle.dumps(stats, protocol).replace(b"numpy._core", b"numpy.core") if protocol < 4 else b""
    if old:  # as NumPy 1 wrote it
        (tmp_path / "s.pkl").write_bytes(old)
        np.testing.assert_array_equal(read_pickled_statistics(tmp_path / "s.pkl")["fid"]["mu"], stats["fid"]["mu"])


class Opens:
    """A harmless stand-in for code: makes a file when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), "w")


def by_numpy(mark: Path) -> bytes:
    """The same through a function of NumPy that opens files."""
    return b"cnumpy\nsave\n(V" + str(mark).encode() + b"\nI1\ntR."


@pytest.mark.parametrize("where", ["alone", "in a dictionary", "in an array", "by numpy"])
def test_code_is_refused_and_never_run(where: str, tmp_path: Path):
    mark = tmp_path / "mark"
    held: Any = {
        "alone": Opens(mark),
        "in a dictionary": {"fid": {"mu": Opens(mark)}},
        "in an array": {"fid": {"mu": np.array([Opens(mark)], dtype=object)}},
        "by numpy": None,
    }[where]
    data = by_numpy(mark) if held is None else pickle.dumps(held)
    pickle.loads(data)
    written = [path for path in tmp_path.iterdir()]
    assert written, "it must do harm where nobody is careful"
    for path in written:
        path.unlink()
    (tmp_path / "s.pkl").write_bytes(data)
    with pytest.raises(ConfigError, match="is no file of statistics") as caught:
        find_reference(str(tmp_path / "s.pkl"))
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["s.pkl"]


def test_damaged_files_raise_one_kind_of_error(tmp_path: Path):
    whole, path = pickle.dumps({"fid": statistics(2)}), tmp_path / "s.pkl"
    rng = np.random.default_rng(0)
    for case in range(100):
        data = bytearray(whole)
        data[rng.integers(len(data))] ^= int(rng.integers(1, 256))
        path.write_bytes(data[: rng.integers(len(data))] if case % 4 == 0 else data)
        try:
            read_pickled_statistics(path)
        except ValueError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("held", "expected"),
    [
        ([1], "is a list, no dictionary"),
        ({}, "holds no statistics, needs mu and sigma of fid or fd_dinov2"),
        ({"fvd": statistics(2)}, "holds fvd, needs mu and sigma"),
        ({"fid": {"sigma": np.eye(2)}}, "holds fid, needs mu and sigma"),
        ({"fid": {"mu": np.zeros(3), "sigma": np.eye(2)}}, r"mu is \(3,\), sigma is \(2, 2\)"),
        ({"fid": {"mu": np.zeros(2), "sigma": np.full((2, 2), np.inf)}}, "sigma holds what is no finite number"),
    ],
)
def test_statistics_that_are_none(held: object, expected: str, tmp_path: Path):
    (tmp_path / "s.pkl").write_bytes(pickle.dumps(held))
    with pytest.raises(ConfigError, match=expected):
        find_reference(str(tmp_path / "s.pkl"))


def test_scores_of_edm2_and_mar_references(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    path, ref, out = write_dinov2(tmp_path, monkeypatch), tmp_path / "img.pkl", tmp_path / "m.json"
    theirs = statistics(SMALL.width)
    ref.write_bytes(pickle.dumps({"fid": statistics(20), "fd_dinov2": theirs}))
    np.savez(tmp_path / "a.npz", arr_0=pictures(9, 1))
    command = [str(tmp_path / "a.npz"), "--out", str(out), "--device", "cpu"]
    dinov2 = ["--features", "dinov2", "--dinov2-weights", str(path)]
    assert evaluate.main([*command, "--ref", str(ref), *dinov2]) == 0
    by_pickle = json.loads(out.read_text())
    np.savez(tmp_path / "mar.npz", **theirs)  # mu and sigma alone, as MAR's and JiT's files
    assert evaluate.main([*command, "--ref", str(tmp_path / "mar.npz"), *dinov2]) == 0
    by_npz = json.loads(out.read_text())
    name = f"FD[{by_pickle['features']}]"
    assert by_pickle[name] == by_npz[name] > 0 and by_pickle["reference"]["num"] is None
    assert not any(key.startswith(("KD", "precision")) for key in by_pickle)  # these need the images
    ref.write_bytes(pickle.dumps({"fid": statistics(20)}))
    capsys.readouterr()
    assert evaluate.main([*command, "--ref", str(ref), *dinov2]) == 2
    assert "holds statistics of inception, --features is dinov2:" in capsys.readouterr().err


def test_the_distance_is_edm2s_formula():
    linalg = pytest.importorskip("scipy.linalg")
    one, two = statistics(12), statistics(12, 1)
    root = np.real(linalg.sqrtm(one["sigma"] @ two["sigma"]))
    expected = np.square(one["mu"] - two["mu"]).sum() + np.trace(one["sigma"] + two["sigma"] - 2 * root)
    assert frechet_distance(*one.values(), *two.values()) == pytest.approx(expected, rel=1e-8)
