"""Equivalence sets against loops written from the definition."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from hardbatch.pipeline.batching.equivalence import (
    LikelyRule,
    keeps_unlikely,
    likely_answers,
    repeats_query,
)


def unit_vectors(num_rows, dimension, seed):
    """Unit vectors as they come out of a vectors artifact: rounded to float16, read as float32."""
    vectors = np.random.default_rng(seed).standard_normal((num_rows, dimension))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16).astype(np.float32)


def dot(left, right):
    return sum(float(a) * float(b) for a, b in zip(left, right, strict=True))


def naive_likely(queries, documents, rule, floors, certain):
    """Likely answers by loops in float64: (mask before the cap, mask)."""
    size = len(queries)
    f = np.array([[dot(query, document) for document in documents] for query in queries])
    passes = np.zeros((size, size), dtype=bool)
    for i, j in itertools.permutations(range(size), 2):
        own = [f[i, i], f[j, j]]
        if rule.margin_strategy == "absolute":
            bounds = [score - rule.margin for score in own]
        else:
            bounds = [score - rule.margin * abs(score) for score in own]
        score, bound = f[i, j], bounds[0]
        if rule.likely_rule == "symmetric":
            score, bound = (f[i, j] + f[j, i]) / 2, sum(bounds) / 2
        passes[i, j] = score >= max(bound, floors[i], floors[j]) and not certain[i, j]
    capped = passes.copy()
    for i in range(size):
        back = f[:, i] if rule.likely_rule == "symmetric" else np.zeros(size)
        ranked = sorted(np.flatnonzero(passes[i]).tolist(), key=lambda j: (-(f[i, j] + back[j]), j))
        capped[i, ranked[int(rule.max_likely * size) :]] = False
    return passes, capped


RULES = [
    LikelyRule(),
    LikelyRule(margin=0.1),
    LikelyRule(margin=-0.1),
    LikelyRule(margin=0.2, margin_strategy="relative"),
    LikelyRule(margin=2.0, max_likely=0.1),
    LikelyRule(margin=0.3, max_likely=1.0),
    LikelyRule(max_likely=0.0),
]
RULES += [replace(rule, likely_rule="symmetric") for rule in RULES]


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("size", [1, 2, 33])
def test_likely_answers_are_the_definition(rule, size):
    queries, documents = unit_vectors(size, 20, 1), unit_vectors(size, 20, 2)
    documents = (0.3 * documents + 0.2 * queries + 0.4 * queries[::-1]).astype(np.float16).astype(np.float32)
    documents[size // 2] = documents[0]  # a score that equals the bound
    floors = np.where(np.arange(size) % 3 == 0, 0.2, -1.0)  # a batch of two domains
    certain = np.random.default_rng(3).random((size, size)) < 0.05
    passes, expected = naive_likely(queries, documents, rule, floors, certain)
    found = likely_answers(queries, documents, rule, floors, certain)
    assert np.array_equal(found.mask_BB, expected)
    if size > 2 and rule.max_likely not in (0.0, 1.0):
        assert expected.any()
    if rule.margin >= 2.0 and size > 2:
        assert passes.sum() > expected.sum() > 0


def test_without_a_cap_the_symmetric_rule_masks_both_ways():
    queries, documents = unit_vectors(64, 12, 5), unit_vectors(64, 12, 6)
    mask = likely_answers(
        queries, documents, LikelyRule(likely_rule="symmetric", margin=0.2, max_likely=1.0), 0.1
    ).mask_BB
    assert np.array_equal(mask, mask.T) and 0 < mask.sum() < mask.size / 2


def test_a_pair_that_says_little_masks_nothing_below_the_floor():
    queries, documents = unit_vectors(20, 64, 7), unit_vectors(20, 64, 8)
    documents[1:] = queries[1:]
    documents[0] = -queries[0]  # own score -1: by its own bound alone, half of the batch would pass
    assert likely_answers(queries, documents, LikelyRule(max_likely=1.0), -1.0).mask_BB[0].any()
    assert not likely_answers(queries, documents, LikelyRule(max_likely=1.0), 0.5).mask_BB.any()


def test_equal_pairs_are_likely_and_a_cap_keeps_the_lowest_slots():
    queries, documents = (np.tile(unit_vectors(1, 48, seed), (12, 1)) for seed in (9, 10))
    mask = likely_answers(queries, documents, LikelyRule(), -1.0).mask_BB
    assert [np.flatnonzero(row).tolist() for row in mask] == [[1, 2, 3], [0, 2, 3], [0, 1, 3], *[[0, 1, 2]] * 9]


def test_what_is_certain_does_not_use_up_the_cap():
    queries, documents = (np.tile(unit_vectors(1, 48, seed), (12, 1)) for seed in (9, 10))
    certain = np.zeros((12, 12), dtype=bool)
    certain[0, 1:6] = True
    mask = likely_answers(queries, documents, LikelyRule(), -1.0, certain).mask_BB
    assert np.flatnonzero(mask[0]).tolist() == [6, 7, 8]


def test_scores_and_bounds_explain_the_mask():
    queries, documents = unit_vectors(30, 16, 11), unit_vectors(30, 16, 12)
    found = likely_answers(queries, documents, LikelyRule(max_likely=1.0), 0.2)
    clear = (np.abs(found.score_BB - found.bound_BB) > 1e-5) & ~np.eye(30, dtype=bool)
    assert np.array_equal(found.mask_BB[clear], (found.score_BB >= found.bound_BB)[clear])
    assert found.bound_BB.min() == 0.2


def test_likely_answers_do_not_depend_on_threads(same_each_way):
    queries, documents = unit_vectors(200, 384, 13), unit_vectors(200, 384, 14)
    documents[100:110] = documents[3]
    same_each_way(lambda: [likely_answers(queries, documents, LikelyRule(margin=0.05), 0.02).mask_BB])


@pytest.mark.parametrize("floor", [-1.0, 0.3])
@pytest.mark.parametrize("rule", [LikelyRule(), LikelyRule(margin=0.2, margin_strategy="relative")], ids=str)
def test_hard_negatives_are_kept_if_they_are_not_likely(rule, floor):
    query, negatives = unit_vectors(1, 24, 9)[0], unit_vectors(60, 24, 10)
    document = negatives[7].copy()
    own = dot(query, document)
    bound = own - rule.margin * (abs(own) if rule.margin_strategy == "relative" else 1)
    expected = [dot(query, negative) < max(bound, floor) for negative in negatives]
    assert keeps_unlikely(query, document, negatives, rule, floor).tolist() == expected
    assert 0 < sum(expected) < 60


def test_documents_that_repeat_a_query_are_exactly_those():
    queries, documents = ["a  b", "C", ""], ["c", "A b", "a c", " "]
    assert repeats_query(queries, documents).tolist() == [
        [False, True, False, False],
        [True, False, False, False],
        [False, False, False, True],
    ]
