"""relate: the texts of a domain → the classes of those that say the same, a side at a time."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hardbatch.pipeline import schemas
from hardbatch.pipeline.arrays import Array, trim_heap
from hardbatch.pipeline.artifacts.artifact import Artifact, read_artifact
from hardbatch.pipeline.artifacts.commit import ArtifactBuilder, write_unit
from hardbatch.pipeline.artifacts.vectors import Texts, load_pairs, write_array
from hardbatch.pipeline.batching.copies import KINDS, Copies, find_copies, no_copies
from hardbatch.pipeline.step import Executor, Progress, StageResult, Step

_TEXTS_PER_READ = 8_192


def build(step: Step, builder: ArtifactBuilder, executor: Executor, progress: Progress) -> StageResult:
    """Builds the `answers` artifact of one domain; a unit is one side.

    Its counts say of each side how many texts and classes there are, how many joins of each kind, and how
    many pairs the largest class has: a batch that holds several of these loses negatives.
    """
    pairs = read_artifact(step.inputs["pairs"])
    texts = {side: Texts(pairs, side) for side in schemas.SIDES}
    progress.start(f"relate {step.domain}, texts", sum(side.num_rows for side in texts.values()))
    for side in schemas.SIDES:
        if not builder.committed(side):
            copies = no_copies(texts[side].num_rows)
            if step.config["near_copies"]:
                copies = find_copies(_blocks(texts[side], progress))
            _write(builder, side, copies)
            del copies
            trim_heap()
    progress.finish()

    counts: dict[str, Any] = {"pairs": pairs.manifest.counts["pairs"]}
    for side in schemas.SIDES:
        counts[side] = builder.unit_record(side).counts | {"largest_class_pairs": _largest(builder, pairs, side)}
    versions = {name: importlib.metadata.version(name) for name in ("numpy", "rensa", "scipy")}
    return StageResult(units=list(schemas.SIDES), counts=counts, produced_with=versions)


def _blocks(texts: Texts, progress: Progress) -> Iterator[list[str]]:
    for start in range(0, texts.num_rows, _TEXTS_PER_READ):
        rows = np.arange(start, min(start + _TEXTS_PER_READ, texts.num_rows))
        yield texts.take(rows)
        progress.advance(len(rows))


def _write(builder: ArtifactBuilder, side: str, copies: Copies) -> None:
    joins = copies.joins
    with write_unit(builder.path, side) as writer:
        write_array(writer.add_file(f"{side}.npy", rows=len(copies.text_class)), copies.text_class)
        table = pa.table(
            {
                "row": joins.row,
                "other_row": joins.other_row,
                "kind": np.array(KINDS, dtype=object)[joins.kind],
                "overlap": joins.overlap,
            },
            schema=schemas.JOINS,
        )
        pq.write_table(table, writer.add_file(f"{side}-joins.parquet", rows=len(table)), compression="zstd")
        found = np.bincount(joins.kind, minlength=len(KINDS)).tolist()
        writer.counts = {
            "texts": len(copies.text_class),
            "classes": int(copies.text_class.max(initial=-1)) + 1,
            "joins": dict(zip(KINDS, found, strict=True)),
        }


def _largest(builder: ArtifactBuilder, pairs: Artifact, side: str) -> int:
    """The number of pairs of the class that has most of them; 0 if there are no pairs."""
    known = load_pairs(pairs)
    rows = known.query_row if side == "queries" else known.document_row
    text_class: Array = np.load(builder.path / f"{side}.npy")
    return int(np.bincount(text_class[rows]).max(initial=0))
