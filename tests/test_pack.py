"""Packing: every pair once, every batch exactly B; and mixing what is left of several domains."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import write
from pipeline.artifact import read_artifact
from pipeline.pack import lay_out, pack, pack_randomly


class InMemory:
    """Points that lie in an array."""

    def __init__(self, points):
        self.points, self.dimension = np.ascontiguousarray(points, dtype=np.float32), points.shape[1]

    def __len__(self):
        return len(self.points)

    def take(self, rows):
        return self.points[rows]


def run_pack(points, labels, batch_size, seed=0, exact_below=8_192):
    num_clusters = int(labels.max(initial=-1)) + 1
    centroids = np.zeros((num_clusters, points.shape[1]), dtype=np.float32)
    for label in range(num_clusters):
        if (labels == label).any():
            centroids[label] = points[labels == label].mean(0)
    return pack(InMemory(points), labels, centroids, batch_size=batch_size, seed=seed, exact_below=exact_below)


def random_points(num_points, dimension=6, seed=0):
    return np.random.default_rng(seed).standard_normal((num_points, dimension)).astype(np.float32)


def assert_every_pair_once(packing, num_points, batch_size):
    assert packing.batches.shape == (num_points // batch_size, batch_size)
    assert packing.remainder.shape == (num_points % batch_size,)
    placed = np.concatenate([packing.batches.ravel(), packing.remainder])
    assert sorted(placed.tolist()) == list(range(num_points))


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_every_pair_once_and_every_batch_full(data):
    num_points = data.draw(st.integers(0, 120))
    num_clusters = data.draw(st.integers(1, max(1, num_points)))
    batch_size = data.draw(st.integers(2, 40))
    dimension = data.draw(st.integers(1, 5))
    generator = np.random.default_rng(data.draw(st.integers(0, 2**20)))
    points = generator.choice([-1.0, 0.0, 0.5, 1.0], (num_points, dimension)).astype(np.float32)
    labels = generator.integers(0, num_clusters, num_points).astype(np.int32)
    packing = run_pack(points, labels, batch_size, seed=data.draw(st.integers(0, 9)))
    assert_every_pair_once(packing, num_points, batch_size)


def test_every_pair_once_on_the_graph_tour():
    points, labels = random_points(500), np.arange(500, dtype=np.int32) % 100
    assert_every_pair_once(run_pack(points, labels, 16, exact_below=1), 500, 16)


def test_every_pair_once_on_the_graph_tour_of_few_clusters():
    points, labels = random_points(50), np.arange(50, dtype=np.int32) % 10
    assert_every_pair_once(run_pack(points, labels, 4, exact_below=1), 50, 4)


def test_a_cluster_without_pairs_does_no_harm():
    labels = np.array([0, 0, 3, 3, 3, 5], dtype=np.int32)
    assert_every_pair_once(run_pack(random_points(6), labels, 2), 6, 2)


def test_identical_vectors():
    points = np.tile(random_points(1), (50, 1))
    assert_every_pair_once(run_pack(points, np.zeros(50, dtype=np.int32), 8), 50, 8)
    assert_every_pair_once(run_pack(points, np.arange(50, dtype=np.int32) % 9, 8), 50, 8)
    assert_every_pair_once(run_pack(np.zeros((50, 3)), np.arange(50, dtype=np.int32) % 9, 8), 50, 8)


def test_clusters_of_the_size_of_a_batch_stay_whole():
    labels = np.repeat(np.arange(6, dtype=np.int32), 8)[np.random.default_rng(0).permutation(48)]
    packing = run_pack(random_points(48), labels, 8)
    assert all(len(set(labels[batch].tolist())) == 1 for batch in packing.batches)


def test_a_large_cluster_is_cut_into_batches_that_hang_together():
    """One cluster of two groups between two others: the cut separates the groups."""
    generator = np.random.default_rng(0)
    left, right = np.array([1.0, 0.2, 0.0]), np.array([0.2, 1.0, 0.0])
    middle = np.concatenate([np.tile(left, (8, 1)), np.tile(right, (8, 1))])[generator.permutation(16)]
    points = np.concatenate([np.tile([[1.0, 0.0, 0.0]], (8, 1)), np.tile([[0.0, 1.0, 0.0]], (8, 1)), middle])
    points = (points + 0.01 * generator.standard_normal(points.shape)).astype(np.float32)
    labels = np.repeat([0, 1, 2], [8, 8, 16]).astype(np.int32)
    centroids = np.stack([points[labels == label].mean(0) for label in range(3)])
    row = lay_out(InMemory(points), labels, centroids, np.array([0, 2, 1]))
    assert labels[row].tolist() == [0] * 8 + [2] * 16 + [1] * 8
    first, second = points[row[8:16]], points[row[16:24]]
    assert (first[:, 0] > first[:, 1]).all()  # beside the cluster it comes from
    assert (second[:, 1] > second[:, 0]).all()
    row = lay_out(InMemory(points), labels, centroids, np.array([0, 1, 2]))
    first, second = points[row[16:24]], points[row[24:32]]
    assert (first[:, 1] > first[:, 0]).all()  # the last one of the tour too begins where it comes from
    assert (second[:, 0] > second[:, 1]).all()


def test_fewer_pairs_than_a_batch():
    packing = run_pack(random_points(5), np.zeros(5, dtype=np.int32), 8)
    assert packing.batches.shape == (0, 8)
    assert sorted(packing.remainder.tolist()) == [0, 1, 2, 3, 4]


def test_no_pairs():
    packing = run_pack(np.zeros((0, 3), dtype=np.float32), np.zeros(0, dtype=np.int32), 8)
    assert packing.batches.shape == (0, 8) and packing.remainder.shape == (0,)


def test_the_seed_moves_the_start_of_the_tour():
    points, labels = random_points(200), np.arange(200, dtype=np.int32) % 25
    found = {run_pack(points, labels, 8, seed=seed).batches.tobytes() for seed in range(6)}
    assert len(found) > 2
    same = [run_pack(points, labels, 8, seed=1).batches for _ in range(2)]
    assert np.array_equal(*same)


def test_random_batches_hold_every_pair_once_in_an_order_drawn_by_the_seed():
    packing = pack_randomly(103, batch_size=8, seed=5)
    assert packing.batches.shape == (12, 8) and len(packing.remainder) == 7
    assert sorted([*packing.batches.ravel(), *packing.remainder]) == list(range(103))
    assert not np.array_equal(packing.batches, pack_randomly(103, batch_size=8, seed=6).batches)
    assert not np.array_equal(packing.batches.ravel(), np.sort(packing.batches.ravel()))


def test_packed_batches_are_more_alike_than_random_ones():
    topics = random_points(20, dimension=16, seed=1)
    points = topics[np.arange(800) % 20] + 0.5 * random_points(800, dimension=16, seed=2)

    def alike(batches):
        return np.mean([(points[batch] @ points[batch].T).mean() for batch in batches])

    packing = run_pack(points, np.arange(800, dtype=np.int32) % 20, 16)
    shuffled = np.random.default_rng(0).permutation(800).reshape(-1, 16)
    assert alike(packing.batches) > 2 * alike(shuffled)


DATASETS = """
corpus = "three"
[[dataset]]
name = "alpha"
source = "alpha.jsonl"
query_prompt = "qa: "
[[dataset]]
name = "beta"
source = "beta.jsonl"
[[dataset]]
name = "gamma"
source = "gamma.jsonl"
document_prompt = "dg: "
[pack]
batch_size = 8
remainder = "REMAINDER"
"""


@pytest.fixture
def three_domains(run_corpus, write_jsonl, rows):
    """`three_domains(remainder)`: 21, 13 and 5 pairs, one of them without a vector; some documents are the same."""

    def run(remainder):
        alpha, beta, gamma = rows(21), rows(13, start=100), rows(5, start=200)
        beta[4]["document"] = "?"
        for other in (alpha, beta, gamma):
            other[0]["document"] = "shared by all domains"
        for name, texts in (("alpha", alpha), ("beta", beta), ("gamma", gamma)):
            write_jsonl(f"{name}.jsonl", texts)
        return run_corpus(DATASETS.replace("REMAINDER", remainder))

    return run


def ledger_of(plan, moved_too=True):
    """(domain, pair_id, where) of each row of batches and leftover; `moved_too` with those that went to mixed."""
    found = []
    for step in plan.steps:
        if step.stage == "batches":
            read_artifact(step.path)
            batches = pl.read_parquet(step.path / "batches.parquet")
            assert all(count == 8 for count in batches.group_by("batch").len()["len"])
            assert batches.sort("batch", "slot")["slot"].to_list() == list(range(8)) * (len(batches) // 8)
            found += [(d, p, f"in {step.domain}") for d, p in batches.select("domain", "pair_id").iter_rows()]
            left = pl.read_parquet(step.path / "leftover.parquet")
            left = left if moved_too else left.filter(pl.col("reason") != "mixed")
            found += [(d, p, reason) for d, p, reason in left.select("domain", "pair_id", "reason").iter_rows()]
    return found


EXPECTED = [(name, pair) for name, size in (("alpha", 21), ("beta", 13), ("gamma", 5)) for pair in range(size)]


def test_dropped_remainders_are_in_the_ledger(three_domains):
    ledger = ledger_of(three_domains("drop"))
    assert sorted((domain, pair) for domain, pair, _ in ledger) == sorted(EXPECTED)
    assert ("beta", 4, "invalid_vector") in ledger
    reasons = [where for *_, where in ledger]
    assert reasons.count("remainder") == 21 % 8 + 12 % 8 + 5 and reasons.count("invalid_vector") == 1


def test_mixed_remainders(three_domains):
    plan = three_domains("mix")
    ledger = ledger_of(plan)
    moved = {(domain, pair) for domain, pair, where in ledger if where == "mixed"}
    final = sorted(ledger_of(plan, moved_too=False))
    assert [(domain, pair) for domain, pair, _ in final] == sorted(EXPECTED)
    assert moved == {(domain, pair) for domain, pair, where in final if where in ("in mixed", "remainder")}
    assert sum(where == "remainder" for *_, where in ledger) == (5 + 4 + 5) % 8
    assert ("beta", 4, "invalid_vector") in ledger

    shards = pl.read_parquet(plan.shards / "data" / "*.parquet")
    index = pl.read_parquet(plan.shards / "index.parquet")
    assert index.sort("batch_id")["domain"].to_list() == ["alpha", "alpha", "beta", "mixed"]
    assert shards.select("domain", "pair_id").is_unique().all()
    mixed = shards.filter(pl.col("batch_id") == 3).sort("slot")
    assert mixed["domain"].n_unique() > 1
    prompts = {"alpha": ("qa: ", ""), "beta": ("", ""), "gamma": ("", "dg: ")}
    for row in mixed.iter_rows(named=True):
        assert (row["query_prompt"], row["document_prompt"]) == prompts[row["domain"]]
    texts = mixed["document"].to_list()
    for i, slots in enumerate(mixed["equivalent_slots"].to_list()):
        assert {j for j in range(8) if j != i and texts[j] == texts[i]} <= set(slots)


def test_equal_texts_of_two_domains_are_equivalent(run_corpus, write_jsonl, rows, monkeypatch):
    """A batch in which all pairs have the same document: each slot has all others in its set, whatever the scores."""
    monkeypatch.setattr(write, "surrogate_mask", lambda queries, *_, **__: np.zeros((len(queries),) * 2, dtype=bool))
    for number, name in enumerate(("alpha", "beta", "gamma")):
        write_jsonl(f"{name}.jsonl", [{**row, "document": "the one text"} for row in rows(3, start=100 * number)])
    plan = run_corpus(DATASETS.replace("REMAINDER", "mix"))
    shards = pl.read_parquet(plan.shards / "data" / "*.parquet").sort("slot")
    assert shards["domain"].n_unique() == 3
    assert shards["equivalent_slots"].to_list() == [[j for j in range(8) if j != i] for i in range(8)]


def test_one_cluster_is_laid_along_its_widest_line():
    line = np.arange(12, dtype=np.float32)
    shuffled = np.random.default_rng(0).permutation(12)
    points = InMemory(np.stack([line[shuffled], np.ones(12, dtype=np.float32)], axis=1))
    row = lay_out(points, np.zeros(12, dtype=np.int32), np.ones((1, 2), dtype=np.float32), np.zeros(1, dtype=np.int64))
    along = np.diff(shuffled[row])
    assert (along == 1).all() or (along == -1).all()
