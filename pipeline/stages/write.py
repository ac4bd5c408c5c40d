"""write: batches → shards. One row group is one batch, one row is one slot; texts, prompts and masks inside.

A slot is masked for a query if its document answers the query for certain (`positive_slots`), or if it
is likely to (`equivalent_slots` has both).

A unit is a part file of at most 1,024 batches of one domain and one packing. Packings come one after the other, and
within each packing its domains. Next to `data/` are `index.parquet` (a row per batch: the byte ranges of its row group
and of that group's record in the footer, with digests of both), the manifest and the data card.

Shape letters: B slots of a batch, D dimension.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from hardbatch.pipeline import schemas
from hardbatch.pipeline.arrays import Array
from hardbatch.pipeline.artifacts.artifact import read_artifact
from hardbatch.pipeline.artifacts.commit import ArtifactBuilder, write_unit
from hardbatch.pipeline.artifacts.files import sha256_outside
from hardbatch.pipeline.artifacts.footer import record_ranges, row_group_ranges
from hardbatch.pipeline.artifacts.vectors import ExtraRows
from hardbatch.pipeline.batching.equivalence import LikelyRule, keeps_unlikely, likely_answers, repeats_query
from hardbatch.pipeline.batching.hardness import BatchHardness, measure_batch
from hardbatch.pipeline.batching.negatives import BatchNegatives, count_negatives
from hardbatch.pipeline.sources.extra import joined_schema
from hardbatch.pipeline.stages.card import data_card
from hardbatch.pipeline.stages.slots import OpenDomain, Packing, Slots, gather_slots, read_packing
from hardbatch.pipeline.stages.summary import count_packings, read_packed, refuse_empty, summarise
from hardbatch.pipeline.stages.warnings import corpus_warnings
from hardbatch.pipeline.step import Executor, Progress, StageResult, Step, Unit, run_pending

# Only texts are compressed: packed integers do not shrink further, and setting up zstd takes longer than reading them.
_TEXTS = ("query", "document", "negatives.list.element")
_INTEGERS = (
    "batch_id", "slot", "pair_id", "cluster_id", "query_id", "document_id", "positive_slots.list.element",
    "equivalent_slots.list.element",
)  # fmt: skip
_NEGATIVE_COUNTS = (
    "negatives_kept", "negatives_removed_known", "negatives_removed_equivalent", "negatives_removed_no_vector",
    "negatives_removed_held_out",
)  # fmt: skip


def build(step: Step, builder: ArtifactBuilder, executor: Executor, progress: Progress) -> StageResult:
    """Builds the `shards` artifact of a corpus; see `docs/artifacts.md` for its files.

    Raises:
        InputError: No domain fills a batch.
    """
    domains, datasets = step.config["domains"], step.config["datasets"]
    mixed = [schemas.MIXED_DOMAIN] if f"batches/{schemas.MIXED_DOMAIN}" in step.inputs else []
    packed = {domain: read_packed(step.inputs[f"batches/{domain}"]) for domain in [*domains, *mixed]}
    if not any(counts.batches for counts in packed.values()):
        refuse_empty(step, packed)

    # What is left over of several domains is mixed without regard to groups.
    group_sizes = dict.fromkeys(packed, step.config["group_size"])
    if step.config["compose"] == "domain":
        group_sizes[schemas.MIXED_DOMAIN] = 1

    pairs = {domain: read_artifact(step.inputs[f"pairs/{domain}"]) for domain in domains}
    extra = joined_schema({domain: ExtraRows(artifact).schema for domain, artifact in pairs.items()})
    work = _Writing(
        path=builder.path,
        inputs=step.inputs,
        datasets=datasets,
        rule=LikelyRule(**{field.name: step.config[field.name] for field in fields(LikelyRule)}),
        floor_quantile=step.config["floor_quantile"],
        batch_size=step.config["batch_size"],
        group_sizes=group_sizes,
        num_batches={domain: counts.batches for domain, counts in packed.items()},
        with_negatives=any(artifact.manifest.counts["negatives"] for artifact in pairs.values()),
        extra=extra,
    )
    units = _units(work.num_batches, count_packings(packed), step.config["batches_per_part"])
    names = run_pending(builder, executor, work, units, progress, "write shards")

    index = pa.concat_tables([pq.read_table(_index_piece(builder.path, name)) for name in names])
    counts = [builder.unit_record(name).counts for name in names]
    query_texts = Counter[str]()
    for unit, of_unit in zip(units, counts, strict=True):
        query_texts[unit.group] += of_unit["masked_query_texts"]
    by_domain = {domain: _hard_negatives(domain, units, counts) for domain in packed if work.with_negatives}
    queries_by_masked = _queries_by_masked(units, counts, work.batch_size)
    summary = summarise(step, index, packed, queries_by_masked, query_texts, by_domain)
    negatives = {name: sum(of_unit[name] for of_unit in counts) for name in _NEGATIVE_COUNTS}
    with write_unit(builder.path, "index") as writer:
        pq.write_table(index, writer.add_file("index.parquet", rows=len(index)), compression="zstd")
        licences = {domain: dataset["licence"] for domain, dataset in datasets.items()}
        card = data_card(step.domain, step.key, licences, summary, work.schema.names, extra)
        writer.add_file("README.md").write_text(card, encoding="utf-8")
    return StageResult(units=[*names, "index"], counts=summary.counts() | negatives, warnings=corpus_warnings(summary))


def _hard_negatives(domain: str, units: list[Unit], counts: list[dict[str, Any]]) -> dict[str, int]:
    """What became of the hard negatives in the slots of a domain's batches."""
    of_domain = [of_unit for unit, of_unit in zip(units, counts, strict=True) if unit.group == domain]
    return {name: sum(of_unit[name] for of_unit in of_domain) for name in _NEGATIVE_COUNTS}


