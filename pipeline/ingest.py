"""ingest: source rows → pairs, distinct texts, quarantine, and optionally a holdout.

Two phases. Staging reads the source files once, cleans each row and writes it with the hashes of its texts, a unit per
group of files. Assembly joins the units: exact duplicates and contaminated pairs go to quarantine, a holdout is cut by
connected components of shared texts, and the distinct texts of each side are numbered in order of first appearance.

Nothing is lost: rows in = pairs + quarantined + held out. Memory: staging a few thousand rows; assembly about 100
bytes for each pair (its hashes and numbers), never its texts.
"""

from __future__ import annotations

import hashlib
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import schemas
from pipeline.artifact import ArtifactBuilder, UnitWriter, write_unit
from pipeline.config import Columns
from pipeline.errors import InputError, QuarantineError
from pipeline.sources import RawRow, SourceFile, read_rows
from pipeline.step import Built, Executor, Progress, Step, Unit, run_pending

BROKEN_REASONS = (
    "null", "wrong_type", "invalid_utf8", "nul_character", "empty", "broken_json", "broken_csv", "wrong_field_count",
)  # fmt: skip
_UNIT_BYTES = 64 * 2**20
_STAGED_ROWS = 8_192
_DETAIL_CHARACTERS = 120


@dataclass(frozen=True, kw_only=True)
class CleanRow:
    """A row as it is kept, or the reason why it is not."""

    query: str = ""
    document: str = ""
    negatives: list[str] = field(default_factory=list)
    reason: str | None = None
    detail: str = ""
    num_cut: int = 0
    num_negatives_dropped: int = 0


def clean_row(raw: RawRow, max_characters: int) -> CleanRow:
    """Checks one row; texts are kept as they are, but cut at `max_characters`."""
    if raw.problem is not None:
        return CleanRow(reason=raw.problem)
    texts = []
    num_cut = 0
    for name, value in (("query", raw.query), ("document", raw.document)):
        reason = _fault(value)
        if reason is not None:
            return CleanRow(reason=reason, detail=f"{name}: {value!r:.{_DETAIL_CHARACTERS}}")
        num_cut += len(value) > max_characters
        texts.append(value[:max_characters])
    if texts[0] == texts[1]:
        return CleanRow(reason="query_equals_document", detail=texts[0][:_DETAIL_CHARACTERS])
    given = raw.negatives if isinstance(raw.negatives, list) else [] if raw.negatives is None else [raw.negatives]
    negatives = [negative[:max_characters] for negative in given if _fault(negative) is None]
    return CleanRow(
        query=texts[0],
        document=texts[1],
        negatives=negatives,
        num_cut=num_cut,
        num_negatives_dropped=len(given) - len(negatives),
    )


def build(step: Step, builder: ArtifactBuilder, executor: Executor, progress: Progress) -> Built:
    """Builds the `pairs` artifact of one domain; see `docs/artifacts.md` for its files.

    Raises InputError where the source gives no row at all, QuarantineError where more than
    `max_quarantined_fraction` of the rows are broken.
    """
    files = [
        SourceFile(source["name"], step.local[source["name"]], source["format"], source["bytes"], source["sha256"])
        for source in step.sources
    ]
    units = _staging_units(files, step.config["limit"])
    work = _Staging(
        path=builder.path,
        files=tuple(files),
        columns=Columns(**step.config["columns"]),
        limit=step.config["limit"],
        max_characters=step.config["max_characters"],
    )
    if not builder.committed("assembled"):
        run_pending(builder, executor, work, units, progress, f"ingest {step.domain}")
        counts = Counter[str]()
        for unit in units:
            counts.update(builder.unit_record(unit.name).counts)
        _refuse_if_broken(step, counts, files)
        _assemble(step, builder, units, counts)
    shutil.rmtree(builder.path / "staged", ignore_errors=True)
    for unit in units:
        (builder.path / "units" / f"{unit.name}.json").unlink(missing_ok=True)
    return Built(units=["assembled"], counts=builder.unit_record("assembled").counts)


