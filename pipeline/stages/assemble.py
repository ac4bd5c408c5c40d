"""The second half of ingest: staged units → pairs, numbered texts, quarantine, holdout.

Works on hashes and numbers, 700 to 780 bytes a pair. The texts stream through once more, 65,536 in memory at a time.
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
    """Joins the staged files of a domain into the unit `assembled`, whose counts account for every row.

    Of equal pairs the first one stays.

    Args:
        path: The `pairs` artifact to write to.
        staged: Files of the rows that staging kept.
        quarantined: Files of the rows that it did not keep.
        counts: What staging counted; is added to.
        holdout: Fraction of the pairs to hold out.
        holdout_seed: Draws them.
    """
    columns = ["source_file", "source_row", "query_hash", "document_hash"]
    numbers = pa.concat_tables([pq.read_table(file, columns=columns) for file in staged])
    query_codes, document_codes = _codes(numbers["query_hash"]), _codes(numbers["document_hash"])

    # The fate of each staged row: a repeated pair is a duplicate, and of the others some are held out.
    fate = np.full(len(numbers), _KEPT, dtype=np.int8)
    fate[_is_repeat(query_codes, document_codes)] = _DUPLICATE
    candidates = np.flatnonzero(fate == _KEPT)
    counts["duplicate_pair"] = len(numbers) - len(candidates)
    counts["holdout_target"] = int(holdout * len(candidates))
    if holdout > 0:
        pair_of_edge, text_of_edge = _edges(staged, fate == _KEPT)
        held_out = cut_holdout(pair_of_edge, text_of_edge, len(candidates), holdout, holdout_seed)
        fate[candidates[held_out]] = _HELD_OUT

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
            "document_row": document_rows[offsets[:-1]],
            "source_file": numbers["source_file"].to_numpy()[kept],
            "source_row": numbers["source_row"].to_numpy()[kept],
        }
        schema = schemas.PAIRS
        if counts["negatives"]:
            schema = schemas.PAIRS_WITH_NEGATIVES
            pairs["negative_rows"] = _negative_lists(offsets, document_rows)
        _write_table(writer, "pairs.parquet", pa.table(pairs, schema=schema))
        _write_quarantine(writer, quarantined, numbers.filter(pa.array(fate == _DUPLICATE)))
        if holdout > 0:
            _write_holdout(writer, staged, fate == _HELD_OUT, query_codes, document_codes)
        writer.counts = _final_counts(counts, fate, num_queries, num_documents)


def cut_holdout(pair_of_edge: Array, text_of_edge: Array, num_pairs: int, fraction: float, seed: int) -> Array:
    """Chooses the pairs to hold out: whole connected components of pairs that share texts.

    Two pairs that share a text are in one component, so no text of a held-out pair stays behind. Components are drawn
    in random order; one that no longer fits is passed over.

    Args:
        pair_of_edge: Edge e says that this pair ...
        text_of_edge: ... has this text, as its query, its document or a hard negative.
        num_pairs: Number of pairs n.
        fraction: At most this fraction of the pairs is held out.
        seed: Draws the components.

    Returns:
        Whether each pair is held out (bool, n).
    """
    target = int(fraction * num_pairs)
    if target == 0:
        return np.zeros(num_pairs, dtype=bool)
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    # A graph of pairs and texts: the first `num_pairs` nodes are the pairs, those behind them the texts.
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
    """The edges for `cut_holdout`: the chosen rows with their texts of both sides and their hard negatives."""
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
    """Numbers the distinct values (int64) in order of first appearance."""
    codes = pc.dictionary_encode(values.combine_chunks()).indices
    return np.asarray(codes.to_numpy(), dtype=np.int64)


def _number(codes: Array) -> tuple[Array, Array]:
    """Renumbers codes in order of first appearance; also says which elements are first appearances (bool)."""
    numbers = _codes(pa.chunked_array([codes]))
    is_first = np.ones(len(numbers), dtype=bool)
    is_first[1:] = numbers[1:] > np.maximum.accumulate(numbers)[:-1]
    return numbers, is_first


def _is_repeat(query_codes: Array, document_codes: Array) -> Array:
    width = int(document_codes.max(initial=0)) + 1
    _, is_first = _number(query_codes * width + document_codes)
    return ~is_first


def _number_documents(staged: list[Path], kept: Array) -> tuple[Array, Array, Array]:
    """Numbers the texts of the document side, in flat order: of each kept pair its document, then its hard negatives.

        pairs     (document a, negatives b c)   (document d, none)   (document b, negatives a)
        flat       a b c                         d                    b a
        offsets    0                             3                    4                         6
        rows       0 1 2                         3                    1 0

    Returns:
        The offsets of the pairs (int64, n + 1), and by flat position the row of the text and whether it appears there
        for the first time.
    """
    flat: list[pa.Array] = []
    lengths = [np.zeros(1, dtype=np.int64)]
    for batch in _chosen_batches(staged, kept, ["document_hash", "negative_hashes"]):
        num_negatives = pc.list_value_length(batch["negative_hashes"]).to_numpy().astype(np.int64)
        lengths.append(num_negatives + 1)

        # A stable sort by pair moves the negatives, which are all behind the documents, behind their own one.
        pairs = np.arange(batch.num_rows)
        order = np.argsort(np.concatenate([pairs, np.repeat(pairs, num_negatives)]), kind="stable")
        hashes = pa.concat_arrays([batch["document_hash"], batch["negative_hashes"].flatten()])
        flat.append(hashes.take(pa.array(order)))
    rows, is_first = _number(_codes(pa.chunked_array(flat, pa.binary(16))))
    return np.cumsum(np.concatenate(lengths)), rows, is_first


def _negative_lists(offsets: Array, rows: Array) -> pa.Array:
    """The flat rows without those of the documents, as a list per pair."""
    negatives = np.delete(rows, offsets[:-1])
    return pa.ListArray.from_arrays(pa.array(offsets - np.arange(len(offsets)), pa.int32()), pa.array(negatives))


def _chosen_batches(staged: list[Path], chosen: Array, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """The chosen rows (bool, over all files) of the staged files."""
    position = 0
    for file in staged:
        for batch in pq.ParquetFile(file).iter_batches(batch_size=STAGED_ROWS, columns=columns):
            yield batch.filter(pa.array(chosen[position : position + batch.num_rows]))
            position += batch.num_rows


def _texts(staged: list[Path], kept: Array, is_first: Array, columns: list[str]) -> Iterator[str]:
    """The distinct texts of one side, in order of first appearance."""
    marks = iter(is_first)
    for batch in _chosen_batches(staged, kept, columns):
        for row in batch.to_pylist():
            texts = [row[columns[0]], *(row[columns[1]] if len(columns) > 1 else [])]
            yield from (text for text in texts if next(marks))


def _write_texts(writer: UnitWriter, side: str, num_texts: int, texts: Iterator[str]) -> None:
    for number, start in enumerate(range(0, num_texts, schemas.TEXT_ROWS_PER_FILE)):
        rows = min(schemas.TEXT_ROWS_PER_FILE, num_texts - start)
        path = writer.add_file(f"texts/{side}-{number:05d}.arrow", rows=rows)
        column = pa.array([next(texts) for _ in range(rows)], pa.large_utf8())
        with pa.ipc.new_file(path, schemas.TEXTS) as file:
            file.write_batch(pa.record_batch([column], schema=schemas.TEXTS))


def _write_table(writer: UnitWriter, name: str, table: pa.Table) -> None:
    pq.write_table(table, writer.add_file(name, rows=len(table)), compression="zstd")


def _write_quarantine(writer: UnitWriter, quarantined: list[Path], duplicates: pa.Table) -> None:
    rows = {
        "source_file": duplicates["source_file"],
        "source_row": duplicates["source_row"],
        "reason": pa.repeat("duplicate_pair", len(duplicates)),
        "detail": pa.repeat("", len(duplicates)),
    }
    table = pa.concat_tables([*(pq.read_table(file) for file in quarantined), pa.table(rows, schemas.QUARANTINE)])
    table = table.sort_by([("source_file", "ascending"), ("source_row", "ascending")])
    _write_table(writer, "quarantine.parquet", table)


def _write_holdout(
    writer: UnitWriter, staged: list[Path], held_out: Array, query_codes: Array, document_codes: Array
) -> None:
    """Writes the held-out pairs as an evaluation folder: corpus, queries, qrels."""
    queries, is_first_query = _number(query_codes[held_out])
    documents, is_first_document = _number(document_codes[held_out])
    texts = list(_texts(staged, held_out, is_first_document, ["document"]))
    corpus = {"doc_id": [f"d{row}" for row in range(len(texts))], "text": texts, "title": [""] * len(texts)}
    _write_table(writer, "holdout/corpus.parquet", pa.table(corpus, schemas.HOLDOUT_CORPUS))

    texts = list(_texts(staged, held_out, is_first_query, ["query"]))
    asked = {"query_id": [f"q{row}" for row in range(len(texts))], "text": texts}
    _write_table(writer, "holdout/queries.parquet", pa.table(asked, schemas.HOLDOUT_QUERIES))

    qrels = {
        "query_id": [f"q{row}" for row in queries],
        "doc_id": [f"d{row}" for row in documents],
        "score": np.ones(len(queries), dtype=np.int32),
    }
    _write_table(writer, "holdout/qrels.parquet", pa.table(qrels, schemas.HOLDOUT_QRELS))


def _final_counts(counts: Counter[str], fate: Array, num_queries: int, num_documents: int) -> dict[str, Any]:
    """The counts of the artifact; what staging counted and is not a total is a reason of quarantine."""
    totals = ("rows", "rows_filtered", "texts_cut", "negatives", "negatives_dropped", "holdout_target")
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
