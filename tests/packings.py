"""Shards of several packings for tests, put together from runs that differ in how they pack."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hardbatch.pipeline.artifacts.artifact import read_artifact
from hardbatch.pipeline.artifacts.commit import open_builder, write_unit
from hardbatch.pipeline.run import Plan
from hardbatch.pipeline.step import Step


def join_packings(plans: Sequence[Plan], name: str = "several") -> Step:
    """The step that writes shards whose packing p is that of `plans[p]`, finished runs in one workspace."""
    last = plans[0].steps[-1]
    inputs = dict(last.inputs)
    for what in last.inputs:
        if what.startswith("batches/"):
            found = [plan.steps[-1].inputs[what] for plan in plans]
            inputs[what] = _join(found, found[0].parent / name)
    return replace(last, key=name, path=last.path.parent / name, inputs=inputs)


def _join(found: Sequence[Path], path: Path) -> Path:
    with open_builder(path) as builder, write_unit(path, "batches") as writer:
        for file in ("batches", "leftover"):
            tables = []
            for packing, folder in enumerate(found):
                table = pq.read_table(folder / f"{file}.parquet")
                place = table.schema.get_field_index("packing")
                of_packing = pa.array(np.full(len(table), packing, dtype=np.int32))
                tables.append(table.set_column(place, table.schema.field(place), of_packing))
            joined = pa.concat_tables(tables).unify_dictionaries()
            pq.write_table(joined, writer.add_file(f"{file}.parquet", rows=len(joined)))
    counts = {**read_artifact(found[0]).manifest.counts, "packings": len(found)}
    builder.finish(
        units=["batches"],
        stage="batches",
        stage_version=0,
        domain=path.parent.name,
        key=path.name,
        config={},
        inputs={},
        counts=counts,
    )
    return path
