"""Two-level K-Means: as many clusters as asked, nearly as good as one level, the same for any threads and blocks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hardbatch.pipeline.batching import nearest
from hardbatch.pipeline.batching import points as points_module
from hardbatch.pipeline.batching import two_level as module
from hardbatch.pipeline.batching.kmeans import kmeans
from hardbatch.pipeline.batching.points import InMemory
from hardbatch.pipeline.batching.two_level import two_level_kmeans


def folded_points(num_points, dimension=16, seed=0, num_topics=20, spread=4.0):
    """s = d + q of pairs about topics, of which some have many more pairs; `spread` is a pair's distance to its own."""
    generator = np.random.default_rng(seed)
    topics = generator.standard_normal((num_topics, dimension)) / dimension**0.5
    often = 1 / np.arange(1, num_topics + 1)
    topic = generator.choice(num_topics, num_points, p=often / often.sum())
    sides = topics[topic] + spread / dimension**0.5 * generator.standard_normal((2, num_points, dimension))
    sides /= np.linalg.norm(sides, axis=2, keepdims=True)
    return sides.astype(np.float16).astype(np.float32).sum(0)


def run(points, num_clusters, iterations=10, tolerance=1e-3, balance=0.02, seed=0):
    points = points if hasattr(points, "take") and not isinstance(points, np.ndarray) else InMemory(points)
    chosen = {"iterations": iterations, "tolerance": tolerance, "balance": balance, "seed": seed}
    return two_level_kmeans(points, num_clusters, **chosen)


def assert_sound(clustering, points):
    """Labels are compact, no cluster is empty, centroids are means, the last objective is that of labels and means."""
    num_clusters = len(clustering.centroids)
    assert clustering.labels.shape == (len(points),) and clustering.labels.dtype == np.int32
    assert set(clustering.labels.tolist()) == set(range(num_clusters))
    assert clustering.centroids.dtype == np.float32
    means = np.zeros(clustering.centroids.shape)
    np.add.at(means, clustering.labels, points.astype(np.float64))
    means /= np.bincount(clustering.labels)[:, None]
    assert np.allclose(clustering.centroids, means, atol=1e-4)  # equal points, a partition of them summed in float32
    expected = ((points - means[clustering.labels]) ** 2).sum()
    whole = float((points.astype(np.float64) ** 2).sum())
    assert clustering.objective[-1] == pytest.approx(expected, rel=1e-5, abs=2e-5 * whole)
    assert len(clustering.levels) == len(clustering.objective)


@pytest.mark.parametrize("balance", [0.0, 0.02])
@pytest.mark.parametrize("spread", [0.3, 1.0, 4.0])
@pytest.mark.parametrize(("num_points", "num_clusters"), [(2_000, 100), (2_000, 37), (600, 200)])
def test_there_are_as_many_clusters_as_asked_where_points_differ(num_points, num_clusters, spread, balance):
    points = folded_points(num_points, spread=spread)
    assert len(np.unique(points, axis=0)) > 0.9 * num_points
    clustering = run(points, num_clusters, balance=balance)
    assert_sound(clustering, points)
    assert len(clustering.centroids) == num_clusters


def test_the_last_assignment_empties_hardly_a_cluster():
    points = folded_points(4_000, 64, num_topics=30, spread=1.0)
    assert len(run(points, 100, balance=0.0).centroids) >= 99


def test_the_last_iterations_go_on_from_the_prices_of_the_cells_and_end_exactly(monkeypatch):
    exact, prices = [], []

    class Recorded(module.Lloyd):
        def iterate(self, points, groups, **keywords):
            exact.append(keywords["exact"])
            prices.append(self.prices.copy())
            return super().iterate(points, groups, **keywords)

    monkeypatch.setattr(module, "Lloyd", Recorded)
    clustering = run(folded_points(1_000), 49)
    assert exact == [False, False, False, True]
    assert prices[0].shape == (49,) and prices[0].std() > 0
    assert np.array_equal(prices[-1], clustering.prices)


def test_levels_tell_which_objective_is_whose():
    points = folded_points(1_000)
    clustering = run(points, 49)
    second = clustering.levels.index(2)
    assert clustering.levels == sorted(clustering.levels) and set(clustering.levels[:second]) <= {0, 1}
    assert 1 <= second <= 10
    spread = ((points - points.mean(0)) ** 2).sum()
    assert all(0 < value < spread for value in clustering.objective)
    assert clustering.objective[second] < clustering.objective[second - 1]  # 49 clusters fit closer than 7 cells


def test_plain_iterations_over_all_points_only_gain():
    clustering = run(folded_points(1_500), 80, balance=0.0)
    assert (np.diff(clustering.objective[clustering.levels.index(2) :]) <= 1e-6).all()


@pytest.mark.parametrize("seed", range(3))
def test_two_levels_are_nearly_as_good_as_one(seed):
    points = folded_points(2_000, num_topics=40, seed=seed)
    settings = {"iterations": 30, "tolerance": 0.0, "balance": 0.0, "seed": seed}
    one = kmeans(InMemory(points), 100, **settings)
    two = two_level_kmeans(InMemory(points), 100, **settings)
    assert two.objective[-1] < 1.03 * one.objective[-1]


