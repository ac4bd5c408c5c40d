"""Batches of exactly B pairs from clusters: groups of K alike pairs, and B/K groups a batch.

Clusters follow each other on a greedy tour over their centroids (tour.py). The tour is cut into
stretches whose vectors fit into memory. The clusters of a stretch fill groups (fill.py). Pairs that
answer each other's queries are spread over these (spread.py), which then trade pairs with near groups
while Eq. 2 rises (refine.py). Pairs that are left over join the next stretch; those of the last stretch
are in no group. Last, groups are drawn into batches (compose.py). If K = B, a group is a batch, and
`fill`, `spread` and `refine` speak of batches.

Shape letters: n pairs, m pairs of a stretch, k clusters, G groups, K slots of a group, D dimension.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from hardbatch.pipeline.arrays import Array, trim_heap
from hardbatch.pipeline.batching.compose import compose
from hardbatch.pipeline.batching.fill import fill_batches
from hardbatch.pipeline.batching.points import PairPoints
from hardbatch.pipeline.batching.refine import refine
from hardbatch.pipeline.batching.spread import CappedClasses, always_allowed, spread
from hardbatch.pipeline.batching.tour import greedy_tour

_STRETCH_VALUES = 2**26  # float32 values of d⊕q in a stretch: 256 MiB
_STRETCH_SCORES = 2**26  # pairs of a stretch times its groups


@dataclass(frozen=True, kw_only=True)
class Packing:
    """Points, by index: `batches` (int64, ⌊n/B⌋ × B), and the `remainder` (int64) that is in none."""

    batches: Array
    remainder: Array


@dataclass(frozen=True, kw_only=True)
class PackSettings:
    """How to pack. The fields are those of `config.PackConfig`; `seed` is that of this packing."""

    batch_size: int
    group_size: int
    seed: int = 0
    exact_tour_below: int = 8_192
    refine_rounds: int = 30
    refine_tolerance: float = 5e-4
    device: str = "cpu"


def pack(
    points: PairPoints, labels: Array, centroids: Array, settings: PackSettings, classes: Array | None = None
) -> Packing:
    """Packs clustered pairs into ⌊n/B⌋ batches; every index 0..n-1 is in a batch or in the remainder.

    Holds what the tour does, some 60 bytes per pair, and the vectors of a stretch: 256 MiB at most,
    whatever n is. For each capped class of a stretch, it holds 2 bytes per batch.

    Args:
        points: The pairs.
        labels: The cluster of each (int, n).
        centroids: Of the clusters (float32, k × D).
        settings: Among them the seed, which draws the cluster that the tour begins at.
        classes: The query class and the document class of each pair (int64, n × 2), each numbered by itself.
            Pairs of one class go to different batches as far as possible. None if no pairs share a class.
    """
    groups, left = make_groups(points, labels, centroids, settings, classes)
    if settings.group_size == settings.batch_size:
        return Packing(batches=groups, remainder=left)

    batches, undrawn = compose(points, groups, classes, batch_size=settings.batch_size, seed=settings.seed)
    return Packing(batches=batches, remainder=np.concatenate([undrawn, left]))


def make_groups(
    points: PairPoints, labels: Array, centroids: Array, settings: PackSettings, classes: Array | None = None
) -> tuple[Array, Array]:
    """Packs clustered pairs into ⌊n/K⌋ groups of alike pairs; the arguments are those of `pack`.

    Returns:
        The groups (int64, G × K), and fewer than K pairs that are in none (int64).
    """
    if settings.group_size == 1 or len(labels) == 0:
        return np.arange(len(labels)).reshape(-1, settings.group_size), np.empty(0, dtype=np.int64)

    start = int(np.random.default_rng(settings.seed).integers(len(centroids)))
    tour = greedy_tour(centroids, start, exact_below=settings.exact_tour_below)
    limit = _stretch_limit(len(labels), settings.group_size, 2 * points.dimension)
    if classes is not None and limit < len(labels):
        labels = _deal(labels, tour, classes, limit, settings)

    always = always_allowed(settings.batch_size, settings.group_size)
    left = np.empty(0, dtype=np.int64)
    groups = [np.empty((0, settings.group_size), dtype=np.int64)]
    for stretch in _stretches(labels, centroids, tour, limit):
        trim_heap()  # of what the previous stretch freed
        index = np.concatenate([*stretch.members, left])
        folded = points.take(index)
        row = lay_out(folded, stretch)
        lengths = np.array([len(members) for members in stretch.members])
        filled, rest = fill_batches(folded, row, lengths, settings.group_size)
        capped = None if classes is None else CappedClasses.of(classes[index], len(filled), always)
        if capped is not None:
            filled = spread(folded, filled, capped)
            capped = capped.at(filled)
        left, grouped = index[rest], index[filled]

        # Refining reads d⊕q, twice the size of d + q: both are never held at once.
        del folded
        trim_heap()
        refined = refine(
            torch.from_numpy(points.joined(grouped.ravel())),
            grouped,
            rounds=settings.refine_rounds,
            tolerance=settings.refine_tolerance,
            capped=capped,
            device=settings.device,
        )
        groups.append(refined.batches)
    return np.concatenate(groups), left


@dataclass(frozen=True, kw_only=True)
class _Stretch:
    """Clusters that follow each other on the tour.

    Attributes:
        members: The points of each cluster, by index (int64).
        directions: From the cluster before to the one after (one row per cluster, × D).
    """

    members: list[Array]
    directions: Array


def _stretch_limit(num_points: int, group_size: int, width: int) -> int:
    """How many pairs a stretch may have to fit into memory, such that all are of about the same length."""
    limit = int(min(_STRETCH_VALUES // width, (_STRETCH_SCORES * group_size) ** 0.5))
    return -(-num_points // -(-num_points // max(limit, group_size)))


def _deal(labels: Array, tour: Array, classes: Array, limit: int, settings: PackSettings) -> Array:
    """Deals the pairs of classes that would crowd the groups of one stretch to clusters all along the tour.

    Returns:
        The clusters of the pairs (int, n).
    """
    always = always_allowed(settings.batch_size, settings.group_size)
    capped = CappedClasses.of(classes, limit // settings.group_size, always)
    if capped is None:
        return labels
    is_large = capped.caps > always
    is_large[0] = False
    dealt = np.asarray(is_large[capped.numbers].any(1))
    others, dealt_points = np.flatnonzero(~dealt), np.flatnonzero(dealt)
    if len(others) == 0 or len(dealt_points) == 0:
        return labels

    # At even steps along the tour, in an order drawn by the seed, so that each class is dealt evenly.
    along = others[np.argsort(np.argsort(tour)[labels[others]], kind="stable")]
    steps = np.arange(len(dealt_points)) * len(along) // len(dealt_points)
    labels = labels.copy()
    labels[np.random.default_rng(settings.seed).permutation(dealt_points)] = labels[along[steps]]
    return labels


def _stretches(labels: Array, centroids: Array, tour: Array, limit: int) -> Iterator[_Stretch]:
    """Cuts the tour into stretches of at most about `limit` pairs."""
    order = np.argsort(labels, kind="stable")
    starts = np.searchsorted(labels[order], np.arange(len(centroids) + 1))
    norms = np.linalg.norm(centroids, axis=1, keepdims=True)
    unit = np.divide(centroids, norms, out=np.zeros_like(centroids), where=norms > 0)
    directions_kD = unit[np.append(tour[1:], tour[-1])] - unit[np.append(tour[0], tour[:-1])]

    members: list[Array] = []
    directions: list[Array] = []
    held = 0
    for cluster, direction in zip(tour, directions_kD, strict=True):
        own = order[starts[cluster] : starts[cluster + 1]]
        for piece in np.array_split(own, max(1, -(-len(own) // limit))):  # more than one if it exceeds a stretch
            if members and held + len(piece) > limit:
                yield _Stretch(members=members, directions=np.stack(directions))
                members, directions, held = [], [], 0
            members.append(piece)
            held += len(piece)
            directions.append(direction)
    yield _Stretch(members=members, directions=np.stack(directions))


def lay_out(points_mD: Array, stretch: _Stretch) -> Array:
    """Lays each cluster along the direction of the tour, so that its ends are near its neighbours.

    Args:
        points_mD: The members of the stretch, one cluster after another.
        stretch: Its clusters.

    Returns:
        The row: indices into `points_mD` (int64).
    """
    row = np.empty(sum(len(members) for members in stretch.members), dtype=np.int64)
    filled = 0
    for members, direction in zip(stretch.members, stretch.directions, strict=True):
        cluster = slice(filled, filled + len(members))
        if len(stretch.members) == 1:  # there are no neighbours
            direction = _widest(points_mD[cluster])
        along = np.einsum("md,d->m", points_mD[cluster], direction, dtype=np.float64)
        row[cluster] = filled + np.argsort(along, kind="stable")
        filled += len(members)
    return row


def _widest(points_nD: Array) -> Array:
    """The direction from the mean of the points to the point farthest from it."""
    apart_nD = points_nD - points_nD.mean(0)
    return np.asarray(apart_nD[np.argmax(np.einsum("nd,nd->n", apart_nD, apart_nD))])
