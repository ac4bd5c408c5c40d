"""Spread: pairs that share an answer class go to different batches, because there they cost no negative.

A pair has a query class and a document class. Two pairs of one class in one batch are masked for each
other, so a batch of the paraphrases of one question has no negatives at all. Therefore a batch holds of a
class no more than its cap: the size of the class divided by the number of batches, rounded up, or B/16 if
that is more. (Without the second, hardness falls, because a few equal documents leave their topic.) While
groups of a batch are made, the same holds for them, but with at most a quarter of a group instead of B/16.

A batch with more pairs of a class than its cap is crowded. A crowding pair is exchanged with a pair of
the batch that suits it best among those that have room for its classes; the other pair must find room
too. If no exchange is possible, the pairs of the two batches are divided again, half of each class to each.
This always ends without a crowded batch, by de Werra's theorem on equitable edge colourings: classes are
the vertices of a bipartite multigraph, pairs its edges, and batches its colours.

Shape letters: m points, b batches, B slots, k capped classes, D dimension.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from hardbatch.pipeline.arrays import Array
from hardbatch.pipeline.batching.nearest import fast_products
from hardbatch.pipeline.batching.points import cluster_sums, partitions

_PART_OF_BATCH = 16  # a class may always fill a 16th of a batch; see docs/batching.md for what other parts cost
_PART_OF_GROUP = 4  # but no more than a quarter of a group, so that most of the alike pairs are negatives
_NUM_TARGETS = 4  # batches that a pair may be exchanged with, the best ones that have room for it
_NUM_PARTNERS = 32  # pairs of these batches that are compared, those that their batches miss least


@dataclass(frozen=True, kw_only=True)
class CappedClasses:
    """The classes that are large enough to crowd a batch, and how many pairs of each a batch may hold.

    Attributes:
        numbers: The query class and the document class of each pair (int64, ... × 2), in one numbering
            from 1. 0 stands for a class that is too small to crowd a batch.
        caps: By class (int64, k + 1); no limit for 0.
    """

    numbers: Array
    caps: Array

    @classmethod
    def of(cls, classes_m2: Array, num_batches: int, always: int) -> CappedClasses | None:
        """Finds them, for pairs that fill this number of batches.

        Args:
            classes_m2: The query class and the document class of each pair (int64), each numbered by itself.
            num_batches: b.
            always: How many pairs of a class a batch may hold in any case (`always_allowed`).

        Returns:
            The classes, or None if all are too small.
        """
        numbers = np.zeros(classes_m2.shape, dtype=np.int64)
        caps = [np.array([len(classes_m2) + 1])]
        num_capped = 0
        for side in (0, 1):
            _, class_m, sizes = np.unique(classes_m2[:, side], return_inverse=True, return_counts=True)
            is_capped = sizes > always
            numbers[:, side] = np.where(is_capped, num_capped + np.cumsum(is_capped), 0)[class_m]
            caps.append(np.maximum(-(-sizes[is_capped] // max(1, num_batches)), always))
            num_capped += int(is_capped.sum())
        return cls(numbers=numbers, caps=np.concatenate(caps)) if num_capped else None

    def at(self, points: Array) -> CappedClasses:
        """The same classes, with the numbers of the pairs at `points` (int, of any shape)."""
        return CappedClasses(numbers=self.numbers[points], caps=self.caps)

    def held(self) -> tuple[Array, Array, Array]:
        """Where `numbers` are of batches (b × B × 2): classes, batches that hold them, and how many pairs of each."""
        num_batches = len(self.numbers)
        codes = (self.numbers * num_batches + np.arange(num_batches)[:, None, None]).ravel()
        found, counts = np.unique(codes[codes >= num_batches], return_counts=True)
        return found // num_batches, found % num_batches, counts

    def num_crowding(self) -> int:
        """Where `numbers` are of batches: the pairs beyond the caps, summed over the classes of both sides."""
        classes, _, counts = self.held()
        return int((counts - self.caps[classes]).clip(min=0).sum())

    def room(self) -> Array:
        """Where `numbers` are of batches: how many more pairs of each class a batch may hold ((k + 1) × b)."""
        num_batches, batch_size, _ = self.numbers.shape
        dtype = np.int16 if batch_size < 2**15 else np.int32
        room = np.repeat(np.minimum(self.caps, batch_size).astype(dtype)[:, None], num_batches, axis=1)
        classes, batches, counts = self.held()
        room[classes, batches] -= counts.astype(dtype)
        return room


def always_allowed(batch_size: int, group_size: int | None = None) -> int:
    """How many pairs of a class a batch, or a group of one, may hold, however small the class is."""
    return max(1, min(batch_size // _PART_OF_BATCH, (group_size or batch_size) // _PART_OF_GROUP))


def spread(points_mD: Array, batches: Array, capped: CappedClasses) -> Array:
    """Exchanges pairs until no batch holds more pairs of a class than its cap; sizes do not change.

    Each exchange lowers the number of crowding pairs, so it ends. Holds 2 bytes for each capped class and
    batch.

    Args:
        points_mD: Folded points, float32.
        batches: Indices into `points_mD` (int64, b × B).
        capped: The classes of the points (m × 2).

    Returns:
        The batches (int64, b × B).
    """
    spreading = _Spreading(points_mD, batches, capped)
    while len(crowding := spreading.crowding()) > 0:
        for part in partitions(len(crowding)):
            points = crowding[part]
            for point, score_b in zip(points, spreading.scores(points), strict=True):
                spreading.relieve(point, score_b)
    return spreading.batches


class _Spreading:
    """Batches whose pairs are exchanged. A pair fits a batch by c·s, with the centroid c that it had at first."""

    def __init__(self, points_mD: Array, batches: Array, capped: CappedClasses) -> None:
        self.batches = batches.copy()
        self._points_mD, self._classes_m2 = points_mD, capped.numbers
        self._room_kb = capped.at(batches).room()

        # Points that are in no batch count as one more batch, which takes no part.
        num_batches, batch_size = batches.shape
        self._batch_of = np.full(len(points_mD), num_batches)
        self._batch_of[batches] = np.arange(num_batches)[:, None]
        sums = cluster_sums(points_mD, self._batch_of, num_batches + 1)
        self._centroids_bD = (sums[:num_batches] / batch_size).astype(np.float32)

        self._fit_m = np.zeros(len(points_mD), dtype=np.float32)  # of each point to its batch
        for batch in batches:
            self._update_fit(batch)

    def crowding(self) -> Array:
        """The points of crowded classes (int64), those first that fit their batch least."""
        room = self._room_kb[self._classes_m2[self.batches], np.arange(len(self.batches))[:, None, None]]
        points = self.batches[(room < 0).any(2)]
        return points[np.lexsort((points, self._fit_m[points]))]

    def scores(self, points: Array) -> Array:
        """How well the points fit each batch."""
        with fast_products():
            scores = torch.from_numpy(self._points_mD[points]) @ torch.from_numpy(self._centroids_bD).T
        return np.asarray(scores.numpy())

    def relieve(self, point: int, score_b: Array) -> None:
        """Moves a point to a batch that has room for its classes, unless its own batch is no longer crowded."""
        here, own = self._batch_of[point], self._classes_m2[point]
        is_crowded = self._room_kb[own, here] < 0
        if not is_crowded.any():
            return

        # The partners that have room here, once the point has left.
        targets = self._best(score_b, (self._room_kb[own] > 0).all(0), _NUM_TARGETS)
        others = self.batches[targets].ravel()
        classes = self._classes_m2[others]
        others = others[(self._room_kb[classes, here] + (classes == own) > 0).all(1)]
        if len(others) == 0:
            has_room_b = self._room_kb[own[is_crowded][0]] > 0
            self._halve(here, self._best(score_b, has_room_b, 1)[0])
            return

        # Of these, the one with which Eq. 2 rises most, or falls least.
        gain = score_b[self._batch_of[others]] - self._fit_m[others]
        few = np.argsort(-gain, kind="stable")[:_NUM_PARTNERS]
        back = np.einsum("md,d->m", self._points_mD[others[few]], self._centroids_bD[here])
        best = np.argmax(gain[few] + back)
        self._exchange(point, others[few[best]])
        self._fit_m[point], self._fit_m[others[few[best]]] = score_b[self._batch_of[point]], back[best]

    def _best(self, score_b: Array, marks_b: Array, number: int) -> Array:
        """The marked batches with the highest scores, at most `number`."""
        marked = np.flatnonzero(marks_b)
        return marked[np.argsort(-score_b[marked], kind="stable")[:number]]

    def _exchange(self, one: int, two: int) -> None:
        here, there = self._batch_of[one], self._batch_of[two]
        self.batches[here, np.flatnonzero(self.batches[here] == one)[0]] = two
        self.batches[there, np.flatnonzero(self.batches[there] == two)[0]] = one
        self._batch_of[one], self._batch_of[two] = there, here
        for point, origin, target in ((one, here, there), (two, there, here)):
            self._room_kb[self._classes_m2[point], origin] += 1
            self._room_kb[self._classes_m2[point], target] -= 1
        self._room_kb[0] = len(self.batches[0])  # there is always room for small classes

    def _halve(self, here: int, there: int) -> None:
        """Splits the pairs of two batches again, such that each of their classes is halved."""
        members = self.batches[[here, there]].ravel()
        batch_size = len(self.batches[0])
        goes_first = halve(self._classes_m2[members])
        leave = np.flatnonzero(~goes_first[:batch_size])
        come = np.flatnonzero(goes_first[batch_size:]) + batch_size
        for one, two in zip(members[leave], members[come], strict=True):
            self._exchange(one, two)
        self._update_fit(members)

    def _update_fit(self, points: Array) -> None:
        centroids = self._centroids_bD[self._batch_of[points]]
        self._fit_m[points] = np.einsum("md,md->m", self._points_mD[points], centroids)


def halve(classes_n2: Array) -> Array:
    """Splits pairs into two equal halves, such that each class is in both as often, or once more in one of them.

    Two pairs of a class are tied to each other, and go to different halves. A pair is tied to one pair of
    its query class and to one of its document class, at most. So ties make chains, which are two-coloured;
    they have no odd rings, because the two kinds of ties take turns.

    Args:
        classes_n2: The query class and the document class of each pair, 0 for one that is not capped (int64).
            The first half of the pairs is in one batch now, the second half in another.

    Returns:
        Marks of those that make the first half (bool, n). Most pairs stay where they are.
    """
    size = len(classes_n2)
    is_first = np.arange(size) < size // 2
    tied = [_ties(classes_n2[:, side], is_first) for side in (0, 1)]

    # Chains with an end are followed from there; what is not seen then are rings.
    ends = [(point, 1 - side) for side in (0, 1) for point in np.flatnonzero(tied[side] < 0).tolist()]
    ties = [side.tolist() for side in tied]
    seen = np.zeros(size, dtype=bool)
    even: list[tuple[int, list[int]]] = []
    odd: list[tuple[int, list[int]]] = []
    for point, side in [*ends, *((point, 0) for point in range(size))]:
        chain: list[int] = []
        while point >= 0 and not seen[point]:
            seen[point] = True
            chain.append(point)
            point, side = ties[side][point], 1 - side

        # How many more pairs stay where they are if the chain begins in the first half.
        gain = 2 * int(is_first[chain[::2]].sum() - is_first[chain[1::2]].sum()) - len(chain) % 2
        if chain:
            (odd if len(chain) % 2 else even).append((gain, chain))

    # Every second of the odd chains must begin in the first half, so that both are of the same size.
    odd.sort(key=lambda item: -item[0])
    begins = [*(gain >= 0 for gain, _ in even), *(number < len(odd) // 2 for number in range(len(odd)))]
    goes_first = np.zeros(size, dtype=bool)
    for begins_first, (_, chain) in zip(begins, [*even, *odd], strict=True):
        goes_first[chain[0 if begins_first else 1 :: 2]] = True
    return goes_first


def _ties(classes: Array, is_first: Array) -> Array:
    """The pair that each is tied to, -1 if none: as many as possible of the other batch (int64)."""
    # Class by class: the first of either batch, the second of either batch, and so on.
    by_batch = np.lexsort((is_first, classes))
    starts = np.flatnonzero(np.diff(classes[by_batch] * 2 + is_first[by_batch], prepend=-1))
    rank = np.empty(len(classes), dtype=np.int64)
    rank[by_batch] = np.arange(len(classes)) - np.repeat(starts, np.diff(starts, append=len(classes)))
    order = np.lexsort((is_first, rank, classes))

    ordered = classes[order]
    starts = np.flatnonzero(np.diff(ordered, prepend=-1))
    place = np.arange(len(classes)) - np.repeat(starts, np.diff(starts, append=len(classes)))
    left = np.flatnonzero((place[:-1] % 2 == 0) & (ordered[:-1] == ordered[1:]) & (ordered[:-1] > 0))
    tied = np.full(len(classes), -1)
    tied[order[left]], tied[order[left + 1]] = order[left + 1], order[left]
    return tied
