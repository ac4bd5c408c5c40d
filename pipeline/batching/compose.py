"""Compose: groups of alike pairs → batches of several groups, drawn by a seed.

A batch of B pairs is B/K groups of K. The groups of a batch have nothing to do with each other, so K sets
how hard a batch is: with K = 1 it is random, with K = B it is one group and as hard as can be.

The caps of answer classes (spread.py) hold for the whole batch, but a group is made without knowing which
others it will be drawn with. Therefore groups of a crowded batch are exchanged with groups of other
batches, as long as that lowers the number of crowding pairs. What is crowded after a bounded number of
tries is relieved pair by pair, by `spread`, which always succeeds.

Shape letters: G groups, K slots of a group, m pairs of a block, M batches, g groups of a batch, B slots of
a batch.
"""

from __future__ import annotations

import numpy as np

from hardbatch.pipeline.arrays import Array
from hardbatch.pipeline.batching.points import Points
from hardbatch.pipeline.batching.spread import CappedClasses, always_allowed, spread

_BLOCK_VALUES = 2**26  # float32 values of d + q in a block: 256 MiB
_BLOCK_SCORES = 2**26  # pairs of a block times its batches
_NUM_TRIES = 64  # exchanges in a row that may fail before a crowded batch is left to `spread`


def compose(
    points: Points, groups_GK: Array, classes: Array | None, *, batch_size: int, seed: int
) -> tuple[Array, Array]:
    """Draws ⌊G·K/B⌋ batches of B/K groups each.

    Exchanges are made within blocks of batches. If pairs are exchanged one by one, the folded vectors of a
    block are held, 256 MiB at most, and 2 bytes for each of its capped classes and batches.

    Args:
        points: The pairs, as folded points.
        groups_GK: Groups of pairs, by index (int64).
        classes: The query class and the document class of each pair (int64, n × 2); None if no pairs share
            a class.
        batch_size: B, a multiple of K.
        seed: Draws the order of the groups, and the exchanges that are tried.

    Returns:
        The batches (int64, M × B), each group in consecutive slots, and the pairs of the groups that are in
        none (int64).
    """
    num_groups, group_size = groups_GK.shape
    num_batches = num_groups * group_size // batch_size
    generator = np.random.default_rng(seed)
    row = groups_GK[generator.permutation(num_groups)].ravel()
    batches_MB, left = np.split(row, [num_batches * batch_size])
    batches_MB = batches_MB.reshape(num_batches, batch_size)
    if classes is None or num_batches == 0:
        return batches_MB, left

    limit = int(min(_BLOCK_VALUES // points.dimension, (_BLOCK_SCORES * batch_size) ** 0.5))
    num_blocks = -(-len(row) // max(limit, batch_size))
    for block_MB in np.array_split(batches_MB, num_blocks):
        capped = CappedClasses.of(classes[block_MB.ravel()], len(block_MB), always_allowed(batch_size))
        if capped is None:
            continue

        # Exchanges move places, which are indices into the block as it was drawn.
        pairs = block_MB.flatten()
        places_MB = np.arange(len(pairs)).reshape(block_MB.shape)
        _exchange_groups(places_MB.reshape(len(block_MB), -1, group_size), capped, generator)
        if capped.at(places_MB).num_crowding() > 0:
            places_MB = spread(points.take(pairs), places_MB, capped)
        block_MB[:] = pairs[places_MB]
    return batches_MB, left


def _exchange_groups(places_MgK: Array, capped: CappedClasses, generator: np.random.Generator) -> None:
    """Exchanges groups of crowded batches, in place, with groups that are drawn at random.

    An exchange lowers the number of crowding pairs of the crowded batch, and does not raise that of the
    other one. So a batch that is not crowded stays so, and one pass over the crowded ones is enough.
    """
    num_batches, num_groups, _ = places_MgK.shape

    def num_crowding(batch: int) -> int:
        return capped.at(places_MgK[batch].reshape(1, -1)).num_crowding()

    classes, batches, counts = capped.at(places_MgK.reshape(num_batches, -1)).held()
    for here in np.unique(batches[counts > capped.caps[classes]]):
        num_failed = 0
        while num_failed < _NUM_TRIES and (excess := num_crowding(here)) > 0:
            one = generator.choice(_crowding_groups(capped.at(places_MgK[here])))
            there, two = int(generator.integers(num_batches)), int(generator.integers(num_groups))
            excess_there = num_crowding(there)
            exchanged = [here, there], [one, two]
            places_MgK[exchanged] = places_MgK[exchanged][::-1]
            if num_crowding(here) < excess and num_crowding(there) <= excess_there:
                num_failed = 0
            else:
                places_MgK[exchanged] = places_MgK[exchanged][::-1]
                num_failed += 1


def _crowding_groups(batch: CappedClasses) -> Array:
    """The groups of a batch (int64) that hold a class of which the batch has more pairs than its cap."""
    found, inverse, counts = np.unique(batch.numbers, return_inverse=True, return_counts=True)
    is_crowded = (counts > batch.caps[found])[inverse].reshape(len(batch.numbers), -1)
    return np.flatnonzero(is_crowded.any(1))
