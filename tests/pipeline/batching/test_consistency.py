"""Own scores, floors and ranks against loops written from the definition, in float64."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hardbatch.pipeline.batching.consistency import (
    draw_pool,
    floor_at,
    own_scores,
    percentiles,
    rank_own_documents,
    weak_pairs,
)
from tests.pipeline.batching.examples import topical_sides

NEVER = lambda query_rows, document_rows: np.zeros(len(query_rows), dtype=bool)  # noqa: E731


def as_stored(vectors):
    """Unit vectors as they come out of a vectors artifact: rounded to float16, read as float32."""
    return vectors.astype(np.float16).astype(np.float32)


@given(
    seed=st.integers(0, 2**16), num_pairs=st.integers(1, 60), num_documents=st.integers(1, 40), dim=st.integers(2, 9)
)
@settings(max_examples=60, deadline=None)
def test_ranks_are_those_of_a_loop(seed, num_pairs, num_documents, dim):
    generator = np.random.default_rng(seed)
    query_row, document_row = generator.integers(20, size=num_pairs), generator.integers(num_documents, size=num_pairs)
    # Coarse coordinates make many equal scores, the case that float32 gets wrong.
    queries, documents = generator.integers(-2, 3, (20, dim)) / 8, generator.integers(-2, 3, (num_documents, dim)) / 8
    pool = draw_pool(np.unique(document_row), int(generator.integers(1, 40)), seed)
    known = set(zip(query_row.tolist(), document_row.tolist(), strict=True))

    def same_answer(rows, others):
        return np.array([pair in known for pair in zip(rows.tolist(), others.tolist(), strict=True)], dtype=bool)

    q, d = queries.astype(np.float32), documents.astype(np.float32)
    found = rank_own_documents(q[query_row], d[document_row], query_row, d[pool], pool, same_answer)
    expected = [
        1 + sum(
            float(queries[row] @ documents[other]) > float(queries[row] @ documents[own]) and (row, other) not in known
            for other in pool.tolist()
        )
        for row, own in zip(query_row.tolist(), document_row.tolist(), strict=True)
    ]  # fmt: skip
    assert found.tolist() == expected


def test_ranks_do_not_depend_on_blocks_or_threads(same_each_way):
    documents, queries = map(as_stored, topical_sides(np.arange(700) % 9, 32, 2.0))
    documents[300:320] = documents[7]  # ties
    rows = np.arange(700)
    ranks = same_each_way(
        lambda: [rank_own_documents(queries, documents, rows, documents, rows, NEVER)],
        {"consistency._BLOCK_ROWS": 1},
        {"consistency._BLOCK_ROWS": 33},
    )[0]
    scores = queries.astype(np.float64) @ documents.astype(np.float64).T
    assert ranks.tolist() == (1 + (scores > np.diag(scores)[:, None] + 1e-9).sum(1)).tolist()
    assert 1 < np.median(ranks) < 350


def test_equal_vectors_are_not_better():
    same = as_stored(np.tile(np.full((1, 48), 48**-0.5), (40, 1)))
    ranks = rank_own_documents(same, same, np.arange(40), same, np.arange(40), NEVER)
    assert ranks.tolist() == [1] * 40


def test_a_pool_is_everything_or_a_draw_of_its_size():
    rows = np.array([9, 2, 5, 70, 3])
    assert draw_pool(rows, 5, 0).tolist() == [2, 3, 5, 9, 70]
    drawn = [draw_pool(np.arange(1000), 50, seed) for seed in (0, 0, 1)]
    assert drawn[0].tolist() == drawn[1].tolist() != drawn[2].tolist()
    assert sorted(set(drawn[0].tolist())) == drawn[0].tolist() and len(drawn[0]) == 50


def test_a_sampled_pool_ranks_as_the_whole_does_in_proportion():
    documents, queries = map(as_stored, topical_sides(np.arange(3_000) % 40, 32, 4.0))
    rows = np.arange(3_000)
    pool = draw_pool(rows, 600, 0)
    whole = rank_own_documents(queries, documents, rows, documents, rows, NEVER)
    sampled = rank_own_documents(queries, documents, rows, documents[pool], pool, NEVER)
    assert np.corrcoef(whole, sampled)[0, 1] > 0.98
    assert sampled.mean() / whole.mean() == pytest.approx(600 / 3_000, rel=0.05)


def test_the_floor_is_a_quantile_of_the_own_scores():
    documents, queries = map(as_stored, topical_sides(np.arange(500) % 7, 24, 2.0))
    scores = own_scores(queries, documents)
    expected = [
        sum(float(a) * float(b) for a, b in zip(q, d, strict=True)) for q, d in zip(queries, documents, strict=True)
    ]
    assert np.allclose(scores, expected, atol=1e-12)
    found = percentiles(scores)
    assert len(found) == 101 and found == sorted(found)
    for quantile in (0.01, 0.1, 0.25, 1.0):
        assert floor_at(found, quantile) == pytest.approx(np.quantile(expected, quantile), abs=1e-6)
        assert (scores < floor_at(found, quantile) - 1e-5).mean() <= quantile
    assert floor_at(found, 0.105) == pytest.approx((found[10] + found[11]) / 2)


def test_a_domain_without_pairs_has_no_floor():
    assert percentiles(np.empty(0, dtype=np.float32)) == []
    assert floor_at([], 0.5) == -1.0


def test_quantile_0_is_no_floor():
    assert floor_at([0.5] * 101, 0.0) == -1.0


def test_weak_pairs_rank_beyond_the_limit_and_have_a_rank():
    assert weak_pairs(np.array([0, 1, 10, 11, 500]), 10).tolist() == [False, False, False, True, True]
