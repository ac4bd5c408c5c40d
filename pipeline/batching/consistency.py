"""Consistency: how well each pair of a domain agrees with the surrogate, measured before batches are made.

Two figures come from it. The **own score** f(q, d) of a pair, whose quantiles over the domain give the floor
below which no document is a likely answer (equivalence.py). And the **rank** of a pair's own document for its
query, among a pool of the domain's documents: 1 if none scores higher. A pair with a poor rank is a *weak pair*,
which says little about relevance. E5 and Nomic Embed drop such pairs before training.

The pool holds all documents of a small domain and a fixed-seed sample of a large one, so that a rank means the
same at any size, and the cost of a pair does not grow with the domain.

Shape letters: n pairs of the domain, m pairs of a block, k documents of the pool, D dimension.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from hardbatch.pipeline.arrays import Array
from hardbatch.pipeline.batching.ties import UNIT_NEAR_TIE, exact_products

NO_RANK = 0  # of a pair without a vector
SameAnswer = Callable[[Array, Array], Array]  # (query rows, document rows) → bool, both of one length

_BLOCK_ROWS = 512
_PERCENTILES = np.arange(101)
_DECIMALS = 6

# A document counts as better only if it leads by this much in float64. Equal vectors then never do, however
# the last bits of a sum come out, and a real lead that is smaller says nothing.
_LEAD = 1e-9


def own_scores(queries_mD: Array, documents_mD: Array) -> Array:
    """Returns f(q, d) of each pair, float64 (m); both sides are unit vectors in float32."""
    return np.asarray(np.einsum("md,md->m", queries_mD, documents_mD, dtype=np.float64))


def percentiles(own_scores_n: Array) -> list[float]:
    """Returns the percentiles 0, 1, ..., 100 of the own scores; an empty list if there are no pairs."""
    if len(own_scores_n) == 0:
        return []
    return [round(float(value), _DECIMALS) for value in np.percentile(own_scores_n.astype(np.float64), _PERCENTILES)]


def floor_at(percentiles: list[float], quantile: float) -> float:
    """Returns the score that this fraction of the domain's pairs stays below.

    Args:
        percentiles: As `percentiles` returns them.
        quantile: From 0 to 1; values between two percentiles are interpolated.

    Returns:
        The score, -1.0 (no floor at all) if the quantile is 0 or the domain has no pair.
    """
    if quantile == 0 or not percentiles:
        return -1.0
    return float(np.interp(100 * quantile, _PERCENTILES, percentiles))


def draw_pool(document_rows: Array, size: int, seed: int) -> Array:
    """Draws the documents that pairs are ranked against: all of them, or `size` if there are more.

    Args:
        document_rows: The distinct documents that have a vector (int64).
        size: The most documents to draw.
        seed: Seed of the draw.

    Returns:
        Rows of the pool (int64, k), ascending.
    """
    if len(document_rows) <= size:
        return np.sort(document_rows)
    drawn = np.random.default_rng(seed).choice(len(document_rows), size, replace=False)
    return np.sort(document_rows[drawn])


def rank_own_documents(
    queries_mD: Array,
    documents_mD: Array,
    query_rows_m: Array,
    pool_kD: Array,
    pool_rows_k: Array,
    same_answer: SameAnswer,
) -> Array:
    """Ranks the own document of each pair for its query: 1 + the number of better documents in the pool.

    A document that answers the query for certain is never better, whatever its score: neither the own
    document, nor another known answer.

    Args:
        queries_mD: The surrogate's unit vectors of the pairs' queries, float32.
        documents_mD: The same of their own documents.
        query_rows_m: The rows of the queries, for `same_answer`.
        pool_kD: The vectors of the pool.
        pool_rows_k: Its document rows, for `same_answer`.
        same_answer: Whether a document is a certain answer to a query.

    Returns:
        The ranks (int32, m). They are the same for any block size and number of threads.
    """
    ranks = np.ones(len(queries_mD), dtype=np.int32)
    for start in range(0, len(queries_mD), _BLOCK_ROWS):
        block = slice(start, start + _BLOCK_ROWS)
        queries = queries_mD[block]
        own = own_scores(queries, documents_mD[block])
        lead = queries @ pool_kD.T
        lead -= own[:, None].astype(np.float32)
        is_better = lead > UNIT_NEAR_TIE

        # What float32 cannot decide is computed again in float64, query by query.
        is_near = np.abs(lead) <= UNIT_NEAR_TIE
        for i in np.flatnonzero(is_near.any(1)):
            near = np.flatnonzero(is_near[i])
            is_better[i, near] = exact_products(pool_kD[near], queries[i]) > own[i] + _LEAD

        # Only the better ones are looked up in the certain relation: they are few, and a look-up costs more.
        query, document = np.nonzero(is_better)
        is_other = ~same_answer(query_rows_m[block][query], pool_rows_k[document])
        ranks[block] += np.bincount(query[is_other], minlength=len(queries)).astype(np.int32)
    return ranks


def weak_pairs(ranks_n: Array, limit: int) -> Array:
    """Marks the pairs whose own document ranks beyond `limit` (bool, n); those without a rank are not marked."""
    return np.asarray(ranks_n > limit)