def _fault(value: Any) -> str | None:
    if value is None:
        return "null"
    if isinstance(value, bytes):
        return "invalid_utf8"
    if not isinstance(value, str):
        return "wrong_type"
    if not value or value.isspace():
        return "empty"
    if "\0" in value:
        return "nul_character"
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return "invalid_utf8"  # lone surrogates, from JSON escapes or from bytes that were no UTF-8
    return None


def _staging_units(files: list[SourceFile], limit: int | None) -> list[Unit]:
    """Groups of files of about 64 MiB; one group where a row limit counts over all of them."""
    units: list[Unit] = []
    start = size = 0
    for i, file in enumerate(files):
        size += file.num_bytes
        if i + 1 == len(files) or (limit is None and size >= _UNIT_BYTES):
            units.append(Unit(name=f"staged-{len(units):05d}", start=start, stop=i + 1))
            start, size = i + 1, 0
    return units


@dataclass(frozen=True, kw_only=True)
class _Staging:
    """Work and worker at once: nothing is shared between units."""

    path: Path
    files: tuple[SourceFile, ...]
    columns: Columns
    limit: int | None
    max_characters: int

    def open(self) -> _Staging:
        return self

    def prepare(self, unit: Unit) -> None:
        return None

    def commit(self, unit: Unit, prepared: None) -> None:
        with write_unit(self.path, unit.name) as writer:
            counts = Counter[str]()
            rows = self._rows(unit, counts)
            staged = writer.add_file(f"staged/{unit.name}.parquet")
            quarantine = writer.add_file(f"staged/{unit.name}.quarantine.parquet")
            with (
                pq.ParquetWriter(staged, schemas.STAGED, compression="zstd", use_dictionary=False) as staged_writer,
                pq.ParquetWriter(quarantine, schemas.QUARANTINE, compression="zstd") as quarantine_writer,
            ):
                for kept, dropped in _chunks(rows):
                    staged_writer.write_table(pa.Table.from_pylist(kept, schemas.STAGED))
                    quarantine_writer.write_table(pa.Table.from_pylist(dropped, schemas.QUARANTINE))
            writer.counts = dict(counts)

    def _rows(self, unit: Unit, counts: Counter[str]) -> Iterator[tuple[dict[str, Any], bool]]:
        """(row, kept) for each source row: a row of STAGED where it is kept, of QUARANTINE where not."""
        for file_number in range(unit.start, unit.stop):
            for raw in read_rows(self.files[file_number], self.columns, self.path / "scratch"):
                if self.limit is not None and counts["rows"] >= self.limit:
                    return
                counts["rows"] += 1
                clean = clean_row(raw, self.max_characters)
                where = {"source_file": file_number, "source_row": raw.row}
                if clean.reason is not None:
                    counts[clean.reason] += 1
                    yield (
                        {**where, "reason": clean.reason, "detail": clean.detail.encode(errors="replace").decode()},
                        False,
                    )
                    continue
                counts["texts_cut"] += clean.num_cut
                counts["negatives"] += len(clean.negatives)
                counts["negatives_dropped"] += clean.num_negatives_dropped
                yield (
                    {
                        **where,
                        "query": clean.query,
                        "document": clean.document,
                        "negatives": clean.negatives,
                        "query_hash": _hash(clean.query),
                        "document_hash": _hash(clean.document),
                        "negative_hashes": [_hash(negative) for negative in clean.negatives],
                    },
                    True,
                )


