"""stages.summary: the counts of a corpus, and what its packings have in common, against a count by hand."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hardbatch.pipeline.stages.summary import Packed, count_packings, read_packed, shared_batch_mates
from tests.artifacts import Domain, Packing, Written, make_artifact, run_write, write_corpus

B = 4
PAIRS = {"alpha": 30, "beta": 17}
DOMAINS = {
    name: Domain(pairs=[(f"{name} {i}", f"answer {i} of {name}") for i in range(num_pairs)])
    for name, num_pairs in PAIRS.items()
}


def make_packing(seed: int) -> Packing:
    """Seven and four batches of the domains, and a mixed one that shares some pairs with that of the next seed."""
    cut = {}
    for name, num_pairs in PAIRS.items():
        order = np.random.default_rng(seed).permutation(num_pairs)
        slots = [(name, int(pair)) for pair in order]
        cut[name] = [slots[i : i + B] for i in range(0, len(slots) - B + 1, B)]
    mixed = [("alpha", seed), ("alpha", seed + 1), ("beta", 0), ("beta", seed)]
    return {**cut, "mixed": [mixed]}


PACKINGS = [make_packing(seed) for seed in (1, 2, 3)]


def shared_by_hand(first: Sequence[Sequence[Hashable]], second: Sequence[Sequence[Hashable]]) -> float | None:
    """The mean over pairs that are in a batch of both of |batch-mates in both| / (B-1)."""
    mates = [{pair: set(batch) - {pair} for batch in packing for pair in batch} for packing in (first, second)]
    both = mates[0].keys() & mates[1].keys()
    if not both:
        return None
    return sum(len(mates[0][pair] & mates[1][pair]) / (len(first[0]) - 1) for pair in both) / len(both)


# batch-mates


@given(num_pairs=st.integers(0, 60), batch_size=st.integers(2, 9), spread=st.integers(0, 99), seed=st.integers(0, 99))
def test_shared_batch_mates_are_those_counted_by_hand(num_pairs: int, batch_size: int, spread: int, seed: int) -> None:
    """From packings that are the same to ones with nothing in common: pairs move as far as `spread` lets them."""
    generator = np.random.default_rng(seed)
    row = 3 * generator.permutation(num_pairs)
    moved = row[np.argsort(np.arange(num_pairs) + spread * generator.random(num_pairs))]
    cut = num_pairs // batch_size * batch_size
    first, second = (places[:cut].reshape(-1, batch_size) for places in (row, moved))
    found = shared_batch_mates(first, second)
    assert found == pytest.approx(shared_by_hand(first.tolist(), second.tolist()))
    assert found == pytest.approx(shared_batch_mates(second, first))
    assert spread > 0 or cut == 0 or found == 1.0


def test_many_batches_share_as_counted_by_hand() -> None:
    generator = np.random.default_rng(0)
    first = generator.permutation(7_000).reshape(-1, 2)
    second = first.ravel()[np.argsort(np.arange(7_000) + 3 * generator.random(7_000))].reshape(-1, 2)
    found = shared_batch_mates(first, second)
    assert found == pytest.approx(shared_by_hand(first.tolist(), second.tolist()))
    assert 0.1 < found < 0.9


def test_rows_and_columns_of_a_square_share_nothing() -> None:
    square = np.arange(25).reshape(5, 5)
    assert shared_batch_mates(square, square.T) == 0.0


def test_packings_without_a_common_pair_have_no_share() -> None:
    assert shared_batch_mates(np.array([[0, 1], [2, 3]]), np.array([[4, 5], [9, 7]])) is None


# a corpus of three packings


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Written:
    return write_corpus(tmp_path_factory.mktemp("several"), DOMAINS, PACKINGS)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[Written]:
    """Shards of each packing alone."""
    return [write_corpus(tmp_path_factory.mktemp("alone"), DOMAINS, [packing]) for packing in PACKINGS]


def test_rows_batches_and_leftover_are_counted_per_packing(several: Written) -> None:
    counts = several.counts
    assert (counts["batch_size"], counts["packings"], counts["batches"]) == (B, 3, 3 * (7 + 4 + 1))
    for name, num_pairs, batches, left in (("alpha", 30, 7, 2), ("beta", 17, 4, 1)):
        domain = counts["domains"][name]
        assert (domain["rows"], domain["pairs"], domain["quarantined"]) == (num_pairs + 1, num_pairs, {"empty": 1})
        assert (domain["batches"], domain["leftover"]) == (batches, {"remainder": left})
    assert (counts["domains"]["mixed"]["batches"], counts["domains"]["mixed"]["leftover"]) == (1, {})
    assert "pairs" not in counts["domains"]["mixed"]


def test_hardness_is_the_mean_of_the_batches_and_relative_to_the_bounds(several: Written) -> None:
    for name, domain in several.counts["domains"].items():
        rows = several.index.filter(several.index["domain"] == name)
        unmasked = 1 - rows["mask_rate"]
        masked = (rows["masked_hardness"].fill_null(0) * unmasked).sum() / unmasked.sum()
        assert domain["hardness"] == pytest.approx(rows["hardness"].mean(), abs=1e-4)
        within = None if name == "mixed" else pytest.approx(rows["group_hardness"].mean(), abs=1e-4)
        assert domain["group_hardness"] == within
        assert domain["mask_rate"] == pytest.approx(rows["mask_rate"].mean(), abs=1e-4)
        assert domain["surrogate_loss"] == pytest.approx(rows["surrogate_loss"].mean(), abs=1e-4)
        assert domain["masked_hardness"] == pytest.approx(masked, abs=1e-4)
        assert ("share" in domain) == ("hardness_knn" in domain) == (name != "mixed")
        if name != "mixed":
            assert (domain["hardness_random"], domain["hardness_knn"]) == (-0.1, 0.7)
            assert domain["share"] == pytest.approx((domain["hardness"] + 0.1) / 0.8, abs=2e-4)
            assert domain["masked_share"] == pytest.approx((masked + 0.1) / 0.8, abs=2e-4)


def test_hardness_of_each_packing_is_that_of_its_own_shards(several: Written, alone: list[Written]) -> None:
    for name, domain in several.counts["domains"].items():
        assert len(domain["by_packing"]) == 3
        for packing, shards in zip(domain["by_packing"], alone, strict=True):
            assert packing == {key: shards.counts["domains"][name][key] for key in packing}
            assert ("share" in packing) == (name != "mixed") and "hardness" in packing
    hardness = {packing["hardness"] for packing in several.counts["domains"]["alpha"]["by_packing"]}
    assert len(hardness) == 3


def test_shared_batch_mates_of_a_corpus(several: Written) -> None:
    found = several.counts["domains"]
    for name, domain in found.items():
        shared = [shared_by_hand(*(packing[name] for packing in both)) for both in combinations(PACKINGS, 2)]
        known = [share for share in shared if share is not None]
        assert domain["shared_batch_mates"] == pytest.approx(np.mean(known), abs=1e-4)
    assert 0 < found["alpha"]["shared_batch_mates"] < 1
    assert found["mixed"]["shared_batch_mates"] > 0


def test_one_packing_has_nothing_to_share(alone: list[Written]) -> None:
    for shards in alone:
        assert shards.counts["packings"] == 1
        for domain in shards.counts["domains"].values():
            assert not {"shared_batch_mates", "by_packing"} & domain.keys()


def test_domains_have_as_many_packings_as_each_other(tmp_path: Path) -> None:
    old = read_packed(make_artifact(tmp_path / "d" / "k", {}, counts={"batches": 3, "leftover": {}}))
    assert count_packings({"old": old, "new": replace(old, batches=5)}) == 1
    with pytest.raises(AssertionError, match="differ in their number of packings"):
        count_packings({"one": old, "two": Packed(batches=3, leftover={}, packings=2)})


@pytest.mark.parametrize("sizes", [{}, {"cluster_size_q05": 2, "cluster_size_q50": 8.5, "cluster_size_q95": 13}])
def test_sizes_of_clusters_are_shown_if_they_are_known(
    alone: list[Written], tmp_path: Path, sizes: dict[str, Any]
) -> None:
    step = alone[0].step
    clusters = make_artifact(tmp_path / "alpha" / "key", {}, counts={"clusters": 6, **sizes})
    inputs = {**step.inputs, "clusters/alpha": clusters}
    shards = Written(run_write(replace(step, path=tmp_path / "shards", inputs=inputs)))
    counts = shards.counts["domains"]["alpha"]
    assert {key: value for key, value in counts.items() if key.startswith("cluster")} == {"clusters": 6, **sizes}
    assert ("| 2, 8.5, 13 |" in (shards.path / "README.md").read_text()) == bool(sizes)
