"""Assigning points to centroids: exact against float64 brute force, prices, ties, blocks and threads."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hardbatch.pipeline.batching import nearest as module
from hardbatch.pipeline.batching.nearest import Nearest, fast_products


def sums_of_units(num_points, dimension=16, seed=0):
    """Points like d + q: norms up to 2."""
    sides = np.random.default_rng(seed).standard_normal((2, num_points, dimension))
    sides /= np.linalg.norm(sides, axis=2, keepdims=True)
    return sides.sum(0).astype(np.float32)


def brute_scores(points, centroids, prices=None):
    points, centroids = points.astype(np.float64), centroids.astype(np.float64)
    scores = points @ centroids.T - 0.5 * (centroids**2).sum(1)
    return scores if prices is None else scores + prices.astype(np.float64)


def margins(scores):
    """By how much the best score beats the second; infinite for one centroid."""
    top = np.sort(np.pad(scores, ((0, 0), (1, 0)), constant_values=-np.inf), axis=1)
    return top[:, -1] - top[:, -2]


@pytest.mark.parametrize("with_prices", [False, True])
@pytest.mark.parametrize("dimension", [1, 16, 384])
@pytest.mark.parametrize("num_clusters", [1, 2, 17, 200])
def test_exact_labels_are_those_of_float64(num_clusters, dimension, with_prices):
    points, centroids = sums_of_units(700, dimension), sums_of_units(num_clusters, dimension, seed=1)
    prices = np.random.default_rng(2).uniform(-0.3, 0.3, num_clusters).astype(np.float32) if with_prices else None
    scores = brute_scores(points, centroids, prices)
    labels = Nearest(centroids, prices)(points)
    assert labels.dtype == np.int32
    clear = margins(scores) > 1e-9
    if dimension > 1:  # on a line, sums of two units are -2, 0 or 2
        assert clear.mean() > 0.99
    assert np.array_equal(labels[clear], scores.argmax(1)[clear])


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_ties_of_numbers_that_float32_holds_exactly_go_to_the_lowest_id(data):
    dimension, num_clusters = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 12))
    generator = np.random.default_rng(data.draw(st.integers(0, 2**20)))
    grid = np.array([-1, -0.5, 0, 0.5, 1], dtype=np.float32)
    points, centroids = (generator.choice(grid, (rows, dimension)) for rows in (90, num_clusters))
    prices = generator.choice(grid / 4, num_clusters)
    labels = Nearest(centroids, prices)(points)
    assert np.array_equal(labels, brute_scores(points, centroids, prices).argmax(1))


def test_points_that_float32_cannot_assign_are_assigned():
    generator = np.random.default_rng(2)
    centroid = generator.standard_normal(64)
    centroid /= np.linalg.norm(centroid)
    centroids = (centroid + 1e-6 * generator.standard_normal((30, 64))).astype(np.float32)
    points = (centroid + 0.1 * generator.standard_normal((100, 64))).astype(np.float32)
    scores = brute_scores(points, centroids)
    clear = margins(scores) > 1e-12
    assert clear.mean() > 0.9
    labels = Nearest(centroids)(points)
    assert np.array_equal(labels[clear], scores.argmax(1)[clear])
    in_float32 = (points @ centroids.T - 0.5 * (centroids**2).sum(1)).argmax(1)
    assert not np.array_equal(in_float32, labels)  # else this tests nothing


def test_equal_centroids_leave_all_points_to_the_first():
    centroids = np.repeat(sums_of_units(3, seed=4), 5, axis=0)
    points = sums_of_units(400, seed=5)
    for exact in (True, False):
        assert set(Nearest(centroids)(points, exact=exact).tolist()) == {0, 5, 10}


def test_prices_move_points_as_far_as_they_are_high():
    points, centroids = sums_of_units(500), sums_of_units(4, seed=1)
    plain = Nearest(centroids)(points)
    assert set(plain.tolist()) == {0, 1, 2, 3}
    assert np.array_equal(Nearest(centroids, np.full(4, 0.25, dtype=np.float32))(points), plain)
    assert (Nearest(centroids, np.array([0, 0, 9, 0], dtype=np.float32))(points) == 2).all()
    assert 2 not in Nearest(centroids, np.array([0, 0, -9, 0], dtype=np.float32))(points)
    scores = brute_scores(points, centroids)
    gap = scores.max(1) - scores[:, 1]
    for price in (0.1, 0.5):
        labels = Nearest(centroids, np.array([0, price, 0, 0], dtype=np.float32))(points)
        clear = np.abs(gap - price) > 1e-6
        assert np.array_equal((labels == 1)[clear], (gap < price)[clear])
        assert (labels == 1).sum() > (plain == 1).sum()


@pytest.mark.parametrize("num_clusters", [2, 40, 300])
def test_low_precision_labels_differ_from_exact_ones_only_near_ties(num_clusters):
    points, centroids = sums_of_units(3_000, 384), sums_of_units(num_clusters, 384, seed=1)
    prices = np.random.default_rng(2).uniform(-0.1, 0.1, num_clusters).astype(np.float32)
    arguments = points, centroids, prices
    before = [array.copy() for array in arguments]
    assign = Nearest(centroids, prices)
    exact, low = assign(points), assign(points, exact=False)
    assert all(np.array_equal(*both) for both in zip(arguments, before, strict=True))
    clear = margins(brute_scores(points, centroids, prices)) > 5e-3  # for products of bfloat16; others meet 1e-5
    assert low.dtype == np.int32 and clear.mean() > 0.5
    assert np.array_equal(low[clear], exact[clear])


def test_exact_labels_do_not_depend_on_blocks_or_threads(same_each_way):
    """Many near-ties: centroids and points in a few tight bunches."""
    generator = np.random.default_rng(0)
    bunches = sums_of_units(5, 48)
    points, centroids = (
        (bunches[generator.integers(0, 5, rows)] + 1e-5 * generator.standard_normal((rows, 48))).astype(np.float32)
        for rows in (1_500, 40)
    )
    blocks = ((1, 64), (1, 1), (1, 17), (40 * 333, 16))
    patches = [{"nearest._SCORES_HELD": held, "nearest._ROWS": rows} for held, rows in blocks]
    (labels,) = same_each_way(lambda: (Nearest(centroids)(points),), *patches)
    assert len(set(labels.tolist())) > 20


@pytest.mark.parametrize("dimension", [8, 768])
def test_low_precision_scores_err_by_no_more_than_is_assumed(dimension):
    """Even if every rounding has the same sign: all values are just above the middle of two bfloat16."""
    generator = np.random.default_rng(0)
    worst = np.full((512, dimension), 1 + 1.01 * 2**-8)
    for points in (generator.standard_normal((512, dimension)), worst):
        points = points.astype(np.float32)
        exact = points.astype(np.float64) @ points.T.astype(np.float64)
        with module.fast_products():
            low = (torch.from_numpy(points) @ torch.from_numpy(points).T).numpy()
        norms = np.linalg.norm(points, axis=1)
        assert (np.abs(low - exact) <= module._LOW_PRECISION_ERROR * norms[:, None] * norms).all()


def test_scores_are_held_for_a_block_only(monkeypatch):
    shapes, inner = [], torch.addmm

    def addmm(*arguments, **keywords):
        result = inner(*arguments, **keywords)
        shapes.append(tuple(result.shape))
        return result

    monkeypatch.setattr(module.torch, "addmm", addmm)
    monkeypatch.setattr(module, "_SCORES_HELD", 10_000)
    monkeypatch.setattr(module, "_ROWS", 64)
    for exact in (True, False):
        shapes.clear()
        Nearest(sums_of_units(50, seed=1))(sums_of_units(3_000), exact=exact)
        assert max(rows * columns for rows, columns in shapes) <= 10_000
        num_rows = sum(rows for rows, _ in shapes)
        padded = 3_008  # a multiple of 64
        assert padded < num_rows < 2 * padded if exact else num_rows == padded  # some are assigned in float32


def test_no_points():
    assert Nearest(sums_of_units(3))(np.empty((0, 16), dtype=np.float32)).shape == (0,)


def test_fast_products_end_with_what_was_set():
    before = torch.get_float32_matmul_precision()
    with pytest.raises(KeyError), fast_products():
        assert torch.get_float32_matmul_precision() == "medium"
        raise KeyError
    assert torch.get_float32_matmul_precision() == before
