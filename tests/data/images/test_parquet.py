"""Pictures in Parquet: columns, row groups and pages of all kinds, and what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.image_layouts import as_old_parquet, write_parquet
from promoe_ds.config.errors import ConfigError
from promoe_ds.data.images import parquet as parquet_images
from tests.data.image_files import ITEMS, LABELS, opened, told


def test_columns_of_other_names(tmp_path: Path) -> None:
    """CIFAR-10 at Hugging Face: `img`, and the one ClassLabel; pictures as plain bytes."""
    features = {"img": {"_type": "Image"}, "coarse": {"names": ["a", "b", "c"], "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    for column in (kind, pa.large_binary()):
        schema = pa.schema([("img", column), ("coarse", pa.int8()), ("text", pa.string())], metadata)
        rows = [data if column != kind else {"bytes": data} for _, data, _ in ITEMS]
        columns = {"img": rows, "coarse": LABELS, "text": ["x"] * 11}
        for how in ({}, {"use_dictionary": False, "compression": "none"}):
            pq.write_table(pa.table(columns, schema), tmp_path / "a.parquet", **how)
            data = opened(tmp_path / "a.parquet")
            assert data.classes == ["a", "b", "c"] and [data.read(i) for i in range(11)] == [d for _, d, _ in ITEMS]


def test_row_groups_are_read_once_in_order_and_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[int] = []
    read = pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        pq.ParquetFile, "read_row_group", lambda self, i, *a, **k: decoded.append(i) or read(self, i, *a, **k)
    )
    data = opened(as_old_parquet(tmp_path / "old", ITEMS))
    for index in range(11):
        data.read(index)
    assert decoded == [0, 1, 0, 1] and data.note == ""  # 6 and 5 rows, four of them a group
    plain = opened(write_parquet(tmp_path / "plain", ITEMS))
    plain.get(np.arange(11))
    assert len(decoded) == 4
    monkeypatch.setattr(parquet_images, "DEAR", 1000)
    assert "one that is drawn at random costs a row group, up to 0 MB" in opened(tmp_path / "old").note
    assert opened(tmp_path / "plain").note == ""


def test_values_of_all_sizes_are_found(tmp_path: Path) -> None:
    """Statistics of short values make long headers of pages; content-defined chunks, checksums, an index of pages."""
    sizes = [1, 5, 127, 128, 4_000, 4_097, 70_000, 3]
    values = [np.random.default_rng(size).bytes(size) for size in sizes] * 3
    items = [(f"{i:05d}.jpeg", value, i % 3) for i, value in enumerate(values)]
    for number, how in enumerate([
        {}, {"data_page_version": "2.0"}, {"data_page_size": 5_000, "write_batch_size": 2},
        {"use_content_defined_chunking": True, "write_page_index": True, "write_page_checksum": True},
    ]):  # fmt: skip
        data = opened(write_parquet(tmp_path / str(number), items, files=1, row_group_size=24, **how))
        assert data._groups["plain"].all()
        assert [data.read(i) for i in range(24)] == values and data._known.all()
    other = {"column_encoding": {"image.bytes": "DELTA_LENGTH_BYTE_ARRAY"}}
    data = opened(write_parquet(tmp_path / "other", items, files=1, **other))
    assert [data.read(i) for i in range(24)] == values and not data._known.any()


def test_a_row_group_that_cannot_be_decoded_is_in_nobodys_way() -> None:
    """Another thread may finish its own, and count what is kept, at the moment the first one's error is known."""
    kept, heard = parquet_images._Kept(), []
    whole = pa.chunked_array([[b"1"]])

    def damaged() -> pa.ChunkedArray:
        kept._groups[1].add_done_callback(lambda _: heard.append(kept.get(2, lambda: whole)))
        raise OSError("damaged")

    with pytest.raises(OSError, match="damaged"):
        kept.get(1, damaged)
    assert heard == [whole] and list(kept._groups) == [2]


