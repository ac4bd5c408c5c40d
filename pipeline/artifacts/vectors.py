"""Reads what ingest and embed wrote: texts, pairs and vectors of a domain, by row, through memory maps.

Shape letters: n pairs, N texts of a side, D dimension.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from hardbatch.pipeline import schemas
from hardbatch.pipeline.arrays import Array, empty
from hardbatch.pipeline.artifacts.artifact import Artifact, read_artifact

_OPEN_FILES = 64  # memory maps of a side; each keeps a file descriptor, and a process may have as few as 1,024
_TEXTS_PER_READ = 8_192
_LARGE_ROWS = 2**14  # from here on an array is worth pages of its own, see `arrays.empty`


class Texts:
    """The distinct texts of one side of a domain, memory-mapped.

    Args:
        pairs: The `pairs` artifact of the domain.
        side: `queries` or `documents`.
    """

    def __init__(self, pairs: Artifact, side: str) -> None:
        paths, self.num_rows = _files_of_side(pairs, "texts", side)
        self._column = lru_cache(maxsize=_OPEN_FILES)(partial(_open_texts, paths))

    def take(self, rows: Array) -> list[str]:
        """The texts at `rows` (int, one-dimensional), in that order."""
        texts = np.empty(len(rows), dtype=object)
        for number, indices in _by_file(rows, schemas.TEXT_ROWS_PER_FILE):
            taken = self._column(number).take(pa.array(rows[indices] % schemas.TEXT_ROWS_PER_FILE))
            texts[indices] = taken.to_pylist()
        return list(texts)


def _open_texts(paths: list[Path], number: int) -> pa.Array:
    return _open_batch(paths, number).column(0)


def _open_batch(paths: list[Path], number: int) -> pa.RecordBatch:
    return pa.ipc.open_file(pa.memory_map(str(paths[number]))).get_batch(0)


class ExtraRows:
    """The extra columns of a domain, memory-mapped.

    Args:
        pairs: The `pairs` artifact of the domain.

    Attributes:
        schema: Name and type of each; empty if the domain has none.
    """

    def __init__(self, pairs: Artifact) -> None:
        paths = pairs.files("extra")
        self._batch = lru_cache(maxsize=_OPEN_FILES)(partial(_open_batch, paths))
        self.schema = self._batch(0).schema if paths else pa.schema([])

    def take(self, pair_ids: Array) -> dict[str, list[Any]]:
        """The values of the pairs (int, one-dimensional) by column, in the order of the pairs."""
        rows: list[dict[str, Any]] = [{}] * len(pair_ids)
        for number, indices in _by_file(pair_ids, schemas.TEXT_ROWS_PER_FILE) if len(self.schema) else ():
            taken = self._batch(number).take(pa.array(pair_ids[indices] % schemas.TEXT_ROWS_PER_FILE))
            for index, row in zip(indices, taken.to_pylist(), strict=True):
                rows[index] = row
        return {name: [row[name] for row in rows] for name in self.schema.names}


def _files_of_side(artifact: Artifact, folder: str, side: str) -> tuple[list[Path], int]:
    """The files of one side below a folder of an artifact, and the number of rows in all of them."""
    paths = [path for path in artifact.files(folder) if path.name.startswith(side + "-")]
    records = [artifact.manifest.files[f"{folder}/{path.name}"] for path in paths]
    return paths, sum(record.rows or 0 for record in records)


def _by_file(rows: Array, rows_per_file: int) -> Iterator[tuple[int, Array]]:
    """For each file that holds some of `rows`: its number, and the indices in `rows` of those it holds."""
    files = rows // rows_per_file

    # Most blocks are consecutive rows of one file, which need no sorting.
    if len(rows) == 0 or files[0] == files[-1] == files.max() == files.min():
        yield from ((int(file), np.arange(len(rows))) for file in files[:1])
        return

    order = np.argsort(files, kind="stable")
    starts = np.flatnonzero(np.diff(files[order], prepend=-1))
    for start, stop in zip(starts, [*starts[1:], len(rows)], strict=True):
        yield int(files[order[start]]), order[start:stop]


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """The pairs of a domain, as arrays indexed by `pair_id` (int64, n).

    The hard negatives of pair i are `negative_rows[negative_offsets[i] : negative_offsets[i + 1]]`; both arrays are
    None if the source has no hard negatives. `negative_places` has the place of each in the list of the source, -1
    if it is of a row that repeats the pair; it is None if the domain has no extra columns.
    """

    query_row: Array
    document_row: Array
    negative_offsets: Array | None
    negative_rows: Array | None
    negative_places: Array | None = None

    def __len__(self) -> int:
        return len(self.query_row)

    def negatives_of(self, pair_id: int) -> Array:
        """Document rows of the hard negatives of a pair; empty if it has none."""
        return self._of_pair(self.negative_rows, pair_id)

    def places_of(self, pair_id: int) -> Array:
        """The place of each of these in the list of the source; empty if places are not known."""
        return self._of_pair(self.negative_places, pair_id)

    def _of_pair(self, values: Array | None, pair_id: int) -> Array:
        if self.negative_offsets is None or values is None:
            return np.empty(0, dtype=np.int64)
        return values[self.negative_offsets[pair_id] : self.negative_offsets[pair_id + 1]]


def load_pairs(artifact: Artifact) -> Pairs:
    """Reads the pairs of a domain. They take 16 bytes each, with hard negatives 16 more, and 8 for each of these."""
    path = artifact.path / "pairs.parquet"
    names = ("query_row", "document_row", "negative_rows", "negative_places")
    table = pq.read_table(path, columns=[name for name in names if name in pq.read_schema(path).names])
    offsets = rows = places = None
    if "negative_rows" in table.column_names:
        lists = table["negative_rows"].combine_chunks()
        offsets, rows = lists.offsets.to_numpy(), lists.values.to_numpy()
    if "negative_places" in table.column_names:
        places = table["negative_places"].combine_chunks().values.fill_null(-1).to_numpy()
    pa.default_memory_pool().release_unused()  # the decoded pages, which took as much again
    return Pairs(
        query_row=table["query_row"].to_numpy(),
        document_row=table["document_row"].to_numpy(),
        negative_offsets=offsets,
        negative_rows=rows,
        negative_places=places,
    )


class VectorRows:
    """The vectors of one side (float16, N × D), in memory-mapped files of `unit_rows` rows each."""

    def __init__(self, paths: list[Path], unit_rows: int, num_rows: int, dimension: int) -> None:
        self._unit = lru_cache(maxsize=_OPEN_FILES)(partial(_open_unit, paths))
        self._unit_rows = unit_rows
        self.num_rows = num_rows
        self.dimension = dimension

    def take(self, rows: Array, out: Array | None = None) -> Array:
        """The vectors at `rows` as float32 (len(rows), D), written to `out` if it is given."""
        new = empty if len(rows) >= _LARGE_ROWS else np.empty
        taken = new((len(rows), self.dimension), np.float16)
        for number, indices in _by_file(rows, self._unit_rows):
            taken[indices] = self._unit(number)[rows[indices] % self._unit_rows]
        out = new(taken.shape, np.float32) if out is None else out
        torch.from_numpy(out).copy_(torch.from_numpy(taken))  # five times as fast as numpy's conversion
        return out


def _open_unit(paths: list[Path], number: int) -> Array:
    unit: Array = np.load(paths[number], mmap_mode="r")
    return unit


class Vectors:
    """The vectors of a domain: `queries`, `documents`, and the rows of each that have no vector."""

    def __init__(self, artifact: Artifact) -> None:
        self.dimension: int = artifact.manifest.counts["dimension"]
        unit_rows = artifact.manifest.config["unit_rows"]
        sides = [_files_of_side(artifact, "vectors", side) for side in schemas.SIDES]
        self.queries, self.documents = (
            VectorRows(paths, unit_rows, num_rows, self.dimension) for paths, num_rows in sides
        )
        self.invalid_queries, self.invalid_documents = (
            pq.read_table(artifact.path / f"invalid-{side}.parquet")["row"].to_numpy() for side in schemas.SIDES
        )

    @cached_property
    def has_document(self) -> Array:
        """Whether each document row has a vector (bool, N)."""
        marks = np.ones(self.documents.num_rows, dtype=bool)
        marks[self.invalid_documents] = False
        return marks

    def invalid_pairs(self, pairs: Pairs) -> Array:
        """Whether each pair has no vector for its query or its document (bool, n)."""
        return np.isin(pairs.query_row, self.invalid_queries) | np.isin(pairs.document_row, self.invalid_documents)


class KnownVectors:
    """The vectors of an artifact by text: those of one side, without the rows that have none. 16 bytes a text.

    Args:
        vectors: The artifact.
        pairs: The `pairs` artifact that it was made from.
        side: `queries` or `documents`.
    """

    def __init__(self, vectors: Artifact, pairs: Artifact, side: str) -> None:
        self._texts = Texts(pairs, side)
        known = Vectors(vectors)
        self._vectors: VectorRows = getattr(known, side)
        starts = range(0, self._texts.num_rows, _TEXTS_PER_READ)
        blocks = (np.arange(start, min(start + _TEXTS_PER_READ, self._texts.num_rows)) for start in starts)
        digests = np.concatenate([np.zeros(0, np.uint64), *(_digests(self._texts.take(rows)) for rows in blocks)])
        rows = np.setdiff1d(np.arange(len(digests)), getattr(known, f"invalid_{side}"))
        self._rows = rows[np.argsort(digests[rows], kind="stable")]
        self._digests = digests[self._rows]

    def find(self, texts: list[str]) -> tuple[Array, Array]:
        """Looks texts up.

        Returns:
            Whether each text is known (bool, N), and the vectors of those that are (float32).
        """
        digests = _digests(texts)
        at = np.searchsorted(self._digests, digests)
        candidates = np.flatnonzero(at < len(self._digests))
        candidates = candidates[self._digests[at[candidates]] == digests[candidates]]

        # Two texts may have one digest, so the texts themselves decide.
        rows = self._rows[at[candidates]]
        same = np.array([texts[i] == text for i, text in zip(candidates, self._texts.take(rows), strict=True)], bool)
        is_known = np.zeros(len(texts), dtype=bool)
        is_known[candidates[same]] = True
        return is_known, self._vectors.take(rows[same])


def _digests(texts: list[str]) -> Array:
    joined = b"".join(blake2b(text.encode(), digest_size=8).digest() for text in texts)
    return np.frombuffer(joined, dtype="<u8")


@dataclass(frozen=True, kw_only=True)
class FoldedPoints:
    """s = d + q of some pairs, not renormalised, read from memory maps; implements `batching.points.PairPoints`."""

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
        """The concatenations d⊕q of the pairs at `rows`, float32 (len(rows), 2·D)."""
        pair_ids = self.pair_ids[rows]
        both = empty((len(rows), 2 * self.dimension), np.float32)
        self.vectors.documents.take(self.pairs.document_row[pair_ids], both[:, : self.dimension])
        self.vectors.queries.take(self.pairs.query_row[pair_ids], both[:, self.dimension :])
        return both

    def sides(self, rows: Array) -> tuple[Array, Array]:
        """The documents d and the queries q of the pairs at `rows`, each float32 (len(rows), D)."""
        pair_ids = self.pair_ids[rows]
        documents = self.vectors.documents.take(self.pairs.document_row[pair_ids])
        return documents, self.vectors.queries.take(self.pairs.query_row[pair_ids])


def write_array(path: Path, array: Array) -> None:
    """Writes an .npy file; unlike `np.save`, it reports a full disk as OSError with its errno."""
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        file.write(np.ascontiguousarray(array).data)


def open_vectors(path: Path) -> Vectors:
    """Opens the `vectors` artifact at `path`."""
    return Vectors(read_artifact(path))
