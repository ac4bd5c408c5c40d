"""Greedy nearest-neighbour tour over centroids: each next one is the nearest that was not visited.

Exact below a limit, by a k×k matrix of cosines. Above it over a graph of nearest neighbours; where all neighbours of a
centroid were visited, among those left of the cells nearest to it, as many as hold 256. Near-ties of a step are
rescored in float64 and go to the lowest id. Equal centroids follow one another.

Shape letters: k centroids, D dimension.
"""

from __future__ import annotations

import numpy as np
import torch

from hardbatch.pipeline.arrays import Array
from hardbatch.pipeline.batching.neighbours import make_cells, nearest_neighbours

_NUM_NEIGHBOURS = 32
_MIN_RING = 256  # centroids left that are compared, at least, where the neighbours are used up
_NEAR_TIE = 1e-5  # of cosines in float32: an order above their error


def greedy_tour(centroids_kD: Array, start: int, *, exact_below: int) -> Array:
    """Order of visit (int64, k), beginning at `start`, by cosine.

    Holds 4·k² bytes below `exact_below` distinct directions; from there on up to 4 KB and 8·D bytes a centroid, in a
    time that grows as k·√k·D. The same for any number of threads.
    """
    norms = np.linalg.norm(centroids_kD, axis=1, keepdims=True)
    unit_kD = np.divide(centroids_kD, norms, out=np.zeros_like(centroids_kD), where=norms > 0).astype(np.float32)
    direction = _directions(unit_kD)
    unit_kD = unit_kD[np.unique(direction, return_index=True)[1]]
    find = _exact_tour if len(unit_kD) < exact_below else _graph_tour
    place = np.argsort(find(unit_kD, int(direction[start])))
    tour = np.argsort(place[direction], kind="stable")
    return np.concatenate([[start], tour[tour != start]])


def _directions(unit_kD: Array) -> Array:
    """Which distinct one each is (int64, k), numbered as they first come: else equal ones would all be near-ties."""
    seen: dict[bytes, int] = {}
    return np.array([seen.setdefault(row.tobytes(), len(seen)) for row in unit_kD])


def _exact_tour(unit_kD: Array, start: int) -> Array:
    unit = torch.from_numpy(unit_kD)
    cosine_kk = (unit @ unit.T).numpy()
    visited = np.zeros(len(unit_kD), dtype=np.float32)  # -inf where visited: adding it takes one pass
    ids = np.arange(len(unit_kD))
    tour = np.full(len(unit_kD), start)
    visited[start] = -np.inf
    for step in range(1, len(tour)):
        previous = tour[step - 1]
        tour[step] = _nearest(unit_kD, previous, ids, cosine_kk[previous] + visited)
        visited[tour[step]] = -np.inf
    return tour


def _graph_tour(unit_kD: Array, start: int) -> Array:
    neighbours = nearest_neighbours(unit_kD, _NUM_NEIGHBOURS)
    left = _Unvisited(unit_kD)
    tour = np.full(len(unit_kD), start)
    left.remove(start)
    for step in range(1, len(tour)):
        previous = tour[step - 1]
        candidates = neighbours[previous][left.marks[neighbours[previous]]]
        if len(candidates) == 0:
            candidates = left.near(previous)
        candidates.sort()
        scores = np.einsum("kd,d->k", unit_kD[candidates], unit_kD[previous])
        tour[step] = _nearest(unit_kD, previous, candidates, scores)
        left.remove(tour[step])
    return tour


class _Unvisited:
    """The centroids left: `marks` (bool, k) and, in √k cells, those near a given one."""

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
        """Those left of the nearest cells, of as many as hold `_MIN_RING` together, or of all."""
        cells = np.flatnonzero(self._sizes)
        scores = np.einsum("cd,d->c", self._centres[cells], self._unit_kD[centroid])
        cells = cells[np.argsort(-scores, kind="stable")]
        cells = cells[: np.searchsorted(np.cumsum(self._sizes[cells]), _MIN_RING) + 1]
        for cell in cells:
            self._members[cell] = self._members[cell][self.marks[self._members[cell]]]
        return np.concatenate([self._members[cell] for cell in cells])


def _nearest(unit_kD: Array, centroid: int, candidates: Array, scores: Array) -> int:
    """The candidate of the highest score; of near-ties the one that float64 finds nearest, else the lowest id."""
    near = candidates[np.flatnonzero(scores >= scores.max() - _NEAR_TIE)]
    if len(near) == 1:
        return int(near[0])
    exact = np.einsum("kd,d->k", unit_kD[near].astype(np.float64), unit_kD[centroid].astype(np.float64))
    return int(near[np.argmax(exact)])
