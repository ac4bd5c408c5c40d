"""Composing batches: every group once and whole, no batch crowded, and K sets how hard a batch is."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hardbatch.pipeline.batching import compose as module
from hardbatch.pipeline.batching import pack as pack_module
from hardbatch.pipeline.batching.compose import compose
from hardbatch.pipeline.batching.kmeans import kmeans
from hardbatch.pipeline.batching.pack import PackSettings, pack
from hardbatch.pipeline.batching.points import InMemory
from tests.pipeline.batching.examples import topical_sides
from tests.pipeline.batching.test_spread import crowding_by_hand
from tests.samples import Sides


def packed(points, classes, group_size, batch_size=32, **changes):
    """A packing of clusters of the size of a group, in which every pair is once."""
    folded = InMemory(points.take(np.arange(len(points))))
    num_clusters = -(-len(points) // max(group_size, 8))
    found = kmeans(folded, num_clusters, iterations=5, tolerance=1e-3, balance=0.02, seed=0)
    chosen = PackSettings(batch_size=batch_size, group_size=group_size, **changes)
    packing = pack(points, found.labels, found.centroids, chosen, classes)
    assert packing.batches.shape == (len(points) // batch_size, batch_size)
    placed = np.concatenate([packing.batches.ravel(), packing.remainder])
    assert sorted(placed.tolist()) == list(range(len(points)))
    return packing.batches


def topical(num_pairs, num_topics=60, seed=0):
    topic = np.random.default_rng(seed).integers(0, num_topics, num_pairs)
    return Sides(*topical_sides(topic, 32, 1.0, seed)), topic


def hardness(points, batches):
    """The mean of c_ij over the slots i ≠ j of each batch."""
    documents, queries = points.sides(batches)
    similar = np.einsum("bid,bjd->bij", documents, queries)
    own = np.einsum("bii->b", similar)
    size = batches.shape[1]
    return ((similar.sum((1, 2)) - own) / (size * (size - 1))).mean()


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_groups_stay_whole_and_no_batch_is_crowded(data):
    """Also in blocks of a few batches. Groups are broken up only if no exchange of groups relieves a batch."""
    group_size, per_batch = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 6))
    num_groups, limit = data.draw(st.integers(0, 40)), data.draw(st.sampled_from([1, 50, 2**20]))
    generator = np.random.default_rng(data.draw(st.integers(0, 2**20)))
    num_pairs = num_groups * group_size + 3
    points = Sides(*generator.standard_normal((2, num_pairs, 4)).astype(np.float32))
    limits = [data.draw(st.integers(1, num_pairs)) for _ in (0, 1)]
    classes = np.stack([generator.integers(0, limit, num_pairs) for limit in limits], axis=1)
    groups = generator.permutation(num_pairs)[: num_groups * group_size].reshape(num_groups, group_size)
    before = groups.copy()

    chosen = {"batch_size": group_size * per_batch, "seed": data.draw(st.integers(0, 9))}
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(module, "_BLOCK_VALUES", limit * points.dimension)
        batches, left_again = compose(points, groups, classes, **chosen)
        monkeypatch.setattr(module, "spread", lambda points, batches, capped: batches)
        whole, left = compose(points, groups, classes, **chosen)
    known = {tuple(group) for group in groups.tolist()}
    assert {tuple(group) for group in whole.reshape(-1, group_size).tolist()} <= known

    assert np.array_equal(groups, before) and np.array_equal(left, left_again)
    assert batches.shape == (num_groups // per_batch, group_size * per_batch)
    assert sorted([*batches.ravel(), *left]) == sorted(groups.ravel())
    if limit == 2**20 and len(batches) > 0:
        placed, classes_of_placed = np.unique(batches, return_inverse=True)
        assert crowding_by_hand(classes[placed], classes_of_placed.reshape(batches.shape)) == 0


def test_exchanges_of_groups_relieve_batches_without_breaking_groups(monkeypatch):
    """Twins of a class in groups of two: a random draw has some together, and exchanges alone part them."""
    monkeypatch.setattr(module, "spread", None)
    points, _ = topical(400)
    every = np.arange(400)
    classes = np.stack([every, every // 20], axis=1)  # a batch of 16 may hold one of each 20
    groups = np.stack([every[:200], every[200:]], axis=1)
    batches, _ = compose(points, groups, classes, batch_size=16, seed=0)
    drawn, _ = compose(points, groups, None, batch_size=16, seed=0)
    assert crowding_by_hand(classes, drawn) > 20
    assert crowding_by_hand(classes, batches) == 0


def test_the_draw_differs_by_seed_and_not_from_run_to_run():
    points, _ = topical(640)
    groups = np.arange(640).reshape(160, 4)
    draws = [compose(points, groups, None, batch_size=16, seed=seed)[0] for seed in (0, 1, 0)]
    assert not np.array_equal(draws[0], draws[1]) and np.array_equal(draws[0], draws[2])
    mates = [{frozenset(batch) for batch in (draw // 4).tolist()} for draw in draws]
    assert len(mates[0] & mates[1]) == 0


def test_groups_of_the_size_of_a_batch_are_the_batches(monkeypatch):
    """They come in the order of the tour, near ones next to each other; nothing is drawn."""
    monkeypatch.setattr(pack_module, "compose", None)
    points, _ = topical(1_024)
    batches = packed(points, None, 32)
    following, shuffled = batches, np.random.default_rng(0).permutation(batches)
    assert hardness(points, following.reshape(-1, 64)) > hardness(points, shuffled.reshape(-1, 64)) + 0.01


def test_groups_of_one_pair_are_random_batches_and_need_no_clusters():
    points, _ = topical(4_000)
    labels, centroids = np.zeros(4_000, dtype=np.int32), np.zeros((1, 32), dtype=np.float32)
    packing = pack(points, labels, centroids, PackSettings(batch_size=32, group_size=1, seed=3))
    assert np.array_equal(packing.batches.ravel(), np.random.default_rng(3).permutation(4_000))
    expected = hardness(points, np.arange(4_000)[None])
    assert hardness(points, packing.batches) == pytest.approx(expected, abs=0.005)


def test_the_larger_the_groups_the_harder_the_batches():
    points, _ = topical(3_000)
    classes = np.stack([np.arange(3_000), np.arange(3_000) // 3], axis=1)
    found = {}
    for group_size in (1, 2, 4, 8, 16, 32):
        batches = packed(points, classes, group_size)
        assert crowding_by_hand(classes, batches) == 0
        found[group_size] = hardness(points, batches)
        if group_size > 1:
            within = hardness(points, batches.reshape(-1, group_size))
            assert within == found[32] if group_size == 32 else within > found[group_size] + 0.05
    assert sorted(found.values()) == list(found.values())


@pytest.mark.parametrize("group_size", [1, 4, 16])
def test_paraphrases_of_few_answers_are_spread_over_batches(group_size):
    """60 answers of 25 questions: a batch of 32 may hold two of an answer, whatever its groups are."""
    answer = np.repeat(np.arange(60), 25)
    points = Sides(*topical_sides(answer, 32, 0.3, 0))
    classes = np.stack([np.arange(1_500), answer], axis=1)
    assert crowding_by_hand(classes, packed(points, None, group_size)) > 0
    assert crowding_by_hand(classes, packed(points, classes, group_size)) == 0


def test_threads_change_nothing(same_each_way):
    points, topic = topical(1_500)
    classes = np.stack([np.arange(1_500) // 3, topic], axis=1)
    same_each_way(lambda: [packed(points, classes, 8, refine_rounds=3)])
