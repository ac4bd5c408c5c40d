"""Reads rows of text formats: JSON Lines, CSV and TSV, plain or compressed; see `rows.py`."""

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
from hardbatch.pipeline.sources.files import RawRow, SourceFile, mapped_columns, no_column

_MAX_LINE_BYTES = 2**28  # of a line or a quoted field, which is held in memory; far longer than any text


def read_jsonl(file: SourceFile, path: Path, columns: Columns) -> Iterator[RawRow]:
    """Reads JSON Lines; a row that cannot be read has a problem, which names the line.

    Args:
        file: The source, for messages.
        path: The local file to read.
        columns: Keys of the fields.

    Raises:
        InputError: The file is broken, its first row has no query or document, or no row has the key of the negatives.
    """
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

            # Python keeps the last of two equal keys. Parsing again is slow, so only lines that look like it are
            # parsed again: inside a text a key is escaped.
            if not problem and any(line.count(key) > 1 for key in keys):
                json.loads(line, object_pairs_hook=_refuse_repeated)
        except UnicodeDecodeError as error:
            yield RawRow(row, None, None, None, "invalid_utf8", f"line {number}: {error}")
            continue
        except json.JSONDecodeError as error:
            problem = f"character {error.pos + 1}: {error.msg}"
        except RecursionError:
            problem = "nested too deeply"
        except ValueError as error:  # a number of thousands of digits, or a key twice
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
        raise InputError(f"{file.name}: no row has '{columns.negatives}'; fix columns.negatives, or leave it out")


def _refuse_repeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        raise ValueError("a key occurs twice, so which value is meant cannot be told")
    return record


def _lines(file: SourceFile, path: Path) -> Iterator[bytes]:
    """The lines of a text file without its byte order mark; raises InputError if they cannot be read."""
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
    """Reads CSV or TSV with a header line; a row that cannot be read has a problem, which names its lines.

    Args:
        file: The source, for messages.
        path: The local file to read.
        columns: Columns of the fields.
        delimiter: What separates two fields of a line.

    Raises:
        InputError: The file or its header is broken, a column is missing, or a quote is never closed.
    """
    csv.field_size_limit(_MAX_LINE_BYTES)
    text = (line.decode("utf-8", errors="surrogateescape") for line in _lines(file, path))
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    try:
        header = next(reader, [])
    except csv.Error as error:
        raise InputError(
            f"{file.name}: its header line cannot be read: {str(error).split(' - ')[0]}; lines must end in LF or CR LF"
        ) from None
    index_of = {field: header.index(name) for field, name in mapped_columns(file, columns, header).items()}

    row = 0
    while True:
        first = reader.line_num + 1
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if "unexpected end of data" in str(error) or "field larger" in str(error):
                raise InputError(
                    f"{file.name}: a quote that opens in row {row} (line {first}) is never closed; fix that row"
                ) from None
            yield RawRow(row, None, None, None, "broken_csv", f"lines {first} to {reader.line_num}: {error}")
        else:
            if not values:
                continue  # a blank line is not a row
            if len(values) == len(header):
                negatives = values[index_of["negatives"]] if "negatives" in index_of else None
                yield RawRow(row, values[index_of["query"]], values[index_of["document"]], negatives)
            else:
                detail = f"lines {first} to {reader.line_num}: {len(values)} fields, the header has {len(header)}"
                yield RawRow(row, None, None, None, "wrong_field_count", detail)
        row += 1


def _open_binary(path: Path) -> io.BufferedIOBase | Any:
    """Opens a file for reading; what is compressed is known by its first bytes, whatever its name."""
    with path.open("rb") as file:
        magic = file.read(4)
    if magic[:2] == b"\x1f\x8b":
        return gzip.open(path, "rb")
    if magic == b"\x28\xb5\x2f\xfd":
        import pyarrow as pa

        return io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(path)), "zstd"))  # raises at a cut-off end
    return path.open("rb")
