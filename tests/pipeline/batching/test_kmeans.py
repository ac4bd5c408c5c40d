"""Folded K-Means: what Lloyd promises, what prices do to sizes, and its edges: duplicates, one dimension, k = 1, k = n.

Assignments alone are tested in test_nearest.py.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hardbatch.pipeline.batching import kmeans as module
from hardbatch.pipeline.batching import nearest
from hardbatch.pipeline.batching import points as points_module
from hardbatch.pipeline.batching.kmeans import Lloyd, apportion, kmeans
from hardbatch.pipeline.batching.points import InMemory, Subset, cluster_sums, means_of_labels


def folded_points(num_points, dimension=16, seed=0, num_topics=12, spread=4.0):
    """s = d + q of pairs about topics, of which some have many more pairs; `spread` is a pair's distance to its own."""
    generator = np.random.default_rng(seed)
    topics = generator.standard_normal((num_topics, dimension)) / dimension**0.5
    often = 1 / np.arange(1, num_topics + 1)
    topic = generator.choice(num_topics, num_points, p=often / often.sum())
    sides = topics[topic] + spread / dimension**0.5 * generator.standard_normal((2, num_points, dimension))
    sides /= np.linalg.norm(sides, axis=2, keepdims=True)
    return sides.astype(np.float16).astype(np.float32).sum(0)


def squared_distances(points, centroids):
    return ((points[:, None].astype(np.float64) - centroids[None].astype(np.float64)) ** 2).sum(2)


def run(points, num_clusters, iterations=30, tolerance=0.0, balance=0.0, seed=0):
    points = InMemory(np.ascontiguousarray(points, dtype=np.float32))
    return kmeans(points, num_clusters, iterations=iterations, tolerance=tolerance, balance=balance, seed=seed)


def assert_sound(clustering, points):
    """Labels are compact, no cluster is empty, centroids are means, the last objective is that of labels and means."""
    num_points, dimension = points.shape
    num_clusters = len(clustering.centroids)
    assert clustering.labels.shape == (num_points,) and clustering.labels.dtype == np.int32
    assert set(clustering.labels.tolist()) == set(range(num_clusters))
    assert clustering.centroids.shape == (num_clusters, dimension) and clustering.centroids.dtype == np.float32
    assert clustering.prices.shape == (num_clusters,) and np.isfinite(clustering.prices).all()
    assert len(clustering.levels) == len(clustering.objective)
    means = np.zeros((num_clusters, dimension))
    np.add.at(means, clustering.labels, points.astype(np.float64))
    means /= np.bincount(clustering.labels)[:, None]
    assert np.allclose(clustering.centroids, means, atol=1e-4)  # equal points, a partition of them summed in float32
    expected = ((points - means[clustering.labels]) ** 2).sum()
    whole = float((points.astype(np.float64) ** 2).sum())
    assert clustering.objective[-1] == pytest.approx(expected, rel=1e-5, abs=2e-5 * whole)


def assert_never_rises(clustering):
    """Nor over the sample, nor over all points."""
    assert clustering.levels == sorted(clustering.levels) and clustering.levels[-1] == 1
    for level in (0, 1):
        objective = [value for value, own in zip(clustering.objective, clustering.levels, strict=True) if own == level]
        assert (np.diff(objective) <= 1e-6 * max(1.0, *map(abs, objective), 1.0)).all()


def unevenness(labels, num_clusters):
    """Standard deviation of the sizes of clusters, relative to their mean."""
    sizes = np.bincount(labels, minlength=num_clusters)
    return sizes.std() / sizes.mean()


# Lloyd


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("num_clusters", [2, 13, 90])
def test_converged_labels_are_the_nearest_centroids(num_clusters, seed):
    points = folded_points(400, seed=seed)
    clustering = run(points, num_clusters, iterations=200, seed=seed)
    assert_sound(clustering, points)
    assert_never_rises(clustering)
    distances = squared_distances(points, clustering.centroids)
    assert (distances[np.arange(400), clustering.labels] <= distances.min(1) + 1e-5).all()
    assert len(clustering.objective) < 200


def test_every_iteration_has_its_objective():
    points = folded_points(300)
    for iterations in (1, 2, 3):
        clustering = run(points, 20, iterations=iterations)
        assert len(clustering.objective) == iterations
        assert_sound(clustering, points)
    assert (np.diff(run(points, 20, iterations=3).objective) < 0).all()


