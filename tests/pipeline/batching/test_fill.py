"""Filling batches from clusters in a row: every point once, and along the borders of clusters if possible."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hardbatch.pipeline.batching.fill import fill_batches


def topical(topic, dimension=16, spread=0.1, seed=0):
    """s = d + q of pairs about the topics (int, m)."""
    generator = np.random.default_rng(seed)
    topics = np.linalg.qr(generator.standard_normal((dimension, dimension)))[0]
    return (2 * topics[topic] + spread * generator.standard_normal((len(topic), dimension))).astype(np.float32)


def fill(points, row, lengths, batch_size):
    """Batches and the rest, as sets: every point once, every batch full, arguments left as they were."""
    row, lengths = np.asarray(row, dtype=np.int64), np.asarray(lengths, dtype=np.int64)
    before = points.copy(), row.copy(), lengths.copy()
    batches, rest = fill_batches(points, row, lengths, batch_size)
    assert batches.shape == (len(points) // batch_size, batch_size) and batches.dtype == np.int64
    assert rest.shape == (len(points) % batch_size,)
    assert sorted([*batches.ravel().tolist(), *rest.tolist()]) == list(range(len(points)))
    assert all(np.array_equal(*both) for both in zip((points, row, lengths), before, strict=True))
    return {frozenset(batch.tolist()) for batch in batches}, set(rest.tolist())


def topics_of(batches, topic):
    return [{int(topic[point]) for point in batch} for batch in batches]


@st.composite
def rows_of_clusters(draw):
    """Points, a row of clusters that leaves out fewer than B of them, and B."""
    num_points, batch_size = draw(st.integers(0, 90)), draw(st.integers(2, 20))
    num_outside = draw(st.integers(0, min(batch_size - 1, max(0, num_points - 1))))
    generator = np.random.default_rng(draw(st.integers(0, 2**20)))
    dimension = draw(st.integers(1, 4))
    points = generator.choice([-1.0, 0.0, 0.5, 1.0], (num_points, dimension)).astype(np.float32)
    if draw(st.booleans()):
        points += generator.standard_normal(points.shape).astype(np.float32)
    row = generator.permutation(num_points)[: num_points - num_outside]
    num_cuts = draw(st.integers(0, max(0, len(row) - 1)))
    cuts = np.sort(generator.permutation(np.arange(1, max(1, len(row))))[:num_cuts])
    lengths = np.diff(np.concatenate([[0], cuts, [len(row)]])) if len(row) else np.empty(0, dtype=np.int64)
    return points, row, lengths, batch_size


@settings(max_examples=300, deadline=None)
@given(rows_of_clusters())
def test_every_point_once_and_every_batch_full(given_):
    fill(*given_)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 8), st.integers(2, 12), st.integers(0, 11), st.integers(0, 2**20))
def test_clusters_of_the_size_of_a_batch_are_batches(num_clusters, batch_size, num_outside, seed):
    """Whatever the vectors, and though some points belong to no cluster."""
    generator = np.random.default_rng(seed)
    num_inside, num_outside = num_clusters * batch_size, min(num_outside, batch_size - 1)
    points = generator.standard_normal((num_inside + num_outside, 3)).astype(np.float32)
    order = generator.permutation(len(points))
    row, outside = order[:num_inside], order[num_inside:]
    batches, rest = fill(points, row, np.full(num_clusters, batch_size), batch_size)
    assert batches == {frozenset(part.tolist()) for part in row.reshape(-1, batch_size)}
    assert rest == set(outside.tolist())


def test_a_large_cluster_is_cut_where_its_row_says():
    points = topical(np.zeros(32, dtype=np.int64))
    row = np.random.default_rng(0).permutation(32)
    assert fill(points, row, [32], 8)[0] == {frozenset(part.tolist()) for part in row.reshape(4, 8)}


def test_a_cluster_larger_than_its_batches_gives_away_what_fits_it_least():
    """Ten of topic 0, two of which are half way to topic 1, and six of topic 1: two batches of eight."""
    points = topical(np.repeat([0, 1], [10, 6]), spread=0.01)
    points[[3, 7]] = (points[0] + points[15]) / 2
    batches, _ = fill(points, np.arange(16), [10, 6], 8)
    assert batches == {frozenset({0, 1, 2, 4, 5, 6, 8, 9}), frozenset({3, 7, *range(10, 16)})}


def test_points_of_no_cluster_go_where_they_fit():
    topic = np.repeat([0, 1, 2, 3], 8)[np.random.default_rng(1).permutation(32)]
    points = topical(topic)
    inside = np.concatenate([np.flatnonzero(topic == number)[:7] for number in range(4)])
    assert sorted(topics_of(fill(points, inside, np.full(4, 7), 8)[0], topic), key=min) == [{0}, {1}, {2}, {3}]


def test_of_too_many_points_those_that_fit_least_are_left():
    points = topical(np.array([0] * 8 + [1] * 8 + [5] * 3))
    assert fill(points, np.arange(16), [8, 8], 8)[1] == {16, 17, 18}
    points = topical(np.array([0] * 4 + [1] * 4 + [0, 0, 0, 5, 1, 1, 1, 1, 0]))
    batches, rest = fill(points, np.arange(8), [4, 4], 8)
    assert rest == {11}
    assert batches == {frozenset({0, 1, 2, 3, 8, 9, 10, 16}), frozenset({4, 5, 6, 7, 12, 13, 14, 15})}


@pytest.mark.parametrize("size", [1, 2, 4])
def test_clusters_much_smaller_than_a_batch_join_the_next_of_their_row(size):
    """Topics of 16 pairs in small clusters, one topic after the other: a batch of each."""
    topic = np.repeat(np.arange(6), 16)
    batches, _ = fill(topical(topic), np.arange(96), np.full(96 // size, size), 16)
    assert all(len(topics) == 1 for topics in topics_of(batches, topic))


def test_halves_of_a_batch_join_their_neighbours():
    """Clusters of half a batch, each like the next one: the two make a batch."""
    topic = np.repeat(np.arange(8), 8)
    centres = topical(np.arange(8), dimension=8, spread=0.0)
    centres[1::2] = 0.9 * centres[::2] + 0.43 * centres[1::2]
    points = (centres[topic] + 0.05 * np.random.default_rng(0).standard_normal((64, 8))).astype(np.float32)
    batches, _ = fill(points, np.arange(64), np.full(8, 8), 16)
    assert sorted(topics_of(batches, topic // 2), key=min) == [{0}, {1}, {2}, {3}]


def test_one_large_cluster_among_many_small_ones():
    generator = np.random.default_rng(0)
    lengths = np.array([1, 2, 1, 150, 3, 1, 1, 2, 1])
    row = generator.permutation(lengths.sum())
    points = generator.standard_normal((len(row), 5)).astype(np.float32)
    fill(points, row, lengths, 8)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_equal_points(value):
    points = np.full((50, 3), value, dtype=np.float32)
    for lengths in ([50], [1] * 50, [9, 1, 30, 10]):
        fill(points, np.arange(50), lengths, 8)


def test_fewer_points_than_a_batch():
    assert fill(topical(np.arange(5)), [3, 1, 0], [2, 1], 8) == (set(), {0, 1, 2, 3, 4})


@pytest.mark.parametrize(("mean_size", "least"), [(8, 0.97), (16, 0.97), (32, 1.02), (64, 1.01)])
def test_batches_are_as_good_as_cutting_the_row_and_better_for_large_clusters(mean_size, least):
    """Clusters of uneven sizes along a tour on which each is somewhat like the one before; batches of 32."""
    generator = np.random.default_rng(3)
    lengths = generator.poisson(mean_size, 100) + 1
    centres = generator.standard_normal((100, 48))
    for number in range(1, 100):
        centres[number] = 0.7 * centres[number - 1] + 0.7 * centres[number]
    points = np.repeat(centres, lengths, axis=0)
    points = (points + 0.7 * generator.standard_normal(points.shape)).astype(np.float32)

    def alike(batches):
        return np.mean([(points[batch].sum(0, dtype=np.float64) ** 2).sum() for batch in batches])

    batches, rest = fill_batches(points, np.arange(len(points)), lengths, 32)
    cut = np.arange(len(points) - len(rest)).reshape(-1, 32)
    assert alike(batches) > least * alike(cut)


@pytest.mark.parametrize("spread", [0.5, 1e-4])
def test_threads_change_nothing(same_each_way, spread):
    lengths = np.random.default_rng(0).integers(5, 100, 40)
    points = topical(np.repeat(np.arange(40) % 7, lengths), spread=spread)
    same_each_way(lambda: fill_batches(points, np.arange(len(points)), lengths, 32))