def _queries_by_masked(units: list[Unit], counts: list[dict[str, Any]], batch_size: int) -> dict[str, Array]:
    """By domain, the number of queries that have 0, 1, ..., B−1 masked slots."""
    found: dict[str, Array] = {}
    for unit, of_unit in zip(units, counts, strict=True):
        numbers_B = found.setdefault(unit.group, np.zeros(batch_size, dtype=np.int64))
        for num_masked, num_queries in of_unit["queries_by_masked"].items():
            numbers_B[int(num_masked)] += num_queries
    return found


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
    rule: LikelyRule
    floor_quantile: float
    batch_size: int
    group_sizes: dict[str, int]
    num_batches: dict[str, int]  # of each packing, by domain, in the order of the batch ids
    with_negatives: bool
    extra: pa.Schema

    @property
    def schema(self) -> pa.Schema:
        """The columns of the part files, in their order; a column without any value holds text."""
        schema = schemas.SHARDS_WITH_NEGATIVES if self.with_negatives else schemas.SHARDS
        if self.with_negatives and len(self.extra):
            schema = schema.insert(schema.get_field_index("negatives") + 1, schemas.NEGATIVE_PLACES)
        for field in self.extra:
            schema = schema.append(_without_null(field))
        return schema

    def open(self) -> _WritingWorker:
        return _WritingWorker(self)

    def open_domain(self, name: str) -> OpenDomain:
        dataset = self.datasets[name]
        prompts = dataset["query_prompt"], dataset["document_prompt"]
        return OpenDomain(name, self.inputs, *prompts, self.floor_quantile)

    def read_packing(self, domain: str, number: int) -> Packing:
        return read_packing(self.inputs[f"batches/{domain}"], domain, number, self.batch_size)

    def locate(self, unit: Unit) -> tuple[int, int, int]:
        """The packing of a unit's first batch, the batch's number in that packing and domain, and its batch id."""
        packing, number = divmod(unit.start, self.num_batches[unit.group])
        domains = list(self.num_batches)
        before = sum(self.num_batches[domain] for domain in domains[: domains.index(unit.group)])
        return packing, number, packing * sum(self.num_batches.values()) + before + number


@dataclass(frozen=True, kw_only=True)
class _BatchFigures:
    hardness: BatchHardness
    negatives: BatchNegatives