def test_it_finds_clusters_that_are_there():
    points = np.repeat(np.eye(6), 30, axis=0) + 0.01 * np.random.default_rng(0).standard_normal((180, 6))
    best = min((run(points, 6, seed=seed) for seed in range(12)), key=lambda found: found.objective[-1])
    assert all(len(set(best.labels[start : start + 30].tolist())) == 1 for start in range(0, 180, 30))


def test_tolerance_stops_it_early():
    points = folded_points(400)
    assert len(run(points, 20, tolerance=0.5).objective) < len(run(points, 20, tolerance=0.0).objective)


@pytest.mark.parametrize("balance", [0.0, 0.02])
@pytest.mark.parametrize(("iterations", "tolerance"), [(1, 0.0), (4, 0.0), (60, 0.0), (60, 0.1)])
def test_only_the_last_assignment_is_exact(monkeypatch, iterations, tolerance, balance):
    """Whether it ends by the number of iterations, the tolerance, or labels that stay as they are."""
    exact = []

    class Recorded(nearest.Nearest):
        def __call__(self, points_nD, **keywords):
            exact.append(keywords["exact"])
            return super().__call__(points_nD, **keywords)

    monkeypatch.setattr(module, "Nearest", Recorded)
    clustering = run(folded_points(300), 8, iterations=iterations, tolerance=tolerance, balance=balance)
    assert exact == [False] * (len(clustering.objective) - 1) + [True]


@pytest.mark.parametrize(("num_clusters", "part"), [(4, 1 / 4), (30, 960 / 2_000), (63, 1.0)])
def test_the_first_iterations_see_a_sample_and_the_last_four_all_points(num_clusters, part):
    points = folded_points(2_000)
    clustering = run(points, num_clusters, iterations=10)
    assert_sound(clustering, points)
    assert clustering.levels == ([0] * 6 if part < 1 else [1] * 6) + [1] * 4
    assert clustering.objective[5] == pytest.approx(part * clustering.objective[6], rel=0.1)
    assert run(points, num_clusters, iterations=4).levels == [1] * 4


def test_the_same_seed_gives_the_same_and_another_one_another():
    points = folded_points(300)
    assert np.array_equal(run(points, 15, seed=3).labels, run(points, 15, seed=3).labels)
    assert not np.array_equal(run(points, 15, seed=3).labels, run(points, 15, seed=4).labels)


def test_points_are_left_as_they_were():
    points = folded_points(300)
    before = points.copy()
    run(points, 15, balance=0.02)
    assert np.array_equal(points, before)


# balance


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("spread", "num_clusters"), [(4.0, 100), (2.0, 100), (2.0, 40)])
def test_balance_brings_sizes_nearer_to_each_other(spread, num_clusters, seed):
    points = folded_points(2_000, 32, seed=seed, num_topics=20, spread=spread)
    plain, balanced = (run(points, num_clusters, tolerance=1e-3, balance=balance, seed=seed) for balance in (0, 0.02))
    assert_sound(balanced, points)
    assert len(balanced.centroids) == num_clusters
    assert unevenness(balanced.labels, num_clusters) < 0.85 * unevenness(plain.labels, num_clusters)
    assert balanced.objective[-1] < 1.1 * plain.objective[-1]


def test_balance_leaves_tight_topics_no_more_uneven_than_without():
    """The pairs of a topic are nearer to each other than the step of a price, were it measured across topics."""
    ratios = []
    for seed in range(3):
        points = folded_points(2_000, 32, seed=seed, num_topics=20, spread=0.3)
        plain, balanced = (run(points, 40, tolerance=1e-3, balance=balance, seed=seed) for balance in (0.0, 0.02))
        assert_sound(balanced, points)
        ratios.append(unevenness(balanced.labels, 40) / unevenness(plain.labels, 40))
    assert np.mean(ratios) < 1.2


@pytest.mark.parametrize("balance", [0.02, 0.3, 1.0])
@pytest.mark.parametrize("num_clusters", [1, 2, 50, 299, 300])
def test_any_balance_gives_a_defined_result(num_clusters, balance):
    points = folded_points(300)
    assert_sound(run(points, num_clusters, balance=balance), points)


def test_the_scale_of_points_does_not_matter_to_balance():
    """A power of two, so that no rounding differs."""
    points = folded_points(600)
    labels = [run(scale * points, 20, balance=0.02).labels for scale in (0.5, 1.0)]
    assert np.array_equal(*labels)


