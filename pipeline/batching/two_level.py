"""Two-level K-Means for many clusters: n·√k·D work an iteration instead of n·k·D.

Shape letters: n points, k clusters, D dimension.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hardbatch.pipeline.arrays import Array, trim_heap
from hardbatch.pipeline.batching.kmeans import (
    Clustering,
    Lloyd,
    OnIteration,
    State,
    apportion,
    compact,
    keep_nothing,
    kmeans,
)
from hardbatch.pipeline.batching.nearest import Nearest
from hardbatch.pipeline.batching.points import Points, Subset, partitions

_SAMPLE_PER_CELL = 256  # points that a cell of the coarse level is found from
_CELLS_SEARCHED = 12  # cells whose clusters a point chooses from at last
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
    resume_from: Mapping[str, State] | None = None,
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
    on_iteration, resume_from = on_iteration or keep_nothing, resume_from or {}
    num_cells = max(1, round(num_clusters**0.5))
    sample = np.sort(np.random.default_rng(seed).permutation(n)[: num_cells * _SAMPLE_PER_CELL])
    coarse = kmeans(
        Subset(points, sample), num_cells, seed=seed, on_iteration=on_iteration, resume_from=resume_from, **settings
    )
    if "cells" in resume_from:
        cell_of = resume_from["cells"]["cell_of"]
    else:
        cell_of = _nearest_cell(points, coarse, device)
        on_iteration("cells", lambda: {"cell_of": cell_of})
    members = _by_label(cell_of, len(coarse.centroids))
    shares = apportion(np.array([len(rows) for rows in members]), num_clusters)
    fine = _Fine.restored(resume_from.get("fine"))
    for number in range(len(fine.found), len(members)):
        rows, share = members[number], int(shares[number])
        fine.add(kmeans(Subset(points, rows), share, seed=seed + 1 + number, **settings) if share > 0 else None)
        on_iteration("fine", fine.state)
    trim_heap()
    owned = np.split(np.arange(sum(fine.found)), np.cumsum(fine.found)[:-1])
    lloyd = Lloyd(np.concatenate(fine.centroids), balance, device)
    lloyd.prices = np.concatenate(fine.prices)
    lloyd.objective, lloyd.levels = [*coarse.objective, float(np.sum(fine.objective))], [*coarse.levels, 2]
    del fine
    lloyd.restore(resume_from.get("wide"))
    near = _nearest_cells(coarse.centroids)
    choices = [
        (rows, np.concatenate([owned[cell] for cell in near[number]]))
        for number, rows in enumerate(members)
        if len(rows) > 0
    ]
    for iteration in range(lloyd.levels.count(2) - 1, _WIDE_ITERATIONS):
        labels = lloyd.iterate(points, choices, level=2, exact=iteration == _WIDE_ITERATIONS - 1)
        if iteration < _WIDE_ITERATIONS - 1:
            on_iteration("wide", lloyd.state)
    return compact(labels, lloyd)


@dataclass(kw_only=True)
class _Fine:
    """What was found in the cells so far: how many clusters in each, their centroids and prices, the objective."""

    found: list[int] = field(default_factory=list)
    centroids: list[Array] = field(default_factory=list)
    prices: list[Array] = field(default_factory=list)
    objective: list[float] = field(default_factory=list)

    def add(self, clustering: Clustering | None) -> None:
        """Adds those of the next cell; None: it has no points."""
        self.found.append(len(clustering.centroids) if clustering else 0)
        if clustering is not None and clustering.prices is not None:
            self.centroids.append(clustering.centroids)
            self.prices.append(clustering.prices)
            self.objective.append(clustering.objective[-1])

    def state(self) -> State:
        return {
            "found": np.array(self.found),
            "centroids": np.concatenate(self.centroids),
            "prices": np.concatenate(self.prices),
            "objective": np.array(self.objective),
        }

    @classmethod
    def restored(cls, state: State | None) -> _Fine:
        if state is None:
            return cls()
        return cls(
            found=state["found"].tolist(),
            centroids=[state["centroids"]],
            prices=[state["prices"]],
            objective=state["objective"].tolist(),
        )


def _nearest_cell(points: Points, coarse: Clustering, device: str) -> Array:
    """The cell of each point (int32, n)."""
    cell_of = np.empty(len(points), dtype=np.int32)
    assign = Nearest(coarse.centroids, coarse.prices, device=device)
    for rows in partitions(len(points)):
        cell_of[rows] = assign(points.take(rows))
    return cell_of


def _by_label(labels: Array, num_labels: int) -> list[Array]:
    order = np.argsort(labels, kind="stable")
    return np.split(order, np.searchsorted(labels[order], np.arange(1, num_labels)))


def _nearest_cells(centroids: Array) -> Array:
    """The nearest cells of each (int64, k × at most 12), itself first."""
    squares = (centroids.astype(np.float64) ** 2).sum(1)
    distances = squares[:, None] + squares - 2 * (centroids.astype(np.float64) @ centroids.T)
    np.fill_diagonal(distances, -np.inf)
    return np.argsort(distances, axis=1, kind="stable")[:, :_CELLS_SEARCHED]
