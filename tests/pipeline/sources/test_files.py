"""sources: which files a dataset names, and the rows of good, odd and broken files."""

from __future__ import annotations

import gzip
import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hardbatch.pipeline.artifacts.files import DigestCache
from hardbatch.pipeline.config import Dataset, Reading
from hardbatch.pipeline.errors import ConfigError, HardbatchError, InputError
from hardbatch.pipeline.sources.files import RawRow, SourceFile, list_source_files
from hardbatch.pipeline.sources.rows import read_rows

PAIRS = [{"query": f"q{i}", "document": f"d{i}"} for i in range(6)]
LINES = "".join(json.dumps(pair) + "\n" for pair in PAIRS).encode()
List = Callable[..., list[SourceFile]]
Read = Callable[..., list[RawRow]]


def zstd(data: bytes) -> bytes:
    """`data` as one frame of zstd."""
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


@pytest.fixture
def list_files(root: Path) -> List:
    """`list_files(source, **settings of the dataset)`."""

    def list_(source: Any, **settings: Any) -> list[SourceFile]:
        dataset = Dataset(name="n", source=source, **settings)
        return list_source_files(dataset, root, DigestCache(root.parent / ".digests.json"))

    return list_


@pytest.fixture
def read(root: Path, list_files: List) -> Read:
    """`read(name, bytes or table, columns={})`: writes the file, then reads all its rows."""

    def read(name: str, content: bytes | pa.Table, columns: dict[str, str] | None = None, **settings: Any) -> Any:
        if isinstance(content, bytes):
            (root / name).write_bytes(content)
        else:
            pq.write_table(content, root / name)
        (file,) = list_files(name, **settings)
        return read_all([file], root, columns=columns or {})

    return read


def read_all(files: list[SourceFile], root: Path, **settings: Any) -> list[RawRow]:
    """All pairs of some files, which are a dataset."""
    rows = read_rows(files, range(len(files)), Reading(**settings), root.parent / "scratch", Counter())
    return [row for _, row in rows]


def texts(rows: list[RawRow]) -> list[tuple[Any, Any]]:
    return [(row.query, row.document) for row in rows]


GOOD = [(pair["query"], pair["document"]) for pair in PAIRS]


# which files


def test_files_come_in_the_order_of_the_manifest_then_of_their_names(root: Path, list_files: List) -> None:
    for name in ("b.jsonl", "a.jsonl", "sub/c.jsonl", "sub/deep/d.csv"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())
    files = list_files(["sub/c.jsonl", "*.jsonl", "**/*.csv"])
    assert [file.name for file in files] == ["sub/c.jsonl", "a.jsonl", "b.jsonl", "sub/deep/d.csv"]
    assert [file.format for file in files] == ["jsonl", "jsonl", "jsonl", "csv"]
    assert files[1].sha256 == hashlib.sha256(b"a.jsonl").hexdigest()
    assert files[1].num_bytes == 7


@pytest.mark.parametrize(
    ("name", "format_"),
    [("a.parquet", "parquet"), ("a.pq", "parquet"), ("a.ndjson.gz", "jsonl"), ("a.TSV", "tsv"), ("a.csv.zst", "csv")],
)
def test_the_format_follows_from_the_name(root: Path, list_files: List, name: str, format_: str) -> None:
    (root / name).write_bytes(b"x")
    assert list_files(name)[0].format == format_


def test_a_format_that_does_not_follow_from_the_name_must_be_given(root: Path, list_files: List) -> None:
    (root / "a.txt").write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"dataset 'n': cannot tell the format of 'a\.txt'.*set format to"):
        list_files("a.txt")
    assert list_files("a.txt", format="csv")[0].format == "csv"


@pytest.mark.parametrize(
    "source",
    ["/etc/hostname", "../secret.jsonl", "a/../../secret.jsonl", "link.jsonl", "out/secret.jsonl", "../*.jsonl",
     "/etc/*", "out/*.jsonl", "*/secret.jsonl", "l*.jsonl", "[o]ut/*.jsonl", "a*/../../secret.jsonl"],
)  # fmt: skip
def test_a_path_that_leads_out_is_refused(root: Path, list_files: List, source: str) -> None:
    outside = root.parent / "outside"
    outside.mkdir()
    (outside / "secret.jsonl").write_bytes(LINES)
    (root.parent / "secret.jsonl").write_bytes(LINES)
    (root / "a1").mkdir()
    (root / "link.jsonl").symlink_to(outside / "secret.jsonl")
    (root / "out").symlink_to(outside)
    with pytest.raises(ConfigError, match=r"dataset 'n': path .* (leads out of|is absolute)") as caught:
        list_files(source)
    assert caught.value.exit_code == 2


