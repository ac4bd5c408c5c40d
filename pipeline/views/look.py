"""What is in a source before there is a manifest for it: its columns, its first rows, and what to write.

The rows are read and checked as `ingest` does it, so what would be quarantined is counted here already.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hardbatch.pipeline.artifacts.files import DigestCache, user_path
from hardbatch.pipeline.config import Columns, Dataset, Dialect, IngestConfig, Reading
from hardbatch.pipeline.errors import InputError, printable
from hardbatch.pipeline.sources.columns import look_up
from hardbatch.pipeline.sources.files import SourceFile, list_source_files
from hardbatch.pipeline.sources.head import fetch_head
from hardbatch.pipeline.sources.rows import check_dataset, open_table, read_rows
from hardbatch.pipeline.stages.ingest import clean_row
from hardbatch.pipeline.views.plan import size
from hardbatch.pipeline.views.report import table

_ROWS_SHOWN = 2
_ROWS_TYPED = 1_000
_ROWS_CHECKED = 10_000
_MAX_WORDS_OF_NAME = 3
_CELL_CHARACTERS = 40
_NUMBERED_NEGATIVES = re.compile(r"((?:hard_)?neg(?:ative)?s?_?)\d+", re.IGNORECASE)
_TURNS = (("role", "content"), ("from", "value"))  # how the turns of a chat say who speaks, and what
_ASKING = ("user", "human")
_LABELS = ("label", "labels", "is_duplicate", "is_relevant", "relevance")
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
    files = list_source_files(dataset, root, _Unread(root), follow_links=True)
    with TemporaryDirectory(prefix="hardbatch-") as scratch:
        # Of a remote source, only the beginning of the first file is fetched.
        first = fetch_head(files[0], Path(scratch), _ROWS_CHECKED)
        dialect, records = _read_first(first, Path(scratch))
        columns = _propose(records) or _propose_turns(records) or _propose(_flattened(records))
        reading = Reading.model_validate({"columns": columns, "limit": _ROWS_CHECKED, "csv": dialect})
        checked = ["no row checked: name the columns first"]
        if columns:
            checked = _check(dataset.name, files if first is files[0] else [first], reading, Path(scratch))

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
        *([f"csv = {_inline(dialect)}"] if dialect else []),
        _columns_line(columns),
        *_label_line(records),
        "",
        *checked,
    ]
    if root != Path():
        lines.append(f"the source is relative to {root}: put the manifest there, or add --data-root {root}")
    return "\n".join(printable(line) for text in lines for line in text.split("\n"))


def _split(source: str, data_root: Path | None) -> tuple[Path, str]:
    """The folder that a source is relative to, and the source as a manifest can name it."""
    path = user_path(source)
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


def _read_first(file: SourceFile, scratch: Path) -> tuple[dict[str, Any], list[Mapping[str, Any]]]:
    """The first rows of a file with all their columns, and the settings `csv` that they need; none by default.

    Rows that cannot be parsed are left out.
    """
    dialect: dict[str, Any] = {}
    while True:
        reading = Reading(columns=Columns(query="*"), csv=Dialect(**dialect))
        try:
            with open_table(file, reading, scratch) as table:
                records = [record.values for record in islice(table.records, _ROWS_TYPED) if record.values is not None]
        except InputError:
            if file.format not in ("csv", "tsv") or "quote" in dialect:
                raise
            dialect["quote"] = ""  # a quote that is part of a text
            continue
        names = [name for name, _ in table.columns or []] if file.format in ("csv", "tsv") else []
        signs = [sign for sign in "\t;|," if len(names) == 1 and sign in names[0]]
        if signs and "delimiter" not in dialect:
            dialect["delimiter"] = signs[0]
        elif "header" not in dialect and any(len(name.split()) > _MAX_WORDS_OF_NAME for name in names):
            dialect["header"] = False  # the first line has texts, not names
        else:
            return dialect, records


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


def _propose(records: Sequence[Mapping[str, Any]]) -> dict[str, str | list[str]]:
    """The columns of query, document and negatives: by their names, otherwise the two that look most like texts.

    Empty if there are no two such columns.
    """
    kinds = {name: _type_of([record.get(name) for record in records]) for name in _column_names(records)}
    found: dict[str, str | list[str]] = {}
    for field, names in _NAMES.items():
        texts = [name for name, kind in kinds.items() if "text" in kind]
        known = [name for wanted in names for name in texts if name.lower().rpartition(".")[2] == wanted]
        known = [name for name in known if name not in found.values()]
        if known:
            found[field] = known[0]

    by_length = sorted(
        (_mean_words(records, name), name)
        for name, kind in kinds.items()
        if kind == "text" and name not in found.values()
    )
    for field in ("query", "document"):
        # A column of single words holds ids, labels or links.
        long_enough = [name for num_words, name in by_length if num_words >= 2 and name not in found.values()]
        if field not in found and long_enough:
            found[field] = long_enough[0 if field == "query" else -1]
    if not {"query", "document"} <= set(found):
        return {}

    numbered = [match for name in kinds if (match := _NUMBERED_NEGATIVES.fullmatch(name))]
    if len(numbered) > 1:
        found["negatives"] = f"{numbered[0][1]}*"
    has_title = "text" in kinds.get("title", "") and found["query"] != "title"
    if has_title and found["document"] in ("text", "body", "content", "passage"):
        found["document"] = ["title", str(found["document"])]
    return {field: found[field] for field in _NAMES if field in found}


def _flattened(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The records with a column for each dotted path that leads to texts."""
    names = dict.fromkeys(name for record in records for name in _paths(record))
    return [{name: look_up(record, name, None) for name in names} for record in records]


