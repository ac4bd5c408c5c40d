"""From the records of a source to pairs: which columns hold the texts, and in which shapes.

Every reader makes records, and all formats are judged here, by their values and over a whole file.
A cell may hold a text, an object {text, title}, which reads as title and text with a space between
them, or a list of these. A column is named as it is called in the source, by a dotted path into
nested values, or in delimited text by its number:

    record    {"q": "why?", "pos": ["a", "b"], "neg": [{"title": "T", "text": "c"}]}
    columns   query = "q", document = "pos", negatives = "neg"
    pairs     ("why?", "a", negatives ["T c"]) and ("why?", "b", negatives ["T c"])
"""

from __future__ import annotations

import fnmatch
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from hardbatch.pipeline.config import Column, Reading
from hardbatch.pipeline.errors import ConfigError, InputError
from hardbatch.pipeline.sources.extra import ExtraReader, closest
from hardbatch.pipeline.sources.files import RawRow, SourceFile

_ROWS_TO_JUDGE = 10_000  # a column without one text in so many rows is refused before the file has been read
_NAMES_SHOWN, _NAME_CHARACTERS = 20, 60
_FIELDS = ("query", "document", "negatives")
_EXTRA = "extra_columns"
_OPTIONAL = ("negatives", _EXTRA)  # may be absent in some files of a dataset
_SEEN = "column "  # before the name of a column that occurs, in counts
_OTHER = "other column "  # before the name of one that occurs where an extra column does not
_READABLE = ""  # stands among these names if a row could be read
ABSENT = object()
"""The value of a column that a record does not have."""

# A list that was written as text, as pandas and CSV writers do: ['a', 'b'], ["a"] or [{'text': 'a'}].
_LIST_AS_TEXT = re.compile(r"\s*(?:array\()?\[\s*['\"].*['\"]\s*\](?:,.*\))?\s*", re.DOTALL)
_MAY_BE_LIST = "[a \t\n"  # how such a text begins
_OBJECTS_AS_TEXT = re.compile(r"\s*\[\s*(?:\{.*\}\s*)?\]\s*", re.DOTALL)


class Record(NamedTuple):
    """One row as a reader has it; `problem` (a reason code) and `detail` say why it could not be read."""

    row: int
    values: Mapping[str, Any] | None
    problem: str | None = None
    detail: str = ""


class Table(NamedTuple):
    """An open source file.

    Attributes:
        columns: Name and type of each column, in order; None if only the records have them (JSON).
        records: The rows, to be read once.
    """

    columns: list[tuple[str, str]] | None
    records: Iterator[Record]


def look_up(values: Mapping[str, Any], name: str, default: Any = ABSENT) -> Any:
    """Finds the value of a column, or of a dotted path into nested objects and lists.

    A column whose name has dots is preferred to a path. A path passes through a list to each of its
    items, except that a number selects one of them: in `answers.text` and `turns.0.content`.

    Returns:
        The value, or `default` if there is none.
    """
    if name in values:
        return values[name]
    parts = name.split(".")
    for length in range(len(parts) - 1, 0, -1):
        head = ".".join(parts[:length])
        if head in values:
            found = _descend(values[head], ".".join(parts[length:]))
            return default if found is ABSENT else found
    return default


def _descend(value: Any, path: str) -> Any:
    if value is None:
        return None
    if isinstance(value, dict):
        return look_up(value, path)
    if isinstance(value, list):
        first, _, rest = path.partition(".")
        if first.isdigit():
            item = value[int(first)] if int(first) < len(value) else None
            return _descend(item, rest) if rest else item
        found = [_descend(item, path) for item in value]
        return [item for item in found if item is not ABSENT]
    return ABSENT


def _shared_path(names: Mapping[str, Sequence[str]]) -> list[str]:
    """The parts with which the paths of query and document begin, up to a list from which a number selects an item."""
    paths = [name.split(".") for found in names.values() for name in found]
    wanted = [name.split(".") for field in ("query", "document") for name in names[field]]
    shared: list[str] = []
    for part in wanted[0][:-1]:
        shared.append(part)
        size = len(shared)
        chosen = any(path[:size] == shared and "".join(path[size : size + 1]).isdigit() for path in paths)
        if chosen or any(path[:size] != shared or len(path) == size for path in wanted):
            return shared[:-1]
    return shared


def _items(values: Mapping[str, Any], shared: Sequence[str]) -> list[Mapping[str, Any]]:
    """The record once for each item of the lists that both the query and the document are in.

    With `qas.question` and `qas.answer`, each question belongs to its own answer, not to all of the list.
    """
    if not shared or shared[0] not in values:
        return [values]
    found = values[shared[0]]
    items = found if isinstance(found, list) and found else [found]
    return [
        {**values, shared[0]: inner}
        for item in items
        for inner in (_items(item, shared[1:]) if isinstance(item, dict) else [item])
    ]


