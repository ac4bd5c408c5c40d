"""trainer.order: what an epoch holds, how it is permuted, and how any number of ranks cuts the same order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hardbatch.pipeline.errors import ConfigError, IntegrityError
from hardbatch.trainer.order import BatchOrder

DOMAINS = ("animals", "plants", "stones")
LENGTHS = np.random.default_rng(0).lognormal(0, 1, 1_000)
ORDER_OF_EPOCH_0 = [1, 10, 11, 8, 4, 8, 6, 2, 7, 9, 0, 3, 11, 5]
ORDER_OF_EPOCH_3 = [8, 4, 6, 3, 2, 1, 10, 0, 9, 11, 9, 11, 5, 7]


def make_order(
    sizes: Sequence[int],
    *,
    num_packings: int = 1,
    weights: Mapping[str, float] | None = None,
    seed: int = 0,
    shuffle_index: int | None = None,
    similar_lengths: int = 1,
) -> BatchOrder:
    """The order of an index with `sizes[i]` batches of domain i in every packing; batch i is `LENGTHS[i]` long."""
    rows = [
        (packing, place) for packing in range(num_packings) for place, size in enumerate(sizes) for _ in range(size)
    ]
    ids = np.arange(len(rows))
    if shuffle_index is not None:
        ids = np.random.default_rng(shuffle_index).permutation(ids)
    return BatchOrder(
        batch_ids_I=ids,
        packings_I=np.array([rows[i][0] for i in ids], dtype=np.int32),
        domains_I=np.array([rows[i][1] for i in ids], dtype=np.int32),
        domains=DOMAINS[: len(sizes)],
        weights=weights,
        seed=seed,
        lengths_I=LENGTHS[ids],
        similar_lengths=similar_lengths,
    )


def read(order: BatchOrder, epoch: int) -> list[int]:
    """Rows of an epoch, in order."""
    start = epoch * order.epoch_length
    return [order.batch_at(position) for position in range(start, start + order.epoch_length)]


sizes_of_domains = st.lists(st.integers(1, 12), min_size=1, max_size=3)
weights_of_domains = st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 2.75]), min_size=3, max_size=3)


@given(sizes=sizes_of_domains, weights=weights_of_domains, seed=st.integers(0, 2**40), epoch=st.integers(0, 5))
def test_an_epoch_reads_each_batch_as_often_as_its_weight_says(
    sizes: list[int], weights: list[float], seed: int, epoch: int
) -> None:
    given_weights = dict(zip(DOMAINS, weights[: len(sizes)], strict=False))
    if not any(int(weight * size + 0.5) for weight, size in zip(weights, sizes, strict=False)):
        with pytest.raises(ConfigError, match="no batch is left"):
            make_order(sizes, weights=given_weights, seed=seed)
        return
    order = make_order(sizes, weights=given_weights, seed=seed)
    counts = Counter(read(order, epoch))
    first = 0
    for size, weight in zip(sizes, weights, strict=False):
        of_domain = [counts[row] for row in range(first, first + size)]
        first += size
        assert all(count in (int(weight), int(weight) + 1) for count in of_domain)
        assert sum(of_domain) == int(weight) * size + int((weight % 1) * size + 0.5)
    assert order.epoch_length == sum(counts.values())


@given(sizes=sizes_of_domains, num_packings=st.integers(1, 3), seed=st.integers(0, 9))
def test_epoch_e_reads_packing_e_mod_the_number_of_packings(sizes: list[int], num_packings: int, seed: int) -> None:
    order = make_order(sizes, num_packings=num_packings, seed=seed)
    assert order.num_packings == num_packings
    for epoch in range(2 * num_packings + 1):
        start = (epoch % num_packings) * sum(sizes)
        assert sorted(read(order, epoch)) == list(range(start, start + sum(sizes)))


def test_the_permutation_differs_by_epoch_and_by_seed() -> None:
    orders = [read(make_order([40, 24], seed=seed), epoch) for seed in (0, 1) for epoch in (0, 1, 2)]
    assert len({tuple(order) for order in orders}) == len(orders)
    assert list(range(64)) not in orders


def test_the_choice_of_a_fraction_differs_by_epoch_and_domain_and_not_by_other_domains() -> None:
    def chosen(order: BatchOrder, epoch: int, first: int) -> set[int]:
        return {row - first for row in read(order, epoch) if first <= row < first + 40}

    both = make_order([40, 40], weights={"animals": 0.5, "plants": 0.5})
    alone = make_order([40], weights={"animals": 0.5})
    assert chosen(both, 0, 0) == chosen(alone, 0, 0)
    assert len({frozenset(chosen(both, epoch, first)) for epoch in (0, 1) for first in (0, 40)}) == 4


def test_the_order_is_the_same_on_every_machine() -> None:
    """Written down once: a resumed run must read the same order with other libraries, too."""
    order = make_order([8, 4], weights={"plants": 1.5}, seed=7)
    assert read(order, 0) == ORDER_OF_EPOCH_0
    assert read(order, 3) == ORDER_OF_EPOCH_3


@given(size=st.integers(1, 200), run=st.integers(2, 8), seed=st.integers(0, 9), epoch=st.integers(0, 3))
def test_runs_of_similar_length_change_the_order_alone(size: int, run: int, seed: int, epoch: int) -> None:
    order = make_order([size], weights={"animals": 1.5}, seed=seed, similar_lengths=run)
    assert sorted(read(order, epoch)) == sorted(read(make_order([size], weights={"animals": 1.5}, seed=seed), epoch))


def test_ranks_take_equally_long_over_runs_of_similar_length() -> None:
    def waste(similar_lengths: int) -> float:
        order = make_order([640], similar_lengths=similar_lengths)
        steps_S8 = LENGTHS[read(order, 0)].reshape(-1, 8)
        return float(steps_S8.max(1).sum() / steps_S8.mean(1).sum())

    assert waste(1) > 2 and waste(8) < 1.4 and waste(16) < 1.4
    runs = [tuple(read(make_order([640], similar_lengths=8), epoch)) for epoch in (0, 1)]
    assert len(set(runs)) == 2
    means = LENGTHS[list(runs[0])].reshape(5, 16, 8).mean(2)
    assert all((np.diff(of_window) < 0).sum() > 3 for of_window in means), "runs of a window are in drawn order"


@given(shuffle=st.integers(0, 100))
def test_the_order_does_not_depend_on_the_order_of_the_index(shuffle: int) -> None:
    plain, shuffled = make_order([5, 6]), make_order([5, 6], shuffle_index=shuffle)
    ids = np.random.default_rng(shuffle).permutation(11)
    assert [int(ids[row]) for row in read(shuffled, 1)] == read(plain, 1)


def steps(order: BatchOrder, start: int, step_size: int) -> list[int]:
    """Where the first steps start."""

    def walk() -> Iterator[int]:
        position = order.step_at(start, step_size)
        while True:
            yield position
            position = order.next_step(position, step_size)

    return list(islice(walk(), 12))


@given(num_batches=st.integers(1, 20), step_size=st.integers(1, 20), start=st.integers(0, 60))
def test_a_tail_shorter_than_a_step_is_left_out(num_batches: int, step_size: int, start: int) -> None:
    order = make_order([num_batches])
    if step_size > num_batches:
        with pytest.raises(ConfigError, match=f"an epoch has {num_batches} batches, a step .* takes {step_size}"):
            order.step_at(start, step_size)
        return
    starts = steps(order, start, step_size)
    assert all(position % num_batches + step_size <= num_batches for position in starts)
    for position, following in zip([start - step_size, *starts], starts, strict=False):
        end = position + step_size
        if end % num_batches + step_size <= num_batches:
            assert following == end
        else:
            assert following == (end // num_batches + 1) * num_batches


@given(position=st.integers(0, 100), seed=st.integers(0, 3))
def test_any_position_gives_the_same_batch_whatever_was_read_before(position: int, seed: int) -> None:
    fresh, used = (make_order([7, 6], num_packings=2, weights={"plants": 0.5}, seed=seed) for _ in range(2))
    for before in range(position % 50):
        used.batch_at(before * 7)
    assert fresh.batch_at(position) == used.batch_at(position)


def test_packings_of_different_length_are_refused() -> None:
    with pytest.raises(IntegrityError, match="packing 0: 3, packing 1: 2"):
        BatchOrder(
            batch_ids_I=np.arange(5),
            packings_I=np.array([0, 0, 0, 1, 1]),
            domains_I=np.zeros(5, dtype=int),
            domains=["animals"],
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        *(({"weights": {"animals": weight}}, "weight of 'animals'") for weight in (-0.5, float("nan"), float("inf"))),
        ({"weights": {"birds": 2.0}}, r"weight of 'birds': no such domain.*animals, plants"),
        ({"seed": -1}, "seed -1"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_order([3, 3], **settings)


def test_a_million_batches_are_ordered_exactly_once() -> None:
    num_batches = 1_000_000
    order = BatchOrder(
        batch_ids_I=np.arange(num_batches),
        packings_I=np.zeros(num_batches, dtype=np.int32),
        domains_I=np.arange(num_batches) % 2,
        domains=DOMAINS[:2],
    )
    rows = np.fromiter((order.batch_at(position) for position in range(num_batches)), dtype=np.int64)
    assert (np.bincount(rows, minlength=num_batches) == 1).all()
