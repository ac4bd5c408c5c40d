"""Nearest neighbours by inner product: exact for few, by cells for many, the same for any number of threads."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hardbatch.pipeline.batching import neighbours
from hardbatch.pipeline.batching.neighbours import make_cells, nearest_neighbours


@pytest.fixture(params=["exact", "cells"])
def either_way(request, monkeypatch):
    """Both ways on a few vectors."""
    monkeypatch.setattr(neighbours, "_EXACT_UP_TO", 8_192 if request.param == "exact" else 0)


def clustered(num_vectors, dimension=24, seed=0):
    """Unit vectors around some hundred centres."""
    generator = np.random.default_rng(seed)
    centres = generator.standard_normal((num_vectors // 15 + 1, dimension))
    vectors = centres[generator.integers(len(centres), size=num_vectors)]
    vectors = vectors + 0.6 * generator.standard_normal(vectors.shape)
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def naive_neighbours(vectors, num_neighbours):
    scores = vectors.astype(np.float64) @ vectors.T.astype(np.float64)
    np.fill_diagonal(scores, -np.inf)
    return np.argsort(-scores, axis=1)[:, :num_neighbours]


def recall(found, expected):
    return np.mean([np.isin(row, known).mean() for row, known in zip(expected, found, strict=True)])


@pytest.mark.parametrize("num_vectors", [1, 2, 33, 1_025, 2_049])
def test_few_vectors_get_their_exact_neighbours_best_first(num_vectors):
    vectors = clustered(num_vectors)
    found = nearest_neighbours(vectors, 8)
    assert found.dtype == np.int64
    assert np.array_equal(found, naive_neighbours(vectors, min(8, num_vectors - 1)))


def test_inner_product_counts_the_length_too():
    vectors = np.array([[1, 0], [0.9, 0.1], [5, 5], [0, 1.1]], dtype=np.float32)
    assert nearest_neighbours(vectors, 1)[:, 0].tolist() == [2, 2, 3, 2]


def test_no_vector_has_more_neighbours_than_there_are_others(either_way):
    found = nearest_neighbours(clustered(200), 500)
    assert found.shape == (200, 199)
    assert all(sorted([*row, own]) == list(range(200)) for own, row in enumerate(found.tolist()))


def test_cells_find_most_neighbours(monkeypatch):
    vectors = clustered(4_000)
    monkeypatch.setattr(neighbours, "_EXACT_UP_TO", 0)
    monkeypatch.setattr(neighbours, "_NUM_PROBES", 16)  # of 253 cells
    assert recall(nearest_neighbours(vectors, 16), naive_neighbours(vectors, 16)) > 0.9


@settings(max_examples=20, deadline=None)
@given(st.integers(150, 400), st.integers(1, 5), st.integers(1, 400), st.integers(0, 2**31))
def test_cells_give_each_vector_distinct_others(num_vectors, dimension, num_distinct, seed):
    generator = np.random.default_rng(seed)
    vectors = generator.standard_normal((num_distinct, dimension)).astype(np.float32)
    vectors = vectors[generator.integers(num_distinct, size=num_vectors)]
    vectors[: num_vectors // 10] = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neighbours, "_EXACT_UP_TO", 0)
        found = nearest_neighbours(vectors, 32)
    assert found.shape == (num_vectors, 32)
    for place, row in enumerate(found.tolist()):
        assert len({*row, place}) == 33
        assert set(row) <= set(range(num_vectors))


def test_neighbours_do_not_depend_on_threads(either_way, monkeypatch, same_each_way):
    monkeypatch.setattr(neighbours, "_CELLS_PER_ROOT", 1)
    monkeypatch.setattr(neighbours, "_NUM_PROBES", 8)
    vectors = clustered(800, dimension=256)
    same_each_way(lambda: (nearest_neighbours(vectors, 32),))


def test_cells_are_those_of_the_nearest_centre():
    vectors = clustered(900)
    centres, cell = make_cells(vectors, 30)
    assert centres.shape == (30, 24)
    scores = vectors.astype(np.float64) @ centres.T.astype(np.float64)
    assert np.allclose(scores[np.arange(900), cell], scores.max(1), atol=1e-6)
    assert len(np.unique(cell)) > 20
