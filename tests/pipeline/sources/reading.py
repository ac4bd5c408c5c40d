"""What the tests of sources share: one dataset in several formats, and reading it."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from hardbatch.pipeline.artifacts.files import DigestCache
from hardbatch.pipeline.config import Dataset, Reading
from hardbatch.pipeline.sources.files import RawRow, list_source_files
from hardbatch.pipeline.sources.rows import check_dataset, read_rows


def read_dataset(root: Path, source: Any = "*", counts: Counter[str] | None = None, **settings: Any) -> list[RawRow]:
    """All pairs of a dataset below `root`, judged as ingest does."""
    counts = Counter() if counts is None else counts
    dataset = Dataset(name="n", source=source, **settings)
    files = list_source_files(dataset, root, DigestCache(root.parent / ".digests.json"))
    reading = Reading(**{name: getattr(dataset, name) for name in Reading.model_fields})
    rows = [row for _, row in read_rows(files, range(len(files)), reading, root.parent / "scratch", counts)]
    counts["rows"] = len(rows)
    check_dataset("n", counts, reading, files)
    return rows


def write_as(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes rows as Parquet, as an Arrow stream or file (.feather), or as JSON Lines, by the name of the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return
    table = pa.Table.from_pylist(rows)
    if path.suffix == ".parquet":
        pq.write_table(table, path)
        return
    open_writer = pa.ipc.new_stream if path.suffix == ".arrow" else pa.ipc.new_file
    with pa.OSFile(str(path), "wb") as sink, open_writer(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


def pairs_of(rows: list[RawRow]) -> list[tuple[Any, Any]]:
    return [(row.query, row.document) for row in rows]
