"""extra: columns that are carried as they are, and their types over a whole dataset."""

from __future__ import annotations

import datetime
import decimal
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from hardbatch.pipeline.errors import ConfigError, InputError
from hardbatch.pipeline.sources.extra import as_array, extra_schema, joined_schema, type_of
from tests.pipeline.sources.reading import read_dataset, write_as

FORMATS = pytest.mark.parametrize("format_", ["jsonl", "parquet", "arrow"])
TEXT, INTEGER, NUMBER, TRUTH = pa.large_utf8(), pa.int64(), pa.float64(), pa.bool_()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


def read_extra(root: Path, names: Any, source: Any = "*", **settings: Any) -> pa.Table:
    """The extra columns of all rows of a dataset, with their types."""
    counts = Counter[str]()
    rows = read_dataset(root, source, counts, extra_columns=names, **settings)
    schema = extra_schema(counts, sorted(names), "n")
    columns = list(zip(*(row.extra for row in rows), strict=True))
    arrays = [as_array(values, field.type) for values, field in zip(columns, schema, strict=True)]
    return pa.table(arrays, schema=schema)


def rows_of(**columns: list[Any]) -> list[dict[str, Any]]:
    """Pairs with these columns; a value ... is left out of its row."""
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    texts = [{"query": f"q{i}", "document": f"d{i}"} for i in range(len(rows))]
    return [text | {name: v for name, v in row.items() if v is not ...} for text, row in zip(texts, rows, strict=True)]


@FORMATS
def test_every_kind_is_carried_as_it_is(root: Path, format_: str) -> None:
    columns: dict[str, list[Any]] = {
        "score": [0.25, None, -1.5],
        "rank": [2**62, 0, None],
        "lang": ["de", "", "\u0000x"],
        "is_human": [True, None, False],
        "scores": [[0.5, None], [], None],
        "tags": [["a", "b"], ["c"], []],
        "flags": [[True], [], [False, True]],
    }
    write_as(root / f"x.{format_}", rows_of(**columns))
    table = read_extra(root, list(columns))
    assert {name: table[name].to_pylist() for name in table.column_names} == columns
    assert {field.name: field.type for field in table.schema} == {
        "score": NUMBER,
        "rank": INTEGER,
        "lang": TEXT,
        "is_human": TRUTH,
        "scores": pa.list_(NUMBER),
        "tags": pa.list_(TEXT),
        "flags": pa.list_(TRUTH),
    }


def test_csv_means_what_it_can_be_read_as(root: Path) -> None:
    (root / "x.csv").write_text(
        "query,document,score,rank,zip,code,human,phone,lang\n"
        "q0,d0,0.5,1,01234,7,True,+4917,de\n"
        "q1,d1, 2,,99999,x,false,,nan\n"
        "q2,d2,1e-3,-3,10115,3,,0049,\n"
    )
    table = read_extra(root, ["score", "rank", "zip", "code", "human", "phone", "lang"])
    assert table.to_pydict() == {
        "score": [0.5, 2.0, 0.001],
        "rank": [1, None, -3],
        "zip": ["01234", "99999", "10115"],
        "code": ["7", "x", "3"],
        "human": [True, False, None],
        "phone": ["+4917", None, "0049"],
        "lang": ["de", "nan", None],
    }


def test_a_long_number_of_csv_is_an_id(root: Path) -> None:
    (root / "x.csv").write_text("query,document,id\nq0,d0,7\nq1,d1,12345678901234567890\n")
    assert read_extra(root, ["id"])["id"].to_pylist() == ["7", "12345678901234567890"]


def test_the_type_is_that_of_all_files_and_formats(root: Path) -> None:
    write_as(root / "a.parquet", rows_of(score=[1, None]))
    write_as(root / "b.jsonl", rows_of(score=[0.5, ...]))
    (root / "c.csv").write_text("query,document,score\nq,d,3\n")
    write_as(root / "d.jsonl", rows_of(other=[1]))
    table = read_extra(root, ["score"])
    assert table.schema.types == [NUMBER]
    assert table["score"].to_pylist() == [1.0, None, 0.5, None, 3.0, None]


@FORMATS
def test_columns_without_values(root: Path, format_: str) -> None:
    write_as(root / f"x.{format_}", rows_of(a=[None, None], b=[[], None]))
    table = read_extra(root, ["a", "b"])
    assert table.schema.types == [pa.null(), pa.list_(pa.null())]
    assert table.to_pydict() == {"a": [None, None], "b": [[], None]}


