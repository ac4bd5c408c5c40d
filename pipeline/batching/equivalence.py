"""Equivalence sets S(q, d): the documents of a batch that may answer q as well as d does (Eq. 4).

Slot j is in S(i), j ≠ i, if d_j answers q_i for certain (the same answer), or if it is a *likely* answer by the
surrogate f, the dot product of unit vectors. Its score s_ij must reach three bounds, with own_i = f(q_i, d_i):

    own     one-sided   s_ij = f(q_i, d_j)                       ≥ own_i less the margin
            symmetric   s_ij = (f(q_i, d_j) + f(q_j, d_i)) / 2   ≥ (own_i + own_j) / 2 less the margin
    floor   s_ij ≥ the floor of the domain, a quantile of its own scores (consistency.py)
    cap     of what passes, a query loses at most a part of its batch, the best-scoring slots

The symmetric score is high only if each document fits the other query as well. Without a floor, a pair that says
little has a low own score, and masks nearly everything. A document that is the text of the query itself is always in
S(i) too.

Shape letters: B slots of a batch, N hard negatives of a pair, D dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from hardbatch.pipeline.arrays import Array
from hardbatch.pipeline.batching.ties import UNIT_NEAR_TIE, exact_products


@dataclass(frozen=True, kw_only=True)
class LikelyRule:
    """When a document is a likely answer. The fields are those of `config.WriteConfig`.

    Attributes:
        likely_rule: The score and its own bound, `one-sided` or `symmetric`; see this module's docstring.
        margin: How far below the own score a likely answer may score; a negative margin asks for a lead.
        margin_strategy: `absolute` subtracts the margin from the own score; `relative` subtracts that fraction of
            its magnitude. Names and signs are those of GISTEmbedLoss in sentence-transformers.
        max_likely: The largest part of a batch that the surrogate alone may mask for a query.
    """

    likely_rule: Literal["one-sided", "symmetric"] = "one-sided"
    margin: float = 0.0
    margin_strategy: Literal["absolute", "relative"] = "absolute"
    max_likely: float = 0.25

    def bound(self, own: Array) -> Array:
        """Returns the score that a likely answer must reach, given the own score (float64, any shape)."""
        return own - self.margin * (np.abs(own) if self.margin_strategy == "relative" else 1.0)


@dataclass(frozen=True, kw_only=True)
class Likely:
    """The likely answers of a batch, and the scores that say why.

    Attributes:
        mask_BB: Whether slot j is a likely answer to the query of slot i (bool), False on the diagonal.
        score_BB: The scores (float32).
        bound_BB: What they are measured against, the higher of the own bound and the floor (float64).
    """

    mask_BB: Array
    score_BB: Array
    bound_BB: Array


def likely_answers(
    queries_BD: Array,
    documents_BD: Array,
    rule: LikelyRule,
    floor_B: Array | float,
    certain_BB: Array | None = None,
) -> Likely:
    """Finds the likely answers of a batch.

    Args:
        queries_BD: The surrogate's unit vectors of the queries, float32.
        documents_BD: The same of the documents.
        rule: The kind of score, the margin and the cap.
        floor_B: The floor of each slot's domain, or one for all. Two slots of different domains must reach
            the higher one.
        certain_BB: Same answer (bool). These slots are masked anyway, so they are not marked here and do not
            count towards the cap.

    Returns:
        The mask with its scores. The mask is the same for any block size and number of threads.
    """
    size = len(queries_BD)
    own_B = np.einsum("bd,bd->b", queries_BD, documents_BD, dtype=np.float64)
    floor_B = np.broadcast_to(np.asarray(floor_B, dtype=np.float64), size)
    bound_B = rule.bound(own_B)
    floor_BB = np.maximum(floor_B[:, None], floor_B)
    score_BB = queries_BD @ documents_BD.T
    if rule.likely_rule == "symmetric":
        score_BB = (score_BB + score_BB.T) / 2
        bound_BB = np.maximum((bound_B[:, None] + bound_B) / 2, floor_BB)
    else:
        bound_BB = np.maximum(bound_B[:, None], floor_BB)
    lead_BB = score_BB - bound_BB
    mask_BB: Array = lead_BB >= 0

    # Scores at the bound are decided in float64: above all, equal pairs meet it.
    near_BB = np.abs(lead_BB) < UNIT_NEAR_TIE
    np.fill_diagonal(near_BB, False)
    for i in np.flatnonzero(near_BB.any(1)):
        near = np.flatnonzero(near_BB[i])
        mask_BB[i, near] = _exact_scores(queries_BD, documents_BD, rule, i, near) >= bound_BB[i, near]

    np.fill_diagonal(mask_BB, False)
    if certain_BB is not None:
        mask_BB &= ~certain_BB
    _keep_best(mask_BB, queries_BD, documents_BD, rule)
    return Likely(mask_BB=mask_BB, score_BB=score_BB, bound_BB=bound_BB)


def _keep_best(mask_BB: Array, queries_BD: Array, documents_BD: Array, rule: LikelyRule) -> None:
    """Clears all but the best-scoring marks of each row, ranked in float64; the lowest slot wins a tie."""
    limit = int(rule.max_likely * len(mask_BB))
    for i in np.flatnonzero(mask_BB.sum(1) > limit):
        marked = np.flatnonzero(mask_BB[i])
        order = np.argsort(-_exact_scores(queries_BD, documents_BD, rule, i, marked), kind="stable")
        mask_BB[i, marked[order[limit:]]] = False


def _exact_scores(
    queries_BD: Array, documents_BD: Array, rule: LikelyRule, slot: int | np.integer, others: Array
) -> Array:
    """The scores of `slot` with each of `others`, float64."""
    forward = exact_products(documents_BD[others], queries_BD[slot])
    if rule.likely_rule == "one-sided":
        return np.asarray(forward)
    return np.asarray((forward + exact_products(queries_BD[others], documents_BD[slot])) / 2)


def repeats_query(queries: Sequence[str], documents: Sequence[str]) -> Array:
    """Marks at [i, j] whether document j is the text of query i, apart from case and white space (bool, B × B).

    Every model scores such a document highest, so it is not used as a negative. It need not be an answer.
    """
    number: dict[str, int] = {}
    query_B, document_B = (
        np.array([number.setdefault(" ".join(text.casefold().split()), len(number)) for text in texts])
        for texts in (queries, documents)
    )
    return np.asarray(query_B[:, None] == document_B)


def keeps_unlikely(query_D: Array, document_D: Array, negatives_ND: Array, rule: LikelyRule, floor: float) -> Array:
    """Marks the hard negatives of a pair to keep, those that are not likely answers (bool, N).

    A hard negative has no query of its own, so its score is one-sided by either rule. The cap does not apply.
    """
    own = np.einsum("d,d->", query_D, document_D, dtype=np.float64)
    bound = max(float(rule.bound(own)), floor)
    return np.asarray(exact_products(negatives_ND, query_D) < bound)
