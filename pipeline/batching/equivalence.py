"""Equivalence sets S(q, d): the documents of a batch that may answer q as well as d does (Eq. 4).

Slot j is in S(i), j ≠ i, if (q_i, d_j) is a known pair of the domain, or the texts of d_j and d_i are the same, or
f(q_i, d_j) ≥ f(q_i, d_i) − margin under the surrogate f, the dot product of unit vectors.

Shape letters: B slots of a batch, D dimension.
"""

from __future__ import annotations

import numpy as np

from hardbatch.pipeline.arrays import Array

_NEAR_TIE = 1e-5  # float32 scores closer than this to the bound are decided in float64


def surrogate_mask(queries_BD: Array, documents_BD: Array, *, margin: float) -> Array:
    """Whether slot j meets the inequality for slot i (bool, B × B at [i, j]); the diagonal is False."""
    scores_BB = queries_BD @ documents_BD.T
    own_B = np.einsum("bd,bd->b", queries_BD, documents_BD, dtype=np.float64)
    above_BB = scores_BB - (own_B - margin)[:, None]
    mask_BB: Array = above_BB >= 0
    near_BB = np.abs(above_BB) < _NEAR_TIE
    np.fill_diagonal(near_BB, False)
    for i in np.flatnonzero(near_BB.any(1)):
        near = np.flatnonzero(near_BB[i])
        exact = np.einsum("jd,d->j", documents_BD[near].astype(np.float64), queries_BD[i].astype(np.float64))
        mask_BB[i, near] = exact >= own_B[i] - margin
    np.fill_diagonal(mask_BB, False)
    return mask_BB


def equal_texts(texts: list[str]) -> Array:
    """Whether the texts of slots i and j are the same (bool, B × B); the diagonal is False."""
    number: dict[str, int] = {}
    numbers = np.array([number.setdefault(text, len(number)) for text in texts])
    equal_BB: Array = numbers[:, None] == numbers[None, :]
    np.fill_diagonal(equal_BB, False)
    return equal_BB


def keeps_negative(query_D: Array, document_D: Array, negatives_ND: Array, *, margin: float) -> Array:
    """Which hard negatives of a pair are surely none of its answers: f(q, d') < f(q, d) − margin (bool, N)."""
    own = np.einsum("d,d->", query_D, document_D, dtype=np.float64)
    scores = np.einsum("nd,d->n", negatives_ND.astype(np.float64), query_D.astype(np.float64))
    return np.asarray(scores < own - margin)
