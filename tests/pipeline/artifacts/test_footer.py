"""artifacts.footer: footers cut by row group, against pyarrow's reading of the whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hardbatch.pipeline.artifacts.footer import MAGIC, end_of_file, read_head, record_ranges, row_group_ranges


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("footer")


def write(path: Path, num_groups: int, **options: object) -> pa.Table:
    rows = 3 * num_groups
    table = pa.table(
        {
            "number": pa.array([i if i % 4 else None for i in range(rows)], pa.int64()),
            "text": pa.array([f"text {i} {'é' * i}" for i in range(rows)], pa.large_utf8()),
            "word": pa.array([("one", "two")[i % 2] for i in range(rows)]),
            "list": pa.array([list(range(i % 5)) for i in range(rows)], pa.list_(pa.uint16())),
            "nested": pa.array([{"a": [{"b": i / 7}], "c": i % 2 == 0} for i in range(rows)]),
            "time": pa.array(range(rows), pa.timestamp("us", "UTC")),
            "price": pa.array(range(rows), pa.int64()).cast(pa.decimal128(25, 2)),
        }
    )
    pq.write_table(table, path, row_group_size=3, **options)
    return table


def described(metadata: pq.FileMetaData, group: int) -> dict[str, Any]:
    """What the record of a row group says, without statistics, which pyarrow trusts only by the name of the writer."""
    record = metadata.row_group(group).to_dict()
    for column in record["columns"]:
        del column["statistics"], column["is_stats_set"]
    return record


@pytest.mark.parametrize("num_groups", [1, 14, 15, 16, 130])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"compression": "zstd", "use_dictionary": ["word"], "write_statistics": ["number"]},
        {"write_page_index": True, "write_page_checksum": True, "store_schema": False, "version": "1.0"},
        {"sorting_columns": [pq.SortingColumn(0)], "store_decimal_as_integer": True},
    ],
)
def test_the_record_of_a_row_group_reads_it(folder: Path, num_groups: int, options: dict[str, object]) -> None:
    path = folder / "table.parquet"
    table = write(path, num_groups, **options)
    whole, data, head = pq.ParquetFile(path), path.read_bytes(), read_head(path)
    records = record_ranges(path)
    assert len(records) == whole.num_row_groups == num_groups
    for group, (offset, length) in enumerate(records):
        end = end_of_file(head, data[offset : offset + length])
        metadata = pq.read_metadata(pa.BufferReader(MAGIC + end))
        assert metadata.num_row_groups == 1
        assert described(metadata, 0) == described(whole.metadata, group)
        found = pq.ParquetFile(path, metadata=metadata).read_row_group(0)
        assert found.to_pylist() == table.slice(3 * group, 3).to_pylist()


def test_row_groups_follow_one_another(folder: Path) -> None:
    path = folder / "table.parquet"
    write(path, 7)
    ends = [4, *(offset + length for offset, length in row_group_ranges(path))]
    assert [offset for offset, _ in row_group_ranges(path)] == ends[:-1]
    assert all(offset > ends[-1] for offset, _ in record_ranges(path))


@given(place=st.integers(1, 10_000), bit=st.integers(0, 7), cut=st.booleans())
@settings(max_examples=300, deadline=None)
def test_a_broken_footer_raises_only_value_error(folder: Path, place: int, bit: int, cut: bool) -> None:
    path, broken = folder / "whole.parquet", folder / "broken.parquet"
    if not path.exists():
        write(path, 4)
    data = bytearray(path.read_bytes())
    place = min(place, len(data))
    if cut:
        del data[-place:]
    else:
        data[-place] ^= 1 << bit
    broken.write_bytes(data)
    try:
        records = record_ranges(broken)
        read_head(broken)
    except ValueError:
        return
    assert not cut and len(records) <= len(data)


@pytest.mark.parametrize(
    "data", [b"", b"PAR1", b"PAR1PAR1", b"PAR1\x00\x00\x00\x00PAR1", b"PAR1" + b"\x19" * 9 + b"\x09\x00\x00\x00PAR1"]
)
def test_a_file_without_row_groups_in_its_footer_is_refused(folder: Path, data: bytes) -> None:
    (folder / "no.parquet").write_bytes(data)
    with pytest.raises(ValueError, match="footer"):
        record_ranges(folder / "no.parquet")


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (1, b""),  # true, false: in the header
        (2, b""),
        (3, b"\x07"),  # byte
        (4, b"\xff\xff\x03"),  # integers
        (5, b"\x81\x01"),
        (6, b"\x05"),
        (7, b"\x01\x02\x03\x04\x05\x06\x07\x08"),  # double
        (8, b"\x03abc"),  # binary
        (9, b"\x22\x01\x02"),  # two booleans
        (9, b"\x13\x01"),  # a byte
        (9, b"\x27" + b"\x09" * 16),  # two doubles
        (9, b"\x25\x81\x01\x02"),  # two integers
        (9, b"\xf5\x10" + b"\x02" * 16),  # sixteen integers
        (10, b"\x28\x01a\x02bc"),  # a set of two binaries
        (12, b"\x15\x02\x05\x40\x02\x11\x00"),  # a struct: an integer, field 32 (its number in full), a boolean
    ],
)
def test_values_of_every_type_are_stepped_over(folder: Path, kind: int, value: bytes) -> None:
    head = bytes([0x10 | kind]) + value + b"\x39"  # field 1, then the header of field 4
    record = b"\x15\x02\x00"
    path = folder / "crafted.parquet"
    path.write_bytes(b"PAR1" + head + b"\x2c" + record * 2 + b"\x00" + (len(head) + 8).to_bytes(4, "little") + b"PAR1")
    assert read_head(path) == head
    first = 4 + len(head) + 1
    assert record_ranges(path) == [(first, len(record)), (first + len(record), len(record))]


def test_a_list_of_absurd_length_ends_at_once(folder: Path) -> None:
    """A flipped bit can make a list of 2^60 items: none of their types may be walked item by item past the end."""
    for item in range(16):
        field = bytes([0x19, 0xF0 | item]) + b"\xff" * 8 + b"\x0f"  # field 1, a list of items of that type
        (folder / "absurd.parquet").write_bytes(b"PAR1" + field + len(field).to_bytes(4, "little") + b"PAR1")
        with pytest.raises(ValueError, match="footer"):
            record_ranges(folder / "absurd.parquet")