def test_cut_and_damaged_parquet(tmp_path: Path) -> None:
    for write in (write_parquet, as_old_parquet):
        file = sorted(write(tmp_path / write.__name__, ITEMS).iterdir())[0]
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
        assert f"data.path={file}: is no whole Parquet file (" in told(file.parent)
        file.write_bytes(b"")
        assert f"data.path={file}: is empty, 0 bytes; copy or write the file again" in told(file.parent)
        file.write_bytes(whole)
        data = opened(file.parent)
        place = whole.index(ITEMS[1][1][:40]) if write is write_parquet else 30
        file.write_bytes(whole[: place - 4] + b"\xff\xff\xff\x7f" + whole[place:])
        os.utime(file, ns=(1, data._archives[0].modified_ns))
        with pytest.raises(ConfigError, match=r"\(row 1\): cannot be read"):
            data.read(1)


@pytest.mark.parametrize(
    "described",
    [
        [],
        {"info": {"features": [1]}},
        {"info": {"features": {"label": {"_type": "ClassLabel"}}}},
        {"info": {"features": {"label": {"_type": "ClassLabel", "names": 3}}}},
        {"info": {"features": {"label": {"_type": "ClassLabel", "names": [1, 2, 3]}}}},
    ],
)
def test_metadata_of_another_form(tmp_path: Path, described: Any) -> None:
    rows, path = [{"bytes": data} for _, data, _ in ITEMS], tmp_path / "a.parquet"
    table = pa.table({"image": rows, "label": LABELS})
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(described)}), path)
    assert f"data.path={path}: its schema's metadata `huggingface` does not describe columns" in told(path)
    for nothing in ({}, {"info": None}, {"info": {"features": None}}):
        pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(nothing)}), path)
        assert opened(path).classes == ["0", "1", "2"]


def test_parquet_without_what_is_needed(tmp_path: Path) -> None:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = [{"bytes": data, "path": name} for name, data, _ in ITEMS]
    path = tmp_path / "a.parquet"

    def refused(message: str, **columns: Any) -> None:
        pq.write_table(pa.table(columns), path, use_dictionary=False, compression="none")
        assert f"data.path={path}" in (text := told(path)) and message in text

    empty = pa.array([{"bytes": None, "path": "/somewhere/a.jpg"}, *rows[1:]], kind)
    refused("has 1 picture(s) without bytes in row group 0; embed the pictures' files", image=empty, label=LABELS)
    refused("has no column of pictures (`image` with `bytes`), but label", label=LABELS)
    refused("has no column `label` of integers, but image", image=rows)
    refused("has no column `label` of integers, but image (struct<bytes: binary, path: string>), label (string)",
            image=rows, label=["cat"] * 11)  # fmt: skip
    refused("of integers, but image (struct<bytes: binary, path: string>), label (null); give", image=rows,
            label=pa.nulls(11))  # fmt: skip
    refused("of pictures (`image` with `bytes`), but image (null), label (int64);", image=pa.nulls(11), label=LABELS)
    refused("has 11 picture(s) without bytes", image=pa.nulls(11, kind), label=LABELS)
    refused("has 1 row(s) without a label", image=rows, label=[None, *LABELS[1:]])
    refused("(row 3): has the label -1, and labels begin at 0", image=rows, label=[0, 1, 2, -1, *LABELS[4:]])
    refused("(row 2): holds no bytes", image=[*rows[:2], {"bytes": b"", "path": "x"}, *rows[3:]], label=LABELS)
    refused("(row 2): is not an image", image=[*rows[:2], {"bytes": b"text", "path": "x"}, *rows[3:]], label=LABELS)
    pq.write_table(pa.table({"image": pa.array([], kind), "label": pa.array([], pa.int64())}), path)
    assert f"data.path={path}: holds no rows in 1 Parquet file(s); name files with pictures" in told(path)
    pq.write_table(pa.table({"image": pa.nulls(0), "label": pa.nulls(0)}), path)
    assert f"data.path={path}: has no rows, so no pictures; name files with pictures" in told(path)
    pq.write_table(pa.table({}), path)
    assert f"data.path={path}: has no rows, so no pictures" in told(path)
    root = write_parquet(tmp_path / "two", ITEMS)
    write_parquet(tmp_path / "other", ITEMS, classes=0)
    os.replace(tmp_path / "other/train-00001-of-00002.parquet", root / "train-00001-of-00002.parquet")
    assert "00001-of-00002.parquet: has other columns or class names than train-00000-of-00002.parquet" in told(root)
    write_parquet(root, [(name, data, label + 1) for name, data, label in ITEMS], classes=3)
    assert "(row 2): has the label 3, outside the 3 classes; give every row one of the classes" in told(root)
