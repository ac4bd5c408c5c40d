"""Kinds of poison: files that are not what they should be, and names that lead elsewhere."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tests.reliability.poison import GOOD, Kind, comma_separated, json_lines, pairs
from tests.reliability.poison_rows import ESCAPES

TABLE = pa.Table.from_pylist(pairs())
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 123\n"


def file(kind: str, content: bytes, *says: str, source: str = "pairs.jsonl", code: int = 3, **more: Any) -> Kind:
    """A file of these bytes, which is refused with these words."""
    return Kind(
        name=kind,
        write=lambda folder: (folder / source).write_bytes(content),
        source=source,
        code=code,
        says=says,
        **more,
    )


def good(kind: str, content: bytes, source: str = "pairs.jsonl", **reasons: int) -> Kind:
    """A file of these bytes, which is read."""
    return Kind(
        name=kind,
        write=lambda folder: (folder / source).write_bytes(content),
        source=source,
        rows=GOOD + sum(reasons.values()),
        reasons=reasons,
    )


def parquet(**columns: pa.Array) -> bytes:
    """A Parquet file of the good pairs, some of their columns replaced."""
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({**dict(zip(TABLE.column_names, TABLE.columns, strict=True)), **columns}), sink)
    return sink.getvalue().to_pybytes()


def renamed() -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(TABLE.rename_columns(["query", "text"]), sink)
    return sink.getvalue().to_pybytes()


def damaged() -> bytes:
    whole = bytearray(parquet())
    whole[20:60] = b"\xff" * 40
    return bytes(whole)


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


def noise() -> bytes:
    """Lines that no packing makes much smaller."""
    draws = np.random.default_rng(0)
    rows = ({"query": draws.bytes(40).hex(), "document": draws.bytes(40).hex()} for _ in range(2_000))
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


JSON, CSV = json_lines(), comma_separated()
MARK = b"\xef\xbb\xbf"
FORMATS = [
    file("an empty file", b"", "pairs.jsonl: the file is empty"),
    file("blank lines alone", b"\n \n\n", "no rows in pairs.jsonl"),
    file("CSV of a header alone", b"query,document\n", "no rows in pairs.csv", source="pairs.csv"),
    file(
        "Parquet of no rows",
        parquet(query=TABLE["query"][:0], document=TABLE["document"][:0]),
        "no rows in pairs.parquet",
        source="pairs.parquet",
    ),
    Kind(
        name="a folder for a file",
        write=lambda folder: (folder / "pairs.jsonl").mkdir(),
        code=3,
        says=("'pairs.jsonl' is a folder", "name its files"),
    ),
    file(
        "wrong columns",
        b'{"question": "q", "answer": "a"}\n',
        "pairs.jsonl: no column 'query'",
        "question, answer",
        "columns.query",
    ),
    file(
        "wrong columns named with commands of a terminal",
        json.dumps({ESCAPES: "q", "a\nb\ud800": 1}).encode(),
        "no column 'query'",
        "\\x1b[31mred",
        "\\u202e",
        "a\\nb\\ud800",
    ),
    file("CSV with semicolons", b"query;document\na;b\n", "no column 'query'", "query;document", source="pairs.csv"),
    file("a renamed column", renamed(), "pairs.parquet: no column 'document'", "query, text", source="pairs.parquet"),
    *(
        file(f"a column of {what}", parquet(query=column), f"column 'query' (query) is {kind}", source="pairs.parquet")
        for what, column, kind in (
            ("numbers", pa.array(range(GOOD)), "int64, expected text"),
            ("bytes", pa.array([b"x"] * GOOD), "binary, expected text"),
            ("lists of numbers", pa.array([[1]] * GOOD), "list<"),
        )
    ),
    file("a column of nulls", parquet(query=pa.nulls(GOOD)), "no value in any of its", source="pairs.parquet"),
    good(
        "a column of lists of texts",
        parquet(query=pa.array([[query] for query in TABLE["query"].to_pylist()])),
        "pairs.parquet",
    ),
    good(
        "dictionary and large_string columns",
        parquet(query=TABLE["query"].dictionary_encode(), document=TABLE["document"].cast(pa.large_string())),
        "pairs.parquet",
    ),
    file("truncated Parquet", parquet()[:900], "pairs.parquet: is not a readable Parquet file", source="pairs.parquet"),
    file("a damaged page of Parquet", damaged(), "pairs.parquet: broken after row 0", source="pairs.parquet"),
    *(
        file(
            f"truncated {name}", packed[:-50_000], f"pairs.jsonl.{end}: cut off or broken", source=f"pairs.jsonl.{end}"
        )
        for name, end, packed in (("gzip", "gz", gzip.compress(noise(), mtime=0)), ("zstd", "zst", zstd(noise())))
    ),
    good("gzip named .jsonl", gzip.compress(JSON, mtime=0)),
    good("plain text named .gz", JSON, "pairs.jsonl.gz"),
    file("Parquet named .jsonl", parquet(), "pairs.jsonl: is a Parquet file"),
    file("UTF-16 with a byte order mark", JSON.decode().encode("utf-16"), "pairs.jsonl: is UTF-16 text", "iconv"),
    good("UTF-8 with a byte order mark, CR LF", MARK + JSON.replace(b"\n", b"\r\n")),
    good("CSV with a byte order mark, CR LF", MARK + CSV.replace(b"\n", b"\r\n"), "pairs.csv"),
    good("CSV with too many and too few fields", comma_separated(b"a,b,c", b"a"), "pairs.csv", wrong_field_count=2),
    good("CSV with a stray quote", comma_separated(b'a,"b"c'), "pairs.csv", broken_csv=1),
    file(
        "CSV with a quote that never closes",
        comma_separated(b'a,"b'),
        "pairs.csv: a quote that opens in row 3 (line 5) is never closed",
        source="pairs.csv",
    ),
    file(
        "CSV with CR alone", CSV.replace(b"\n", b"\r"), "pairs.csv: its header line cannot be read", source="pairs.csv"
    ),
    file("CSV with a column twice", b"query,document,query\na,b,c\n", "occurs 2 times", source="pairs.csv"),
    good("a JSON array over many lines", json.dumps(pairs(), indent=1).encode()),
    file(
        "a JSON array that is cut off",
        json.dumps(pairs(), indent=1).encode()[:-2],
        f"pairs.jsonl: broken JSON array after row {GOOD}",
    ),
    file(
        "a Git LFS pointer",
        LFS_POINTER,
        "is a Git LFS pointer",
        "git lfs pull",
        source="pairs.parquet",
    ),
    file(
        "a web page for a file",
        b"<!DOCTYPE html>\n<html><body>404</body></html>\n",
        "pairs.jsonl row 0",
        "broken_json",
        allowed=0.1,
        code=7,
    ),
]


def linked(name: str, target: str) -> Callable[[Path], object]:
    """A link, beside a good file, with another good one outside."""

    def write(folder: Path) -> None:
        (folder.parent / "outside.jsonl").write_bytes(JSON)
        (folder / "pairs.jsonl").write_bytes(JSON)
        (folder / name).symlink_to(target)

    return write


def pipe(folder: Path) -> None:
    os.mkfifo(folder / "pairs.jsonl")


def named(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: Path(os.fsdecode(os.fsencode(folder / name))).write_bytes(content)


def elsewhere(kind: str, source: str, *says: str, code: int = 2) -> Kind:
    """A source that leads away from the good files."""
    return Kind(
        name=kind,
        write=linked("link.jsonl", "../outside.jsonl"),
        source=source,
        code=code,
        says=says,
    )


ODD_NAME = "a\nb\x1b[31m.jsonl"
NAMES = [
    Kind(name="a file that is not there", write=lambda folder: None, code=3, says=("no file 'pairs.jsonl' below",)),
    Kind(name="a pipe for a file", write=pipe, code=3, says=("pairs.jsonl: is not a regular file",)),
    Kind(name="a pipe that a pattern finds", write=pipe, source="*.jsonl", code=3, says=("is not a regular file",)),
    Kind(
        name="a link to itself",
        write=linked("loop.jsonl", "loop.jsonl"),
        source="loop.jsonl",
        code=2,
        says=("loop.jsonl",),
    ),
    Kind(
        name="a link to nowhere that a pattern finds",
        write=linked("other.jsonl", "nowhere.jsonl"),
        source="*.jsonl",
        code=3,
        says=("other.jsonl",),
    ),
    Kind(name="a device", write=linked("zero.jsonl", "/dev/zero"), source="zero.jsonl", code=2, says=("leads out of",)),
    elsewhere("a link that leads out", "link.jsonl", "'link.jsonl' leads out of", "through a link"),
    elsewhere("../ in a source", "../outside.jsonl", "'../outside.jsonl' leads out of"),
    elsewhere("an absolute source", "/etc/passwd", "'/etc/passwd' is absolute"),
    elsewhere("a source of 5,000 letters", "a" * 5_000, "is not a usable path"),
    elsewhere("a file:// URL", "file:///etc/passwd", "file:///etc/passwd", "https://"),
    elsewhere("a chained URL", "simplecache::file:///etc/passwd", "simplecache::file:///etc/passwd"),
    elsewhere("a zip:// URL", "zip://etc/x.jsonl", "zip://etc/x.jsonl", "https://"),
    elsewhere("a python: source that is code", "python:os;print(1)", "python:os;print(1)", "import name"),
    Kind(name="a file name with a line break and a command", write=named(ODD_NAME, JSON), source="*.jsonl", rows=GOOD),
    Kind(
        name="the same, empty",
        write=named(ODD_NAME, b""),
        source="*.jsonl",
        code=3,
        says=("a\\nb\\x1b[31m.jsonl: the file is empty",),
    ),
    Kind(
        name="a file name that is not UTF-8",
        write=named("a\udcff.jsonl", JSON),
        source="*.jsonl",
        code=3,
        says=("a\\udcff.jsonl", "not UTF-8"),
    ),
]
