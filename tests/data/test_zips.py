"""Uncompressed zips: cut off, damaged, compressed, and of more than 32 bits."""

from __future__ import annotations

import struct
import zipfile
from pathlib import Path

import numpy as np

from promoe_ds.config.schema import DataConfig
from promoe_ds.data.caches import open_latents
from tests.data.cache_files import drawn, told, write_mean_std


def test_rejected_zips(tmp_path: Path) -> None:
    path = write_mean_std(tmp_path / "a.zip")
    whole = path.read_bytes()
    path.write_bytes(whole[:-30])
    assert f"data.path={path}: is not a whole zip (it has no directory at its end)" in told(path)
    long = bytearray(whole)
    struct.pack_into("<L", long, long.index(b"PK\1\2") + 24, len(long))  # a file as long as all of them
    path.write_bytes(long)
    assert "00000/img-mean-std-00000000.npy reaches beyond its end" in told(path)
    at = whole.index(b"img-mean-std-00000003.npy") + 300
    path.write_bytes(whole[:at] + b"\xff" + whole[at + 1 :])
    assert f"data.path={path} (00000/img-mean-std-00000003.npy): does not match its checksum" in told(path, "edm2")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("dataset.json", "{}" * 99)
    assert "dataset.json is compressed: zip it with -0" in told(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("pictures.txt", "none")
    assert f"data.path={path} (dataset.json): is not names and labels (KeyError: 'it has no such file')" in told(path)
    assert "a.zi: is no cache of latents: looked for" in told(path.rename(path.with_suffix(".zi")))


def test_zips_of_more_than_32_bits(tmp_path: Path) -> None:
    """The directory of a zip whose last file begins after 4 GiB; the file is sparse."""
    path = write_mean_std(tmp_path / "a.zip")
    expected = drawn(open_latents(path, DataConfig(format="edm2")))[0]
    with zipfile.ZipFile(path) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    with path.open("wb") as file:
        file.seek(2**32 + 5)
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            for name, data in contents.items():
                with archive.open(name, "w", force_zip64=True) as entry:
                    entry.write(data)
    np.testing.assert_array_equal(drawn(open_latents(path, DataConfig(format="edm2")))[0], expected)
