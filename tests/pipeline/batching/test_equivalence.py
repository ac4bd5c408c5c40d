"""Equivalence sets against loops written from the definition."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from hardbatch.pipeline.batching.equivalence import equal_texts, keeps_negative, surrogate_mask


def unit_vectors(num_rows, dimension, seed):
    """Unit vectors as they come out of a vectors artifact: rounded to float16, read as float32."""
    vectors = np.random.default_rng(seed).standard_normal((num_rows, dimension))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16).astype(np.float32)


def dot(left, right):
    return sum(float(a) * float(b) for a, b in zip(left, right, strict=True))


def naive_mask(queries, documents, margin):
    """(mask, gap): j in S(i) if f(q_i, d_j) >= f(q_i, d_i) - margin, and how far each is from that bound."""
    scores = np.array([[dot(query, document) for document in documents] for query in queries])
    gap = scores - (np.diag(scores) - margin)[:, None]
    return (gap >= 0) & ~np.eye(len(queries), dtype=bool), gap


@pytest.mark.parametrize("margin", [0.0, 0.05, 0.5])
@pytest.mark.parametrize("size", [1, 2, 33])
def test_mask_is_the_definition(size, margin):
    queries, documents = unit_vectors(size, 20, 1), unit_vectors(size, 20, 2)
    documents = (0.5 * documents + 0.5 * queries).astype(np.float16).astype(np.float32)
    expected, gap = naive_mask(queries, documents, margin)
    before = queries.copy(), documents.copy()
    found = surrogate_mask(queries, documents, margin=margin)
    assert np.array_equal(queries, before[0]) and np.array_equal(documents, before[1])
    clear = np.abs(gap) > 1e-6
    assert found.dtype == bool and found.shape == (size, size)
    assert np.array_equal(found[clear], expected[clear])
    assert not found.diagonal().any()
    if size > 2:
        assert 0 < expected.sum() < size * (size - 1)


def test_row_is_the_query_and_column_the_document():
    queries = np.eye(3, dtype=np.float32)
    documents = np.array([[0.5, 0.0, 0.0], [0.9, 0.6, 0.0], [0.0, 0.0, 1.0]], dtype=np.float32)
    # d_1 answers q_0 better (0.9) than d_0 does (0.5); d_0 answers q_1 not at all
    assert surrogate_mask(queries, documents, margin=0.0).tolist() == [
        [False, True, False],
        [False, False, False],
        [False, False, False],
    ]


def test_documents_of_the_same_vector_are_in_each_others_sets():
    queries, documents = unit_vectors(40, 384, 3), unit_vectors(40, 384, 4)
    documents[[5, 17, 30]] = documents[2]
    mask = surrogate_mask(queries, documents, margin=0.0)
    same = [2, 5, 17, 30]
    assert all(mask[i, j] for i in same for j in same if i != j)


def test_a_document_a_little_below_the_bound_is_left_out():
    queries = np.tile(np.array([1.0, 0.0], dtype=np.float32), (3, 1))
    documents = np.array([[0.5, 0], [0.5 - 2**-22, 0], [0.5 + 2**-22, 0]], dtype=np.float32)
    assert surrogate_mask(queries, documents, margin=0.0).tolist() == [
        [False, False, True],
        [True, False, True],
        [False, False, False],
    ]


def test_a_larger_margin_only_adds():
    queries, documents = unit_vectors(50, 16, 5), unit_vectors(50, 16, 6)
    masks = [surrogate_mask(queries, documents, margin=margin) for margin in (0.0, 0.1, 0.3, 3.0)]
    for small, large in itertools.pairwise(masks):
        assert not (small & ~large).any()
        assert large.sum() > small.sum()
    assert masks[-1].sum() == 50 * 49


def test_equal_texts_are_exactly_those():
    texts = ["a", "b", "a", "A", "a ", "b", ""]
    expected = [[i != j and texts[i] == texts[j] for j in range(7)] for i in range(7)]
    assert equal_texts(texts).tolist() == expected


@pytest.mark.parametrize("margin", [0.0, 0.1])
def test_negatives_are_kept_if_they_surely_do_not_answer(margin):
    query, negatives = unit_vectors(1, 24, 9)[0], unit_vectors(60, 24, 10)
    document = negatives[7].copy()  # a negative of the same vector as the document
    own = dot(query, document)
    expected = [dot(query, negative) < own - margin for negative in negatives]
    assert keeps_negative(query, document, negatives, margin=margin).tolist() == expected
    assert not expected[7]
    assert 0 < sum(expected) < 60


def test_no_negatives():
    query = unit_vectors(1, 8, 0)[0]
    assert keeps_negative(query, query, np.zeros((0, 8), dtype=np.float32), margin=0.0).tolist() == []
