"""Reads source files row by row.

Reading never repairs and never drops: a row that cannot be read comes out with a problem, and ingest quarantines it.
A file that cannot be read at all raises InputError.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hardbatch.pipeline.artifacts.files import as_user_error, content_key, sha256_file
from hardbatch.pipeline.config import Columns
from hardbatch.pipeline.errors import InputError, UnreachableError, first_line
from hardbatch.pipeline.sources.files import RawRow, SourceFile, mapped_columns
from hardbatch.pipeline.sources.text import read_csv, read_jsonl

_ROWS_PER_READ = 4_096
_BYTES_PER_READ = 2**20
_LFS_POINTER = b"version https://git-lfs"


def read_rows(file: SourceFile, columns: Columns, scratch: Path) -> Iterator[RawRow]:
    """Reads the rows of a source file, numbered from 0 (for python sources: the line of the function).

    Args:
        file: The file.
        columns: The columns that hold query, document and hard negatives.
        scratch: The folder that a remote file is copied to while it is read.

    Raises:
        InputError: The file as a whole is broken: it has another format than it claims, is cut off or empty, does not
            have the columns, or was changed since it was planned with. The message names the file and the row.
        UnreachableError: A remote file cannot be fetched.
    """
    yield from _read_format(file, columns, scratch)
    _refuse_if_changed(file)


def _refuse_if_changed(file: SourceFile) -> None:
    """Raises InputError if a local file was changed: its rows are filed under the digest of the bytes at planning."""
    if file.modified_ns is None:
        return
    try:
        stat = Path(file.location).stat()
        changed = (stat.st_size, stat.st_mtime_ns) != (file.num_bytes, file.modified_ns)
    except OSError:
        changed = True
    if changed:
        raise InputError(f"{file.name}: was changed while it was read; run again once nothing writes to it")


def _read_format(file: SourceFile, columns: Columns, scratch: Path) -> Iterator[RawRow]:
    if file.format == "python":
        from hardbatch.pipeline.sources.python import read_functions

        yield from (RawRow(*row, None) for row in read_functions(Path(file.location)))
        return
    with _local_copy(file, scratch) as path:
        try:
            size = path.stat().st_size
        except OSError as error:
            raise InputError(f"{file.name}: cannot be read any more: {error.strerror}") from None
        if size == 0:
            raise InputError(f"{file.name}: the file is empty (0 bytes); remove it from the manifest or fetch it again")
        _refuse_other_kind(file, path)
        if file.format == "parquet":
            yield from _read_parquet(file, path, columns)
        elif file.format == "jsonl":
            yield from read_jsonl(file, path, columns)
        else:
            yield from read_csv(file, path, columns, "\t" if file.format == "tsv" else ",")


def evaluation_texts(folder: Path) -> Iterator[str]:
    """The texts of an evaluation folder: its queries, and its documents both with and without their titles.

    Raises:
        InputError: corpus.parquet or queries.parquet is not there, or has no column `text` of texts.
    """
    for name in ("corpus", "queries"):
        for batch in read_columns(folder / f"{name}.parquet", ["text"], optional=["title"]):
            for row in batch.to_pylist():
                text = row["text"] or ""
                yield text
                if row.get("title"):
                    yield f"{row['title']} {text}"


def read_columns(path: Path, columns: Sequence[str], optional: Sequence[str] = ()) -> Iterator[Any]:
    """Reads columns of texts from a table of an evaluation folder, a record batch at a time.

    Args:
        path: A Parquet file.
        columns: Columns that it must have.
        optional: Columns that are read if it has them.

    Raises:
        InputError: The file cannot be read, or a column is missing or holds something else than valid texts.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        schema = file.schema_arrow
        for name in columns:
            if name not in schema.names:
                raise InputError(f"{path}: no column '{name}'; it has: {', '.join(schema.names)}")
            if not _is_text(schema.field(name).type):
                raise InputError(f"{path}: column '{name}' is {schema.field(name).type}, expected text")
        for batch in file.iter_batches(columns=[*columns, *(name for name in optional if name in schema.names)]):
            batch.validate(full=True)  # else invalid UTF-8 is found only by whoever uses the texts
            yield batch
    except (pa.ArrowException, OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as Parquet: {first_line(error)}") from None


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
    with path.open("rb") as stream:
        start = stream.read(len(_LFS_POINTER))
    if start == _LFS_POINTER:
        raise InputError(f"{file.name}: is a Git LFS pointer, not the file it stands for; fetch that: git lfs pull")
    if start.startswith(b"PAR1") and file.format != "parquet":
        raise InputError(
            f"{file.name}: is a Parquet file, read as {file.format}; rename it to .parquet, or fix `format`"
        )


def _read_parquet(file: SourceFile, path: Path, columns: Columns) -> Iterator[RawRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        parquet = pq.ParquetFile(path, pre_buffer=False, buffer_size=_BYTES_PER_READ)  # else it reads whole row groups
        schema = parquet.schema_arrow
        known = schema.names
    except (pa.ArrowException, OSError, ValueError) as error:
        raise InputError(f"{file.name}: is not a readable Parquet file: {first_line(error)}") from None
    mapped = mapped_columns(file, columns, known)
    for field, name in mapped.items():
        kind = schema.field(name).type
        if not (_is_text(kind) or (field == "negatives" and (_is_text_list(kind) or pa.types.is_null(kind)))):
            wanted = "a list of texts, or text" if field == "negatives" else "text"
            raise InputError(f"{file.name}: column '{name}' ({field}) is {kind}, expected {wanted}")

    names = list(dict.fromkeys(mapped.values()))  # two fields may share a column
    row = 0
    try:
        for batch in parquet.iter_batches(batch_size=_ROWS_PER_READ, columns=names):
            values = {field: _to_python(batch.column(name)) for field, name in mapped.items()}
            values.setdefault("negatives", [None] * batch.num_rows)
            for fields in zip(values["query"], values["document"], values["negatives"], strict=True):
                yield RawRow(row, *fields)
                row += 1
    except (pa.ArrowException, OSError, ValueError) as error:
        raise InputError(f"{file.name}: broken after row {row}: {first_line(error)}") from None
    if row != parquet.metadata.num_rows:
        raise InputError(f"{file.name}: broken: {row} rows could be read, its footer says {parquet.metadata.num_rows}")


def _to_python(column: Any) -> list[Any]:
    """The values of an Arrow column; texts that are not UTF-8 come out as bytes."""
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:
        if _is_text_list(column.type):
            return [_to_python(item.values) if item.is_valid else None for item in column]
        raw = column.cast(pa.large_binary() if pa.types.is_large_string(column.type) else pa.binary())
        return [_decode(value) for value in raw.to_pylist()]


def _decode(value: bytes | None) -> str | bytes | None:
    if value is None:
        return None
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        return value


def _is_text(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _is_text_list(kind: Any) -> bool:
    import pyarrow as pa

    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return bool(is_list and _is_text(kind.value_type))
