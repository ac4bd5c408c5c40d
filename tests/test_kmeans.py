"""Folded K-Means: assignments against float64 brute force, and its edges: duplicates, one dimension, k = 1, k = n."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline import kmeans as module
from pipeline.kmeans import cluster_sums, kmeans, means_of_labels, nearest, two_level_kmeans


class InMemory:
    """Points that lie in an array."""

    def __init__(self, points):
        self.points = np.ascontiguousarray(points, dtype=np.float32)
        self.dimension = self.points.shape[1]

    def __len__(self):
        return len(self.points)

    def take(self, rows):
        return self.points[rows]


def folded_points(num_points, dimension=16, seed=0, num_topics=12):
    """s = d + q of pairs about some topics."""
    generator = np.random.default_rng(seed)
    topics = generator.standard_normal((num_topics, dimension))
    sides = []
    for _ in range(2):
        side = topics[np.arange(num_points) % num_topics] + generator.standard_normal((num_points, dimension))
        sides.append((side / np.linalg.norm(side, axis=1, keepdims=True)).astype(np.float16).astype(np.float32))
    return sides[0] + sides[1]


def squared_distances(points, centroids):
    return ((points[:, None].astype(np.float64) - centroids[None].astype(np.float64)) ** 2).sum(2)


def run(points, num_clusters, iterations=30, tolerance=0.0, seed=0):
    return kmeans(InMemory(points), num_clusters, iterations=iterations, tolerance=tolerance, seed=seed)


def assert_sound(clustering, num_points, dimension):
    """Labels are compact, no cluster is empty, the objective never rises."""
    num_clusters = len(clustering.centroids)
    assert clustering.labels.shape == (num_points,) and clustering.labels.dtype == np.int32
    assert set(clustering.labels.tolist()) == set(range(num_clusters))
    assert clustering.centroids.shape == (num_clusters, dimension) and clustering.centroids.dtype == np.float32
    assert np.isfinite(clustering.centroids).all()
    assert len(clustering.levels) == len(clustering.objective)
    steps = np.diff(clustering.objective)
    assert (steps <= 1e-6 * max(1.0, abs(clustering.objective[0]))).all()


@pytest.mark.parametrize("num_clusters", [1, 2, 17, 200])
def test_nearest_is_the_float64_brute_force(num_clusters):
    points = folded_points(700)
    centroids = points[np.random.default_rng(1).permutation(700)[:num_clusters]]
    distances = squared_distances(points, centroids)
    labels = nearest(points, centroids)
    assert labels.dtype == np.int32
    second = np.sort(distances, axis=1)[:, min(1, num_clusters - 1)]
    clear = (second - distances.min(1) > 1e-9) | (num_clusters == 1)
    assert clear.mean() > 0.9
    assert np.array_equal(labels[clear], distances.argmin(1)[clear])


def test_nearest_resolves_ties_that_float32_cannot_tell():
    generator = np.random.default_rng(2)
    centroid = generator.standard_normal(64)
    centroid /= np.linalg.norm(centroid)
    centroids = (centroid + 1e-6 * generator.standard_normal((30, 64))).astype(np.float32)
    points = (centroid + 0.3 * generator.standard_normal((100, 64))).astype(np.float32)
    scores = points.astype(np.float64) @ centroids.astype(np.float64).T - 0.5 * (centroids.astype(float) ** 2).sum(1)
    top = np.sort(scores, axis=1)
    clear = top[:, -1] - top[:, -2] > 1e-12
    assert clear.any()
    assert np.array_equal(nearest(points, centroids)[clear], scores.argmax(1)[clear])


def test_nearest_gives_ties_to_the_lowest_id():
    centroids = np.repeat(folded_points(3, seed=4), 5, axis=0)
    labels = nearest(folded_points(50, seed=5), centroids)
    assert set(labels.tolist()) <= {0, 5, 10}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("num_clusters", [2, 13, 90])
def test_converged_labels_are_the_nearest_centroids(num_clusters, seed):
    points = folded_points(400, seed=seed)
    clustering = run(points, num_clusters, iterations=200, seed=seed)
    assert_sound(clustering, 400, 16)
    distances = squared_distances(points, clustering.centroids)
    own = distances[np.arange(400), clustering.labels]
    assert (own <= distances.min(1) + 1e-5).all()
    assert clustering.objective[-1] == pytest.approx(own.sum(), rel=1e-5)
    assert len(clustering.objective) < 200


def test_objective_is_that_of_the_labels_and_their_means_at_every_iteration():
    points = folded_points(300)
    for iterations in (1, 2, 3):
        clustering = run(points, 20, iterations=iterations)
        means = np.stack([points[clustering.labels == c].astype(np.float64).mean(0) for c in range(20)])
        expected = ((points - means[clustering.labels]) ** 2).sum()
        assert len(clustering.objective) == iterations
        assert clustering.objective[-1] == pytest.approx(expected, rel=1e-9)
        assert np.allclose(clustering.centroids, means, atol=1e-6)


def test_it_finds_clusters_that_are_there():
    points = np.repeat(np.eye(6), 30, axis=0) + 0.01 * np.random.default_rng(0).standard_normal((180, 6))
    best = min((run(points, 6, seed=seed) for seed in range(12)), key=lambda found: found.objective[-1])
    assert all(len(set(best.labels[start : start + 30].tolist())) == 1 for start in range(0, 180, 30))


def test_tolerance_stops_it_early():
    points = folded_points(400)
    assert len(run(points, 20, tolerance=0.5).objective) < len(run(points, 20, tolerance=0.0).objective)


def test_identical_points_are_one_cluster():
    clustering = run(np.tile(folded_points(1), (64, 1)), 8)
    assert_sound(clustering, 64, 16)
    assert len(clustering.centroids) == 1
    assert clustering.objective[-1] == pytest.approx(0, abs=1e-6)


def test_zero_points():
    assert_sound(run(np.zeros((20, 4)), 3), 20, 4)
    mixed = folded_points(40)
    mixed[::2] = 0
    clustering = run(mixed, 10)
    assert_sound(clustering, 40, 16)
    assert len(set(clustering.labels[::2].tolist())) == 1


def test_one_cluster_is_the_mean():
    points = folded_points(77)
    clustering = run(points, 1)
    assert clustering.labels.tolist() == [0] * 77
    assert np.allclose(clustering.centroids[0], points.mean(0), atol=1e-6)


def test_as_many_clusters_as_points():
    points = folded_points(50)
    clustering = run(points, 50)
    assert_sound(clustering, 50, 16)
    assert sorted(clustering.labels.tolist()) == list(range(50))
    assert clustering.objective[-1] == pytest.approx(0, abs=1e-6)


def test_one_point():
    assert run(folded_points(1), 1).labels.tolist() == [0]


def test_duplicates_stay_together():
    distinct = folded_points(30, num_topics=30)
    points = np.repeat(distinct, 20, axis=0)[np.random.default_rng(0).permutation(600)]
    for num_clusters in (5, 30, 100):
        clustering = run(points, num_clusters, iterations=60)
        assert_sound(clustering, 600, 16)
        assert len(clustering.centroids) <= 30
        labels_of = {}
        for point, label in zip(points, clustering.labels, strict=True):
            labels_of.setdefault(point.tobytes(), set()).add(int(label))
        assert all(len(labels) == 1 for labels in labels_of.values())


def test_empty_clusters_are_filled_again():
    generator = np.random.default_rng(3)
    for seed in range(20):
        points = 5 + generator.standard_normal((200, 2))
        clustering = run(points, 60, iterations=100, seed=seed)
        assert_sound(clustering, 200, 2)
        assert len(clustering.centroids) == 60


def test_many_duplicates_do_not_cost_clusters():
    points = np.concatenate([np.tile(folded_points(1), (900, 1)), folded_points(300, seed=1)])
    clustering = run(points, 60)
    assert_sound(clustering, 1_200, 16)
    assert len(clustering.centroids) >= 50


def test_one_dimension():
    points = np.concatenate([np.full((10, 1), -1.0), np.full((10, 1), 2.0)]) + np.arange(20)[:, None] * 1e-3
    clustering = min((run(points, 2, seed=seed) for seed in range(4)), key=lambda found: found.objective[-1])
    assert_sound(clustering, 20, 1)
    assert len(set(clustering.labels[:10].tolist())) == len(set(clustering.labels[10:].tolist())) == 1


@pytest.mark.parametrize("num_clusters", [-1, 0, 11])
def test_impossible_numbers_of_clusters_are_refused(num_clusters):
    with pytest.raises(ValueError, match=f"num_clusters is {num_clusters}, allowed is 1 to the number of points, 10"):
        run(folded_points(10), num_clusters)


@pytest.fixture
def restored_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_threads_and_block_size_change_nothing(monkeypatch, restored_threads):
    points = folded_points(400, dimension=48)
    points[::7] = points[0]
    found = []
    for threads, held, rows in ((1, 2**24, 64), (2, 2**24, 64), (1, 1, 16), (2, 1, 17), (1, 40 * 333, 16)):
        torch.set_num_threads(threads)
        monkeypatch.setattr(module, "_SCORES_HELD", held)
        monkeypatch.setattr(module, "_MIN_BLOCK_ROWS", rows)
        found.append(run(points, 40, iterations=4))
    for other in found[1:]:
        assert np.array_equal(other.labels, found[0].labels)
        assert np.array_equal(other.centroids, found[0].centroids)
        assert other.objective == found[0].objective


def test_partitions_add_up(monkeypatch):
    points = folded_points(500)
    whole = run(points, 12)
    monkeypatch.setattr(module, "_PARTITION_ROWS", 37)
    parts = run(points, 12)
    assert np.array_equal(parts.labels, whole.labels)
    assert np.allclose(parts.centroids, whole.centroids, atol=1e-6)


def test_the_same_seed_gives_the_same_and_another_one_another():
    points = folded_points(300)
    assert np.array_equal(run(points, 15, seed=3).labels, run(points, 15, seed=3).labels)
    assert not np.array_equal(run(points, 15, seed=3).labels, run(points, 15, seed=4).labels)


def test_scores_are_held_for_a_block_only(monkeypatch):
    shapes, inner = [], torch.addmm

    def addmm(*arguments, **settings):
        result = inner(*arguments, **settings)
        shapes.append(tuple(result.shape))
        return result

    monkeypatch.setattr(module.torch, "addmm", addmm)
    monkeypatch.setattr(module, "_SCORES_HELD", 10_000)
    monkeypatch.setattr(module, "_PARTITION_ROWS", 1_000)
    run(folded_points(3_000), 50, iterations=2)
    assert shapes and all(columns == 50 for _, columns in shapes)
    assert max(rows * columns for rows, columns in shapes) <= 10_000
    assert sum(rows for rows, _ in shapes) == 2 * 3_000


def test_points_are_read_a_partition_at_a_time(monkeypatch):
    sizes = []

    class Counted(InMemory):
        def take(self, rows):
            sizes.append(len(rows))
            return super().take(rows)

    monkeypatch.setattr(module, "_PARTITION_ROWS", 100)
    kmeans(Counted(folded_points(1_000)), 20, iterations=3, tolerance=0.0, seed=0)
    assert max(sizes) <= 100


def test_two_levels_label_every_point_in_clusters_of_about_the_asked_size():
    points = folded_points(2_000, num_topics=40)
    clustering = two_level_kmeans(InMemory(points), 16, iterations=20, tolerance=1e-4, seed=0)
    assert set(clustering.labels.tolist()) == set(range(len(clustering.centroids)))
    sizes = np.bincount(clustering.labels)
    assert 125 <= len(sizes) <= 125 + 12  # one more at most for each of the √125 coarse clusters
    assert 0.8 * 16 <= sizes.mean() <= 16
    assert sizes.max() < 8 * 16
    for cluster in range(len(sizes)):
        mean = points[clustering.labels == cluster].astype(np.float64).mean(0)
        assert np.allclose(clustering.centroids[cluster], mean, atol=1e-5)
    assert clustering.levels == [1] * (len(clustering.levels) - 1) + [2]
    expected = ((points - clustering.centroids[clustering.labels]) ** 2).sum(dtype=np.float64)
    assert clustering.objective[-1] == pytest.approx(expected, rel=1e-5)


def test_two_levels_are_nearly_as_good_as_one():
    points = folded_points(1_500, num_topics=40)
    one = run(points, 94)
    two = two_level_kmeans(InMemory(points), 16, iterations=30, tolerance=0.0, seed=0)
    spread = ((points - points.mean(0)) ** 2).sum()
    assert two.objective[-1] < one.objective[-1] + 0.1 * spread


@pytest.mark.parametrize("num_points", [1, 5, 16, 17])
def test_two_levels_of_few_or_equal_points(num_points):
    for points in (folded_points(num_points), np.ones((num_points, 3))):
        clustering = two_level_kmeans(InMemory(points), 16, iterations=5, tolerance=0.0, seed=0)
        assert set(clustering.labels.tolist()) == set(range(len(clustering.centroids)))
        assert len(clustering.labels) == num_points


def test_sums_and_means_of_clusters(monkeypatch):
    points = folded_points(200)
    labels = np.random.default_rng(0).integers(0, 9, 200).astype(np.int32)
    expected = np.stack([points[labels == c].astype(np.float64).sum(0) for c in range(9)])
    assert np.allclose(cluster_sums(points, labels, 9), expected, atol=1e-12)
    assert np.array_equal(cluster_sums(points, labels, 11)[9:], np.zeros((2, 16)))
    monkeypatch.setattr(module, "_PARTITION_ROWS", 64)
    means = means_of_labels(InMemory(points), labels, 9)
    assert means.dtype == np.float32
    assert np.allclose(means, expected / np.bincount(labels)[:, None], atol=1e-6)


def test_many_empty_clusters_are_all_given_a_member():
    points = module.InMemory(np.random.default_rng(0).standard_normal((100, 3)).astype(np.float32))
    labels = np.repeat([2, 3], [90, 10]).astype(np.int32)
    centroids = np.zeros((4, 3), dtype=np.float32)
    module._reseed(points, centroids, labels, np.bincount(labels, minlength=4), np.random.default_rng(0))
    members = points.take(np.arange(90))
    assert all((members == centroids[empty]).all(1).any() for empty in (0, 1))


@pytest.mark.parametrize("seed", range(20))
def test_skewed_points_leave_no_cluster_without_a_donor(seed):
    generator = np.random.default_rng(2_000 + seed)
    points = np.exp(3 * generator.standard_normal((90, 5))).astype(np.float32)
    found = module.kmeans(module.InMemory(points), 60, iterations=30, tolerance=0.0, seed=seed)
    assert len(found.labels) == 90 and np.bincount(found.labels).min() > 0
