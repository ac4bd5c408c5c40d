"""A greedy nearest-neighbour tour over centroids: each next one is the nearest that is not visited.

Nearest is by cosine. Below a limit the tour is exact, from a k × k matrix of cosines. Above it, each
step looks at the 32 nearest neighbours of the centroid; if all of these were visited, at what is
left of the nearest cells of a coarse clustering, of as many cells as hold 256 unvisited centroids.

Near-ties of a step are computed again in float64 (ties.py). Centroids of equal direction follow one
another.

Shape letters: k centroids, D dimension.
"""

from __future__ import annotations

import numpy as np
import torch

from hardbatch.pipeline.arrays import Array
from hardbatch.pipeline.batching.neighbours import make_cells, nearest_neighbours
from hardbatch.pipeline.batching.ties import UNIT_NEAR_TIE, highest

_NUM_NEIGHBOURS = 32
_MIN_RING = 256  # unvisited centroids that are compared, at least, when the neighbours are used up


def greedy_tour(centroids_kD: Array, start: int, *, exact_below: int) -> Array:
    """Orders the centroids along a greedy tour; the same for any number of threads.

    Holds 4·k² bytes below `exact_below` distinct directions. From there on it holds up to 4 KB and 8·D
    bytes per centroid, and the time grows as k·√k·D.

    Args:
        centroids_kD: The centroids, float32; their length does not matter.
        start: The centroid to begin at.
        exact_below: From this many distinct directions on, the tour is approximate.

    Returns:
        The order of visit (int64, k).
    """
    norms = np.linalg.norm(centroids_kD, axis=1, keepdims=True)
    unit_kD = np.divide(centroids_kD, norms, out=np.zeros_like(centroids_kD), where=norms > 0).astype(np.float32)

    # The tour is found over distinct directions, because equal ones would all be near-ties of each other.
    direction = _directions(unit_kD)
    unit_kD = unit_kD[np.unique(direction, return_index=True)[1]]
    find = _exact_tour if len(unit_kD) < exact_below else _graph_tour
    position = np.argsort(find(unit_kD, int(direction[start])))

    # Back to centroids: by the position of their direction, then by id, but with `start` first.
    tour = np.argsort(position[direction], kind="stable")
    return np.concatenate([[start], tour[tour != start]])


def _directions(unit_kD: Array) -> Array:
    """The number of each centroid's direction (int64, k), counted in order of first appearance."""
    seen: dict[bytes, int] = {}
    return np.array([seen.setdefault(row.tobytes(), len(seen)) for row in unit_kD])


def _exact_tour(unit_kD: Array, start: int) -> Array:
    unit = torch.from_numpy(unit_kD)
    cosine_kk = (unit @ unit.T).numpy()
    ids = np.arange(len(unit_kD))
    visited = np.zeros(len(unit_kD), dtype=np.float32)  # -inf once visited: adding it takes a single pass

    tour = np.full(len(unit_kD), start)
    visited[start] = -np.inf
    for step in range(1, len(tour)):
        previous = tour[step - 1]
        tour[step] = _nearest(unit_kD, previous, ids, cosine_kk[previous] + visited)
        visited[tour[step]] = -np.inf
    return tour


def _graph_tour(unit_kD: Array, start: int) -> Array:
    neighbours = nearest_neighbours(unit_kD, _NUM_NEIGHBOURS)
    unvisited = _Unvisited(unit_kD)

    tour = np.full(len(unit_kD), start)
    unvisited.remove(start)
    for step in range(1, len(tour)):
        previous = tour[step - 1]
        candidates = neighbours[previous][unvisited.marks[neighbours[previous]]]
        if len(candidates) == 0:
            candidates = unvisited.near(previous)

        candidates.sort()  # so that the lowest id wins a tie
        scores = np.einsum("kd,d->k", unit_kD[candidates], unit_kD[previous])
        tour[step] = _nearest(unit_kD, previous, candidates, scores)
        unvisited.remove(tour[step])
    return tour


def _nearest(unit_kD: Array, centroid: int, candidates: Array, scores: Array) -> int:
    return highest(scores, unit_kD, unit_kD[centroid], near_tie=UNIT_NEAR_TIE, ids=candidates)


class _Unvisited:
    """The unvisited centroids: `marks` (bool, k), and √k cells to find those near a given centroid."""

    def __init__(self, unit_kD: Array) -> None:
        self._unit_kD = unit_kD
        self._centres, self._cell = make_cells(unit_kD, round(len(unit_kD) ** 0.5))
        self._sizes = np.bincount(self._cell, minlength=len(self._centres))
        self._members = np.split(np.argsort(self._cell, kind="stable"), np.cumsum(self._sizes)[:-1])
        self.marks = np.ones(len(unit_kD), dtype=bool)

    def remove(self, centroid: int) -> None:
        self.marks[centroid] = False
        self._sizes[self._cell[centroid]] -= 1

    def near(self, centroid: int) -> Array:
        """The unvisited members of the nearest cells: of enough cells to hold `_MIN_RING`, or of all."""
        cells = np.flatnonzero(self._sizes)
        scores = np.einsum("cd,d->c", self._centres[cells], self._unit_kD[centroid])
        cells = cells[np.argsort(-scores, kind="stable")]
        cells = cells[: np.searchsorted(np.cumsum(self._sizes[cells]), _MIN_RING) + 1]

        # Visited members are dropped for good, so a later call does not look at them again.
        for cell in cells:
            self._members[cell] = self._members[cell][self.marks[self._members[cell]]]
        return np.concatenate([self._members[cell] for cell in cells])
