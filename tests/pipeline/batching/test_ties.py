"""Near-ties: decided in float64, and by the lowest id if that is a tie too."""

from __future__ import annotations

import numpy as np
import pytest

from hardbatch.pipeline.batching.ties import UNIT_NEAR_TIE, exact_products, highest


@pytest.mark.parametrize("with_offsets", [False, True])
def test_what_float32_cannot_rank_is_ranked(with_offsets):
    generator = np.random.default_rng(0)
    vectors = (np.ones((50, 64)) + 1e-7 * generator.standard_normal((50, 64))).astype(np.float32) / 8
    vectors[40] = vectors[13] = vectors[27]
    offsets = 1e-9 * generator.standard_normal(50) if with_offsets else np.zeros(50)
    assert not np.array_equal(exact_products(vectors, vectors[0]), vectors @ vectors[0])  # else this tests nothing
    for ids in (np.arange(50), np.array([13, 27, 40]), np.array([27, 40]), np.array([5])):
        exact = exact_products(vectors[ids], vectors[0]) + offsets[ids]
        found = highest(
            np.full(len(ids), 1, dtype=np.float32),
            vectors,
            vectors[0],
            near_tie=UNIT_NEAR_TIE,
            ids=ids,
            offsets_k=offsets if with_offsets else None,
        )
        assert found == ids[np.argmax(exact)]


def test_a_clear_winner_is_not_looked_at_again():
    scores = np.array([0.5, 0.7, 0.7 - 2 * UNIT_NEAR_TIE], dtype=np.float32)
    assert highest(scores, np.eye(3), np.ones(3), near_tie=UNIT_NEAR_TIE) == 1
