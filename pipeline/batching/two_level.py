"""Two-level K-Means for many clusters: n·√k·D work per iteration instead of n·k·D.

    coarse   √k cells from a sample, and the cell of every point
    fine     K-Means within each cell
    wide     a few iterations over all points, each choosing among the clusters of the nearest cells

The wide iterations are most of the work. They remove the borders of the cells: a point near one may end
in a cluster of the cell beyond.

Shape letters: n points, k clusters, C cells, D dimension.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from hardbatch.pipeline.arrays import Array, trim_heap
from hardbatch.pipeline.batching.kmeans import (
    Clustering,
    Lloyd,
    OnIteration,
    State,
    apportion,
    check_num_clusters,
    compact,
    kmeans,
)
from hardbatch.pipeline.batching.nearest import Nearest
from hardbatch.pipeline.batching.points import Points, Subset, partitions

_SAMPLE_PER_CELL = 256  # points that the coarse level sees
_CELLS_SEARCHED = 12  # cells whose clusters a point chooses from, in the wide iterations
_WIDE_ITERATIONS = 4


def two_level_kmeans(
    points: Points,
    num_clusters: int,
    *,
    iterations: int,
    tolerance: float,
    balance: float,
    seed: int,
    device: str = "cpu",
    on_iteration: OnIteration | None = None,
    resume_from: State | None = None,
) -> Clustering:
    """Clusters by K-Means within the cells of a coarse K-Means, then across the borders of the cells.

    Arguments and errors are those of `kmeans`; `iterations` and `tolerance` hold for the coarse level and for
    each cell. `on_iteration` is called after each cell, and after each wide iteration but the last. A call that
    resumes computes the coarse level again, a few percent of the work.
    """
    check_num_clusters(points, num_clusters)
    settings = {"iterations": iterations, "tolerance": tolerance, "balance": balance, "device": device}
    on_iteration = on_iteration or (lambda state: None)

    coarse, members = _coarse(points, num_clusters, seed, settings)
    state = resume_from or {
        "num_found": np.full(len(members), -1),
        "centroids": np.zeros((num_clusters, points.dimension), dtype=np.float32),
        "prices": np.zeros(num_clusters, dtype=np.float32),
        "objective_within": np.zeros(len(members)),
    }
    _fine(points, members, num_clusters, seed, settings, state, on_iteration)
    trim_heap()

    # The wide iterations start from the clusters of the fine level, or from the state of a wide iteration.
    num_found = state["num_found"]
    lloyd = Lloyd(state["centroids"][: num_found.sum()], balance, device)
    if "levels" in state:
        lloyd.restore(state)
    else:
        lloyd.prices, lloyd.levels = state["prices"][: num_found.sum()], [*coarse.levels, 2]
        lloyd.objective = [*coarse.objective, float(np.sum(state["objective_within"][num_found > 0]))]
    labels = _wide(points, members, coarse.centroids, lloyd, num_found, on_iteration)
    return compact(labels, lloyd)


def _coarse(
    points: Points, num_clusters: int, seed: int, settings: Mapping[str, Any]
) -> tuple[Clustering, list[Array]]:
    """Clusters a sample into √k cells, and returns these and the points (rows, ascending) of each cell."""
    num_cells = max(1, round(num_clusters**0.5))
    sample = np.sort(np.random.default_rng(seed).permutation(len(points))[: num_cells * _SAMPLE_PER_CELL])
    coarse = kmeans(Subset(points, sample), num_cells, seed=seed, **settings)

    assign = Nearest(coarse.centroids, coarse.prices, device=settings["device"])
    cell_of = np.empty(len(points), dtype=np.int32)
    for rows in partitions(len(points)):
        cell_of[rows] = assign(points.take(rows))
    order = np.argsort(cell_of, kind="stable")
    return coarse, np.split(order, np.searchsorted(cell_of[order], np.arange(1, len(coarse.centroids))))


def _fine(
    points: Points,
    members: list[Array],
    num_clusters: int,
    seed: int,
    settings: Mapping[str, Any],
    state: State,
    on_iteration: OnIteration,
) -> None:
    """Clusters the points within each cell that `state` does not hold yet, and adds them to it.

    The state is `num_found`, the number of clusters of each cell, -1 for one to come; `centroids` and
    `prices`, which have the clusters of a cell after those of the cells before; and `objective_within`, of
    each cell. k is apportioned to cells by their size; one with few distinct points may use less.
    """
    num_found = state["num_found"]
    shares = apportion(np.array([len(rows) for rows in members]), num_clusters)
    for cell in np.flatnonzero(num_found < 0).tolist():
        start = stop = int(num_found[:cell].sum())
        if shares[cell] > 0:
            found = kmeans(Subset(points, members[cell]), int(shares[cell]), seed=seed + 1 + cell, **settings)
            stop += len(found.centroids)
            state["centroids"][start:stop], state["prices"][start:stop] = found.centroids, found.prices
            state["objective_within"][cell] = found.objective[-1]
        num_found[cell] = stop - start
        on_iteration(lambda: state)


def _wide(
    points: Points,
    members: list[Array],
    cells_CD: Array,
    lloyd: Lloyd,
    num_found: Array,
    on_iteration: OnIteration,
) -> Array:
    """Lets all points choose among the clusters of the 12 cells nearest to their own; returns the labels."""
    clusters_of = np.split(np.arange(len(lloyd.centroids)), np.cumsum(num_found)[:-1])
    groups = [
        (rows, np.concatenate([clusters_of[cell] for cell in near]))
        for rows, near in zip(members, _nearest_cells(cells_CD), strict=True)
        if len(rows) > 0
    ]
    num_done = lloyd.levels.count(2) - 1  # the first value of level 2 is that of the fine level
    for _ in range(num_done, _WIDE_ITERATIONS - 1):
        lloyd.iterate(points, groups, level=2, exact=False)
        on_iteration(lambda: {**lloyd.state(), "num_found": num_found})
    return lloyd.iterate(points, groups, level=2, exact=True)


def _nearest_cells(cells_CD: Array) -> Array:
    """The nearest cells of each (int64, C × at most 12), itself first."""
    cells_CD = cells_CD.astype(np.float64)
    squares = (cells_CD**2).sum(1)
    distances = squares[:, None] + squares - 2 * (cells_CD @ cells_CD.T)
    np.fill_diagonal(distances, -np.inf)
    return np.argsort(distances, axis=1, kind="stable")[:, :_CELLS_SEARCHED]
