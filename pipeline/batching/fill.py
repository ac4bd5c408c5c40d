"""Fill: clusters in the order of a tour → batches of exactly B that follow the borders of clusters.

Each cluster becomes the seed of one batch, or of several where it is large; small ones that follow each other on the
tour become one seed, where that brings it nearer to B. A seed keeps what fits it best up to B pairs; what is left of
all seeds goes where it fits best among those that have room.

Shape letters: m points, D dimension.
"""

from __future__ import annotations

import numpy as np
import torch

from hardbatch.pipeline.arrays import Array
from hardbatch.pipeline.batching.kmeans import apportion
from hardbatch.pipeline.batching.nearest import fast_products
from hardbatch.pipeline.batching.points import cluster_sums, partitions


def fill_batches(points_mD: Array, row: Array, lengths: Array, batch_size: int) -> tuple[Array, Array]:
    """Fills ⌊m/B⌋ batches from `row` (int64: places in `points_mD`), a run of `lengths` for each cluster on the tour.

    Returns the batches (int64, number × B) and the places (int64) that fill none. Places of `points_mD` that are not in
    `row` belong to no cluster and go where they fit best.
    """
    num_batches = len(points_mD) // batch_size
    if num_batches == 0:
        return np.empty((0, batch_size), dtype=np.int64), np.arange(len(points_mD))
    batch_of = _seed(row, lengths, len(points_mD), num_batches, batch_size)
    _equalise(points_mD, batch_of, num_batches, batch_size)
    order = np.argsort(batch_of, kind="stable")
    num_left = int((batch_of < 0).sum())
    return order[num_left:].reshape(num_batches, batch_size), order[:num_left]


def _seed(row: Array, lengths: Array, num_points: int, num_batches: int, batch_size: int) -> Array:
    """The batch (int64, m) whose seed each point belongs to, -1 for none; every batch has a point."""
    ends = [0]
    filled = 0
    for length, following in zip(lengths, [*lengths[1:], np.inf], strict=True):
        filled += int(length)
        size = filled - ends[-1]
        if abs(size - batch_size) <= abs(size + following - batch_size):  # else the next brings it nearer to B
            ends.append(filled)
    starts, ends = np.array(ends[:-1], dtype=np.int64), ends[1:]
    sizes = np.array(ends, dtype=np.int64) - starts
    parts = apportion(sizes, num_batches, least=0)
    batch_of = np.full(num_points, -1, dtype=np.int64)
    given = 0
    for start, size, part in zip(starts, sizes, parts, strict=True):
        if part > 0:
            batch_of[row[start : start + size]] = given + np.arange(size) * part // size
            given += part
    return batch_of


def _equalise(points_mD: Array, batch_of: Array, num_batches: int, batch_size: int) -> None:
    """Moves points, in place, until every batch has `batch_size`; -1 for those that fill none.

    Holds the vectors of the points that must move (a tenth or so) and their scores for the batches with room.
    """
    placed = np.flatnonzero(batch_of >= 0)
    sizes = np.bincount(batch_of[placed], minlength=num_batches)
    seeds_mD = points_mD if len(placed) == len(points_mD) else points_mD[placed]
    means = cluster_sums(seeds_mD, batch_of[placed], num_batches) / sizes[:, None]
    centroids, offsets = torch.from_numpy(means.astype(np.float32)), torch.from_numpy(-0.5 * (means**2).sum(1)).float()
    with_room = np.flatnonzero(sizes < batch_size)
    crowded = np.flatnonzero((batch_of >= 0) & (sizes > batch_size)[batch_of])

    def scores(places: Array) -> torch.Tensor:
        with fast_products():
            return torch.addmm(offsets[with_room], torch.from_numpy(points_mD[places]), centroids[with_room].T)

    now = batch_of[crowded]
    better = np.empty(len(crowded), dtype=np.float32)  # its own batch suits a point than the best one with room
    for part in partitions(len(crowded)):
        points = torch.from_numpy(points_mD[crowded[part]])
        own = torch.einsum("md,md->m", points, centroids[now[part]]) + offsets[now[part]]
        better[part] = own - scores(crowded[part]).amax(1) if len(with_room) > 0 else own
    stays = _best_of_each(now, better, np.minimum(sizes, batch_size))
    moving = np.concatenate([crowded[~stays], np.flatnonzero(batch_of < 0)])
    batch_of[moving] = -1
    score = scores(moving)
    room = batch_size - sizes[with_room]
    while len(moving) > 0 and (room > 0).any():
        open_ = np.flatnonzero(room)
        best = score[:, open_].topk(min(2, len(open_)), dim=1)
        chosen = open_[best.indices[:, 0].numpy()]
        regret = (best.values[:, 0] - best.values[:, -1]).numpy()
        goes = _best_of_each(chosen, regret, room)
        batch_of[moving[goes]] = with_room[chosen[goes]]
        room = room - np.bincount(chosen[goes], minlength=len(room))
        moving, score = moving[~goes], score[torch.from_numpy(~goes)]


def _best_of_each(groups: Array, values: Array, limits: Array) -> Array:
    """Marks (bool) the largest `values` of each group, as many as `limits` (by group) says; the first on a tie."""
    order = np.argsort(-values, kind="stable")
    order = order[np.argsort(groups[order], kind="stable")]
    sizes = np.bincount(groups, minlength=len(limits))
    rank = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    marks = np.zeros(len(groups), dtype=bool)
    marks[order] = rank < limits[groups[order]]
    return marks
