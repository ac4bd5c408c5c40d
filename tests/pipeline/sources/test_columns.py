"""columns: the shapes in which people keep their pairs, alike in every format."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from hardbatch.pipeline.config import Columns
from hardbatch.pipeline.errors import ConfigError, InputError
from hardbatch.pipeline.sources.columns import look_up
from tests.pipeline.sources.reading import pairs_of, read_dataset, write_as

FORMATS = pytest.mark.parametrize("format_", ["jsonl", "parquet", "arrow", "feather"])


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


@FORMATS
def test_a_list_of_positives_becomes_a_pair_each(root: Path, format_: str) -> None:
    rows = [
        {"query": "one", "pos": ["a", "b"], "neg": ["x", "y"]},
        {"query": "two", "pos": ["c"], "neg": []},
        {"query": "three", "pos": [], "neg": None},
    ]
    write_as(root / f"x.{format_}", rows)
    read = read_dataset(root, columns={"document": "pos", "negatives": "neg"})
    assert pairs_of(read) == [("one", "a"), ("one", "b"), ("two", "c"), ("three", None)]
    assert [row.row for row in read] == [0, 0, 1, 2]
    assert [row.negatives for row in read] == [["x", "y"], ["x", "y"], [], []]


@FORMATS
def test_the_queries_of_an_answer_become_a_pair_each(root: Path, format_: str) -> None:
    write_as(root / f"x.{format_}", [{"questions": ["when?", "what time?"], "answer": "at noon"}])
    read = read_dataset(root, columns={"query": "questions", "document": "answer"})
    assert pairs_of(read) == [("when?", "at noon"), ("what time?", "at noon")]


@FORMATS
def test_objects_with_title_and_text_read_as_both(root: Path, format_: str) -> None:
    passages = [{"docid": "1", "title": "T", "text": "a"}, {"docid": "2", "title": "", "text": "b"}]
    others = [{"docid": "3", "title": None, "text": "c"}, {"docid": "4", "title": "U", "text": "d"}]
    write_as(root / f"x.{format_}", [{"query": "q", "positive_passages": passages, "negative_passages": others}])
    columns = {"document": "positive_passages", "negatives": "negative_passages"}
    read = read_dataset(root, columns=columns)
    assert pairs_of(read) == [("q", "T a"), ("q", "b")] and read[0].negatives == ["c", "U d"]

    columns["negatives"] = "negative_passages.text"
    assert read_dataset(root, columns=columns)[0].negatives == ["c", "d"]


@FORMATS
def test_an_object_of_lists_is_read_item_by_item(root: Path, format_: str) -> None:
    """The `datasets` library keeps a sequence of objects like this."""
    write_as(root / f"x.{format_}", [{"query": "q", "document": "d", "neg": {"title": ["T", ""], "text": ["a", "b"]}}])
    assert read_dataset(root, columns={"negatives": "neg"})[0].negatives == ["T a", "b"]


@FORMATS
def test_numbered_columns_are_the_negatives_of_a_row(root: Path, format_: str) -> None:
    rows = [
        {"query": "q", "document": "d", "negative_1": "a", "negative_2": "b", "negative_10": "c"},
        {"query": "r", "document": "e", "negative_1": "x", "negative_2": None, "negative_10": ""},
    ]
    write_as(root / f"x.{format_}", rows)
    for negatives in (["negative_1", "negative_2", "negative_10"], "negative_*"):
        read = read_dataset(root, columns={"negatives": negatives})
        assert [row.negatives for row in read] == [["a", "b", "c"], ["x"]]


@FORMATS
def test_title_and_text_are_joined_as_in_an_evaluation(root: Path, format_: str) -> None:
    rows = [{"query": "q", "title": title, "text": "words"} for title in ("T", "", None)]
    write_as(root / f"x.{format_}", [*rows, {"query": "q", "title": None, "text": None}])
    read = read_dataset(root, columns={"document": ["title", "text"]})
    assert [row.document for row in read] == ["T words", "words", "words", None]


@FORMATS
def test_a_dotted_path_leads_into_nested_values(root: Path, format_: str) -> None:
    row = {
        "data": {"question": "q"},
        "answers": {"text": ["a", "b"], "start": [1, 2]},
        "turns": [{"content": "first"}, {"content": "second"}],
    }
    write_as(root / f"x.{format_}", [row])
    columns = {"query": "data.question", "document": "answers.text", "negatives": "turns.1.content"}
    read = read_dataset(root, columns=columns)
    assert pairs_of(read) == [("q", "a"), ("q", "b")] and read[0].negatives == ["second"]
    with pytest.raises(InputError, match=r"no column 'data\.answer' for document; it has: data, answers"):
        read_dataset(root, columns={**columns, "document": "data.answer"})


@FORMATS
def test_paths_through_one_list_pair_the_texts_of_each_item(root: Path, format_: str) -> None:
    """A question has its own answers, not those of the other items."""
    items = [{"q": f"q{i}", "a": f"a{i}", "bad": [f"n{i}"]} for i in range(3)]
    groups = [{"text": f"t{i}", "qas": [{"q": f"q{i}"}, {"q": f"r{i}"}]} for i in range(2)]
    write_as(root / f"x.{format_}", [{"qa": items, "data": [{"parts": groups}]}, {"qa": items[:1], "data": []}])
    read = read_dataset(root, columns={"query": "qa.q", "document": "qa.a", "negatives": "qa.bad"})
    assert [(row.query, row.document, row.negatives) for row in read] == [
        ("q0", "a0", ["n0"]), ("q1", "a1", ["n1"]), ("q2", "a2", ["n2"]), ("q0", "a0", ["n0"])
    ]  # fmt: skip
    read = read_dataset(root, columns={"query": "data.parts.qas.q", "document": "data.parts.text"})
    assert pairs_of(read)[:4] == [("q0", "t0"), ("r0", "t0"), ("q1", "t1"), ("r1", "t1")]
    assert [row.row for row in read] == [0, 0, 0, 0, 1]
    chosen = read_dataset(root, columns={"query": "qa.0.q", "document": "qa.a"})
    assert pairs_of(chosen)[:3] == [("q0", "a0"), ("q0", "a1"), ("q0", "a2")]


def test_a_column_whose_name_has_dots_is_preferred() -> None:
    assert look_up({"a.b": 1, "a": {"b": 2}}, "a.b") == 1
    assert look_up({"a": {"b.c": 3}}, "a.b.c") == 3
    assert look_up({"a": {"b": None}}, "a.b.c", "absent") is None
    assert look_up({"a": [1]}, "a.b", "absent") == []
    assert look_up({"a": [1]}, "a.7", "absent") is None


@pytest.mark.parametrize("position", [0, 1, 119])
def test_a_row_without_a_key_is_quarantined_wherever_it_is(root: Path, position: int) -> None:
    rows: list[dict[str, str]] = [{"query": f"q{i}", "document": f"d{i}"} for i in range(120)]
    rows[position] = {"query": "alone"}
    write_as(root / "x.jsonl", rows)
    assert [row.row for row in read_dataset(root) if row.document is None] == [position]


@FORMATS
@pytest.mark.parametrize("empty", [None, []])
def test_a_column_without_a_value_is_refused(root: Path, format_: str, empty: object) -> None:
    """In the only file of a dataset; of several files, one may have nothing in it."""
    rows = [{"query": f"q{i}", "document": empty, "body": "b"} for i in range(30)]
    write_as(root / f"x.{format_}", rows)
    with pytest.raises(
        InputError, match=r"'document' \(document\) has no value in any of its 30 rows\. .*: query, doc"
    ):
        read_dataset(root)
    write_as(root / f"y.{format_}", [{"query": "q", "document": "d"}])
    assert [row.document for row in read_dataset(root)] == [None] * 30 + ["d"]


def test_a_key_that_no_row_has_is_refused_before_all_are_read(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hardbatch.pipeline.sources.columns._ROWS_TO_JUDGE", 10)
    with (root / "x.jsonl").open("w") as file:
        file.writelines(
            ['{"query": "q", "text": "d"}\n'] * 9 + ["broken\n"] * 1 + ['{"query": "q", "text": "d"}\n'] * 9
        )
    with pytest.raises(InputError, match=r"x\.jsonl: no column 'document' for document; it has: query, text"):
        read_dataset(root)


def test_columns_that_come_late_are_columns(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hardbatch.pipeline.sources.columns._ROWS_TO_JUDGE", 10)
    rows: list[dict[str, Any]] = [{"query": "q", "text": "d"}] * 20 + [
        {"query": "q", "text": "d", "title": "T", "neg": ["n"], "is_spam": True}
    ]
    write_as(root / "x.jsonl", rows)
    columns = {"document": ["title", "text"], "negatives": "neg"}
    read = read_dataset(root, columns=columns)
    assert [row.document for row in read] == ["d"] * 20 + ["T d"] and read[-1].negatives == ["n"]
    assert len(read_dataset(root, columns={"document": "text"}, where="is_spam IS NULL")) == 20
    assert len(read_dataset(root, columns={"document": "text"}, where="query = 'q'", limit=2)) == 2


@FORMATS
def test_one_file_of_several_may_lack_the_negatives_but_not_all(root: Path, format_: str) -> None:
    write_as(root / f"a.{format_}", [{"query": "q", "document": "d"}])
    write_as(root / f"b.{format_}", [{"query": "r", "document": "e", "neg": ["n"]}])
    assert [row.negatives for row in read_dataset(root, columns={"negatives": "neg"})] == [[], ["n"]]
    with pytest.raises(InputError, match=r"no row has 'typo'; fix columns\.negatives, or leave it out"):
        read_dataset(root, columns={"negatives": "typo"})


@FORMATS
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (5, r"int(64)?, expected text.*row 1 has 5"),
        ([5], r"expected text"),
        (
            {"docid": "1", "contents": "c"},
            r"Name the key that holds the text, for example 'x\.docid'; it has: docid, con",
        ),
        ([{"contents": "c"}], r"for example 'x\.contents'"),
    ],
)
@pytest.mark.parametrize("field", ["query", "document", "negatives"])
def test_a_column_without_any_text_is_refused_alike(
    root: Path, format_: str, value: Any, message: str, field: str
) -> None:
    write_as(
        root / f"n.{format_}", [{"query": "q", "document": "d", "x": None}, {"query": "q", "document": "d", "x": value}]
    )
    with pytest.raises(InputError, match=rf"n\.{format_}: column 'x' \({field}\) is .*{message}"):
        read_dataset(root, columns={field: "x"})


@FORMATS
def test_one_value_of_another_type_is_a_row_of_its_own(root: Path, format_: str) -> None:
    if format_ == "jsonl":
        write_as(root / "x.jsonl", [{"query": "q", "document": 5}, {"query": "q", "document": "d"}])
        assert [row.document for row in read_dataset(root)] == [5, "d"]


@pytest.mark.parametrize(
    "negatives",
    [
        pa.array([[], []], pa.list_(pa.null())),
        pa.array([None, None], pa.null()),
        pa.array([None, []], pa.large_list(pa.large_string())),
        pa.array([[], []], pa.list_(pa.struct([("text", pa.string())]))),
    ],
)
def test_types_that_writers_infer_from_nothing_mean_no_negatives(root: Path, negatives: pa.Array) -> None:
    pq.write_table(pa.table({"query": ["a", "b"], "document": ["c", "d"], "neg": negatives}), root / "x.parquet")
    assert [row.negatives for row in read_dataset(root, columns={"negatives": "neg"})] == [[], []]


def test_every_arrow_type_of_text_is_read(root: Path) -> None:
    texts = pa.array(["a", "b"])
    table = pa.table({
        "query": texts.dictionary_encode(),
        "document": pa.array([["c"], ["d"]], pa.large_list(pa.large_string())),
        "neg": pa.array([["e"], ["f"]], pa.list_(pa.dictionary(pa.int32(), pa.string()))),
    })  # fmt: skip
    pq.write_table(table, root / "x.parquet")
    read = read_dataset(root, columns={"negatives": "neg"})
    assert pairs_of(read) == [("a", "c"), ("b", "d")] and [row.negatives for row in read] == [["e"], ["f"]]


LISTS = ["['one', 'two']", '["one"]', "['a' 'b'\n 'c']", "[ \"it's\", 'b' ]", "array(['a', 'b'], dtype=object)"]


@pytest.mark.parametrize("text", LISTS)
@pytest.mark.parametrize("field", ["document", "negatives"])
def test_lists_that_became_text_are_refused(root: Path, text: str, field: str) -> None:
    write_as(root / "x.jsonl", [{"query": "q", "document": "d", "x": text}, {"query": "q", "document": "d", "x": "t"}])
    write_as(root / "y.jsonl", [{"query": "q", "document": "d", "x": text}] * 2)
    assert len(read_dataset(root, "x.jsonl", columns={field: "x"})) == 2  # one of two may be what it is
    with pytest.raises(InputError, match=rf"y\.jsonl: column 'x' \({field}\) holds lists that were written as text"):
        read_dataset(root, "y.jsonl", columns={field: "x"})


@pytest.mark.parametrize("text", ["[citation needed]", "[1] see there", "[x for x in y]", "a ['b']", "[]"])
def test_texts_with_brackets_are_texts(root: Path, text: str) -> None:
    write_as(root / "x.jsonl", [{"query": "q", "document": text}])
    assert pairs_of(read_dataset(root)) == [("q", text)]


@pytest.mark.parametrize("text", ["[]", "[{'docid': '1', 'text': 'a'}]"])
def test_negatives_that_were_lists_of_objects_are_refused(root: Path, text: str) -> None:
    (root / "x.csv").write_text(f'query,document,neg\nq,d,"{text}"\n')
    with pytest.raises(InputError, match=r"x\.csv: column 'neg' \(negatives\) holds lists that were written as text"):
        read_dataset(root, columns={"negatives": "neg"})


def test_a_joined_column_of_lists_of_different_lengths_is_of_a_wrong_type(root: Path) -> None:
    rows = [{"query": "q", "t": ["a"], "x": ["b", "c"]}, {"query": "q", "t": ["a", "d"], "x": ["b", "c"]}]
    write_as(root / "x.jsonl", rows)
    read = read_dataset(root, columns={"document": ["t", "x"]})
    assert [row.document for row in read] == [(["a"], ["b", "c"]), "a b", "d c"]


def test_columns_by_number_need_columns_in_order(root: Path) -> None:
    write_as(root / "x.jsonl", [{"query": "q", "document": "d"}])
    with pytest.raises(ConfigError, match="columns have no numbers here, given 1; give the name"):
        read_dataset(root, columns={"query": 1})
    (root / "x.jsonl").unlink()
    (root / "x.csv").write_text("a,b\nc,d\n")
    assert pairs_of(read_dataset(root, columns={"query": 2, "document": 1})) == [("d", "c")]
    with pytest.raises(InputError, match="no column 3; it has 2 columns"):
        read_dataset(root, columns={"query": 3, "document": 1})


@pytest.mark.parametrize(
    "columns", [{"query": "document"}, {"negatives": "query"}, {"query": []}, {"query": 0}, {"negatives": ["query"]}]
)
def test_columns_that_make_no_sense_are_refused(columns: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Columns(**columns)


@FORMATS
def test_a_sample_is_drawn_by_seed_from_all_rows(root: Path, format_: str) -> None:
    for name in ("a", "b"):
        write_as(root / f"{name}.{format_}", [{"query": f"{name}{i}", "document": ["x", "y"]} for i in range(50)])
    drawn = [pairs_of(read_dataset(root, sample=10, sample_seed=seed)) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2] and len(drawn[0]) == 20
    order = [query for query, _ in pairs_of(read_dataset(root))]
    places = [order.index(query) for query, _ in drawn[0]]
    assert places == sorted(places) and {query[0] for query, _ in drawn[0]} == {"a", "b"}
    assert len(read_dataset(root, sample=1_000)) == 200


@FORMATS
def test_where_comes_before_limit_and_limit_before_sample(root: Path, format_: str) -> None:
    write_as(root / f"x.{format_}", [{"query": f"q{i}", "document": ["d", "e"], "label": i % 2} for i in range(40)])
    counts = Counter[str]()
    read = read_dataset(root, counts=counts, where="label = 1", limit=3)
    assert pairs_of(read) == [(f"q{i}", text) for i in (1, 3, 5) for text in "de"]
    sampled = read_dataset(root, counts=counts, where="label = 1", limit=5, sample=2)
    assert len(sampled) == 4 and {row.query for row in sampled} < {f"q{i}" for i in (1, 3, 5, 7, 9)}
