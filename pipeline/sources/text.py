"""Reads records of text formats: JSON Lines, CSV and TSV, plain or compressed; see `rows.py`."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from hardbatch.pipeline.artifacts.compressed import BROKEN, open_decompressed
from hardbatch.pipeline.config import Column, Dialect
from hardbatch.pipeline.errors import InputError, first_line
from hardbatch.pipeline.sources.columns import Record, Table
from hardbatch.pipeline.sources.files import SourceFile

_MAX_LINE_BYTES = 2**28  # of a line or a quoted field, which is held in memory; far longer than any text
_UTF_8 = ("utf-8", "utf8", "utf_8", "utf-8-sig")
_MIN_ARRAY_READ = 2**16
_BETWEEN_ITEMS = ", \t\r\n"
_MIN_LINES_SWALLOWED = 5  # prose has commas, so a few lines of it may look like rows


def open_jsonl(file: SourceFile, path: Path, wanted: Sequence[Column], encoding: str) -> Table:
    """Opens JSON Lines, or an array of objects; a record that cannot be read has a problem, which names the line.

    Args:
        file: The source, for messages.
        path: The local file to read.
        wanted: Columns that must not be in an object twice.
        encoding: The encoding of the file.

    Raises:
        InputError: The file is broken.
    """
    keys = {str(name).split(".")[0] for name in wanted} | {str(name) for name in wanted}
    return Table(None, _json_records(file, _lines(file, path, encoding), [json.dumps(key).encode() for key in keys]))


def _json_records(file: SourceFile, lines: Iterator[bytes], keys: list[bytes]) -> Iterator[Record]:
    row = -1
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        row += 1
        if row == 0 and line.lstrip()[:1] == b"[":
            yield from _spread_records(file, chain([line.lstrip()[1:]], lines), end="]")
            return
        if row == 0 and line.strip() == b"{":  # objects over several lines, as `jq` and `json.dump(indent=2)` write
            yield from _spread_records(file, chain([line], lines), end="")
            return
        problem = ""
        values: Any = None
        try:
            values = json.loads(line.decode("utf-8"))

            # Python keeps the last of two equal keys. Parsing again is slow, so only lines that look like it are
            # parsed again: inside a text a key is escaped.
            if any(line.count(key) > 1 for key in keys):
                json.loads(line, object_pairs_hook=_refuse_repeated)
        except UnicodeDecodeError as error:
            yield Record(row, None, "invalid_utf8", f"line {number}: {error}")
            continue
        except json.JSONDecodeError as error:
            problem = f"character {error.pos + 1}: {error.msg}"
        except RecursionError:
            problem = "nested too deeply"
        except ValueError as error:  # a number of thousands of digits, or a key twice
            problem = str(error)
        if not problem and not isinstance(values, dict):
            problem = "no JSON object but another value"
        yield Record(row, None, "broken_json", f"line {number}: {problem}") if problem else Record(row, values)


def _spread_records(file: SourceFile, lines: Iterator[bytes], end: str) -> Iterator[Record]:
    """Objects that are not a line each; a few of them are in memory at a time.

    `end` is the bracket that closes the array around the objects; it is empty if they are not in an array.
    """
    decoder = json.JSONDecoder()
    text, start, row = "", 0, 0
    while True:
        while start < len(text) and text[start] in _BETWEEN_ITEMS:
            start += 1
        if end and text[start : start + 1] == end:
            return
        try:
            values, start = decoder.raw_decode(text, start)
        except (ValueError, RecursionError) as error:
            # The item may go on. Twice as much is read each time, as it is parsed from its start again.
            more = list(_lines_of(lines, max(len(text) - start, _MIN_ARRAY_READ)))
            if not more and not end and start == len(text):
                return
            if not more or len(text) - start > _MAX_LINE_BYTES:
                raise InputError(
                    f"{file.name}: broken JSON{' array' * bool(end)} after row {row}: {first_line(error)}"
                ) from None
            text, start = text[start:] + b"".join(more).decode("utf-8", errors="surrogateescape"), 0
            continue
        is_object = isinstance(values, dict)
        yield Record(row, values) if is_object else Record(row, None, "broken_json", f"no JSON object: {values!r:.40}")
        row += 1


def _lines_of(lines: Iterator[bytes], size: int) -> Iterator[bytes]:
    """Lines of `size` bytes together, or a little more."""
    for line in lines:
        yield line
        size -= len(line)
        if size <= 0:
            return


def _refuse_repeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        raise ValueError("a key occurs twice, so which value is meant cannot be told")
    return record


def _lines(file: SourceFile, path: Path, encoding: str) -> Iterator[bytes]:
    """The lines of a text file as UTF-8, without its byte order mark; raises InputError if they cannot be read."""
    number = 0
    try:
        with open_decompressed(path) as stream:
            for line in _as_utf_8(stream, encoding):
                number += 1
                if number == 1 and encoding in _UTF_8 and line.startswith((b"\xff\xfe", b"\xfe\xff")):
                    raise InputError(
                        f"{file.name}: is UTF-16 text, as its first bytes say; set encoding = 'utf-16', or convert it: "
                        "iconv -f UTF-16 -t UTF-8"
                    )
                if len(line) >= _MAX_LINE_BYTES:
                    raise InputError(f"{file.name}: line {number} is longer than {_MAX_LINE_BYTES:,} bytes; split it")
                yield line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
    except UnicodeError as error:
        raise InputError(f"{file.name}: is not {encoding} text after line {number}: {first_line(error)}") from None
    except BROKEN as error:
        raise InputError(f"{file.name}: cut off or broken after line {number}: {first_line(error)}") from None


def _as_utf_8(stream: Any, encoding: str) -> Iterator[bytes]:
    """The lines as UTF-8. Bytes that are not of the encoding stay as they are, which makes the row invalid."""
    if encoding.lower() in _UTF_8:
        return iter(partial(stream.readline, _MAX_LINE_BYTES), b"")
    text = io.TextIOWrapper(stream, encoding, errors="surrogateescape", newline="\n")
    lines = iter(partial(text.readline, _MAX_LINE_BYTES), "")
    return (line.encode("utf-8", errors="surrogateescape") for line in lines)


def open_csv(file: SourceFile, path: Path, dialect: Dialect, encoding: str) -> Table:
    """Opens CSV or TSV; a record that cannot be read has a problem, which names its lines.

    Args:
        file: The source, for messages; its format says what the delimiter is unless the dialect does.
        path: The local file to read.
        dialect: How it is written.
        encoding: The encoding of the file.

    Raises:
        InputError: The file or its header is broken, a quote is never closed, or one swallows rows.
    """
    rows = _CsvRows(file, _lines(file, path, encoding), dialect)
    first = rows.first()
    names = first if dialect.header else [f"column_{number}" for number in range(1, len(first) + 1)]
    records = rows.records(names, [] if dialect.header else [first])
    return Table([(name, "text") for name in names], records)


class _CsvRows:
    """Reads rows one by one, and remembers the lines of the row that is being read."""

    def __init__(self, file: SourceFile, lines: Iterator[bytes], dialect: Dialect) -> None:
        csv.field_size_limit(_MAX_LINE_BYTES)
        self._file = file
        self._delimiter = dialect.delimiter or ("\t" if file.format == "tsv" else ",")
        self._lines: list[str] = []
        self._reader = csv.reader(
            self._remembered(lines),
            delimiter=self._delimiter,
            quotechar=dialect.quote or None,
            quoting=csv.QUOTE_MINIMAL if dialect.quote else csv.QUOTE_NONE,
            escapechar=dialect.escape,
            strict=True,
        )

    def _remembered(self, lines: Iterator[bytes]) -> Iterator[str]:
        for line in lines:
            text = line.decode("utf-8", errors="surrogateescape")
            self._lines.append(text)
            yield text

    def first(self) -> list[str]:
        """The fields of the first line."""
        try:
            return next((fields for fields in self._reader if fields), [])
        except csv.Error as error:
            raise InputError(
                f"{self._file.name}: its header line cannot be read: {str(error).split(' - ')[0]}; lines must end in "
                "LF or CR LF, and a text file without quoting needs csv = { quote = '' }"
            ) from None

    def records(self, names: list[str], before: list[list[str]]) -> Iterator[Record]:
        """The records after the first line, preceded by the rows in `before`."""
        row = 0
        for fields in before:
            yield Record(row, dict(zip(names, fields, strict=True)))
            row += 1
        while True:
            self._lines.clear()
            first = self._reader.line_num + 1
            try:
                fields = next(self._reader)
            except StopIteration:
                return
            except csv.Error as error:
                self._refuse_swallowed(row, first, error, len(names))
                advice = "; a file without quoting needs csv = { quote = '' }" if "expected after" in str(error) else ""
                yield Record(row, None, "broken_csv", f"lines {first} to {self._reader.line_num}: {error}{advice}")
            else:
                if not fields:
                    continue  # a blank line is not a row
                self._refuse_swallowed(row, first, None, len(names))
                if len(fields) == len(names):
                    yield Record(row, dict(zip(names, fields, strict=True)))
                else:
                    lines = f"lines {first} to {self._reader.line_num}"
                    detail = f"{lines}: {len(fields)} fields, the header has {len(names)}"
                    yield Record(row, None, "wrong_field_count", detail)
            row += 1

    def _refuse_swallowed(self, row: int, first: int, error: csv.Error | None, num_fields: int) -> None:
        """Raises InputError if a quote of the row takes in the lines after it, which are rows of their own."""
        advice = "close or double the quote; if the file has no quoting, as many TSV files: csv = { quote = '' }"
        where = f"{self._file.name}: a quote that opens in row {row} (line {first})"
        if error is not None and ("unexpected end of data" in str(error) or "field larger" in str(error)):
            raise InputError(f"{where} is never closed; {advice}")
        if len(self._lines) > 1 and (error is not None or self._look_like_rows(num_fields)):
            raise InputError(f"{where} swallows the lines up to {first + len(self._lines) - 1}; {advice}")

    def _look_like_rows(self, num_fields: int) -> bool:
        """Whether each line of the row has as many fields as a row, none of them empty."""
        if num_fields == 1 or (self._delimiter == "," and len(self._lines) < _MIN_LINES_SWALLOWED):
            return False
        fields = [line.split(self._delimiter) for line in self._lines]
        return all(len(parts) == num_fields and all(map(str.strip, parts)) for parts in fields)
