"""Points to cluster, in memory or read by row, and their sums in fixed partitions.

Sums are float32 within a partition, and float64 over partitions, added in a fixed order. So they are the same
for any number of threads.

Shape letters: n points, k clusters, D dimension.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch

from hardbatch.pipeline.arrays import Array, empty

_PARTITION_ROWS = 4_096
_VALUES_HELD = 2**26  # float32 values, 256 MiB: points are held up to this size, and read in each iteration above it


class Points(Protocol):
    """Points to cluster, read by row."""

    @property
    def dimension(self) -> int: ...

    def __len__(self) -> int: ...

    def take(self, rows: Array) -> Array:
        """float32 (len(rows), D)."""


class PairPoints(Points, Protocol):
    """Folded points s = d + q of pairs, whose two sides can be read as well."""

    def sides(self, rows: Array) -> tuple[Array, Array]:
        """d and q of the pairs at `rows`, each float32 (len(rows), D)."""

    def joined(self, rows: Array) -> Array:
        """d⊕q of the pairs at `rows`, float32 (len(rows), 2·D)."""


class InMemory:
    """Points in memory, float32 (n, D)."""

    def __init__(self, points_nD: Array) -> None:
        self._points_nD = points_nD

    def __len__(self) -> int:
        return len(self._points_nD)

    @property
    def dimension(self) -> int:
        return int(self._points_nD.shape[1])

    def take(self, rows: Array) -> Array:
        """The points at `rows`; a view if these are consecutive."""
        if len(rows) > 1 and rows[-1] - rows[0] == len(rows) - 1 and (np.diff(rows) == 1).all():
            return self._points_nD[rows[0] : rows[-1] + 1]
        return np.asarray(self._points_nD[rows])


class Subset:
    """The points at `rows` of others."""

    def __init__(self, points: Points, rows: Array) -> None:
        self._points, self._rows = points, rows

    @property
    def dimension(self) -> int:
        return self._points.dimension

    def __len__(self) -> int:
        return len(self._rows)

    def take(self, rows: Array) -> Array:
        return self._points.take(self._rows[rows])


def cache_in_memory(points: Points) -> Points:
    """Reads the points once for all, unless they are too many to hold."""
    if len(points) * points.dimension > _VALUES_HELD:
        return points
    held = empty((len(points), points.dimension), np.float32)
    for rows in partitions(len(points)):
        held[rows[0] : rows[-1] + 1] = points.take(rows)
    return InMemory(held)


def partitions(num_rows: int) -> Iterator[Array]:
    """The rows of each partition."""
    for start in range(0, num_rows, _PARTITION_ROWS):
        yield np.arange(start, min(start + _PARTITION_ROWS, num_rows))


def cluster_sums(points_nD: Array, labels: Array, num_clusters: int) -> Array:
    """Sums of the points of each cluster, float64 (k, D)."""
    sums = np.zeros((num_clusters, points_nD.shape[1]))
    for rows in partitions(len(points_nD)):
        part = np.zeros(sums.shape, dtype=np.float32)
        added = torch.from_numpy(points_nD[rows[0] : rows[-1] + 1])
        torch.from_numpy(part).index_add_(0, torch.from_numpy(labels[rows]), added)
        sums += part
    return sums


def means_of_labels(points: Points, labels: Array, num_clusters: int) -> Array:
    """Means of the points of each cluster, float32 (k, D); every cluster must have a member."""
    sums = np.zeros((num_clusters, points.dimension))
    for rows in partitions(len(points)):
        sums += cluster_sums(points.take(rows), labels[rows], num_clusters)
    return (sums / np.bincount(labels, minlength=num_clusters)[:, None]).astype(np.float32)


def within_cluster_squares(points: Points, labels: Array, centroids: Array) -> float:
    """Σ‖s − c‖² over all points, in float64."""
    total = 0.0
    for rows in partitions(len(points)):
        apart = points.take(rows).astype(np.float64) - centroids[labels[rows]]
        total += float(np.einsum("nd,nd->", apart, apart))
    return total
