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

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from hardbatch.pipeline.arrays import Array
from hardbatch.pipeline.batching.nearest import Nearest
from hardbatch.pipeline.batching.points import Points, Subset, cache_in_memory, cluster_sums, partitions

_SEED_TRIES = 16  # points looked at for each seed, at most
_PRICE_STEPS = (-0.3, 1.0)  # dear ones fall faster than cheap ones rise, else a cheap one may come to draw everything
_SAMPLE_PART = 4  # of the points, one in so many is in the sample
_SAMPLE_PER_CLUSTER = 32  # at least
_WHOLE_ITERATIONS = 4  # the last ones, that see all points
_EVEN_ENOUGH = 0.01  # of the points: sizes that come nearer by less have settled

State = Mapping[str, Array]
OnIteration = Callable[[str, Callable[[], State]], None]


@dataclass(frozen=True, kw_only=True)
class Clustering:
    """Labels (int32, n) of non-empty clusters 0..k-1, their means (float32, k × D), the objective per iteration.

    The objective is Σ‖s − c‖² after the update, in float64, over the points that the iteration saw; `levels` says which
    level each value belongs to, 0 being a sample. `prices` (float32, k) are what the last assignment added to the
    scores, where balance was asked for.
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
    on_iteration: OnIteration | None = None,
    resume_from: Mapping[str, State] | None = None,
) -> Clustering:
    """Lloyd's algorithm from distinct random points, with empty clusters re-seeded from the largest.

    All `iterations` but the last 4 see a sample: a quarter of the points, or 32 a cluster where that is more.
    In each iteration the price of a cluster moves by at most `balance` times the variance, per point, within clusters
    or between them, whichever is less; 0 is plain K-Means.
    It leaves the sample, and then ends, early when the objective gains less than `tolerance` of itself and sizes do not
    come nearer to each other.
    After each iteration, `on_iteration` is called with the name of a state and a function that returns it. The states
    that it kept, by name, are the `resume_from` of a later call with the same arguments, which then skips the
    iterations that are done and returns the same result.
    The result may have fewer clusters than asked where few points differ, or the last assignment empties one.
    Raises ValueError unless 1 <= num_clusters <= n.
    """
    n = len(points)
    if not 1 <= num_clusters <= n:
        raise ValueError(f"num_clusters is {num_clusters}, allowed is 1 to the number of points, {n}")
    points = cache_in_memory(points)
    generator = np.random.default_rng(seed)
    lloyd = Lloyd(_distinct_points(points, num_clusters, generator), balance, device)
    sample = _sample(points, num_clusters, generator) if iterations > _WHOLE_ITERATIONS else None
    on_iteration = on_iteration or keep_nothing
    lloyd.restore((resume_from or {}).get("lloyd"))
    for level, seen, last in ((0, sample, iterations - _WHOLE_ITERATIONS), (1, points, iterations - 1)):
        while seen is not None and len(lloyd.objective) < last and not lloyd.has_settled(level, tolerance):
            labels = lloyd.iterate(seen, _all_of(seen, lloyd), level=level, exact=False)
            lloyd.reseed(seen, labels, np.random.default_rng([seed, len(lloyd.objective)]))
            on_iteration("lloyd", lloyd.state)
    labels = lloyd.iterate(points, _all_of(points, lloyd), level=1, exact=True)
    return compact(labels, lloyd)


class Lloyd:
    """Centroids and prices, and an iteration over points of which each group chooses among some centroids."""

    def __init__(self, centroids: Array, balance: float, device: str) -> None:
        self.centroids = centroids
        self._device = device
        self.prices = np.zeros(len(centroids), dtype=np.float32)
        self.objective: list[float] = []
        self.levels: list[int] = []
        self.sizes = np.zeros(len(centroids), dtype=np.int64)
        self._balance = balance
        self._imbalance: list[float] = []
        self._sum_of_squares: dict[int, float] = {}

    def state(self) -> State:
        """All that the next iteration needs, to be given to `restore`."""
        return {
            "centroids": self.centroids,
            "prices": self.prices,
            "objective": np.array(self.objective),
            "levels": np.array(self.levels, dtype=np.int64),
            "imbalance": np.array(self._imbalance),
        }

    def restore(self, state: State | None) -> None:
        """Goes on from a `state`; None: from where it is."""
        if state is not None:
            self.centroids, self.prices = state["centroids"], state["prices"]
            self.objective, self.levels = state["objective"].tolist(), state["levels"].tolist()
            self._imbalance = state["imbalance"].tolist()

    def iterate(self, points: Points, groups: list[tuple[Array, Array]], *, level: int, exact: bool) -> Array:
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
                if level not in self._sum_of_squares:
                    sum_of_squares += float(np.einsum("nd,nd->", block, block, dtype=np.float64))
            sums[choices] += group_sums
        self.sizes = np.bincount(labels, minlength=len(self.centroids))
        means = np.divide(sums, np.maximum(self.sizes, 1)[:, None], out=sums)
        captured = float(np.einsum("kd,kd,k->", means, means, self.sizes))
        self.objective.append(self._sum_of_squares.setdefault(level, sum_of_squares) - captured)
        self.levels.append(level)
        np.copyto(self.centroids, means, where=self.sizes[:, None] > 0, casting="same_kind")
        equal_size = len(labels) / len(self.centroids)
        self._imbalance.append(float(np.abs(self.sizes - equal_size).sum() / len(labels)))
        if not exact:  # else this was the last iteration, and these are the prices it was made with
            mean = np.einsum("k,kd->d", self.sizes, means) / len(labels)
            between = captured / len(labels) - float(mean @ mean)
            step = self._balance * max(0.0, min(between, self.objective[-1] / len(labels)))
            self.prices -= (step * np.clip(self.sizes / equal_size - 1, *_PRICE_STEPS)).astype(np.float32)
        return labels

    def has_settled(self, level: int, tolerance: float) -> bool:
        """Whether neither the objective nor the sizes gained from the last iteration, of two of this level."""
        if self.levels[-2:] != [level, level]:
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


def keep_nothing(name: str, state: Callable[[], State]) -> None:
    """The `on_iteration` of a clustering that will not be resumed."""


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


def _all_of(points: Points, lloyd: Lloyd) -> list[tuple[Array, Array]]:
    return [(np.arange(len(points)), np.arange(len(lloyd.centroids)))]


def _sample(points: Points, num_clusters: int, generator: np.random.Generator) -> Points | None:
    """What the first iterations see; None: nothing less than all points."""
    num_rows = max(len(points) // _SAMPLE_PART, num_clusters * _SAMPLE_PER_CLUSTER)
    if num_rows >= len(points):
        return None
    return cache_in_memory(Subset(points, np.sort(generator.permutation(len(points))[:num_rows])))


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


def compact(labels: Array, lloyd: Lloyd) -> Clustering:
    """The clusters that have a member, numbered anew."""
    used, compact = np.unique(labels, return_inverse=True)
    return Clustering(
        labels=compact.astype(np.int32),
        centroids=np.ascontiguousarray(lloyd.centroids[used]),
        prices=lloyd.prices[used],
        objective=lloyd.objective,
        levels=lloyd.levels,
    )
