"""Folded K-Means: Eq. 3 with swap-symmetric centroids, and clusters of balanced sizes.

With centroids (a, a), ‖d−a‖² + ‖q−a‖² = const + 2‖a‖² − 2a·(d+q). So Eq. 3 is Euclidean K-Means on
s = d + q: the best centroid of a cluster has c = 2a at the mean of its s, and the nearest centroid of a
point maximises c·s − ‖c‖²/2.

Batches have equal sizes, so clusters should too. Each centroid has a price that is added to its score;
the price falls while the cluster is larger than n/k, and rises while it is smaller.

Points stream in fixed partitions; sums are float32 within a partition, and float64 over partitions in a
fixed order. Only the last assignment is exact, the ones before may use the fastest products of the
hardware (nearest.py). Labels do not depend on the number of threads. Nor do they depend on the block
size, except where float32 cannot tell two centroids apart; and the block size follows from k alone.

Shape letters: n points, k clusters, D dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from hardbatch.pipeline.arrays import Array
from hardbatch.pipeline.batching.nearest import Nearest
from hardbatch.pipeline.batching.points import Points, Subset, cache_in_memory, cluster_sums, partitions

_SEED_TRIES = 16  # points looked at per seed, at most
_PRICE_STEPS = (-0.3, 1.0)  # high prices fall faster than low ones rise, or one low price could absorb every point
_SAMPLE_PART = 4  # the sample is a quarter of the points,
_SAMPLE_PER_CLUSTER = 32  # but at least 32 points per cluster
_WHOLE_ITERATIONS = 4  # the last iterations, which see all points
_EVEN_ENOUGH = 0.01  # sizes have settled if their imbalance, as a part of the points, falls by less than this

State = Mapping[str, Array]
OnIteration = Callable[[Callable[[], State]], None]


@dataclass(frozen=True, kw_only=True)
class Clustering:
    """Clusters of n points.

    Attributes:
        labels: The cluster of each point, 0..k-1, none of them empty (int32, n).
        centroids: The means of the clusters (float32, k × D).
        objective: Σ‖s − c‖² after each iteration, in float64, over the points that it saw.
        levels: What each iteration saw: 0 is a sample, 1 all points, 2 the second of two levels.
        prices: What the last assignment added to the scores (float32, k); empty if the method has no prices.
    """

    labels: Array
    centroids: Array
    objective: list[float]
    levels: list[int] = field(default_factory=list)
    prices: Array = field(default_factory=lambda: np.empty(0, dtype=np.float32))


def kmeans(
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
    """Runs Lloyd's algorithm from distinct random points, re-seeding empty clusters from the largest.

    All iterations but the last 4 see a sample: a quarter of the points, or 32 per cluster if that is more.

    Args:
        points: What to cluster.
        num_clusters: k. There may be fewer clusters, if few points differ or the last assignment empties one.
        iterations: The maximum, of those over the sample and those over all points together.
        tolerance: The sample, and then the algorithm, is left early when the objective improves by less than
            this part of itself, and sizes have settled.
        balance: By how much the price of a cluster moves per iteration, at most: a factor of the variance per
            point, within clusters or between them, whichever is less. 0 is plain K-Means.
        seed: Of the random points.
        device: Of the products, as torch names it.
        on_iteration: Is called after each iteration but the last, with a function that returns the state. The
            arrays of the state change in the next iteration.
        resume_from: A state of a call with the same arguments. The iterations that led to it are skipped, and
            the result is the same. Its arrays are taken over.

    Raises:
        ValueError: Unless 1 <= num_clusters <= n.
    """
    check_num_clusters(points, num_clusters)
    points = cache_in_memory(points)
    generator = np.random.default_rng(seed)
    lloyd = Lloyd(_distinct_points(points, num_clusters, generator), balance, device)
    sample = _sample(points, num_clusters, generator) if iterations > _WHOLE_ITERATIONS else None

    lloyd.restore(resume_from)
    for level, seen, last in ((0, sample, iterations - _WHOLE_ITERATIONS), (1, points, iterations - 1)):
        while seen is not None and len(lloyd.objective) < last and not lloyd.has_settled(level, tolerance):
            labels = lloyd.iterate(seen, _all_of(seen, lloyd), level=level, exact=False)
            lloyd.reseed(seen, labels, np.random.default_rng([seed, len(lloyd.objective)]))
            if on_iteration is not None:
                on_iteration(lloyd.state)

    labels = lloyd.iterate(points, _all_of(points, lloyd), level=1, exact=True)
    return compact(labels, lloyd)


def check_num_clusters(points: Points, num_clusters: int) -> None:
    """Raises ValueError unless 1 <= num_clusters <= n."""
    if not 1 <= num_clusters <= len(points):
        raise ValueError(f"num_clusters is {num_clusters}, allowed is 1 to the number of points, {len(points)}")


class Lloyd:
    """Centroids and prices, and the iteration that moves them."""

    def __init__(self, centroids: Array, balance: float, device: str) -> None:
        self.centroids = centroids
        self.prices = np.zeros(len(centroids), dtype=np.float32)
        self.sizes = np.zeros(len(centroids), dtype=np.int64)
        self.objective: list[float] = []
        self.levels: list[int] = []
        self._imbalance: list[float] = []
        self._sum_of_squares: dict[int, float] = {}  # of the points of each level
        self._balance = balance
        self._device = device

    def state(self) -> State:
        """Everything that the next iteration depends on, for `restore`."""
        return {
            "centroids": self.centroids,
            "prices": self.prices,
            "objective": np.array(self.objective),
            "levels": np.array(self.levels, dtype=np.int64),
            "imbalance": np.array(self._imbalance),
        }

    def restore(self, state: State | None) -> None:
        """Continues from `state`, if there is one."""
        if state is not None:
            self.centroids, self.prices = state["centroids"], state["prices"]
            self.objective, self.levels = state["objective"].tolist(), state["levels"].tolist()
            self._imbalance = state["imbalance"].tolist()

    def iterate(self, points: Points, groups: list[tuple[Array, Array]], *, level: int, exact: bool) -> Array:
        """Assigns points to centroids, then moves centroids to the means of their points, and prices.

        Args:
            points: All points of this level.
            groups: Rows of `points`, and the ids of the centroids that these may choose from; each row is in
                one group.
            level: Recorded beside the objective.
            exact: Whether the assignment is exact, and the last one: prices stay what it was made with.

        Returns:
            The labels (int32, n).
        """
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
                if level not in self._sum_of_squares:
                    sum_of_squares += float(np.einsum("nd,nd->", block, block, dtype=np.float64))
            sums[choices] += group_sums

        # Σ‖s − c‖² = Σ‖s‖² − Σ‖c‖², each c counted as often as it has points.
        self.sizes = np.bincount(labels, minlength=len(self.centroids))
        means = np.divide(sums, np.maximum(self.sizes, 1)[:, None], out=sums)
        captured = float(np.einsum("kd,kd,k->", means, means, self.sizes))
        self.objective.append(self._sum_of_squares.setdefault(level, sum_of_squares) - captured)
        self.levels.append(level)
        np.copyto(self.centroids, means, where=self.sizes[:, None] > 0, casting="same_kind")

        equal_size = len(labels) / len(self.centroids)
        self._imbalance.append(float(np.abs(self.sizes - equal_size).sum() / len(labels)))
        if not exact:
            mean = np.einsum("k,kd->d", self.sizes, means) / len(labels)
            between = captured / len(labels) - float(mean @ mean)
            within = self.objective[-1] / len(labels)
            step = self._balance * max(0.0, min(between, within))
            self.prices -= (step * np.clip(self.sizes / equal_size - 1, *_PRICE_STEPS)).astype(np.float32)
        return labels

    def has_settled(self, level: int, tolerance: float) -> bool:
        """Whether the last iteration improved neither the objective nor the sizes, of two of this level."""
        if self.levels[-2:] != [level, level]:
            return False
        before, now = self.objective[-2:]
        sizes_settled = self._balance == 0 or self._imbalance[-2] - self._imbalance[-1] <= _EVEN_ENOUGH
        return sizes_settled and abs(before - now) <= tolerance * before

    def reseed(self, points: Points, labels: Array, generator: np.random.Generator) -> None:
        """Moves each empty cluster to a random member of the largest, which then counts as half as large."""
        expected = self.sizes.astype(np.float64)
        for empty in np.flatnonzero(self.sizes == 0):
            donor = int(np.argmax(expected))
            member = generator.choice(np.flatnonzero(labels == donor))
            self.centroids[empty] = points.take(np.array([member]))[0]
            self.prices[empty] = self.prices[donor]
            expected[donor] /= 2


def apportion(sizes: Array, total: int, *, least: int = 1) -> Array:
    """Splits `total` over groups in proportion to their `sizes`, by largest remainders (int64).

    A group that is not empty gets at least `least`, and at most its size: apportion([97, 1, 1, 1], 5) is
    [2, 1, 1, 1]. `total` must be between the sums of these bounds.
    """
    assert least * int((sizes > 0).sum()) <= total <= sizes.sum(), "total is outside of the bounds"
    exact = sizes * (total / max(1, sizes.sum()))
    parts = np.minimum(np.maximum(np.floor(exact).astype(np.int64), least * (sizes > 0)), sizes)

    # Rounding down leaves some of the total over; raising to `least` may use too much of it. The difference
    # is given to, or taken from, the groups that are furthest from their exact part, one each.
    while (missing := total - parts.sum()) != 0:
        up = missing > 0
        open_ = np.flatnonzero(parts < sizes if up else parts > least)
        order = open_[np.argsort((parts - exact)[open_] * (1 if up else -1), kind="stable")]
        parts[order[: abs(missing)]] += 1 if up else -1
    return np.asarray(parts)


def _all_of(points: Points, lloyd: Lloyd) -> list[tuple[Array, Array]]:
    return [(np.arange(len(points)), np.arange(len(lloyd.centroids)))]


def _sample(points: Points, num_clusters: int, generator: np.random.Generator) -> Points | None:
    """What the first iterations see; None if that would be all points."""
    num_rows = max(len(points) // _SAMPLE_PART, num_clusters * _SAMPLE_PER_CLUSTER)
    if num_rows >= len(points):
        return None
    return cache_in_memory(Subset(points, np.sort(generator.permutation(len(points))[:num_rows])))


def _distinct_points(points: Points, num_clusters: int, generator: np.random.Generator) -> Array:
    """Random points that differ from each other, float32 (at most num_clusters × D)."""
    order = generator.permutation(len(points))[: num_clusters * _SEED_TRIES]
    chosen: dict[bytes, Array] = {}

    # One slice of the order is enough unless some of its points are equal.
    for start in range(0, len(order), num_clusters):
        for row in points.take(order[start : start + num_clusters]):
            chosen.setdefault(row.tobytes(), row)
        if len(chosen) >= num_clusters:
            break
    return np.stack(list(chosen.values())[:num_clusters])


def compact(labels: Array, lloyd: Lloyd) -> Clustering:
    """The clusters that have a member, numbered 0..k-1."""
    used, compact = np.unique(labels, return_inverse=True)
    return Clustering(
        labels=compact.astype(np.int32),
        centroids=np.ascontiguousarray(lloyd.centroids[used]),
        prices=lloyd.prices[used],
        objective=lloyd.objective,
        levels=lloyd.levels,
    )