@pytest.mark.parametrize("balance", [0.02, 0.1])
def test_prices_are_those_of_the_last_assignment(monkeypatch, balance):
    last = {}

    class Recorded(nearest.Nearest):
        def __init__(self, centroids_kD, prices_k, **keywords):
            last.update(centroids=centroids_kD.copy(), prices=prices_k.copy())
            super().__init__(centroids_kD, prices_k, **keywords)

    monkeypatch.setattr(module, "Nearest", Recorded)
    points = folded_points(500, spread=2.0)
    clustering = run(points, 10, balance=balance)
    assert np.array_equal(clustering.prices, last["prices"]) and clustering.prices.std() > 0
    assert np.array_equal(clustering.labels, nearest.Nearest(last["centroids"], clustering.prices)(points))
    assert not np.array_equal(clustering.labels, nearest.Nearest(last["centroids"])(points))


@pytest.mark.parametrize("balance", [0.0, 0.005, 0.02])
def test_points_along_a_line_are_cut_into_pieces_of_about_the_same_length(balance):
    line = np.linspace(-1, 1, 400, dtype=np.float32)[:, None]
    clustering = run(line, 40, iterations=10, balance=balance)
    assert_sound(clustering, line)
    assert (np.diff(clustering.labels) != 0).sum() == len(clustering.centroids) - 1
    assert len(clustering.centroids) == 40
    assert np.bincount(clustering.labels).max() <= 25


# edges


@pytest.mark.parametrize("balance", [0.0, 0.02])
def test_identical_points_are_one_cluster(balance):
    points = np.tile(folded_points(1), (64, 1))
    clustering = run(points, 8, balance=balance)
    assert_sound(clustering, points)
    assert len(clustering.centroids) == 1
    assert clustering.objective[-1] == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("balance", [0.0, 0.02])
def test_zero_points(balance):
    zeros = np.zeros((20, 4), dtype=np.float32)
    assert_sound(run(zeros, 3, balance=balance), zeros)
    mixed = folded_points(40)
    mixed[::2] = 0
    clustering = run(mixed, 10, balance=balance)
    assert_sound(clustering, mixed)
    assert len(set(clustering.labels[::2].tolist())) == 1


@pytest.mark.parametrize("balance", [0.0, 0.02])
def test_one_cluster_is_the_mean(balance):
    points = folded_points(77)
    clustering = run(points, 1, balance=balance)
    assert clustering.labels.tolist() == [0] * 77
    assert_sound(clustering, points)


@pytest.mark.parametrize("balance", [0.0, 0.02])
def test_as_many_clusters_as_points(balance):
    points = folded_points(50)
    clustering = run(points, 50, balance=balance)
    assert_sound(clustering, points)
    assert sorted(clustering.labels.tolist()) == list(range(50))


def test_one_point():
    assert run(folded_points(1), 1, balance=0.02).labels.tolist() == [0]


@pytest.mark.parametrize("balance", [0.0, 0.02])
@pytest.mark.parametrize("num_clusters", [5, 30, 100])
def test_duplicates_stay_together(num_clusters, balance):
    distinct = folded_points(30, num_topics=30)
    order = np.random.default_rng(0).permutation(600)
    points = np.repeat(distinct, 20, axis=0)[order]
    clustering = run(points, num_clusters, iterations=60, balance=balance)
    assert_sound(clustering, points)
    assert len(clustering.centroids) <= 30
    which = np.repeat(np.arange(30), 20)[order]
    assert all(len(set(clustering.labels[which == number].tolist())) == 1 for number in range(30))


@pytest.mark.parametrize("balance", [0.0, 0.02])
def test_one_point_that_comes_very_often(balance):
    often, others = folded_points(1, 8), folded_points(400, 8, seed=1)
    order = np.random.default_rng(0).permutation(50_400)
    points = np.concatenate([np.tile(often, (50_000, 1)), others])[order]
    clustering = run(points, 50, iterations=12, balance=balance)
    assert_sound(clustering, points)
    assert 2 <= len(clustering.centroids) <= 50
    assert len(set(clustering.labels[order < 50_000].tolist())) == 1


def test_many_duplicates_do_not_cost_clusters():
    points = np.concatenate([np.tile(folded_points(1), (900, 1)), folded_points(300, seed=1)])
    clustering = run(points, 60)
    assert_sound(clustering, points)
    assert len(clustering.centroids) >= 50