def test_a_link_that_stays_below_the_root_is_followed(root: Path, list_files: List) -> None:
    (root / "a.jsonl").write_bytes(LINES)
    (root / "b.jsonl").symlink_to(root / "a.jsonl")
    assert list_files("b.jsonl")[0].sha256 == list_files("a.jsonl")[0].sha256


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("none.jsonl", r"no file 'none\.jsonl' below"),
        ("org/set-v1", r"no file 'org/set-v1' below .*: hf://datasets/org/set-v1/\*\*/\*\.parquet"),
        ("*.none", r"no file matches '\*\.none' below"),
        ("folder", r"'folder' is a folder; name its files"),
        ("", r"is a folder"),
        ("broken.jsonl", r"no file 'broken\.jsonl' below"),
        pytest.param("a\0b.jsonl", r"a\\x00b"),
        pytest.param("a" * 300 + ".jsonl", "aaa"),
        pytest.param("loop.jsonl", "loop"),
    ],
)
def test_a_file_that_is_not_there_is_named(root: Path, list_files: List, source: str, message: str) -> None:
    (root / "folder").mkdir()
    (root / "broken.jsonl").symlink_to(root / "nowhere")
    (root / "loop.jsonl").symlink_to(root / "loop.jsonl")
    with pytest.raises(HardbatchError, match=message) as caught:
        list_files(source)
    assert "dataset 'n'" in str(caught.value)
    assert caught.value.exit_code in (2, 3)


def test_an_expected_digest_is_checked(root: Path, list_files: List) -> None:
    for name, content in (("a.jsonl", LINES), ("a/x.jsonl", b"changed"), ("b/x.jsonl", LINES)):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(content)
    digest = hashlib.sha256(LINES).hexdigest()
    assert list_files("a.jsonl", sha256={"a.jsonl": digest})
    with pytest.raises(InputError, match=rf"a\.jsonl: sha256 is {digest}, the manifest expects {'0' * 64}"):
        list_files("a.jsonl", sha256={"a.jsonl": "0" * 64})
    with pytest.raises(ConfigError, match=r"sha256 is given for 'b\.jsonl', which is not one of its files"):
        list_files("a.jsonl", sha256={"b.jsonl": digest})
    with pytest.raises(ConfigError, match=r"'x\.jsonl', which could be a/x\.jsonl, b/x\.jsonl; give its path"):
        list_files(["a/x.jsonl", "b/x.jsonl"], sha256={"x.jsonl": digest})


# remote files


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[fsspec.AbstractFileSystem]:
    monkeypatch.setattr("hardbatch.pipeline.sources.files._PROTOCOLS", ("memory", "nosuch"))
    filesystem = fsspec.filesystem("memory")
    filesystem.pipe({"/bucket/a.jsonl": LINES, "/bucket/b.jsonl": LINES.replace(b"q", b"r")})
    yield filesystem
    filesystem.rm("/bucket", recursive=True)


@pytest.mark.usefixtures("memory")
def test_a_remote_file_is_read_its_digest_checked_and_its_copy_removed(root: Path, list_files: List) -> None:
    assert len(list_files("memory://bucket/*.jsonl")) == 2
    for sha256 in ({}, {"a.jsonl": hashlib.sha256(LINES).hexdigest()}):
        (file,) = list_files("memory://bucket/a.jsonl", sha256=sha256)
        assert texts(read_all([file], root)) == GOOD
    (file,) = list_files("memory://bucket/a.jsonl", sha256={"a.jsonl": "0" * 64})
    with pytest.raises(InputError, match=r"bucket/a\.jsonl.*sha256"):
        read_all([file], root)
    assert list((root.parent / "scratch").iterdir()) == []


