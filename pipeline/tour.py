"""Greedy nearest-neighbour tour over centroids: each next one is the nearest that was not visited.

Exact below a limit, by a k×k matrix of cosines; above it over a graph of nearest neighbours, with a scan of all that
are left where a centroid's neighbours are used up. Near-ties of a step are rescored in float64 and go to the lowest
id. The graph takes k² dot products, in blocks.

Shape letters: k centroids, D dimension.
"""

from __future__ import annotations

import numpy as np
import torch

from pipeline.vectors import Array

_NUM_NEIGHBOURS = 32
_BLOCK_ROWS = 1_024
_NEAR_TIE = 1e-5


def greedy_tour(centroids_kD: Array, start: int, *, exact_below: int) -> Array:
    """Order of visit (int64, k), beginning at `start`."""
    norms = np.linalg.norm(centroids_kD, axis=1, keepdims=True)
    unit_kD = np.divide(centroids_kD, norms, out=np.zeros_like(centroids_kD), where=norms > 0).astype(np.float32)
    if len(unit_kD) < exact_below:
        return _exact_tour(unit_kD, start)
    return _graph_tour(unit_kD, start)


def _exact_tour(unit_kD: Array, start: int) -> Array:
    cosine_kk = unit_kD @ unit_kD.T
    tour = np.empty(len(unit_kD), dtype=np.int64)
    for step in range(len(tour)):
        tour[step] = current = start if step == 0 else _nearest(unit_kD, int(tour[step - 1]), cosine_kk[tour[step - 1]])
        cosine_kk[:, current] = -np.inf
    return tour


def _graph_tour(unit_kD: Array, start: int) -> Array:
    neighbours = _neighbours(unit_kD)
    visited = np.zeros(len(unit_kD), dtype=bool)
    tour = np.empty(len(unit_kD), dtype=np.int64)
    for step in range(len(tour)):
        if step == 0:
            current = start
        else:
            previous = int(tour[step - 1])
            candidates = np.sort(neighbours[previous][~visited[neighbours[previous]]])
            if len(candidates) == 0:
                candidates = np.flatnonzero(~visited)
            scores = unit_kD[candidates] @ unit_kD[previous]
            current = int(candidates[_nearest(unit_kD[candidates], unit_kD[previous], scores)])
        tour[step] = current
        visited[current] = True
    return tour


def _neighbours(unit_kD: Array) -> Array:
    """The nearest centroids of each (int64, k × at most 33), itself among them."""
    unit = torch.from_numpy(unit_kD)
    num_neighbours = min(_NUM_NEIGHBOURS + 1, len(unit))
    blocks = [
        (unit[start : start + _BLOCK_ROWS] @ unit.T).topk(num_neighbours, dim=1).indices
        for start in range(0, len(unit), _BLOCK_ROWS)
    ]
    return torch.cat(blocks).numpy()


def _nearest(unit_kD: Array, current: int | Array, scores: Array) -> int:
    near = np.flatnonzero(scores >= scores.max() - _NEAR_TIE)
    if len(near) == 1:
        return int(near[0])
    vector = unit_kD[current] if isinstance(current, int) else current
    exact = np.einsum("kd,d->k", unit_kD[near].astype(np.float64), vector.astype(np.float64))
    return int(near[np.argmax(exact)])
