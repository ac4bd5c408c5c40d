"""Reads rows of tables: Parquet, and Arrow files and streams such as the `datasets` library saves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq

from hardbatch.pipeline.config import Column
from hardbatch.pipeline.errors import InputError, first_line
from hardbatch.pipeline.sources.columns import Record, Table, needed_columns
from hardbatch.pipeline.sources.files import SourceFile

_ROWS_PER_READ = 4_096
_BYTES_PER_READ = 2**20
_BROKEN = (pa.ArrowException, OSError, ValueError)


def open_parquet(file: SourceFile, path: Path, wanted: Sequence[Column]) -> Table:
    """Opens a Parquet file; only the columns that `wanted` needs are read.

    Raises:
        InputError: The file is broken, at once or while its records are read.
    """
    try:
        parquet = pq.ParquetFile(path, pre_buffer=False, buffer_size=_BYTES_PER_READ)  # else it reads whole row groups
        schema = parquet.schema_arrow
        names = needed_columns(schema.names, wanted)
    except _BROKEN as error:
        raise InputError(f"{file.name}: is not a readable Parquet file: {first_line(error)}") from None
    batches = parquet.iter_batches(batch_size=_ROWS_PER_READ, columns=names)
    return Table(_columns(schema), _records(file, batches, names, parquet.metadata.num_rows))


def open_arrow(file: SourceFile, path: Path, wanted: Sequence[Column]) -> Table:
    """Opens an Arrow file or stream, memory-mapped; its first bytes say which it is.

    Raises:
        InputError: The file is broken, at once or while its records are read.
    """
    try:
        source = pa.memory_map(str(path))
        if source.read(6) == b"ARROW1":
            whole = pa.ipc.open_file(source)
            schema = whole.schema
            batches = (whole.get_batch(index) for index in range(whole.num_record_batches))
        else:
            source.seek(0)
            batches = pa.ipc.open_stream(source)
            schema = batches.schema
    except _BROKEN as error:
        raise InputError(f"{file.name}: is not a readable Arrow file: {first_line(error)}") from None
    return Table(_columns(schema), _records(file, batches, needed_columns(schema.names, wanted)))


def _columns(schema: pa.Schema) -> list[tuple[str, str]]:
    return [(field.name, str(field.type)) for field in schema]


def _records(
    file: SourceFile, batches: Iterator[pa.RecordBatch], names: list[str], num_rows: int | None = None
) -> Iterator[Record]:
    row = 0
    try:
        for batch in batches:
            for start in range(0, batch.num_rows, _ROWS_PER_READ):
                rows = batch.slice(start, _ROWS_PER_READ)
                columns = [_to_python(rows.column(name)) for name in names]
                for values in zip(*columns, strict=True) if columns else [()] * rows.num_rows:
                    yield Record(row, dict(zip(names, values, strict=True)))
                    row += 1
    except _BROKEN as error:
        raise InputError(f"{file.name}: broken after row {row}: {first_line(error)}") from None
    if num_rows is not None and row != num_rows:
        raise InputError(f"{file.name}: broken: {row} rows could be read, its footer says {num_rows}")


def _to_python(column: pa.Array) -> list[Any]:
    """The values of a column; texts that are not UTF-8 come out as bytes, times as text."""
    if pa.types.is_temporal(column.type):
        column = column.cast(pa.string())  # nanoseconds have no type in Python
    try:
        column.validate(full=True)  # what an Arrow file holds may lead out of its buffers
        return list(column.to_pylist())
    except (pa.ArrowInvalid, UnicodeDecodeError) as error:
        if "UTF8" not in str(error) and not isinstance(error, UnicodeDecodeError):
            raise
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        raw = column.cast(_as_binary(column.type))
        raw.validate(full=True)
        return [_decoded(value) for value in raw.to_pylist()]


def _as_binary(kind: pa.DataType) -> pa.DataType:
    """The type with binary in place of text, at every depth."""
    if pa.types.is_string(kind) or pa.types.is_string_view(kind):
        return pa.binary()
    if pa.types.is_large_string(kind):
        return pa.large_binary()
    if pa.types.is_large_list(kind):
        return pa.large_list(_as_binary(kind.value_type))
    if pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind):
        return pa.list_(_as_binary(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([pa.field(field.name, _as_binary(field.type)) for field in kind])
    return kind


def _decoded(value: Any) -> Any:
    """`value` with texts in place of the bytes that are UTF-8."""
    if isinstance(value, list):
        return [_decoded(item) for item in value]
    if isinstance(value, dict):
        return {key: _decoded(item) for key, item in value.items()}
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return value
    return value
