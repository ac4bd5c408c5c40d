"""Reads what the stage `leaks` wrote: the texts of a domain that another domain holds out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from hardbatch.pipeline.arrays import Array
from hardbatch.pipeline.artifacts.artifact import read_artifact
from hardbatch.pipeline.artifacts.vectors import Pairs


@dataclass(frozen=True, kw_only=True)
class Leaks:
    """The rows (int64) of the queries and of the documents that another domain holds out."""

    queries: Array
    documents: Array

    @classmethod
    def of(cls, table: pa.Table) -> Leaks:
        """The rows of a table with the columns `schemas.LEAKS`."""
        rows = {side: table.filter(pc.equal(table["side"], side))["row"] for side in ("queries", "documents")}
        return cls(**{side: column.to_numpy() for side, column in rows.items()})

    def pairs(self, pairs: Pairs) -> Array:
        """Whether each pair has such a text (bool, n)."""
        return np.isin(pairs.query_row, self.queries) | np.isin(pairs.document_row, self.documents)


def load_leaks(path: Path | None) -> Leaks:
    """Reads the `leaks` artifact at `path`. None is that of a domain beside which no other one holds out texts.

    Raises:
        IntegrityError: The artifact is incomplete or damaged.
    """
    if path is None:
        return Leaks(queries=np.empty(0, dtype=np.int64), documents=np.empty(0, dtype=np.int64))
    return Leaks.of(pq.read_table(read_artifact(path).path / "leaks.parquet"))
