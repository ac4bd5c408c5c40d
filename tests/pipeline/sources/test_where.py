"""where: conditions that mean the same in every format."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from hardbatch.pipeline.errors import ConfigError, InputError
from hardbatch.pipeline.sources.columns import Record
from hardbatch.pipeline.sources.where import Where
from tests.pipeline.sources.reading import read_dataset, write_as


def met(sql: str, *rows: dict[str, Any] | None) -> list[int]:
    records = (Record(number, row) for number, row in enumerate(rows))
    return [record.row for record in Where(sql).select(records, "file", Counter())]


LABELS: tuple[Any, ...] = (1, 0, "1", "0", 1.0, True, False, None, "n/a", "true")


@pytest.mark.parametrize(
    ("sql", "expected"),
    [
        ("label = 1", [0, 2, 4, 5]),
        ("label == 1", [0, 2, 4, 5]),
        ("label != 0", [0, 2, 4, 5]),
        ("label > 0.5", [0, 2, 4, 5]),
        ("label IN (1, 2)", [0, 2, 4, 5]),
        ("label", [0, 2, 4, 5, 9]),
        ("label = 'n/a'", [8]),
        ("label = 1 OR label IS NULL", [0, 2, 4, 5, 7, 8, 9]),
        ("label IS NULL", [7]),
    ],
)
def test_a_label_is_read_by_its_value_whatever_its_type(sql: str, expected: list[int]) -> None:
    """A text where only a number makes sense counts as null."""
    assert met(sql, *({"label": label} for label in LABELS)) == expected


def test_neighbours_do_not_change_what_a_row_means() -> None:
    rows = [{"a": "9", "b": "10"}, {"a": 10, "b": 9}, {"a": "b", "b": "a"}, {"a": None, "b": 1}]
    for order in (rows, rows[::-1]):
        assert [order[i] for i in met("a > b", *order)] == [row for row in order if row["a"] in (10, "b")]


@pytest.mark.parametrize(
    ("sql", "row", "is_met"),
    [
        ("meta.lang = 'en' AND score > 0.5", {"meta": {"lang": "en"}, "score": "12"}, True),
        ("meta.lang = 'en'", {"meta": None}, False),
        ('"query-id" = 3', {"query-id": 3}, True),
        ("LENGTH(text) > 3", {"text": "12345"}, True),
        ("LENGTH(text) > 3", {"text": "abc"}, False),
        ("zip = '01234'", {"zip": "1234"}, False),
        ("zip = '01234'", {"zip": "01234"}, True),
        ("text LIKE '%0.5 meta.lang%'", {"text": "a 0.5 meta.lang b"}, True),
        ("date >= '2024-01-01'", {"date": "2024-03-01"}, True),
        ("ARRAY_LENGTH(neg) > 0", {"neg": ["a"]}, True),
        ("ARRAY_LENGTH(neg) > 0", {"neg": None}, False),
        ("id = 9007199254740993", {"id": 9007199254740992}, False),
    ],
)
def test_expressions(sql: str, row: dict[str, Any], is_met: bool) -> None:
    assert met(sql, row) == [0] * is_met


@pytest.mark.parametrize("sql", ["label =", "label = 1; DROP TABLE x", "1 = 1", "", "f(label)"])
def test_what_is_not_a_condition_is_refused(sql: str) -> None:
    with pytest.raises(ConfigError, match="where: "):
        Where(sql)


@pytest.mark.parametrize("sql", ["score > AVG(score)", "MAX(a) OVER (PARTITION BY b) = a", "COUNT(*) > a"])
def test_a_condition_over_several_rows_is_refused(sql: str) -> None:
    with pytest.raises(ConfigError, match="must be a condition on the columns of one row"):
        Where(sql)


def test_a_condition_that_a_row_cannot_answer_is_refused_with_the_row() -> None:
    with pytest.raises(InputError, match=r"file: row 1: where .* cannot be evaluated"):
        met("LENGTH(a) = 1", {"a": "b"}, {"a": ["c"]})


def test_a_broken_row_is_not_filtered() -> None:
    assert met("a = 1", None, {"a": 2}) == [0]


def test_rows_are_counted_and_an_unknown_column_is_named(tmp_path: Path) -> None:
    root = tmp_path / "root"
    for format_ in ("jsonl", "parquet", "csv"):
        path = root / format_ / f"x.{format_}"
        if format_ == "csv":
            path.parent.mkdir()
            path.write_text("query,document,label\n" + "".join(f"q{i},d,{i % 4}\n" for i in range(3_000)))
        else:
            write_as(path, [{"query": f"q{i}", "document": "d", "label": i % 4} for i in range(3_000)])
        counts = Counter[str]()
        rows = read_dataset(root, f"{format_}/*", counts, where="label = 1")
        assert [row.query for row in rows] == [f"q{i}" for i in range(1, 3_000, 4)]
        assert counts["rows_filtered"] == 2_250
        with pytest.raises(InputError, match=r"no (column|row has a column) 'lable'.*where"):
            read_dataset(root, f"{format_}/*", where="lable = 1")
        with pytest.raises(InputError, match=r"none of 3000 rows in .* meets where 'label = 7'; fix it"):
            read_dataset(root, f"{format_}/*", where="label = 7")