def needed_columns(present: Sequence[str], wanted: Sequence[Column]) -> list[str]:
    """The columns of a file that `wanted` needs: names, numbers, patterns, or heads of dotted paths."""
    return [
        name
        for number, name in enumerate(present, start=1)
        if any(
            want == number if isinstance(want, int) else want.startswith(f"{name}.") or _matches(name, want)
            for want in wanted
        )
    ]


def _matches(name: str, want: str) -> bool:
    return name == want or ("*" in want and fnmatch.fnmatchcase(name, want))


def note_seen(counts: Counter[str], names: Iterable[Column]) -> None:
    """Adds the names of columns that occur to `counts`, for `check_columns`."""
    counts.update(f"{_SEEN}{name}" for name in names)


def check_columns(counts: Counter[str], reading: Reading, where: Sequence[str], files: Sequence[SourceFile]) -> None:
    """Refuses a column that the manifest names and no file of the dataset has.

    Args:
        counts: The counts of reading all files; the names of the columns that occur are taken out.
        reading: The settings that name the columns.
        where: The columns of its condition.
        files: The files of the dataset, for the message.

    Raises:
        InputError: A column does not occur.
    """
    seen, others = (
        {name.removeprefix(prefix): None for name in list(counts) if name.startswith(prefix) and counts.pop(name)}
        for prefix in (_SEEN, _OTHER)
    )
    for name in where:
        if counts["rows"] + counts["rows_filtered"] and name not in seen:
            raise InputError(f"{files[0].name}: no row has a column '{name}'; fix where; text is put in single quotes")
    for field in _FIELDS:
        for given in reading.columns.names(field):
            if _READABLE in seen and str(given) not in seen:
                raise InputError(f"{files[0].name}: no row has '{given}'; fix columns.{field}, or leave it out")
    for given in reading.extra_columns.values():
        if _READABLE in seen and str(given) not in seen:
            raise InputError(
                f"{files[0].name}: no row has '{given}' ({_EXTRA}), in no file of the dataset; "
                f"it has: {', '.join(others)}{closest(str(given), list(others))}"
            )


class _Judged:
    """What the values of a field were so far."""

    def __init__(self) -> None:
        self.num_texts = self.num_lists = self.num_others = 0
        self.list_as_text: tuple[int, str] | None = None
        self.unusable: tuple[int, Any] | None = None


