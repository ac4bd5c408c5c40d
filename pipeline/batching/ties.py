"""Near-ties: scores that float32 cannot rank are computed again in float64.

Products of whole blocks are float32, and their last bits depend on the shape of the block and on the
number of threads. Where such a score decides something, every score within `near_tie` of the
decision is computed again in float64, one vector at a time, and the lowest index wins a tie that
remains. The decision is then the same for any block size and any number of threads.

Shape letters: k vectors, D dimension.
"""

from __future__ import annotations

import numpy as np

from hardbatch.pipeline.arrays import Array

UNIT_NEAR_TIE = 1e-5  # of unit vectors: an order of magnitude above the error of a float32 product
FOLDED_NEAR_TIE = 1e-4  # of sums of two unit vectors, of norm up to 2: two orders above it


def exact_products(vectors_kD: Array, vector_D: Array) -> Array:
    """Dot products of each of `vectors_kD` with `vector_D`, float64 (k)."""
    return np.asarray(np.einsum("kd,d->k", vectors_kD.astype(np.float64), vector_D.astype(np.float64)))


def highest(
    scores: Array,
    vectors_kD: Array,
    vector_D: Array,
    *,
    near_tie: float,
    ids: Array | None = None,
    offsets_k: Array | None = None,
) -> int:
    """Returns the row of `vectors_kD` whose product with `vector_D` is highest; the lowest on a tie.

    Args:
        scores: The products in float32, with the offsets added.
        near_tie: Scores this close to the highest one are computed again in float64.
        ids: The row that each score belongs to, ascending; by default, score i is that of row i.
        offsets_k: What is added to the product of each row, float64.
    """
    near = np.flatnonzero(scores >= scores.max() - near_tie)
    rows = near if ids is None else ids[near]
    if len(rows) == 1:
        return int(rows[0])

    exact = exact_products(vectors_kD[rows], vector_D)
    if offsets_k is not None:
        exact += offsets_k[rows]
    return int(rows[np.argmax(exact)])
