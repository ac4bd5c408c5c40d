"""Pairs from a collection: the judgements above 0 of one split, with the texts that their ids name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc

from hardbatch.pipeline.artifacts.collection import (
    DOCUMENTS,
    QRELS,
    QUERIES,
    TITLE,
    corpus_files,
    queries_files,
    read_batches,
    split_files,
)
from hardbatch.pipeline.errors import InputError, first_line
from hardbatch.pipeline.sources.columns import Record, Table
from hardbatch.pipeline.sources.files import SourceFile

_COLUMNS = ("query", "document", "query-id", "corpus-id", "score")
_TEXTS = pa.schema([("id", pa.large_utf8()), ("title", pa.large_utf8()), ("text", pa.large_utf8())])


def open_collection(file: SourceFile, scratch: Path) -> Table:
    """Opens a split of a collection as a table of pairs.

    Its columns are query, document (with its title) and score; the columns of ids, query-id and corpus-id,
    stand for the texts too. Rows are numbered as the judgements are. Only the ids of these are held in memory.

    Args:
        file: The source, whose location is the first file of the judgements.
        scratch: The folder for the texts that are judged, while they are read.

    Raises:
        InputError: A file of the collection is broken.
    """
    folder, paths = split_files(Path(file.location))
    batches = [batch for path in paths for batch in read_batches(path, QRELS)]
    try:
        judgements = pa.concat_tables(
            pa.table({
                "query_id": batch["query_id"].cast(pa.large_utf8()),
                "doc_id": batch["doc_id"].cast(pa.large_utf8()),
                "score": batch["score"].cast(pa.float64()),
            })
            for batch in batches
        )  # fmt: skip
    except pa.ArrowException as error:
        raise InputError(f"{file.name}: its scores are not numbers: {first_line(error)}") from None
    return Table([(name, "text") for name in _COLUMNS], _records(folder, judgements, scratch))


def _records(folder: Path, judgements: pa.Table, scratch: Path) -> Iterator[Record]:
    query_ids, document_ids = judgements["query_id"], judgements["doc_id"]
    scores = judgements["score"].to_pylist()
    relevant = [row for row, score in enumerate(scores) if score is not None and score > 0]
    with (
        _texts_of(queries_files(folder), QUERIES, "query_id", query_ids, scratch / ".queries.tmp") as queries,
        _texts_of(corpus_files(folder), DOCUMENTS, "doc_id", document_ids, scratch / ".documents.tmp") as documents,
    ):
        query_rows = pc.index_in(query_ids, value_set=queries["id"]).to_pylist()
        document_rows = pc.index_in(document_ids, value_set=documents["id"]).to_pylist()
        for row in relevant:
            for ids, rows, name in ((query_ids, query_rows, "query"), (document_ids, document_rows, "document")):
                if rows[row] is None:
                    yield Record(row, None, "unknown_id", f"no {name} has the id {ids[row].as_py()!r}")
                    break
            else:
                query, document = _text(queries, query_rows[row]), _text(documents, document_rows[row])
                yield Record(row, dict(zip(_COLUMNS, (query, document, query, document, scores[row]), strict=True)))


def _text(texts: pa.Table, row: int) -> dict[str, Any]:
    return {name: texts[name][row].as_py() for name in ("title", "text")}


@contextmanager
def _texts_of(
    paths: list[Path], columns: dict[str, tuple[str, ...]], id_name: str, wanted: pa.ChunkedArray, copy: Path
) -> Iterator[pa.Table]:
    """The texts of the wanted ids, memory-mapped: a corpus may be larger than the memory."""
    copy.parent.mkdir(parents=True, exist_ok=True)
    wanted = wanted.unique()
    try:
        with pa.OSFile(str(copy), "wb") as sink, pa.ipc.new_file(sink, _TEXTS) as writer:
            for path in paths:
                for batch in read_batches(path, columns, TITLE):
                    writer.write(_wanted_texts(batch, id_name, wanted))
        with pa.memory_map(str(copy)) as source:
            yield pa.ipc.open_file(source).read_all()
    finally:
        copy.unlink(missing_ok=True)


def _wanted_texts(batch: pa.RecordBatch, id_name: str, wanted: pa.Array) -> pa.RecordBatch:
    ids = batch[id_name].cast(pa.large_utf8())
    title = batch["title"] if "title" in batch.schema.names else pa.nulls(batch.num_rows)
    columns = [ids, title.cast(pa.large_utf8()), batch["text"].cast(pa.large_utf8())]
    return pa.record_batch(columns, schema=_TEXTS).filter(pc.is_in(ids, value_set=wanted))