def _chunks(rows: Iterable[tuple[dict[str, Any], bool]]) -> Iterator[tuple[list[Any], list[Any]]]:
    kept: list[Any] = []
    dropped: list[Any] = []
    for row, is_kept in rows:
        (kept if is_kept else dropped).append(row)
        if len(kept) + len(dropped) >= _STAGED_ROWS:
            yield kept, dropped
            kept, dropped = [], []
    yield kept, dropped


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _refuse_if_broken(step: Step, counts: Counter[str], files: list[SourceFile]) -> None:
    if counts["rows"] == 0:
        names = ", ".join(file.name for file in files[:5])
        raise InputError(f"dataset '{step.domain}': no rows in {names}; check the source, or remove the dataset")
    broken = {reason: counts[reason] for reason in BROKEN_REASONS if counts[reason]}
    allowed = step.local["max_quarantined_fraction"]
    if sum(broken.values()) > allowed * counts["rows"]:
        raise QuarantineError(
            f"dataset '{step.domain}': {sum(broken.values())} of {counts['rows']} rows are broken "
            f"({', '.join(f'{reason} {count}' for reason, count in broken.items())}), "
            f"allowed is a fraction of {allowed}; look at {step.path / 'staged'}/*.quarantine.parquet, mend the source "
            "or raise ingest.max_quarantined_fraction"
        )


def _assemble(step: Step, builder: ArtifactBuilder, units: list[Unit], counts: Counter[str]) -> None:
    staged = [builder.path / "staged" / f"{unit.name}.parquet" for unit in units]
    numbers = pa.concat_tables(
        [pq.read_table(path, columns=["source_file", "source_row", "query_hash", "document_hash"]) for path in staged]
    )
    query_codes = _codes(numbers["query_hash"])
    document_codes = _codes(numbers["document_hash"])
    fate = np.zeros(len(numbers), dtype=np.int8)  # 0 kept, 1 duplicate, 2 contaminated, 3 held out
    fate[_is_repeat(query_codes, document_codes)] = 1
    contaminated = _contaminated(numbers, step)
    fate[(fate == 0) & contaminated] = 2
    candidates = np.flatnonzero(fate == 0)
    held_out = cut_holdout(
        query_codes[candidates], document_codes[candidates], step.config["holdout"], step.config["holdout_seed"]
    )
    fate[candidates[held_out]] = 3
    counts["duplicate_pair"] = int((fate == 1).sum())
    counts["contaminated"] = int((fate == 2).sum())
    with write_unit(builder.path, "assembled") as writer:
        kept = fate == 0
        offsets, negative_rows, is_first_document, num_documents = _number_documents(staged, kept)
        query_rows, is_first_query = _number(query_codes[kept])
        num_queries = int(is_first_query.sum())
        _write_texts(writer, "queries", num_queries, _texts(staged, kept, is_first_query, ["query"]))
        documents = _texts(staged, kept, is_first_document, ["document", "negatives"])
        _write_texts(writer, "documents", num_documents, documents)
        pairs = {
            "pair_id": np.arange(int(kept.sum()), dtype=np.int64),
            "query_row": query_rows,
            "document_row": negative_rows[offsets[:-1]],  # a pair's document comes first, its negatives after it
            "source_file": numbers["source_file"].to_numpy()[kept],
            "source_row": numbers["source_row"].to_numpy()[kept],
        }
        schema = schemas.PAIRS
        if counts["negatives"]:
            schema = schemas.PAIRS_WITH_NEGATIVES
            pairs["negative_rows"] = _negative_lists(offsets, negative_rows)
        table = pa.table(pairs, schema=schema)
        pq.write_table(table, writer.add_file("pairs.parquet", rows=len(table)), compression="zstd")
        _write_quarantine(writer, builder.path, units, numbers, fate)
        if step.config["holdout"] > 0:
            _write_holdout(writer, staged, fate == 3, query_codes, document_codes)
        writer.counts = _final_counts(counts, fate, num_queries, num_documents)


