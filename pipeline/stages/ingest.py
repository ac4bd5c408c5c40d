"""ingest: source rows → pairs, distinct texts, quarantine, and optionally a holdout.

Two phases. Staging reads the source files once, cleans each row and writes it with the hashes of its texts, a unit per
group of files. Assembly joins the units: exact duplicates and contaminated pairs go to quarantine, a holdout is cut by
connected components of shared texts, and the distinct texts of each side are numbered in order of first appearance.

Nothing is lost: rows in = pairs + quarantined + held out. Memory: staging some thousand rows; assembly 700 to 780 bytes
for each pair (its hashes and numbers) and the texts of one file, never all texts.
"""

from __future__ import annotations

import hashlib
import shutil
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from hardbatch.pipeline import schemas
from hardbatch.pipeline.artifacts.commit import ArtifactBuilder, write_unit
from hardbatch.pipeline.config import Columns
from hardbatch.pipeline.errors import InputError, QuarantineError
from hardbatch.pipeline.sources.files import RawRow, SourceFile
from hardbatch.pipeline.sources.rows import evaluation_texts, read_rows
from hardbatch.pipeline.stages.assemble import STAGED_ROWS, assemble
from hardbatch.pipeline.step import Executor, Progress, StageResult, Step, Unit, run_pending

BROKEN_REASONS = (
    "null", "wrong_type", "invalid_utf8", "nul_character", "empty", "broken_json", "broken_csv", "wrong_field_count",
)  # fmt: skip
_UNIT_BYTES = 64 * 2**20
_DETAIL_CHARACTERS = 120
_UNSEEN = ("Cc", "Cf")  # control and format characters


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
        return CleanRow(reason=raw.problem, detail=raw.detail[:_DETAIL_CHARACTERS])
    texts = []
    num_cut = 0
    for name, value in (("query", raw.query), ("document", raw.document)):
        text, is_cut = _cut(value, max_characters)
        reason = _fault(text)
        if reason is not None:
            return CleanRow(reason=reason, detail=f"{name}: {text!r:.{_DETAIL_CHARACTERS}}")
        num_cut += is_cut
        texts.append(text)
    if texts[0] == texts[1]:
        return CleanRow(reason="query_equals_document", detail=texts[0][:_DETAIL_CHARACTERS])
    given = raw.negatives if isinstance(raw.negatives, list) else [] if raw.negatives is None else [raw.negatives]
    negatives = []
    for value in given:
        text, is_cut = _cut(value, max_characters)
        if _fault(text) is None:
            negatives.append(text)
            num_cut += is_cut
    return CleanRow(
        query=texts[0],
        document=texts[1],
        negatives=negatives,
        num_cut=num_cut,
        num_negatives_dropped=len(given) - len(negatives),
    )


def build(step: Step, builder: ArtifactBuilder, executor: Executor, progress: Progress) -> StageResult:
    """Builds the `pairs` artifact of one domain; see `docs/artifacts.md` for its files.

    Raises InputError where the source gives no row at all, QuarantineError where more than
    `max_quarantined_fraction` of the rows are broken.
    """
    files = [
        SourceFile(
            source["name"],
            step.runtime["files"][source["name"]],
            source["format"],
            source["bytes"],
            source["sha256"],
            step.runtime["modified_ns"][source["name"]],
        )
        for source in step.sources
    ]
    units = _staging_units(files, step.config["limit"])
    work = _Staging(
        path=builder.path,
        files=tuple(files),
        columns=Columns(**step.config["columns"]),
        limit=step.config["limit"],
        max_characters=step.config["max_characters"],
        decontaminate=tuple(Path(step.runtime["decontaminate"][name]) for name in step.config["decontaminate"]),
    )
    if not builder.committed("assembled"):
        run_pending(builder, executor, work, units, progress, f"ingest {step.domain}")
        counts = Counter[str]()
        for unit in units:
            counts.update(builder.unit_record(unit.name).counts)
        _refuse_if_broken(step, counts, files, [unit.name for unit in units])
        assemble(
            builder.path,
            [builder.path / "staged" / f"{unit.name}.parquet" for unit in units],
            [builder.path / "staged" / f"{unit.name}.quarantine.parquet" for unit in units],
            counts,
            holdout=step.config["holdout"],
            holdout_seed=step.config["holdout_seed"],
        )
    for unit in units:  # their records first: none ever stands without its files
        (builder.path / "units" / f"{unit.name}.json").unlink(missing_ok=True)
    for folder in ("staged", "scratch"):
        shutil.rmtree(builder.path / folder, ignore_errors=True)
    return StageResult(units=["assembled"], counts=builder.unit_record("assembled").counts)


