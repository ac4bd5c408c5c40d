"""artifacts.vectors: texts, pairs and vectors by row, over the boundaries of files and units."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from hardbatch.pipeline import schemas
from hardbatch.pipeline.arrays import PairSet
from hardbatch.pipeline.artifacts.artifact import read_artifact
from hardbatch.pipeline.artifacts.vectors import FoldedPoints, Pairs, Texts, VectorRows, load_pairs, open_vectors
from tests.artifacts import make_artifact


def test_texts_by_row_over_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schemas, "TEXT_ROWS_PER_FILE", 4)
    sides = {"queries": [f"q{i} 中\n" for i in range(10)], "documents": [f"d{i}" for i in range(8)]}
    files = {
        f"texts/{side}-{start // 4:05d}.arrow": pa.table({"text": texts[start : start + 4]}, schemas.TEXTS)
        for side, texts in sides.items()
        for start in range(0, len(texts), 4)
    }
    artifact = read_artifact(make_artifact(tmp_path / "artifact", files))
    for side, texts in sides.items():
        read = Texts(artifact, side)
        assert read.num_rows == len(texts)
        for rows in ([7, 0, 3, 4, 3, len(texts) - 1, 0], [], range(len(texts))):
            assert read.take(np.array(rows, dtype=np.int64)) == [texts[row] for row in rows]


def save_units(folder: Path, vectors: np.ndarray, unit_rows: int) -> VectorRows:
    paths = []
    for number, start in enumerate(range(0, len(vectors), unit_rows)):
        paths.append(folder / f"{number}.npy")
        np.save(paths[-1], vectors[start : start + unit_rows])
    return VectorRows(paths, unit_rows=unit_rows, num_rows=len(vectors), dimension=3)


def test_vector_rows_over_units(tmp_path: Path) -> None:
    vectors = np.random.default_rng(0).standard_normal((10, 3)).astype(np.float16)
    rows = save_units(tmp_path, vectors, 4)
    assert (rows.num_rows, rows.dimension) == (10, 3)
    chosen = np.array([9, 0, 3, 4, 4, 7, 8])
    taken = rows.take(chosen)
    assert taken.dtype == np.float32
    assert np.array_equal(taken, vectors[chosen].astype(np.float32))
    assert rows.take(np.array([], dtype=np.int64)).shape == (0, 3)


def test_more_units_than_files_held_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hardbatch.pipeline.artifacts.vectors._OPEN_FILES", 3)
    vectors = np.random.default_rng(0).standard_normal((40, 3)).astype(np.float16)
    rows = save_units(tmp_path, vectors, 2)
    num_open = len(list(Path("/proc/self/fd").iterdir()))
    chosen = np.random.default_rng(1).integers(0, 40, 200)
    assert np.array_equal(rows.take(chosen), vectors[chosen].astype(np.float32))
    assert len(list(Path("/proc/self/fd").iterdir())) <= num_open + 3


def test_known_pairs_are_exactly_those() -> None:
    codes = np.random.default_rng(0).choice(20 * 15, 60, replace=False)
    queries, documents = codes // 15, codes % 15
    known = set(zip(queries.tolist(), documents.tolist(), strict=True))
    found = PairSet(queries, documents).contains(np.arange(20)[:, None], np.arange(25)[None, :])
    assert found.tolist() == [[(q, d) in known for d in range(25)] for q in range(20)]


def test_a_number_beyond_those_of_pairs_is_not_mistaken_for_a_pair() -> None:
    pairs = PairSet(np.array([0, 1]), np.array([0, 1]))  # width 2: (0, 3) would have the code of (1, 1)
    assert not pairs.contains(np.array(0), np.array([2, 3])).any()
    assert pairs.contains(np.array(1), np.array([0, 1])).tolist() == [False, True]


@pytest.mark.parametrize("negatives", [None, [[3, 1], [], [4]]])
def test_pairs_are_read_with_their_negatives_if_there_are_any(
    tmp_path: Path, negatives: list[list[int]] | None
) -> None:
    columns = {"pair_id": [0, 1, 2], "query_row": [0, 1, 1], "document_row": [0, 2, 0]}
    table = pa.table({**columns, "source_file": [0, 0, 0], "source_row": [0, 1, 2]}, schemas.PAIRS)
    if negatives is not None:
        table = table.append_column(schemas.PAIRS_WITH_NEGATIVES.field("negative_rows"), [negatives])
    read = load_pairs(read_artifact(make_artifact(tmp_path / "artifact", {"pairs.parquet": table})))
    assert (len(read), read.query_row.tolist(), read.document_row.tolist()) == (3, [0, 1, 1], [0, 2, 0])
    assert [read.negatives_of(pair_id).tolist() for pair_id in range(3)] == (negatives or [[], [], []])


def test_points_are_the_sums_of_their_sides_and_pairs_without_a_vector_are_invalid(tmp_path: Path) -> None:
    """5 queries and 6 documents in units of 4, query row 1 and document row 4 without a vector; 6 pairs."""
    generator = np.random.default_rng(1)
    sides = {
        side: generator.standard_normal((rows, 3)).astype(np.float16)
        for side, rows in (("queries", 5), ("documents", 6))
    }
    files = {
        f"vectors/{side}-{start // 4:05d}.npy": rows[start : start + 4]
        for side, rows in sides.items()
        for start in range(0, len(rows), 4)
    }
    for side, row in (("queries", 1), ("documents", 4)):
        files[f"invalid-{side}.parquet"] = pa.table({"row": [row], "reason": ["nan_vector"]}, schemas.INVALID_ROWS)
    vectors = open_vectors(
        make_artifact(tmp_path / "artifact", files, config={"unit_rows": 4}, counts={"dimension": 3})
    )
    queries, documents = np.array([0, 1, 2, 3, 4, 4]), np.array([0, 1, 2, 4, 3, 5])
    pairs = Pairs(query_row=queries, document_row=documents, negative_offsets=None, negative_rows=None)
    assert vectors.invalid_pairs(pairs).tolist() == [False, True, False, True, False, False]
    assert vectors.has_document.tolist() == [True, True, True, True, False, True]

    points = FoldedPoints(vectors=vectors, pairs=pairs, pair_ids=np.array([0, 2, 4, 5]))
    assert (len(points), points.dimension) == (4, 3)
    rows = np.array([3, 0, 2])
    documents, queries = points.sides(rows)
    assert np.array_equal(documents, sides["documents"][[5, 0, 3]].astype(np.float32))
    assert np.array_equal(queries, sides["queries"][[4, 0, 4]].astype(np.float32))
    assert np.array_equal(points.take(rows), documents + queries)
    assert np.array_equal(points.joined(rows), np.concatenate([documents, queries], axis=1))
    assert np.array_equal(points.sides(rows)[0], documents)  # taking sums has not changed what is read
