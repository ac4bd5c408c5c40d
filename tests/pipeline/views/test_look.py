"""views.look: columns, first rows, a proposal that works, and what would be quarantined."""

from __future__ import annotations

import csv
import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hardbatch.pipeline.views.look import look_text

ROWS = [
    {"id": f"q{i}", "question": f"how is thing {i} done", "answer": f"thing {i} is done by hand, as ever", "n": i}
    for i in range(30)
]


def write(folder: Path, kind: str, rows: list[dict[str, Any]] = ROWS, name: str = "faq") -> Path:
    path = folder / f"{name}.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0], delimiter="\t" if kind == "tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


def proposed(text: str) -> dict[str, Any]:
    """The manifest that a look proposes."""
    return tomllib.loads(re.search(r"^corpus = .*?(?=\n\n[^\[])", text, re.M | re.S)[0])  # type: ignore[index]


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "csv", "tsv"])
def test_the_proposal_is_a_manifest_that_runs(
    tmp_path: Path, kind: str, cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, kind)
    monkeypatch.chdir(tmp_path)
    text = look_text(f"faq.{kind}")
    assert f"faq.{kind}: 1 file ({kind}), " in text and ", 30 rows\n" in text
    (dataset,) = proposed(text)["dataset"]
    assert dataset["columns"] == {"query": "question", "document": "answer"}
    assert "of the first 30 pairs, 30 would be kept" in text

    (tmp_path / "my.toml").write_text("\n".join(text.split("\n")[text.split("\n").index('corpus = "faq"') :][:6]))
    settings = ["embed.model=lexical", "embed.surrogate_model=lexical", "pack.batch_size=8"]
    code, out, err = cli("run", "my.toml", *(word for setting in settings for word in ("--set", setting)), "--json")
    assert code == 0, err
    assert json.loads(out)["domains"]["faq"]["pairs"] == 30


def test_columns_have_types_and_first_values(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"anchor": "a b", "positive": "c d", "negative": ["x y", "z"], "score": 0.5, "meta": {"lang": "en"}},
        {"anchor": "a c", "positive": "c e", "negative": [], "score": 1, "tag": None, "ok": True},
    ]
    text = look_text(str(write(tmp_path, "jsonl", rows)))
    table = {line.split("  ")[0]: re.split(r"\s{2,}", line) for line in text.split("\n")}
    assert table["column"] == ["column", "type", "filled", "row 0", "row 1"]
    assert table["negative"] == ["negative", "list of text or list", "50%", '["x y", "z"]', "[]"]
    assert table["score"][1] == "number or integer"
    assert table["meta"][1:3] == ["object {lang}", "50%"]
    assert table["tag"][1] == "null" and table["ok"][1] == "true/false"
    assert proposed(text)["dataset"][0]["columns"] == {
        "query": "anchor", "document": "positive", "negatives": "negative"
    }  # fmt: skip
    assert "hard negatives: 2 would be kept, 0 cannot be used" in text


def test_columns_of_other_names_are_told_apart_by_their_texts(tmp_path: Path) -> None:
    rows = [
        {"nr": f"x-{i}", "kurz": f"wie geht {i}", "lang": f"so geht das mit {i} und mehr", "url": "a.b"}
        for i in range(9)
    ]
    text = look_text(str(write(tmp_path, "jsonl", rows)))
    assert proposed(text)["dataset"][0]["columns"] == {"query": "kurz", "document": "lang"}


def one_dataset(text: str) -> dict[str, Any]:
    (dataset,) = proposed(text)["dataset"]
    return {name: value for name, value in dataset.items() if name not in ("name", "source")}


def test_lists_numbered_negatives_and_titles_are_proposed_as_they_are_read(tmp_path: Path) -> None:
    rows = [
        {
            "query": f"what is {i}",
            "title": f"thing {i}",
            "text": f"it is {i}",
            "negative_1": f"not {i}",
            "negative_2": f"nor {i}",
        }
        for i in range(5)
    ]
    text = look_text(str(write(tmp_path, "parquet", rows)))
    assert one_dataset(text) == {
        "columns": {"query": "query", "document": ["title", "text"], "negatives": "negative_*"}
    }
    assert "hard negatives: 10 would be kept" in text
    several = [{"query": f"what is {i}", "pos": [f"it is {i}", f"that is {i}"]} for i in range(5)]
    text = look_text(str(write(tmp_path, "jsonl", several)))
    assert one_dataset(text) == {"columns": {"query": "query", "document": "pos"}}
    assert "of the first 10 pairs, 10 would be kept" in text


