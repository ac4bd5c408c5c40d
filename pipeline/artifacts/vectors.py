"""Reading what ingest and embed wrote: texts, pairs and vectors of a domain, by row, through memory maps.

Shape letters: n pairs, N texts of a side, D dimension.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from hardbatch.pipeline import schemas
from hardbatch.pipeline.arrays import Array, empty
from hardbatch.pipeline.artifacts.artifact import Artifact, read_artifact

_OPEN_FILES = 64  # memory maps held by a side: each keeps a file descriptor, of which a process may have 1,024
_LARGE_ROWS = 2**14  # read at once: more than a block that comes and goes


class Texts:
    """The distinct texts of one side of a domain, `queries` or `documents`, memory-mapped."""

    def __init__(self, pairs: Artifact, side: str) -> None:
        paths = [path for path in pairs.files("texts") if path.name.startswith(side + "-")]
        self.num_rows = _num_rows(pairs, paths)
        self._column = lru_cache(maxsize=_OPEN_FILES)(
            lambda number: pa.ipc.open_file(pa.memory_map(str(paths[number]))).get_batch(0).column(0)
        )

    def take(self, rows: Array) -> list[str]:
        """The texts at `rows` (int, of one dimension), in their order."""
        texts: list[str] = [""] * len(rows)
        for number, places in _by_file(rows, schemas.TEXT_ROWS_PER_FILE):
            taken = self._column(number).take(pa.array(rows[places] % schemas.TEXT_ROWS_PER_FILE))
            for place, text in zip(places, taken.to_pylist(), strict=True):
                texts[place] = text
        return texts


def _num_rows(artifact: Artifact, paths: list[Path]) -> int:
    records = [artifact.manifest.files[path.relative_to(artifact.path).as_posix()] for path in paths]
    return sum(record.rows or 0 for record in records)


def _by_file(rows: Array, rows_per_file: int) -> Iterator[tuple[int, Array]]:
    """(number of a file, places in `rows` of the rows it holds), for each file that is touched."""
    files = rows // rows_per_file
    if len(rows) == 0 or files[0] == files[-1] == files.max() == files.min():
        yield from ((int(file), np.arange(len(rows))) for file in files[:1])
        return
    order = np.argsort(files, kind="stable")
    starts = np.flatnonzero(np.diff(files[order], prepend=-1))
    for start, stop in zip(starts, [*starts[1:], len(rows)], strict=True):
        yield int(files[order[start]]), order[start:stop]


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
    """The pairs of a domain as arrays: 16 bytes a pair, and 16 with hard negatives, which are 8 bytes each."""
    path = artifact.path / "pairs.parquet"
    columns = [name for name in ("query_row", "document_row", "negative_rows") if name in pq.read_schema(path).names]
    table = pq.read_table(path, columns=columns)
    offsets = rows = None
    if "negative_rows" in table.column_names:
        lists = table["negative_rows"].combine_chunks()
        offsets, rows = lists.offsets.to_numpy(), lists.values.to_numpy()
    pa.default_memory_pool().release_unused()  # as much again, of pages as they were read
    return Pairs(
        query_row=table["query_row"].to_numpy(),
        document_row=table["document_row"].to_numpy(),
        negative_offsets=offsets,
        negative_rows=rows,
    )


class VectorRows:
    """The vectors of one side (float16, N × D) over the memory-mapped files of its units."""

    def __init__(self, paths: list[Path], unit_rows: int, num_rows: int, dimension: int) -> None:
        self._unit = lru_cache(maxsize=_OPEN_FILES)(lambda number: np.load(paths[number], mmap_mode="r"))
        self._unit_rows = unit_rows
        self.num_rows = num_rows
        self.dimension = dimension

    def take(self, rows: Array, out: Array | None = None) -> Array:
        """The vectors at `rows`, as float32 (len(rows), D), in `out` where it is given."""
        new = empty if len(rows) >= _LARGE_ROWS else np.empty
        taken = new((len(rows), self.dimension), np.float16)
        for number, places in _by_file(rows, self._unit_rows):
            taken[places] = self._unit(number)[rows[places] % self._unit_rows]
        out = new(taken.shape, np.float32) if out is None else out
        torch.from_numpy(out).copy_(torch.from_numpy(taken))  # five times as fast as numpy's conversion
        return out


class Vectors:
    """The vectors of a domain: `queries` and `documents`, and the rows that came out zero or NaN."""

    def __init__(self, artifact: Artifact) -> None:
        config, counts = artifact.manifest.config, artifact.manifest.counts
        files = artifact.files("vectors")
        self.queries, self.documents = (
            VectorRows(paths, config["unit_rows"], _num_rows(artifact, paths), counts["dimension"])
            for side in schemas.SIDES
            for paths in [[path for path in files if path.name.startswith(side + "-")]]
        )
        self.dimension: int = counts["dimension"]
        self.invalid_queries, self.invalid_documents = (
            pq.read_table(artifact.path / f"invalid-{side}.parquet")["row"].to_numpy() for side in schemas.SIDES
        )

    @cached_property
    def has_document(self) -> Array:
        """Marks the document rows (bool, N) that have a vector."""
        marks = np.ones(self.documents.num_rows, dtype=bool)
        marks[self.invalid_documents] = False
        return marks

    def invalid_pairs(self, pairs: Pairs) -> Array:
        """Marks the pairs (bool, n) that have no vector for their query or their document."""
        return np.isin(pairs.query_row, self.invalid_queries) | np.isin(pairs.document_row, self.invalid_documents)


@dataclass(frozen=True, kw_only=True)
class FoldedPoints:
    """s = d + q of the given pairs, not renormalised, streamed from memory maps; see `batching.points.PairPoints`."""

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

    def joined(self, rows: Array) -> Array:
        """d⊕q of the pairs at `rows`, float32 (len(rows), 2·D)."""
        pair_ids = self.pair_ids[rows]
        both = empty((len(rows), 2 * self.dimension), np.float32)
        self.vectors.documents.take(self.pairs.document_row[pair_ids], both[:, : self.dimension])
        self.vectors.queries.take(self.pairs.query_row[pair_ids], both[:, self.dimension :])
        return both

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
