"""Retrieval test collections: documents, queries and judgements, as `artifacts/collection.py` finds them.

    corpus   doc_id, text, title (optional)     queries   query_id, text     qrels   query_id, doc_id, score

The text of a document that has a title is title + " " + text. Ids are strings or integers. Folders of
BEIR and MTEB are collections too, and so are the holdout folders of `hardbatch run`. The
corpus.parquet of a holdout has the held-out documents alone; the training documents, among which these
are searched as well, are read from the folder `texts` beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from hardbatch.pipeline.artifacts.collection import (
    DOCUMENTS,
    HELP,
    QRELS,
    QUERIES,
    TITLE,
    corpus_files,
    qrels_files,
    queries_files,
    read_batches,
)
from hardbatch.pipeline.errors import InputError
from hardbatch.trainer.shelves import KeptShelves

Names = Mapping[str, Sequence[str]]
TRAINING_DOCUMENTS = b"training_documents"  # how many there are, in the metadata of a holdout's corpus
_SPLIT = "test"  # of several splits


@dataclass(frozen=True, kw_only=True)
class Collection:
    """Texts by row, and relevance judgements.

    `scores[i]` says how relevant document `document_rows[i]` is to query `query_rows[i]`. Documents
    without a score, or with one of 0 or less, are not relevant. At least one score is above 0.
    """

    name: str
    documents: Sequence[str]
    queries: Sequence[str]
    query_rows: NDArray[np.int64]
    document_rows: NDArray[np.int64]
    scores: NDArray[np.int64]
    source: str = ""
    """The columns that documents are made of, and their file."""
    kept: KeptShelves = field(default_factory=KeptShelves, init=False, repr=False, compare=False)
    """Tokens of its texts, which a later evaluation uses again."""


def load_documents(folder: Path) -> list[str]:
    """The documents of the collection in `folder`. Raises InputError as `load_collection` does."""
    paths = corpus_files(folder)
    corpus = _read(paths, {"text": ()}, TITLE)
    return _training_documents(folder, paths) + _documents(corpus, _shown(paths))[0]


def load_collection(folder: Path) -> Collection:
    """Loads the collection in `folder`.

    Raises:
        InputError: A file is missing or wrong; the message names it, and the column, row or id.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; {HELP}")
    found = [corpus_files(folder), queries_files(folder), qrels_files(folder, _SPLIT)]
    corpus_path, queries_path, qrels_path = map(_shown, found)
    corpus, queries, qrels = _read(found[0], DOCUMENTS, TITLE), _read(found[1], QUERIES), _read(found[2], QRELS)
    document_row_of = _rows_by_id(_strings(corpus, "doc_id", corpus_path), "doc_id", corpus_path)
    query_row_of = _rows_by_id(_strings(queries, "query_id", queries_path), "query_id", queries_path)
    query_rows = _look_up(qrels, "query_id", query_row_of, qrels_path, queries_path)
    document_rows = _look_up(qrels, "doc_id", document_row_of, qrels_path, corpus_path)
    scores = _scores(qrels, qrels_path)
    _refuse_repeated(query_rows * len(document_row_of) + document_rows, qrels_path)
    if not (scores > 0).any():
        raise InputError(f"{qrels_path}: no score is above 0, so there is nothing to find; {HELP}")
    documents, columns = _documents(corpus, corpus_path)
    training = _training_documents(folder, found[0])
    source = f"{columns} of {corpus_path}"
    if training:
        source += f", {len(training):,} of them of training"
    return Collection(
        name=_name_of(folder.resolve()),
        source=source,
        documents=training + documents,
        queries=_strings(queries, "text", queries_path),
        query_rows=query_rows,
        document_rows=document_rows + len(training),
        scores=scores,
    )


def _training_documents(folder: Path, corpus: list[Path]) -> list[str]:
    """The documents that a holdout is searched in besides its own; none for other collections."""
    if corpus != [folder / "corpus.parquet"]:
        return []
    expected = int((pq.read_schema(corpus[0]).metadata or {}).get(TRAINING_DOCUMENTS, 0))
    if not expected:
        return []
    texts = folder.parent / "texts"
    try:
        tables = [pa.ipc.open_file(pa.memory_map(str(path))).read_all() for path in sorted(texts.glob("documents-*"))]
    except (OSError, pa.ArrowException) as error:
        reason = (str(error).splitlines() or [""])[0][:160]
        raise InputError(f"{texts}: cannot be read as Arrow: {reason}") from None
    if sum(map(len, tables)) != expected:
        raise InputError(
            f"{folder}: is searched together with {expected:,} training documents, of which {texts} has "
            f"{sum(map(len, tables)):,}; copy the folder `texts` that was beside it"
        )
    return [text for table in tables for text in _strings(table, "text", texts)]


