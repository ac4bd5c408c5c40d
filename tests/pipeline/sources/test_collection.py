"""collection: folders of BEIR and MTEB as sources of pairs, and for decontamination."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hardbatch.pipeline.artifacts.files import DigestCache
from hardbatch.pipeline.config import Dataset, Reading
from hardbatch.pipeline.errors import InputError
from hardbatch.pipeline.sources.files import SourceFile, list_source_files
from hardbatch.pipeline.sources.rows import evaluation_texts, read_rows
from tests.collections import DOCUMENTS, QRELS, write_beir, write_mteb
from tests.pipeline.sources.reading import pairs_of, read_dataset

PAIRS = [("which is 0?", 'One the "first" document'), ("which is 1?", "the second"), ("which is 1?", "Three the third")]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


def list_files(root: Path, source: str) -> list[SourceFile]:
    return list_source_files(Dataset(name="n", source=source), root, DigestCache(root.parent / ".digests.json"))


@pytest.mark.parametrize("source", ["nf", "nf/qrels/train.tsv", "nf/qrels/tr*"])
def test_the_judged_pairs_of_a_beir_folder(root: Path, source: str) -> None:
    write_beir(root / "nf", "train", "test")
    rows = read_dataset(root, source)
    assert pairs_of(rows) == PAIRS and [row.row for row in rows] == [0, 1, 2]
    assert [file.name for file in list_files(root, source)] == ["nf/qrels/train.tsv"]


@pytest.mark.parametrize("source", ["set", "set/data/*.parquet", "set/data/test-00001-of-00002.parquet"])
def test_the_judged_pairs_of_an_mteb_folder(root: Path, source: str) -> None:
    write_mteb(root / "set")
    assert pairs_of(read_dataset(root, source)) == PAIRS


def test_ids_are_never_taken_for_texts(root: Path) -> None:
    write_beir(root / "nf")
    columns = {"query": "query-id", "document": "corpus-id"}
    assert pairs_of(read_dataset(root, "nf/qrels/test.tsv", columns=columns)) == PAIRS


def test_scores_can_be_chosen_by(root: Path) -> None:
    write_beir(root / "nf")
    assert pairs_of(read_dataset(root, "nf", where="score >= 2")) == [PAIRS[1]]


def test_of_several_splits_none_of_them_train_one_must_be_named(root: Path) -> None:
    write_beir(root / "nf", "dev", "test")
    with pytest.raises(InputError, match=r"has judgements of dev, test, but none called train.*qrels/dev\.tsv"):
        list_files(root, "nf")


def test_an_id_without_a_text_is_a_broken_row(root: Path) -> None:
    write_beir(root / "nf", qrels=[*QRELS, ("q9", "d0", 1), ("q0", "d9", 1)])
    broken = [(row.row, row.problem, row.detail) for row in read_dataset(root, "nf") if row.problem]
    assert broken == [(4, "unknown_id", "no query has the id 'q9'"), (5, "unknown_id", "no document has the id 'd9'")]


@pytest.mark.parametrize("name", ["corpus.jsonl", "queries.jsonl.gz", "qrels/test.tsv"])
def test_the_digest_covers_all_files_and_a_change_is_noticed(root: Path, name: str) -> None:
    write_beir(root / "nf")
    (file,) = list_files(root, "nf")
    more = gzip.compress(b"\n") if name.endswith(".gz") else b"\n"
    (root / "nf" / name).write_bytes((root / "nf" / name).read_bytes() + more)
    with pytest.raises(InputError, match="was changed while it was read"):
        list(read_rows([file], range(1), Reading(), root.parent / "scratch", Counter()))
    assert list_files(root, "nf")[0].sha256 != file.sha256
    assert not any((root.parent / "scratch").iterdir())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("corpus.jsonl", b'{"_id": "d0", "body": "x"}\n', r"corpus\.jsonl: no column 'text'; it has: _id, body"),
        ("corpus.jsonl", b'{"_id": "d0", "text": "x"}\n{"_id": \n', r"corpus\.jsonl: cannot be read as JSON Lines"),
        ("corpus.jsonl", b'{"_id": "d0", "text": 5}\n', r"corpus\.jsonl: cannot be read as JSON Lines"),
        ("corpus.jsonl", b"[1]\n", r"corpus\.jsonl: cannot be read as JSON Lines"),
        ("queries.jsonl.gz", b"\x1f\x8bnonsense", r"queries\.jsonl\.gz: cannot be read as JSON Lines"),
        ("qrels/test.tsv", b"query-id\tscore\nq0\t1\n", r"test\.tsv: no column 'doc_id'; it has: query-id, score"),
        ("qrels/test.tsv", b"query-id\tcorpus-id\tscore\nq0\td0\n", r"test\.tsv: cannot be read as TSV"),
        ("qrels/test.tsv", b"query-id\tcorpus-id\tscore\nq0\td0\tmuch\n", r"its scores are not numbers"),
    ],
)
def test_a_broken_part_is_named(root: Path, name: str, content: bytes, message: str) -> None:
    (write_beir(root / "nf") / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_dataset(root, "nf")


def test_judgements_of_trec_and_ids_that_are_numbers(root: Path) -> None:
    write_beir(root / "nf")
    (root / "nf" / "qrels" / "test.tsv").write_text("7\t0\t3\t1\n8\t0\t3\t0\n")
    (root / "nf" / "corpus.jsonl").write_text('{"_id": 3, "text": "d"}\n{"_id": 4, "text": "e"}\n')
    (root / "nf" / "queries.jsonl.gz").write_text('{"_id": "7", "text": "q"}\n\n{"_id": "8", "text": "r"}\n')
    assert pairs_of(read_dataset(root, "nf")) == [("q", "d")]


def test_our_own_holdout_is_a_source(root: Path) -> None:
    (root / "holdout").mkdir()
    tables = {
        "corpus": {"doc_id": ["a"], "text": ["d"], "title": [None]},
        "queries": {"query_id": ["p"], "text": ["q"]},
        "qrels": {"query_id": ["p"], "doc_id": ["a"], "score": [1]},
    }
    for name, columns in tables.items():
        pq.write_table(pa.table(columns), root / "holdout" / f"{name}.parquet")
    assert pairs_of(read_dataset(root, "holdout")) == [("q", "d")]


def test_files_that_are_called_alike_are_no_collection(root: Path) -> None:
    (root / "data").mkdir()
    (root / "data" / "test.jsonl").write_text('{"query": "q", "document": "d"}\n')
    (root / "corpus.jsonl").write_text('{"_id": "a", "text": "b"}\n')
    assert pairs_of(read_dataset(root, "data/test.jsonl")) == [("q", "d")]


@pytest.mark.parametrize("write", [write_beir, write_mteb])
def test_the_texts_of_an_evaluation(tmp_path: Path, write: object) -> None:
    assert callable(write)
    texts = set(evaluation_texts(write(tmp_path / "set")))
    assert {"which is 0?", "the second", "the third", "Three the third"} < texts
    assert len(texts) == 2 * len(DOCUMENTS) - 1 + 3


def test_many_rows_are_read_in_pieces(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hardbatch.pipeline.artifacts.collection._BYTES_PER_READ", 1_000)
    write_beir(root / "nf", qrels=[("q0", f"d{i}", 1) for i in range(0, 500, 3)])
    lines = [json.dumps({"_id": f"d{i}", "text": f"text {i}"}) + "\n" for i in range(500)]
    (root / "nf" / "corpus.jsonl").write_text("".join(lines))
    assert [row.document for row in read_dataset(root, "nf")] == [f"text {i}" for i in range(0, 500, 3)]
