"""What is in a source before there is a manifest for it: its columns, its first rows, and what to write.

The rows are read and checked as `ingest` does it, so what would be quarantined is counted here already.
"""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hardbatch.pipeline.artifacts.files import DigestCache
from hardbatch.pipeline.config import Columns, Dataset, IngestConfig
from hardbatch.pipeline.errors import InputError, first_line, printable
from hardbatch.pipeline.sources.files import SourceFile, list_source_files
from hardbatch.pipeline.sources.rows import _local_copy, read_rows
from hardbatch.pipeline.sources.text import _lines
from hardbatch.pipeline.stages.ingest import clean_row
from hardbatch.pipeline.views.plan import size
from hardbatch.pipeline.views.report import table

_ROWS_SHOWN = 2
_ROWS_TYPED = 1_000
_ROWS_CHECKED = 10_000
_CELL_CHARACTERS = 40
_NAMES = {  # what people call the columns, the most usual names first
    "query": (
        "query", "question", "anchor", "sentence1", "sentence_1", "text1", "text_a", "instruction", "prompt", "input",
        "title", "premise", "summary", "headline", "docstring", "set",
    ),
    "document": (
        "document", "positive", "pos", "answer", "passage", "positive_passages", "context", "response", "sentence2",
        "sentence_2", "text2", "text_b", "output", "completion", "body", "code", "text", "content", "abstract",
        "hypothesis", "article", "doc",
    ),
    "negatives": (
        "negatives", "hard_negatives", "negative", "neg", "negative_passages", "hard_negative", "negative_1",
        "hard_neg", "wrong_answers",
    ),
}  # fmt: skip


class _Unread(DigestCache):
    """Digests that nobody asks for: a look must not read all of the files."""

    def digest(self, path: Path) -> str:
        return ""


def look_text(source: str, data_root: Path | None = None, *, format: str = "auto") -> str:
    """Describes a source as text for the terminal.

    Args:
        source: A file, a pattern or a URL, as a manifest names it; unlike there, a path may lead anywhere.
        data_root: The folder that a local path is relative to; by default the current one.
        format: As in a manifest.

    Returns:
        Files and rows; a table of the columns, with types and first rows; the lines of a manifest; and which of the
        first rows would be quarantined.

    Raises:
        ConfigError: The source is not one that a manifest may name.
        InputError: A file does not exist or cannot be read.
    """
    root, relative = _split(source, data_root)
    dataset = Dataset.model_validate({"name": _name_of(relative), "source": relative, "format": format})
    files = list_source_files(dataset, root, _Unread(root))
    with TemporaryDirectory(prefix="hardbatch-") as scratch:
        records = list(islice(_records(files[0], Path(scratch)), _ROWS_TYPED))
        columns = _propose(records)
        checked = _check(files, columns, Path(scratch)) if columns else ["no row checked: name the columns first"]

    lines = [
        f"{source}: {len(files)} file{'s' * (len(files) > 1)} ({files[0].format}), "
        f"{size(sum(file.num_bytes for file in files))}, {_num_rows(files, len(records))}",
        "",
        _column_table(records),
        "",
        "what to write in a manifest:",
        "",
        f'corpus = "{dataset.name}"',
        "",
        "[[dataset]]",
        f'name = "{dataset.name}"',
        f"source = {json.dumps(relative, ensure_ascii=False)}",
        *([f'format = "{format}"'] if format != "auto" else []),
        _columns_line(columns),
        "",
        *checked,
    ]
    if root != Path():
        lines.append(f"the source is relative to {root}: put the manifest there, or add --data-root {root}")
    return "\n".join(printable(line) for text in lines for line in text.split("\n"))


def _split(source: str, data_root: Path | None) -> tuple[Path, str]:
    """The folder that a source is relative to, and the source as a manifest can name it."""
    path = Path(source)
    if data_root is not None or "://" in source or source.startswith("python:"):
        return data_root or Path(), source
    if not path.is_absolute() and ".." not in path.parts:
        return Path(), source
    is_pattern = [any(char in part for char in "*?[") for part in path.parts]
    number = is_pattern.index(True) if True in is_pattern else len(path.parts) - 1
    return Path(*path.parts[:number]), str(Path(*path.parts[number:]))


def _name_of(source: str) -> str:
    """A name for the dataset: that of its file or folder, as far as it can be one."""
    parts = [part for part in re.split(r"[/:]", source) if part and not any(char in part for char in "*?[")]
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", parts[-1].split(".")[0] if parts else "").strip("-_")
    return name[:100] or "my-data"


