"""Batches of exactly B pairs from clusters.

Clusters follow each other on a greedy tour over their centroids. Stretch by stretch of the tour, batches are filled
from its clusters (fill.py) and then trade pairs with near batches as long as Eq. 2 rises (refine.py). What fits no
batch of a stretch goes on to the next; what the last one leaves is the remainder.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from hardbatch.pipeline.arrays import Array, trim_heap
from hardbatch.pipeline.batching.fill import fill_batches
from hardbatch.pipeline.batching.points import PairPoints
from hardbatch.pipeline.batching.refine import refine
from hardbatch.pipeline.batching.tour import greedy_tour

_STRETCH_VALUES = 2**26  # float32 values of d⊕q held of a stretch of the tour: 256 MiB
_STRETCH_SCORES = 2**26  # pairs of a stretch times its batches


@dataclass(frozen=True, kw_only=True)
class Packing:
    """Places of points: `batches` (int64, number of batches × B) and the `remainder` (int64) that fills none."""

    batches: Array
    remainder: Array


@dataclass(frozen=True, kw_only=True)
class PackSettings:
    """How to pack; fields as in `config.PackConfig`, `seed` of this packing."""

    batch_size: int
    seed: int = 0
    exact_tour_below: int = 8_192
    refine_rounds: int = 30
    refine_tolerance: float = 5e-4
    device: str = "cpu"


def pack(points: PairPoints, labels: Array, centroids: Array, settings: PackSettings) -> Packing:
    """Packs n points with `labels` (int, n) and `centroids` (k × D) into ⌊n/B⌋ batches.

    The tour starts at a random cluster drawn by the seed. Every place 0..n-1 comes out exactly once. Holds what the
    tour does, some 60 bytes a pair, and the vectors of a stretch of the tour, at most 256 MiB whatever n is.
    """
    if len(labels) == 0:
        return pack_randomly(0, batch_size=settings.batch_size, seed=settings.seed)
    start = int(np.random.default_rng(settings.seed).integers(len(centroids)))
    tour = greedy_tour(centroids, start, exact_below=settings.exact_tour_below)
    left = np.empty(0, dtype=np.int64)
    batches = [np.empty((0, settings.batch_size), dtype=np.int64)]
    for stretch in _stretches(labels, centroids, tour, settings.batch_size, 2 * points.dimension):
        places = np.concatenate([*stretch.members, left])
        trim_heap()  # what filling and refining freed in small pieces: here, and where vectors are read again below
        folded = points.take(places)
        row = lay_out(folded, stretch)
        lengths = np.array([len(members) for members in stretch.members])
        filled, rest = fill_batches(folded, row, lengths, settings.batch_size)
        del folded
        trim_heap()
        batched = places[filled]
        refined = refine(
            torch.from_numpy(points.joined(batched.ravel())),
            batched,
            rounds=settings.refine_rounds,
            tolerance=settings.refine_tolerance,
            device=settings.device,
        )
        batches.append(refined.batches)
        left = places[rest]
    return Packing(batches=np.concatenate(batches), remainder=left)


def pack_randomly(num_points: int, *, batch_size: int, seed: int) -> Packing:
    """Packs the places 0..num_points-1 in an order drawn by `seed`: what hard batches are compared with."""
    return _cut(np.random.default_rng(seed).permutation(num_points), batch_size)


def _cut(row: Array, batch_size: int) -> Packing:
    cut = len(row) // batch_size * batch_size
    return Packing(batches=row[:cut].reshape(-1, batch_size), remainder=row[cut:])


@dataclass(frozen=True, kw_only=True)
class _Stretch:
    """Clusters that follow each other on the tour: their members (places, int64), and the way on at each (k × D)."""

    members: list[Array]
    directions: Array


def _stretches(labels: Array, centroids: Array, tour: Array, batch_size: int, width: int) -> Iterator[_Stretch]:
    limit = int(min(_STRETCH_VALUES // width, (_STRETCH_SCORES * batch_size) ** 0.5))
    limit = -(-len(labels) // -(-len(labels) // max(limit, batch_size)))  # stretches of about the same length
    order = np.argsort(labels, kind="stable")
    starts = np.searchsorted(labels[order], np.arange(len(centroids) + 1))
    norms = np.linalg.norm(centroids, axis=1, keepdims=True)
    unit = np.divide(centroids, norms, out=np.zeros_like(centroids), where=norms > 0)
    ways = unit[np.append(tour[1:], tour[-1])] - unit[np.append(tour[0], tour[:-1])]
    members: list[Array] = []
    directions: list[Array] = []
    held = 0
    for cluster, way in zip(tour, ways, strict=True):
        own = order[starts[cluster] : starts[cluster + 1]]
        for piece in np.array_split(own, max(1, -(-len(own) // limit))):  # one, or the cluster is larger than a stretch
            if members and held + len(piece) > limit:
                yield _Stretch(members=members, directions=np.stack(directions))
                members, directions, held = [], [], 0
            members.append(piece)
            held += len(piece)
            directions.append(way)
    yield _Stretch(members=members, directions=np.stack(directions))


def lay_out(points_mD: Array, stretch: _Stretch) -> Array:
    """The places in `points_mD` (rows: the members one after the other), each cluster along the way on the tour."""
    row = np.empty(sum(len(members) for members in stretch.members), dtype=np.int64)
    filled = 0
    for members, direction in zip(stretch.members, stretch.directions, strict=True):
        cluster = slice(filled, filled + len(members))
        if len(stretch.members) == 1:
            direction = _widest(points_mD[cluster])
        along = np.einsum("md,d->m", points_mD[cluster], direction, dtype=np.float64)
        row[cluster] = filled + np.argsort(along, kind="stable")
        filled += len(members)
    return row


def _widest(points_nD: Array) -> Array:
    """From the mean of the points to the one farthest from it: a line to lay them along where there is no other."""
    apart_nD = points_nD - points_nD.mean(0)
    return np.asarray(apart_nD[np.argmax(np.einsum("nd,nd->n", apart_nD, apart_nD))])
