"""text: dialects of delimited text, quotes that swallow rows, encodings and compressions."""

from __future__ import annotations

import bz2
import lzma
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from hardbatch.pipeline.config import Dialect, Reading
from hardbatch.pipeline.errors import InputError
from tests.pipeline.sources.reading import pairs_of, read_dataset


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


@pytest.mark.parametrize(
    ("name", "content", "csv", "expected"),
    [
        (
            "x.tsv",
            'query\tdocument\n"why" so\t5" pipe\n"a\tb"\n',
            {"quote": ""},
            [('"why" so', '5" pipe'), ('"a', 'b"')],
        ),
        ("x.csv", "query;document\na, b;'c;d'\n", {"delimiter": ";", "quote": "'"}, [("a, b", "c;d")]),
        ("x.csv", 'query,document\na,"say \\"b\\", c"\n', {"escape": "\\"}, [("a", 'say "b", c')]),
        ("x.csv", 'query,document\na,"say ""b"""\n', {"escape": "\\"}, [("a", 'say "b"')]),
        ("x.csv", "query|document\na|b,c\n", {"delimiter": "|"}, [("a", "b,c")]),
    ],
)
def test_dialects(root: Path, name: str, content: str, csv: dict[str, Any], expected: list[tuple[str, str]]) -> None:
    (root / name).write_text(content)
    assert pairs_of(read_dataset(root, csv=csv)) == expected


@pytest.mark.parametrize("columns", [{"query": 1, "document": 3}, {"query": "column_1", "document": "column_3"}])
def test_a_file_without_header_has_numbered_columns(root: Path, columns: dict[str, Any]) -> None:
    (root / "x.tsv").write_text("\ufeffa\t1\tb\n\nc\t2\td\ne\tf\n")
    rows = read_dataset(root, csv={"header": False}, columns=columns)
    assert pairs_of(rows)[:2] == [("a", "b"), ("c", "d")]
    assert [(row.row, row.problem) for row in rows] == [(0, None), (1, None), (2, "wrong_field_count")]


@pytest.mark.parametrize(
    ("name", "content", "advice"),
    [
        ("x.tsv", "how to\tlike this\n", r"csv = \{ header = false \}, and columns by number"),
        ("x.csv", "query;document\na;b\n", r"if fields end with ';': csv = \{ delimiter = ';' \}"),
        ("x.csv", "query\tdocument\na\tb\n", r"delimiter = '\\t'"),
    ],
)
def test_a_header_without_the_columns_is_refused_with_what_may_help(
    root: Path, name: str, content: str, advice: str
) -> None:
    (root / name).write_text(content)
    with pytest.raises(InputError, match=rf"no column 'query' for query.*{advice}"):
        read_dataset(root)


def test_a_broken_quote_names_the_setting(root: Path) -> None:
    (root / "x.tsv").write_text('query\tdocument\n"why" so\tb\nc\td\n')
    rows = read_dataset(root)
    assert [row.problem for row in rows] == ["broken_csv", None] and "csv = { quote = '' }" in rows[0].detail


ROWS = "".join(f"q{i}\td{i}\n" for i in range(20))


@pytest.mark.parametrize(
    ("name", "content", "lines"),
    [
        # The quote is closed by one that happens to end a field: no error of the parser, and 21 rows lost.
        ("x.tsv", f'query\tdocument\na\tb\n"open\tc\n{ROWS}d"\te\n', "line 3\\) swallows the lines up to 24"),
        ("x.tsv", f'query\tdocument\n{ROWS}"open\tc\nd"\te\n', "line 22\\) swallows the lines up to 23"),
        ("x.csv", 'query,document\na,b\n"open,c\nd,e\nf,"g, h"\n', "line 3\\) swallows the lines up to 5"),
        ("x.csv", 'query,document\n"a,b\n' + "c,d\n" * 9 + 'e",f\n', "line 2\\) swallows the lines up to 12"),
        ("x.tsv", f'query\tdocument\na\t"b\n{ROWS}', "line 2\\) is never closed"),
    ],
)
def test_a_quote_that_swallows_rows_is_an_error_with_its_line(root: Path, name: str, content: str, lines: str) -> None:
    (root / name).write_text(content)
    with pytest.raises(InputError, match=rf"{name}: a quote that opens in row \d+ \({lines}.*csv = {{ quote = '' }}"):
        read_dataset(root)


