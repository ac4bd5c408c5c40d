"""The greedy tour: every centroid once, and each next one the nearest that is left."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hardbatch.pipeline.batching import neighbours, tour
from hardbatch.pipeline.batching.tour import greedy_tour


def naive_tour(centroids, start):
    """Greedy in float64, the lowest id on a tie."""
    unit = centroids / np.linalg.norm(centroids.astype(np.float64), axis=1, keepdims=True)
    tour, left = [start], sorted(set(range(len(unit))) - {start})
    while left:
        tour.append(left.pop(int(np.argmax(unit[left] @ unit[tour[-1]]))))
    return tour


def random_centroids(num_centroids, dimension=12, seed=0):
    return np.random.default_rng(seed).standard_normal((num_centroids, dimension)).astype(np.float32)


def clustered_centroids(num_centroids, dimension=96, seed=0):
    """Centroids around centres that lie around fewer centres."""
    generator = np.random.default_rng(seed)
    centres = generator.standard_normal((num_centroids // 100, dimension))
    for num, spread in ((num_centroids // 10, 0.8), (num_centroids, 0.6)):
        centres = centres[generator.integers(len(centres), size=num)]
        centres = centres + spread * generator.standard_normal(centres.shape)
    return centres.astype(np.float32)


def measure(centroids, tour):
    """Length of the tour over unit centroids, and the mean cosine of its steps."""
    unit = centroids / np.linalg.norm(centroids, axis=1, keepdims=True)
    before, after = unit[tour[:-1]], unit[tour[1:]]
    return float(np.linalg.norm(after - before, axis=1).sum()), float((after * before).sum(1).mean())


def run(centroids, start, exact_below):
    """A tour that visits each centroid once and leaves them as they were."""
    before = centroids.copy()
    found = greedy_tour(centroids, start, exact_below=exact_below)
    assert found.dtype == np.int64 and found[0] == start
    assert sorted(found.tolist()) == list(range(len(centroids)))
    assert np.array_equal(centroids, before)
    return found


@pytest.mark.parametrize("num_centroids", [1, 2, 3, 40, 150])
def test_exact_tour_is_the_naive_greedy_one(num_centroids):
    centroids = random_centroids(num_centroids, seed=num_centroids)
    for start in {0, num_centroids // 2, num_centroids - 1}:
        assert run(centroids, start, 10_000).tolist() == naive_tour(centroids, start)


def test_length_of_a_centroid_does_not_matter():
    centroids = random_centroids(60)
    scaled = centroids * np.random.default_rng(1).uniform(0.1, 9.0, (60, 1)).astype(np.float32)
    assert np.array_equal(run(scaled, 5, 100), run(centroids, 5, 100))


def test_among_equal_centroids_the_lowest_id_comes_first():
    centroids = random_centroids(30)
    centroids[[7, 12, 25]] = centroids[4]
    assert run(centroids, 4, 100)[:4].tolist() == [4, 7, 12, 25]


@pytest.mark.parametrize(("num_centroids", "spread", "exact_below"), [(80, 3e-4, 100), (1_500, 1e-6, 1)])
def test_directions_that_are_nearly_the_same(num_centroids, spread, exact_below):
    near = np.ones((num_centroids, 16)) + spread * np.random.default_rng(2).standard_normal((num_centroids, 16))
    tours = [run(near.astype(np.float32), 0, exact_below) for _ in range(2)]
    assert np.array_equal(*tours)


def test_graph_tour_visits_each_once_and_is_as_good_as_exact():
    centroids = random_centroids(300)
    tours = run(centroids, 17, 1), run(centroids, 17, 1_000), np.random.default_rng(0).permutation(300)
    graph, exact, random = (measure(centroids, found)[1] for found in tours)
    assert graph >= 0.98 * exact and graph > 1.5 * random


@pytest.mark.parametrize("num_centroids", [1, 2, 10, 32, 33])
def test_graph_tour_of_fewer_centroids_than_neighbours(num_centroids):
    centroids = random_centroids(num_centroids)
    assert run(centroids, 0, 1).tolist() == naive_tour(centroids, 0)


@settings(max_examples=60, deadline=None)
@given(
    num_centroids=st.integers(1, 300),
    dimension=st.integers(1, 6),
    num_distinct=st.integers(1, 300),
    num_zeros=st.integers(0, 40),
    exact_below=st.sampled_from([1, 100, 1_000]),
    seed=st.integers(0, 2**31),
)
def test_every_centroid_once_and_equal_ones_in_a_row(
    num_centroids, dimension, num_distinct, num_zeros, exact_below, seed
):
    generator = np.random.default_rng(seed)
    distinct = generator.standard_normal((num_distinct, dimension)).astype(np.float32)
    place = generator.integers(num_distinct, size=num_centroids)
    centroids = distinct[place]
    centroids[:num_zeros] = 0
    place[:num_zeros] = num_distinct
    tour = run(centroids, int(generator.integers(num_centroids)), exact_below)
    if dimension > 1:  # in one dimension different centroids have the same direction
        assert np.count_nonzero(np.diff(place[tour])) == len(np.unique(place)) - 1


@pytest.mark.parametrize("exact_below", [10_000, 1], ids=["exact", "graph"])
@pytest.mark.parametrize("value", [0.0, 2.5])
def test_thousands_of_equal_centroids_take_no_time(exact_below, value):
    centroids = np.full((9_000, 64), value, dtype=np.float32)
    assert run(centroids, 5, exact_below).tolist() == [5, *(i for i in range(9_000) if i != 5)]


@pytest.mark.parametrize("exact_graph", [True, False], ids=["exact graph", "graph by cells"])
def test_graph_tour_is_at_most_2_percent_longer_on_clustered_centroids(exact_graph, monkeypatch):
    monkeypatch.setattr(neighbours, "_EXACT_UP_TO", 8_192 if exact_graph else 0)
    for seed in range(3):
        centroids = clustered_centroids(1_500, seed=seed)
        graph, exact = (measure(centroids, run(centroids, 17, exact_below)) for exact_below in (1, 10_000))
        assert graph[0] <= 1.02 * exact[0] and 1 - graph[1] <= 1.02 * (1 - exact[1])


def test_exhausted_neighbours_are_looked_for_near_by():
    centroids = clustered_centroids(3_000, seed=4)
    left = tour._Unvisited(centroids / np.linalg.norm(centroids, axis=1, keepdims=True))
    for gone in range(1, 2_999):
        left.remove(gone)
        found = left.near(0)
        assert left.marks[found].all()
        assert len(found) >= min(256, 2_999 - gone)
    assert sorted(found.tolist()) == [0, 2_999]


@pytest.mark.parametrize("exact_below", [10_000, 1], ids=["exact", "graph"])
def test_tour_does_not_depend_on_threads(exact_below, monkeypatch, same_each_way):
    for name, value in (("_EXACT_UP_TO", 0), ("_CELLS_PER_ROOT", 1), ("_NUM_PROBES", 8)):
        monkeypatch.setattr(neighbours, name, value)
    centroids = clustered_centroids(800, dimension=256, seed=5)
    same_each_way(lambda: (run(centroids, 3, exact_below),))


def test_many_clusters_need_no_optional_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    monkeypatch.setattr(neighbours, "_EXACT_UP_TO", 0)
    run(random_centroids(400), 0, 50)