def cut_holdout(
    query_codes: np.ndarray[Any, Any], document_codes: np.ndarray[Any, Any], fraction: float, seed: int
) -> np.ndarray[Any, Any]:
    """Marks pairs (bool, n) to hold out: whole connected components of shared texts, at most `fraction` of the pairs.

    Two pairs that share a query or a document are in one component, so that no text of a held-out pair stays behind.
    Components are drawn in random order by `seed`; one that no longer fits is passed over.
    """
    num_pairs = len(query_codes)
    held_out = np.zeros(num_pairs, dtype=bool)
    target = int(fraction * num_pairs)
    if target == 0:
        return held_out
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    num_queries = int(query_codes.max()) + 1
    num_nodes = num_queries + int(document_codes.max()) + 1
    edges = coo_array(
        (np.ones(num_pairs, dtype=np.int8), (query_codes, document_codes + num_queries)), (num_nodes,) * 2
    )
    _, component_of_node = connected_components(edges.tocsr(), directed=False)
    component = component_of_node[query_codes]
    sizes = np.bincount(component)
    total = 0
    for chosen in np.random.default_rng(seed).permutation(np.flatnonzero(sizes)):
        if total + sizes[chosen] <= target:
            total += int(sizes[chosen])
            held_out[component == chosen] = True
        if total == target:
            break
    return held_out


def _codes(hashes: pa.ChunkedArray) -> np.ndarray[Any, Any]:
    """A number for each distinct hash, in order of first appearance."""
    codes = pc.dictionary_encode(hashes.combine_chunks()).indices
    return np.asarray(codes.to_numpy(), dtype=np.int64)


