"""Folded K-Means: Eq. 3 with swap-symmetric centroids, which is Euclidean K-Means on s = d + q, with balanced sizes.

‖d−a‖² + ‖q−a‖² = const + 2‖a‖² − 2a·(d+q), so a centroid (a, a) is half the mean of its members' s, and the nearest
one maximises c·s − ‖c‖²/2 with c = 2a. Batches have equal sizes, so clusters should too: each centroid has a price that
is added to its score, and that falls while it has more members than its part and rises while it has fewer.

Points stream in fixed partitions; sums are float32 within a partition, float64 over them, added in a fixed order. The
last assignment is float32 with near-ties rescored in float64 (the lowest id wins); those before it may use the faster
products of the hardware. Labels do not depend on threads, nor on the block size but where float32 cannot tell centroids
apart (blocks follow from k alone).

Shape letters: n points, k clusters, D dimension.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch

from pipeline.nearest import Nearest
from pipeline.vectors import Array

_PARTITION_ROWS = 4_096
_VALUES_HELD = 2**26  # float32 values of points that are held rather than read in each iteration: 256 MiB
_SEED_TRIES = 16  # points looked at for each seed, at most
_PRICE_STEPS = (-0.3, 1.0)  # dear ones fall faster than cheap ones rise, else a cheap one may come to draw everything
_EVEN_ENOUGH = 0.01  # of the points: sizes that come nearer by less have settled


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

    The objective is Σ‖s − c‖² after the update, in float64; `levels` says which level each value belongs to. `prices`
    (float32, k) are what the last assignment added to the scores, where balance was asked for.
    """

    labels: Array
    centroids: Array
    objective: list[float]
    levels: list[int] = field(default_factory=list)
    prices: Array | None = None


def kmeans(
    points: Points,
    num_clusters: int,
    *,
    iterations: int,
    tolerance: float,
    balance: float,
    seed: int,
    device: str = "cpu",
) -> Clustering:
    """Lloyd's algorithm from distinct random points, with empty clusters re-seeded from the largest.

    In each iteration the price of a cluster moves by at most `balance` times the variance, per point, within clusters
    or between them, whichever is less; 0 is plain K-Means.
    Stops early when the objective gains less than `tolerance` of itself and sizes do not come nearer to each other.
    The result may have fewer clusters than asked where few points differ, or the last assignment empties one.
    Raises ValueError unless 1 <= num_clusters <= n.
    """
    n = len(points)
    if not 1 <= num_clusters <= n:
        raise ValueError(f"num_clusters is {num_clusters}, allowed is 1 to the number of points, {n}")
    points = _held_if_small(points)
    generator = np.random.default_rng(seed)
    lloyd = Lloyd(_distinct_points(points, num_clusters, generator), balance, device)
    everything = [(np.arange(n), np.arange(len(lloyd.centroids)))]
    labels = np.full(n, -1, dtype=np.int32)
    is_settled = False
    for iteration in range(iterations):
        previous = labels
        is_last = is_settled or iteration == iterations - 1
        labels = lloyd.iterate(points, everything, exact=is_last)
        if is_last:
            break
        is_settled = lloyd.has_settled(tolerance) or (balance == 0 and np.array_equal(labels, previous))
        lloyd.reseed(points, labels, generator)
    return compact(labels, lloyd, [1] * len(lloyd.objective))


class Lloyd:
    """Centroids and prices, and an iteration over points of which each group chooses among some centroids."""

    def __init__(self, centroids: Array, balance: float, device: str) -> None:
        self.centroids = centroids
        self._device = device
        self.prices = np.zeros(len(centroids), dtype=np.float32)
        self.objective: list[float] = []
        self.sizes = np.zeros(len(centroids), dtype=np.int64)
        self._balance = balance
        self._imbalance: list[float] = []
        self._sum_of_squares: float | None = None

    def iterate(self, points: Points, groups: list[tuple[Array, Array]], *, exact: bool) -> Array:
        """Assigns the points of each group (rows, ids of centroids), then moves centroids to means, and prices."""
        labels = np.empty(sum(len(rows) for rows, _ in groups), dtype=np.int32)
        sums = np.zeros(self.centroids.shape)
        sum_of_squares = 0.0
        for rows, choices in groups:
            assign = Nearest(self.centroids[choices], self.prices[choices], device=self._device)
            group_sums = np.zeros((len(choices), points.dimension))
            for part in partitions(len(rows)):
                block = points.take(rows[part])
                chosen = assign(block, exact=exact)
                group_sums += cluster_sums(block, chosen, len(choices))
                labels[rows[part]] = choices[chosen]
                if self._sum_of_squares is None:
                    sum_of_squares += float(np.einsum("nd,nd->", block, block, dtype=np.float64))
            sums[choices] += group_sums
        if self._sum_of_squares is None:
            self._sum_of_squares = sum_of_squares
        self.sizes = np.bincount(labels, minlength=len(self.centroids))
        filled = self.sizes > 0
        means = sums[filled] / self.sizes[filled, None]
        self.objective.append(float(self._sum_of_squares - (sums[filled] * means).sum()))
        self.centroids[filled] = means
        equal_size = len(labels) / len(self.centroids)
        self._imbalance.append(float(np.abs(self.sizes - equal_size).sum() / len(labels)))
        if not exact:  # else this was the last iteration, and these are the prices it was made with
            mean = sums.sum(0) / len(labels)
            between = float((sums[filled] * means).sum() / len(labels) - mean @ mean)
            step = self._balance * max(0.0, min(between, self.objective[-1] / len(labels)))
            self.prices -= (step * np.clip(self.sizes / equal_size - 1, *_PRICE_STEPS)).astype(np.float32)
        return labels

    def has_settled(self, tolerance: float) -> bool:
        """Whether neither the objective nor the sizes gained from the last iteration."""
        if len(self.objective) < 2:
            return False
        before, now = self.objective[-2:]
        sized = self._balance == 0 or self._imbalance[-2] - self._imbalance[-1] <= _EVEN_ENOUGH
        return sized and abs(before - now) <= tolerance * before

    def reseed(self, points: Points, labels: Array, generator: np.random.Generator) -> None:
        """Gives each empty cluster a random member of the largest cluster, which then counts as half as large."""
        expected = self.sizes.astype(np.float64)
        for empty in np.flatnonzero(self.sizes == 0):
            donor = int(np.argmax(expected))
            member = generator.choice(np.flatnonzero(labels == donor))
            self.centroids[empty] = points.take(np.array([member]))[0]
            self.prices[empty] = self.prices[donor]
            expected[donor] /= 2