class PairReader:
    """Makes pairs of the records of one file, and judges its columns.

    Args:
        file: The file, for messages.
        reading: The settings that name the columns.
        where: Columns of the condition on rows, which a table must have too.
        present: Name and type of the file's columns, if it says them.
        is_only: Whether it is the dataset's only file, so that it must have every column.

    Raises:
        ConfigError: A column is given by a number, but has none in this format.
        InputError: A column is not there, or there twice.
    """

    def __init__(
        self,
        file: SourceFile,
        reading: Reading,
        where: Sequence[str],
        present: list[tuple[str, str]] | None,
        *,
        is_only: bool,
    ) -> None:
        self._file = file
        self._types = dict(present or [])
        self._present = [name for name, _ in present or []]
        self._given = {field: reading.columns.names(field) for field in _FIELDS}
        if reading.extra_columns:
            self._given[_EXTRA] = list(reading.extra_columns.values())
        self._names = {field: [self._name(name) for name in names] for field, names in self._given.items()}
        self._extra_names = self._names.get(_EXTRA, [])
        self._extra = ExtraReader(file, dict(zip(reading.extra_columns, self._extra_names, strict=True)))
        self._shared = _shared_path(self._names)
        self._is_only = is_only
        self._seen: set[str] = set()
        self._judged = {field: _Judged() for field in _FIELDS}
        self._num_rows = 0
        if present is not None:
            self._check_present(where)
        self._unseen = [name for names in self._names.values() for name in names if name not in self._seen]

    def rows(self, record: Record) -> list[RawRow]:
        """The pairs of a record: each of its queries with each of its documents, at least one row."""
        if record.problem is not None or record.values is None:
            return [RawRow(record.row, None, None, None, record.problem, record.detail)]
        if self._unseen:
            self._note_keys(record.values)
        items = _items(record.values, self._shared)
        return [row for values in items for row in self._pairs(record._replace(values=values))]

    def _pairs(self, record: Record) -> list[RawRow]:
        queries = self._texts("query", record)
        documents = self._texts("document", record)
        negatives = self._texts("negatives", record) if self._names["negatives"] else None
        self._num_rows += 1
        if self._num_rows == _ROWS_TO_JUDGE:
            self._judge(is_whole=False)
        extra: list[Any] = []
        if self._extra_names:
            found = [look_up(record.values or {}, name, None) for name in self._extra_names]
            extra, broken = self._extra.read(record.row, found)
            if broken:
                return [RawRow(record.row, None, None, None, "invalid_utf8", broken)]
        return [
            RawRow(record.row, query, document, negatives, extra=extra)
            for query in queries or [None]
            for document in documents or [None]
        ]

    def finish(self, counts: Counter[str]) -> None:
        """Judges the columns of the whole file, and adds the names of those that occur to `counts`."""
        self._judge(is_whole=True)
        self._extra.finish(counts)
        note_seen(counts, [_READABLE] if self._num_rows else [])
        if any(name not in self._seen for name in self._extra_names):
            counts.update(f"{_OTHER}{name}" for name in self._present[:_NAMES_SHOWN])
        for field, names in self._names.items():
            for given, name in zip(self._given[field], names, strict=True):
                if name in self._seen:
                    note_seen(counts, [given])

    def _name(self, column: Column) -> str:
        if isinstance(column, str):
            return column
        if not self._present:
            raise ConfigError(f"{self._file.name}: columns have no numbers here, given {column}; give the name")
        if column > len(self._present):
            raise InputError(f"{self._file.name}: no column {column}; it has {len(self._present)} columns")
        return self._present[column - 1]

    def _check_present(self, where: Sequence[str]) -> None:
        self._seen = {name for names in self._names.values() for name in names if self._may_have(name)}
        self._refuse_absent(is_whole=True)
        for name in where:
            if self._is_only and not self._may_have(name):
                raise self._no_column("where", name)
        for field, names in self._names.items():
            for name in names:
                if self._present.count(name) > 1:
                    times = self._present.count(name)
                    raise InputError(f"{self._file.name}: column '{name}' ({field}) occurs {times} times; rename one")

        # Whether a nested value has the key of a dotted path is seen in the rows.
        self._seen = {name for name in self._seen if name in self._present or "*" in name}

    def _may_have(self, name: str) -> bool:
        return bool(needed_columns(self._present, [name]))

    def _note_keys(self, values: Mapping[str, Any]) -> None:
        for name in self._unseen:
            if look_up(values, name) is not ABSENT or self._expand(name, values):
                self._seen.add(name)
        self._unseen = [name for name in self._unseen if name not in self._seen]

        # What there is instead, for messages: the columns, and the keys beside the last one of a path.
        names = list(values)
        for name in self._unseen:
            head = name.rpartition(".")[0]
            if head and isinstance(inner := look_up(values, head), dict):
                names += [f"{head}.{key}" for key in inner]
        if len(self._present) < _NAMES_SHOWN:
            self._present += [name for name in names if name not in self._present]

    def _refuse_absent(self, *, is_whole: bool) -> None:
        """Raises InputError if a query or document has no column; in the only file, whole, for any absent column."""
        for field, names in self._names.items():
            absent = [name for name in names if name not in self._seen]
            is_lost = len(absent) == len(names) and field not in _OPTIONAL
            if absent and (is_lost or (is_whole and self._is_only)):
                raise self._no_column(field, absent[0])

    def _no_column(self, field: str, name: str) -> InputError:
        key = "where" if field == "where" else f"columns.{field}"
        message = f"{self._file.name}: no column '{name}' for {field}; it has: {self._names_shown()}"
        if field == _EXTRA:
            return InputError(message + closest(name, [name[:_NAME_CHARACTERS] for name in self._present]))
        advice = (
            f"Map it in the manifest: {key}"
            if field != "where"
            else "Text is put in single quotes, a name with signs in double quotes"
        )
        if self._file.format in ("csv", "tsv"):
            others = [sign for sign in ";\t|," if len(self._present) == 1 and sign in self._present[0]]
            advice += (
                f"; if fields end with {others[0]!r}: csv = {{ delimiter = {others[0]!r} }}"
                if others
                else "; if its first line names no columns: csv = { header = false }, and columns by number"
            )
        return InputError(f"{message}. {advice}")

    def _names_shown(self) -> str:
        return ", ".join(name[:_NAME_CHARACTERS] for name in self._present[:_NAMES_SHOWN])

    def _expand(self, name: str, values: Mapping[str, Any]) -> list[str]:
        """The columns that a pattern such as `negative_*` means, in the order of their numbers."""
        if "*" not in name or name in values:
            return []
        found = fnmatch.filter(values, name)
        return sorted(found, key=lambda key: [(len(part), part) for part in re.findall(r"\d+", key)])

    def _texts(self, field: str, record: Record) -> list[Any]:
        """The texts of a field; what is not a text comes out as it is."""
        values = record.values or {}
        names = self._names[field]
        if len(names) == 1 and isinstance(text := values.get(names[0]), str) and text:
            texts = [text]  # as most are
        elif field == "negatives":
            names = [key for name in names for key in self._expand(name, values) or [name]]
            texts = [text for name in names for text in _negatives_of(look_up(values, name))]
        else:
            found = [look_up(values, name) for name in names]
            cells = [None if value is ABSENT else value for value in found]
            texts = _texts_of(cells[0]) if len(cells) == 1 else _joined(cells)
        self._note(field, record.row, texts)
        return texts

    def _note(self, field: str, row: int, texts: list[Any]) -> None:
        judged = self._judged[field]
        for text in texts:
            if isinstance(text, str):
                judged.num_texts += 1
                if text[:1] in _MAY_BE_LIST and _is_list_as_text(text, field):
                    judged.num_lists += 1
                    judged.list_as_text = judged.list_as_text or (row, text)
            elif text is not None:
                judged.num_others += 1
                if judged.unusable is None and not _is_broken_text(text):
                    judged.unusable = (row, text)

    def _judge(self, *, is_whole: bool) -> None:
        """Raises InputError if a column of the file, or of its first part, cannot be what the manifest says."""
        if self._num_rows == 0:
            return
        self._refuse_absent(is_whole=is_whole)
        for field, judged in self._judged.items():
            name = ", ".join(self._names[field])
            if judged.unusable is not None and judged.num_texts == 0:
                row, value = judged.unusable
                wanted = "text, or a list of texts" if field == "negatives" else "text"
                kind = self._types.get(name) or _kind(value)
                raise InputError(
                    f"{self._file.name}: column '{name}' ({field}) is {kind}, expected {wanted}; "
                    f"row {row} has {value!r:.60}{_advice(name, value)}"
                )
            is_null = judged.num_texts + judged.num_others == 0 and field != "negatives"
            if is_null and is_whole and self._is_only:
                raise InputError(
                    f"{self._file.name}: column '{name}' ({field}) has no value in any of its {self._num_rows:,} rows. "
                    f"Map another one in the manifest: columns.{field}; it has: {self._names_shown()}"
                )
            if judged.list_as_text is not None and 2 * judged.num_lists > judged.num_texts:
                row, text = judged.list_as_text
                raise InputError(
                    f"{self._file.name}: column '{name}' ({field}) holds lists that were written as text; row {row} "
                    f"has {text!r:.60}. Write the data as JSON Lines or Parquet, which have lists, or with a column "
                    'for each text: columns.negatives = ["negative_1", "negative_2"]'
                )


