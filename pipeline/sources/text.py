"""Rows of text formats: JSON Lines, CSV, TSV, plain or packed; see `rows.py`."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from hardbatch.pipeline.config import Columns
from hardbatch.pipeline.errors import InputError, first_line
from hardbatch.pipeline.sources.files import RawRow, SourceFile, no_column

_MAX_LINE_BYTES = 2**28  # of a line, or a quoted field: far beyond any text, and held in memory


def read_jsonl(file: SourceFile, path: Path, columns: Columns) -> Iterator[RawRow]:
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
        except json.JSONDecodeError as error:
            problem = f"character {error.pos + 1}: {error.msg}"
        except RecursionError:
            problem = "nested too deeply"
        except ValueError as error:  # a number of thousands of digits, a key twice
            problem = str(error)
        if problem:
            yield RawRow(row, None, None, None, "broken_json", f"line {number}: {problem}")
            continue
        if not checked:
            for field, name in (("query", columns.query), ("document", columns.document)):
                if name not in record:
                    raise no_column(file, field, name, list(record))
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


def read_csv(file: SourceFile, path: Path, columns: Columns, delimiter: str) -> Iterator[RawRow]:
    csv.field_size_limit(_MAX_LINE_BYTES)
    text = (line.decode("utf-8", errors="surrogateescape") for line in _lines(file, path))
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    try:
        header = next(reader, [])
    except csv.Error as error:
        raise InputError(
            f"{file.name}: its header line cannot be read: {str(error).split(' - ')[0]}; lines must end in LF or CR LF"
        ) from None
    for field, name in (("query", columns.query), ("document", columns.document), ("negatives", columns.negatives)):
        if name is not None and name not in header:
            raise no_column(file, field, name, header)
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