def test_borders_of_cells_leave_no_trace():
    """Nearly all points have no centroid nearer than their own in any cell."""
    points = folded_points(2_000)
    clustering = run(points, 100, balance=0.0)
    distances = ((points[:, None] - clustering.centroids[None]) ** 2).sum(2)
    own = distances[np.arange(2_000), clustering.labels]
    assert (own <= distances.min(1) + 1e-5).mean() > 0.93


def test_balance_brings_sizes_nearer_to_each_other():
    points = folded_points(3_000)
    sizes = [np.bincount(run(points, 100, balance=balance).labels, minlength=100) for balance in (0.0, 0.02)]
    assert sizes[1].std() < 0.8 * sizes[0].std()


@pytest.mark.parametrize("balance", [0.0, 0.02])
@pytest.mark.parametrize("num_points", [1, 5, 16, 17])
def test_few_points(num_points, balance):
    points = folded_points(num_points)
    for num_clusters in {1, 2, num_points // 2, num_points} & set(range(1, num_points + 1)):
        clustering = run(points, num_clusters, balance=balance)
        assert_sound(clustering, points)
        assert len(clustering.centroids) == num_clusters


@pytest.mark.parametrize("balance", [0.0, 0.02])
def test_as_many_clusters_as_points(balance):
    points = folded_points(150)
    assert sorted(run(points, 150, balance=balance).labels.tolist()) == list(range(150))


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_identical_points_are_one_cluster(value):
    points = np.full((300, 3), value, dtype=np.float32)
    clustering = run(points, 20)
    assert clustering.labels.tolist() == [0] * 300
    assert np.allclose(clustering.centroids, value)


def test_fewer_distinct_points_than_clusters():
    points = np.repeat(folded_points(30), 20, axis=0)[np.random.default_rng(0).permutation(600)]
    clustering = run(points, 100)
    assert_sound(clustering, points)
    assert len(clustering.centroids) <= 30


@pytest.mark.parametrize("balance", [0.0, 0.02])
def test_one_point_that_comes_very_often(balance):
    order = np.random.default_rng(0).permutation(50_400)
    points = np.concatenate([np.tile(folded_points(1, 8), (50_000, 1)), folded_points(400, 8, seed=1)])[order]
    clustering = run(points, 300, iterations=5, balance=balance)
    assert_sound(clustering, points)
    assert 2 <= len(clustering.centroids) <= 300
    assert len(set(clustering.labels[order < 50_000].tolist())) == 1


@pytest.mark.parametrize("balance", [0.0, 0.02])
def test_one_dimension(balance):
    points = np.linspace(-1, 1, 400, dtype=np.float32)[:, None]
    clustering = run(points, 40, balance=balance)
    assert_sound(clustering, points)
    assert np.unique(clustering.labels).size == 40
    assert (np.diff(clustering.labels) != 0).sum() == 39  # each cluster is a piece of the line


@pytest.mark.parametrize("num_clusters", [-1, 0, 11])
def test_impossible_numbers_of_clusters_are_refused(num_clusters):
    with pytest.raises(ValueError, match=f"num_clusters is {num_clusters}, allowed is 1 to the number of points, 10"):
        run(folded_points(10), num_clusters)


def test_the_same_seed_gives_the_same_and_another_one_another():
    points = folded_points(800)
    first, again, other = (run(points, 50, seed=seed).labels for seed in (3, 3, 4))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.fixture
def restored_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("spread", [4.0, 1e-3])
@pytest.mark.parametrize("balance", [0.0, 0.02])
def test_threads_and_block_size_change_nothing(monkeypatch, restored_threads, balance, spread):
    """Threads change nothing even where float32 cannot tell which centroid is the nearest."""
    points = folded_points(3_000, 64, num_topics=30, spread=spread)
    found = []
    blocks = ((1, 1), (1, 10 * 333)) if spread > 1 else ()  # rough products of other blocks round otherwise
    for threads, held in ((1, 2**24), (2, 2**24), *blocks):
        torch.set_num_threads(threads)
        monkeypatch.setattr(nearest, "_SCORES_HELD", held)
        monkeypatch.setattr(nearest, "_ROWS", 64)
        found.append(run(points, 100, iterations=5, balance=balance))
    for other in found[1:]:
        assert np.array_equal(other.labels, found[0].labels)
        assert np.array_equal(other.centroids, found[0].centroids)
        assert other.objective == found[0].objective


def test_neither_points_nor_scores_are_held_at_once(monkeypatch):
    """At most a partition of points, or as many as a level has seeds; scores of a block for the clusters near it."""
    taken, scored, inner = [], [], torch.addmm

    class Counted(InMemory):
        def take(self, rows):
            taken.append(len(rows))
            return super().take(rows)

    def addmm(*arguments, **keywords):
        scores = inner(*arguments, **keywords)
        scored.append(scores.numel())
        return scores

    monkeypatch.setattr(points_module, "_PARTITION_ROWS", 100)
    monkeypatch.setattr(points_module, "_VALUES_HELD", 0)
    monkeypatch.setattr(nearest, "_SCORES_HELD", 6_400)
    monkeypatch.setattr(nearest, "_ROWS", 32)
    monkeypatch.setattr(nearest.torch, "addmm", addmm)
    clustering = run(Counted(folded_points(3_000)), 100, iterations=4)
    assert len(clustering.labels) == 3_000
    assert sum(taken) > 3 * 3_000 and max(taken) <= 100
    assert max(scored) <= 6_400
