"""Reading texts, pairs and vectors by row, over file and unit boundaries."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hardbatch.pipeline import schemas
from hardbatch.pipeline.artifacts.artifact import read_artifact
from hardbatch.pipeline.artifacts.commit import open_builder, write_unit
from hardbatch.pipeline.artifacts.vectors import FoldedPoints, Pairs, Texts, VectorRows, load_pairs, open_vectors


@pytest.fixture
def build_artifact(tmp_path):
    """`build_artifact(write, config=..., counts=...)`: an artifact of one unit, filled by `write(writer)`."""

    def build(write, config=None, counts=None):
        path = tmp_path / "artifact"
        with open_builder(path) as builder:
            with write_unit(path, "all") as writer:
                write(writer)
            builder.finish(
                units=["all"], stage="test", stage_version=1, domain="d", key="k", config=config or {}, inputs={},
                counts=counts,
            )  # fmt: skip
        return read_artifact(path)

    return build


def write_texts(writer, side, texts, rows_per_file):
    for number, start in enumerate(range(0, len(texts), rows_per_file)):
        some = texts[start : start + rows_per_file]
        path = writer.add_file(f"texts/{side}-{number:05d}.arrow", rows=len(some))
        with pa.ipc.new_file(path, schemas.TEXTS) as file:
            column = pa.array(some, pa.large_utf8())
            file.write_batch(pa.record_batch([column], schema=schemas.TEXTS))


def test_texts_by_row_over_several_files(build_artifact, monkeypatch):
    monkeypatch.setattr(schemas, "TEXT_ROWS_PER_FILE", 4)
    queries, documents = [f"q{i} 中\n" for i in range(10)], [f"d{i}" for i in range(8)]

    def write(writer):
        write_texts(writer, "queries", queries, 4)
        write_texts(writer, "documents", documents, 4)

    artifact = build_artifact(write)
    for side, texts in (("queries", queries), ("documents", documents)):
        read = Texts(artifact, side)
        assert read.num_rows == len(texts)
        rows = np.array([7, 0, 3, 4, 3, len(texts) - 1, 0])
        assert read.take(rows) == [texts[row] for row in rows]
        assert read.take(np.array([], dtype=np.int64)) == []
        assert read.take(np.arange(len(texts))) == texts


def test_vector_rows_over_units(tmp_path):
    vectors = np.random.default_rng(0).standard_normal((10, 3)).astype(np.float16)
    paths = []
    for number, start in enumerate(range(0, 10, 4)):
        paths.append(tmp_path / f"{number}.npy")
        np.save(paths[-1], vectors[start : start + 4])
    rows = VectorRows(paths, unit_rows=4, num_rows=10, dimension=3)
    assert (rows.num_rows, rows.dimension) == (10, 3)
    chosen = np.array([9, 0, 3, 4, 4, 7, 8])
    taken = rows.take(chosen)
    assert taken.dtype == np.float32
    assert np.array_equal(taken, vectors[chosen].astype(np.float32))
    assert rows.take(np.array([], dtype=np.int64)).shape == (0, 3)


def make_pairs(query_row, document_row, negatives=None):
    offsets = rows = None
    if negatives is not None:
        offsets = np.concatenate([[0], np.cumsum([len(group) for group in negatives])])
        rows = np.array([row for group in negatives for row in group], dtype=np.int64)
    return Pairs(
        query_row=np.array(query_row), document_row=np.array(document_row), negative_offsets=offsets, negative_rows=rows
    )


def test_known_pairs_are_exactly_the_pairs_of_the_domain():
    generator = np.random.default_rng(0)
    codes = generator.choice(20 * 15, 60, replace=False)
    pairs = make_pairs(codes // 15, codes % 15)
    known = set(zip(pairs.query_row.tolist(), pairs.document_row.tolist(), strict=True))
    found = pairs.is_known(np.arange(20)[:, None], np.arange(25)[None, :])  # rows 15 to 24 are those of hard negatives
    assert found.tolist() == [[(q, d) in known for d in range(25)] for q in range(20)]


def test_a_negative_beyond_the_documents_of_pairs_is_not_mistaken_for_a_pair():
    pairs = make_pairs([0, 1], [0, 1])  # width 2: (0, 3) would have the code of (1, 1)
    assert not pairs.is_known(np.array(0), np.array([2, 3])).any()
    assert pairs.is_known(np.array(1), np.array([0, 1])).tolist() == [False, True]


def test_documents_per_query():
    assert make_pairs([0, 1, 0, 2, 0], [0, 1, 2, 3, 4]).documents_per_query.tolist() == [3, 1, 1]


def test_negatives_of_a_pair(build_artifact):
    groups = [[3, 1], [], [4]]
    table = pa.table(
        {
            "pair_id": [0, 1, 2],
            "query_row": [0, 1, 1],
            "document_row": [0, 2, 0],
            "source_file": [0, 0, 0],
            "source_row": [0, 1, 2],
            "negative_rows": groups,
        },
        schema=schemas.PAIRS_WITH_NEGATIVES,
    )
    read = load_pairs(build_artifact(lambda writer: pq.write_table(table, writer.add_file("pairs.parquet"))))
    assert len(read) == 3
    assert [read.negatives_of(pair_id).tolist() for pair_id in range(3)] == groups


def test_pairs_without_negatives(build_artifact):
    table = pa.table(
        {name: [0, 1] for name in ("pair_id", "query_row", "document_row", "source_file", "source_row")},
        schema=schemas.PAIRS,
    )
    read = load_pairs(build_artifact(lambda writer: pq.write_table(table, writer.add_file("pairs.parquet"))))
    assert read.negatives_of(1).tolist() == []
    assert json.dumps(read.query_row.tolist()) == "[0, 1]"


@pytest.fixture
def domain(build_artifact):
    """Vectors of 5 queries and 6 documents in units of 4, query row 1 and document row 4 without one; 6 pairs."""
    generator = np.random.default_rng(1)
    sides = {
        name: generator.standard_normal((rows, 3)).astype(np.float16)
        for name, rows in (("queries", 5), ("documents", 6))
    }
    invalid = {"queries": [1], "documents": [4]}

    def write(writer):
        for side, vectors in sides.items():
            for number, start in enumerate(range(0, len(vectors), 4)):
                some = vectors[start : start + 4]
                with writer.add_file(f"vectors/{side}-{number:05d}.npy", rows=len(some)).open("wb") as file:
                    np.save(file, some)
            table = pa.Table.from_pylist(
                [{"row": row, "reason": "nan_vector"} for row in invalid[side]], schemas.INVALID_ROWS
            )
            pq.write_table(table, writer.add_file(f"invalid-{side}.parquet"))

    artifact = build_artifact(write, config={"unit_rows": 4}, counts={"dimension": 3})
    pairs = make_pairs([0, 1, 2, 3, 4, 4], [0, 1, 2, 4, 3, 5])
    return SimpleNamespace(vectors=open_vectors(artifact.path), pairs=pairs, **sides)


def test_pairs_of_rows_without_a_vector_are_invalid(domain):
    assert domain.vectors.invalid_pairs(domain.pairs).tolist() == [False, True, False, True, False, False]


def test_folded_points_are_the_sums_of_the_sides(domain):
    points = FoldedPoints(vectors=domain.vectors, pairs=domain.pairs, pair_ids=np.array([0, 2, 4, 5]))
    assert (len(points), points.dimension) == (4, 3)
    rows = np.array([3, 0, 2])
    documents, queries = points.sides(rows)
    assert np.array_equal(documents, domain.documents[[5, 0, 3]].astype(np.float32))
    assert np.array_equal(queries, domain.queries[[4, 0, 4]].astype(np.float32))
    assert np.array_equal(points.take(rows), documents + queries)
    assert np.array_equal(points.joined(rows), np.concatenate([documents, queries], axis=1))
    assert np.array_equal(points.sides(rows)[0], documents)  # taking sums has not changed what is read


def test_more_units_than_files_held_open(tmp_path, monkeypatch):
    monkeypatch.setattr("hardbatch.pipeline.artifacts.vectors._OPEN_FILES", 3)
    vectors = np.random.default_rng(0).standard_normal((40, 3)).astype(np.float16)
    paths = [tmp_path / f"{number}.npy" for number in range(20)]
    for number, path in enumerate(paths):
        np.save(path, vectors[2 * number : 2 * number + 2])
    rows = VectorRows(paths, unit_rows=2, num_rows=40, dimension=3)
    num_open = len(list(Path("/proc/self/fd").iterdir()))
    chosen = np.random.default_rng(1).integers(0, 40, 200)
    assert np.array_equal(rows.take(chosen), vectors[chosen].astype(np.float32))
    assert len(list(Path("/proc/self/fd").iterdir())) <= num_open + 3
