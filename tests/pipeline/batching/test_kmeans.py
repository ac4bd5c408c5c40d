"""K-Means, in one level and in two: what Lloyd promises, what prices do to sizes, and the edges.

Assignments alone are tested in test_nearest.py, kills in artifacts/test_snapshots.py.
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
from hardbatch.pipeline.batching.nearest import Nearest
from hardbatch.pipeline.batching.points import InMemory
from hardbatch.pipeline.batching.two_level import two_level_kmeans
from tests.pipeline.batching.examples import assert_sound, folded_points

either_method = pytest.mark.parametrize("find", [kmeans, two_level_kmeans])
either_balance = pytest.mark.parametrize("balance", [0.0, 0.02])


def run(points, num_clusters, find=kmeans, **changes):
    """A sound clustering of `points`, which are left as they were."""
    points = np.ascontiguousarray(points, dtype=np.float32)
    before = points.copy()
    chosen = {"iterations": 30, "tolerance": 0.0, "balance": 0.0, "seed": 0} | changes
    clustering = find(InMemory(points), num_clusters, **chosen)
    assert_sound(clustering, points)
    assert np.array_equal(points, before)
    return clustering


def sizes_of(clustering):
    return np.bincount(clustering.labels)


# what Lloyd's algorithm promises


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("num_clusters", [2, 13, 90])
def test_converged_labels_are_the_nearest_centroids(num_clusters, seed):
    points = folded_points(400, seed=seed)
    clustering = run(points, num_clusters, iterations=200, seed=seed)
    distances = ((points[:, None].astype(np.float64) - clustering.centroids[None]) ** 2).sum(2)
    assert (distances[np.arange(400), clustering.labels] <= distances.min(1) + 1e-5).all()
    assert len(clustering.objective) < 200


@either_method
def test_the_objective_never_rises_within_a_level(find):
    clustering = run(folded_points(1_500), 30, find, iterations=20)
    assert set(clustering.levels) == ({0, 1} if find is kmeans else {0, 1, 2})
    for level in set(clustering.levels):
        own = [value for value, of in zip(clustering.objective, clustering.levels, strict=True) if of == level]
        assert (np.diff(own) <= 1e-6 * own[0]).all()


@pytest.mark.parametrize(("num_clusters", "part"), [(4, 1 / 4), (30, 960 / 2_000), (63, 1.0)])
def test_the_first_iterations_see_a_sample_and_the_last_four_all_points(num_clusters, part):
    points = folded_points(2_000)
    clustering = run(points, num_clusters, iterations=10)
    assert clustering.levels == ([0] * 6 if part < 1 else [1] * 6) + [1] * 4
    assert clustering.objective[5] == pytest.approx(part * clustering.objective[6], rel=0.1)
    for iterations in range(1, 5):
        assert run(points, num_clusters, iterations=iterations).levels == [1] * iterations


@either_balance
@pytest.mark.parametrize("centres", [np.eye(6), np.array([[-1.0], [2.0]])], ids=["six", "two on a line"])
def test_it_finds_clusters_that_are_there(centres, balance):
    generator = np.random.default_rng(0)
    points = np.repeat(centres, 30, axis=0) + 0.01 * generator.standard_normal((30 * len(centres), centres.shape[1]))
    found = [run(points, len(centres), balance=balance, seed=seed) for seed in range(12)]
    best = min(found, key=lambda clustering: clustering.objective[-1])
    assert all(len(set(labels)) == 1 for labels in best.labels.reshape(-1, 30).tolist())


def test_tolerance_stops_it_early():
    points = folded_points(400)
    assert len(run(points, 20, tolerance=0.5).objective) < len(run(points, 20).objective)


@either_method
@pytest.mark.parametrize("balance", [0.02, 0.1])
@pytest.mark.parametrize(("iterations", "tolerance"), [(6, 0.0), (60, 0.1)])
def test_the_last_assignment_is_exact_and_by_the_prices_of_the_result(find, balance, iterations, tolerance):
    """Points are too alike for float32. Two levels have 7 cells here, so that a point chooses among all clusters."""
    points = folded_points(1_000, spread=1e-3)
    states = []

    def on_iteration(state):
        states.append({name: array.copy() for name, array in state().items()})

    chosen = {"iterations": iterations, "tolerance": tolerance, "balance": balance}
    clustering = run(points, 49, find, on_iteration=on_iteration, **chosen)
    centroids, prices = states[-1]["centroids"], states[-1]["prices"]
    labels = Nearest(centroids, prices)(points)
    used, expected = np.unique(labels, return_inverse=True)
    assert np.array_equal(clustering.labels, expected) and np.array_equal(clustering.prices, prices[used])
    assert prices.std() > 0 and not np.array_equal(labels, Nearest(centroids)(points))
    in_float32 = (points @ centroids.T + prices - 0.5 * (centroids**2).sum(1)).argmax(1)
    assert not np.array_equal(labels, in_float32)  # else this tests nothing


@either_method
def test_the_same_seed_gives_the_same_and_another_one_another(find):
    first, again, other = (run(folded_points(800), 50, find, seed=seed).labels for seed in (3, 3, 4))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


# two levels


@pytest.mark.parametrize("seed", range(3))
def test_two_levels_are_nearly_as_good_as_one(seed):
    points = folded_points(2_000, num_topics=40, seed=seed)
    one, two = (run(points, 100, find, seed=seed) for find in (kmeans, two_level_kmeans))
    assert two.objective[-1] < 1.03 * one.objective[-1]


def test_borders_of_cells_leave_no_trace():
    """Nearly all points have no centroid nearer than their own in any cell."""
    points = folded_points(2_000, num_topics=20)
    clustering = run(points, 100, two_level_kmeans, iterations=10)
    distances = ((points[:, None] - clustering.centroids[None]) ** 2).sum(2)
    own = distances[np.arange(2_000), clustering.labels]
    assert (own <= distances.min(1) + 1e-5).mean() > 0.93


def test_the_second_level_fits_closer_than_its_cells():
    points = folded_points(1_000)
    clustering = run(points, 49, two_level_kmeans, iterations=10, balance=0.02)
    second = clustering.levels.index(2)
    assert 1 <= second <= 10 and clustering.levels[second:] == [2] * 5
    spread = ((points - points.mean(0)) ** 2).sum()
    assert spread > clustering.objective[0] and clustering.objective[second - 1] > clustering.objective[second] > 0


# balance


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("find", "spread", "num_clusters"),
    [(kmeans, 4.0, 100), (kmeans, 2.0, 100), (kmeans, 2.0, 40), (two_level_kmeans, 4.0, 100)],
)
def test_balance_brings_sizes_nearer_to_each_other(find, spread, num_clusters, seed):
    points = folded_points(2_000, 32, seed=seed, num_topics=20, spread=spread)
    chosen = {"find": find, "tolerance": 1e-3, "seed": seed}
    plain, balanced = (run(points, num_clusters, balance=balance, **chosen) for balance in (0.0, 0.02))
    assert len(balanced.centroids) == num_clusters
    assert sizes_of(balanced).std() < 0.85 * sizes_of(plain).std()
    assert balanced.objective[-1] < 1.1 * plain.objective[-1]


def test_balance_leaves_tight_topics_no_more_uneven_than_without():
    """The pairs of a topic are nearer to each other than the step of a price, were it measured across topics."""
    ratios = []
    for seed in range(3):
        points = folded_points(2_000, 32, seed=seed, num_topics=20, spread=0.3)
        plain, balanced = (run(points, 40, tolerance=1e-3, balance=balance, seed=seed) for balance in (0.0, 0.02))
        ratios.append(sizes_of(balanced).std() / sizes_of(plain).std())
    assert np.mean(ratios) < 1.2


@pytest.mark.parametrize("balance", [0.02, 0.3, 1.0])
@pytest.mark.parametrize("num_clusters", [1, 2, 50, 299, 300])
def test_any_balance_gives_a_sound_result(num_clusters, balance):
    run(folded_points(300), num_clusters, balance=balance)


def test_the_scale_of_points_does_not_matter_to_balance():
    """By a power of two, so that no rounding differs."""
    points = folded_points(600)
    assert np.array_equal(*(run(scale * points, 20, balance=0.02).labels for scale in (0.5, 1.0)))


# edges


@either_method
@either_balance
@pytest.mark.parametrize("spread", [0.3, 1.0, 4.0])
@pytest.mark.parametrize(("num_points", "num_clusters"), [(2_000, 15), (2_000, 37), (2_000, 150), (600, 200)])
def test_there_are_as_many_clusters_as_asked_if_points_differ(num_points, num_clusters, spread, balance, find):
    points = folded_points(num_points, num_topics=20, spread=spread)
    clustering = run(points, num_clusters, find, iterations=10, tolerance=1e-3, balance=balance)
    assert len(clustering.centroids) == num_clusters


def test_the_last_assignment_empties_hardly_a_cluster():
    points = folded_points(4_000, 64, num_topics=30, spread=1.0)
    assert len(run(points, 100, two_level_kmeans, iterations=10).centroids) >= 99


@either_method
@either_balance
@pytest.mark.parametrize("num_points", [1, 5, 16, 17, 150])
def test_few_points(num_points, balance, find):
    for num_clusters in {1, 2, num_points // 2, num_points} & set(range(1, num_points + 1)):
        clustering = run(folded_points(num_points), num_clusters, find, balance=balance)
        assert len(clustering.centroids) == num_clusters


@either_method
@either_balance
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_identical_points_are_one_cluster(value, balance, find):
    clustering = run(np.full((300, 3), value), 20, find, balance=balance)
    assert len(clustering.centroids) == 1 and np.allclose(clustering.centroids, value)
    assert clustering.objective[-1] == pytest.approx(0, abs=1e-4)


@either_method
@either_balance
@pytest.mark.parametrize("num_clusters", [5, 30, 100])
def test_duplicates_stay_together(num_clusters, balance, find):
    which = np.repeat(np.arange(30), 20)[np.random.default_rng(0).permutation(600)]
    distinct = folded_points(30, num_topics=30)
    distinct[0] = 0
    clustering = run(distinct[which], num_clusters, find, iterations=60, balance=balance)
    assert len(clustering.centroids) <= 30
    assert all(len(set(clustering.labels[which == number].tolist())) == 1 for number in range(30))


@either_method
@either_balance
def test_one_point_that_comes_very_often(balance, find):
    order = np.random.default_rng(0).permutation(50_400)
    points = np.concatenate([np.tile(folded_points(1, 8), (50_000, 1)), folded_points(400, 8, seed=1)])[order]
    clustering = run(points, 50 if find is kmeans else 300, find, iterations=6, balance=balance)
    assert len(clustering.centroids) >= 2
    assert len(set(clustering.labels[order < 50_000].tolist())) == 1


def test_many_duplicates_do_not_cost_clusters():
    points = np.concatenate([np.tile(folded_points(1), (900, 1)), folded_points(300, seed=1)])
    assert len(run(points, 60).centroids) >= 50


@pytest.mark.parametrize("seed", range(20))
def test_empty_clusters_are_filled_again(seed):
    generator = np.random.default_rng(seed)
    assert len(run(5 + generator.standard_normal((200, 2)), 60, iterations=100, seed=seed).centroids) == 60
    run(np.exp(3 * generator.standard_normal((90, 5))), 60, seed=seed)  # skewed: the largest cluster gives many


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


@either_method
@pytest.mark.parametrize("balance", [0.0, 0.005, 0.02])
def test_points_along_a_line_are_cut_into_pieces_of_about_the_same_length(balance, find):
    clustering = run(np.linspace(-1, 1, 400)[:, None], 40, find, iterations=10, balance=balance)
    assert len(clustering.centroids) == 40
    assert (np.diff(clustering.labels) != 0).sum() == 39  # each cluster is a piece
    assert sizes_of(clustering).max() <= 25


@either_method
@pytest.mark.parametrize("num_clusters", [-1, 0, 11])
def test_impossible_numbers_of_clusters_are_refused(num_clusters, find):
    with pytest.raises(ValueError, match=f"num_clusters is {num_clusters}, allowed is 1 to the number of points, 10"):
        run(folded_points(10), num_clusters, find)


# the same however points are read


@either_method
@either_balance
@pytest.mark.parametrize("spread", [4.0, 1e-3])
def test_threads_and_block_size_change_nothing(same_each_way, balance, spread, find):
    """Threads change nothing even if float32 cannot tell which centroid is the nearest."""
    points = folded_points(2_000, 48, num_topics=20, spread=spread)
    points[::7] = points[0]

    def clusters():
        found = run(points, 100, find, iterations=6, balance=balance)
        return found.labels, found.centroids, found.objective

    blocks = [{"nearest._SCORES_HELD": held, "nearest._ROWS": 64} for held in (1, 40 * 333)]
    same_each_way(clusters, {"points._VALUES_HELD": 0}, *(blocks if spread > 1 else ()))


def test_partitions_add_up(monkeypatch):
    points = folded_points(500)
    whole = run(points, 12)
    monkeypatch.setattr(points_module, "_PARTITION_ROWS", 37)
    parts = run(points, 12)
    assert np.array_equal(parts.labels, whole.labels) and np.allclose(parts.centroids, whole.centroids, atol=1e-6)


@either_method
def test_neither_points_nor_scores_are_held_at_once(monkeypatch, find):
    """At most a partition of points, or as many as there are seeds; scores of a block of points."""
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
    find(Counted(folded_points(3_000)), 100, iterations=4, tolerance=0.0, balance=0.02, seed=0)
    assert sum(taken) >= 3 * 3_000 and max(taken) <= 100
    assert max(scored) <= 6_400


# parts


@pytest.mark.parametrize("num_duplicates", [0, 300, 900])
def test_seeds_are_distinct_points_and_as_many_as_asked(num_duplicates):
    points = np.concatenate([np.tile(folded_points(1), (num_duplicates, 1)), folded_points(300, seed=1)])
    seeds = module._distinct_points(InMemory(points), 60, np.random.default_rng(0))
    assert len(np.unique(seeds, axis=0)) == len(seeds) == 60
    assert {seed.tobytes() for seed in seeds} <= {point.tobytes() for point in points}


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
    if not ((exact < least) & (sizes > 0)).any():
        assert (np.abs(parts - exact) < 1 + 1e-9).all()
    for smaller, larger in pairwise(np.argsort(sizes, kind="stable")):
        assert parts[smaller] <= parts[larger] + (sizes[smaller] == sizes[larger])


@pytest.mark.parametrize(
    ("sizes", "total", "least", "parts"),
    [
        ([50, 30, 20], 10, 1, [5, 3, 2]),
        ([97, 1, 1, 1, 0], 5, 1, [2, 1, 1, 1, 0]),
        ([97, 1, 1, 1, 0], 5, 0, [5, 0, 0, 0, 0]),
        ([3, 4], 7, 1, [3, 4]),
        ([0, 0], 0, 1, [0, 0]),
    ],
)
def test_apportioning_to_what_is_known(sizes, total, least, parts):
    assert apportion(np.array(sizes), total, least=least).tolist() == parts