@pytest.mark.parametrize("seed", range(20))
def test_empty_clusters_are_filled_again(seed):
    points = 5 + np.random.default_rng(seed).standard_normal((200, 2))
    clustering = run(points, 60, iterations=100, seed=seed)
    assert_sound(clustering, points.astype(np.float32))
    assert len(clustering.centroids) == 60


@pytest.mark.parametrize("balance", [0.0, 0.02])
@pytest.mark.parametrize("spread", [0.3, 1.0, 4.0])
def test_there_are_as_many_clusters_as_asked_where_points_differ(spread, balance):
    points = folded_points(1_500, 32, num_topics=20, spread=spread)
    for num_clusters in (15, 60, 150):
        clustering = run(points, num_clusters, iterations=10, tolerance=1e-3, balance=balance)
        assert len(clustering.centroids) == num_clusters


@pytest.mark.parametrize("seed", range(20))
def test_skewed_points_leave_no_cluster_without_a_donor(seed):
    generator = np.random.default_rng(2_000 + seed)
    points = np.exp(3 * generator.standard_normal((90, 5))).astype(np.float32)
    found = run(points, 60, seed=seed)
    assert len(found.labels) == 90 and np.bincount(found.labels).min() > 0


@pytest.mark.parametrize("balance", [0.0, 0.02])
def test_one_dimension(balance):
    points = np.concatenate([np.full((10, 1), -1.0), np.full((10, 1), 2.0)]) + np.arange(20)[:, None] * 1e-3
    found = [run(points, 2, balance=balance, seed=seed) for seed in range(4)]
    best = min(found, key=lambda clustering: clustering.objective[-1])
    assert_sound(best, points.astype(np.float32))
    assert len(set(best.labels[:10].tolist())) == len(set(best.labels[10:].tolist())) == 1


@pytest.mark.parametrize("num_clusters", [-1, 0, 11])
def test_impossible_numbers_of_clusters_are_refused(num_clusters):
    with pytest.raises(ValueError, match=f"num_clusters is {num_clusters}, allowed is 1 to the number of points, 10"):
        run(folded_points(10), num_clusters)


def test_many_empty_clusters_are_all_given_a_member():
    points = InMemory(np.random.default_rng(0).standard_normal((100, 3)).astype(np.float32))
    labels = np.repeat([2, 3], [90, 10]).astype(np.int32)
    lloyd = Lloyd(np.zeros((4, 3), dtype=np.float32), 0.0, "cpu")
    lloyd.sizes = np.bincount(labels, minlength=4)
    lloyd.prices[2] = 0.25
    lloyd.reseed(points, labels, np.random.default_rng(0))
    members = points.take(np.arange(90))
    assert all((members == lloyd.centroids[empty]).all(1).any() for empty in (0, 1))
    assert lloyd.prices.tolist() == [0.25, 0.25, 0.25, 0.0]


# the same whatever the machine does at once


@pytest.fixture
def restored_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("spread", [4.0, 1e-3])
@pytest.mark.parametrize("balance", [0.0, 0.02])
def test_threads_and_block_size_change_nothing(monkeypatch, restored_threads, balance, spread):
    """Threads change nothing even where float32 cannot tell which centroid is the nearest."""
    points = folded_points(2_000, 48, num_topics=20, spread=spread)
    points[::7] = points[0]
    found = []
    blocks = ((1, 1), (1, 40 * 333)) if spread > 1 else ()  # rough products of other blocks round otherwise
    for threads, held in ((1, 2**24), (2, 2**24), *blocks):
        torch.set_num_threads(threads)
        monkeypatch.setattr(nearest, "_SCORES_HELD", held)
        monkeypatch.setattr(nearest, "_ROWS", 64)
        found.append(run(points, 40, iterations=6, balance=balance))
    for other in found[1:]:
        assert np.array_equal(other.labels, found[0].labels)
        assert np.array_equal(other.centroids, found[0].centroids)
        assert other.objective == found[0].objective


def test_held_points_give_what_streamed_ones_do(monkeypatch):
    points = folded_points(500)
    held = run(points, 12, balance=0.02)
    monkeypatch.setattr(points_module, "_VALUES_HELD", 0)
    streamed = run(points, 12, balance=0.02)
    assert np.array_equal(streamed.labels, held.labels) and np.array_equal(streamed.centroids, held.centroids)
    assert streamed.objective == held.objective


