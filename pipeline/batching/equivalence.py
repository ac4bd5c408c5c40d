"""Equivalence sets S(q, d): the documents of a batch that may answer q as well as d does (Eq. 4).

Slot j is in S(i), j ≠ i, if (q_i, d_j) is a known pair of the domain, or the texts of d_j and d_i are
the same, or f(q_i, d_j) ≥ f(q_i, d_i) − margin under the surrogate f, the dot product of unit vectors.

Shape letters: B slots of a batch, N hard negatives of a pair, D dimension.
"""

from __future__ import annotations

import numpy as np

from hardbatch.pipeline.arrays import Array
from hardbatch.pipeline.batching.ties import UNIT_NEAR_TIE, exact_products


def surrogate_mask(queries_BD: Array, documents_BD: Array, *, margin: float) -> Array:
    """Marks at [i, j] whether slot j meets the surrogate's inequality for slot i.

    Args:
        queries_BD: The surrogate's unit vectors of the queries, float32.
        documents_BD: The same of the documents.
        margin: By how much, in cosine, a document may score below the pair's own.

    Returns:
        The mask (bool, B × B), False on the diagonal.
    """
    scores_BB = queries_BD @ documents_BD.T
    own_B = np.einsum("bd,bd->b", queries_BD, documents_BD, dtype=np.float64)
    above_BB = scores_BB - (own_B - margin)[:, None]
    mask_BB: Array = above_BB >= 0

    # Scores at the bound are decided in float64: above all, equal vectors meet the inequality.
    near_BB = np.abs(above_BB) < UNIT_NEAR_TIE
    np.fill_diagonal(near_BB, False)
    for i in np.flatnonzero(near_BB.any(1)):
        near = np.flatnonzero(near_BB[i])
        mask_BB[i, near] = exact_products(documents_BD[near], queries_BD[i]) >= own_B[i] - margin

    np.fill_diagonal(mask_BB, False)
    return mask_BB


def equal_texts(texts: list[str]) -> Array:
    """Marks at [i, j] whether slots i and j have the same text (bool, B × B), False on the diagonal."""
    number: dict[str, int] = {}
    numbers = np.array([number.setdefault(text, len(number)) for text in texts])
    equal_BB: Array = numbers[:, None] == numbers[None, :]
    np.fill_diagonal(equal_BB, False)
    return equal_BB


def keeps_negative(query_D: Array, document_D: Array, negatives_ND: Array, *, margin: float) -> Array:
    """Marks the hard negatives of a pair to keep: those with f(q, d') < f(q, d) − margin (bool, N)."""
    own = np.einsum("d,d->", query_D, document_D, dtype=np.float64)
    return np.asarray(exact_products(negatives_ND, query_D) < own - margin)