def apportion(sizes: Array, total: int, *, least: int = 1) -> Array:
    """Splits `total` over groups in proportion to their `sizes`, by largest remainders (int64).

    A group that is not empty gets `least` or more, and at most its size. `total` must lie between what that makes and
    the sum of the sizes.
    """
    assert least * int((sizes > 0).sum()) <= total <= sizes.sum(), "no split into parts within these bounds"
    exact = sizes * (total / max(1, sizes.sum()))
    parts = np.minimum(np.maximum(np.floor(exact).astype(np.int64), least * (sizes > 0)), sizes)
    while (missing := total - parts.sum()) != 0:
        up = missing > 0
        open_ = np.flatnonzero(parts < sizes if up else parts > least)
        order = open_[np.argsort((parts - exact)[open_] * (1 if up else -1), kind="stable")]
        parts[order[: abs(missing)]] += 1 if up else -1
    return np.asarray(parts)


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
        if len(rows) > 1 and rows[-1] - rows[0] == len(rows) - 1 and (np.diff(rows) == 1).all():
            return self._points_nD[rows[0] : rows[-1] + 1]
        return np.asarray(self._points_nD[rows])


class Subset:
    def __init__(self, points: Points, rows: Array) -> None:
        self._points, self._rows = points, rows

    @property
    def dimension(self) -> int:
        return self._points.dimension

    def __len__(self) -> int:
        return len(self._rows)

    def take(self, rows: Array) -> Array:
        return self._points.take(self._rows[rows])


def _held_if_small(points: Points) -> Points:
    if len(points) * points.dimension > _VALUES_HELD:
        return points
    return InMemory(points.take(np.arange(len(points))))


def partitions(num_rows: int) -> Iterator[Array]:
    for start in range(0, num_rows, _PARTITION_ROWS):
        yield np.arange(start, min(start + _PARTITION_ROWS, num_rows))


def cluster_sums(points_nD: Array, labels: Array, num_clusters: int) -> Array:
    """Sum of the points of each cluster, float64 (k, D): float32 within a partition, added in the order of the rows."""
    sums = np.zeros((num_clusters, points_nD.shape[1]))
    for rows in partitions(len(points_nD)):
        part = torch.zeros(sums.shape, dtype=torch.float32)
        part.index_add_(0, torch.from_numpy(labels[rows]), torch.from_numpy(points_nD[rows[0] : rows[-1] + 1]))
        sums += part.numpy()
    return sums


def means_of_labels(points: Points, labels: Array, num_clusters: int) -> Array:
    """Mean of the points of each cluster, float32 (k, D); every cluster must have a member."""
    sums = np.zeros((num_clusters, points.dimension))
    for rows in partitions(len(points)):
        sums += cluster_sums(points.take(rows), labels[rows], num_clusters)
    return (sums / np.bincount(labels, minlength=num_clusters)[:, None]).astype(np.float32)


def within_cluster_squares(points: Points, labels: Array, centroids: Array) -> float:
    """Σ‖s − c‖² over all points, in float64 and in a fixed order."""
    total = 0.0
    for rows in partitions(len(points)):
        apart = points.take(rows).astype(np.float64) - centroids[labels[rows]]
        total += float(np.einsum("nd,nd->", apart, apart))
    return total


def compact(labels: Array, lloyd: Lloyd, levels: list[int]) -> Clustering:
    used, compact = np.unique(labels, return_inverse=True)
    return Clustering(
        labels=compact.astype(np.int32),
        centroids=np.ascontiguousarray(lloyd.centroids[used]),
        prices=lloyd.prices[used],
        objective=lloyd.objective,
        levels=levels,
    )
