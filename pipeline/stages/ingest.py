"""ingest: source rows → pairs, distinct texts, quarantine, and optionally a holdout.

There are two phases. Staging reads the source files once, checks each row and writes it with the hashes of its texts,
one unit per group of files; contaminated rows go to quarantine. Assembly joins the units: exact duplicates go to
quarantine, a holdout is cut by connected components of shared texts, and the distinct texts of each side are numbered
in order of first appearance.

Nothing is lost: rows in = pairs + quarantined + held out, and a pair has the hard negatives of all rows that repeat
it. Staging holds some thousand rows in memory, assembly 700 to 780 bytes for each pair (its hashes and numbers) and
the texts of one file, never all texts.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import compress, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from hardbatch.pipeline import schemas
from hardbatch.pipeline.artifacts.artifact import find_artifact
from hardbatch.pipeline.artifacts.commit import ArtifactBuilder, write_unit
from hardbatch.pipeline.artifacts.vectors import ExtraRows
from hardbatch.pipeline.batching.copies import KnownTexts
from hardbatch.pipeline.config import Reading
from hardbatch.pipeline.errors import QuarantineError
from hardbatch.pipeline.sources.extra import extra_schema, joined_schema
from hardbatch.pipeline.sources.files import RawRow, SourceFile
from hardbatch.pipeline.sources.rows import check_dataset, evaluation_texts, read_rows
from hardbatch.pipeline.stages.assemble import STAGED_ROWS, RowCounts, assemble
from hardbatch.pipeline.step import Executor, Progress, StageResult, Step, Unit, run_pending

BROKEN_REASONS = (
    "null", "wrong_type", "invalid_utf8", "nul_character", "empty", "broken_json", "broken_csv", "wrong_field_count",
    "unknown_id",
)  # fmt: skip
_UNIT_BYTES = 64 * 2**20
_DETAIL_CHARACTERS = 120
_INVISIBLE = ("Cc", "Cf")  # control and format characters
_ID = re.compile(r"(?=.*\d)[A-Za-z0-9._:/#-]+")  # with a digit and without a space
_LONGEST_ID = 64  # characters, as a digest of SHA-256 has


@dataclass(frozen=True, kw_only=True)
class CleanRow:
    """A row as it is kept, or the reason why it is not kept."""

    query: str = ""
    document: str = ""
    negatives: list[str] = field(default_factory=list)
    reason: str | None = None
    detail: str = ""
    num_cut: int = 0
    negative_places: list[int] = field(default_factory=list)
    """The place of each hard negative among those that the source has."""
    unusable_negatives: list[str] = field(default_factory=list)
    """The reason for each hard negative that is not kept."""


def clean_row(raw: RawRow, max_characters: int) -> CleanRow:
    """Checks one row. Texts are kept as they are, except that those beyond `max_characters` are cut."""
    if raw.problem is not None:
        return CleanRow(reason=raw.problem, detail=raw.detail[:_DETAIL_CHARACTERS])

    query, document = _cut(raw.query, max_characters), _cut(raw.document, max_characters)
    for name, text in (("query", query), ("document", document)):
        if reason := _fault(text):
            return CleanRow(reason=reason, detail=f"{name}: {text!r:.{_DETAIL_CHARACTERS}}")
    if query == document:
        return CleanRow(reason="query_equals_document", detail=query[:_DETAIL_CHARACTERS])

    # Hard negatives are optional: one that cannot be used is dropped, and the row stays.
    given = raw.negatives if isinstance(raw.negatives, list) else [] if raw.negatives is None else [raw.negatives]
    faults = [_fault(_cut(text, max_characters)) for text in given]
    places = [place for place, fault in enumerate(faults) if fault is None]
    negatives = [given[place] for place in places]
    return CleanRow(
        query=query,
        document=document,
        negatives=[_cut(text, max_characters) for text in negatives],
        num_cut=sum(len(text) > max_characters for text in (raw.query, raw.document, *negatives)),
        negative_places=places,
        unusable_negatives=[fault for fault in faults if fault is not None],
    )


def build(step: Step, builder: ArtifactBuilder, executor: Executor, progress: Progress) -> StageResult:
    """Builds the `pairs` artifact of one domain; see `docs/artifacts.md` for its files.

    Raises:
        InputError: The source has no row at all, or an extra column has values of several types.
        QuarantineError: More than `max_quarantined_fraction` of the rows are broken.
    """
    runtime, config = step.runtime, step.config
    files = [
        SourceFile(
            source["name"],
            runtime["files"][source["name"]],
            source["format"],
            source["bytes"],
            source["sha256"],
            runtime["modified_ns"][source["name"]],
        )
        for source in step.sources
    ]
    reading = Reading(**{name: config[name] for name in Reading.model_fields if name in config})
    units = _staging_units(files, reading.limit or reading.sample)
    if not builder.committed("assembled"):
        work = _Staging(
            path=builder.path,
            files=tuple(files),
            reading=reading,
            max_characters=config["max_characters"],
            decontaminate=tuple(Path(runtime["decontaminate"][name]) for name in config["decontaminate"]),
        )
        run_pending(builder, executor, work, units, progress, f"ingest {step.domain}")
        counts = RowCounts()
        for unit in units:
            counts.add(builder.unit_record(unit.name).counts)
        quarantined = [builder.path / "staged" / f"{unit.name}.quarantine.parquet" for unit in units]
        check_dataset(step.domain, counts.totals, reading, files)
        extra = extra_schema(counts.totals, reading.extra_columns, step.domain)
        _refuse_other_types(step, extra)
        _refuse_if_broken(step, counts, files, quarantined)
        assemble(
            builder.path,
            [builder.path / "staged" / f"{unit.name}.parquet" for unit in units],
            quarantined,
            counts,
            file_names=[file.name for file in files],
            holdout=config["holdout"],
            holdout_seed=config["holdout_seed"],
            extra=extra,
        )

    # The records of the staged units go first, so that no record ever stands without its files.
    for unit in units:
        (builder.path / "units" / f"{unit.name}.json").unlink(missing_ok=True)
    for folder in ("staged", "scratch"):
        shutil.rmtree(builder.path / folder, ignore_errors=True)
    return StageResult(units=["assembled"], counts=builder.unit_record("assembled").counts)


def _refuse_other_types(step: Step, extra: pa.Schema) -> None:
    """Raises InputError if another domain, read already, has an extra column of the same name and another type."""
    others = {name: path for name, path in step.runtime.get("domains", {}).items() if name != step.domain}
    known = {name: artifact for name, path in others.items() if (artifact := find_artifact(path)) is not None}
    joined_schema({name: ExtraRows(artifact).schema for name, artifact in known.items()} | {step.domain: extra})


def _cut(value: Any, max_characters: int) -> Any:
    return value[:max_characters] if isinstance(value, str | bytes) else value


def _fault(value: Any) -> str | None:
    """The reason why `value` cannot be used as a text, or None if it can."""
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
    if all(char.isspace() or unicodedata.category(char) in _INVISIBLE for char in value):
        return "empty"  # nothing but zero-width characters and direction marks
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return "invalid_utf8"  # lone surrogates, from JSON escapes or from bytes that were not UTF-8
    return None


def _staging_units(files: list[SourceFile], limit: int | None) -> list[Unit]:
    """Groups of files of about 64 MiB; a single group if there is a limit or sample, which is of all of them."""
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
    path: Path
    files: tuple[SourceFile, ...]
    reading: Reading
    max_characters: int
    decontaminate: tuple[Path, ...]

    def open(self) -> _StagingWorker:
        return _StagingWorker(self)


class _StagingWorker:
    def __init__(self, work: _Staging) -> None:
        self._work = work
        self._contaminated = KnownTexts()
        for folder in work.decontaminate:
            texts = (text[: work.max_characters] for text in evaluation_texts(folder))
            self._contaminated.add(texts, folder.name)

    def prepare(self, unit: Unit) -> None:
        return None

    def commit(self, unit: Unit, prepared: None) -> None:
        counts = RowCounts()
        schema = schemas.STAGED
        for column in schemas.STAGED_EXTRA if self._work.reading.extra_columns else ():
            schema = schema.append(column)
        with write_unit(self._work.path, unit.name) as writer:
            staged = writer.add_file(f"staged/{unit.name}.parquet")
            quarantine = writer.add_file(f"staged/{unit.name}.quarantine.parquet")
            with (
                pq.ParquetWriter(staged, schema, compression="zstd", use_dictionary=False) as staged_writer,
                pq.ParquetWriter(quarantine, schemas.QUARANTINE, compression="zstd") as quarantine_writer,
            ):
                for kept, dropped in _chunks(self._rows(unit, counts)):
                    staged_writer.write_table(pa.Table.from_pylist(kept, schema))
                    quarantine_writer.write_table(pa.Table.from_pylist(dropped, schemas.QUARANTINE))
            writer.counts = counts.record()

    def _rows(self, unit: Unit, counts: RowCounts) -> Iterator[tuple[dict[str, Any], bool]]:
        """(row, whether it is kept) for each source row: a row of STAGED if it is kept, else one of QUARANTINE."""
        above = CleanRow()
        for row, raw in self._source_rows(unit, counts):
            counts.totals["rows"] += 1
            counts.rows_by_file[str(row["source_file"])] += 1
            clean = clean_row(raw, self._work.max_characters)
            reason, detail = clean.reason, clean.detail
            if reason is None and (found := self._contamination(clean.query, clean.document)):
                reason, detail = "contaminated", found
            if reason is not None:
                counts.quarantined[reason] += 1
                yield row | {"reason": reason, "detail": detail.encode(errors="replace").decode()}, False
                continue

            if self._work.reading.limit is not None and above.query:
                _count_steps(counts.totals, above, clean)
            above = clean
            yield row | self._staged(clean, raw.extra, counts), True

    def _source_rows(self, unit: Unit, counts: RowCounts) -> Iterator[tuple[dict[str, Any], RawRow]]:
        work, numbers = self._work, range(unit.start, unit.stop)
        if work.reading.limit is None:  # all files are read, those without rows too
            counts.rows_by_file.update({str(number): 0 for number in numbers})
        for number, raw in read_rows(work.files, numbers, work.reading, work.path / "scratch", counts.totals):
            yield {"source_file": number, "source_row": raw.row}, raw

    def _contamination(self, query: str, document: str) -> str:
        """Which text of a pair an evaluation has, and which evaluation; empty if none does."""
        if not self._contaminated:
            return ""
        for name, text in (("query", query), ("document", document)):
            if (folder := self._contaminated.find(text)) is not None:
                return f"{name}: in {folder}"
        return ""

    def _staged(self, clean: CleanRow, extra: Sequence[Any], counts: RowCounts) -> dict[str, Any]:
        kept, places = clean.negatives, clean.negative_places
        if self._contaminated:
            is_kept = [self._contaminated.find(text) is None for text in kept]
            kept, places = list(compress(kept, is_kept)), list(compress(places, is_kept))
        counts.unusable_negatives.update(clean.unusable_negatives)
        if len(kept) < len(clean.negatives):
            counts.unusable_negatives["contaminated"] += len(clean.negatives) - len(kept)
        counts.totals["texts_cut"] += clean.num_cut
        counts.totals["negatives"] += len(kept)
        counts.totals["query_ids"] += _looks_like_id(clean.query)
        counts.totals["document_ids"] += _looks_like_id(clean.document)
        return {
            "query": clean.query,
            "document": clean.document,
            "negatives": kept,
            "query_hash": _hash(clean.query),
            "document_hash": _hash(clean.document),
            "negative_hashes": [_hash(text) for text in kept],
            "negative_places": places,
            "extra": json.dumps(extra, ensure_ascii=False) if extra else "",
        }


def _count_steps(totals: Counter[str], above: CleanRow, clean: CleanRow) -> None:
    """Counts whether the texts of a row come behind those of the row above it or before them."""
    for side in ("query", "document"):
        one, other = getattr(above, side), getattr(clean, side)
        if one != other:
            totals[f"{side}_rises" if one < other else f"{side}_falls"] += 1


def _looks_like_id(text: str) -> bool:
    """Whether a text is a number, a digest, a path or another key rather than language or code."""
    return len(text) <= _LONGEST_ID and _ID.fullmatch(text) is not None


def _chunks(rows: Iterator[tuple[dict[str, Any], bool]]) -> Iterator[tuple[list[Any], list[Any]]]:
    """(kept, dropped) of every `STAGED_ROWS` rows; at least once, also if there are no rows."""
    while True:
        chunk = list(islice(rows, STAGED_ROWS))
        yield [row for row, is_kept in chunk if is_kept], [row for row, is_kept in chunk if not is_kept]
        if len(chunk) < STAGED_ROWS:
            return


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _refuse_if_broken(step: Step, counts: RowCounts, files: list[SourceFile], quarantined: list[Path]) -> None:
    num_rows = counts.totals["rows"]
    broken = {reason: counts.quarantined[reason] for reason in BROKEN_REASONS if counts.quarantined[reason]}
    allowed = step.runtime["max_quarantined_fraction"]
    if sum(broken.values()) > allowed * num_rows:
        raise QuarantineError(
            f"dataset '{step.domain}': {sum(broken.values())} of {num_rows} rows are broken "
            f"({', '.join(f'{reason} {count}' for reason, count in broken.items())}), "
            f"the limit is a fraction of {allowed}; the first: {_first_broken(files, quarantined)}; look at "
            f"{step.path / 'staged'}/*.quarantine.parquet, fix the source or raise ingest.max_quarantined_fraction"
            + ("; if its files are not UTF-8, set encoding, e.g. windows-1252" if "invalid_utf8" in broken else "")
        )


def _first_broken(files: list[SourceFile], quarantined: list[Path]) -> str:
    """The first broken row, as a message names it."""
    batches = (batch for path in quarantined for batch in pq.ParquetFile(path).iter_batches())
    rows = (row for batch in batches for row in batch.to_pylist())
    row = next(row for row in rows if row["reason"] in BROKEN_REASONS)
    detail = f": {row['detail']}" if row["detail"] else ""
    return f"{files[row['source_file']].name} row {row['source_row']} ({row['reason']}{detail})"
