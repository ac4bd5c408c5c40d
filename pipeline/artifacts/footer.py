"""The footer of a Parquet file, cut by row group, so that a reader of one row group need not parse those of a thousand.

    "PAR1" | row groups | footer | length of the footer, 4 bytes | "PAR1"

The footer is a struct of Thrift's compact protocol (https://github.com/apache/parquet-format): its fields 1 to 3 are
version, schema and number of rows, field 4 lists a struct per row group, here called its record. A footer of the head
(fields 1 to 3), one record and nothing else is valid, and costs a hundredth of the whole one to parse and to hold.
"""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq

MAGIC = b"PAR1"
_ROW_GROUPS = 4  # number of the field that lists the row groups
_BOOLEANS, _INTEGERS, _BINARY, _LISTS, _STRUCT = (1, 2), (4, 5, 6), 8, (9, 10), 12  # types of values
_SIZES = {1: 1, 2: 1, 3: 1, 7: 8}  # bytes of the items of fixed size: booleans, bytes, doubles
_STOP = b"\x00"
_LIST_OF_ONE_STRUCT = b"\x1c"


def row_group_ranges(path: Path) -> list[tuple[int, int]]:
    """(offset, length) in the Parquet file at `path` of the data of each row group, its dictionaries included."""
    metadata = pq.read_metadata(path)
    ranges = []
    for group in range(metadata.num_row_groups):
        columns = [metadata.row_group(group).column(i) for i in range(metadata.num_columns)]
        starts = [column.dictionary_page_offset or column.data_page_offset for column in columns]
        ends = [start + column.total_compressed_size for start, column in zip(starts, columns, strict=True)]
        ranges.append((min(starts), max(ends) - min(starts)))
    return ranges


def record_ranges(path: Path) -> list[tuple[int, int]]:
    """(offset, length) in the Parquet file at `path` of the record of each row group; ValueError where it is broken."""
    start, footer = _read(path)
    ranges = []
    try:
        _, num_records, place = _enter_row_groups(footer)
        for _ in range(num_records):
            end = _skip_struct(footer, place)
            ranges.append((start + place, end - place))
            place = end
    except (IndexError, RecursionError):
        raise ValueError("broken Parquet footer") from None
    return ranges


def read_head(path: Path) -> bytes:
    """The head of the footer of the Parquet file at `path`; raises ValueError where its footer is broken."""
    _, footer = _read(path)
    try:
        length, _, _ = _enter_row_groups(footer)
    except (IndexError, RecursionError):
        raise ValueError("broken Parquet footer") from None
    return footer[:length]


def end_of_file(head: bytes, record: bytes) -> bytes:
    """The last bytes of a Parquet file of which one row group is all: its footer, the footer's length and the magic.

    Left out of the footer is all after the records: Arrow's own schema, so that types are those of Parquet, and the
    name of the writer, without which readers disregard some statistics.
    """
    footer = head + _LIST_OF_ONE_STRUCT + record + _STOP
    return footer + len(footer).to_bytes(4, "little") + MAGIC


def _read(path: Path) -> tuple[int, bytes]:
    """Where the footer starts in the file, and its bytes."""
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
    """Length of the head (the header of the field that follows included), number of records, place of the first."""
    place = field = 0
    while field < _ROW_GROUPS:
        header = footer[place]
        if header >> 4 == 0:  # the end of the struct, or a field out of order
            raise ValueError("a Parquet footer without row groups")
        field, place = field + (header >> 4), place + 1
        if field < _ROW_GROUPS:
            place = _skip(footer, place, header & 15)
    num_records, kind, first = _list_header(footer, place)
    if field != _ROW_GROUPS or kind != _STRUCT:
        raise ValueError("a Parquet footer without row groups")
    return place, num_records, first


def _skip(data: bytes, place: int, kind: int) -> int:
    """Where the value of type `kind` at `place` ends."""
    if kind in _INTEGERS:
        while data[place] > 127:
            place += 1
        return place + 1
    if kind == _STRUCT:
        return _skip_struct(data, place)
    if kind == _BINARY:
        length, place = _varint(data, place)
        return place + length
    if kind in _LISTS:
        length, item, place = _list_header(data, place)
        if item in _SIZES:
            return place + length * _SIZES[item]
        for _ in range(length):
            place = _skip(data, place, item)
        return place
    if kind in _BOOLEANS:
        return place  # a field's header holds the value
    if kind in _SIZES:
        return place + _SIZES[kind]
    raise ValueError(f"broken Parquet footer: a value of type {kind}")


def _skip_struct(data: bytes, place: int) -> int:
    while True:
        header = data[place]
        place += 1
        if header == 0:
            return place
        if header < 16:  # the number of the field follows
            place = _skip(data, place, _INTEGERS[0])
        place = _skip(data, place, header & 15)


def _list_header(data: bytes, place: int) -> tuple[int, int, int]:
    """Number of items, their type, and where the first one starts."""
    header = data[place]
    length, place = header >> 4, place + 1
    if length == 15:
        length, place = _varint(data, place)
    return length, header & 15, place


def _varint(data: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[place]
        place += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place
        shift += 7