def test_partitions_add_up(monkeypatch):
    points = folded_points(500)
    whole = run(points, 12)
    monkeypatch.setattr(points_module, "_PARTITION_ROWS", 37)
    parts = run(points, 12)
    assert np.array_equal(parts.labels, whole.labels)
    assert np.allclose(parts.centroids, whole.centroids, atol=1e-6)


def test_many_points_are_read_a_partition_at_a_time(monkeypatch):
    sizes = []

    class Counted(InMemory):
        def take(self, rows):
            sizes.append(len(rows))
            return super().take(rows)

    monkeypatch.setattr(points_module, "_PARTITION_ROWS", 100)
    monkeypatch.setattr(points_module, "_VALUES_HELD", 1_000 * 16 - 1)
    kmeans(Counted(folded_points(1_000)), 20, iterations=3, tolerance=0.0, balance=0.02, seed=0)
    assert sum(sizes) >= 3 * 1_000 and max(sizes) <= 100


# parts


@pytest.mark.parametrize("num_duplicates", [0, 300, 900])
def test_seeds_are_distinct_points_and_as_many_as_asked(num_duplicates):
    points = np.concatenate([np.tile(folded_points(1), (num_duplicates, 1)), folded_points(300, seed=1)])
    seeds = module._distinct_points(InMemory(points), 60, np.random.default_rng(0))
    assert len(np.unique(seeds, axis=0)) == len(seeds) == 60
    assert {seed.tobytes() for seed in seeds} <= {point.tobytes() for point in points}


def test_rows_of_points_in_memory_and_of_a_subset():
    points = folded_points(30)
    in_memory, rows = InMemory(points), np.array([4, 9, 9, 2])
    assert np.array_equal(in_memory.take(rows), points[rows])
    assert np.array_equal(in_memory.take(np.arange(5, 9)), points[5:9])
    assert np.array_equal(in_memory.take(np.array([5, 7, 6, 8])), points[[5, 7, 6, 8]])  # as far apart as a range
    assert in_memory.take(np.array([], dtype=np.int64)).shape == (0, 16)
    subset = Subset(in_memory, rows)
    assert (len(subset), subset.dimension) == (4, 16)
    assert np.array_equal(subset.take(np.array([3, 0])), points[[2, 4]])


def test_sums_and_means_of_clusters(monkeypatch):
    points = folded_points(200)
    labels = np.random.default_rng(0).integers(0, 9, 200).astype(np.int32)
    expected = np.stack([points[labels == c].astype(np.float64).sum(0) for c in range(9)])
    assert np.allclose(cluster_sums(points, labels, 9), expected, atol=1e-4)
    assert np.array_equal(cluster_sums(points, labels, 11)[9:], np.zeros((2, 16)))
    monkeypatch.setattr(points_module, "_PARTITION_ROWS", 64)
    means = means_of_labels(InMemory(points), labels, 9)
    assert means.dtype == np.float32
    assert np.allclose(means, expected / np.bincount(labels)[:, None], atol=1e-6)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_apportioned_parts_are_proportional(data):
    sizes = np.array(data.draw(st.lists(st.integers(0, 60), min_size=1, max_size=12)), dtype=np.int64)
    least = data.draw(st.integers(0, 1))
    total = data.draw(st.integers(least * int((sizes > 0).sum()), int(sizes.sum())))
    before = sizes.copy()
    parts = apportion(sizes, total, least=least)
    assert parts.dtype == np.int64 and parts.sum() == total and np.array_equal(sizes, before)
    assert (parts <= sizes).all() and (parts >= least * (sizes > 0)).all()
    exact = sizes * total / max(1, sizes.sum())
    is_raised = (exact < least) & (sizes > 0)
    if not is_raised.any():
        assert (np.abs(parts - exact) < 1 + 1e-9).all()
    order = np.argsort(sizes, kind="stable")
    for smaller, larger in pairwise(order):
        assert parts[smaller] <= parts[larger] + (sizes[smaller] == sizes[larger])


def test_apportioning_to_what_is_known():
    assert apportion(np.array([50, 30, 20]), 10).tolist() == [5, 3, 2]
    assert apportion(np.array([97, 1, 1, 1, 0]), 5).tolist() == [2, 1, 1, 1, 0]
    assert apportion(np.array([97, 1, 1, 1, 0]), 5, least=0).tolist() == [5, 0, 0, 0, 0]
    assert apportion(np.array([3, 4]), 7).tolist() == [3, 4]
    assert apportion(np.array([0, 0]), 0).tolist() == [0, 0]
