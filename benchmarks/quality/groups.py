"""Other ways to make groups of alike pairs, in place of our clusters, tour and refinement.

`paper`: the paper's K-Means (FAISS, spherical, over d⊕q and q⊕d), a greedy tour over its clusters, cut after every K
pairs.

`b3-SKIP-NUMBER` (arXiv 2505.11293): the surrogate ranks the documents of all pairs for each query. The SKIP best are
left out, because they may be answers; the NUMBER ranks after them are neighbours, and two pairs that are neighbours of
each other are joined by an edge. METIS cuts this graph into parts of about K pairs with as few edges between them as
possible. Parts are not of exactly K pairs, so all parts are laid in a row, which is cut after every K pairs.

Batches are drawn from these groups as from any others.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import numpy as np
from scipy.sparse import csr_array

from hardbatch.pipeline.arrays import Array
from hardbatch.pipeline.artifacts.vectors import FoldedPoints
from hardbatch.pipeline.batching import pack as module
from hardbatch.pipeline.batching.pack import PackSettings

_BLOCK_ROWS = 1_024


@contextmanager
def groups_made_by(method: str) -> Iterator[None]:
    """Makes the stage `pack` cut groups by that method."""

    def make_groups(
        points: FoldedPoints, labels: Array, centroids: Array, settings: PackSettings, classes: Array | None = None
    ) -> tuple[Array, Array]:
        row = order_of(points, settings.group_size, settings.seed, method)
        whole = len(row) // settings.group_size * settings.group_size
        return row[:whole].reshape(-1, settings.group_size), row[whole:]

    with patch.object(module, "make_groups", make_groups):
        yield


def order_of(points: FoldedPoints, group_size: int, seed: int, method: str) -> Array:
    """Lays pairs in a row, which is cut into groups (int64, n)."""
    if method == "paper":
        sys.path.append(str(Path(__file__).resolve().parents[1]))
        from batching import METHODS

        batches, _ = METHODS["shipped: doubled, 256 a centroid, 100 × 3; tour"](points, group_size, seed)
        return np.concatenate([batches.ravel(), np.setdiff1d(np.arange(len(points)), batches)])
    _, skip, num_neighbours = method.split("-")
    documents_nD, queries_nD = points.sides(np.arange(len(points)))
    parts = cut_by_metis(documents_nD, queries_nD, group_size, skip=int(skip), num_neighbours=int(num_neighbours))
    return np.argsort(parts, kind="stable")


def cut_by_metis(documents_nD: Array, queries_nD: Array, group_size: int, *, skip: int, num_neighbours: int) -> Array:
    """Cuts the graph of mutual neighbours into parts of about `group_size` pairs.

    Returns:
        The part of each pair (int64, n).
    """
    import pymetis

    size = len(queries_nD)
    last = min(skip + num_neighbours, size)
    neighbours = np.empty((size, last - skip), dtype=np.int64)
    for start in range(0, size, _BLOCK_ROWS):
        scores = queries_nD[start : start + _BLOCK_ROWS] @ documents_nD.T
        best = np.argpartition(-scores, last - 1, axis=1)[:, :last]
        order = np.argsort(-np.take_along_axis(scores, best, axis=1), axis=1, kind="stable")
        neighbours[start : start + _BLOCK_ROWS] = np.take_along_axis(best, order, axis=1)[:, skip:]

    rows = np.repeat(np.arange(size), neighbours.shape[1])
    directed = csr_array((np.ones(len(rows), dtype=np.int8), (rows, neighbours.ravel())), (size, size))
    graph = directed.multiply(directed.T).tocsr()
    graph.setdiag(0)
    graph.eliminate_zeros()
    _, parts = pymetis.part_graph(-(-size // group_size), xadj=graph.indptr.tolist(), adjncy=graph.indices.tolist())
    return np.asarray(parts, dtype=np.int64)
