"""The greedy tour: every centroid once, and each next one the nearest that is left."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from pipeline.errors import HardbatchError
from pipeline.tour import greedy_tour


def naive_tour(centroids, start):
    """Greedy in float64, the lowest id on a tie."""
    unit = centroids.astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    tour, left = [start], sorted(set(range(len(unit))) - {start})
    while left:
        scores = [float(unit[c] @ unit[tour[-1]]) for c in left]
        tour.append(left.pop(int(np.argmax(scores))))
    return tour


def random_centroids(num_centroids, dimension=12, seed=0):
    return np.random.default_rng(seed).standard_normal((num_centroids, dimension)).astype(np.float32)


def mean_cosine(centroids, tour):
    unit = centroids / np.linalg.norm(centroids, axis=1, keepdims=True)
    return float((unit[tour[1:]] * unit[tour[:-1]]).sum(1).mean())


@pytest.mark.parametrize("num_centroids", [1, 2, 3, 40, 150])
def test_exact_tour_is_the_naive_greedy_one(num_centroids):
    centroids = random_centroids(num_centroids, seed=num_centroids)
    for start in {0, num_centroids // 2, num_centroids - 1}:
        assert greedy_tour(centroids, start, exact_below=10_000).tolist() == naive_tour(centroids, start)


def test_length_of_a_centroid_does_not_matter():
    centroids = random_centroids(60)
    scaled = centroids * np.random.default_rng(1).uniform(0.1, 9.0, (60, 1)).astype(np.float32)
    assert greedy_tour(scaled, 5, exact_below=100).tolist() == greedy_tour(centroids, 5, exact_below=100).tolist()


@pytest.mark.parametrize("exact_below", [1_000, 1], ids=["exact", "graph"])
def test_equal_and_zero_centroids_are_visited_once_each(exact_below):
    centroids = random_centroids(50)
    centroids[10:20] = centroids[3]
    centroids[40:43] = 0
    tour = greedy_tour(centroids, 3, exact_below=exact_below)
    assert sorted(tour.tolist()) == list(range(50))
    assert tour[0] == 3


def test_among_equal_centroids_the_lowest_id_comes_first():
    centroids = random_centroids(30)
    centroids[[7, 12, 25]] = centroids[4]
    assert greedy_tour(centroids, 4, exact_below=100)[:4].tolist() == [4, 7, 12, 25]


def test_exact_tour_holds_for_centroids_that_are_nearly_the_same():
    near = np.ones((80, 16)) + np.random.default_rng(2).standard_normal((80, 16)) * 3e-4
    centroids = near.astype(np.float32)
    tour = greedy_tour(centroids, 0, exact_below=100)
    assert sorted(tour.tolist()) == list(range(80))
    assert tour.tolist() == greedy_tour(centroids, 0, exact_below=100).tolist()


def test_graph_tour_visits_each_once_and_is_as_good_as_exact():
    centroids = random_centroids(300)
    graph = greedy_tour(centroids, 17, exact_below=1)
    exact = greedy_tour(centroids, 17, exact_below=1_000)
    assert sorted(graph.tolist()) == list(range(300))
    assert graph[0] == 17
    assert mean_cosine(centroids, graph) >= 0.98 * mean_cosine(centroids, exact)
    assert mean_cosine(centroids, graph) > 1.5 * mean_cosine(centroids, np.random.default_rng(0).permutation(300))


@pytest.mark.parametrize(
    "num_centroids",
    [
        1,
        *(pytest.param(num) for num in (2, 10, 32)),
        33,
    ],
)
def test_graph_tour_of_fewer_centroids_than_neighbours(num_centroids):
    centroids = random_centroids(num_centroids)
    tour = greedy_tour(centroids, 0, exact_below=1)
    assert sorted(tour.tolist()) == list(range(num_centroids))


@pytest.mark.parametrize("exact_below", [1_000, 1], ids=["exact", "graph"])
def test_centroids_are_left_as_they_were(exact_below):
    centroids = random_centroids(64)
    before = centroids.copy()
    greedy_tour(centroids, 0, exact_below=exact_below)
    assert np.array_equal(centroids, before)


def test_many_clusters_need_no_optional_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    centroids = random_centroids(60)
    try:
        tour = greedy_tour(centroids, 0, exact_below=50)
    except HardbatchError as error:
        assert "hardbatch[cpu]" in str(error)
    else:
        assert sorted(tour.tolist()) == list(range(60))
