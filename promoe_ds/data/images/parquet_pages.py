"""Where each value of a column chunk of a Parquet file lies, for chunks whose bytes are stored as they are.

A reader of Parquet decodes whole row groups: one picture of a group of a thousand costs a thousand. But the pages of a
chunk without compression and dictionary hold each value behind its length (encoding PLAIN), so they can be found by
walking over the lengths, once, and read by themselves from then on. pyarrow gives no way to see pages.

The format: github.com/apache/parquet-format, README.md, Encodings.md, and parquet.thrift for the header of a page, in
Thrift's compact protocol (github.com/apache/thrift, doc/specs/thrift-compact-protocol.md).
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np

from promoe_ds.data.archive import Archive
from promoe_ds.data.tars import Window

HEADER = 2**16
"""bytes in which a page's header ends: two values of at most 4,096 bytes, for statistics, are the most of it"""
DATA_PAGE, DATA_PAGE_V2 = 0, 3
PLAIN = 0


def places(archive: Archive, start: int, end: int, rows: int, optional: bool) -> tuple[np.ndarray, np.ndarray]:
    """First byte and length of each value of a chunk: int64 [rows] each.

    Args:
        start: first byte of the chunk, which lies uncompressed, without dictionary, and has no nulls.
        end: first byte behind it.
        rows: number of its values.
        optional: whether the schema allows nulls, so that the pages say which values are there.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not laid out so, or damaged.
    """
    starts, sizes, at = np.empty(rows, np.int64), np.empty(rows, np.int64), start
    window, row = Window(archive), 0
    while row < rows:
        kind, size, count, skipped, at = _page(archive, at, end)
        stop = at + size
        if kind not in (DATA_PAGE, DATA_PAGE_V2) or stop > end or row + count > rows:
            raise ValueError("its pages are damaged")
        if kind == DATA_PAGE:
            skipped = 4 + struct.unpack("<L", window.read(4, at))[0] if optional else 0
        at += skipped
        for i in range(row, row + count):
            (size,) = struct.unpack("<L", window.read(4, at))
            starts[i], sizes[i] = at + 4, size
            at += 4 + size
        row += count
        if at != stop:
            raise ValueError("the lengths of its values do not add up to its pages")
    return starts, sizes


def _page(archive: Archive, at: int, end: int) -> tuple[int, int, int, int, int]:
    """Type of the page at `at`, its bytes, its values, the bytes before them if it is of version 2, where it begins."""
    try:
        header, length = _struct(archive.read(min(HEADER, end - at), at), 0)
        kind, size = header[1], header[3]
        data = header[5] if kind == DATA_PAGE else header[8]
        encoding, skipped = (data[2], 0) if kind == DATA_PAGE else (data[4], data[5] + data[6])
    except (IndexError, KeyError, TypeError):
        raise ValueError("the header of a page is damaged") from None
    if encoding != PLAIN:
        raise ValueError(f"a page is of encoding {encoding}")
    return kind, size, data[1], skipped, at + length


def _struct(data: bytes, at: int) -> tuple[dict[int, Any], int]:
    """Fields of a struct by number, and where it ends. Raises IndexError where it is cut off."""
    fields, number = {}, 0
    while head := data[at]:
        at += 1
        if head >> 4:
            number += head >> 4
        else:
            number, at = _integer(data, at)
        fields[number], at = _value(data, at, head & 15)
    return fields, at + 1


def _value(data: bytes, at: int, kind: int) -> tuple[Any, int]:
    if kind in (1, 2):  # a boolean is its type
        return kind == 1, at
    if kind in (4, 5, 6):
        return _integer(data, at)
    if kind == 8:
        length, at = _varint(data, at)
        return data[at : at + length], at + length
    if kind == 12:
        return _struct(data, at)
    raise KeyError(kind)  # no header of a page has others


def _integer(data: bytes, at: int) -> tuple[int, int]:
    number, at = _varint(data, at)
    return number >> 1 ^ -(number & 1), at


def _varint(data: bytes, at: int) -> tuple[int, int]:
    number, shift = 0, 0
    while True:
        number, shift = number | (data[at] & 127) << shift, shift + 7
        at += 1
        if not data[at - 1] & 128:
            return number, at
