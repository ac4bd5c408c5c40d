"""B3, another way to make groups of alike pairs (arXiv 2505.11293), in place of clusters, tour and refinement.

The surrogate ranks the documents of all pairs for each query. Ranks below `skip` are left out, because they may be
answers; the `num_neighbours` ranks after them are neighbours, and two pairs that are neighbours of each other are
joined by an edge. METIS cuts this graph into parts of about K pairs with as few edges between them as possible. Parts
are not of exactly K pairs, so all parts are laid in a row, which is cut after every K pairs. Batches are drawn from
these groups as from any others.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import numpy as np
from scipy.sparse import csr_array

from hardbatch.pipeline.arrays import Array
from hardbatch.pipeline.artifacts.vectors import FoldedPoints
from hardbatch.pipeline.batching import pack as module
from hardbatch.pipeline.batching.pack import PackSettings

_BLOCK_ROWS = 1_024


@contextmanager
def groups_by_b3(skip: int, num_neighbours: int) -> Iterator[None]:
    """Makes the stage `pack` cut groups by B3."""

    def make_groups(
        points: FoldedPoints, labels: Array, centroids: Array, settings: PackSettings, classes: Array | None = None
    ) -> tuple[Array, Array]:
        documents_nD, queries_nD = points.sides(np.arange(len(points)))
        parts = cut(documents_nD, queries_nD, settings.group_size, skip=skip, num_neighbours=num_neighbours)
        row = np.argsort(parts, kind="stable")
        whole = len(row) // settings.group_size * settings.group_size
        return row[:whole].reshape(-1, settings.group_size), row[whole:]

    with patch.object(module, "make_groups", make_groups):
        yield


def cut(documents_nD: Array, queries_nD: Array, group_size: int, *, skip: int, num_neighbours: int) -> Array:
    """Cuts pairs into parts of about `group_size`.

    Returns:
        The part of each pair (int64, n).
    """
    import pymetis

    size = len(queries_nD)
    last = min(skip + num_neighbours, size)
    neighbours = np.empty((size, last - skip), dtype=np.int64)
    for start in range(0, size, _BLOCK_ROWS):
        scores = queries_nD[start : start + _BLOCK_ROWS] @ documents_nD.T
        neighbours[start : start + _BLOCK_ROWS] = np.argsort(-scores, axis=1, kind="stable")[:, skip:last]

    rows = np.repeat(np.arange(size), neighbours.shape[1])
    directed = csr_array((np.ones(len(rows), dtype=np.int8), (rows, neighbours.ravel())), (size, size))
    graph = directed.multiply(directed.T).tocsr()
    graph.setdiag(0)
    graph.eliminate_zeros()
    _, parts = pymetis.part_graph(-(-size // group_size), xadj=graph.indptr.tolist(), adjncy=graph.indices.tolist())
    return np.asarray(parts, dtype=np.int64)