def test_remote_patterns_leave_out_hidden_names_and_take_names_literally(
    list_files: List, memory: fsspec.AbstractFileSystem
) -> None:
    names = ("._a.jsonl", ".cache/x/c.jsonl", "_temporary/0/d.jsonl", "b[1].jsonl", "b1.jsonl")
    memory.pipe({f"/bucket/{name}": LINES for name in names})
    found = [Path(file.name).name for file in list_files("memory://bucket/**/*.jsonl")]
    assert found == ["a.jsonl", "b.jsonl", "b1.jsonl", "b[1].jsonl"]
    assert [Path(file.name).name for file in list_files("memory://bucket/b[1].jsonl")] == ["b[1].jsonl"]
    assert [Path(file.name).name for file in list_files("memory://bucket/._*.jsonl")] == ["._a.jsonl"]


@pytest.mark.usefixtures("memory")
@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("memory://bucket/none.jsonl", InputError),
        ("memory://bucket/*.none", InputError),
        ("nosuch://bucket/a.jsonl", ConfigError),
        ("file:///etc/hostname", ConfigError),
        ("local:///etc/hostname", ConfigError),
        ("simplecache::file:///etc/hostname", ConfigError),
        ("filecache::memory://bucket/a.jsonl", ConfigError),
        ("FILE:///etc/hostname", ConfigError),
    ],
)
def test_a_url_that_cannot_be_used_is_named(list_files: List, source: str, error: type[HardbatchError]) -> None:
    with pytest.raises(error) as caught:
        list_files(source, format="jsonl")
    assert source in str(caught.value) and "dataset 'n'" in str(caught.value)


@pytest.mark.usefixtures("memory")
def test_a_remote_folder_is_refused(root: Path, list_files: List) -> None:
    with pytest.raises(HardbatchError, match="folder"):
        for file in list_files("memory://bucket", format="jsonl"):
            read_all([file], root)


@pytest.mark.parametrize("source", ["memory://bucket/a.jsonl", "a.jsonl"])
def test_a_file_that_vanished_is_named(
    root: Path, list_files: List, memory: fsspec.AbstractFileSystem, source: str
) -> None:
    (root / "a.jsonl").write_bytes(LINES)
    (file,) = list_files(source)
    (root / "a.jsonl").unlink()
    memory.rm("/bucket/a.jsonl")
    with pytest.raises(InputError, match=r"a\.jsonl: cannot be (fetched|read any more)"):
        read_all([file], root)


# reading


HALF = LINES.index(b"\n", len(LINES) // 2) + 1


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", LINES),
        ("plain.jsonl.gz", LINES),
        ("a.jsonl.gz", gzip.compress(LINES, mtime=0)),
        ("a.jsonl.zst", zstd(LINES)),
        ("two.jsonl.gz", gzip.compress(LINES[:HALF], mtime=0) + gzip.compress(LINES[HALF:], mtime=0)),
        ("two.jsonl.zst", zstd(LINES[:HALF]) + zstd(LINES[HALF:])),
    ],
)
def test_json_lines_plain_and_compressed(read: Read, name: str, content: bytes) -> None:
    rows = read(name, content)
    assert texts(rows) == GOOD
    assert [row.row for row in rows] == list(range(6))


def noise() -> bytes:
    """About 150 KB of pairs that do not compress away."""
    numbers = random.Random(0)
    pairs = ({"query": f"q{numbers.getrandbits(256):x}", "document": f"d{i}"} for i in range(2_000))
    return "".join(json.dumps(pair) + "\n" for pair in pairs).encode()


GZIP = gzip.compress(noise(), mtime=0)
MIDDLE = len(GZIP) // 2


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl.gz", GZIP[:MIDDLE]),
        ("a.jsonl.gz", GZIP[:-8] + bytes(8)),  # the checksum
        ("a.jsonl.gz", GZIP[:MIDDLE] + b"\xff" * 64 + GZIP[MIDDLE + 64 :]),
        ("a.jsonl.zst", zstd(noise())[: len(zstd(noise())) // 2]),  # without a checksum garbage cannot be detected
    ],
)
def test_a_damaged_compressed_file_is_refused_and_named(read: Read, name: str, content: bytes) -> None:
    with pytest.raises(InputError, match=rf"{name}: cut off or broken after line \d+"):
        read(name, content)


