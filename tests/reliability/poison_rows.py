"""Kinds of poison: rows in a good file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from tests.reliability.poison import GOOD, Kind, json_lines

ESCAPES = "\x1b[31mred\x1b[0m \x1b]0;title\x07 \u202egnp.exe"  # what a terminal would obey


def rows(name: str, *odd: bytes, **reasons: int) -> Kind:
    """Odd lines among good ones, which are quarantined for these reasons."""
    return Kind(
        name=name,
        write=lambda folder: (folder / "pairs.jsonl").write_bytes(json_lines(*odd)),
        rows=GOOD + len(odd),
        reasons=reasons,
        odd=odd,
    )


def query(value: bytes, document: bytes = b'"d"') -> bytes:
    return b'{"query": %s, "document": %s}' % (value, document)


def text_of(megabytes: int) -> Callable[[Path], object]:
    """A text of that size, written when it is asked for."""

    def write(folder: Path) -> None:
        long = query(b'"long"', b'"' + b"word " * (megabytes * 2**20 // 5) + b'"')
        (folder / "pairs.jsonl").write_bytes(json_lines(long))

    return write


def copies(number: int) -> Callable[[Path], object]:
    same = query(b'"the same"', b'"of all"') + b"\n"
    return lambda folder: (folder / "pairs.jsonl").write_bytes(json_lines() + same * number)


ROWS = [
    rows("nulls, a missing key", query(b"null"), b'{"query": "q"}', null=2),
    rows("empty text", query(b'""'), empty=1),
    rows("white space alone", query(b'" \\t\\n\\u00a0\\u2003"'), empty=1),
    rows("zero-width signs alone", query(b'"\\u200b\\u200d\\ufeff \\u202e"'), empty=1),
    rows("NUL in a text", query(b'"a\\u0000b"'), nul_character=1),
    rows("bytes that are not UTF-8", query(b'"\xff\xfe\xc3"'), invalid_utf8=1),
    rows("lone surrogates", query(b'"\\ud800"'), query(b'"q"', b'"\\udc00 x"'), invalid_utf8=2),
    rows("a number, true, a list, an object", *map(query, (b"7", b"true", b"[7]", b'{"a": {}}')), wrong_type=4),
    rows("a broken JSON line", b'{"query": "q", "docum', broken_json=1),
    rows("lines that hold no object", b'["q", "d"]', b"17", b"null", b'"text"', broken_json=4),
    rows("two objects in a line", query(b'"q"') + query(b'"r"'), broken_json=1),
    rows("a key twice in an object", b'{"query": "1", "query": "2", "document": "d"}', broken_json=1),
    rows("100,000 nested brackets", b"[" * 100_000, b'{"query":' * 100_000, broken_json=2),
    rows("a number of 5,000 digits", b'{"query": "q", "document": "d", "n": %s}' % (b"1" * 5_000), broken_json=1),
    rows("a query that is its document", query(b'"same"', b'"same"'), query_equals_document=1),
    rows(
        "texts that differ by Unicode normalisation alone",
        query('"caf\u00e9"'.encode(), b'"some words"'),
        query('"cafe\u0301"'.encode(), b'"some words"'),
    ),
    rows(
        "commands of a terminal and marks of direction in texts",
        *(json.dumps({"query": f"{i}{ESCAPES}", "document": ESCAPES}).encode() for i in range(8)),
    ),
    Kind(name="a text of 2 MB", write=text_of(2), rows=GOOD + 1),
    Kind(name="a text of 100 MB", write=text_of(100), rows=GOOD + 1, is_long=True),
    Kind(
        name="20,000 copies of a pair",
        write=copies(20_000),
        rows=GOOD + 20_000,
        reasons={"duplicate_pair": 19_999},
    ),
    Kind(
        name="1,000,000 copies of a pair",
        write=copies(1_000_000),
        rows=GOOD + 1_000_000,
        reasons={"duplicate_pair": 999_999},
        is_long=True,
    ),
    Kind(
        name="texts without a word",
        write=lambda folder: (folder / "pairs.jsonl").write_bytes(json_lines(query(b'"?!"', b'"some words"'))),
        rows=GOOD + 1,
        no_vector=1,
    ),
    Kind(
        name="half of the rows broken",
        write=lambda folder: (folder / "pairs.jsonl").write_bytes(json_lines(*[b'{"query": "q", \x1b[31m'] * GOOD)),
        allowed=0.1,
        code=7,
        says=("dataset 'numbers'", "pairs.jsonl row 3", "broken_json", "ingest.max_quarantined_fraction"),
    ),
    Kind(
        name="not one good row",
        write=lambda folder: (folder / "pairs.jsonl").write_bytes(b"nonsense\n" * 9),
        code=3,
        says=("no domain fills a batch", "numbers 0 of 9 rows: broken_json 9", "fix the source"),
    ),
]
