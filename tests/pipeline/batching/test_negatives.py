"""batching.negatives: effective negatives and the spread of masks, against a count query by query."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hardbatch.pipeline.batching.negatives import count_negatives, measure_spread


def test_negatives_of_a_batch() -> None:
    """Of 4 slots: query 0 keeps all 3 negatives, query 1 keeps 2, query 2 keeps 1, query 3 keeps none."""
    mask_BB = np.array([[0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]], dtype=bool)
    certain_BB = np.zeros((4, 4), dtype=bool)
    certain_BB[3, :3] = True
    found = count_negatives(mask_BB, certain_BB)
    assert vars(found) == {
        "same_answer_rate": 0.25,
        "mean_negatives": 1.5,
        "min_negatives": 0,
        "queries_without_negatives": 1,
        "queries_with_few_negatives": 2,  # 1 and 0 are fewer than half of 3
    }


@pytest.mark.parametrize(("num_masked", "is_few"), [(2, 0), (3, 3)])
def test_exactly_half_of_the_negatives_are_not_few(num_masked: int, is_few: int) -> None:
    mask_BB = np.zeros((5, 5), dtype=bool)
    for i in range(3):
        mask_BB[i, [j for j in range(5) if j != i][:num_masked]] = True
    assert count_negatives(mask_BB, mask_BB).queries_with_few_negatives == is_few


@given(st.lists(st.integers(0, 9), min_size=1, max_size=80))
def test_the_spread_of_masks_is_that_of_a_list_of_queries(masked: list[int]) -> None:
    found = measure_spread(np.bincount(masked, minlength=10))
    most = sorted(masked, reverse=True)
    assert (found.queries, found.without) == (len(masked), masked.count(9))
    assert found.mean == pytest.approx(np.mean([9 - number for number in masked]))
    assert found.q05 == 9 - most[math.ceil(len(masked) / 20) - 1]
    if sum(masked):
        assert found.concentration == pytest.approx(sum(most[: math.ceil(len(masked) / 10)]) / sum(masked))
    else:
        assert found.concentration is None
