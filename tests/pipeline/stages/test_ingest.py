"""stages.ingest: every row accounted for, texts kept byte for byte, a holdout that leaks nothing."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hardbatch.pipeline import schemas
from hardbatch.pipeline.artifacts.artifact import Artifact, read_artifact
from hardbatch.pipeline.artifacts.vectors import Texts, load_pairs
from hardbatch.pipeline.errors import ConfigError, InputError, QuarantineError
from hardbatch.pipeline.sources.files import RawRow
from hardbatch.pipeline.stages.assemble import cut_holdout
from hardbatch.pipeline.stages.ingest import clean_row

Row = dict[str, Any]
NEGATIVES = 'columns = {negatives = "neg"}'


@dataclass
class Ingested:
    """A pairs artifact as plain lists."""

    artifact: Artifact

    @property
    def counts(self) -> dict[str, Any]:
        return self.artifact.manifest.counts

    @property
    def pairs(self) -> list[Row]:
        return pq.read_table(self.artifact.path / "pairs.parquet").to_pylist()

    @property
    def quarantine(self) -> list[Row]:
        return pq.read_table(self.artifact.path / "quarantine.parquet").to_pylist()

    @property
    def reasons(self) -> dict[int, str]:
        return {row["source_row"]: row["reason"] for row in self.quarantine}

    def texts(self, side: str) -> list[str]:
        texts = Texts(self.artifact, side)
        return texts.take(np.arange(texts.num_rows))

    def holdout(self, name: str) -> list[Row]:
        return pq.read_table(self.artifact.path / "holdout" / f"{name}.parquet").to_pylist()

    def check_accounts(self, rows_in: int) -> None:
        """rows in = pairs + quarantined + held out, from outside; each source row in one place."""
        counts = self.counts
        assert counts["rows"] == rows_in
        assert counts["pairs"] == len(self.pairs)
        assert sum(counts["quarantined"].values()) == len(self.quarantine)
        assert Counter(row["reason"] for row in self.quarantine) == counts["quarantined"]
        assert rows_in == len(self.pairs) + len(self.quarantine) + counts["held_out"]
        places = [(row["source_file"], row["source_row"]) for row in [*self.pairs, *self.quarantine]]
        assert len(set(places)) == len(places)
        assert places[len(self.pairs) :] == sorted(places[len(self.pairs) :])
        assert [row["pair_id"] for row in self.pairs] == list(range(len(self.pairs)))


Ingest = Callable[..., Ingested]


@pytest.fixture
def ingest(tmp_path: Path, run_corpus: Callable[..., Any]) -> Ingest:
    """`ingest({name: rows or bytes}, dataset="toml lines", source="toml")`: the pairs of one dataset of these files."""

    def ingest(
        files: dict[str, list[Row] | bytes],
        *,
        dataset: str = "",
        source: str | None = None,
        settings: str = "",
        allowed: float = 1.0,
    ) -> Ingested:
        for name, content in files.items():
            raw = content if isinstance(content, bytes) else "".join(json.dumps(row) + "\n" for row in content).encode()
            (tmp_path / name).write_bytes(raw)
        text = f'corpus = "c"\n[ingest]\nmax_quarantined_fraction = {allowed}\n{settings}\n'
        text += f'[[dataset]]\nname = "n"\nsource = {source or json.dumps(list(files))}\n{dataset}\n'
        return Ingested(read_artifact(run_corpus(text, stages=("pairs",)).steps[0].path))

    return ingest


def make(num_rows: int, start: int = 0) -> list[Row]:
    return [{"query": f"q{i}", "document": f"d{i}"} for i in range(start, start + num_rows)]


def test_every_poisoned_row_is_quarantined_with_its_reason(ingest: Ingest) -> None:
    poison = [
        (b'{"query": "fine", "document": "and good"}', None),
        (b'{"query": null, "document": "a"}', "null"),
        (b'{"query": "a"}', "null"),
        (b'{"query": "", "document": "a"}', "empty"),
        (b'{"query": " \\t\\n\\u00a0", "document": "a"}', "empty"),
        (b'{"query": "a\\u0000b", "document": "a"}', "nul_character"),
        (b'{"query": "\xff\xfe", "document": "a"}', "invalid_utf8"),
        (b'{"query": "\\ud83d alone", "document": "a"}', "invalid_utf8"),
        (b'{"query": "a", "document": "\\udc00"}', "invalid_utf8"),
        (b'{"query": 1, "document": "a"}', "wrong_type"),
        (b'{"query": true, "document": "a"}', "wrong_type"),
        (b'{"query": [1], "document": "a"}', "wrong_type"),
        (b'{"query": {"a": "\\ud800"}, "document": "a"}', "wrong_type"),
        (b'{"query": "a", "docu', "broken_json"),
        (b"[]", "broken_json"),
        (b"[" * 100_000, "broken_json"),
        (b'{"query": "same", "document": "same"}', "query_equals_document"),
        (b'{"query": "fine", "document": "and good"}', "duplicate_pair"),
        (b'{"query": "\\ud83d\\ude00 \\u00e9", "document": "e\\u0301"}', None),
    ]
    made = ingest({"x.jsonl": b"\n".join(line for line, _ in poison)})
    made.check_accounts(len(poison))
    assert made.reasons == {row: reason for row, (_, reason) in enumerate(poison) if reason}
    assert made.texts("queries") == ["fine", "\U0001f600 é"]
    assert made.texts("documents") == ["and good", "e\u0301"]
    assert [row["source_row"] for row in made.pairs] == [0, 18]


def test_poisoned_csv_and_parquet(ingest: Ingest, tmp_path: Path) -> None:
    made = ingest(
        {"x.csv": b'\xef\xbb\xbfquery,document\r\n"a\r\nb",c\r\n\r\nd\r\n\xff,e\r\nf,g,h\r\n" ",i\r\nj,\0\r\n'}
    )
    made.check_accounts(6)
    assert list(made.reasons.values()) == [
        "wrong_field_count", "invalid_utf8", "wrong_field_count", "empty", "nul_character",
    ]  # fmt: skip
    assert made.texts("queries") == ["a\r\nb"]
    raw = pa.array([b"ok", b"\xff\xfe", None, b"x\0y", b""], pa.binary())
    column = pa.StringArray.from_buffers(5, raw.buffers()[1], raw.buffers()[2], raw.buffers()[0])
    pq.write_table(pa.table({"query": column, "document": list("abcde")}), tmp_path / "x.parquet")
    made = ingest({}, source='"x.parquet"')
    made.check_accounts(5)
    assert list(made.reasons.values()) == ["invalid_utf8", "null", "nul_character", "empty"]


TEXTS = st.text(max_size=6) | st.sampled_from(["a", "b", " ", "\r\n", "é", "e\u0301", "\ufeffa", "\u2028", "\ud800"])


@settings(max_examples=200, deadline=None, database=None)
@given(
    query=TEXTS | st.none() | st.integers(), document=TEXTS | st.binary(), negatives=st.none() | TEXTS | st.lists(TEXTS)
)
def test_a_clean_row_keeps_its_texts_or_has_a_reason(query: Any, document: Any, negatives: Any) -> None:
    clean = clean_row(RawRow(0, query, document, negatives), 100)
    given_ = [] if negatives is None else negatives if isinstance(negatives, list) else [negatives]
    if clean.reason is None:
        assert (clean.query, clean.document) == (query, document)
        assert clean.query.strip() and clean.document.strip() and query != document
        assert len(given_) == len(clean.negatives) + len(clean.unusable_negatives)
        assert [text for text in given_ if text in clean.negatives] == clean.negatives
        "".join([query, document, *clean.negatives]).encode()
    else:
        assert clean.reason in {"null", "wrong_type", "invalid_utf8", "nul_character", "empty", "query_equals_document"}


def test_texts_come_back_byte_for_byte_numbered_by_first_appearance(ingest: Ingest) -> None:
    odd = ["é", "e\u0301", " lead", "trail \n", "a\r\nb", "\ufeffmark", "a\u2028", "\U0001f600", "'\"\\", "A", "a"]
    numbers = random.Random(1)
    rows = [{"query": numbers.choice(odd), "document": numbers.choice(odd) + "!"} for _ in range(60)]
    made = ingest({"x.jsonl": rows})
    made.check_accounts(60)
    kept = [rows[pair["source_row"]] for pair in made.pairs]
    for side, column in (("queries", "query"), ("documents", "document")):
        assert made.texts(side) == list(dict.fromkeys(row[column] for row in kept))
        texts = made.texts(side)
        assert [texts[pair[f"{column}_row"]] for pair in made.pairs] == [row[column] for row in kept]
    assert [(row["query"], row["document"]) for row in kept] == list(
        dict.fromkeys((row["query"], row["document"]) for row in rows)
    )


def test_negatives_share_the_numbers_of_documents(ingest: Ingest) -> None:
    rows: list[Row] = [
        {"query": "q0", "document": "d0", "neg": ["n0", "d1", None, "", 3, "n0"]},
        {"query": "q1", "document": "d1", "neg": "one text"},
        {"query": "q2", "document": "n0"},
        {"query": "q3", "document": "d3", "neg": []},
        {"query": "q4", "document": "d4", "neg": {"a": 1}},
    ]
    made = ingest({"x.jsonl": rows}, dataset=NEGATIVES)
    made.check_accounts(5)
    assert made.texts("documents") == ["d0", "n0", "d1", "one text", "d3", "d4"]
    assert [row["document_row"] for row in made.pairs] == [0, 2, 1, 4, 5]
    assert [row["negative_rows"] for row in made.pairs] == [[1, 2], [3], [], [], []]
    assert (made.counts["negatives"], made.counts["negatives_repeated"]) == (3, 1)
    assert made.counts["negatives_unusable"] == {"empty": 1, "null": 1, "wrong_type": 2}
    assert made.counts["negatives_dropped"] == 4
    pairs = load_pairs(made.artifact)
    assert [pairs.negatives_of(i).tolist() for i in range(5)] == [[1, 2], [3], [], [], []]


def test_rows_that_repeat_a_pair_give_it_their_negatives(ingest: Ingest) -> None:
    rows: list[Row] = [
        {"query": "q0", "document": "d0", "neg": ["n0"]},
        {"query": "q1", "document": "d1", "neg": ["n1"]},
        {"query": "q0", "document": "d0", "neg": ["n2", "n0", "d0"]},
        {"query": "q1", "document": "d1", "neg": None},
        {"query": "q0", "document": "d0", "neg": "d1"},
        {"query": "q2", "document": "n2"},
    ]
    made = ingest({"x.jsonl": rows}, dataset=NEGATIVES)
    made.check_accounts(6)
    assert made.reasons == dict.fromkeys([2, 3, 4], "duplicate_pair")
    documents = made.texts("documents")
    assert documents == ["d0", "n0", "d1", "n1", "n2"]
    assert [documents[row["document_row"]] for row in made.pairs] == ["d0", "d1", "n2"]
    negatives = [[documents[row] for row in pair["negative_rows"]] for pair in made.pairs]
    assert negatives == [["n0", "n2", "d1"], ["n1"], []]
    counts = made.counts
    assert (counts["negatives"], counts["negatives_joined"], counts["negatives_repeated"]) == (4, 2, 2)


@settings(max_examples=60, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    drawn=st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 3), st.lists(st.integers(0, 6), max_size=3)),
        min_size=2,
        max_size=12,
    )
)
def test_joined_negatives_are_those_found_by_hand(ingest: Ingest, drawn: list[tuple[int, int, list[int]]]) -> None:
    rows = [{"query": f"q{q}", "document": f"d{d}", "neg": [f"d{n}" for n in some]} for q, d, some in drawn]
    expected: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        known = expected.setdefault((row["query"], row["document"]), [])
        known += [text for text in dict.fromkeys(row["neg"]) if text not in known and text != row["document"]]
    made = ingest({"x.jsonl": rows}, dataset=NEGATIVES)
    queries, documents = made.texts("queries"), made.texts("documents")
    found = {
        (queries[pair["query_row"]], documents[pair["document_row"]]): [
            documents[row] for row in pair.get("negative_rows", [])
        ]
        for pair in made.pairs
    }
    assert found == expected
    assert made.counts["negatives"] == sum(map(len, expected.values()))
    given_ = sum(len(row["neg"]) for row in rows)
    assert given_ == made.counts["negatives"] + made.counts.get("negatives_repeated", 0)


# what a person should know


def test_files_that_give_no_pair_are_counted(ingest: Ingest) -> None:
    files: dict[str, list[Row] | bytes] = {
        "a.jsonl": make(3), "b.jsonl": make(3), "c.jsonl": b"\n", "d.jsonl": make(2, 9),
    }  # fmt: skip
    counts = ingest(files).counts
    assert (counts["files"], counts["files_read"], counts["files_without_pairs"]) == (4, 4, 2)
    assert counts["such_files"] == ["b.jsonl", "c.jsonl"]
    counts = ingest(files, dataset="limit = 2").counts  # what was not read is not counted
    assert (counts["files"], counts["files_read"], counts["files_without_pairs"]) == (4, 1, 0)


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        (lambda i: f"{i:03d} text", ["query"]),
        (lambda i: f"{99 - i:03d} text", ["query"]),
        (lambda i: f"{i // 4:03d} text", []),  # too few steps
        (lambda i: f"{(i * 7) % 40:03d} text", []),
    ],
)
def test_a_sorted_source_is_noticed_if_a_limit_cuts_it(
    ingest: Ingest, order: Callable[[int], str], expected: list[str]
) -> None:
    rows = [{"query": order(i), "document": f"{(i * 11) % 50} it is"} for i in range(40)]
    assert ingest({"x.jsonl": rows}, dataset="limit = 30").counts["sorted_by"] == expected
    assert ingest({"x.jsonl": rows}).counts["sorted_by"] == []


@pytest.mark.parametrize(
    "text", ["q17", "MED-10", "3.5", "0b5c1f2e-9a77-4a3e-8f0e-1d2c3b4a5f60", "doc:12/3", "a1" * 32]
)
def test_texts_that_look_like_ids_are_counted(ingest: Ingest, text: str) -> None:
    counts = ingest({"x.jsonl": [{"query": text, "document": f"about {text}"}]}).counts
    assert (counts["query_ids"], counts["document_ids"]) == (1, 0)


@pytest.mark.parametrize("text", ["hello", "what is 3", "ls -1", "價格2023", "f(x1)", "a1" * 33])
def test_short_texts_do_not_look_like_ids(ingest: Ingest, text: str) -> None:
    assert ingest({"x.jsonl": [{"query": text, "document": "d"}]}).counts["query_ids"] == 0


def test_several_files_keep_their_numbers(ingest: Ingest) -> None:
    made = ingest({"a.jsonl": make(3), "b.jsonl": [*make(1), {"query": None, "document": "x"}, *make(2, start=9)]})
    made.check_accounts(7)
    assert [(row["source_file"], row["source_row"]) for row in made.pairs] == [(0, 0), (0, 1), (0, 2), (1, 2), (1, 3)]
    assert [(row["source_file"], row["source_row"], row["reason"]) for row in made.quarantine] == [
        (1, 0, "duplicate_pair"),
        (1, 1, "null"),
    ]


def test_units_of_staging_do_not_shape_the_result(
    ingest: Ingest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    files: dict[str, list[Row] | bytes] = {"a.jsonl": make(5), "b.jsonl": make(5, 3), "c.jsonl": make(4, 9)}
    one = ingest(files)
    expected = {name: (one.artifact.path / name).read_bytes() for name in one.artifact.manifest.files}
    (one.artifact.path / "manifest.json").unlink()
    (one.artifact.path / "units" / "assembled.json").unlink()
    monkeypatch.setattr("hardbatch.pipeline.stages.ingest._UNIT_BYTES", 1)
    monkeypatch.setattr("hardbatch.pipeline.stages.ingest.STAGED_ROWS", 2)
    several = ingest(files)
    assert several.artifact.path == one.artifact.path
    assert {name: (several.artifact.path / name).read_bytes() for name in expected} == expected
    assert not (several.artifact.path / "staged").exists()


def test_texts_are_cut_into_files(ingest: Ingest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schemas, "TEXT_ROWS_PER_FILE", 4)
    made = ingest({"x.jsonl": [*make(9), {"query": "q0", "document": "other"}]})
    assert [path.name for path in made.artifact.files("texts")] == [
        "documents-00000.arrow", "documents-00001.arrow", "documents-00002.arrow",
        "queries-00000.arrow", "queries-00001.arrow", "queries-00002.arrow",
    ]  # fmt: skip
    assert made.texts("queries") == [f"q{i}" for i in range(9)]
    assert made.texts("documents") == [*(f"d{i}" for i in range(9)), "other"]
    rows = np.array([8, 0, 3, 4, 3])
    assert Texts(made.artifact, "queries").take(rows) == ["q8", "q0", "q3", "q4", "q3"]


def test_limit_reads_the_first_rows_over_all_files(ingest: Ingest) -> None:
    files: dict[str, list[Row] | bytes] = {"a.jsonl": make(3), "b.jsonl": make(5, 3)}
    made = ingest(files, dataset="limit = 4")
    made.check_accounts(4)
    assert made.texts("queries") == ["q0", "q1", "q2", "q3"]
    assert ingest(files, dataset="limit = 100").counts["rows"] == 8
    assert ingest({"a.jsonl": make(3), "b.jsonl": b""}, dataset="limit = 3").counts["rows"] == 3  # b is not opened


# long texts


def test_a_text_of_100_megabytes_is_cut_and_counted(ingest: Ingest) -> None:
    long = b"x" * (100 * 2**20)
    lines = [b'{"query": "q", "document": "' + long + b'"}', b'{"query": "\\u0000' + long + b'", "document": "d"}']
    made = ingest({"x.jsonl": b"\n".join(lines)}, settings="max_characters = 1000")
    made.check_accounts(2)
    assert made.texts("documents") == ["x" * 1000]
    assert made.counts["texts_cut"] == 1
    assert made.reasons == {1: "nul_character"}
    assert len(made.quarantine[0]["detail"]) < 200


def test_texts_are_cut_by_characters_and_counted(ingest: Ingest) -> None:
    rows: list[Row] = [
        {"query": "é" * 11, "document": "b" * 10, "neg": ["n" * 11, "n"]},
        {"query": "          a", "document": "b"},  # empty once it is cut
    ]
    made = ingest({"x.jsonl": rows}, dataset=NEGATIVES, settings="max_characters = 10")
    assert made.texts("queries") == ["é" * 10]
    assert made.texts("documents") == ["b" * 10, "n" * 10, "n"]
    assert made.counts["texts_cut"] == 2
    assert made.reasons == {1: "empty"}


def test_many_copies_of_one_text(ingest: Ingest) -> None:
    same = [{"query": "the same", "document": "of all"}] * 10_000
    made = ingest({"x.jsonl": [*same, *({"query": "the same", "document": f"d{i}"} for i in range(500))]})
    made.check_accounts(10_500)
    assert made.counts["quarantined"] == {"duplicate_pair": 9_999}
    assert made.texts("queries") == ["the same"]
    assert {row["query_row"] for row in made.pairs} == {0}
    assert [row["document_row"] for row in made.pairs] == list(range(501))


# holdout


def held_out_texts(made: Ingested) -> set[str]:
    return {row["text"] for name in ("corpus", "queries") for row in made.holdout(name)}


def kept_texts(made: Ingested) -> set[str]:
    return {*made.texts("queries"), *made.texts("documents")}


def test_the_holdout_leaks_no_text_and_respects_the_fraction(ingest: Ingest) -> None:
    numbers = random.Random(2)
    rows = [{"query": f"q{numbers.randrange(150)}", "document": f"d{numbers.randrange(150)}"} for _ in range(120)]
    made = ingest({"x.jsonl": rows}, dataset="holdout = 0.2")
    made.check_accounts(120)
    survivors = len(made.pairs) + made.counts["held_out"]
    assert 0.1 * survivors < made.counts["held_out"] <= 0.2 * survivors
    assert held_out_texts(made) and not held_out_texts(made) & kept_texts(made)
    queries = {row["query_id"]: row["text"] for row in made.holdout("queries")}
    corpus = {row["doc_id"]: row["text"] for row in made.holdout("corpus")}
    held_out = {(queries[row["query_id"]], corpus[row["doc_id"]]) for row in made.holdout("qrels")}
    texts = {side: made.texts(side) for side in schemas.SIDES}
    kept = {(texts["queries"][row["query_row"]], texts["documents"][row["document_row"]]) for row in made.pairs}
    assert held_out | kept == {(row["query"], row["document"]) for row in rows}
    assert len(held_out) == made.counts["held_out"]
    again = ingest({"x.jsonl": rows}, dataset="holdout = 0.2", settings="holdout_seed = 1")
    assert held_out_texts(again) != held_out_texts(made)


CHAIN = [{"query": f"t{i}", "document": f"t{i + 1}"} for i in range(40)]
NEIGHBOURS = [{"query": f"q{i}", "document": f"d{i}", "neg": [f"d{(i + 1) % 40}"]} for i in range(40)]


@pytest.mark.parametrize(
    ("rows", "dataset"),
    [
        (NEIGHBOURS, NEGATIVES),
        ([*NEIGHBOURS, *({**row, "neg": []} for row in make(40, 100))], NEGATIVES),
        ([*CHAIN, *make(40)], ""),  # from one side to the other
    ],
)
def test_the_holdout_leaks_no_text(ingest: Ingest, rows: list[Row], dataset: str) -> None:
    made = ingest({"x.jsonl": rows}, dataset=f"holdout = 0.2\n{dataset}")
    assert not held_out_texts(made) & kept_texts(made)
    assert bool(held_out_texts(made)) == (len(rows) > 40)


def test_near_copies_of_held_out_texts_leave_the_pairs(ingest: Ingest) -> None:
    """Every text has a copy that differs by case: of documents among the queries, of queries among the negatives."""
    rows: list[Row] = []
    for i in range(30):
        rows.append({"query": f"where is place {i} now", "document": f"It is beside place {i} still.", "neg": []})
        rows.append({"query": f"IT IS BESIDE PLACE {i} STILL", "document": f"another place {i}", "neg": []})
        rows.append(
            {"query": f"which town {i}", "document": f"none {i}", "neg": [f"Where is place {i} now?", f"town {i}"]}
        )
    made = ingest({"x.jsonl": rows}, dataset=f"holdout = 0.2\n{NEGATIVES}")
    made.check_accounts(90)

    def forms(texts: Iterable[str]) -> set[str]:
        return {text.casefold().rstrip(".?") for text in texts}

    assert not forms(held_out_texts(made)) & forms(kept_texts(made))
    held_out = forms(held_out_texts(made))
    is_held_out = [row["query"] in held_out_texts(made) for row in rows]
    copies = {
        row
        for row in range(90)
        if not is_held_out[row] and forms([rows[row]["query"], rows[row]["document"]]) & held_out
    }
    assert copies and made.reasons == dict.fromkeys(copies, "held_out_copy")
    removed = sum(not is_held_out[row] and bool(forms(rows[row]["neg"]) & held_out) for row in range(90))
    lost_with_pair = sum(len(rows[row]["neg"]) for row in range(90) if is_held_out[row])
    assert removed and made.counts["negatives_left_out"] == removed + lost_with_pair


@pytest.mark.parametrize("fraction", [0.0, 0.001, 0.3, 0.999])
def test_a_holdout_of_one_component_is_never_cut_apart(fraction: float) -> None:
    pairs = np.arange(50)
    of_pairs, own, shared = np.concatenate([pairs, pairs]), np.arange(50, 100), np.zeros(50, dtype=np.int64)
    held_out = cut_holdout(of_pairs, np.concatenate([shared, own]), 50, fraction, seed=0)
    assert held_out.sum() == 0
    alone = cut_holdout(of_pairs, np.concatenate([pairs, own]), 50, fraction, seed=0)
    assert alone.sum() == int(fraction * 50)


# decontamination


@pytest.fixture
def evaluation(tmp_path: Path) -> Callable[..., Path]:
    """`evaluation(corpus, queries)`: a folder eval/ with these tables or bytes."""

    def write(corpus: pa.Table | bytes, queries: pa.Table | bytes | None = None) -> Path:
        (tmp_path / "eval").mkdir()
        for name, table in (("corpus", corpus), ("queries", queries or pa.table({"text": ["none"]}))):
            path = tmp_path / "eval" / f"{name}.parquet"
            if isinstance(table, bytes):
                path.write_bytes(table)
            else:
                pq.write_table(table, path)
        return tmp_path / "eval"

    return write


CLEAN = 'decontaminate = ["eval"]'


def test_texts_of_an_evaluation_are_quarantined(ingest: Ingest, evaluation: Callable[..., Path]) -> None:
    corpus = pa.table({"text": ["d1", "body"], "title": ["", "head"]})
    folder = evaluation(corpus, pa.table({"text": ["q4", "d2"]}))
    rows = [*make(6), {"query": "x", "document": "head body"}, {"query": "body", "document": "y"}, *make(1, 1)]
    made = ingest({"x.jsonl": rows}, settings=CLEAN)
    made.check_accounts(9)
    assert {row for row, reason in made.reasons.items() if reason == "contaminated"} == {1, 2, 4, 6, 7, 8}

    pq.write_table(pa.table({"text": ["d3"]}), folder / "corpus.parquet")  # a changed evaluation is another artifact
    reasons = ingest({"x.jsonl": rows}, settings=CLEAN).reasons
    assert {row for row, reason in reasons.items() if reason == "contaminated"} == {2, 3, 4}


def test_near_copies_of_an_evaluation_are_quarantined(ingest: Ingest, evaluation: Callable[..., Path]) -> None:
    evaluation(pa.table({"text": ["The capital is Paris."]}), pa.table({"text": ["what is the capital of France?"]}))
    rows: list[Row] = [
        {"query": "What is the capital of  France", "document": "x"},
        {"query": "what is the capital of Spain", "document": "THE CAPITAL IS PARIS"},
        {"query": "which town", "document": "The capital is not Paris.", "neg": ["the capital is paris", "n"]},
    ]
    made = ingest({"x.jsonl": rows}, settings=CLEAN, dataset=NEGATIVES)
    made.check_accounts(3)
    assert [(row["reason"], row["detail"]) for row in made.quarantine] == [
        ("contaminated", "query: in eval"),
        ("contaminated", "document: in eval"),
    ]
    assert made.texts("documents") == ["The capital is not Paris.", "n"]
    assert made.counts["negatives_unusable"] == {"contaminated": 1}


@pytest.mark.parametrize("folder", ["../eval", "/eval", "no_such"])
def test_an_evaluation_that_is_not_there_or_leads_out_is_refused(ingest: Ingest, folder: str) -> None:
    with pytest.raises(ConfigError, match=r"ingest\.decontaminate"):
        ingest({"x.jsonl": make(4)}, settings=f'decontaminate = ["{folder}"]')


@pytest.mark.parametrize(
    ("corpus", "message"),
    [
        (b"garbage", "cannot be read as Parquet"),
        (pa.table({"body": ["x"]}), "no column 'text'; it has: body"),
        (pa.table({"text": [1]}), "column 'text' is int64, expected text"),
    ],
)
def test_a_broken_evaluation_is_refused(
    ingest: Ingest, evaluation: Callable[..., Path], corpus: pa.Table | bytes, message: str
) -> None:
    evaluation(corpus)
    with pytest.raises(InputError, match=rf"eval.corpus\.parquet: {message}"):
        ingest({"x.jsonl": make(4)}, settings=CLEAN)


def test_texts_of_an_evaluation_are_not_kept_as_negatives(ingest: Ingest, evaluation: Callable[..., Path]) -> None:
    evaluation(pa.table({"text": ["secret"]}))
    rows = [{"query": "q", "document": "d", "neg": ["secret", "n"]}]
    assert ingest({"x.jsonl": rows}, settings=CLEAN, dataset=NEGATIVES).texts("documents") == ["d", "n"]


# refusals


def test_pairs_of_one_row_are_accounted_for_each_and_filtered_rows_apart(ingest: Ingest) -> None:
    rows: list[Row] = [
        {"query": f"q{i}", "pos": [f"a{i}", "", f"a{i}", 5], "neg": [{"text": f"n{i}"}], "label": i % 2}
        for i in range(6)
    ]
    columns = 'columns = { document = "pos", negatives = "neg" }'
    made = ingest({"x.jsonl": rows}, dataset=f'{columns}\nwhere = "label = 1"')
    assert made.counts["rows"] == 12 and made.counts["rows_filtered"] == 3
    assert made.counts["quarantined"] == {"duplicate_pair": 3, "empty": 3, "wrong_type": 3}
    assert made.texts("documents") == ["a1", "n1", "a3", "n3", "a5", "n5"]
    assert not any(name.startswith("column") for name in made.counts)


def test_too_many_broken_rows_stop_with_exit_code_7(ingest: Ingest, tmp_path: Path) -> None:
    rows = [*make(8), {"query": None, "document": "x"}, {"query": 3, "document": "x"}]
    with pytest.raises(QuarantineError, match=r"dataset 'n': 2 of 10 rows.*null 1, wrong_type 1.*0\.1[^0-9]") as caught:
        ingest({"x.jsonl": rows}, allowed=0.1)
    assert caught.value.exit_code == 7
    (pieces,) = (tmp_path / "workspace").rglob("staged")
    staged = [row for path in pieces.glob("*.quarantine.parquet") for row in pq.read_table(path).to_pylist()]
    assert [row["source_row"] for row in staged] == [8, 9]  # what the message points to
    ingest({"x.jsonl": rows}, allowed=0.2).check_accounts(10)


def test_duplicates_do_not_count_as_broken(ingest: Ingest) -> None:
    ingest({"x.jsonl": make(1) * 20}, allowed=0.0).check_accounts(20)


@pytest.mark.parametrize("content", [b"\n\n", b""])
def test_a_source_without_rows_is_named(ingest: Ingest, content: bytes) -> None:
    with pytest.raises(InputError, match=r"x\.jsonl"):
        ingest({"x.jsonl": content})


def test_a_python_package_is_a_source(ingest: Ingest) -> None:
    made = ingest({}, source='"python:json"', dataset="holdout = 0.1")
    made.check_accounts(made.counts["rows"])
    assert len(made.pairs) > 5
    assert any(text.startswith("def ") for text in made.texts("documents"))