def _records(file: SourceFile, scratch: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file with all their columns; rows that cannot be parsed are left out."""
    if file.format == "python":
        for raw in read_rows(file, Columns(), scratch):
            yield {"query": raw.query, "document": raw.document}
        return
    with _local_copy(file, scratch) as path:
        if file.format == "parquet":
            import pyarrow as pa
            import pyarrow.parquet as pq

            try:
                for batch in pq.ParquetFile(path).iter_batches(batch_size=_ROWS_TYPED):
                    yield from batch.to_pylist()
            except (pa.ArrowException, OSError, ValueError) as error:
                raise InputError(f"{file.name}: is not a readable Parquet file: {first_line(error)}") from None
        elif file.format == "jsonl":
            for line in _lines(file, path):
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError):
                    continue
                if isinstance(record, dict):
                    yield record
        else:
            text = (line.decode("utf-8", errors="replace") for line in _lines(file, path))
            try:
                yield from csv.DictReader(text, delimiter="\t" if file.format == "tsv" else ",")
            except csv.Error as error:
                raise InputError(f"{file.name}: cannot be read: {error}") from None


def _num_rows(files: Sequence[SourceFile], num_seen: int) -> str:
    if all(file.format == "parquet" and "://" not in file.location for file in files):
        import pyarrow.parquet as pq

        return f"{sum(pq.read_metadata(file.location).num_rows for file in files):,} rows"
    exact = len(files) == 1 and num_seen < _ROWS_TYPED
    return f"{num_seen:,} rows" if exact else f"more than {min(num_seen, _ROWS_TYPED - 1):,} rows"


def _column_table(records: Sequence[Mapping[str, Any]]) -> str:
    """A row per column: its type, the fraction of rows that have a value, and the first values."""
    rows = []
    for name in _column_names(records):
        values = [record.get(name) for record in records]
        filled = sum(value not in (None, "", []) for value in values) / len(values)
        rows.append([name, _type_of(values), f"{filled:.0%}", *map(_cell, values[:_ROWS_SHOWN])])
    header = ["column", "type", "filled", *(f"row {row}" for row in range(min(len(records), _ROWS_SHOWN)))]
    return table(header, rows, left=(0, 1, 3, 4)) if rows else "no row could be read"


def _column_names(records: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(str(name) for record in records for name in record if name is not None))


def _type_of(values: Sequence[Any]) -> str:
    """The type of a column in words; several if its values differ in it."""
    kinds = {_kind(value): None for value in values if value is not None}
    return " or ".join(kinds) or "null"


def _kind(value: Any) -> str:
    if isinstance(value, list | tuple):
        inner = {_kind(item): None for item in value}
        return f"list of {' or '.join(inner)}" if inner else "list"
    if isinstance(value, dict):
        return f"object {{{', '.join(map(str, value))}}}"
    kinds = {bool: "true/false", int: "integer", float: "number", str: "text", bytes: "bytes"}
    return kinds.get(type(value), type(value).__name__)


def _cell(value: Any) -> str:
    if isinstance(value, bytes):
        return f"{len(value):,} bytes"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    text = " ".join(text.split())
    return text if len(text) <= _CELL_CHARACTERS else f"{text[: _CELL_CHARACTERS - 1]}…"


def _propose(records: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The columns of query, document and negatives: by their names, otherwise the two that look most like texts.

    Empty if there are no two such columns.
    """
    kinds = {name: _type_of([record.get(name) for record in records]) for name in _column_names(records)}
    found: dict[str, str] = {}
    for field, names in _NAMES.items():
        known = [name for wanted in names for name in kinds if name.lower() == wanted and "text" in kinds[name]]
        known = [name for name in known if name not in found.values()]
        if known:
            found[field] = known[0]

    texts = sorted(
        (_mean_words(records, name), name)
        for name, kind in kinds.items()
        if kind == "text" and name not in found.values()
    )
    for field in ("query", "document"):
        # A column of single words holds ids, labels or links.
        long_enough = [name for num_words, name in texts if num_words >= 2 and name not in found.values()]
        if field not in found and long_enough:
            found[field] = long_enough[0 if field == "query" else -1]
    return {field: found[field] for field in _NAMES if field in found} if {"query", "document"} <= set(found) else {}


def _mean_words(records: Sequence[Mapping[str, Any]], name: str) -> float:
    texts = [record[name] for record in records if isinstance(record.get(name), str)]
    return sum(len(text.split()) for text in texts) / max(1, len(texts))


def _columns_line(columns: Mapping[str, str]) -> str:
    if not columns:
        return 'columns = { query = "…", document = "…" }  # which columns these are cannot be told from the names'
    if columns == {"query": "query", "document": "document"}:
        return "# the columns are called query and document, so there is nothing to say about them"
    pairs = ", ".join(f"{field} = {json.dumps(name, ensure_ascii=False)}" for field, name in columns.items())
    return f"columns = {{ {pairs} }}"


def _check(files: Sequence[SourceFile], columns: Mapping[str, str], scratch: Path) -> list[str]:
    """What would become of the first rows, as lines of text."""
    max_characters = IngestConfig().max_characters
    reasons = Counter[str]()
    examples: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    num_rows = num_cut = num_negatives = num_lost = 0
    rows = ((file, raw) for file in files for raw in read_rows(file, Columns(**columns), scratch))
    for file, raw in islice(rows, _ROWS_CHECKED):
        num_rows += 1
        clean = clean_row(raw, max_characters)
        reason = clean.reason or ("duplicate_pair" if (clean.query, clean.document) in seen else None)
        if reason:
            reasons[reason] += 1
            examples.setdefault(reason, f"{file.name} row {raw.row}{f': {clean.detail}' if clean.detail else ''}")
            continue
        seen.add((clean.query, clean.document))
        num_cut += clean.num_cut
        num_negatives += len(clean.negatives)
        num_lost += clean.num_negatives_dropped

    lines = [f"of the first {num_rows:,} rows, {num_rows - reasons.total():,} would be kept"]
    if reasons:
        lines[0] += f" and {reasons.total():,} quarantined:"
        lines += [f"  {reason} {number:,}; the first: {examples[reason]}" for reason, number in reasons.most_common()]
    if num_cut:
        lines.append(f"{num_cut:,} texts are longer than {max_characters:,} characters and would be cut")
    if "negatives" in columns:
        lines.append(f"hard negatives: {num_negatives:,} would be kept, {num_lost:,} cannot be used")
    return lines
