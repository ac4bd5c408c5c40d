"""Fill: clusters in the order of a tour → batches of exactly B that follow the borders of clusters.

Each cluster becomes the seed of one batch, or of several if it is large. Small clusters that follow
each other on the tour share a seed, as long as that brings its size nearer to B. A seed keeps the B
points that fit it best. What is left over of all seeds goes where it fits best among the batches
that still have room.

Shape letters: m points, r batches with room, D dimension.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from hardbatch.pipeline.arrays import Array
from hardbatch.pipeline.batching.kmeans import apportion
from hardbatch.pipeline.batching.nearest import fast_products
from hardbatch.pipeline.batching.points import cluster_sums, partitions


def fill_batches(points_mD: Array, row: Array, lengths: Array, batch_size: int) -> tuple[Array, Array]:
    """Fills ⌊m/B⌋ batches.

    Points that are not in `row` belong to no cluster, and go where they fit best.

    Args:
        points_mD: Folded points, float32.
        row: Indices into `points_mD` (int64): the clusters in the order of the tour, one after another.
        lengths: The size of each of these clusters.
        batch_size: B.

    Returns:
        The batches (int64, ⌊m/B⌋ × B) and the rest (int64), both as indices into `points_mD`.
    """
    num_batches = len(points_mD) // batch_size
    if num_batches == 0:
        return np.empty((0, batch_size), dtype=np.int64), np.arange(len(points_mD))

    batch_of = _seed(row, lengths, len(points_mD), num_batches, batch_size)
    _equalise(points_mD, batch_of, num_batches, batch_size)

    order = np.argsort(batch_of, kind="stable")
    num_rest = int((batch_of < 0).sum())
    return order[num_rest:].reshape(num_batches, batch_size), order[:num_rest]


def _seed(row: Array, lengths: Array, num_points: int, num_batches: int, batch_size: int) -> Array:
    """The batch (int64, m) whose seed each point belongs to, -1 for none; every batch has a point.

    With B = 8, clusters of 3, 4, 20 and 5 points make seeds of 7, 20 and 5: adding the 20 to the 7 would
    lead away from 8. Four batches are apportioned to the seeds as 1, 2 and 1, and the 20 are cut in two.
    """
    # A seed ends before a cluster that would not bring its size nearer to B.
    ends = [0]
    filled = 0
    for length, following in zip(lengths, [*lengths[1:], np.inf], strict=True):
        filled += int(length)
        held = filled - ends[-1]
        if abs(held - batch_size) <= abs(held + following - batch_size):
            ends.append(filled)
    starts, sizes = np.array(ends[:-1], dtype=np.int64), np.diff(ends)

    batch_of = np.full(num_points, -1, dtype=np.int64)
    num_given = 0
    for start, size, part in zip(starts, sizes, apportion(sizes, num_batches, least=0), strict=True):
        if part > 0:
            batch_of[row[start : start + size]] = num_given + np.arange(size) * part // size
            num_given += part
    return batch_of


def _equalise(points_mD: Array, batch_of: Array, num_batches: int, batch_size: int) -> None:
    """Moves points, in place, until every batch has `batch_size`; -1 for those that are in none.

    Holds the vectors of the points that must move (a tenth or so), and their scores for each batch with
    room.
    """
    sizes = np.bincount(batch_of[batch_of >= 0], minlength=num_batches)
    room = _Room.of_seeds(points_mD, batch_of, sizes, batch_size)

    moving = _must_move(points_mD, batch_of, sizes, batch_size, room)
    batch_of[moving] = -1
    score = room.scores(points_mD[moving])
    _assign_by_regret(moving, score, batch_of, room.batches, batch_size - sizes[room.batches])


@dataclass(frozen=True, kw_only=True)
class _Room:
    """The batches with room, and the centroids of all seeds; a score is c·s − ‖c‖²/2, as in K-Means."""

    batches: Array
    centroids: torch.Tensor
    offsets: torch.Tensor

    @classmethod
    def of_seeds(cls, points_mD: Array, batch_of: Array, sizes: Array, batch_size: int) -> _Room:
        placed = np.flatnonzero(batch_of >= 0)
        seeds_mD = points_mD if len(placed) == len(points_mD) else points_mD[placed]
        means = cluster_sums(seeds_mD, batch_of[placed], len(sizes)) / sizes[:, None]
        return cls(
            batches=np.flatnonzero(sizes < batch_size),
            centroids=torch.from_numpy(means.astype(np.float32)),
            offsets=torch.from_numpy(-0.5 * (means**2).sum(1)).float(),
        )

    def scores(self, vectors_mD: Array) -> torch.Tensor:
        """Of each point for each batch with room (m × r)."""
        with fast_products():
            return torch.addmm(self.offsets[self.batches], torch.from_numpy(vectors_mD), self.centroids[self.batches].T)


def _must_move(points_mD: Array, batch_of: Array, sizes: Array, batch_size: int, room: _Room) -> Array:
    """Points (int64) that leave a batch that is too large, then the points of no batch.

    A batch keeps the points that prefer it by the widest margin over the best batch with room.
    """
    crowded = np.flatnonzero((batch_of >= 0) & (sizes > batch_size)[batch_of])
    own_batch = batch_of[crowded]
    margin = np.empty(len(crowded), dtype=np.float32)
    for part in partitions(len(crowded)):
        vectors, own = points_mD[crowded[part]], own_batch[part]
        score = torch.einsum("md,md->m", torch.from_numpy(vectors), room.centroids[own]) + room.offsets[own]
        margin[part] = score - room.scores(vectors).amax(1) if len(room.batches) > 0 else score

    stays = _best_of_each(own_batch, margin, np.minimum(sizes, batch_size))
    return np.concatenate([crowded[~stays], np.flatnonzero(batch_of < 0)])


def _assign_by_regret(moving: Array, score: torch.Tensor, batch_of: Array, batches: Array, room: Array) -> None:
    """Gives the points, in place, to the `batches` they score highest for, while these have room.

    Every point asks for its best open batch. If too many ask for the same one, those come first that
    would lose most by going to their second-best; the others ask again in the next round.
    """
    while len(moving) > 0 and (room > 0).any():
        open_ = np.flatnonzero(room)
        best = score[:, open_].topk(min(2, len(open_)), dim=1)
        wanted = open_[best.indices[:, 0].numpy()]
        regret = (best.values[:, 0] - best.values[:, -1]).numpy()

        goes = _best_of_each(wanted, regret, room)
        batch_of[moving[goes]] = batches[wanted[goes]]
        room = room - np.bincount(wanted[goes], minlength=len(room))
        moving, score = moving[~goes], score[torch.from_numpy(~goes)]


def _best_of_each(groups: Array, values: Array, limits: Array) -> Array:
    """Marks (bool) the largest `values` of each group, at most `limits[group]` of them; the first on a tie."""
    # Group by group, the largest first.
    order = np.argsort(-values, kind="stable")
    order = order[np.argsort(groups[order], kind="stable")]

    sizes = np.bincount(groups, minlength=len(limits))
    rank = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    marks = np.zeros(len(groups), dtype=bool)
    marks[order] = rank < limits[groups[order]]
    return marks
