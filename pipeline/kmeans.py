"""Folded K-Means: Eq. 3 with swap-symmetric centroids, which is Euclidean K-Means on s = d + q.

‖d−a‖² + ‖q−a‖² = const + 2‖a‖² − 2a·(d+q), so a centroid (a, a) is half the mean of its members' s, and the nearest
one maximises c·s − ‖c‖²/2 with c = 2a. Points stream in fixed partitions; sums are float64 and added in a fixed order;
near-ties are rescored in float64 and go to the lowest id. So labels do not depend on threads or block size.

Shape letters: n points, k clusters, D dimension.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch

from pipeline.vectors import Array

_PARTITION_ROWS = 16_384
_SCORES_HELD = 2**24  # float32 scores of a block of points: 64 MiB
_VALUES_HELD = 2**26  # float32 values of a coarse cluster that are held rather than read in each iteration: 256 MiB
_MIN_BLOCK_ROWS = 64
_SEED_TRIES = 16  # points looked at for each seed, at most
_NEAR_TIE = 1e-4  # scores are dot products of vectors of norm up to 2 in float32: two orders above their error


class Points(Protocol):
    """Points to cluster, read by row."""

    @property
    def dimension(self) -> int: ...

    def __len__(self) -> int: ...

    def take(self, rows: Array) -> Array:
        """float32 (len(rows), D)."""


@dataclass(frozen=True, kw_only=True)
class Clustering:
    """Labels (int32, n) of non-empty clusters 0..k-1, their means (float32, k × D), the objective per iteration.

    The objective is Σ‖s − c‖² after the update, in float64; `levels` says which level each value belongs to.
    """

    labels: Array
    centroids: Array
    objective: list[float]
    levels: list[int] = field(default_factory=list)


def kmeans(points: Points, num_clusters: int, *, iterations: int, tolerance: float, seed: int) -> Clustering:
    """Lloyd's algorithm from distinct random points, with empty clusters re-seeded from the largest.

    Stops early when the objective gains less than `tolerance` of itself. The result may have fewer clusters than asked
    where there are fewer distinct points. Raises ValueError unless 1 <= num_clusters <= n.
    """
    n = len(points)
    if not 1 <= num_clusters <= n:
        raise ValueError(f"num_clusters is {num_clusters}, allowed is 1 to the number of points, {n}")
    generator = np.random.default_rng(seed)
    centroids = _distinct_points(points, num_clusters, generator)
    labels = np.full(n, -1, dtype=np.int32)
    objective: list[float] = []
    for _ in range(iterations):
        previous = labels
        labels, sums, sum_of_squares = _assign_and_sum(points, centroids)
        sizes = np.bincount(labels, minlength=len(centroids))
        filled = sizes > 0
        means = sums[filled] / sizes[filled, None]
        objective.append(float(sum_of_squares - (sums[filled] * means).sum()))
        centroids = np.zeros_like(centroids)
        centroids[filled] = means
        if np.array_equal(labels, previous) or _has_settled(objective, tolerance):
            break
        _reseed(points, centroids, labels, sizes, generator)
    return _compact(labels, centroids, objective)


def _distinct_points(points: Points, num_clusters: int, generator: np.random.Generator) -> Array:
    """Random points that differ from each other, float32 (at most num_clusters, D); few duplicates cost no more."""
    order = generator.permutation(len(points))[: num_clusters * _SEED_TRIES]
    chosen: dict[bytes, Array] = {}
    for start in range(0, len(order), num_clusters):
        for row in points.take(order[start : start + num_clusters]):
            chosen.setdefault(row.tobytes(), row)
        if len(chosen) >= num_clusters:
            break
    return np.stack(list(chosen.values())[:num_clusters])


def two_level_kmeans(points: Points, cluster_size: int, *, iterations: int, tolerance: float, seed: int) -> Clustering:
    """K-Means within the clusters of a coarse K-Means of √k clusters: n·√k·D work an iteration instead of n·k·D."""
    n = len(points)
    num_coarse = max(1, round((n / cluster_size) ** 0.5))
    coarse = kmeans(points, num_coarse, iterations=iterations, tolerance=tolerance, seed=seed)
    order = np.argsort(coarse.labels, kind="stable")
    starts = np.searchsorted(coarse.labels[order], np.arange(len(coarse.centroids) + 1))
    labels = np.empty(n, dtype=np.int32)
    centroids: list[Array] = []
    objective: list[float] = []
    num_clusters = 0
    for number in range(len(coarse.centroids)):
        members = order[starts[number] : starts[number + 1]]
        subset: Points = _Subset(points, members)
        if len(members) * points.dimension <= _VALUES_HELD:
            subset = InMemory(points.take(members))
        fine = kmeans(
            subset,
            -(-len(members) // cluster_size),
            iterations=iterations,
            tolerance=tolerance,
            seed=seed + 1 + number,
        )
        labels[members] = fine.labels + num_clusters
        num_clusters += len(fine.centroids)
        centroids.append(fine.centroids)
        objective.append(fine.objective[-1])
    return Clustering(
        labels=labels,
        centroids=np.concatenate(centroids),
        objective=[*coarse.objective, float(np.sum(objective))],
        levels=[1] * len(coarse.objective) + [2],
    )


class InMemory:
    """Points that are held, float32 (n, D)."""

    def __init__(self, points_nD: Array) -> None:
        self._points_nD = points_nD

    def __len__(self) -> int:
        return len(self._points_nD)

    @property
    def dimension(self) -> int:
        return int(self._points_nD.shape[1])

    def take(self, rows: Array) -> Array:
        return np.asarray(self._points_nD[rows])


class _Subset:
    def __init__(self, points: Points, rows: Array) -> None:
        self._points, self._rows = points, rows

    @property
    def dimension(self) -> int:
        return self._points.dimension

    def __len__(self) -> int:
        return len(self._rows)

    def take(self, rows: Array) -> Array:
        return self._points.take(self._rows[rows])


def nearest(points_nD: Array, centroids_kD: Array) -> Array:
    """The cluster (int32, n) that maximises c·s − ‖c‖²/2 for each point, the lowest id on a tie."""
    centroids = torch.from_numpy(centroids_kD)
    offsets = -0.5 * (centroids.double() ** 2).sum(1)
    block = max(_MIN_BLOCK_ROWS, _SCORES_HELD // len(centroids_kD))
    labels = np.empty(len(points_nD), dtype=np.int32)
    for start in range(0, len(points_nD), block):
        chunk = torch.from_numpy(points_nD[start : start + block])
        scores = torch.addmm(offsets.float(), chunk, centroids.T)
        best, chosen = scores.max(1)
        near = scores >= (best - _NEAR_TIE)[:, None]
        for row in torch.nonzero(near.sum(1) > 1).flatten().tolist():
            candidates = torch.nonzero(near[row]).flatten().numpy()
            exact = np.einsum(
                "kd,d->k", centroids_kD[candidates].astype(np.float64), points_nD[start + row].astype(np.float64)
            )
            chosen[row] = int(candidates[np.argmax(exact + offsets.numpy()[candidates])])
        labels[start : start + block] = chosen.numpy()
    return labels


def cluster_sums(points_nD: Array, labels: Array, num_clusters: int) -> Array:
    """Sum of the points of each cluster, float64 (k, D), added in the order of the rows."""
    from scipy.sparse import csr_array

    membership = csr_array((np.ones(len(labels)), (labels, np.arange(len(labels)))), shape=(num_clusters, len(labels)))
    return np.asarray(membership @ points_nD.astype(np.float64))


def means_of_labels(points: Points, labels: Array, num_clusters: int) -> Array:
    """Mean of the points of each cluster, float32 (k, D); every cluster must have a member."""
    sums = np.zeros((num_clusters, points.dimension))
    for start in range(0, len(points), _PARTITION_ROWS):
        rows = np.arange(start, min(start + _PARTITION_ROWS, len(points)))
        sums += cluster_sums(points.take(rows), labels[rows], num_clusters)
    return (sums / np.bincount(labels, minlength=num_clusters)[:, None]).astype(np.float32)


def within_cluster_squares(points: Points, labels: Array, centroids: Array) -> float:
    """Σ‖s − c‖² over all points, in float64 and in a fixed order."""
    total = 0.0
    for start in range(0, len(points), _PARTITION_ROWS):
        rows = np.arange(start, min(start + _PARTITION_ROWS, len(points)))
        apart = points.take(rows).astype(np.float64) - centroids[labels[rows]]
        total += float(np.einsum("nd,nd->", apart, apart))
    return total


def _assign_and_sum(points: Points, centroids: Array) -> tuple[Array, Array, float]:
    labels = np.empty(len(points), dtype=np.int32)
    sums = np.zeros(centroids.shape)
    sum_of_squares = 0.0
    for start in range(0, len(points), _PARTITION_ROWS):
        rows = np.arange(start, min(start + _PARTITION_ROWS, len(points)))
        block = points.take(rows)
        labels[rows] = nearest(block, centroids)
        sums += cluster_sums(block, labels[rows], len(centroids))
        sum_of_squares += float(np.einsum("nd,nd->", block, block, dtype=np.float64))
    return labels, sums, sum_of_squares


def _has_settled(objective: list[float], tolerance: float) -> bool:
    return len(objective) > 1 and objective[-2] - objective[-1] <= tolerance * objective[-2]


def _reseed(points: Points, centroids: Array, labels: Array, sizes: Array, generator: np.random.Generator) -> None:
    """Gives each empty cluster a random member of the largest cluster, which then counts as half as large."""
    expected = sizes.astype(np.float64)
    for empty in np.flatnonzero(sizes == 0):
        donor = int(np.argmax(expected))
        member = generator.choice(np.flatnonzero(labels == donor))
        centroids[empty] = points.take(np.array([member]))[0]
        expected[donor] /= 2


def _compact(labels: Array, centroids: Array, objective: list[float]) -> Clustering:
    used, compact = np.unique(labels, return_inverse=True)
    return Clustering(
        labels=compact.astype(np.int32),
        centroids=np.ascontiguousarray(centroids[used]),
        objective=objective,
        levels=[1] * len(objective),
    )
