"""Extra columns: values that the shards carry beside the texts, and the type of each column over a whole dataset.

A column holds texts, integers, numbers, true/false, or lists of one of these. Its type follows from the kinds
of all values that are read, whatever the format; integers and numbers together make numbers. CSV has texts
alone, so a text of CSV is of the kind that it can be read as, unless another value of the column says that it
is a text after all:

    0.5 in JSON, "1" in CSV         number            "007" in CSV, "1" in CSV     text (a leading zero is kept)
    1 in Parquet, "1" in JSON       refused           "" in CSV, 1 in JSON         null and integer
"""

from __future__ import annotations

import difflib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from typing import Any

import pyarrow as pa

from hardbatch.pipeline.errors import InputError
from hardbatch.pipeline.sources.files import SourceFile

_LIST_OF, _AS_TEXT = "list of ", " as text"
_KINDS = {str: "text", int: "integer", float: "number", bool: "true/false"}
_TYPES = {"text": pa.large_utf8(), "integer": pa.int64(), "number": pa.float64(), "true/false": pa.bool_()}
_ALLOWED = "an extra column holds text, integers, numbers, true/false, or lists of one of these"
_KIND = "kind "  # before a column, a kind and the first file that has it, in counts
_INTEGER = re.compile(r"-?(0|[1-9]\d{0,17})")  # what has leading zeros or more digits is an id
_NUMBER = re.compile(r"[+-]?((0|[1-9]\d*)(\.\d*)?|\.\d+)([eE][+-]?\d+)?")
_LIST_AS_TEXT = re.compile(r"\s*(array\(\[.*\].*\)|\[\s*([-+.\d'\"].*)?\])\s*", re.DOTALL)


class ExtraReader:
    """Takes the values of the extra columns out of the records of one file, and judges them.

    Args:
        file: The file, for messages.
        columns: The column of the file, or the path into nested values, by its name in the shards.
    """

    def __init__(self, file: SourceFile, columns: Mapping[str, str]) -> None:
        self._file = file
        self._columns = columns
        self._is_text = file.format in ("csv", "tsv")
        self._first: dict[str, dict[str, tuple[int, Any]]] = {name: {} for name in columns}
        self._num_texts, self._num_lists = Counter[str](), Counter[str]()
        self._list_as_text: dict[str, tuple[int, str]] = {}

    def read(self, row: int, found: Sequence[Any]) -> tuple[list[Any], str]:
        """Checks the values of a row.

        Args:
            row: The number of the row.
            found: Its values, in the order of the columns.

        Returns:
            The values as they are carried, and which of them is not UTF-8 (empty if all are).

        Raises:
            InputError: A value is of a kind that cannot be carried, or that does not go with the others.
        """
        values = [self._plain(value) for value in found]
        for name, value in zip(self._columns, values, strict=True):
            if not _is_utf_8(value):
                return [], f"{name}: {value!r}"
            for kind in sorted(self._kinds(value)):
                if kind not in self._first[name]:
                    self._first[name][kind] = (row, value)
                    self._check(name, kind)
            if isinstance(value, str):
                self._num_texts[name] += 1
                if value.lstrip()[:1] in ("[", "a") and _LIST_AS_TEXT.fullmatch(value):
                    self._num_lists[name] += 1
                    self._list_as_text.setdefault(name, (row, value))
        return values, ""

    def finish(self, counts: Counter[str]) -> None:
        """Adds the kinds of values in the whole file to `counts`, for `extra_schema`.

        Raises:
            InputError: Most values of a column are lists that were written as text.
        """
        for name, (row, text) in self._list_as_text.items():
            if 2 * self._num_lists[name] > self._num_texts[name]:
                raise InputError(
                    f"{self._file.name}: extra column '{name}' holds lists that were written as text; row {row} has "
                    f"{text!r:.60}. Write the data as JSON Lines or Parquet, which have lists"
                )
        for name, kinds in self._first.items():
            for kind in kinds:
                if not any(key.startswith(f"{_KIND}{name}\0{kind}\0") for key in counts):
                    counts[f"{_KIND}{name}\0{kind}\0{self._file.name}"] = 1

    def _plain(self, value: Any) -> Any:
        if isinstance(value, Decimal):
            return float(value)
        if isinstance(value, list | tuple):
            return [self._plain(item) for item in value]
        return None if value == "" and self._is_text else value

    def _kinds(self, value: Any) -> set[str]:
        """The kinds of a value: several for a list of integers and numbers, none for null."""
        if value is None:
            return set()
        if isinstance(value, list):
            return {f"{_LIST_OF}{kind}" for kind in {self._kind(item) for item in value}} or {f"{_LIST_OF}null"}
        return {self._kind(value)}

    def _kind(self, value: Any) -> str:
        if value is None:
            return "null"
        if self._is_text and isinstance(value, str):
            return _kind_as_text(value)
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            return "integer of more than 64 bits"
        return _KINDS.get(type(value)) or ("object" if isinstance(value, dict) else type(value).__name__)

    def _check(self, name: str, kind: str) -> None:
        """Raises InputError if a kind cannot be carried, or does not go with those before it."""
        kinds = self._first[name]
        row, value = kinds[kind]
        column = self._columns[name]
        if type_of([kind]) is None:
            advice = "; leave the column out, or write it as one of these"
            objects = [item for item in (value if isinstance(value, list) else [value]) if isinstance(item, dict)]
            if objects and objects[0]:
                names = [str(key) for key in objects[0]]
                advice = f". Name a key of the object, for example '{column}.{names[0]}'; it has: {', '.join(names)}"
            raise InputError(
                f"{self._file.name}: extra column '{name}' is {kind} in row {row}, which has {value!r:.60}; "
                f"{_ALLOWED}{advice}"
            )
        if type_of(kinds) is None:
            other = next(other for other in kinds if type_of([kind, other]) is None)
            raise InputError(
                f"{self._file.name}: extra column '{name}' is {other} in row {kinds[other][0]} "
                f"({kinds[other][1]!r:.40}), but {kind} in row {row} ({value!r:.40}); make its values one kind, "
                "or leave the column out"
            )