def test_odd_lines_of_json(read: Read) -> None:
    lines = [
        b'\xef\xbb\xbf{"query": "a", "document": "b", "more": NaN}\r',
        b"",
        b" \t",
        b'{"query": "\xff", "document": "b"}',
        b'{"query": "a", "docum',
        b"[1]",
        b"null",
        b"[" * 100_000,
        b'{"query": ' + b"1" * 5_000 + b"}",
        b'{"document": "\\ud800"}',
        '{"query": "\u2028\u0085", "document": {"a": 1}}'.encode(),
    ]
    rows = read("a.jsonl", b"\n".join(lines))
    assert [(row.row, row.problem) for row in rows] == [
        (0, None),
        (1, "invalid_utf8"),
        *((row, "broken_json") for row in range(2, 7)),
        (7, None),
        (8, None),
    ]
    assert texts(rows)[0] == ("a", "b")
    assert texts(rows)[7:] == [(None, "\ud800"), ("\u2028\u0085", {"a": 1})]


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("size", [1, 50, 10_000])
def test_a_json_array_is_read_item_by_item(
    read: Read, monkeypatch: pytest.MonkeyPatch, indent: int | None, size: int
) -> None:
    monkeypatch.setattr("hardbatch.pipeline.sources.text._MIN_ARRAY_READ", size)
    content = json.dumps([*PAIRS, 5], indent=indent).encode()
    rows = read("a.json", content)
    assert texts(rows)[:-1] == GOOD and [row.row for row in rows] == list(range(7))
    assert (rows[-1].problem, rows[-1].detail) == ("broken_json", "no JSON object: 5")
    assert read("b.json", b"\n [ ] \n") == []
    for cut in (content[:-1], content[: len(content) // 2], content.replace(b"q3", b'"')):
        with pytest.raises(InputError, match=r"a\.json: broken JSON array after row \d"):
            read("a.json", cut)


@pytest.mark.parametrize("size", [1, 2**16])
def test_objects_over_several_lines_are_read(read: Read, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """As `jq` writes them, and as a whole file that is one object."""
    monkeypatch.setattr("hardbatch.pipeline.sources.text._MIN_ARRAY_READ", size)
    content = "\n".join(json.dumps(pair, indent=2) for pair in PAIRS).encode() + b"\n"
    rows = read("a.json", content)
    assert texts(rows) == GOOD and [row.row for row in rows] == list(range(6))
    assert texts(read("b.jsonl", content.replace(b"\n", b"\r\n"))) == GOOD
    for cut in (content[:-9], content.replace(b"q3", b'"'), content + b"]"):
        with pytest.raises(InputError, match=r"a\.json: broken JSON after row \d"):
            read("a.json", cut)


def test_negatives_of_json_are_optional(read: Read) -> None:
    lines = b'{"query": "a", "document": "b"}\n{"query": "c", "document": "d", "neg": ["e", null]}\n'
    assert [row.negatives for row in read("a.jsonl", lines, {"negatives": "neg"})] == [[], ["e", None]]


def test_csv_with_marks_breaks_and_quotes(read: Read) -> None:
    content = b'\xef\xbb\xbfid,document,query\r\n1,"b\r\nb, ""b""",a\r\n\r\n2,d\r\n3,\xff,e\r\n4,f,g,h\r\n5,,\r\n'
    rows = read("a.csv", content)
    assert [(row.row, row.problem) for row in rows] == [
        (0, None), (1, "wrong_field_count"), (2, None), (3, "wrong_field_count"), (4, None),
    ]  # fmt: skip
    assert texts(rows)[0] == ("a", 'b\r\nb, "b"')
    assert texts(rows)[2] == ("e", "\udcff")  # not UTF-8: ingest quarantines it
    assert texts(rows)[4] == ("", "")


def test_tsv_and_mapped_columns(read: Read) -> None:
    rows = read("a.tsv", b"x\ty\tz\n1, 1\t2\t3\n", {"query": "z", "document": "x", "negatives": "y"})
    assert [(row.query, row.document, row.negatives) for row in rows] == [("3", "1, 1", ["2"])]


def test_a_bare_carriage_return_is_a_broken_row_but_not_a_line_ending(read: Read) -> None:
    rows = read("a.csv", b"query,document\na,b\rc,d\ne,f\n")
    assert [(row.row, row.problem) for row in rows] == [(0, "broken_csv"), (1, None)]
    with pytest.raises(InputError, match=r"a\.csv: its header line cannot be read"):
        read("a.csv", b"query,document\ra,b\rc,d\r")


@pytest.mark.parametrize("kind", ["a.jsonl", "a.csv", "a.parquet"])
@pytest.mark.parametrize(("field", "name"), [("query", "question"), ("document", "passage"), ("negatives", "neg")])
def test_a_missing_column_is_named_with_those_there_are(read: Read, kind: str, field: str, name: str) -> None:
    if (kind, field) == ("a.jsonl", "negatives"):
        return  # optional there, see above
    content = {"a.jsonl": LINES, "a.csv": b"query,document\na,b\n"}.get(kind, pa.Table.from_pylist(PAIRS))
    with pytest.raises(InputError) as caught:
        read(kind, content, {field: name})
    message = str(caught.value)
    assert f"{kind}: no column '{name}' for {field}; it has: query, document" in message
    assert f"columns.{field}" in message


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet", "a.jsonl.gz"])
def test_an_empty_file_is_refused(read: Read, name: str) -> None:
    with pytest.raises(InputError, match=rf"{name}: the file is empty"):
        read(name, b"")


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet"])
def test_a_file_without_rows_gives_none(read: Read, name: str) -> None:
    content = {"a.jsonl": b"\n\n", "a.csv": b"query,document\n"}.get(name, pa.Table.from_pylist(PAIRS)[:0])
    assert read(name, content) == []


# parquet


def invalid_texts() -> pa.Array:
    raw = pa.array([b"ok", b"\xff\xfe", None, b"\xed\xa0\x80"], pa.binary())
    return pa.StringArray.from_buffers(len(raw), raw.buffers()[1], raw.buffers()[2], raw.buffers()[0])


@pytest.mark.parametrize("kind", ["string", "large_string", "dictionary"])
def test_texts_of_parquet_that_are_not_utf_8_come_out_as_bytes(read: Read, kind: str) -> None:
    column = invalid_texts()
    if kind == "large_string":
        column = column.cast(pa.large_binary()).view(pa.large_string())
    elif kind == "dictionary":
        column = column.dictionary_encode()
    rows = read("a.parquet", pa.table({"query": column, "document": ["a", "b", "c", "d"]}))
    assert texts(rows) == [("ok", "a"), (b"\xff\xfe", "b"), (None, "c"), (b"\xed\xa0\x80", "d")]


def test_negatives_of_parquet(read: Read) -> None:
    columns = {"query": ["a", "b", "c"], "document": ["d", "e", "f"]}
    lists = pa.ListArray.from_arrays(pa.array([0, 2, 2, 4]), invalid_texts())
    for negatives, expected in (
        (pa.array([["x", None], None, []]), [["x", None], [], []]),
        (pa.array([["x"], None, []], pa.large_list(pa.large_string())), [["x"], [], []]),
        (pa.array(["x", None, ""]), [["x"], [], []]),
        (lists, [["ok", b"\xff\xfe"], [], [None, b"\xed\xa0\x80"]]),
    ):
        rows = read("a.parquet", pa.table({**columns, "neg": negatives}), {"negatives": "neg"})
        assert [row.negatives for row in rows] == expected


@pytest.mark.parametrize(
    "column", [pa.array([1]), pa.array([[1]]), pa.array([{"a": "b"}]), pa.array([b"x"]), pa.array([True])]
)
@pytest.mark.parametrize("field", ["query", "negatives"])
def test_a_column_of_another_type_is_refused(read: Read, column: pa.Array, field: str) -> None:
    table = pa.table({"query": ["a"], "document": ["b"], "x": column})
    with pytest.raises(InputError, match=rf"a\.parquet: column 'x' \({field}\) is .*, expected .*text"):
        read("a.parquet", table, {field: "x"})


def test_a_column_with_a_dot_in_its_name_is_read(read: Read) -> None:
    table = pa.table({"a.b": ["x"], "document": ["y"], "a": ["z"]})
    assert texts(read("a.parquet", table, {"query": "a.b"})) == [("x", "y")]


def test_two_columns_of_one_name_are_refused(read: Read) -> None:
    table = pa.table([pa.array(["a"]), pa.array(["b"]), pa.array(["c"])], names=["query", "query", "document"])
    with pytest.raises(InputError, match="query"):
        read("a.parquet", table)


def bytes_of(table: pa.Table, **options: Any) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, **options)
    return sink.getvalue().to_pybytes()


WHOLE = bytes_of(pa.Table.from_pylist(PAIRS), store_schema=False)


@pytest.mark.parametrize(
    "content",
    [
        *(WHOLE[:cut] for cut in (1, 8, 100, -1, -5)),
        b"PAR1 nonsense PAR1",
        LINES,
        gzip.compress(LINES, mtime=0),
        WHOLE.replace(b"query", b"q\xffery"),  # the name of a column is not UTF-8
    ],
)
def test_what_is_not_a_whole_parquet_file_is_refused(read: Read, content: bytes) -> None:
    with pytest.raises(InputError, match=r"a\.parquet: is not a readable Parquet file"):
        read("a.parquet", content)


def test_a_flipped_bit_of_a_parquet_file_is_an_input_error_or_harmless(root: Path, list_files: List) -> None:
    table = pa.table({"query": [f"q{i}" for i in range(50)], "document": [f"d{i}" for i in range(50)]})
    raw = bytes_of(table)
    (root / "a.parquet").write_bytes(raw)
    file = list_files("a.parquet")[0]._replace(modified_ns=None)  # else every flip is a change while it is read
    num_refused = 0
    for number in range(1_500):
        numbers = random.Random(number)
        changed = bytearray(raw)
        changed[numbers.randrange(len(raw))] ^= 1 << numbers.randrange(8)
        (root / "a.parquet").write_bytes(changed)
        try:
            assert len(read_all([file], root)) == 50
        except InputError:
            num_refused += 1
    assert num_refused > 100


def test_a_negatives_key_that_no_row_has_is_refused(read: Read) -> None:
    with pytest.raises(
        InputError, match=r"no column 'typo' for negatives; it has: query, document.*columns\.negatives"
    ):
        read("a.jsonl", LINES, {"negatives": "typo"})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", LINES + b'{"query": "' + b"x" * 200 + b'"}\n', r"line 7 is longer than 100 bytes"),
        ("a.csv", b"query,document\n" + b"x" * 200 + b",d\n", r"line 2 is longer than 100 bytes"),
        ("a.csv", b'query,document\na,b\nc,"d\ne,f\n', r"a quote that opens in row 1 \(line 3\) is never closed"),
        ("a.csv", b'query,document\na,b\n"' + b"x\n" * 200 + b'",d\n', r"a quote that opens in row 1 \(line 3\)"),
    ],
)
def test_an_endless_line_or_field_is_refused(
    read: Read, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes, message: str
) -> None:
    monkeypatch.setattr("hardbatch.pipeline.sources.text._MAX_LINE_BYTES", 100)
    with pytest.raises(InputError, match=rf"a\.{name[2:]}: {message}"):
        read(name, content)


