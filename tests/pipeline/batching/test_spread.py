"""Spreading classes over batches: no pair is lost, no batch is crowded, and packing keeps it so."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hardbatch.pipeline.batching import pack as pack_module
from hardbatch.pipeline.batching.kmeans import kmeans
from hardbatch.pipeline.batching.pack import PackSettings, pack
from hardbatch.pipeline.batching.points import InMemory
from hardbatch.pipeline.batching.spread import CappedClasses, always_allowed, halve, spread
from tests.pipeline.batching.examples import topical_sides
from tests.samples import Sides


def most_in_a_batch(classes, batches):
    """The most pairs of each class in one batch: {(side, class): number}."""
    return {
        (side, number): int((classes[batches][..., side] == number).sum(1).max())
        for side in (0, 1)
        for number in np.unique(classes[:, side])
    }


def caps_by_hand(classes, batches):
    num_batches, batch_size = batches.shape
    caps = {}
    for side in (0, 1):
        for number, size in zip(*np.unique(classes[:, side], return_counts=True), strict=True):
            caps[side, number] = max(-(-int(size) // num_batches), batch_size // 16, 1)
    return caps


def crowding_by_hand(classes, batches):
    """The pairs of each batch beyond the caps, one class after the other."""
    caps = caps_by_hand(classes, batches)
    held = [(side, number) for batch in classes[batches] for side in (0, 1) for number in batch[:, side].tolist()]
    per_batch = len(held) // len(batches)
    rows = [held[start : start + per_batch] for start in range(0, len(held), per_batch)]
    return sum(max(0, row.count(key) - caps[key]) for row in rows for key in set(row))


@st.composite
def crowds(draw):
    """Points, batches that leave out fewer than B of them, and classes: few or many, of either side."""
    num_batches, batch_size = draw(st.integers(1, 7)), draw(st.integers(2, 40))
    num_points = num_batches * batch_size + draw(st.integers(0, batch_size - 1))
    generator = np.random.default_rng(draw(st.integers(0, 2**20)))
    limits = [draw(st.integers(1, num_points)) for _ in (0, 1)]
    classes = np.stack([generator.integers(0, limit, num_points) for limit in limits], axis=1)
    points = generator.choice([-1.0, 0.0, 0.5, 1.0], (num_points, draw(st.integers(1, 4)))).astype(np.float32)
    batches = generator.permutation(num_points)[: num_batches * batch_size].reshape(num_batches, batch_size)
    return points, batches, classes


@settings(max_examples=200, deadline=None)
@given(crowds())
def test_no_batch_is_crowded_and_no_pair_is_lost(given_):
    points, batches, classes = given_
    capped = CappedClasses.of(classes, len(batches), always_allowed(batches.shape[1]))
    if capped is None:
        assert crowding_by_hand(classes, batches) == 0
        return
    assert capped.at(batches).num_crowding() == crowding_by_hand(classes, batches)

    found = spread(points, batches, capped)
    assert found.shape == batches.shape and sorted(found.ravel().tolist()) == sorted(batches.ravel().tolist())
    caps = caps_by_hand(classes, found)
    assert all(number <= caps[key] for key, number in most_in_a_batch(classes, found).items())


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 30), st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**20))
def test_two_batches_are_halved_class_by_class(batch_size, num_queries, num_documents, seed):
    """Class 0 stands for pairs that share nothing; all other classes are in both halves as often, or once more."""
    generator = np.random.default_rng(seed)
    limits = (num_queries, num_documents)
    classes = np.stack([generator.integers(0, limit, 2 * batch_size) for limit in limits], axis=1)
    first = halve(classes)
    assert first.sum() == batch_size
    for side in (0, 1):
        for number in range(1, limits[side]):
            of_class = classes[:, side] == number
            assert abs(int((of_class & first).sum()) - int((of_class & ~first).sum())) <= 1


def test_halves_of_what_is_even_already_stay():
    classes = np.array([[1, 0], [2, 0], [0, 1], [0, 0], [1, 1], [0, 0], [2, 0], [0, 0]])
    assert halve(classes).tolist() == [True] * 4 + [False] * 4


def test_a_crowding_pair_goes_to_the_batch_that_suits_it():
    """Three topics, of batches of four; two pairs of topic 0 share a query, and one of them is half topic 1."""
    points = np.repeat(np.eye(3, dtype=np.float32), 4, axis=0)
    points[3] = [0.5, 0.5, 0.0]
    points[4] = [0.4, 0.6, 0.0]
    classes = np.stack([np.arange(12), np.arange(12)], axis=1)
    classes[3, 0] = classes[0, 0]
    found = spread(points, np.arange(12).reshape(3, 4), CappedClasses.of(classes, 3, 1))
    assert [set(batch) for batch in found.tolist()] == [{0, 1, 2, 4}, {3, 5, 6, 7}, {8, 9, 10, 11}]


def similar_pairs(query_class, document_class, dimension=32, seed=0):
    """Pairs whose documents are vectors of their class, and whose queries are near these."""
    generator = np.random.default_rng(seed)
    documents = generator.standard_normal((int(document_class.max()) + 1, dimension))
    documents = documents[document_class]
    queries = documents + 0.3 * generator.standard_normal(documents.shape)
    first = np.unique(query_class, return_index=True)[1]
    queries = queries[first[np.unique(query_class, return_inverse=True)[1]]]
    sides = [(side / np.linalg.norm(side, axis=1, keepdims=True)).astype(np.float32) for side in (documents, queries)]
    return Sides(*sides), np.stack([query_class, document_class], axis=1)


def packed(points, classes, batch_size, rounds=10):
    folded = InMemory(points.take(np.arange(len(points))))
    found = kmeans(folded, -(-len(points) // batch_size), iterations=5, tolerance=1e-3, balance=0.02, seed=0)
    chosen = PackSettings(batch_size=batch_size, group_size=batch_size, refine_rounds=rounds)
    packing = pack(points, found.labels, found.centroids, chosen, classes)
    placed = np.concatenate([packing.batches.ravel(), packing.remainder])
    assert sorted(placed.tolist()) == list(range(len(points)))
    return packing.batches


def negatives(classes, batches):
    """The pairs of its batch that share no class with a pair (b × B)."""
    query, document = classes[batches][..., 0], classes[batches][..., 1]
    same = (query[:, :, None] == query[:, None]) | (document[:, :, None] == document[:, None])
    return (~same).sum(2)


FAQ = np.arange(1_500), np.repeat(np.arange(60), 25)
HARD_CASES = {
    "questions of 60 answers": (*FAQ, 29),
    "1,200 queries of 6 documents": (np.arange(1_200), np.arange(1_200) % 6, 25),
    "a query with 2,000 documents": (np.r_[np.zeros(2_000, dtype=int), 1:2_001], np.arange(4_000), 15),
    "all pairs of 60 queries and 40 documents": (np.repeat(np.arange(60), 40), np.tile(np.arange(40), 60), 29),
}


@pytest.mark.parametrize(("queries", "documents", "least"), HARD_CASES.values(), ids=HARD_CASES)
def test_every_query_keeps_negatives(queries, documents, least):
    points, classes = similar_pairs(queries, documents)
    assert negatives(classes, packed(points, None, 32)).min() < least
    batches = packed(points, classes, 32)
    assert crowding_by_hand(classes, batches) == 0
    assert negatives(classes, batches).min() >= least


@pytest.mark.parametrize("batch_size", [8, 16])
def test_small_batches_of_paraphrases_hold_nothing_but_negatives(batch_size):
    points, classes = similar_pairs(*FAQ)
    assert (negatives(classes, packed(points, None, batch_size)).max(1) == 0).sum() > 40
    assert negatives(classes, packed(points, classes, batch_size)).min() == batch_size - 1


def test_a_class_larger_than_a_stretch_is_dealt_to_all_stretches(monkeypatch):
    points, classes = similar_pairs(np.arange(2_000), np.r_[np.zeros(1_000, dtype=int), 1:1_001])
    monkeypatch.setattr(pack_module, "_STRETCH_VALUES", 500 * 2 * points.dimension)
    assert negatives(classes, packed(points, None, 16)).min() == 0
    assert negatives(classes, packed(points, classes, 16)).min() > 2


def test_classes_too_small_to_crowd_change_nothing():
    sides = Sides(*topical_sides(np.arange(1_000) % 30, 24, 1.0))
    every = np.arange(1_000)
    for classes, batch_size in (
        (np.stack([every, every[::-1]], axis=1), 16),
        (np.stack([every // 2, every], axis=1), 32),
    ):
        assert np.array_equal(packed(sides, classes, batch_size), packed(sides, None, batch_size))


def test_threads_change_nothing(same_each_way):
    points, classes = similar_pairs(np.arange(1_500) // 3, np.repeat(np.arange(60), 25))
    same_each_way(lambda: [packed(points, classes, 16, rounds=3)])
