"""Effective negatives: what masking leaves of a batch for each query to learn from.

The effective negatives of a query are the slots of its batch, other than its own, that are not masked for it.

Shape letters: B slots of a batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hardbatch.pipeline.arrays import Array

_DECIMALS = 6


@dataclass(frozen=True, kw_only=True)
class BatchNegatives:
    """What one batch keeps, as the index of shards holds it.

    Attributes:
        same_answer_rate: The fraction of the B(B−1) slots that are masked because they answer for certain.
        mean_negatives: The mean of effective negatives over the queries of the batch.
        min_negatives: The least of them.
        queries_without_negatives: Number of queries that have none, so that the pair teaches nothing.
        queries_with_few_negatives: Number of queries that have fewer than half of the B−1 slots.
    """

    same_answer_rate: float
    mean_negatives: float
    min_negatives: int
    queries_without_negatives: int
    queries_with_few_negatives: int


@dataclass(frozen=True, kw_only=True)
class MaskSpread:
    """How masks spread over the queries of many batches.

    Attributes:
        queries: Number of queries, one for each slot of each batch.
        mean: The mean of effective negatives.
        q05: Their 5th percentile: at least 5 % of the queries have this many or fewer.
        without: Number of queries without a negative.
        concentration: The share of all masked slots that belong to the 10 % of queries with the most of
            them; 0.1 if all queries have equally many, None if nothing is masked.
    """

    queries: int
    mean: float
    q05: int
    without: int
    concentration: float | None


def count_negatives(mask_BB: Array, same_answer_BB: Array) -> BatchNegatives:
    """Counts what a batch keeps.

    Args:
        mask_BB: Whether slot j is masked for the query of slot i, at [i, j] (bool), False on the diagonal.
        same_answer_BB: Which of these slots answer for certain.
    """
    others = len(mask_BB) - 1
    kept_B = others - mask_BB.sum(1)
    return BatchNegatives(
        same_answer_rate=float(same_answer_BB.sum() / (len(mask_BB) * others)),  # not rounded: it may be tiny
        mean_negatives=round(float(kept_B.mean()), _DECIMALS),
        min_negatives=int(kept_B.min()),
        queries_without_negatives=int((kept_B == 0).sum()),
        queries_with_few_negatives=int((2 * kept_B < others).sum()),
    )


def measure_spread(queries_by_masked_B: Array) -> MaskSpread:
    """Measures how masks spread, from the number of queries that have 0, 1, ..., B−1 masked slots.

    Example: of 10 queries with 3 other slots, nine have no masked slot and one has all 3 masked. Then
    `queries_by_masked_B` is [9, 0, 0, 1], the mean is 2.7, and the concentration is 1.
    """
    others = len(queries_by_masked_B) - 1
    masked_B = np.arange(len(queries_by_masked_B))
    num_queries = int(queries_by_masked_B.sum())
    num_masked = int(queries_by_masked_B @ masked_B)

    # Walk from the most masked queries to the least, so an index is a number of effective negatives.
    # Of the last number among the top tenth, only some queries may belong to it.
    queries_by_kept_B = queries_by_masked_B[::-1]
    reached_B = queries_by_kept_B.cumsum()
    num_top = -(-num_queries // 10)
    in_top_B = np.minimum(queries_by_kept_B, (num_top - (reached_B - queries_by_kept_B)).clip(min=0))
    return MaskSpread(
        queries=num_queries,
        mean=others - num_masked / num_queries,
        q05=int(np.argmax(20 * reached_B >= num_queries)),
        without=int(queries_by_masked_B[-1]),
        concentration=int(in_top_B @ masked_B[::-1]) / num_masked if num_masked else None,
    )
