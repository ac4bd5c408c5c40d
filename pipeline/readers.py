"""Reading source files row by row.

Reading never repairs and never drops: a row that cannot be read comes out with a problem, which ingest quarantines.
A file that cannot be read at all raises InputError.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.config import Columns
from pipeline.errors import InputError, UnreachableError
from pipeline.files import as_user_error, content_key, sha256_file
from pipeline.sources import SourceFile, first_line

_ROWS_PER_READ = 4_096
_BYTES_PER_READ = 2**20
_NAME_CHARACTERS = 60
_MAX_LINE_BYTES = 2**28  # of a line, or a quoted field: far beyond any text, and held in memory


class RawRow(NamedTuple):
    """One row as the source has it; `problem` (a reason code) and `detail` where it could not be read."""

    row: int
    query: Any
    document: Any
    negatives: Any
    problem: str | None = None
    detail: str = ""


def read_rows(file: SourceFile, columns: Columns, scratch: Path) -> Iterator[RawRow]:
    """The rows of `file`, numbered from 0 (for python sources: the line of the function).

    A remote file is first copied below `scratch`. Raises InputError, naming file and row, where the file as a whole is
    broken: not the format it claims to be, cut off, without the asked columns, empty, or no longer the one that was
    planned with.
    """
    yield from _read_format(file, columns, scratch)
    _refuse_if_changed(file)


def _refuse_if_changed(file: SourceFile) -> None:
    """The rows read are filed under the digest that was planned with, so they must be those of its bytes."""
    if file.modified_ns is None:
        return
    try:
        stat = Path(file.location).stat()
        changed = (stat.st_size, stat.st_mtime_ns) != (file.num_bytes, file.modified_ns)
    except OSError:
        changed = True
    if changed:
        raise InputError(f"{file.name}: was changed while it was read; run again once nothing writes to it")


def _read_format(file: SourceFile, columns: Columns, scratch: Path) -> Iterator[RawRow]:
    if file.format == "python":
        from pipeline.python_source import read_functions

        yield from (RawRow(*row, None) for row in read_functions(Path(file.location)))
        return
    with _local_copy(file, scratch) as path:
        try:
            size = path.stat().st_size
        except OSError as error:
            raise InputError(f"{file.name}: cannot be read any more: {error.strerror}") from None
        if size == 0:
            raise InputError(f"{file.name}: the file is empty (0 bytes); remove it from the manifest or fetch it again")
        if file.format == "parquet":
            yield from _read_parquet(file, path, columns)
        elif file.format == "jsonl":
            yield from _read_jsonl(file, path, columns)
        else:
            yield from _read_csv(file, path, columns, "\t" if file.format == "tsv" else ",")


@contextmanager
def _local_copy(file: SourceFile, scratch: Path) -> Iterator[Path]:
    if "://" not in file.location:
        yield Path(file.location)
        return
    import fsspec

    scratch.mkdir(parents=True, exist_ok=True)
    copy = scratch / f".{content_key(location=file.location)}.tmp"
    try:
        try:
            filesystem, path = fsspec.core.url_to_fs(file.location)
            filesystem.get_file(path, str(copy))
        except Exception as error:  # every filesystem has its own; a full disk is told as such
            if isinstance(error, OSError) and as_user_error(error):
                raise
            raise UnreachableError(f"{file.name}: cannot be fetched: {first_line(error)}") from None
        if len(file.sha256) == 64 and sha256_file(copy) != file.sha256:
            raise InputError(f"{file.name}: its bytes are not those of the sha256 in the manifest, {file.sha256}")
        yield copy
    finally:
        copy.unlink(missing_ok=True)


def _read_parquet(file: SourceFile, path: Path, columns: Columns) -> Iterator[RawRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        parquet = pq.ParquetFile(path, pre_buffer=False, buffer_size=_BYTES_PER_READ)  # not a whole row group
        schema = parquet.schema_arrow
        known = schema.names
    except (pa.ArrowException, OSError, ValueError) as error:
        raise InputError(f"{file.name}: is not a readable Parquet file: {first_line(error)}") from None
    for field, name in (("query", columns.query), ("document", columns.document), ("negatives", columns.negatives)):
        if name is None:
            continue
        if name not in known:
            raise _no_column(file, field, name, known)
        if known.count(name) > 1:
            raise InputError(f"{file.name}: column '{name}' ({field}) is there {known.count(name)} times; rename one")
        kind = schema.field(name).type
        if not (_is_text(kind) or (field == "negatives" and (_is_text_list(kind) or pa.types.is_null(kind)))):
            wanted = "a list of texts, or text" if field == "negatives" else "text"
            raise InputError(f"{file.name}: column '{name}' ({field}) is {kind}, expected {wanted}")
    names = [columns.query, columns.document] + ([columns.negatives] if columns.negatives else [])
    row = 0
    try:
        for batch in parquet.iter_batches(batch_size=_ROWS_PER_READ, columns=list(dict.fromkeys(names))):
            values = [_to_python(batch.column(name)) for name in names]
            negatives = values[2] if columns.negatives else [None] * batch.num_rows
            for query, document, some in zip(values[0], values[1], negatives, strict=True):
                yield RawRow(row, query, document, some)
                row += 1
    except (pa.ArrowException, OSError, ValueError) as error:
        raise InputError(f"{file.name}: broken after row {row}: {first_line(error)}") from None
    if row != parquet.metadata.num_rows:
        raise InputError(f"{file.name}: broken: {row} rows could be read, its footer says {parquet.metadata.num_rows}")


def _to_python(column: Any) -> list[Any]:
    """Values of an Arrow column; texts that are not UTF-8 come out as bytes."""
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:
        if _is_text_list(column.type):
            return [_to_python(item.values) if item.is_valid else None for item in column]
        raw = column.cast(pa.large_binary() if pa.types.is_large_string(column.type) else pa.binary())
        return [_decode(value) for value in raw.to_pylist()]


def _decode(value: bytes | None) -> str | bytes | None:
    if value is None:
        return None
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        return value


def _is_text(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _is_text_list(kind: Any) -> bool:
    import pyarrow as pa

    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return bool(is_list and _is_text(kind.value_type))


def _read_jsonl(file: SourceFile, path: Path, columns: Columns) -> Iterator[RawRow]:
    row = -1
    checked = has_negatives = False
    keys = [json.dumps(name).encode() for name in (columns.query, columns.document)]
    for number, line in enumerate(_lines(file, path), start=1):
        if not line.strip():
            continue
        row += 1
        try:
            record = json.loads(line.decode("utf-8"))
            problem = "" if isinstance(record, dict) else "no JSON object but another value"
            if not problem and any(line.count(key) > 1 for key in keys):  # inside a text it is escaped: rarely so
                json.loads(line, object_pairs_hook=_refuse_repeated)
        except UnicodeDecodeError as error:
            yield RawRow(row, None, None, None, "invalid_utf8", f"line {number}: {error}")
            continue
        except (ValueError, RecursionError) as error:
            problem = str(error)
        if problem:
            yield RawRow(row, None, None, None, "broken_json", f"line {number}: {problem}")
            continue
        if not checked:
            for field, name in (("query", columns.query), ("document", columns.document)):
                if name not in record:
                    raise _no_column(file, field, name, list(record))
            checked = True
        negatives = record.get(columns.negatives) if columns.negatives else None
        has_negatives = has_negatives or columns.negatives in record
        yield RawRow(row, record.get(columns.query), record.get(columns.document), negatives)
    if columns.negatives and checked and not has_negatives:
        raise InputError(f"{file.name}: no row has '{columns.negatives}'; mend columns.negatives, or leave it out")


def _refuse_repeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        raise ValueError("a key occurs twice, so which value is meant cannot be told")
    return record


def _lines(file: SourceFile, path: Path) -> Iterator[bytes]:
    number = 0
    try:
        with _open_binary(path) as stream:
            for line in iter(partial(stream.readline, _MAX_LINE_BYTES), b""):
                number += 1
                if number == 1 and line.startswith((b"\xff\xfe", b"\xfe\xff")):
                    raise InputError(
                        f"{file.name}: is UTF-16 text, as its first bytes say; convert it: iconv -f UTF-16 -t UTF-8"
                    )
                if len(line) == _MAX_LINE_BYTES:
                    raise InputError(f"{file.name}: line {number} is longer than {_MAX_LINE_BYTES:,} bytes; split it")
                yield line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
    except (EOFError, zlib.error, OSError) as error:
        raise InputError(f"{file.name}: cut off or broken after line {number}: {first_line(error)}") from None


def _read_csv(file: SourceFile, path: Path, columns: Columns, delimiter: str) -> Iterator[RawRow]:
    csv.field_size_limit(_MAX_LINE_BYTES)
    text = (line.decode("utf-8", errors="surrogateescape") for line in _lines(file, path))
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    try:
        header = next(reader, [])
    except csv.Error as error:
        raise InputError(
            f"{file.name}: its header line cannot be read: {error}; lines must end in LF or CR LF"
        ) from None
    for field, name in (("query", columns.query), ("document", columns.document), ("negatives", columns.negatives)):
        if name is not None and name not in header:
            raise _no_column(file, field, name, header)
        if name is not None and header.count(name) > 1:
            raise InputError(f"{file.name}: column '{name}' ({field}) is there {header.count(name)} times; rename one")
    places = [header.index(columns.query), header.index(columns.document)]
    negatives_place = header.index(columns.negatives) if columns.negatives else None
    row = -1
    while True:
        row += 1
        first = reader.line_num + 1
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if "unexpected end of data" in str(error) or "field larger" in str(error):
                raise InputError(
                    f"{file.name}: a quote that opens in row {row} (line {first}) is never closed; mend that row"
                ) from None
            yield RawRow(row, None, None, None, "broken_csv", f"lines {first} to {reader.line_num}: {error}")
            continue
        if len(values) != len(header):
            if values:
                detail = f"lines {first} to {reader.line_num}: {len(values)} fields, the header has {len(header)}"
                yield RawRow(row, None, None, None, "wrong_field_count", detail)
            else:
                row -= 1  # a blank line is no row
            continue
        negatives = None if negatives_place is None else values[negatives_place]
        yield RawRow(row, values[places[0]], values[places[1]], negatives)


def _open_binary(path: Path) -> io.BufferedIOBase | Any:
    with path.open("rb") as file:
        magic = file.read(4)
    if magic[:2] == b"\x1f\x8b":
        return gzip.open(path, "rb")
    if magic == b"\x28\xb5\x2f\xfd":
        import pyarrow as pa

        return io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(path)), "zstd"))  # tells a cut-off end
    return path.open("rb")


def _no_column(file: SourceFile, field: str, name: str, names: list[str]) -> InputError:
    seen = ", ".join(str(name)[:_NAME_CHARACTERS] for name in names[:20])
    return InputError(
        f"{file.name}: no column '{name}' for {field}; it has: {seen}. Map it in the manifest: columns.{field}"
    )
