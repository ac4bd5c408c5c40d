"""write: batches → shards. One row group is one batch, one row is one slot; texts, prompts and equivalence sets inside.

A unit is a part file of at most 1,024 batches of one domain and one packing. Packings come one after the other, and
domains in each. Beside `data/` lie `index.parquet` (a row per batch: where its row group and that one's record in the
footer lie, digests of both), the manifest and the data card.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hardbatch.pipeline import schemas
from hardbatch.pipeline.arrays import Array
from hardbatch.pipeline.artifacts.artifact import read_artifact
from hardbatch.pipeline.artifacts.commit import ArtifactBuilder, write_unit
from hardbatch.pipeline.artifacts.files import sha256_outside
from hardbatch.pipeline.artifacts.footer import record_ranges, row_group_ranges
from hardbatch.pipeline.artifacts.vectors import Texts, load_pairs, open_vectors
from hardbatch.pipeline.batching.equivalence import equal_texts, keeps_negative, surrogate_mask
from hardbatch.pipeline.batching.hardness import measure_batch
from hardbatch.pipeline.stages.card import data_card
from hardbatch.pipeline.stages.summary import count_packings, refuse_empty, summarise
from hardbatch.pipeline.step import Executor, Progress, StageResult, Step, Unit, run_pending

# Only texts are compressed: to set up zstd takes longer than to read a page of packed integers, which is no larger.
_TEXTS = ("query", "document", "negatives.list.element")
_INTEGERS = (
    "batch_id",
    "slot",
    "pair_id",
    "cluster_id",
    "query_id",
    "document_id",
    "equivalent_slots.list.element",
)
_NEGATIVE_COUNTS = (
    "negatives_kept",
    "negatives_removed_known",
    "negatives_removed_equivalent",
    "negatives_removed_no_vector",
)


def build(step: Step, builder: ArtifactBuilder, executor: Executor, progress: Progress) -> StageResult:
    """Builds the `shards` artifact of a corpus. Raises InputError where no domain fills a batch."""
    domains = step.config["domains"]
    packed = [*domains, schemas.MIXED_DOMAIN] if f"batches/{schemas.MIXED_DOMAIN}" in step.inputs else domains
    counts = {domain: read_artifact(step.inputs[f"batches/{domain}"]).manifest.counts for domain in packed}
    num_batches = {domain: count["batches"] for domain, count in counts.items()}
    if sum(num_batches.values()) == 0:
        refuse_empty(step, counts)
    work = _Writing(
        path=builder.path,
        inputs=step.inputs,
        datasets=step.config["datasets"],
        margin=step.config["margin"],
        batch_size=step.config["batch_size"],
        num_batches=num_batches,
        with_negatives=any(
            read_artifact(step.inputs[f"pairs/{domain}"]).manifest.counts["negatives"] for domain in domains
        ),
    )
    units = _units(num_batches, count_packings(counts), step.config["batches_per_part"])
    names = run_pending(builder, executor, work, units, progress, "write shards")
    index = pa.concat_tables([pq.read_table(_index_piece(builder.path, name)) for name in names])
    summary = summarise(step, index, counts)
    for name in _NEGATIVE_COUNTS:
        summary[name] = sum(builder.unit_record(unit).counts[name] for unit in names)
    with write_unit(builder.path, "index") as writer:
        pq.write_table(index, writer.add_file("index.parquet", rows=len(index)), compression="zstd")
        card = data_card(step.domain, step.key, step.config["datasets"], summary, work.with_negatives)
        writer.add_file("README.md").write_text(card, encoding="utf-8")
    return StageResult(units=[*names, "index"], counts=summary)


def _units(num_batches: dict[str, int], num_packings: int, batches_per_part: int) -> list[Unit]:
    """The part files, in the order of their batches; `start` and `stop` count those of a domain over its packings."""
    units: list[Unit] = []
    for packing in range(num_packings):
        for domain, number in num_batches.items():
            end = (packing + 1) * number
            for start in range(packing * number, end, batches_per_part):
                stop = min(start + batches_per_part, end)
                units.append(Unit(name=f"part-{len(units):05d}", group=domain, start=start, stop=stop))
    return units


@dataclass(frozen=True, kw_only=True)
class _Writing:
    path: Path
    inputs: dict[str, Path]
    datasets: dict[str, dict[str, Any]]
    margin: float
    batch_size: int
    num_batches: dict[str, int]  # of each packing, by domain, in the order of the batch ids
    with_negatives: bool

    def open(self) -> _WritingWorker:
        return _WritingWorker(self)

    def place(self, unit: Unit) -> tuple[int, int, int]:
        """Of a unit's first batch: its packing, its number there, its batch id."""
        packing, number = divmod(unit.start, self.num_batches[unit.group])
        domains = list(self.num_batches)
        before = sum(self.num_batches[domain] for domain in domains[: domains.index(unit.group)])
        return packing, number, packing * sum(self.num_batches.values()) + before + number


