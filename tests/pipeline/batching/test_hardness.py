"""Hardness and its bounds against loops over all pairs, written from the definitions."""

from __future__ import annotations

import math
from dataclasses import astuple

import numpy as np
import pytest

from hardbatch.pipeline.batching import hardness as module
from hardbatch.pipeline.batching.hardness import TEMPERATURE, Bounds, measure_batch, measure_bounds
from tests.samples import Sides


def unit_vectors(num_rows, dimension, seed, num_topics=None):
    generator = np.random.default_rng(seed)
    vectors = generator.standard_normal((num_rows, dimension))
    if num_topics:
        topics = np.random.default_rng(99).standard_normal((num_topics, dimension))
        vectors = 0.7 * vectors + 1.3 * topics[np.arange(num_rows) % num_topics]
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16).astype(np.float32)


def similarity(queries, documents):
    """c_ij of all ordered pairs, float64."""
    half = documents.astype(np.float64) @ queries.astype(np.float64).T
    return (half + half.T) / 2


def dot(left, right):
    return math.fsum(float(a) * float(b) for a, b in zip(left, right, strict=True))


def naive_batch(queries, documents, mask, surrogate_queries, surrogate_documents):
    """From the definitions: hardness, that within groups of three, masked hardness, mask rate and surrogate loss."""
    size = len(queries)
    alike, within, unmasked, losses = [], [], [], []
    for i in range(size):
        own = dot(surrogate_queries[i], surrogate_documents[i]) / TEMPERATURE
        total = 1.0  # of exp(score - own)
        for j in set(range(size)) - {i}:
            alike.append((dot(documents[i], queries[j]) + dot(documents[j], queries[i])) / 2)
            if i // 3 == j // 3:
                within.append(alike[-1])
            if not mask[i, j]:
                unmasked.append(alike[-1])
                total += math.exp(dot(surrogate_queries[i], surrogate_documents[j]) / TEMPERATURE - own)
        losses.append(math.log(total))
    return (
        np.mean(alike),
        np.mean(within),
        np.mean(unmasked) if unmasked else None,
        1 - len(unmasked) / len(alike),
        np.mean(losses),
    )


@pytest.mark.parametrize("rate", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("size", [2, 11])
def test_batch_figures_are_those_of_the_loops(size, rate):
    queries, documents = unit_vectors(size, 12, 1), unit_vectors(size, 12, 2)
    surrogates = unit_vectors(size, 7, 3), unit_vectors(size, 7, 4)
    mask = np.random.default_rng(5).random((size, size)) < rate
    np.fill_diagonal(mask, False)
    found = astuple(measure_batch(queries, documents, mask, *surrogates, group_size=3))
    for value, expected in zip(found, naive_batch(queries, documents, mask, *surrogates), strict=True):
        assert value == (None if expected is None else pytest.approx(expected, abs=1e-5))


def test_a_batch_all_masked_has_no_masked_hardness():
    vectors = unit_vectors(5, 8, 0)
    found = measure_batch(vectors, vectors, ~np.eye(5, dtype=bool), vectors, vectors)
    assert found.masked_hardness is None and found.mask_rate == 1.0 and np.isfinite(found.hardness)
    assert found.surrogate_loss == pytest.approx(0, abs=1e-9)


def test_groups_of_the_size_of_the_batch_are_as_hard_as_the_batch_and_groups_of_one_have_no_hardness():
    queries, documents = unit_vectors(12, 8, 0), unit_vectors(12, 8, 1)
    sides = queries, documents, np.zeros((12, 12), dtype=bool), queries, documents
    whole, single = measure_batch(*sides, group_size=12), measure_batch(*sides, group_size=1)
    assert whole.group_hardness == whole.hardness == single.hardness
    assert single.group_hardness is None


def test_loss_does_not_overflow_for_the_hardest_batch():
    queries, documents = np.tile(unit_vectors(1, 8, 0), (4, 1)), np.tile(unit_vectors(1, 8, 0), (4, 1))
    found = measure_batch(queries, documents, np.zeros((4, 4), dtype=bool), queries, documents)
    assert found.surrogate_loss == pytest.approx(math.log(4), abs=1e-6)
    opposite = measure_batch(queries, documents, np.zeros((4, 4), dtype=bool), queries, -documents)
    assert np.isfinite(opposite.surrogate_loss)


@pytest.mark.parametrize("block_rows", [4_096, 37, 5])
@pytest.mark.parametrize("batch_size", [2, 8, 60, 150])
def test_bounds_are_means_over_all_pairs_and_over_the_nearest(monkeypatch, block_rows, batch_size):
    monkeypatch.setattr(module, "_BLOCK_ROWS", block_rows)
    documents, queries = unit_vectors(150, 12, 1, num_topics=5), unit_vectors(150, 12, 2, num_topics=5)
    similar = similarity(queries, documents)
    random = similar[~np.eye(150, dtype=bool)].mean()
    np.fill_diagonal(similar, -np.inf)
    knn = np.sort(similar, axis=1)[:, ::-1][:, : batch_size - 1].mean()
    bounds = measure_bounds(Sides(documents, queries), batch_size, num_anchors=4_096, seed=0)
    assert (bounds.random, bounds.knn) == pytest.approx((random, knn), abs=2e-6)
    assert bounds.knn >= bounds.random - 1e-6


def test_anchors_are_drawn_by_the_seed():
    documents, queries = unit_vectors(300, 12, 1, num_topics=5), unit_vectors(300, 12, 2, num_topics=5)
    similar = similarity(queries, documents)
    np.fill_diagonal(similar, -np.inf)
    of_anchor = np.sort(similar, axis=1)[:, ::-1][:, :7].mean(1)
    found = [measure_bounds(Sides(documents, queries), 8, num_anchors=20, seed=seed) for seed in (0, 0, 1)]
    assert found[0] == found[1]
    assert found[0].knn != found[2].knn and found[0].random == found[2].random
    assert of_anchor.min() <= found[0].knn <= of_anchor.max()


def test_fewer_pairs_than_a_batch_have_no_bounds():
    pairs = Sides(unit_vectors(7, 4, 0), unit_vectors(7, 4, 1))
    assert measure_bounds(pairs, 8, num_anchors=4, seed=0) is None
    assert measure_bounds(pairs, 7, num_anchors=4, seed=0) is not None


def test_share_of_random_batches_is_about_zero_and_of_sorted_ones_high():
    documents, queries = unit_vectors(1_000, 16, 1, num_topics=50), unit_vectors(1_000, 16, 2, num_topics=50)
    bounds = measure_bounds(Sides(documents, queries), 10, num_anchors=1_000, seed=0)

    def share(order):
        shares = []
        for rows in order.reshape(-1, 10):
            no_mask = np.zeros((10, 10), dtype=bool)
            sides = queries[rows], documents[rows]
            shares.append(bounds.share(measure_batch(*sides, no_mask, *sides).hardness))
        return np.mean(shares)

    assert abs(share(np.random.default_rng(0).permutation(1_000))) < 0.03
    assert 0.5 < share(np.argsort(np.arange(1_000) % 50, kind="stable")) < 1


def test_share_of_a_domain_without_spread_is_zero():
    assert Bounds(random=0.4, knn=0.4).share(0.4) == 0.0
    assert Bounds(random=0.2, knn=0.6).share(0.4) == pytest.approx(0.5)
