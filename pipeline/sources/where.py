"""The condition on rows, `where`: a SQL expression that polars evaluates.

Formats differ in what a number is: a label is `1` in Parquet, `1` or `"1"` in JSON, and always a text in
CSV. So that a condition means the same everywhere, each row is read by the kinds of its own values: a text
that looks like a number is one, unless the expression only makes sense with texts. What a row's neighbours
hold changes nothing.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from datetime import date, datetime
from decimal import Decimal
from itertools import islice, product
from typing import Any

from hardbatch.pipeline.errors import ConfigError, InputError, first_line
from hardbatch.pipeline.sources.columns import ABSENT, Record, look_up, note_seen

_BLOCK_ROWS = 1_024
_NUMBER = re.compile(r"\s*[+-]?\d+(\.\d*)?([eE][+-]?\d+)?\s*")
_TOKENS = re.compile(r"('(?:[^']|'')*'|\"[^\"]*\")|([A-Za-z_]\w*(?:\.\w+)+)|(\d+)\.\d+")

# What an expression over several rows has in its tree, such as AVG(score): blocks of rows would change its result.
_OVER_ROWS = ('"Agg":', '"Over":', '"Window":', '"expr":"Len"')

# The types to try for each kind of value. The first with which the expression makes sense is taken.
_TYPES = {
    "null": ("String", "Float64", "Boolean", "List"),
    "bool": ("Boolean", "Float64", "String"),
    "int": ("Int64", "String", "Boolean"),
    "float": ("Float64", "String", "Boolean"),
    "text": ("String", "Float64", "Boolean"),
    "nested": ("",),
}


class Where:
    """A condition on rows.

    Args:
        sql: The expression, for example `label = 1 AND meta.lang = 'en'`.

    Raises:
        ConfigError: It is not an expression over the columns of one row.
    """

    def __init__(self, sql: str) -> None:
        import polars as pl

        self._sql = sql

        # A dotted path is one column here. Polars compares texts with fractions as texts, but refuses to compare
        # them with whole numbers, so whether types make sense is tried on an expression of whole numbers.
        quoted = _TOKENS.sub(lambda found: f'"{found[2]}"' if found[2] else found[0], sql)
        whole = _TOKENS.sub(lambda found: found[3] or found[0], quoted)
        try:
            self._expression, self._probe = pl.sql_expr(quoted), pl.sql_expr(whole)
            names = self._expression.meta.root_names()
            tree = self._expression.meta.serialize(format="json")
        except pl.exceptions.PolarsError as error:
            raise ConfigError(f"where: {sql!r} is not a SQL condition: {first_line(error)}") from None
        if not names or any(key in tree for key in _OVER_ROWS):
            raise ConfigError(f'where: {sql!r} must be a condition on the columns of one row, such as "label = 1"')
        self.columns = list(dict.fromkeys(names))
        self._known: dict[tuple[str, ...], tuple[str, ...]] = {}

    def select(self, records: Iterator[Record], file: str, counts: Counter[str]) -> Iterator[Record]:
        """The records that meet the condition, and those that could not be read; counts the others."""
        seen: set[str] = set()
        while block := list(islice(records, _BLOCK_ROWS)):
            kept = self._met(block, file, seen)
            note_seen(counts, sorted(seen))  # now, as a limit may end the reading at any row
            counts["rows_filtered"] += len(block) - sum(kept)
            yield from (record for record, keep in zip(block, kept, strict=True) if keep)

    def _met(self, block: list[Record], file: str, seen: set[str]) -> list[bool]:
        kept = [record.values is None for record in block]
        groups: dict[tuple[str, ...], list[tuple[int, list[Any]]]] = defaultdict(list)
        for index, record in enumerate(block):
            if record.values is not None:
                found = [look_up(record.values, name) for name in self.columns]
                seen.update(name for name, value in zip(self.columns, found, strict=True) if value is not ABSENT)
                read = [_read(value) for value in found]
                groups[tuple(kind for kind, _ in read)].append((index, [value for _, value in read]))
        for kinds, rows in groups.items():
            for (index, _), keep in zip(rows, self._evaluate(kinds, rows, block, file), strict=True):
                kept[index] = keep
        return kept

    def _evaluate(
        self, kinds: tuple[str, ...], rows: list[tuple[int, list[Any]]], block: list[Record], file: str
    ) -> list[bool]:
        """Whether each row of one combination of kinds meets the condition; null counts as no."""
        import polars as pl

        known = [self._known[kinds]] if kinds in self._known else []
        problem: Exception | None = None
        for types in (*known, *product(*(_TYPES[kind] for kind in kinds))):
            columns = [
                pl.Series(name, [_cast(values[i], type_) for _, values in rows], getattr(pl, type_, None), strict=False)
                for i, (name, type_) in enumerate(zip(self.columns, types, strict=True))
            ]
            try:
                frame = pl.DataFrame(columns)
                frame.select(self._probe)
                met = frame.select(self._expression).to_series()
            except pl.exceptions.PolarsError as error:
                problem = problem or error
                continue
            if met.dtype in (pl.Boolean, pl.Null):
                self._known[kinds] = types
                return [value is True for value in met.to_list()]
        row = block[rows[0][0]].row
        reason = first_line(problem) if problem else "its result is neither true nor false"
        raise InputError(f"{file}: row {row}: where {self._sql!r} cannot be evaluated: {reason}")


def _read(value: Any) -> tuple[str, Any]:
    """The kind of a value, and the value."""
    if value is None or value is ABSENT:
        return "null", None
    if isinstance(value, bool):
        return "bool", value
    if isinstance(value, date | datetime | bytes):
        return "text", str(value)
    if isinstance(value, str | int | float | Decimal):
        if isinstance(value, str) and not _NUMBER.fullmatch(value):
            return "text", value
        return ("int" if isinstance(_number(value), int) else "float"), value
    return "nested", value


def _number(value: Any) -> int | float | None:
    if isinstance(value, str) and not _NUMBER.fullmatch(value):
        return None
    try:
        whole = int(value) if isinstance(value, str | int) else None
    except ValueError:  # a text with a fraction, or of thousands of digits
        whole = None
    return whole if whole is not None and -(2**63) <= whole < 2**63 else float(value)


def _cast(value: Any, type_: str) -> Any:
    """`value` as a type of polars, or None if it is not one."""
    if value is None or not type_:
        return value
    if type_ == "String":
        return str(value).lower() if isinstance(value, bool) else str(value)
    if type_ == "Boolean":
        if str(value).lower() in ("true", "false"):
            return str(value).lower() == "true"
        number = _number(value)
        return bool(number) if number in (0, 1) else None
    return _number(value)