def _number(codes: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Renumbers codes in order of first appearance; also marks each first appearance."""
    _, first, inverse = np.unique(codes, return_index=True, return_inverse=True)
    rank = np.empty(len(first), dtype=np.int64)
    rank[np.argsort(first, kind="stable")] = np.arange(len(first))
    is_first = np.zeros(len(codes), dtype=bool)
    is_first[first] = True
    return rank[inverse], is_first


def _is_repeat(query_codes: np.ndarray[Any, Any], document_codes: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    width = int(document_codes.max(initial=0)) + 1
    _, is_first = _number(query_codes * width + document_codes)
    return ~is_first


def _contaminated(numbers: pa.Table, step: Step) -> np.ndarray[Any, Any]:
    texts: set[bytes] = set()
    for folder in step.config["decontaminate"]:
        for path in sorted(Path(step.local[f"decontaminate/{folder}"]).glob("*.parquet")):
            if path.stem not in ("corpus", "queries"):
                continue
            for row in pq.read_table(path).to_pylist():
                texts.add(_hash(row["text"]))
                if row.get("title"):
                    texts.add(_hash(row["title"] + " " + row["text"]))
    if not texts:
        return np.zeros(len(numbers), dtype=bool)
    known = pa.array(sorted(texts), pa.binary(16))
    query = pc.is_in(numbers["query_hash"], value_set=known).to_numpy()
    document = pc.is_in(numbers["document_hash"], value_set=known).to_numpy()
    return np.asarray(query | document)


def _number_documents(
    staged: list[Path], kept: np.ndarray[Any, Any]
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any], int]:
    """Rows of the document side: of each kept pair its document, then its hard negatives.

    Returns offsets (n+1) into the flat rows, the flat rows, the flat marks of first appearance, the number of texts.
    """
    flat: list[pa.Array] = []
    lengths: list[np.ndarray[Any, Any]] = []
    position = 0
    for batch in _batches(staged, ["document_hash", "negative_hashes"]):
        chosen = batch.filter(pa.array(kept[position : position + batch.num_rows]))
        position += batch.num_rows
        negatives = chosen["negative_hashes"]
        num_negatives = pc.list_value_length(negatives).to_numpy().astype(np.int64)
        lengths.append(num_negatives + 1)
        starts = np.concatenate([[0], np.cumsum(num_negatives + 1)])
        order = np.empty(starts[-1], dtype=np.int64)
        order[starts[:-1]] = np.arange(chosen.num_rows)
        is_negative = np.ones(starts[-1], dtype=bool)
        is_negative[starts[:-1]] = False
        order[is_negative] = chosen.num_rows + np.arange(int(num_negatives.sum()))
        flat.append(pa.concat_arrays([chosen["document_hash"], negatives.flatten()]).take(pa.array(order)))
    rows, is_first = _number(_codes(pa.chunked_array(flat, pa.binary(16))))
    offsets = np.concatenate([[0], np.cumsum(np.concatenate(lengths))]) if lengths else np.zeros(1, dtype=np.int64)
    return offsets.astype(np.int64), rows, is_first, int(is_first.sum())


def _negative_lists(offsets: np.ndarray[Any, Any], rows: np.ndarray[Any, Any]) -> pa.Array:
    is_negative = np.ones(len(rows), dtype=bool)
    is_negative[offsets[:-1]] = False
    starts = offsets - np.arange(len(offsets))
    return pa.ListArray.from_arrays(pa.array(starts, pa.int32()), pa.array(rows[is_negative]))


def _batches(staged: list[Path], columns: list[str]) -> Iterator[pa.RecordBatch]:
    for path in staged:
        yield from pq.ParquetFile(path).iter_batches(batch_size=_STAGED_ROWS, columns=columns)


def _texts(
    staged: list[Path], kept: np.ndarray[Any, Any], is_first: np.ndarray[Any, Any], columns: list[str]
) -> Iterator[str]:
    """Distinct texts of one side in order of first appearance."""
    position = place = 0
    for batch in _batches(staged, columns):
        for row in batch.filter(pa.array(kept[position : position + batch.num_rows])).to_pylist():
            for text in [row[columns[0]], *(row[columns[1]] if len(columns) > 1 else [])]:
                if is_first[place]:
                    yield text
                place += 1
        position += batch.num_rows


def _write_texts(writer: UnitWriter, side: str, num_texts: int, texts: Iterator[str]) -> None:
    for number, start in enumerate(range(0, num_texts, schemas.TEXT_ROWS_PER_FILE)):
        rows = min(schemas.TEXT_ROWS_PER_FILE, num_texts - start)
        path = writer.add_file(f"texts/{side}-{number:05d}.arrow", rows=rows)
        column = pa.array([next(texts) for _ in range(rows)], pa.large_utf8())
        with pa.ipc.new_file(path, schemas.TEXTS) as file:
            file.write_batch(pa.record_batch([column], schema=schemas.TEXTS))


def _write_quarantine(
    writer: UnitWriter, path: Path, units: list[Unit], numbers: pa.Table, fate: np.ndarray[Any, Any]
) -> None:
    tables = [pq.read_table(path / "staged" / f"{unit.name}.quarantine.parquet") for unit in units]
    for code, reason in ((1, "duplicate_pair"), (2, "contaminated")):
        rows = numbers.select(["source_file", "source_row"]).filter(pa.array(fate == code))
        rows = rows.append_column("reason", pa.repeat(reason, len(rows)))
        tables.append(rows.append_column("detail", pa.repeat("", len(rows))).cast(schemas.QUARANTINE))
    table = pa.concat_tables(tables).sort_by([("source_file", "ascending"), ("source_row", "ascending")])
    pq.write_table(table, writer.add_file("quarantine.parquet", rows=len(table)), compression="zstd")


def _write_holdout(
    writer: UnitWriter,
    staged: list[Path],
    held_out: np.ndarray[Any, Any],
    query_codes: np.ndarray[Any, Any],
    document_codes: np.ndarray[Any, Any],
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


def _final_counts(
    counts: Counter[str], fate: np.ndarray[Any, Any], num_queries: int, num_documents: int
) -> dict[str, Any]:
    totals = ("rows", "texts_cut", "negatives", "negatives_dropped")
    quarantined = {reason: count for reason, count in sorted(counts.items()) if reason not in totals and count}
    num_kept, num_held_out = int((fate == 0).sum()), int((fate == 3).sum())
    assert counts["rows"] == num_kept + num_held_out + sum(quarantined.values()), "a row is unaccounted for"
    return {
        **{name: counts[name] for name in totals},
        "pairs": num_kept,
        "held_out": num_held_out,
        "quarantined": quarantined,
        "queries": num_queries,
        "documents": num_documents,
    }