def _texts_of(value: Any) -> list[Any]:
    """The texts of a cell; a value that is not one comes out as it is."""
    if isinstance(value, list | tuple):
        return [text for item in value for text in _texts_of(item)]
    if isinstance(value, dict) and "text" in value:
        return _joined([value.get("title"), value["text"]])
    return [value]


def _negatives_of(value: Any) -> list[Any]:
    """The texts of a cell of negatives. One that is empty has none, whereas in a list it counts as unusable."""
    if value is ABSENT or value is None or value == "":
        return []
    return _texts_of(value)


def _joined(parts: Sequence[Any]) -> list[Any]:
    """Joins the parts of a text with spaces; empty parts are left out. Lists are joined item by item."""
    lengths = {len(part) for part in parts if isinstance(part, list)}
    if len(lengths) > 1:
        return [tuple(parts)]  # which title goes with which text cannot be known
    if lengths:
        columns = [part if isinstance(part, list) else [part] * max(lengths) for part in parts]
        return [text for items in zip(*columns, strict=True) for text in _joined(items)]
    kept = [part for part in parts if part is not None and part != ""]
    if not all(isinstance(part, str) for part in kept):
        return [next(part for part in kept if not isinstance(part, str))]
    return [" ".join(kept) if kept else parts[-1]]


def _is_list_as_text(text: str, field: str) -> bool:
    return bool(_LIST_AS_TEXT.fullmatch(text) or (field == "negatives" and _OBJECTS_AS_TEXT.fullmatch(text)))


def _is_broken_text(value: Any) -> bool:
    """Whether bytes are a text that is not UTF-8, and not the value of a binary column."""
    if not isinstance(value, bytes):
        return False
    try:
        value.decode()
    except UnicodeDecodeError:
        return True
    return False


def _kind(value: Any) -> str:
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, tuple):
        return "lists of different lengths"
    return type(value).__name__


def _advice(name: str, value: Any) -> str:
    if not isinstance(value, dict):
        return ""
    keys = ", ".join(str(key)[:_NAME_CHARACTERS] for key in list(value)[:_NAMES_SHOWN])
    return f". Name the key that holds the text, for example '{name}.{next(iter(value), 'text')}'; it has: {keys}"
