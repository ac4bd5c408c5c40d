"""Trading pairs: Eq. 2 by brute force never falls, no pair is lost, obvious trades are made."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hardbatch.pipeline.batching import refine as module
from hardbatch.pipeline.batching.hardness import measure_bounds
from hardbatch.pipeline.batching.refine import refine
from hardbatch.pipeline.batching.spread import CappedClasses, always_allowed, spread
from tests.pipeline.batching.examples import equation_2, topical_sides
from tests.samples import Sides


def topical(topic, dimension=24, spread=2.0):
    """d⊕q of pairs about the topics (int, m)."""
    return np.concatenate(list(topical_sides(topic, dimension, spread)), axis=1)


def worth(vectors, batches):
    return equation_2(*np.split(vectors, 2, axis=1), batches)


def run(vectors, batches, rounds=30, tolerance=0.0, capped=None):
    """Refined batches: the same pairs in batches of the same size, of which Eq. 2 is the objective and never falls."""
    before, slots = batches.copy(), torch.from_numpy(vectors[batches.ravel()])
    of_slots = None if capped is None else capped.at(batches)
    refined = refine(slots, batches, rounds=rounds, tolerance=tolerance, capped=of_slots)
    assert np.array_equal(batches, before) and np.array_equal(slots.numpy(), vectors[refined.batches.ravel()])
    assert refined.batches.shape == batches.shape and refined.batches.dtype == np.int64
    assert sorted(refined.batches.ravel().tolist()) == sorted(batches.ravel().tolist())
    assert len(refined.objective) <= rounds + 1
    room = 1e-5 * max(1.0, float(np.abs(vectors).max()) ** 2) * batches.size
    assert refined.objective[0] == pytest.approx(worth(vectors, batches), abs=room)
    assert refined.objective[-1] == pytest.approx(worth(vectors, refined.batches), abs=room)
    assert (np.diff(refined.objective) >= 0).all()
    assert worth(vectors, refined.batches) >= worth(vectors, batches) - 1e-9
    return refined


def random_batches(num_pairs, batch_size, seed=0):
    row = np.random.default_rng(seed).permutation(num_pairs)
    return row[: num_pairs // batch_size * batch_size].reshape(-1, batch_size)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_equation_2_never_falls(data):
    num_batches, batch_size = data.draw(st.integers(1, 7)), data.draw(st.integers(2, 12))
    dimension, kind = data.draw(st.integers(1, 4)), data.draw(st.sampled_from(["grid", "normal", "equal", "repeated"]))
    generator = np.random.default_rng(data.draw(st.integers(0, 2**20)))
    num_pairs = num_batches * batch_size + data.draw(st.integers(0, 9))  # some are in no batch
    vectors = {
        "grid": lambda: generator.choice([-1.0, 0.0, 0.5, 1.0], (num_pairs, 2 * dimension)),
        "normal": lambda: generator.standard_normal((num_pairs, 2 * dimension)),
        "equal": lambda: np.ones((num_pairs, 2 * dimension)),
        "repeated": lambda: generator.standard_normal((3, 2 * dimension))[generator.integers(0, 3, num_pairs)],
    }[kind]().astype(np.float32)
    batches = generator.permutation(num_pairs)[: num_batches * batch_size].reshape(num_batches, batch_size)
    refined = run(vectors, batches, data.draw(st.integers(0, 6)))
    if kind == "equal":
        assert len(set(refined.objective)) == 1


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_no_batch_becomes_crowded(data):
    num_batches, batch_size = data.draw(st.integers(2, 7)), data.draw(st.integers(2, 40))
    generator = np.random.default_rng(data.draw(st.integers(0, 2**20)))
    num_pairs = num_batches * batch_size
    limits = [data.draw(st.integers(1, num_pairs)) for _ in (0, 1)]
    classes = np.stack([generator.integers(0, limit, num_pairs) for limit in limits], axis=1)
    vectors = topical(classes[:, 0], dimension=4)  # pairs of a class want to be together
    capped = CappedClasses.of(classes, num_batches, always_allowed(batch_size))
    batches = generator.permutation(num_pairs).reshape(num_batches, batch_size)
    if capped is not None:
        batches = spread(vectors, batches, capped)
    refined = run(vectors, batches, data.draw(st.integers(1, 4)), capped=capped)
    assert capped is None or capped.at(refined.batches).num_crowding() == 0


def test_a_pair_stays_away_from_a_batch_that_holds_its_class():
    """Two topics with a pair each in the wrong batch; one shares its document with a pair of the right one."""
    batches = np.arange(16).reshape(2, 8)
    vectors = topical(np.repeat([0, 1, 0, 1], [7, 1, 1, 7]), spread=0.05)
    classes = np.stack([np.arange(16), np.arange(16)], axis=1)
    assert 7 in run(vectors, batches).batches[1]
    classes[7, 1] = classes[12, 1]
    assert 7 in run(vectors, batches, capped=CappedClasses.of(classes, 2, 1)).batches[0]


def test_many_rounds_drift_no_way_from_the_truth():
    vectors = topical(np.arange(1_600) % 25)
    batches = random_batches(1_600, 16)
    refined = run(vectors, batches, rounds=60)
    assert len(refined.objective) > 10
    assert refined.objective[-1] == pytest.approx(worth(vectors, refined.batches), rel=1e-6)
    for rounds in (1, 2, 5):  # and on the way
        part = run(vectors, batches, rounds=rounds)
        assert part.objective == refined.objective[: rounds + 1]
        assert part.objective[-1] == pytest.approx(worth(vectors, part.batches), rel=1e-6)


@pytest.mark.parametrize("num_wrong", [1, 6])
def test_pairs_in_the_wrong_batch_are_exchanged_at_once(num_wrong):
    """Two topics, with some pairs of each in the batch of the other."""
    batches = np.arange(32).reshape(2, 16)
    batches[:, -num_wrong:] = batches[::-1, -num_wrong:].copy()
    refined = run(topical(np.repeat([0, 1], 16), spread=0.05), batches, rounds=1)
    assert [set(batch) for batch in refined.batches] == [set(range(16)), set(range(16, 32))]


def test_the_example_of_the_docstring():
    vectors = np.tile(np.eye(2, dtype=np.float32)[[0, 0, 1, 1, 1, 0]], 2)
    refined = run(vectors, np.arange(6).reshape(2, 3), rounds=1)
    assert refined.objective == [2 + 2, 6 + 6]
    assert [set(batch) for batch in refined.batches] == [{0, 1, 5}, {2, 3, 4}]


def test_many_topics_come_together():
    topic = np.repeat(np.arange(20), 8)
    vectors = topical(topic, spread=0.05)
    batches = np.arange(160).reshape(20, 8)
    moved = np.random.default_rng(0).permutation(20)
    mixed = batches.copy()
    mixed[:, 0] = batches[moved, 0]  # one pair of each batch is in another one
    refined = run(vectors, mixed)
    assert refined.objective[-1] == pytest.approx(worth(vectors, batches), rel=1e-6)
    assert all(len(set(topic[batch].tolist())) == 1 for batch in refined.batches)


def test_what_a_pair_is_to_itself_is_no_gain():
    """Thirteen pairs of each batch with d = −q and nothing in common with others: leaving only seems to gain."""
    ways = 2 * np.eye(28)[:26]
    topic_a, topic_b = np.eye(28)[26:]
    documents = np.concatenate([ways, [topic_a] * 3, [topic_b] * 3])
    queries = np.concatenate([-ways, [topic_a] * 3, [topic_b] * 3])
    vectors = np.concatenate([documents, queries], axis=1).astype(np.float32)
    batches = np.array([[*range(13), 26, 27, 29], [*range(13, 26), 28, 30, 31]])
    refined = run(vectors, batches, rounds=1)
    assert refined.objective == [pytest.approx(4.0), pytest.approx(12.0)]
    assert {26, 27, 28} <= set(refined.batches[0]) and {29, 30, 31} <= set(refined.batches[1])


@pytest.mark.parametrize("batch_size", [2, 16, 64])
def test_batches_of_topical_pairs_become_harder(batch_size):
    vectors = topical(np.arange(1_280) % 20)
    batches = random_batches(1_280, batch_size)
    refined = run(vectors, batches)
    bounds = measure_bounds(Sides(*np.split(vectors, 2, axis=1)), batch_size, num_anchors=1_280, seed=0)
    terms = batches.size * (batch_size - 1)
    before, after = (bounds.share(value / terms) for value in (refined.objective[0], refined.objective[-1]))
    assert abs(before) < 0.1
    assert after > before + 0.25


def test_it_ends_when_nothing_is_gained():
    vectors = topical(np.arange(320) % 10)
    refined = run(vectors, random_batches(320, 16), rounds=1_000)
    assert len(refined.objective) < 200
    again = run(vectors, refined.batches)
    assert again.objective[-1] == pytest.approx(refined.objective[-1], rel=1e-3)


def test_a_tolerance_ends_it_early():
    vectors = topical(np.arange(1_600) % 25)
    batches = random_batches(1_600, 16)
    found = {tolerance: run(vectors, batches, rounds=100, tolerance=tolerance) for tolerance in (0.0, 1e-3, 0.1, 1e9)}
    lengths = [len(refined.objective) for refined in found.values()]
    assert lengths == sorted(lengths, reverse=True) and lengths[0] > lengths[1] > lengths[2] > lengths[3] == 2
    for tolerance, refined in found.items():
        gains = np.diff(refined.objective) / np.abs(refined.objective[:-1])
        assert (gains[:-1] > tolerance).all()
        assert gains[-1] <= tolerance or len(refined.objective) == 101


@pytest.mark.parametrize(("batch_size", "rounds"), [(8, 0), (48, 30)], ids=["no rounds", "a single batch"])
def test_without_trading_nothing_changes(batch_size, rounds):
    vectors, batches = topical(np.arange(64) % 4), random_batches(64, batch_size)
    refined = run(vectors, batches, rounds)
    assert np.array_equal(refined.batches, batches)
    assert refined.objective == [pytest.approx(worth(vectors, batches), rel=1e-6)]


def test_no_batches():
    assert run(topical(np.arange(5)), np.empty((0, 8), dtype=np.int64)).objective == [0.0]


@pytest.mark.parametrize("spread", [2.0, 1e-3])
def test_threads_and_block_size_change_nothing(same_each_way, spread):
    """Even if the pairs of a topic are so alike that float32 cannot tell which of them gains most."""
    vectors, batches = topical(np.arange(1_600) % 25, dimension=48, spread=spread), random_batches(1_600, 16)

    def trade():
        refined = run(vectors, batches, rounds=8)
        return refined.batches, refined.objective

    same_each_way(trade, *({"refine._GAINS_HELD": held} for held in (1, 33 * 96 * 7)))


def test_gains_are_held_for_a_block_only(monkeypatch):
    """At most one batch more than fits: gains of 33 batches for each of its slots, or their 33 sums."""
    held, inner = [], torch.bmm

    def bmm(left, right):
        result = inner(left, right)
        held.append(max(left.numel(), result.numel()))
        return result

    monkeypatch.setattr(module.torch, "bmm", bmm)
    monkeypatch.setattr(module, "_GAINS_HELD", 20_000)
    run(topical(np.arange(1_600) % 25), random_batches(1_600, 16), rounds=1)
    assert len(held) > 5 and max(held) <= 20_000
