"""Reads source files row by row.

Reading never repairs and never drops: a row that cannot be read comes out with a problem, and ingest quarantines it.
A file that cannot be read at all raises InputError.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from hardbatch.pipeline.artifacts.collection import TITLE, corpus_files, queries_files, read_batches
from hardbatch.pipeline.artifacts.files import as_user_error, content_key, sha256_file
from hardbatch.pipeline.config import Column, Reading
from hardbatch.pipeline.errors import InputError, UnreachableError, first_line
from hardbatch.pipeline.sources.columns import PairReader, Record, Table, check_columns
from hardbatch.pipeline.sources.files import RawRow, SourceFile, state_of
from hardbatch.pipeline.sources.where import Where

_LFS_POINTER = b"version https://git-lfs"
_MAGIC = {b"PAR1": "parquet", b"ARROW1": "arrow", b"\xff\xff\xff\xff": "arrow"}


def read_rows(
    files: Sequence[SourceFile], numbers: range, reading: Reading, scratch: Path, counts: Counter[str]
) -> Iterator[tuple[int, RawRow]]:
    """Reads the rows of some files of a dataset as pairs.

    A row that holds several queries or documents comes out as several pairs of one number. Which rows
    are read follows in this order: those that meet `where`, the first `limit` of them, a `sample` of these.

    Args:
        files: All files of the dataset.
        numbers: Which of them to read; all of them, if there is a limit or a sample.
        reading: How to read them.
        scratch: The folder that a remote file is copied to while it is read.
        counts: Is added to: `rows_filtered`, and the columns that occur, for `check_columns`.

    Yields:
        The file's number, and a pair. Rows are numbered from 0 (for python sources: the line of the function).

    Raises:
        InputError: A file as a whole is broken: it has another format than it claims, is cut off or empty, does not
            have the columns, or was changed since it was planned with. The message names the file and the row.
        UnreachableError: A remote file cannot be fetched.
    """
    groups = _read_groups(files, numbers, reading, scratch, counts)
    if reading.sample is not None:
        total = sum(1 for _ in _read_groups(files, numbers, reading, scratch, Counter()))
        groups = _sampled(groups, total, reading.sample, reading.sample_seed)
    for number, pairs in groups:
        for pair in pairs:
            yield number, pair


def _sampled(groups: Iterator[Any], total: int, size: int, seed: int) -> Iterator[Any]:
    """Draws `size` of `total` groups; they keep their order. Holds their numbers alone, so it needs `total`."""
    drawn = np.zeros(total, bool)
    drawn[np.random.default_rng(seed).choice(total, min(size, total), replace=False)] = True
    return (group for place, group in enumerate(groups) if place < total and drawn[place])


def _read_groups(
    files: Sequence[SourceFile], numbers: range, reading: Reading, scratch: Path, counts: Counter[str]
) -> Iterator[tuple[int, list[RawRow]]]:
    """(file's number, the pairs of a row) for each row that is read."""
    left = reading.limit
    for number in numbers:
        for pairs in _read_file(files[number], reading, scratch, counts, left, is_only=len(files) == 1):
            yield number, pairs
            left = None if left is None else left - 1
        if left == 0:
            return


def _read_file(
    file: SourceFile, reading: Reading, scratch: Path, counts: Counter[str], limit: int | None, *, is_only: bool
) -> Iterator[list[RawRow]]:
    where = Where(reading.where) if reading.where is not None else None
    names = where.columns if where else []
    with open_table(file, reading, scratch) as table:
        pairs = PairReader(file, reading, names, table.columns, is_only=is_only)
        records = table.records if where is None else where.select(table.records, file.name, counts)
        for record in islice(records, limit):
            yield pairs.rows(record)
    pairs.finish(counts)
    _refuse_if_changed(file)


def check_dataset(name: str, counts: Counter[str], reading: Reading, files: Sequence[SourceFile]) -> None:
    """Refuses a dataset none of whose files has a column that `reading` names, or of which no row is read.

    Args:
        name: The dataset.
        counts: The counts of reading all files: `rows`, and what `read_rows` added. The names of columns are taken out.
        reading: How they were read.
        files: The files.

    Raises:
        InputError: Names the column, or says why there are no rows.
    """
    check_columns(counts, reading, _where_columns(reading), files)
    if counts["rows"] == 0:
        names = ", ".join(file.name for file in files[:5])
        if filtered := counts["rows_filtered"]:
            raise InputError(
                f"dataset '{name}': none of {filtered} rows in {names} meets where {reading.where!r}; fix it"
            )
        raise InputError(f"dataset '{name}': no rows in {names}; check the source, or remove the dataset")


def _where_columns(reading: Reading) -> list[str]:
    return Where(reading.where).columns if reading.where is not None else []


@contextmanager
def open_table(file: SourceFile, reading: Reading, scratch: Path) -> Iterator[Table]:
    """Opens a source file of any format.

    Args:
        file: The file.
        reading: How to read it. Of a Parquet or Arrow file only the columns that it names are read.
        scratch: The folder that a remote file is copied to while it is open.

    Raises:
        InputError: The file is broken, empty, or of another format than it claims.
        UnreachableError: A remote file cannot be fetched.
    """
    if file.format == "python":
        from hardbatch.pipeline.sources.python import read_functions

        functions = read_functions(Path(file.location))
        records = (Record(row, {"query": query, "document": document}) for row, query, document in functions)
        yield Table([("query", "text"), ("document", "text")], records)
        return
    if file.format == "collection":
        from hardbatch.pipeline.sources.collection import open_collection

        yield open_collection(file, scratch)
        return
    with _local_copy(file, scratch) as path:
        _refuse_other_kind(file, path)
        yield _open_format(file, path, reading)


def _open_format(file: SourceFile, path: Path, reading: Reading) -> Table:
    wanted: list[Column] = [
        name for field in ("query", "document", "negatives") for name in reading.columns.names(field)
    ]
    wanted += reading.extra_columns.values()
    if file.format in ("parquet", "arrow"):
        from hardbatch.pipeline.sources import tables

        wanted += _where_columns(reading)
        return (tables.open_parquet if file.format == "parquet" else tables.open_arrow)(file, path, wanted)

    from hardbatch.pipeline.sources import text

    if file.format == "jsonl":
        return text.open_jsonl(file, path, wanted, reading.encoding)
    return text.open_csv(file, path, reading.csv, reading.encoding)


def _refuse_if_changed(file: SourceFile) -> None:
    """Raises InputError if a local file was changed: its rows are filed under the digest of the bytes at planning."""
    if file.modified_ns is None:
        return
    try:
        changed = state_of(file) != (file.num_bytes, file.modified_ns)
    except (OSError, InputError):
        changed = True
    if changed:
        raise InputError(f"{file.name}: was changed while it was read; run again once nothing writes to it")


def evaluation_texts(folder: Path) -> Iterator[str]:
    """The texts of a collection: its queries, and its documents both with and without their titles.

    Raises:
        InputError: It has no documents or queries, or their column `text` does not hold texts.
    """
    for path in (*corpus_files(folder), *queries_files(folder)):
        for batch in read_batches(path, {"text": ()}, TITLE):
            for row in batch.to_pylist():
                text = row["text"] or ""
                yield text
                if row.get("title"):
                    yield f"{row['title']} {text}"


@contextmanager
def _local_copy(file: SourceFile, scratch: Path) -> Iterator[Path]:
    if "://" not in file.location:
        yield Path(file.location)
        return
    import fsspec

    scratch.mkdir(parents=True, exist_ok=True)
    copy = scratch / f".{content_key(location=file.location)}.tmp"
    try:
        try:
            filesystem, path = fsspec.core.url_to_fs(file.location)
            filesystem.get_file(path, str(copy))
        except Exception as error:  # every filesystem has its own errors; a full disk of ours stays what it is
            if isinstance(error, OSError) and as_user_error(error):
                raise
            raise UnreachableError(f"{file.name}: cannot be fetched: {first_line(error)}") from None
        if len(file.sha256) == 64 and sha256_file(copy) != file.sha256:
            raise InputError(f"{file.name}: its bytes are not those of the sha256 in the manifest, {file.sha256}")
        yield copy
    finally:
        copy.unlink(missing_ok=True)


def _refuse_other_kind(file: SourceFile, path: Path) -> None:
    """Raises InputError if the first bytes of the file say that it cannot be of its format."""
    try:
        with path.open("rb") as stream:
            start = stream.read(len(_LFS_POINTER))
    except OSError as error:
        raise InputError(f"{file.name}: cannot be read any more: {error.strerror}") from None
    if not start:
        raise InputError(f"{file.name}: the file is empty (0 bytes); remove it from the manifest or fetch it again")
    if start == _LFS_POINTER:
        raise InputError(f"{file.name}: is a Git LFS pointer, not the file it stands for; fetch that: git lfs pull")
    for magic, format_ in _MAGIC.items():
        if start.startswith(magic) and file.format != format_:
            kind = format_.capitalize()
            raise InputError(
                f"{file.name}: is {'an' if kind == 'Arrow' else 'a'} {kind} file, read as {file.format}; "
                f"rename it to .{format_}, or fix `format`"
            )