class _Domain:
    """What writing needs of one domain, by memory map where it is large."""

    def __init__(self, inputs: dict[str, Path], domain: str) -> None:
        pairs = read_artifact(inputs[f"pairs/{domain}"])
        self.pairs = load_pairs(pairs)
        self.texts = {side: Texts(pairs, side) for side in schemas.SIDES}
        self.vectors = open_vectors(inputs[f"vectors/{domain}"])
        self.surrogate = open_vectors(inputs[f"surrogate/{domain}"])


@dataclass(frozen=True, kw_only=True)
class _Batch:
    """Columns of one batch, by slot, and the vectors of both models (B × D)."""

    columns: dict[str, Any]
    vectors: tuple[Array, Array]
    surrogate: tuple[Array, Array]


class _WritingWorker:
    def __init__(self, work: _Writing) -> None:
        self._work = work
        self._schema = schemas.SHARDS_WITH_NEGATIVES if work.with_negatives else schemas.SHARDS
        self._domain = lru_cache(maxsize=len(work.datasets))(lambda name: _Domain(work.inputs, name))
        self._group = ""
        self._batches = lru_cache(maxsize=1)(
            lambda name, packing: _read_batches(work.inputs[f"batches/{name}"], packing, work.batch_size)
        )

    def prepare(self, unit: Unit) -> None:
        return None

    def commit(self, unit: Unit, prepared: None) -> None:
        if unit.group not in (self._group, schemas.MIXED_DOMAIN):
            self._domain.cache_clear()  # domains come one after the other: hold one
            self._group = unit.group
        name = f"data/{unit.name}.parquet"
        with write_unit(self._work.path, unit.name) as writer:
            num_batches = unit.stop - unit.start
            packing, first, first_batch_id = self._work.place(unit)
            batches, domains = self._batches(unit.group, packing)
            path = writer.add_file(name, rows=num_batches * batches.shape[1])
            counts = dict.fromkeys(_NEGATIVE_COUNTS, 0)
            measured = []
            with pq.ParquetWriter(
                path,
                self._schema,
                compression=dict.fromkeys(_TEXTS, "zstd"),
                column_encoding=dict.fromkeys(_INTEGERS, "DELTA_BINARY_PACKED"),
                use_dictionary=["domain", "query_prompt", "document_prompt"],
                write_statistics=["batch_id", "pair_id"],
            ) as parquet:
                for i in range(num_batches):
                    parts = [(unit.group, np.arange(batches.shape[1]))]
                    if domains is not None:
                        found = domains[first + i]
                        parts = [(str(name), np.flatnonzero(found == name)) for name in np.unique(found)]
                    table, figures = self._batch(first_batch_id + i, batches[first + i], parts, counts)
                    parquet.write_table(table, row_group_size=len(table))
                    measured.append({"packing": packing, "domain": unit.group, **figures})
            index = _index_rows(path, name, first_batch_id, measured)
            piece = writer.add_file(_index_piece(Path(), unit.name).as_posix(), rows=num_batches)
            pq.write_table(pa.Table.from_pylist(index, schemas.INDEX), piece, compression="zstd")
            writer.counts = counts

    def _batch(
        self, batch_id: int, rows: Array, parts: list[tuple[str, Array]], counts: dict[str, int]
    ) -> tuple[pa.Table, dict[str, Any]]:
        batch, known = self._gather(rows, parts)
        queries, documents = batch.surrogate
        mask = surrogate_mask(queries, documents, margin=self._work.margin) | known
        mask |= equal_texts(batch.columns["document"])
        mask |= equal_texts(batch.columns["query"])  # across domains; within one, a known pair says the same
        np.fill_diagonal(mask, False)
        columns = batch.columns
        columns["batch_id"] = np.full(len(rows), batch_id)
        columns["slot"] = np.arange(len(rows), dtype=np.int32)
        columns["equivalent_slots"] = [np.flatnonzero(row).astype(np.uint16) for row in mask]
        if self._work.with_negatives:
            columns["negatives"] = self._negatives(rows, parts, queries, documents, counts)
        figures = measure_batch(*batch.vectors, mask, queries, documents)
        table = pa.table({name: columns[name] for name in self._schema.names}, schema=self._schema)
        return table, vars(figures)

    def _gather(self, rows: Array, parts: list[tuple[str, Array]]) -> tuple[_Batch, Array]:
        size = len(rows)
        columns: dict[str, Any] = {"cluster_id": rows["cluster_id"], "pair_id": rows["pair_id"]}
        for name in ("query", "document", "query_prompt", "document_prompt", "domain"):
            columns[name] = [""] * size
        for name in ("query_id", "document_id"):
            columns[name] = np.empty(size, dtype=np.int64)
        known = np.zeros((size, size), dtype=bool)
        found: dict[str, Array] = {}
        for name, slots in parts:
            domain: _Domain = self._domain(name)
            query_rows = domain.pairs.query_row[rows["pair_id"][slots]]
            document_rows = domain.pairs.document_row[rows["pair_id"][slots]]
            columns["query_id"][slots], columns["document_id"][slots] = query_rows, document_rows
            texts = domain.texts["queries"].take(query_rows), domain.texts["documents"].take(document_rows)
            prompts = self._work.datasets[name]
            for slot, query, document in zip(slots, *texts, strict=True):
                columns["domain"][slot] = name
                columns["query"][slot], columns["document"][slot] = query, document
                columns["query_prompt"][slot] = prompts["query_prompt"]
                columns["document_prompt"][slot] = prompts["document_prompt"]
            several = domain.pairs.documents_per_query[query_rows] > 1  # else its only document is its own
            if several.any():
                pairs_of = domain.pairs.is_known(query_rows[several][:, None], document_rows[None, :])
                known[np.ix_(slots[several], slots)] = pairs_of
            for role, vectors in (("vectors", domain.vectors), ("surrogate", domain.surrogate)):
                for side, row in (("queries", query_rows), ("documents", document_rows)):
                    into = found.setdefault(f"{role}/{side}", np.zeros((size, vectors.dimension), dtype=np.float32))
                    into[slots] = getattr(vectors, side).take(row)
        batch = _Batch(
            columns=columns,
            vectors=(found["vectors/queries"], found["vectors/documents"]),
            surrogate=(found["surrogate/queries"], found["surrogate/documents"]),
        )
        return batch, known

    def _negatives(
        self, rows: Array, parts: list[tuple[str, Array]], queries: Array, documents: Array, counts: dict[str, int]
    ) -> list[list[str]]:
        """Hard negatives of each slot, without known pairs of its query and without likely answers."""
        kept: list[list[str]] = [[] for _ in range(len(rows))]
        for name, slots in parts:
            domain: _Domain = self._domain(name)
            for slot in slots:
                pair_id = rows["pair_id"][slot]
                negative_rows = domain.pairs.negatives_of(pair_id)
                if len(negative_rows) == 0:
                    continue
                without_vector = ~domain.surrogate.has_document[negative_rows]
                counts["negatives_removed_no_vector"] += int(without_vector.sum())
                negative_rows = negative_rows[~without_vector]
                is_known = domain.pairs.is_known(domain.pairs.query_row[pair_id], negative_rows)
                counts["negatives_removed_known"] += int(is_known.sum())
                negative_rows = negative_rows[~is_known]
                vectors = domain.surrogate.documents.take(negative_rows)
                keeps = keeps_negative(queries[slot], documents[slot], vectors, margin=self._work.margin)
                counts["negatives_removed_equivalent"] += int((~keeps).sum())
                counts["negatives_kept"] += int(keeps.sum())
                kept[slot] = domain.texts["documents"].take(negative_rows[keeps])
        return kept


