"""The first rows of a remote file as a local file, so that looking at data does not fetch all of it."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from hardbatch.pipeline.artifacts.compressed import BROKEN, open_decompressed
from hardbatch.pipeline.errors import UnreachableError, first_line
from hardbatch.pipeline.sources.files import SourceFile

_HEAD_BYTES = 2**23
_DECOMPRESSED_BYTES = 2**26
_CHUNK_BYTES = 2**16
_BYTES_PER_READ = 2**20


def fetch_head(file: SourceFile, scratch: Path, num_rows: int) -> SourceFile:
    """Fetches the beginning of a file, if it is remote.

    Args:
        file: A source file, local or remote.
        scratch: The folder that its beginning is written to.
        num_rows: How many rows are needed of a table. Of a text format, the first 8 MiB are fetched.

    Returns:
        The file, with a local copy of its beginning as its location. It is a copy of the whole file if that is small,
        or of a format that cannot be cut: an array of JSON, or a table whose parts the server does not give.

    Raises:
        UnreachableError: The file cannot be fetched.
    """
    if "://" not in file.location:
        return file
    import fsspec

    copy = scratch / "head"
    try:
        filesystem, path = fsspec.core.url_to_fs(file.location)
        if file.format in ("parquet", "arrow"):
            is_cut = _copy_rows(file.format, filesystem, path, copy, num_rows)
        else:
            copy.write_bytes(filesystem.cat_file(path, start=0, end=_HEAD_BYTES + 1))
            is_cut = copy.stat().st_size <= _HEAD_BYTES or _cut(copy)
        if not is_cut:
            filesystem.get_file(path, str(copy))
    except Exception as error:  # every filesystem has its own errors
        raise UnreachableError(f"{file.name}: cannot be fetched: {first_line(error)}") from None
    return file._replace(location=str(copy))


def _copy_rows(format_: str, filesystem: Any, path: str, copy: Path, num_rows: int) -> bool:
    """Copies the first rows of a table; False if it cannot be read in part."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with filesystem.open(path) as source:
            if format_ == "parquet":
                parquet = pq.ParquetFile(source, pre_buffer=False, buffer_size=_BYTES_PER_READ)
                schema, batches = parquet.schema_arrow, parquet.iter_batches(batch_size=min(num_rows, 1_000))
                with pq.ParquetWriter(copy, schema) as writer:
                    return _write_rows(writer, batches, num_rows)
            is_file = source.read(6) == b"ARROW1"
            source.seek(0)
            reader = pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source)
            numbers = range(reader.num_record_batches) if is_file else ()
            batches = (reader.get_batch(number) for number in numbers) if is_file else reader
            with pa.ipc.new_file(str(copy), reader.schema) as writer:
                return _write_rows(writer, batches, num_rows)
    except (pa.ArrowException, OSError, ValueError):
        return False


def _write_rows(writer: Any, batches: Any, num_rows: int) -> bool:
    for batch in batches:
        writer.write_batch(batch)
        num_rows -= batch.num_rows
        if num_rows <= 0:
            break
    return True


def _cut(copy: Path) -> bool:
    """Puts the whole lines of a cut-off text file in its place, decompressed; False if it is an array of JSON."""
    text = bytearray()
    with open_decompressed(copy) as stream, suppress(*BROKEN):
        while len(text) < _DECOMPRESSED_BYTES and (chunk := stream.read(_CHUNK_BYTES)):
            text += chunk
    if text.lstrip()[:1] == b"[":
        return False

    # A line break with an odd number of quotes before it is in a quoted field of CSV.
    end = whole = text.rfind(b"\n") + 1
    num_quotes = text.count(b'"', 0, end)
    while end and num_quotes % 2:
        before = text.rfind(b"\n", 0, end - 1) + 1
        num_quotes -= text.count(b'"', before, end)
        end = before
    copy.write_bytes(text[: end or whole])
    return True