def _paths(value: Any, path: str = "") -> Iterator[str]:
    if isinstance(value, str):
        yield path
    for item in value if isinstance(value, list) else ():
        yield from _paths(item, path)
    for key, item in value.items() if isinstance(value, dict) else ():
        yield from _paths(item, f"{path}.{key}".lstrip("."))


def _propose_turns(records: Sequence[Mapping[str, Any]]) -> dict[str, str | list[str]]:
    """The first question and its answer, if a column has the turns of a chat: [{role: user, content: ...}, ...]."""
    for name, turns in ((name, turns) for record in records[:1] for name, turns in record.items()):
        for role, content in _TURNS if isinstance(turns, list) else ():
            roles = [str(turn.get(role)) for turn in turns if isinstance(turn, dict) and content in turn]
            asked = next((number for number, found in enumerate(roles) if found in _ASKING), None)
            if asked is not None and asked + 1 < len(roles) == len(turns):
                return {"query": f"{name}.{asked}.{content}", "document": f"{name}.{asked + 1}.{content}"}
    return {}


def _mean_words(records: Sequence[Mapping[str, Any]], name: str) -> float:
    texts = [record[name] for record in records if isinstance(record.get(name), str)]
    return sum(len(text.split()) for text in texts) / max(1, len(texts))


def _columns_line(columns: Mapping[str, str | list[str]]) -> str:
    if not columns:
        return 'columns = { query = "…", document = "…" }  # which columns these are cannot be told from the names'
    if columns == {"query": "query", "document": "document"}:
        return "# the columns are called query and document, so there is nothing to say about them"
    return f"columns = {_inline(columns)}"


def _label_line(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line that asks for a choice of rows, if a column says which of them are pairs."""
    for name in _column_names(records):
        values = {str(record.get(name)) for record in records}
        if name.lower() in _LABELS and {"0", "1"} <= values:
            return [f'# where = "{name} = 1"  # if only the rows of {name} 1 are pairs']
    return []


def _inline(table: Mapping[str, Any]) -> str:
    """A mapping as an inline table of TOML."""
    return f"{{ {', '.join(f'{key} = {json.dumps(value, ensure_ascii=False)}' for key, value in table.items())} }}"


def _check(name: str, files: Sequence[SourceFile], reading: Reading, scratch: Path) -> list[str]:
    """What would become of the first rows, as lines of text."""
    max_characters = IngestConfig().max_characters
    reasons, counts = Counter[str](), Counter[str]()
    examples: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    num_cut = num_negatives = num_lost = 0
    try:
        for number, raw in read_rows(files, range(len(files)), reading, scratch, counts):
            counts["rows"] += 1
            clean = clean_row(raw, max_characters)
            reason = clean.reason or ("duplicate_pair" if (clean.query, clean.document) in seen else None)
            if reason:
                reasons[reason] += 1
                detail = f": {clean.detail}" if clean.detail else ""
                examples.setdefault(reason, f"{files[number].name} row {raw.row}{detail}")
                continue
            seen.add((clean.query, clean.document))
            num_cut += clean.num_cut
            num_negatives += len(clean.negatives)
            num_lost += len(clean.unusable_negatives)
        num_pairs = counts["rows"]
        check_dataset(name, counts, reading, files)
    except InputError as error:
        return [f"these columns cannot be used: {error}"]

    lines = [f"of the first {num_pairs:,} pairs, {num_pairs - reasons.total():,} would be kept"]
    if reasons:
        lines[0] += f" and {reasons.total():,} quarantined:"
        lines += [f"  {reason} {number:,}; the first: {examples[reason]}" for reason, number in reasons.most_common()]
    if reasons["invalid_utf8"]:
        lines.append('a file that is not UTF-8 needs its encoding, for example encoding = "windows-1252"')
    if num_cut:
        lines.append(f"{num_cut:,} texts are longer than {max_characters:,} characters and would be cut")
    if reading.columns.negatives is not None:
        lines.append(f"hard negatives: {num_negatives:,} would be kept, {num_lost:,} cannot be used")
    return lines