class _WritingWorker:
    def __init__(self, work: _Writing) -> None:
        self._work = work
        self._schema = work.schema
        self._compressed = [*_TEXTS, *filter(None, (_text_leaf(self._schema.field(name)) for name in work.extra.names))]
        self._group = ""
        self._domain = lru_cache(maxsize=len(work.datasets))(work.open_domain)
        self._packing = lru_cache(maxsize=1)(work.read_packing)

    def prepare(self, unit: Unit) -> None:
        return None

    def commit(self, unit: Unit, prepared: None) -> None:
        # Domains come one after the other, so one is held at a time. Mixed batches need them all.
        if unit.group not in (self._group, schemas.MIXED_DOMAIN):
            self._domain.cache_clear()
            self._group = unit.group

        packing, first, first_batch_id = self._work.locate(unit)
        batches = self._packing(unit.group, packing)
        num_batches = unit.stop - unit.start
        name = f"data/{unit.name}.parquet"
        with write_unit(self._work.path, unit.name) as writer:
            path = writer.add_file(name, rows=num_batches * self._work.batch_size)
            counts, masked = Counter[str](), Counter[int]()
            measured = []
            with pq.ParquetWriter(
                path,
                self._schema,
                compression=dict.fromkeys(self._compressed, "zstd"),
                column_encoding=dict.fromkeys(_INTEGERS, "DELTA_BINARY_PACKED"),
                use_dictionary=["domain", "query_prompt", "document_prompt"],
                write_statistics=["batch_id", "pair_id"],
            ) as parquet:
                for i in range(num_batches):
                    table, figures = self._batch(first_batch_id + i, batches, first + i, counts)
                    parquet.write_table(table, row_group_size=len(table))
                    measured.append(figures)
                    masked.update(pc.list_value_length(table["equivalent_slots"]).to_pylist())
            shared = {"packing": packing, "domain": unit.group, "file": name}
            index = _index(path, first_batch_id, measured, shared)
            piece = writer.add_file(_index_piece(Path(), unit.name).as_posix(), rows=num_batches)
            pq.write_table(index, piece, compression="zstd")
            writer.counts = {name: counts[name] for name in (*_NEGATIVE_COUNTS, "masked_query_texts")}
            writer.counts["queries_by_masked"] = {str(number): masked[number] for number in sorted(masked)}

    def _batch(
        self, batch_id: int, packing: Packing, number: int, counts: Counter[str]
    ) -> tuple[pa.Table, _BatchFigures]:
        """The rows of one batch and its figures; adds to `counts` what became of its hard negatives.

        It also counts the slots that are masked only because their document is the text of the query.
        """
        parts = [(self._domain(name), slots) for name, slots in packing.slots_by_domain(number)]
        slots = gather_slots(packing.pair_id_MB[number], packing.cluster_id_MB[number], parts)
        certain_BB = slots.same_answer_BB
        likely = likely_answers(
            slots.surrogate_queries_BD, slots.surrogate_documents_BD, self._work.rule, slots.floor_B, certain_BB
        )
        repeats_BB = repeats_query(slots.query.tolist(), slots.document.tolist()) & ~certain_BB
        np.fill_diagonal(repeats_BB, False)
        counts["masked_query_texts"] += int(repeats_BB.sum())
        mask_BB = certain_BB | likely.mask_BB | repeats_BB

        columns = vars(slots) | {
            "batch_id": np.full(self._work.batch_size, batch_id),
            "slot": np.arange(self._work.batch_size, dtype=np.int32),
            "positive_slots": _slot_lists(certain_BB),
            "equivalent_slots": _slot_lists(mask_BB),
        }
        # Slots of a domain without an extra column keep null there.
        optional = ("negatives", "negative_places", *self._work.extra.names)
        columns |= {name: [None] * self._work.batch_size for name in optional}
        for domain, at in parts:
            for name, values in domain.extra.take(slots.pair_id[at]).items():
                for slot, value in zip(at, values, strict=True):
                    columns[name][slot] = value
            for slot in at if self._work.with_negatives else ():
                columns["negatives"][slot], kept = self._negatives(slots, slot, domain, counts)
                if domain.pairs.negative_places is not None:
                    places = domain.pairs.places_of(slots.pair_id[slot])[kept]
                    columns["negative_places"][slot] = [None if place < 0 else place for place in places.tolist()]
        table = pa.table({name: columns[name] for name in self._schema.names}, schema=self._schema)

        hardness = measure_batch(
            slots.queries_BD,
            slots.documents_BD,
            mask_BB,
            slots.surrogate_queries_BD,
            slots.surrogate_documents_BD,
            group_size=self._work.group_sizes[packing.domain],
        )
        return table, _BatchFigures(hardness=hardness, negatives=count_negatives(mask_BB, certain_BB))

    def _negatives(self, slots: Slots, slot: int, domain: OpenDomain, counts: Counter[str]) -> tuple[list[str], Array]:
        """The hard negatives of a slot, without those that answer its query, or are likely to.

        Those that another domain holds out are left out too.

        Returns:
            Their texts, and their numbers among all hard negatives of the pair.
        """
        rows = domain.pairs.negatives_of(slots.pair_id[slot])
        numbers = np.arange(len(rows))
        if len(rows) == 0:
            return [], numbers
        is_held_out = np.isin(rows, domain.leaking_documents)
        counts["negatives_removed_held_out"] += int(is_held_out.sum())
        rows, numbers = rows[~is_held_out], numbers[~is_held_out]

        has_vector = domain.surrogate.has_document[rows]
        counts["negatives_removed_no_vector"] += int((~has_vector).sum())
        rows, numbers = rows[has_vector], numbers[has_vector]

        is_known = domain.answers(slots.query_id[slot], rows)
        counts["negatives_removed_known"] += int(is_known.sum())
        rows, numbers = rows[~is_known], numbers[~is_known]

        query_D, document_D = slots.surrogate_queries_BD[slot], slots.surrogate_documents_BD[slot]
        vectors = domain.surrogate.documents.take(rows)
        keeps = keeps_unlikely(query_D, document_D, vectors, self._work.rule, domain.floor)
        texts = np.array(domain.documents.take(rows), dtype=object)
        keeps &= ~repeats_query([slots.query[slot]], texts.tolist())[0]
        counts["negatives_removed_equivalent"] += int((~keeps).sum())
        counts["negatives_kept"] += int(keeps.sum())
        return list(texts[keeps]), numbers[keeps]