def test_texts_inside_of_objects_and_lists_are_proposed_by_their_paths(tmp_path: Path) -> None:
    groups = [{"name": "x", "qas": [{"question": f"why {i}", "answers": [{"text": f"so {i}"}]}]} for i in range(9)]
    text = look_text(str(write(tmp_path, "jsonl", [{"version": 1, "data": groups}])))
    assert proposed(text)["dataset"][0]["columns"] == {
        "query": "data.qas.question", "document": "data.qas.answers.text"
    }  # fmt: skip
    assert "of the first 9 pairs, 9 would be kept" in text


@pytest.mark.parametrize(("role", "content"), [("role", "content"), ("from", "value")])
def test_the_first_answer_of_a_chat_is_proposed(tmp_path: Path, role: str, content: str) -> None:
    turns = [{role: name, content: f"{name} speaks"} for name in ("system", "user", "assistant", "user")]
    text = look_text(str(write(tmp_path, "jsonl", [{"id": i, "chat": turns} for i in range(9)])))
    assert proposed(text)["dataset"][0]["columns"] == {
        "query": f"chat.1.{content}", "document": f"chat.2.{content}"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("header", "row", "csv", "columns"),
    [
        ("query;document", "a b {0};c d {0}", {"delimiter": ";"}, None),
        (None, "how is {0} done?\tby hand, as one does {0}", {"header": False}, ["column_1", "column_2"]),
        ("query\tdocument", 'a b {0}\t"c d {0}', {"quote": ""}, None),
    ],
)
def test_the_dialect_of_delimited_text_is_proposed(
    tmp_path: Path, header: str | None, row: str, csv: dict[str, Any], columns: list[str] | None
) -> None:
    path = tmp_path / ("pairs.csv" if ";" in row else "pairs.tsv")
    lines = [*([header] if header else []), *(row.format(number) for number in range(5))]
    path.write_text("".join(f"{line}\n" for line in lines))
    text = look_text(str(path))
    expected: dict[str, Any] = {"csv": csv}
    if columns:
        expected["columns"] = dict(zip(("query", "document"), columns, strict=True))
    assert one_dataset(text) == expected
    assert "of the first 5 pairs, 5 would be kept" in text


def test_a_label_is_proposed_as_a_condition(tmp_path: Path) -> None:
    rows = [{"sentence1": f"a b {i}", "sentence2": f"c d {i}", "label": i % 2} for i in range(6)]
    assert '# where = "label = 1"' in look_text(str(write(tmp_path, "csv", rows)))


def test_columns_that_cannot_be_used_are_explained(tmp_path: Path) -> None:
    rows = [{"query": f"a {i}", "document": f"b {i}", "negatives": f"['c {i}', 'd {i}']"} for i in range(6)]
    text = look_text(str(write(tmp_path, "csv", rows)))
    assert "these columns cannot be used: " in text and "holds lists that were written as text" in text


def test_a_source_without_two_texts_gets_no_proposal_but_says_so(tmp_path: Path) -> None:
    text = look_text(str(write(tmp_path, "csv", [{"query-id": "q1", "corpus-id": "d1", "score": 1}])))
    assert "cannot be told from the names" in text and "no row checked" in text


def test_what_would_be_quarantined_is_counted_with_the_first_row_of_each(tmp_path: Path) -> None:
    rows = [{"query": f"q {i}", "document": f"d {i}"} for i in range(6)]
    rows[2]["document"] = ""
    rows[4] = rows[1]
    path = write(tmp_path, "jsonl", rows)
    path.write_text(path.read_text() + "{broken\n")
    text = look_text(str(path))
    assert "of the first 7 pairs, 4 would be kept and 3 quarantined:" in text
    assert "empty 1; the first: faq.jsonl row 2: document: ''" in text
    assert "duplicate_pair 1; the first: faq.jsonl row 4" in text
    assert "broken_json 1; the first: faq.jsonl row 6: line 7" in text
    assert "so there is nothing to say about them" in text


def test_a_path_anywhere_is_split_into_a_data_root_and_a_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    for name in ("faq", "more"):
        write(tmp_path, "jsonl", name=name)
    text = look_text(f"{tmp_path}/*.jsonl")
    assert "2 files" in text and "more than" in text and text.endswith(f"add --data-root {tmp_path}")
    assert proposed(text)["dataset"][0]["source"] == "*.jsonl"
    monkeypatch.chdir(tmp_path / "here")
    assert look_text("../faq.jsonl").endswith("add --data-root ..")
    assert "30 rows" in look_text("faq.jsonl", Path(".."))


def test_commands_for_terminals_are_not_passed_on(tmp_path: Path) -> None:
    text = look_text(str(write(tmp_path, "jsonl", [{"query\x1b[2J": "a b", "document": "c \x07d"}])))
    assert "\x1b" not in text and "\x07" not in text
