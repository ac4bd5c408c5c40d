"""The second half of ingest: staged units → pairs, numbered texts, quarantine, holdout.

Works on hashes and numbers, 700 to 780 bytes a pair. The texts stream through once more, 65,536 in memory at a time.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from hardbatch.pipeline import schemas
from hardbatch.pipeline.arrays import Array
from hardbatch.pipeline.artifacts.commit import UnitWriter, write_unit
from hardbatch.pipeline.batching.copies import KnownTexts
from hardbatch.pipeline.sources.extra import as_array, kind_of

STAGED_ROWS = 8_192
_LEAST_STEPS = 16  # between different texts of neighbouring rows, from which an order shows
_SORTED_SHARE = 0.95  # of those steps that go the same way in a sorted source
_KEPT, _HELD_OUT, _COPY = 0, 1, 2  # fates of a pair


@dataclass(frozen=True, kw_only=True)
class RowCounts:
    """What staging counts.

    Attributes:
        totals: Of all rows, and of what rows that are kept hold: `negatives`, `texts_cut`, `query_ids` and
            `document_ids` (texts that look like ids), and with a limit `SIDE_rises` and `SIDE_falls` (texts
            that come behind or before that of the row above, in the order of characters).
        quarantined: Rows that are not kept, by reason.
        unusable_negatives: Hard negatives that are not kept, by reason.
        rows_by_file: The rows of each file that was opened, by its number.
    """

    totals: Counter[str] = field(default_factory=Counter)
    quarantined: Counter[str] = field(default_factory=Counter)
    unusable_negatives: Counter[str] = field(default_factory=Counter)
    rows_by_file: Counter[str] = field(default_factory=Counter)

    def add(self, record: Mapping[str, Mapping[str, int]]) -> None:
        """Adds what another unit counted."""
        for name, counts in record.items():
            getattr(self, name).update(counts)

    def record(self) -> dict[str, dict[str, int]]:
        """The counts as unit records hold them."""
        return {name: dict(counts) for name, counts in vars(self).items()}


def assemble(
    path: Path,
    staged: list[Path],
    quarantined: list[Path],
    counts: RowCounts,
    *,
    file_names: list[str],
    holdout: float,
    holdout_seed: int,
    extra: pa.Schema,
) -> None:
    """Joins the staged files of a domain into the unit `assembled`, whose counts account for every row.

    Of equal pairs the first row stays, with its extra columns and the hard negatives of all of them. Pairs with
    a near-copy of a held-out text go to quarantine.

    Args:
        path: The `pairs` artifact to write to.
        staged: Files of the rows that staging kept.
        quarantined: Files of the rows that it did not keep.
        counts: What staging counted.
        file_names: The names of the source files.
        holdout: Fraction of the pairs to hold out.
        holdout_seed: Draws them.
        extra: The extra columns with their types; without any, no file is written for them.
    """
    columns = ["source_file", "source_row", "query_hash", "document_hash"]
    numbers = pa.concat_tables([pq.read_table(file, columns=columns) for file in staged])
    query_codes, document_codes = _codes(numbers["query_hash"]), _codes(numbers["document_hash"])
    pair_of_row, is_first = _number_pairs(query_codes, document_codes)

    # Repeated rows say nothing new, unless they have hard negatives.
    has_negatives = counts.totals["negatives"] > 0
    used = np.ones(len(numbers), dtype=bool) if has_negatives else is_first
    entries = _list_documents(staged, used)

    fate = np.full(int(is_first.sum()), _KEPT, dtype=np.int8)  # by pair
    is_copy = np.zeros(0, dtype=bool)
    if holdout > 0:
        pair_of_edge, text_of_edge = _edges(staged, used, pair_of_row)
        fate[cut_holdout(pair_of_edge, text_of_edge, len(fate), holdout, holdout_seed)] = _HELD_OUT

        # What is not held out shares no text with what is, but it may have near-copies.
        is_held_out = is_first & (fate == _HELD_OUT)[pair_of_row]
        is_copied, is_copy = _find_near_copies(staged, is_held_out, is_first, used, query_codes, entries)
        fate[is_copied & (fate == _KEPT)] = _COPY
    kept, held_out, copies = (is_first & (fate == what)[pair_of_row] for what in (_KEPT, _HELD_OUT, _COPY))

    with write_unit(path, "assembled") as writer:
        query_rows, is_first_query = _number(query_codes[kept])
        num_queries = int(is_first_query.sum())
        _write_texts(writer, "queries", num_queries, _texts(staged, kept, is_first_query, ["query"]))

        chosen, found = _choose_entries(entries, fate == _KEPT, pair_of_row, is_copy)
        document_rows, is_first_document = _number(entries.code[chosen])
        num_documents = int(is_first_document.sum())
        marks = np.zeros(len(chosen), dtype=bool)
        marks[chosen] = is_first_document
        _write_texts(writer, "documents", num_documents, _texts(staged, used, marks, ["document", "negatives"]))

        is_document = entries.is_document[chosen]
        pairs = {
            "pair_id": np.arange(int(kept.sum()), dtype=np.int64),
            "query_row": query_rows,
            "document_row": document_rows[is_document],
            "source_file": numbers["source_file"].to_numpy()[kept],
            "source_row": numbers["source_row"].to_numpy()[kept],
        }
        schema = schemas.PAIRS
        if has_negatives:
            schema = schemas.PAIRS_WITH_NEGATIVES
            rows = entries.row[chosen][~is_document]
            pair_id = (np.cumsum(fate == _KEPT) - 1)[pair_of_row[rows]]
            pairs["negative_rows"] = _negative_lists(pair_id, document_rows[~is_document], int(kept.sum()))
            found["negatives_joined"] = int((~is_first[rows]).sum())
            if len(extra):
                # The extra values of a repeated row are dropped, so the place of its negatives says nothing.
                places = _negative_places(staged, used)[chosen[~entries.is_document]]
                places = pa.array(places, pa.int32(), mask=~is_first[rows])
                pairs["negative_places"] = _negative_lists(pair_id, places, int(kept.sum()))
                schema = schema.append(schemas.NEGATIVE_PLACES)
        _write_table(writer, "pairs.parquet", pa.table(pairs, schema=schema))
        if len(extra):
            rows_of_kept = map(json.loads, _extra_values(staged, kept))
            _write_extra(writer, rows_of_kept, int(kept.sum()), extra)
            found["extra_empty"] = [field.name for field in extra if kind_of(field.type).endswith("null")]
            found["extra_rows_dropped"] = _count_other_values(staged, is_first, pair_of_row)

        dropped = {"duplicate_pair": ~is_first, "held_out_copy": copies}
        _write_quarantine(writer, quarantined, numbers, dropped)
        counts.quarantined.update({reason: int(rows.sum()) for reason, rows in dropped.items()})
        if holdout > 0:
            _write_holdout(writer, staged, held_out, query_codes, document_codes, num_documents)

        came_through = np.unique(numbers["source_file"].to_numpy()[kept | held_out])
        writer.counts = {
            **_final_counts(counts, int(kept.sum()), int(held_out.sum())),
            "sorted_by": [
                side
                for side, codes in (("query", query_codes), ("document", document_codes))
                if _is_sorted(counts.totals, side) or (side == "document" and _is_grouped(codes[is_first]))
            ],
            "holdout_target": int(holdout * len(fate)),
            "queries": num_queries,
            "documents": num_documents,
            "negatives": int((~is_document).sum()),
            **found,
            **_files_without_pairs(counts, came_through, file_names),
        }


def _choose_entries(
    entries: _Entries, is_kept: Array, pair_of_row: Array, is_copy: Array
) -> tuple[Array, dict[str, Any]]:
    """Chooses the texts that the document side gets, and counts the hard negatives among the others.

    Of the entries of pairs that are kept, near-copies of held-out texts (`is_copy`, by code, or empty) are
    dropped, and those that repeat a text of their pair. The documents of repeated rows are among these.
    """
    pairs = pair_of_row[entries.row]
    chosen = is_kept[pairs]
    if len(is_copy):
        chosen &= ~is_copy[entries.code]
    counts = {"negatives_left_out": int((~chosen & ~entries.is_document).sum())}
    if len(pairs) > len(is_kept):
        _, is_new = _number_pairs(pairs[chosen], entries.code[chosen])
        counts["negatives_repeated"] = int((~is_new & ~entries.is_document[chosen]).sum())
        chosen[chosen] = is_new
    return chosen, counts


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
    ones = np.ones(len(pair_of_edge), dtype=bool)
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


def _edges(staged: list[Path], used: Array, pair_of_row: Array) -> tuple[Array, Array]:
    """The edges for `cut_holdout`: pairs with their texts of both sides and their hard negatives."""
    hashes: list[pa.Array] = []
    pairs: list[Array] = []
    numbers = pair_of_row[used]
    for batch in _chosen_batches(staged, used, ["query_hash", "document_hash", "negative_hashes"]):
        of_batch, numbers = np.split(numbers, [batch.num_rows])
        num_negatives = pc.list_value_length(batch["negative_hashes"]).to_numpy()
        hashes += [batch["query_hash"], batch["document_hash"], batch["negative_hashes"].flatten()]
        pairs += [of_batch, of_batch, np.repeat(of_batch, num_negatives)]
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


def _number_pairs(first: Array, second: Array) -> tuple[Array, Array]:
    """Numbers pairs of codes as `_number` does codes."""
    return _number(first * (int(second.max(initial=0)) + 1) + second)


@dataclass(frozen=True, kw_only=True)
class _Entries:
    """The texts of the document side, in the order of the staged rows: each document, then its hard negatives.

        rows          0: document a, negatives b c    1: document d    2: document b, negatives a
        row           0 0 0                           1                2 2
        code          0 1 2                           3                1 0
        is_document   T F F                           T                T F

    Attributes:
        row: The staged row of each entry (int64).
        code: Its text, numbered by first appearance (int64).
        is_document: Whether it is the document of its row (bool).
    """

    row: Array
    code: Array
    is_document: Array


def _list_documents(staged: list[Path], used: Array) -> _Entries:
    """Lists the documents and hard negatives of the rows that are `used`."""
    flat: list[pa.Array] = []
    rows, documents = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=bool)]
    numbers = np.flatnonzero(used)
    for batch in _chosen_batches(staged, used, ["document_hash", "negative_hashes"]):
        of_batch, numbers = np.split(numbers, [batch.num_rows])
        num_negatives = pc.list_value_length(batch["negative_hashes"]).to_numpy().astype(np.int64)

        # A stable sort by row moves the negatives, which are all behind the documents, behind their own one.
        every = np.concatenate([of_batch, np.repeat(of_batch, num_negatives)])
        order = np.argsort(every, kind="stable")
        hashes = pa.concat_arrays([batch["document_hash"], batch["negative_hashes"].flatten()])
        flat.append(hashes.take(pa.array(order)))
        rows.append(every[order])
        documents.append(order < len(of_batch))
    return _Entries(
        row=np.concatenate(rows),
        code=_codes(pa.chunked_array(flat, pa.binary(16))),
        is_document=np.concatenate(documents),
    )


def _negative_lists(pair_id: Array, values: Array | pa.Array, num_pairs: int) -> pa.Array:
    """The values of hard negatives as a list per pair, in the order in which they come."""
    offsets = np.concatenate([[0], np.cumsum(np.bincount(pair_id, minlength=num_pairs))])
    order = np.argsort(pair_id, kind="stable")
    ordered = (values if isinstance(values, pa.Array) else pa.array(values)).take(pa.array(order))
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), ordered)


def _negative_places(staged: list[Path], used: Array) -> Array:
    """The place of each hard negative in the list of its row, in the order of `_Entries`."""
    batches = _chosen_batches(staged, used, ["negative_places"])
    places = [batch["negative_places"].flatten().to_numpy() for batch in batches]
    return np.concatenate([np.zeros(0, dtype=np.int32), *places])


def _extra_values(staged: list[Path], chosen: Array) -> Iterator[str]:
    """The values of the extra columns of each chosen row, as a JSON array."""
    for batch in _chosen_batches(staged, chosen, ["extra"]):
        yield from batch["extra"].to_pylist()


def _count_other_values(staged: list[Path], is_first: Array, pair_of_row: Array) -> int:
    """The number of rows that repeat a pair with other extra values than its first row has."""
    texts = _extra_values(staged, np.ones(len(is_first), dtype=bool))
    digests = (int.from_bytes(blake2b(text.encode(), digest_size=8).digest()) for text in texts)
    digest = np.fromiter(digests, dtype=np.uint64, count=len(is_first))
    return int((digest != digest[is_first][pair_of_row]).sum())


def _write_extra(writer: UnitWriter, rows: Iterator[list[Any]], num_rows: int, schema: pa.Schema) -> None:
    """Writes the extra columns of all pairs, a record batch per file; at least one file, which has the types."""
    for number, start in enumerate(range(0, max(1, num_rows), schemas.TEXT_ROWS_PER_FILE)):
        size = min(schemas.TEXT_ROWS_PER_FILE, num_rows - start)
        pieces = [schema.empty_table()]
        while len(block := list(islice(rows, min(STAGED_ROWS, size)))):
            columns = zip(*block, strict=True)
            arrays = [as_array(values, field.type) for values, field in zip(columns, schema, strict=True)]
            pieces.append(pa.table(arrays, schema=schema))
            size -= len(block)
        table = pa.concat_tables(pieces)
        path = writer.add_file(f"extra/extra-{number:05d}.arrow", rows=len(table))
        with pa.ipc.new_file(path, schema) as file:
            file.write_batch(pa.record_batch([column.combine_chunks() for column in table.columns], schema=schema))


def _find_near_copies(
    staged: list[Path], is_held_out: Array, is_first: Array, used: Array, query_codes: Array, entries: _Entries
) -> tuple[Array, Array]:
    """Finds the texts that are held out, and near-copies of these.

    Returns:
        Whether each pair has such a text as its query or its document, and whether each code of an entry is one.
    """
    known = KnownTexts()
    every = np.ones(int(is_held_out.sum()), dtype=bool)
    for column in ("query", "document"):
        known.add(_texts(staged, is_held_out, every, [column]), "held out")

    is_copy = _find_known(known, _texts(staged, used, _number(entries.code)[1], ["document", "negatives"]))
    codes, is_new = _number(query_codes[is_first])
    is_copied = _find_known(known, _texts(staged, is_first, is_new, ["query"]))[codes]
    is_copied |= is_copy[entries.code[entries.is_document & is_first[entries.row]]]
    return is_copied, is_copy


def _find_known(known: KnownTexts, texts: Iterator[str]) -> Array:
    """Whether each text is equal to a known one or a near-copy of it (bool)."""
    return np.fromiter((known.find(text) is not None for text in texts), dtype=bool)


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


def _write_quarantine(
    writer: UnitWriter, quarantined: list[Path], numbers: pa.Table, dropped: dict[str, Array]
) -> None:
    """Writes the rows that staging quarantined, and of the others those that were `dropped`, by reason."""
    tables = [pq.read_table(file) for file in quarantined]
    for reason, is_dropped in dropped.items():
        rows = numbers.filter(pa.array(is_dropped))
        columns = {name: rows[name] for name in ("source_file", "source_row")}
        columns |= {"reason": pa.repeat(reason, len(rows)), "detail": pa.repeat("", len(rows))}
        tables.append(pa.table(columns, schemas.QUARANTINE))
    table = pa.concat_tables(tables).sort_by([("source_file", "ascending"), ("source_row", "ascending")])
    _write_table(writer, "quarantine.parquet", table)


def _write_holdout(
    writer: UnitWriter,
    staged: list[Path],
    held_out: Array,
    query_codes: Array,
    document_codes: Array,
    num_documents: int,
) -> None:
    """Writes the held-out pairs as an evaluation folder: corpus, queries, qrels.

    The metadata of the corpus count the training documents, which it is searched together with.
    """
    queries, is_first_query = _number(query_codes[held_out])
    documents, is_first_document = _number(document_codes[held_out])
    texts = list(_texts(staged, held_out, is_first_document, ["document"]))
    corpus = {"doc_id": [f"d{row}" for row in range(len(texts))], "text": texts, "title": [""] * len(texts)}
    schema = schemas.HOLDOUT_CORPUS.with_metadata({"training_documents": str(num_documents)})
    _write_table(writer, "holdout/corpus.parquet", pa.table(corpus, schema))

    texts = list(_texts(staged, held_out, is_first_query, ["query"]))
    asked = {"query_id": [f"q{row}" for row in range(len(texts))], "text": texts}
    _write_table(writer, "holdout/queries.parquet", pa.table(asked, schemas.HOLDOUT_QUERIES))

    qrels = {
        "query_id": [f"q{row}" for row in queries],
        "doc_id": [f"d{row}" for row in documents],
        "score": np.ones(len(queries), dtype=np.int32),
    }
    _write_table(writer, "holdout/qrels.parquet", pa.table(qrels, schemas.HOLDOUT_QRELS))


def _final_counts(counts: RowCounts, num_kept: int, num_held_out: int) -> dict[str, Any]:
    """The counts of the artifact that follow from those of the rows."""
    totals = counts.totals
    quarantined = {reason: count for reason, count in sorted(counts.quarantined.items()) if count}
    assert totals["rows"] == num_kept + num_held_out + sum(quarantined.values()), "a row is unaccounted for"
    return {
        "rows": totals["rows"],
        "pairs": num_kept,
        "held_out": num_held_out,
        "quarantined": quarantined,
        "rows_filtered": totals["rows_filtered"],
        "texts_cut": totals["texts_cut"],
        "query_ids": totals["query_ids"],
        "document_ids": totals["document_ids"],
        "negatives_dropped": sum(counts.unusable_negatives.values()),
        "negatives_unusable": dict(sorted(counts.unusable_negatives.items())),
    }


def _is_sorted(totals: Counter[str], side: str) -> bool:
    """Whether the texts of a side come in an order of characters, up or down, with few exceptions."""
    rises, falls = totals[f"{side}_rises"], totals[f"{side}_falls"]
    return rises + falls >= _LEAST_STEPS and max(rises, falls) >= _SORTED_SHARE * (rises + falls)


def _is_grouped(codes: Array) -> bool:
    """Whether many of the texts repeat the one above, and few come again after another one."""
    num_texts, num_runs = len(np.unique(codes)), int((np.diff(codes) != 0).sum()) + 1
    return len(codes) - num_texts >= _LEAST_STEPS and num_runs * _SORTED_SHARE <= num_texts


def _files_without_pairs(counts: RowCounts, came_through: Array, names: list[str]) -> dict[str, Any]:
    """The number of files that were read, and of those that gave no pair, with the names of the first ones."""
    opened = sorted(map(int, counts.rows_by_file))
    came = set(came_through.tolist())
    without = [names[number] for number in opened if number not in came]
    return {
        "files": len(names),
        "files_read": len(opened),
        "files_without_pairs": len(without),
        "such_files": without[:3],
    }