def type_of(kinds: Iterable[str]) -> pa.DataType | None:
    """The type of a column whose values are of these kinds, for example integer and number; None if there is none."""
    are_lists = {kind.startswith(_LIST_OF) for kind in kinds}
    leaves = {kind.removeprefix(_LIST_OF) for kind in kinds} - {"null"}
    plain = {kind.removesuffix(_AS_TEXT) for kind in leaves}
    leaf = None
    if not leaves:
        leaf = pa.null()
    elif plain == {"integer", "number"}:
        leaf = pa.float64()
    elif len(plain) == 1:
        leaf = _TYPES.get(*plain)
    elif all(kind == "text" or kind.endswith(_AS_TEXT) for kind in leaves):
        leaf = pa.large_utf8()
    if leaf is None or len(are_lists) > 1:
        return None
    return pa.list_(leaf) if True in are_lists else leaf


def kind_of(type_: pa.DataType) -> str:
    """What messages and the data card call a type."""
    if pa.types.is_list(type_):
        return f"{_LIST_OF}{kind_of(type_.value_type)}"
    return next((kind for kind, known in _TYPES.items() if known == type_), "null")


def extra_schema(counts: Counter[str], columns: Iterable[str], domain: str) -> pa.Schema:
    """The types of the extra columns over all files of a dataset.

    Args:
        counts: The counts of reading all files.
        columns: The names of the columns in the shards.
        domain: The dataset.

    Returns:
        A field for each column; its type is null if it has no value at all.

    Raises:
        InputError: The values of a column are of different kinds.
    """
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for key in counts:
        if key.startswith(_KIND):
            name, kind, file = key.removeprefix(_KIND).split("\0")
            found[name].setdefault(kind, file)
    types = {name: type_of(found[name]) for name in columns}
    for name, type_ in types.items():
        if type_ is None:
            where = ", ".join(f"{kind} in {file}" for kind, file in sorted(found[name].items()))
            raise InputError(
                f"dataset '{domain}': extra column '{name}' is {where}; make its values one kind, "
                "or leave the column out"
            )
    return pa.schema(list(types.items()))


def joined_schema(schemas: Mapping[str, pa.Schema]) -> pa.Schema:
    """The extra columns of all domains, by name.

    Args:
        schemas: Those of each domain.

    Raises:
        InputError: A column is of different types in two domains.
    """
    found: dict[str, dict[str, str]] = defaultdict(dict)  # column → kind → the first domain that has it
    for domain, schema in schemas.items():
        for field in schema:
            found[field.name].setdefault(kind_of(field.type), domain)
    types = {name: type_of(set(kinds) - {"null"}) for name, kinds in sorted(found.items())}
    for name, type_ in types.items():
        if type_ is None:
            where = ", ".join(f"{kind} in dataset '{domain}'" for kind, domain in found[name].items())
            raise InputError(
                f"extra column '{name}' is {where}; give one of them another name, "
                f'for example extra_columns = {{ {name}_2 = "{name}" }}'
            )
    return pa.schema(list(types.items()))


def as_array(values: Sequence[Any], type_: pa.DataType) -> pa.Array:
    """Values as an array of a type that `type_of` gave for their kinds."""
    if pa.types.is_list(type_):
        is_number = type_.value_type == pa.float64()
        lists = [_floats(value) if is_number and value is not None else value for value in values]
        return pa.array(lists, type_)
    if type_ == pa.bool_():
        values = [value.strip().lower() == "true" if isinstance(value, str) else value for value in values]
    elif type_ == pa.int64():
        values = [None if value is None else int(value) for value in values]
    elif type_ == pa.float64():
        values = _floats(values)
    return pa.array(values, type_)


def closest(name: str, present: Sequence[str]) -> str:
    """The end of a message about an absent column: which one of those that are there was probably meant."""
    found = difflib.get_close_matches(name, present, n=1)
    return f". Did you mean '{found[0]}'?" if found else ". Fix extra_columns, or leave it out"


def _floats(values: Sequence[Any]) -> list[float | None]:
    return [None if value is None else float(value) for value in values]


def _kind_as_text(text: str) -> str:
    """The kind that a text of CSV can be read as."""
    text = text.strip()
    if _INTEGER.fullmatch(text):
        return f"integer{_AS_TEXT}"
    if _NUMBER.fullmatch(text):
        return f"number{_AS_TEXT}" if not text.lstrip("+-").isdigit() else "text"
    return f"true/false{_AS_TEXT}" if text.lower() in ("true", "false") else "text"


def _is_utf_8(value: Any) -> bool:
    """Whether all texts of a value can be written; bytes that are UTF-8 are the value of a binary column."""
    if isinstance(value, list):
        return all(map(_is_utf_8, value))
    try:
        if isinstance(value, bytes):
            value.decode()
        elif isinstance(value, str) and not value.isascii():
            value.encode()
    except UnicodeError:
        return False
    return True
