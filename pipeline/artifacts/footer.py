"""Cuts the footer of a Parquet file by row group: a reader of one row group need not parse the records of a thousand.

    "PAR1" | row groups | footer | length of the footer, 4 bytes | "PAR1"

The footer is a struct in Thrift's compact protocol (https://github.com/apache/parquet-format). Its fields 1 to 3 are
version, schema and number of rows, called the head here. Field 4 is a list with a struct per row group, called its
record here. A footer that consists of the head and one record is valid, and for a file of 1,024 row groups it takes a
hundredth of the time to parse and of the memory to hold.

Values of every type are skipped, never decoded. What is broken raises ValueError, however it is broken.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow.parquet as pq

MAGIC = b"PAR1"
_ROW_GROUPS = 4  # number of the field that lists the row groups
_BOOLEANS, _INTEGERS, _BINARY, _LISTS, _STRUCT = (1, 2), (4, 5, 6), 8, (9, 10), 12  # Thrift's types of values
_SIZES = {1: 1, 2: 1, 3: 1, 7: 8}  # bytes of an item, for types of fixed size: booleans, bytes, doubles
_STOP = b"\x00"
_LIST_OF_ONE_STRUCT = b"\x1c"


def row_group_ranges(path: Path) -> list[tuple[int, int]]:
    """The byte range of the data of each row group, dictionaries included.

    Args:
        path: A Parquet file.

    Returns:
        (offset, length) in the file, by row group.
    """
    metadata = pq.read_metadata(path)
    ranges = []
    for group in range(metadata.num_row_groups):
        columns = [metadata.row_group(group).column(i) for i in range(metadata.num_columns)]
        starts = [column.dictionary_page_offset or column.data_page_offset for column in columns]
        ends = [start + column.total_compressed_size for start, column in zip(starts, columns, strict=True)]
        ranges.append((min(starts), max(ends) - min(starts)))
    return ranges


def record_ranges(path: Path) -> list[tuple[int, int]]:
    """The byte range of the record of each row group.

    Args:
        path: A Parquet file.

    Returns:
        (offset, length) in the file, by row group.

    Raises:
        ValueError: The footer is broken.
    """
    start, footer = _read(path)
    ranges = []
    with _broken_footers():
        _, num_records, index = _enter_row_groups(footer)
        for _ in range(num_records):
            end = _skip_struct(footer, index)
            ranges.append((start + index, end - index))
            index = end
    return ranges


def read_head(path: Path) -> bytes:
    """Reads the head of the footer of the Parquet file at `path`.

    Raises:
        ValueError: The footer is broken.
    """
    _, footer = _read(path)
    with _broken_footers():
        length, _, _ = _enter_row_groups(footer)
    return footer[:length]


def end_of_file(head: bytes, record: bytes) -> bytes:
    """The last bytes of a Parquet file that has one row group only: its footer, the footer's length and the magic.

    Whatever follows the records in the original footer is left out: Arrow's schema, so types are those of Parquet,
    and the name of the writer, without which readers ignore some statistics.

    Args:
        head: What `read_head` returned for the file.
        record: The bytes in one of its `record_ranges`.
    """
    footer = head + _LIST_OF_ONE_STRUCT + record + _STOP
    return footer + len(footer).to_bytes(4, "little") + MAGIC


@contextmanager
def _broken_footers() -> Iterator[None]:
    """Raises ValueError when a broken footer leads the parser past its end, or too deep into it."""
    try:
        yield
    except (IndexError, RecursionError):
        raise ValueError("broken Parquet footer") from None


def _read(path: Path) -> tuple[int, bytes]:
    """The offset of the footer in the file, and its bytes."""
    with path.open("rb") as file:
        end = file.seek(0, 2) - len(MAGIC) - 4
        file.seek(max(0, end))
        tail = file.read()
        start = end - int.from_bytes(tail[:4], "little")
        if tail[4:] != MAGIC or start < len(MAGIC):
            raise ValueError("no Parquet footer at the end")
        file.seek(start)
        return start, file.read(end - start)


def _enter_row_groups(footer: bytes) -> tuple[int, int, int]:
    """Finds field 4: the length of all before its list, the number of records, the index of the first one."""
    index = field = 0
    while field < _ROW_GROUPS:
        header = footer[index]
        if header >> 4 == 0:  # the end of the struct, or fields that are not in ascending order
            raise ValueError("a Parquet footer without row groups")
        field, index = field + (header >> 4), index + 1
        if field < _ROW_GROUPS:
            index = _skip(footer, index, header & 15)
    num_records, kind, first = _list_header(footer, index)
    if field != _ROW_GROUPS or kind != _STRUCT:
        raise ValueError("a Parquet footer without row groups")
    return index, num_records, first


def _skip(data: bytes, index: int, kind: int) -> int:
    """The index after the value of type `kind` that starts at `index`."""
    if kind in _INTEGERS:
        while data[index] > 127:
            index += 1
        return index + 1
    if kind == _STRUCT:
        return _skip_struct(data, index)
    if kind == _BINARY:
        length, index = _varint(data, index)
        return index + length
    if kind in _LISTS:
        length, item, index = _list_header(data, index)
        if item in _SIZES:
            return index + length * _SIZES[item]
        for _ in range(length):
            index = _skip(data, index, item)
        return index
    if kind in _BOOLEANS:
        return index  # the value is in the header of the field
    if kind in _SIZES:
        return index + _SIZES[kind]
    raise ValueError(f"broken Parquet footer: a value of type {kind}")


def _skip_struct(data: bytes, index: int) -> int:
    while True:
        header = data[index]
        index += 1
        if header == 0:
            return index
        if header < 16:  # the header does not hold the number of the field: it follows
            index = _skip(data, index, _INTEGERS[0])
        index = _skip(data, index, header & 15)


def _list_header(data: bytes, index: int) -> tuple[int, int, int]:
    """The number of items of a list, their type, and the index of the first one."""
    header = data[index]
    length, index = header >> 4, index + 1
    if length == 15:
        length, index = _varint(data, index)
    return length, header & 15, index


def _varint(data: bytes, index: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[index]
        index += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, index
        shift += 7