def _without_null(field: pa.Field) -> pa.Field:
    """A field that Parquet and its readers know a type of: without any value, text."""
    if pa.types.is_null(field.type):
        return field.with_type(pa.large_utf8())
    is_empty = pa.types.is_list(field.type) and pa.types.is_null(field.type.value_type)
    return field.with_type(pa.list_(pa.large_utf8())) if is_empty else field


def _text_leaf(field: pa.Field) -> str | None:
    """The path of the texts of a column in a Parquet file, or None if it has none."""
    if pa.types.is_list(field.type):
        return f"{field.name}.list.element" if pa.types.is_large_string(field.type.value_type) else None
    return str(field.name) if pa.types.is_large_string(field.type) else None


def _slot_lists(mask_BB: Array) -> pa.ListArray:
    """The marked slots of each row, as a list of u16."""
    offsets = np.concatenate([[0], mask_BB.sum(1).cumsum()]).astype(np.int32)
    return pa.ListArray.from_arrays(offsets, mask_BB.nonzero()[1].astype(np.uint16))


def _index_piece(path: Path, unit: str) -> Path:
    return path / "units" / f"{unit}.index.parquet"


def _index(path: Path, first_batch_id: int, measured: list[_BatchFigures], shared: dict[str, Any]) -> pa.Table:
    """The rows of the index for the part file at `path`; `shared` holds the columns that are equal in all of them."""
    ranges = row_group_ranges(path)
    footer_sha256 = sha256_outside(path, ranges)
    rows = []
    with path.open("rb") as file:
        for group, ((offset, length), record) in enumerate(zip(ranges, record_ranges(path), strict=True)):
            file.seek(offset)
            rows.append(
                {
                    **shared,
                    "batch_id": first_batch_id + group,
                    "row_group": group,
                    "byte_offset": offset,
                    "byte_length": length,
                    "sha256": hashlib.sha256(file.read(length)).hexdigest(),
                    "footer_sha256": footer_sha256,
                    "record_offset": record[0],
                    "record_length": record[1],
                    **vars(measured[group].hardness),
                    **vars(measured[group].negatives),
                }
            )
    return pa.Table.from_pylist(rows, schemas.INDEX)
