"""The second half of ingest: staged units → pairs, numbered texts, quarantine, holdout.

Works on hashes and numbers, 700 to 780 bytes a pair; texts stream through once more, 65,536 held at a time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from hardbatch.pipeline import schemas
from hardbatch.pipeline.arrays import Array
from hardbatch.pipeline.artifacts.commit import UnitWriter, write_unit

STAGED_ROWS = 8_192
_KEPT, _DUPLICATE, _HELD_OUT = 0, 1, 2  # fates of a staged row


def assemble(
    path: Path, staged: list[Path], quarantined: list[Path], counts: Counter[str], *, holdout: float, holdout_seed: int
) -> None:
    """Joins the staged files of a domain into the unit `assembled` of the artifact at `path`.

    Of equal pairs the first stays. `counts` are those of staging; the unit's counts account for every row.
    """
    columns = ["source_file", "source_row", "query_hash", "document_hash"]
    numbers = pa.concat_tables([pq.read_table(file, columns=columns) for file in staged])
    query_codes = _codes(numbers["query_hash"])
    document_codes = _codes(numbers["document_hash"])
    fate = np.full(len(numbers), _KEPT, dtype=np.int8)
    fate[_is_repeat(query_codes, document_codes)] = _DUPLICATE
    counts["holdout_target"] = int(holdout * (fate == _KEPT).sum())
    if holdout > 0:
        pair_of_edge, text_of_edge = _edges(staged, fate == _KEPT)
        candidates = np.flatnonzero(fate == _KEPT)
        held_out = cut_holdout(pair_of_edge, text_of_edge, len(candidates), holdout, holdout_seed)
        fate[candidates[held_out]] = _HELD_OUT
    counts["duplicate_pair"] = int((fate == _DUPLICATE).sum())
    with write_unit(path, "assembled") as writer:
        kept = fate == _KEPT
        query_rows, is_first_query = _number(query_codes[kept])
        num_queries = int(is_first_query.sum())
        _write_texts(writer, "queries", num_queries, _texts(staged, kept, is_first_query, ["query"]))
        offsets, document_rows, is_first_document = _number_documents(staged, kept)
        num_documents = int(is_first_document.sum())
        documents = _texts(staged, kept, is_first_document, ["document", "negatives"])
        _write_texts(writer, "documents", num_documents, documents)
        pairs = {
            "pair_id": np.arange(int(kept.sum()), dtype=np.int64),
            "query_row": query_rows,
            "document_row": document_rows[offsets[:-1]],  # a pair's document comes first, its negatives after it
            "source_file": numbers["source_file"].to_numpy()[kept],
            "source_row": numbers["source_row"].to_numpy()[kept],
        }
        schema = schemas.PAIRS
        if counts["negatives"]:
            schema = schemas.PAIRS_WITH_NEGATIVES
            pairs["negative_rows"] = _negative_lists(offsets, document_rows)
        table = pa.table(pairs, schema=schema)
        pq.write_table(table, writer.add_file("pairs.parquet", rows=len(table)), compression="zstd")
        _write_quarantine(writer, quarantined, numbers.filter(pa.array(fate == _DUPLICATE)))
        if holdout > 0:
            _write_holdout(writer, staged, fate == _HELD_OUT, query_codes, document_codes)
        writer.counts = _final_counts(counts, fate, num_queries, num_documents)


def cut_holdout(pair_of_edge: Array, text_of_edge: Array, num_pairs: int, fraction: float, seed: int) -> Array:
    """Marks pairs (bool, n) to hold out: whole connected components of shared texts, at most `fraction` of the pairs.

    Edge e says that pair `pair_of_edge[e]` has text `text_of_edge[e]`, as its query, its document or a hard negative.
    Two pairs that share a text are in one component, so that no text of a held-out pair stays behind. Components are
    drawn in random order by `seed`; one that no longer fits is passed over.
    """
    target = int(fraction * num_pairs)
    if target == 0:
        return np.zeros(num_pairs, dtype=bool)
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    num_nodes = num_pairs + int(text_of_edge.max()) + 1
    ones = np.ones(len(pair_of_edge), dtype=np.int8)
    edges = coo_array((ones, (pair_of_edge, text_of_edge + num_pairs)), (num_nodes, num_nodes))
    _, component_of_node = connected_components(edges.tocsr(), directed=False)
    component = component_of_node[:num_pairs]
    sizes = np.bincount(component)
    is_chosen = np.zeros(len(sizes), dtype=bool)
    total = 0
    for candidate in np.random.default_rng(seed).permutation(np.flatnonzero(sizes)):
        if total + sizes[candidate] <= target:
            total += int(sizes[candidate])
            is_chosen[candidate] = True
        if total == target:
            break
    return np.asarray(is_chosen[component])


def _edges(staged: list[Path], chosen: Array) -> tuple[Array, Array]:
    """Pair and text of each text of the chosen rows, both sides and hard negatives, numbered by hash."""
    hashes: list[pa.Array] = []
    pairs: list[Array] = []
    num_pairs = 0
    for batch in _chosen_batches(staged, chosen, ["query_hash", "document_hash", "negative_hashes"]):
        numbers = np.arange(num_pairs, num_pairs + batch.num_rows)
        num_pairs += batch.num_rows
        num_negatives = pc.list_value_length(batch["negative_hashes"]).to_numpy()
        hashes += [batch["query_hash"], batch["document_hash"], batch["negative_hashes"].flatten()]
        pairs += [numbers, numbers, np.repeat(numbers, num_negatives)]
    return np.concatenate([np.zeros(0, dtype=np.int64), *pairs]), _codes(pa.chunked_array(hashes, pa.binary(16)))


def _codes(values: pa.ChunkedArray) -> Array:
    """A number for each distinct value (int64), in order of first appearance."""
    codes = pc.dictionary_encode(values.combine_chunks()).indices
    return np.asarray(codes.to_numpy(), dtype=np.int64)


def _number(codes: Array) -> tuple[Array, Array]:
    """Renumbers codes in order of first appearance; also marks each first appearance (bool)."""
    numbers = _codes(pa.chunked_array([codes]))
    is_first = np.ones(len(numbers), dtype=bool)
    is_first[1:] = numbers[1:] > np.maximum.accumulate(numbers)[:-1]
    return numbers, is_first


def _is_repeat(query_codes: Array, document_codes: Array) -> Array:
    width = int(document_codes.max(initial=0)) + 1
    _, is_first = _number(query_codes * width + document_codes)
    return ~is_first


def _number_documents(staged: list[Path], kept: Array) -> tuple[Array, Array, Array]:
    """Rows of the document side: of each kept pair its document, then its hard negatives.

    Returns offsets (n+1) into the flat rows, the flat rows, the flat marks of first appearance.
    """
    flat: list[pa.Array] = []
    lengths = [np.zeros(0, dtype=np.int64)]
    for batch in _chosen_batches(staged, kept, ["document_hash", "negative_hashes"]):
        num_negatives = pc.list_value_length(batch["negative_hashes"]).to_numpy().astype(np.int64)
        lengths.append(num_negatives + 1)
        starts = np.concatenate([[0], np.cumsum(num_negatives + 1)])
        order = np.empty(starts[-1], dtype=np.int64)
        order[starts[:-1]] = np.arange(batch.num_rows)
        is_negative = np.ones(starts[-1], dtype=bool)
        is_negative[starts[:-1]] = False
        order[is_negative] = batch.num_rows + np.arange(int(num_negatives.sum()))
        flat.append(
            pa.concat_arrays([batch["document_hash"], batch["negative_hashes"].flatten()]).take(pa.array(order))
        )
    rows, is_first = _number(_codes(pa.chunked_array(flat, pa.binary(16))))
    return np.concatenate([[0], np.cumsum(np.concatenate(lengths))]), rows, is_first


def _negative_lists(offsets: Array, rows: Array) -> pa.Array:
    is_negative = np.ones(len(rows), dtype=bool)
    is_negative[offsets[:-1]] = False
    starts = offsets - np.arange(len(offsets))
    return pa.ListArray.from_arrays(pa.array(starts, pa.int32()), pa.array(rows[is_negative]))


def _chosen_batches(staged: list[Path], chosen: Array, columns: list[str]) -> Iterator[pa.RecordBatch]:
    position = 0
    for file in staged:
        for batch in pq.ParquetFile(file).iter_batches(batch_size=STAGED_ROWS, columns=columns):
            yield batch.filter(pa.array(chosen[position : position + batch.num_rows]))
            position += batch.num_rows


def _texts(staged: list[Path], kept: Array, is_first: Array, columns: list[str]) -> Iterator[str]:
    """Distinct texts of one side in order of first appearance."""
    place = 0
    for batch in _chosen_batches(staged, kept, columns):
        for row in batch.to_pylist():
            for text in [row[columns[0]], *(row[columns[1]] if len(columns) > 1 else [])]:
                if is_first[place]:
                    yield text
                place += 1


def _write_texts(writer: UnitWriter, side: str, num_texts: int, texts: Iterator[str]) -> None:
    for number, start in enumerate(range(0, num_texts, schemas.TEXT_ROWS_PER_FILE)):
        rows = min(schemas.TEXT_ROWS_PER_FILE, num_texts - start)
        path = writer.add_file(f"texts/{side}-{number:05d}.arrow", rows=rows)
        column = pa.array([next(texts) for _ in range(rows)], pa.large_utf8())
        with pa.ipc.new_file(path, schemas.TEXTS) as file:
            file.write_batch(pa.record_batch([column], schema=schemas.TEXTS))


def _write_quarantine(writer: UnitWriter, quarantined: list[Path], duplicates: pa.Table) -> None:
    rows = duplicates.select(["source_file", "source_row"]).append_column(
        "reason", pa.repeat("duplicate_pair", len(duplicates))
    )
    rows = rows.append_column("detail", pa.repeat("", len(rows))).cast(schemas.QUARANTINE)
    table = pa.concat_tables([*(pq.read_table(file) for file in quarantined), rows])
    table = table.sort_by([("source_file", "ascending"), ("source_row", "ascending")])
    pq.write_table(table, writer.add_file("quarantine.parquet", rows=len(table)), compression="zstd")


def _write_holdout(
    writer: UnitWriter,
    staged: list[Path],
    held_out: Array,
    query_codes: Array,
    document_codes: Array,
) -> None:
    """The held-out pairs as an evaluation folder: corpus, queries, qrels."""
    queries, is_first_query = _number(query_codes[held_out])
    documents, is_first_document = _number(document_codes[held_out])
    tables = {
        "corpus": pa.table(
            {
                "doc_id": [f"d{row}" for row in range(int(is_first_document.sum()))],
                "text": list(_texts(staged, held_out, is_first_document, ["document"])),
                "title": [""] * int(is_first_document.sum()),
            },
            schema=schemas.HOLDOUT_CORPUS,
        ),
        "queries": pa.table(
            {
                "query_id": [f"q{row}" for row in range(int(is_first_query.sum()))],
                "text": list(_texts(staged, held_out, is_first_query, ["query"])),
            },
            schema=schemas.HOLDOUT_QUERIES,
        ),
        "qrels": pa.table(
            {
                "query_id": [f"q{row}" for row in queries],
                "doc_id": [f"d{row}" for row in documents],
                "score": np.ones(len(queries), dtype=np.int32),
            },
            schema=schemas.HOLDOUT_QRELS,
        ),
    }
    for name, table in tables.items():
        path = writer.add_file(f"holdout/{name}.parquet", rows=len(table))
        pq.write_table(table, path, compression="zstd")


def _final_counts(counts: Counter[str], fate: Array, num_queries: int, num_documents: int) -> dict[str, Any]:
    totals = ("rows", "texts_cut", "negatives", "negatives_dropped", "holdout_target")
    quarantined = {reason: count for reason, count in sorted(counts.items()) if reason not in totals and count}
    num_kept, num_held_out = int((fate == _KEPT).sum()), int((fate == _HELD_OUT).sum())
    assert counts["rows"] == num_kept + num_held_out + sum(quarantined.values()), "a row is unaccounted for"
    return {
        **{name: counts[name] for name in totals},
        "pairs": num_kept,
        "held_out": num_held_out,
        "quarantined": quarantined,
        "queries": num_queries,
        "documents": num_documents,
    }