def _read_batches(path: Path, packing: int, batch_size: int) -> tuple[Array, Array | None]:
    """(pair_id, cluster_id) of a packing by batch and slot, and the domains where there are several."""
    read_artifact(path)
    is_mixed = path.parent.name == schemas.MIXED_DOMAIN
    columns = ["pair_id", "cluster_id", "domain"] if is_mixed else ["pair_id", "cluster_id"]
    table = pq.read_table(path / "batches.parquet", columns=columns, filters=[("packing", "==", packing)])
    rows = np.empty(len(table), dtype=[("pair_id", np.int64), ("cluster_id", np.int32)])
    rows["pair_id"], rows["cluster_id"] = table["pair_id"].to_numpy(), table["cluster_id"].to_numpy()
    domains = np.array(table["domain"].to_pylist()).reshape(-1, batch_size) if is_mixed else None
    return rows.reshape(-1, batch_size), domains


def _index_piece(path: Path, unit: str) -> Path:
    return path / "units" / f"{unit}.index.parquet"


def _index_rows(path: Path, name: str, first_batch_id: int, measured: list[dict[str, Any]]) -> list[Any]:
    ranges = row_group_ranges(path)
    footer_sha256 = sha256_outside(path, ranges)
    rows = []
    with path.open("rb") as file:
        for group, ((offset, length), record) in enumerate(zip(ranges, record_ranges(path), strict=True)):
            file.seek(offset)
            rows.append(
                {
                    "batch_id": first_batch_id + group,
                    "file": name,
                    "row_group": group,
                    "byte_offset": offset,
                    "byte_length": length,
                    "sha256": hashlib.sha256(file.read(length)).hexdigest(),
                    "footer_sha256": footer_sha256,
                    "record_offset": record[0],
                    "record_length": record[1],
                    **measured[group],
                }
            )
    return rows