def _cut(value: Any, max_characters: int) -> tuple[Any, bool]:
    if isinstance(value, str | bytes) and len(value) > max_characters:
        return value[:max_characters], True
    return value, False


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
    if all(char.isspace() or unicodedata.category(char) in _UNSEEN for char in value):
        return "empty"  # zero-width signs and marks of direction alone
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
    path: Path
    files: tuple[SourceFile, ...]
    columns: Columns
    limit: int | None
    max_characters: int
    decontaminate: tuple[Path, ...]

    def open(self) -> _StagingWorker:
        return _StagingWorker(self)


class _StagingWorker:
    def __init__(self, work: _Staging) -> None:
        self._work = work
        texts = (text[: work.max_characters] for folder in work.decontaminate for text in evaluation_texts(folder))
        self._contaminated = {_hash(text) for text in texts}

    def prepare(self, unit: Unit) -> None:
        return None

    def commit(self, unit: Unit, prepared: None) -> None:
        with write_unit(self._work.path, unit.name) as writer:
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
            if counts["rows"] == self._work.limit:
                return
            for raw in read_rows(self._work.files[file_number], self._work.columns, self._work.path / "scratch"):
                counts["rows"] += 1
                row = {"source_file": file_number, "source_row": raw.row}
                clean = clean_row(raw, self._work.max_characters)
                reason, detail = clean.reason, clean.detail
                hashes = [_hash(text) for text in (clean.query, clean.document)] if reason is None else []
                if self._contaminated.intersection(hashes):
                    reason = "contaminated"
                if reason is not None:
                    counts[reason] += 1
                    yield {**row, "reason": reason, "detail": detail.encode(errors="replace").decode()}, False
                else:
                    yield {**row, **self._staged(clean, hashes, counts)}, True
                if counts["rows"] == self._work.limit:
                    return

    def _staged(self, clean: CleanRow, hashes: list[bytes], counts: Counter[str]) -> dict[str, Any]:
        negatives = [(text, _hash(text)) for text in clean.negatives]
        negatives = [(text, code) for text, code in negatives if code not in self._contaminated]
        counts["texts_cut"] += clean.num_cut
        counts["negatives"] += len(negatives)
        counts["negatives_dropped"] += clean.num_negatives_dropped + len(clean.negatives) - len(negatives)
        return {
            "query": clean.query,
            "document": clean.document,
            "negatives": [text for text, _ in negatives],
            "query_hash": hashes[0],
            "document_hash": hashes[1],
            "negative_hashes": [code for _, code in negatives],
        }


def _chunks(rows: Iterable[tuple[dict[str, Any], bool]]) -> Iterator[tuple[list[Any], list[Any]]]:
    kept: list[Any] = []
    dropped: list[Any] = []
    for row, is_kept in rows:
        (kept if is_kept else dropped).append(row)
        if len(kept) + len(dropped) >= STAGED_ROWS:
            yield kept, dropped
            kept, dropped = [], []
    yield kept, dropped


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _refuse_if_broken(step: Step, counts: Counter[str], files: list[SourceFile], units: list[str]) -> None:
    if counts["rows"] == 0:
        names = ", ".join(file.name for file in files[:5])
        raise InputError(f"dataset '{step.domain}': no rows in {names}; check the source, or remove the dataset")
    broken = {reason: counts[reason] for reason in BROKEN_REASONS if counts[reason]}
    allowed = step.runtime["max_quarantined_fraction"]
    if sum(broken.values()) > allowed * counts["rows"]:
        raise QuarantineError(
            f"dataset '{step.domain}': {sum(broken.values())} of {counts['rows']} rows are broken "
            f"({', '.join(f'{reason} {count}' for reason, count in broken.items())}), "
            f"allowed is a fraction of {allowed}; the first: {_first_broken(step, files, units)}; look at "
            f"{step.path / 'staged'}/*.quarantine.parquet, mend the source or raise ingest.max_quarantined_fraction"
        )


def _first_broken(step: Step, files: list[SourceFile], units: list[str]) -> str:
    tables = (pq.ParquetFile(step.path / "staged" / f"{unit}.quarantine.parquet") for unit in units)
    rows = (row for table in tables for batch in table.iter_batches() for row in batch.to_pylist())
    row = next(row for row in rows if row["reason"] in BROKEN_REASONS)
    detail = f": {row['detail']}" if row["detail"] else ""
    return f"{files[row['source_file']].name} row {row['source_row']} ({row['reason']}{detail})"