def _name_of(folder: Path) -> str:
    """The folder's name, or DOMAIN_holdout for a holdout of the pipeline, pairs/DOMAIN/KEY/holdout."""
    return f"{folder.parent.parent.name}_holdout" if folder.name == "holdout" else folder.name


def _shown(paths: list[Path]) -> Path:
    """What messages call the files of a part: the file, or their folder."""
    return paths[0] if len(paths) == 1 else paths[0].parent


def _read(paths: list[Path], columns: Names, optional: Names | None = None) -> pa.Table:
    batches = [batch for path in paths for batch in read_batches(path, columns, optional)]
    if not batches:
        raise InputError(f"{_shown(paths)}: it has no rows; {HELP}")
    return pa.concat_tables(map(pa.table, batches), promote_options="default")


def _strings(table: pa.Table, column: str, path: Path) -> list[str]:
    values = table[column]
    kind = values.type.value_type if pa.types.is_dictionary(values.type) else values.type
    text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    if not text and not (column.endswith("_id") and pa.types.is_integer(kind)):
        raise InputError(f"{path}: column '{column}' holds {values.type}, it must hold strings")
    if values.null_count:
        row = pc.index(pc.is_null(values), True).as_py()
        raise InputError(f"{path}: column '{column}' is null in row {row}; give every row a value")
    strings: list[str] = values.cast(pa.large_utf8()).to_pylist()
    return strings


def _documents(corpus: pa.Table, path: Path) -> tuple[list[str], str]:
    """The texts of the documents, and what they are made of, in words."""
    texts = _strings(corpus, "text", path)
    if "title" not in corpus.schema.names or pa.types.is_null(corpus["title"].type):
        return texts, "text"
    titles = _strings(pa.table({"title": pc.fill_null(corpus["title"], "")}), "title", path)
    documents = [f"{title} {text}" if title else text for title, text in zip(titles, texts, strict=True)]
    return documents, 'title + " " + text' if any(titles) else "text"


def _rows_by_id(ids: Sequence[str], column: str, path: Path) -> dict[str, int]:
    if not ids:
        raise InputError(f"{path}: it has no rows; {HELP}")
    rows: dict[str, int] = {}
    for row, identifier in enumerate(ids):
        first = rows.setdefault(identifier, row)
        if first != row:
            raise InputError(f"{path}: {column} '{identifier}' is in rows {first} and {row}; ids must be unique")
    return rows


def _look_up(
    qrels: pa.Table, column: str, rows: dict[str, int], qrels_path: Path, other_path: Path
) -> NDArray[np.int64]:
    found = np.empty(qrels.num_rows, np.int64)
    for index, identifier in enumerate(_strings(qrels, column, qrels_path)):
        row = rows.get(identifier)
        if row is None:
            raise InputError(
                f"{qrels_path}: {column} '{identifier}' in row {index} is not in {other_path.name}; "
                "remove the row, or add what it names"
            )
        found[index] = row
    return found


def _scores(qrels: pa.Table, path: Path) -> NDArray[np.int64]:
    values: Any = qrels["score"]
    try:
        scores = values.cast(pa.int64())  # raises for a fraction
    except pa.ArrowException as error:
        raise InputError(f"{path}: column 'score' must hold whole numbers: {error}") from None
    if scores.null_count:
        raise InputError(f"{path}: column 'score' is null in row {pc.index(pc.is_null(scores), True).as_py()}")
    numbers: NDArray[np.int64] = scores.to_numpy()
    return numbers


def _refuse_repeated(pairs: NDArray[np.int64], path: Path) -> None:
    order = np.argsort(pairs, kind="stable")
    again = np.flatnonzero(np.diff(pairs[order]) == 0)
    if len(again):
        first, second = order[again[0] : again[0] + 2]
        raise InputError(f"{path}: rows {first} and {second} judge the same document for the same query; keep one")
