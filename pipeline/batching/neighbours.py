"""Nearest neighbours of each vector among the others, by inner product: exact for few vectors, by cells for many.

The cells are those of an inverted file (IVF): two iterations of spherical K-Means make 4·√k cells, and a vector
is compared with the members of the cells whose centres are nearest to it. All vectors that look into a cell do
so in one matrix product. FAISS's IndexIVFFlat reads the members of a cell again for each query, and is slower
(benchmarks/tour.py). Finally each edge counts in both directions: what one end missed, the other may have found.

Shape letters: k vectors, D dimension, M neighbours, C cells, P probed cells, b rows of a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from hardbatch.pipeline.arrays import Array

_EXACT_UP_TO = 8_192
_BLOCK_ROWS = 1_024
_SLICE_ROWS = 8_192  # the same for any number of threads: another size of blocks changes the last bits of scores
_NUM_PROBES = 48
_CELLS_PER_ROOT = 4
_CELL_ITERATIONS = 2
_SEED = 0


def nearest_neighbours(vectors_kD: Array, num_neighbours: int) -> Array:
    """Finds the nearest of each vector by inner product, itself excluded; the same for any number of threads.

    It is exact up to 8,192 vectors. Above, it finds 80 to 95 % of the nearest, in a time that grows as k·√k·D,
    and holds about 100 bytes per neighbour.

    Args:
        vectors_kD: The vectors, float32, all of about the same length: otherwise cells say little.
        num_neighbours: M, or k - 1 if that is less.

    Returns:
        The neighbours (int64, k × M), best first.
    """
    num_neighbours = min(num_neighbours, len(vectors_kD) - 1)
    vectors = torch.from_numpy(np.ascontiguousarray(vectors_kD, dtype=np.float32))
    if len(vectors) <= _EXACT_UP_TO:
        return _exact(vectors, torch.arange(len(vectors)), num_neighbours)[0].numpy()
    neighbours_kM, scores_kM = _by_cells(vectors, num_neighbours)

    # A vector whose cells have fewer than M members is compared with all others.
    lacking = torch.isinf(scores_kM).any(1).nonzero()[:, 0]
    if len(lacking) > 0:
        neighbours_kM[lacking], scores_kM[lacking] = _exact(vectors, lacking, num_neighbours)
    return _both_ways(neighbours_kM.numpy(), scores_kM.numpy())


def make_cells(vectors_kD: Array, num_cells: int) -> tuple[Array, Array]:
    """Unit centres (float32, C × D) of a short spherical K-Means, and the nearest one of each vector (int64, k)."""
    vectors = torch.from_numpy(np.ascontiguousarray(vectors_kD, dtype=np.float32))
    centres = _centres(vectors, num_cells)
    return centres.numpy(), _nearest_centres(vectors, centres, 1)[:, 0].numpy()


def _exact(vectors: torch.Tensor, rows: torch.Tensor, num_neighbours: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Neighbours and scores of the vectors at `rows`: quadratic in k, in blocks."""
    found = []
    for block in _blocks(rows):
        scores_bk = vectors[block] @ vectors.T
        scores_bk[torch.arange(len(block)), block] = -torch.inf
        found.append(scores_bk.topk(num_neighbours, dim=1))
    return torch.cat([best.indices for best in found]), torch.cat([best.values for best in found])


def _by_cells(vectors: torch.Tensor, num_neighbours: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Neighbours and scores, -inf for those that the probed cells lack; several slices of the vectors at once.

    Each slice uses one thread. With several threads per product, these would wait for each other in each of the
    thousands of small products; when the cores are busy with other work, that takes many times as long.
    """
    num_cells = round(_CELLS_PER_ROOT * len(vectors) ** 0.5)
    probes_kP = _nearest_centres(vectors, _centres(vectors, num_cells), _NUM_PROBES)
    members = _by_value(probes_kP[:, 0], num_cells)
    slices = _blocks(torch.arange(len(vectors)), _SLICE_ROWS)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(num_threads) as pool:
            found = list(pool.map(lambda rows: _probe(vectors, rows, probes_kP[rows], members, num_neighbours), slices))
    finally:
        torch.set_num_threads(num_threads)
    return torch.cat([neighbours for neighbours, _ in found]), torch.cat([scores for _, scores in found])


def _probe(
    vectors: torch.Tensor,
    rows: torch.Tensor,
    probes: torch.Tensor,
    members: Sequence[torch.Tensor],
    num_neighbours: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Neighbours and scores of the vectors at `rows`, cell by cell."""
    neighbours = torch.zeros((len(rows), num_neighbours), dtype=torch.int64)
    scores = torch.full((len(rows), num_neighbours), -torch.inf)
    asking = [index // probes.shape[1] for index in _by_value(probes.flatten(), len(members))]
    for inside, asked_by in zip(members, asking, strict=True):
        if len(inside) == 0:
            continue
        inside_D = vectors[inside]
        for block in _blocks(asked_by):
            scores_bk = vectors[rows[block]] @ inside_D.T
            scores_bk[inside == rows[block][:, None]] = -torch.inf
            scores[block], best = torch.cat([scores[block], scores_bk], dim=1).topk(num_neighbours, dim=1)
            known = torch.cat([neighbours[block], inside.expand(len(block), -1)], dim=1)
            neighbours[block] = known.gather(1, best)
    return neighbours, scores


def _both_ways(neighbours_kM: Array, scores_kM: Array) -> Array:
    """The best of the edges from and to each vector; the lowest id first among equal ones."""
    k, num_neighbours = neighbours_kM.shape

    # Every edge in both directions and once, as source * k + target; `kept` says where its score is.
    sources = np.repeat(np.arange(k), num_neighbours)
    targets = neighbours_kM.ravel()
    edges, kept = np.unique(np.concatenate([sources * k + targets, targets * k + sources]), return_index=True)
    sources, targets = edges // k, edges % k
    order = np.lexsort((-scores_kM.ravel()[kept % neighbours_kM.size], sources))
    starts = np.searchsorted(sources, np.arange(k))
    return np.asarray(targets[order][starts[:, None] + np.arange(num_neighbours)])


def _centres(vectors: torch.Tensor, num_cells: int) -> torch.Tensor:
    chosen = np.random.default_rng(_SEED).choice(len(vectors), num_cells, replace=False)
    centres = vectors[torch.from_numpy(chosen)]
    for _ in range(_CELL_ITERATIONS):
        nearest = _nearest_centres(vectors, centres, 1)[:, 0]
        centres = torch.nn.functional.normalize(torch.zeros_like(centres).index_add_(0, nearest, vectors), dim=1)
    return centres


def _nearest_centres(vectors: torch.Tensor, centres: torch.Tensor, num_probes: int) -> torch.Tensor:
    return torch.cat([(block @ centres.T).topk(num_probes, dim=1).indices for block in _blocks(vectors)])


def _by_value(values: torch.Tensor, num_values: int) -> tuple[torch.Tensor, ...]:
    """The indices at which each value 0..num_values-1 occurs."""
    return values.argsort(stable=True).tensor_split(values.bincount(minlength=num_values).cumsum(0)[:-1])


def _blocks(rows: torch.Tensor, max_rows: int = _BLOCK_ROWS) -> tuple[torch.Tensor, ...]:
    """Blocks of nearly the same size, so that none is a single row, which torch would sum in another order."""
    return rows.tensor_split(max(1, -(-len(rows) // max_rows)))
