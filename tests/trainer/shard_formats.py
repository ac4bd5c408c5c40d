"""Shards of other formats, and of other same-answer positives, made of those that the pipeline wrote."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from hardbatch.pipeline.artifacts.artifact import MANIFEST
from hardbatch.pipeline.artifacts.files import sha256_file, sha256_outside
from hardbatch.pipeline.artifacts.footer import record_ranges, row_group_ranges
from tests.reliability.workspaces import rewrite_manifest


def rewrite_index(shards: Path, index: pl.DataFrame, **changes: Any) -> None:
    """Another index; the manifest gets its digest and size and those of the parts, and `changes`."""

    def change(content: dict[str, Any]) -> None:
        for name in ("index.parquet", *index["file"].unique()):
            if (shards / name).is_file() and name in content["files"]:
                content["files"][name] |= {
                    "sha256": sha256_file(shards / name),
                    "bytes": (shards / name).stat().st_size,
                }
        content.update(changes)

    index.write_parquet(shards / "index.parquet")
    rewrite_manifest(shards / MANIFEST, change)


def make_version_1(shards: Path) -> None:
    """The shards as format version 1 had them."""
    write_positive_slots(shards, None)
    index = pl.read_parquet(shards / "index.parquet")
    rewrite_index(shards, index.drop("footer_sha256", "record_offset", "record_length"), format_version=1)


def write_positive_slots(shards: Path, slots: list[list[int]] | None) -> None:
    """Gives every batch the same positive slots, in format version 3; None makes version 2, which has none."""
    index = pl.read_parquet(shards / "index.parquet").drop("same_answer_rate", strict=False)
    parts = []
    for (name,), rows in index.group_by("file", maintain_order=True):
        path = shards / str(name)
        _rewrite_part(path, slots)
        ranges = row_group_ranges(path)
        data = path.read_bytes()
        columns = {
            "byte_offset": [offset for offset, _ in ranges],
            "byte_length": [length for _, length in ranges],
            "sha256": [hashlib.sha256(data[offset : offset + length]).hexdigest() for offset, length in ranges],
            "footer_sha256": sha256_outside(path, ranges),
            "record_offset": [offset for offset, _ in record_ranges(path)],
            "record_length": [length for _, length in record_ranges(path)],
        }
        parts.append(
            rows.with_columns(
                **{
                    key: pl.lit(pl.Series(value)) if isinstance(value, list) else pl.lit(value)
                    for key, value in columns.items()
                }
            )
        )
    index = pl.concat(parts)
    if slots is not None:
        size = len(slots)
        index = index.with_columns(same_answer_rate=pl.lit(sum(map(len, slots)) / (size * (size - 1))))
    rewrite_index(shards, index, format_version=2 if slots is None else 3)


def _rewrite_part(path: Path, slots: list[list[int]] | None) -> None:
    file = pq.ParquetFile(path)
    batches = [file.read_row_group(number) for number in range(file.num_row_groups)]
    if "positive_slots" in batches[0].column_names:
        batches = [batch.drop_columns("positive_slots") for batch in batches]
    if slots is not None:
        column = pa.array(slots, pa.list_(pa.uint16()))
        batches = [batch.append_column("positive_slots", column) for batch in batches]
    with pq.ParquetWriter(path, batches[0].schema) as writer:
        for batch in batches:
            writer.write_table(batch)