@FORMATS
def test_paths_and_other_names(root: Path, format_: str) -> None:
    hits = [{"id": 3, "score": 0.5}, {"id": 4, "score": 0.25}]
    write_as(root / f"x.{format_}", rows_of(meta=[{"lang": "de"}, {"lang": "fr"}], hits=[hits, []]))
    table = read_extra(root, {"meta.lang": "meta.lang", "teacher": "hits.score", "first": "hits.0.id"})
    assert table.to_pydict() == {"first": [3, None], "meta.lang": ["de", "fr"], "teacher": [[0.5, 0.25], []]}


def test_columns_by_number(root: Path) -> None:
    (root / "x.tsv").write_text("q0\td0\t0.5\nq1\td1\t0.25\n")
    settings = {"columns": {"query": 1, "document": 2}, "csv": {"header": False}}
    counts = Counter[str]()
    rows = read_dataset(root, "*", counts, extra_columns=[3], **settings)
    assert [row.extra for row in rows] == [["0.5"], ["0.25"]]
    assert extra_schema(counts, ["column_3"], "n").field("column_3").type == NUMBER
    write_as(root / "y.jsonl", rows_of(a=[1]))
    with pytest.raises(ConfigError, match=r"y\.jsonl: columns have no numbers here, given 3"):
        read_dataset(root, "y.jsonl", extra_columns=[3])


def test_every_pair_of_a_row_has_its_values(root: Path) -> None:
    write_as(root / "x.jsonl", [{"query": "q", "document": ["a", "b"], "pos_scores": [0.5, 0.25]}])
    rows = read_dataset(root, extra_columns=["pos_scores"])
    assert [(row.document, row.extra) for row in rows] == [("a", [[0.5, 0.25]]), ("b", [[0.5, 0.25]])]


def test_a_score_of_judgements_is_a_column(root: Path) -> None:
    (root / "nf" / "qrels").mkdir(parents=True)
    (root / "nf" / "corpus.jsonl").write_text('{"_id": "d", "text": "document"}\n')
    (root / "nf" / "queries.jsonl").write_text('{"_id": "q", "text": "query"}\n')
    (root / "nf" / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\nq\td\t2\n")
    assert read_extra(root, ["score"], "nf")["score"].to_pylist() == [2.0]


def test_decimals_are_numbers_and_times_are_text(root: Path) -> None:
    rows = rows_of(
        price=[decimal.Decimal("0.5"), None],
        day=[datetime.date(2026, 1, 2), None],
        at=[datetime.datetime(2026, 1, 2), None],
    )
    write_as(root / "x.parquet", rows)
    table = read_extra(root, ["price", "day", "at"])
    assert table["price"].to_pylist() == [0.5, None]
    assert table["day"].to_pylist() == ["2026-01-02", None]
    assert table["at"].to_pylist()[0].startswith("2026-01-02 00:00:00")


@FORMATS
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([{"a": 1}, {"a": 2}], r"extra column 'x' is object in row 0.*'x\.a'; it has: a"),
        ([[{"s": 1}], []], r"extra column 'x' is list of object in row 0.*'x\.s'; it has: s"),
        ([[[1.0]], [[2.0]]], r"extra column 'x' is list of list in row 0.*lists of one of these"),
    ],
)
def test_what_cannot_be_carried_is_refused(root: Path, format_: str, values: list[Any], message: str) -> None:
    write_as(root / f"x.{format_}", rows_of(x=values))
    with pytest.raises(InputError, match=message):
        read_extra(root, ["x"])


def test_bytes_and_huge_integers_are_refused(root: Path) -> None:
    write_as(root / "a.parquet", rows_of(x=[b"ab", None]))
    with pytest.raises(InputError, match=r"a\.parquet: extra column 'x' is bytes in row 0"):
        read_extra(root, ["x"], "a.parquet")
    write_as(root / "b.jsonl", rows_of(x=[1, 2**63]))
    with pytest.raises(InputError, match=r"b\.jsonl: extra column 'x' is integer of more than 64 bits in row 1"):
        read_extra(root, ["x"], "b.jsonl")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1, "1"], r"is integer in row 0 \(1\), but text in row 1 \('1'\)"),
        ([0.5, [0.5]], r"is number in row 0 \(0\.5\), but list of number in row 1"),
        ([True, 1], r"is true/false in row 0 \(True\), but integer in row 1 \(1\)"),
        ([["a"], [1, 2]], r"is list of text in row 0 \(\['a'\]\), but list of integer in row 1"),
    ],
)
def test_values_of_two_kinds_are_refused(root: Path, values: list[Any], message: str) -> None:
    write_as(root / "x.jsonl", rows_of(x=values))
    with pytest.raises(InputError, match=r"x\.jsonl: extra column 'x' " + message):
        read_extra(root, ["x"])


