"""Reading what ingest and embed wrote: texts, pairs and vectors of a domain, by row, through memory maps.

Shape letters: n pairs, N texts of a side, D dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import schemas
from pipeline.artifact import Artifact, read_artifact

Array = np.ndarray[Any, Any]


class Texts:
    """The distinct texts of one side of a domain, `queries` or `documents`, memory-mapped."""

    def __init__(self, pairs: Artifact, side: str) -> None:
        names = [path for path in pairs.files("texts") if path.name.startswith(side + "-")]
        self._columns = [pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0).column(0) for path in names]
        self.num_rows = sum(map(len, self._columns))

    def take(self, rows: Array) -> list[str]:
        """The texts at `rows` (int, any shape of one dimension), in their order."""
        files = rows // schemas.TEXT_ROWS_PER_FILE
        texts: list[str] = [""] * len(rows)
        for file in np.unique(files):
            places = np.flatnonzero(files == file)
            taken = self._columns[file].take(pa.array(rows[places] % schemas.TEXT_ROWS_PER_FILE))
            for place, text in zip(places, taken.to_pylist(), strict=True):
                texts[place] = text
        return texts


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """The pairs of a domain. `pair_id` is the place in these arrays (int64, n)."""

    query_row: Array
    document_row: Array
    negative_offsets: Array | None
    negative_rows: Array | None

    def __len__(self) -> int:
        return len(self.query_row)

    def negatives_of(self, pair_id: int) -> Array:
        """Document rows of the hard negatives of a pair; empty where the source has none."""
        if self.negative_offsets is None or self.negative_rows is None:
            return np.empty(0, dtype=np.int64)
        return self.negative_rows[self.negative_offsets[pair_id] : self.negative_offsets[pair_id + 1]]

    @cached_property
    def known(self) -> Array:
        """Every (query, document) of the domain as query_row * width + document_row, sorted; see `is_known`."""
        return np.sort(self.query_row * self._width + self.document_row)

    @cached_property
    def documents_per_query(self) -> Array:
        """How many pairs each query has (int64, by query row)."""
        return np.bincount(self.query_row)

    @cached_property
    def _width(self) -> int:
        return int(self.document_row.max(initial=0)) + 1

    def is_known(self, query_rows: Array, document_rows: Array) -> Array:
        """Whether each (query row, document row) is a pair of the domain; the two broadcast (bool)."""
        codes = query_rows * self._width + document_rows
        places = np.searchsorted(self.known, codes).clip(max=len(self.known) - 1)
        return np.asarray((self.known[places] == codes) & (document_rows < self._width))


def load_pairs(artifact: Artifact) -> Pairs:
    """The pairs of a domain as arrays: 24 bytes a pair, and 8 a hard negative."""
    table = pq.read_table(artifact.path / "pairs.parquet")
    offsets = rows = None
    if "negative_rows" in table.column_names:
        lists = table["negative_rows"].combine_chunks()
        offsets, rows = lists.offsets.to_numpy(), lists.values.to_numpy()
    return Pairs(
        query_row=table["query_row"].to_numpy(),
        document_row=table["document_row"].to_numpy(),
        negative_offsets=offsets,
        negative_rows=rows,
    )


class VectorRows:
    """The vectors of one side (float16, N × D) over the memory-mapped files of its units."""

    def __init__(self, paths: list[Path], unit_rows: int, dimension: int) -> None:
        self._units = [np.load(path, mmap_mode="r") for path in paths]
        self._unit_rows = unit_rows
        self.dimension = dimension
        self.num_rows = sum(len(unit) for unit in self._units)

    def take(self, rows: Array) -> Array:
        """The vectors at `rows`, as float32 (len(rows), D)."""
        taken = np.empty((len(rows), self.dimension), dtype=np.float32)
        units = rows // self._unit_rows
        for unit in np.unique(units):
            places = np.flatnonzero(units == unit)
            taken[places] = self._units[unit][rows[places] % self._unit_rows]
        return taken


class Vectors:
    """The vectors of a domain: `queries` and `documents`, and the rows that came out zero or NaN."""

    def __init__(self, artifact: Artifact) -> None:
        config, counts = artifact.manifest.config, artifact.manifest.counts
        files = artifact.files("vectors")
        self.queries, self.documents = (
            VectorRows(
                [path for path in files if path.name.startswith(side + "-")], config["unit_rows"], counts["dimension"]
            )
            for side in schemas.SIDES
        )
        self.dimension: int = counts["dimension"]
        self.invalid_queries, self.invalid_documents = (
            pq.read_table(artifact.path / f"invalid-{side}.parquet")["row"].to_numpy() for side in schemas.SIDES
        )

    def invalid_pairs(self, pairs: Pairs) -> Array:
        """Marks the pairs (bool, n) that have no vector for their query or their document."""
        return np.isin(pairs.query_row, self.invalid_queries) | np.isin(pairs.document_row, self.invalid_documents)


@dataclass(frozen=True, kw_only=True)
class FoldedPoints:
    """s = d + q of the given pairs, not renormalised, streamed from memory maps; see `kmeans.Points`."""

    vectors: Vectors
    pairs: Pairs
    pair_ids: Array

    def __len__(self) -> int:
        return len(self.pair_ids)

    @property
    def dimension(self) -> int:
        return self.vectors.dimension

    def take(self, rows: Array) -> Array:
        documents, queries = self.sides(rows)
        documents += queries
        return documents

    def sides(self, rows: Array) -> tuple[Array, Array]:
        """d and q of the pairs at `rows`, each float32 (len(rows), D)."""
        pair_ids = self.pair_ids[rows]
        documents = self.vectors.documents.take(self.pairs.document_row[pair_ids])
        return documents, self.vectors.queries.take(self.pairs.query_row[pair_ids])


def write_array(path: Path, array: Array) -> None:
    """Writes an .npy file so that a full disk is told by its errno: `np.save` to a file leaves it out."""
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        file.write(np.ascontiguousarray(array).data)


def open_vectors(path: Path) -> Vectors:
    """The vectors artifact at `path`."""
    return Vectors(read_artifact(path))