@pytest.mark.parametrize(
    "text",
    [
        "first line\nsecond, with a comma\nthird, too",
        "\tindented\n\tcode\twith tabs",
        "a\tb",
        "one, two\nthree, four",
        "x" * 500 + "\n" * 50,
    ],
)
@pytest.mark.parametrize("delimiter", [",", "\t"])
def test_texts_of_several_lines_are_texts(root: Path, text: str, delimiter: str) -> None:
    quoted = '"' + text + '"'
    (root / "x.csv").write_text(f"query{delimiter}document\nq{delimiter}{quoted}\nr{delimiter}d\n")
    assert pairs_of(read_dataset(root, csv={"delimiter": delimiter})) == [("q", text), ("r", "d")]


@pytest.mark.parametrize("encoding", ["windows-1252", "utf-16", "utf-16-le", "shift-jis", "latin-1", "UTF8"])
@pytest.mark.parametrize("name", ["x.csv", "x.jsonl"])
def test_encodings(root: Path, encoding: str, name: str) -> None:
    text = "テスト" if encoding == "shift-jis" else "Überprüfen"
    line = f"q,{text}\n" if name == "x.csv" else f'{{"query": "q", "document": "{text}"}}\n'
    (root / name).write_bytes(("query,document\n" * (name == "x.csv") + line).encode(encoding))
    assert pairs_of(read_dataset(root, encoding=encoding)) == [("q", text)]


def test_bytes_that_are_not_of_the_encoding_make_a_row_invalid(root: Path) -> None:
    (root / "x.csv").write_bytes("query,document\na,é\nb,?\n".encode("windows-1252").replace(b"?", b"\x81"))
    assert pairs_of(read_dataset(root, encoding="windows-1252")) == [("a", "é"), ("b", "\udc81")]
    (root / "x.csv").write_bytes("query,document\na,é\n".encode("utf-16").replace(b"\xe9\0", b"\0\xd8"))
    with pytest.raises(InputError, match=r"x\.csv: is not utf-16 text after line \d"):
        read_dataset(root, encoding="utf-16")


@pytest.mark.parametrize("encoding", ["klingon", "rot13", "base64", "a\0b"])
def test_an_unknown_encoding_is_refused(encoding: str) -> None:
    with pytest.raises(ValidationError, match="is not an encoding that Python knows"):
        Reading(encoding=encoding)


@pytest.mark.parametrize("settings", [{"delimiter": ""}, {"delimiter": "||"}, {"quote": "''"}, {"escape": ""}])
def test_a_dialect_that_makes_no_sense_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Dialect(**settings)


@pytest.mark.parametrize(("name", "compress"), [("x.csv.bz2", bz2.compress), ("x.csv.xz", lzma.compress)])
def test_bzip2_and_xz(root: Path, name: str, compress: Any) -> None:
    content = compress("".join(["query,document\n", *(f"q{i},d{i}\n" for i in range(5_000))]).encode())
    (root / name).write_bytes(content)
    assert len(read_dataset(root)) == 5_000
    for cut in (content[: len(content) // 2], content[:-4], content[:60] + b"\xff" * 40 + content[100:]):
        (root / name).write_bytes(cut)
        with pytest.raises(InputError, match=rf"{name}: cut off or broken after line \d"):
            read_dataset(root)


def test_an_archive_is_refused(root: Path) -> None:
    (root / "x.csv").write_bytes(b"PK\x03\x04 and so on")
    with pytest.raises(InputError, match="is a zip archive; unpack it"):
        read_dataset(root)
