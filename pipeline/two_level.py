"""Two-level K-Means for many clusters: n·√k·D work an iteration instead of n·k·D.

Shape letters: n points, k clusters, D dimension.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pipeline.kmeans import Clustering, Lloyd, Points, Subset, apportion, compact, kmeans, partitions
from pipeline.nearest import Nearest
from pipeline.vectors import Array

_SAMPLE_PER_CELL = 256  # points that a cell of the coarse level is found from
_CELLS_SEARCHED = 8  # cells whose clusters a point chooses from at last
_WIDE_ITERATIONS = 3


def two_level_kmeans(
    points: Points,
    num_clusters: int,
    *,
    iterations: int,
    tolerance: float,
    balance: float,
    seed: int,
    device: str = "cpu",
) -> Clustering:
    """K-Means within the cells of a coarse K-Means of √k cells: n·√k·D work an iteration instead of n·k·D.

    The coarse level is found from a sample. At last, in a few iterations over all, each point chooses among the
    clusters of the cells nearest to its own: the borders of the cells leave no trace. Raises as `kmeans`.
    """
    n = len(points)
    if not 1 <= num_clusters <= n:
        raise ValueError(f"num_clusters is {num_clusters}, allowed is 1 to the number of points, {n}")
    settings: dict[str, Any] = {
        "iterations": iterations,
        "tolerance": tolerance,
        "balance": balance,
        "device": device,
    }
    num_cells = max(1, round(num_clusters**0.5))
    generator = np.random.default_rng(seed)
    sample = np.sort(generator.permutation(n)[: num_cells * _SAMPLE_PER_CELL])
    coarse = kmeans(Subset(points, sample), num_cells, seed=seed, **settings)
    cell_of = np.empty(n, dtype=np.int32)
    assign = Nearest(coarse.centroids, coarse.prices, device=device)
    for rows in partitions(n):
        cell_of[rows] = assign(points.take(rows))
    members = _by_label(cell_of, len(coarse.centroids))
    shares = apportion(np.array([len(rows) for rows in members]), num_clusters)
    fine: list[Clustering] = []
    owned: list[Array] = []
    for number, (rows, share) in enumerate(zip(members, shares, strict=True)):
        found = sum(len(clustering.centroids) for clustering in fine)
        if len(rows) > 0:
            fine.append(kmeans(Subset(points, rows), int(share), seed=seed + 1 + number, **settings))
        owned.append(np.arange(found, found + (len(fine[-1].centroids) if len(rows) > 0 else 0)))
    lloyd = Lloyd(np.concatenate([clustering.centroids for clustering in fine]), balance, device)
    lloyd.prices = np.concatenate([clustering.prices for clustering in fine if clustering.prices is not None])
    near = _nearest_cells(coarse.centroids)
    choices = [
        (rows, np.concatenate([owned[cell] for cell in near[number]]))
        for number, rows in enumerate(members)
        if len(rows) > 0
    ]
    for iteration in range(_WIDE_ITERATIONS):
        labels = lloyd.iterate(points, choices, exact=iteration == _WIDE_ITERATIONS - 1)
    within_cells = float(np.sum([clustering.objective[-1] for clustering in fine]))
    lloyd.objective = [*coarse.objective, within_cells, *lloyd.objective]
    return compact(labels, lloyd, [1] * len(coarse.objective) + [2] * (1 + _WIDE_ITERATIONS))


def _by_label(labels: Array, num_labels: int) -> list[Array]:
    order = np.argsort(labels, kind="stable")
    return np.split(order, np.searchsorted(labels[order], np.arange(1, num_labels)))


def _nearest_cells(centroids: Array) -> Array:
    """The nearest cells of each (int64, k × at most 8), itself first."""
    squares = (centroids.astype(np.float64) ** 2).sum(1)
    distances = squares[:, None] + squares - 2 * (centroids.astype(np.float64) @ centroids.T)
    np.fill_diagonal(distances, -np.inf)
    return np.argsort(distances, axis=1, kind="stable")[:, :_CELLS_SEARCHED]