def test_files_of_two_kinds_are_refused(root: Path) -> None:
    write_as(root / "a.parquet", rows_of(x=["low", None]))
    write_as(root / "b.jsonl", rows_of(x=[1, None]))
    with pytest.raises(InputError, match=r"dataset 'n': extra column 'x' is integer in b\.jsonl, text in a\.parquet"):
        read_extra(root, ["x"])


@pytest.mark.parametrize("text", ["[0.5, 0.25]", "[0.5 0.25\n 1.]", "['a', 'b']", '["a"]', "array([0.5])", "[]"])
def test_lists_that_were_written_as_text_are_refused(root: Path, text: str) -> None:
    write_as(root / "x.jsonl", rows_of(x=[text, text, "other"]))
    with pytest.raises(
        InputError, match=r"'x' holds lists that were written as text; row 0 has .*JSON Lines or Parquet"
    ):
        read_extra(root, ["x"])
    write_as(root / "x.jsonl", rows_of(x=[text, "[PAD] first", "[x]"]))
    assert read_extra(root, ["x"])["x"].to_pylist() == [text, "[PAD] first", "[x]"]


def test_a_value_that_is_not_utf_8_breaks_its_row_alone(root: Path) -> None:
    (root / "x.csv").write_bytes(b"query,document,tag\nq0,d0,\xfcber\nq1,d1,b\n")
    (root / "y.jsonl").write_text('{"query": "q2", "document": "d2", "tag": ["a", "\\ud800"]}\n')
    broken, fine = read_dataset(root, "x.csv", extra_columns=["tag"])
    assert (broken.problem, broken.detail) == ("invalid_utf8", r"tag: '\udcfcber'")
    assert (fine.problem, fine.extra) == (None, ["b"])
    assert read_dataset(root, "y.jsonl", extra_columns=["tag"])[0].problem == "invalid_utf8"


@FORMATS
def test_an_absent_column_is_refused_with_the_closest_one(root: Path, format_: str) -> None:
    write_as(root / f"x.{format_}", rows_of(score=[1, 2]))
    with pytest.raises(
        InputError, match=r"no column 'scroe' for extra_columns; it has: query, document, score.*'score'\?"
    ):
        read_extra(root, ["scroe"])
    write_as(root / f"y.{format_}", rows_of(lang=["de", "fr"]))
    with pytest.raises(InputError, match=r"no row has 'lagn' \(extra_columns\).*it has: .*lang.*Did you mean 'lang'\?"):
        read_extra(root, ["score", "lagn"])
    write_as(root / f"z.{format_}", rows_of(meta=[{"url": "a"}, {"url": "b"}]))
    with pytest.raises(InputError, match=r"no column 'meta\.urk' for extra_columns; .*Did you mean 'meta\.url'\?"):
        read_extra(root, ["meta.urk"], f"z.{format_}")
    assert read_extra(root, ["score", "lang"]).to_pydict() == {
        "lang": [None, None, "de", "fr", None, None],
        "score": [1, 2, None, None, None, None],
    }


def test_types_of_several_domains() -> None:
    schemas = {
        "a": pa.schema([("score", INTEGER), ("tags", pa.list_(pa.null()))]),
        "b": pa.schema([("score", NUMBER), ("tags", pa.null()), ("url", pa.null())]),
        "c": pa.schema([("tags", pa.list_(TEXT))]),
        "none": pa.schema([]),
    }
    assert joined_schema(schemas) == pa.schema([("score", NUMBER), ("tags", pa.list_(TEXT)), ("url", pa.null())])
    schemas["d"] = pa.schema([("score", TEXT)])
    with pytest.raises(
        InputError, match=r"'score' is integer in dataset 'a', .*text in dataset 'd'.*score_2 = \"score\""
    ):
        joined_schema(schemas)


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ([], pa.null()),
        (["integer", "number as text"], NUMBER),
        (["integer as text", "true/false as text"], TEXT),
        (["integer as text", "text"], TEXT),
        (["integer as text", "true/false"], None),
        (["list of null", "list of integer", "list of number"], pa.list_(NUMBER)),
        (["list of null", "integer"], None),
        (["object"], None),
    ],
)
def test_the_type_of_kinds(kinds: list[str], expected: pa.DataType | None) -> None:
    assert type_of(kinds) == expected