def test_a_key_twice_is_a_broken_row_but_not_its_name_in_a_text(read: Read) -> None:
    lines = [
        b'{"query": "a", "query": "b", "document": "c"}',
        b'{"query": "a", "more": {"query": 1}, "document": "c"}',
        b'{"query": "say \\"query\\"", "document": "c"}',
    ]
    assert [row.problem for row in read("a.jsonl", b"\n".join(lines))] == ["broken_json", None, None]


def test_a_broken_row_says_why_and_where(read: Read) -> None:
    assert [row.detail for row in read("a.jsonl", b'{"query": "a", "document": "b"}\n\n{"query": \n[1]\n')] == [
        "", "line 3: character 12: Expecting value", "line 4: no JSON object but another value",
    ]  # fmt: skip
    rows = read("a.csv", b'query,document\na,b\nc,"d"e\ng\n"h\n",i,\n')
    assert [(row.row, row.problem) for row in rows] == [
        (0, None), (1, "broken_csv"), (2, "wrong_field_count"), (3, "wrong_field_count"),
    ]  # fmt: skip
    assert rows[1].detail.startswith("lines 3 to 3: ") and rows[2].detail == "lines 4 to 4: 1 fields, the header has 2"
    assert rows[3].detail == "lines 5 to 6: 3 fields, the header has 2"
