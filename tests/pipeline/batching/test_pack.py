"""Packing: every pair once, every batch exactly B; stretches, several packings, and mixing what is left of domains."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hardbatch.pipeline.artifacts.artifact import read_artifact
from hardbatch.pipeline.artifacts.consistency import load_consistency
from hardbatch.pipeline.batching import pack as module
from hardbatch.pipeline.batching.kmeans import kmeans
from hardbatch.pipeline.batching.pack import PackSettings, pack
from hardbatch.pipeline.batching.points import InMemory
from hardbatch.pipeline.errors import InputError
from hardbatch.pipeline.stages import pack as stage_module
from tests.pipeline.batching.examples import equation_2, topical_sides
from tests.samples import Sides


class Counted(Sides):
    """Sides that record how many rows are read at once."""

    def __init__(self, documents, queries):
        super().__init__(documents, queries)
        self.asked = []

    def sides(self, rows):
        self.asked.append(len(rows))
        return super().sides(rows)


def topical(topic, dimension=16, spread=1.0, seed=0):
    """Pairs about the topics (int, n), both sides of norm 1; `spread` is the distance to the topic."""
    return Counted(*topical_sides(topic, dimension, spread, seed))


def means_of(points, labels):
    folded = points.take(np.arange(len(points)))
    centroids = np.zeros((int(labels.max(initial=-1)) + 1, points.dimension), dtype=np.float32)
    for label in np.unique(labels):
        centroids[label] = folded[labels == label].mean(0)
    return centroids


def run_pack(points, labels, batch_size, centroids=None, **changes):
    """A packing in which every pair is once; arguments are left as they were."""
    labels = np.asarray(labels, dtype=np.int32)
    centroids = means_of(points, labels) if centroids is None else centroids
    arguments = points.documents, points.queries, labels, centroids
    before = [array.copy() for array in arguments]
    packing = pack(
        points, labels, centroids, PackSettings(batch_size=batch_size, **{"group_size": batch_size} | changes)
    )
    assert all(np.array_equal(*both) for both in zip(arguments, before, strict=True))
    assert_every_pair_once(packing, len(points), batch_size)
    return packing


def clusters_of(points, num_clusters):
    folded = InMemory(points.take(np.arange(len(points))))
    return kmeans(folded, num_clusters, iterations=10, tolerance=1e-3, balance=0.02, seed=0).labels


def worth(points, batches):
    return equation_2(points.documents, points.queries, batches)


def assert_every_pair_once(packing, num_points, batch_size):
    assert packing.batches.shape == (num_points // batch_size, batch_size)
    assert packing.remainder.shape == (num_points % batch_size,)
    placed = np.concatenate([packing.batches.ravel(), packing.remainder])
    assert sorted(placed.tolist()) == list(range(num_points))


def few_at_once(monkeypatch, points, num_pairs):
    """Makes stretches of at most about `num_pairs` pairs."""
    monkeypatch.setattr(module, "_STRETCH_VALUES", num_pairs * 2 * points.dimension)


@st.composite
def labelled_points(draw):
    num_points = draw(st.integers(0, 120))
    num_clusters = draw(st.integers(1, max(1, num_points)))
    generator = np.random.default_rng(draw(st.integers(0, 2**20)))
    sides = generator.choice([-1.0, 0.0, 0.5, 1.0], (2, num_points, draw(st.integers(1, 5)))).astype(np.float32)
    if draw(st.booleans()):
        sides += generator.standard_normal(sides.shape).astype(np.float32)
    labels = np.unique(generator.integers(0, num_clusters, num_points), return_inverse=True)[1]
    return Counted(*sides), labels.astype(np.int32)


@settings(max_examples=100, deadline=None)
@given(labelled_points(), st.data())
def test_every_pair_once_and_every_batch_full(given_, data):
    """Also in stretches of a few pairs, on either tour; refined batches are worth no less than those they came from."""
    points, labels = given_
    batch_size, seed = data.draw(st.integers(2, 40)), data.draw(st.integers(0, 9))
    exact_below, at_once = data.draw(st.sampled_from([1, 8_192])), data.draw(st.sampled_from([1, 17, 50, 2**20]))
    with pytest.MonkeyPatch.context() as monkeypatch:
        few_at_once(monkeypatch, points, at_once)
        chosen = {"seed": seed, "exact_tour_below": exact_below, "refine_tolerance": 0.0}
        plain, refined = (run_pack(points, labels, batch_size, refine_rounds=rounds, **chosen) for rounds in (0, 2))
    assert np.array_equal(np.sort(plain.remainder), np.sort(refined.remainder))
    room = 1e-9 * max(1.0, float(np.abs(points.documents).max(initial=0)) ** 2) * len(points) * batch_size
    assert worth(points, refined.batches) >= worth(points, plain.batches) - room


@pytest.mark.parametrize(("num_points", "num_clusters", "batch_size"), [(500, 100, 16), (50, 10, 4), (2, 2, 2)])
def test_every_pair_once_on_the_graph_tour(monkeypatch, num_points, num_clusters, batch_size):
    points, labels = topical(np.arange(num_points) % num_clusters), np.arange(num_points) % num_clusters
    exact = run_pack(points, labels, batch_size)
    with monkeypatch.context() as patched:
        patched.setattr("hardbatch.pipeline.batching.tour._exact_tour", None)
        packing = run_pack(points, labels, batch_size, exact_tour_below=1)
    assert worth(points, packing.batches) > 0.9 * worth(points, exact.batches)


@pytest.mark.parametrize("labels", [[0, 0, 3, 3, 3, 5], [1] * 6, [0, 0, 0, 1, 1, 1]])
def test_a_cluster_without_pairs_does_no_harm(labels):
    """Its pairs may all have lost their surrogate vector."""
    run_pack(topical(np.arange(6)), labels, 2, centroids=topical(np.arange(7), seed=1).documents)


@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("num_clusters", [1, 9, 50])
def test_identical_vectors(num_clusters, value):
    run_pack(Counted(*np.full((2, 50, 3), value, dtype=np.float32)), np.arange(50) % num_clusters, 8)


def test_clusters_of_the_size_of_a_batch_stay_whole():
    labels = np.repeat(np.arange(6, dtype=np.int32), 8)[np.random.default_rng(0).permutation(48)]
    unrefined = run_pack(topical(np.zeros(48, dtype=np.int64)), labels, 8, refine_rounds=0)
    nothing_to_gain = run_pack(topical(labels, spread=0.1), labels, 8)
    for packing in (unrefined, nothing_to_gain):
        assert all(len(set(labels[batch].tolist())) == 1 for batch in packing.batches)


@pytest.mark.parametrize("seed", range(3))
def test_a_large_cluster_is_cut_into_batches_that_hang_together(seed):
    """One cluster of two groups between two others, each group like its neighbour: the cut separates the groups."""
    group = np.repeat([0, 1, 2, 3], 8)
    ways = np.array([[1.0, 0.0, 0.0], [1.0, 0.2, 0.0], [0.2, 1.0, 0.0], [0.0, 1.0, 0.0]])
    generator = np.random.default_rng(0)
    order = generator.permutation(32)
    sides = ways[group[order]] + 0.01 * generator.standard_normal((2, 32, 3))
    labels = np.array([0, 1, 1, 2], dtype=np.int32)[group[order]]
    packing = run_pack(Counted(*sides.astype(np.float32)), labels, 8, seed=seed, refine_rounds=0)
    assert sorted(sorted(set(group[order][batch].tolist())) for batch in packing.batches) == [[0], [1], [2], [3]]


@pytest.mark.parametrize(("tour", "first"), [([0, 2, 1], 0), ([1, 2, 0], 1), ([0, 1, 2], 1), ([2, 0, 1], 1)])
def test_a_cluster_is_laid_along_the_way_from_the_one_before_to_the_one_after(tour, first):
    """Cluster 2 is between 0 and 1, half of it nearer to each; its row begins near `first`."""
    points = np.repeat([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [1.0, 0.2, 0.0], [0.2, 1.0, 0.0]], 4, axis=0)
    order = np.random.default_rng(0).permutation(16)
    points = (points + 0.01 * np.random.default_rng(1).standard_normal((16, 3))).astype(np.float32)[order]
    labels = np.repeat([0, 1, 2, 2], 4)[order].astype(np.int32)
    centroids = means_of(Counted(points / 2, points / 2), labels)
    (stretch,) = module._stretches(labels, centroids, np.array(tour), 16)
    places = np.concatenate(stretch.members)
    row = places[module.lay_out(points[places], stretch)]
    assert labels[row].tolist() == np.repeat(tour, [4 if cluster < 2 else 8 for cluster in tour]).tolist()
    nearer_to_1 = points[row[labels[row] == 2]] @ [-1.0, 1.0, 0.0] > 0
    assert nearer_to_1.tolist() == [first == 1] * 4 + [first == 0] * 4


def test_one_cluster_is_laid_along_its_widest_line():
    place = np.random.default_rng(0).permutation(24)
    side = np.stack([place / 24, np.ones(24)], axis=1).astype(np.float32)
    packing = run_pack(Counted(side, side), np.zeros(24, dtype=np.int32), 6, refine_rounds=0)
    found = sorted(sorted(place[batch].tolist()) for batch in packing.batches)
    assert found == [list(range(start, start + 6)) for start in (0, 6, 12, 18)]


@pytest.mark.parametrize("num_points", [0, 1, 5, 7])
def test_fewer_pairs_than_a_batch(num_points):
    run_pack(topical(np.arange(num_points)), np.zeros(num_points), 8)


def test_the_seed_moves_the_start_of_the_tour():
    points, labels = topical(np.arange(200) % 25), np.arange(200, dtype=np.int32) % 25
    found = {run_pack(points, labels, 16, seed=seed, refine_rounds=0).batches.tobytes() for seed in range(6)}
    assert len(found) > 2
    assert np.array_equal(*(run_pack(points, labels, 16, seed=1).batches for _ in range(2)))


def test_another_seed_gives_a_pair_other_batch_mates():
    """Some clusters have the size of a batch or nearly, others not."""
    points = topical(np.random.default_rng(0).integers(0, 60, 2_000), dimension=32, spread=1.5)
    labels = clusters_of(points, 62)
    batch_of = np.full((2, 2_000), -1)
    for seed in (0, 1):
        batches = run_pack(points, labels, 32, seed=seed).batches
        batch_of[seed, batches.ravel()] = np.repeat(np.arange(len(batches)), 32)
    first, second = (row[:, None] == row[None] for row in batch_of[:, (batch_of >= 0).all(0)])
    np.fill_diagonal(first, False)
    assert (first & second).sum() < 0.9 * first.sum()


def test_packed_batches_are_harder_than_random_ones_and_harder_still_refined():
    points = topical(np.arange(1_600) % 40, dimension=32, spread=1.5)
    labels = clusters_of(points, 50)
    random = run_pack(points, labels, 32, group_size=1)
    plain, refined = (run_pack(points, labels, 32, refine_rounds=rounds) for rounds in (0, 30))
    values = [worth(points, packing.batches) for packing in (random, plain, refined)]
    assert values[1] > values[0] + 0.15 * 1_600 * 31
    assert values[2] > 1.02 * values[1]


# stretches


ONE_LARGE = np.concatenate([np.zeros(500, dtype=np.int64), np.arange(100) % 5 + 1])


@pytest.mark.parametrize("bound", ["_STRETCH_VALUES", "_STRETCH_SCORES"])
@pytest.mark.parametrize(
    ("labels", "at_once", "batch_size"),
    [
        (np.arange(1_000) % 60, 40, 8),
        (np.arange(1_000) % 60, 150, 8),
        (ONE_LARGE, 90, 16),
        (np.arange(300) % 20, 10, 64),
    ],
    ids=["many", "few", "a cluster larger than a stretch", "batches larger than a stretch"],
)
def test_no_more_than_a_stretch_is_read_at_once(monkeypatch, bound, labels, at_once, batch_size):
    points = topical(labels)
    values = at_once * 2 * points.dimension if bound == "_STRETCH_VALUES" else at_once**2 / batch_size
    monkeypatch.setattr(module, bound, values)
    run_pack(points, labels, batch_size, refine_rounds=1)
    assert max(points.asked) < max(at_once, batch_size) + batch_size  # and what the stretch before left
    assert len(points.asked) >= len(points) // max(at_once, batch_size)


def test_stretches_cost_little(monkeypatch):
    points = topical(np.arange(2_000) % 50, dimension=32)
    labels = (np.arange(2_000) % 50).astype(np.int32)
    whole = worth(points, run_pack(points, labels, 32).batches)
    few_at_once(monkeypatch, points, 400)
    assert worth(points, run_pack(points, labels, 32).batches) > 0.95 * whole
    assert max(points.asked[1:]) < 400 + 32


@pytest.mark.parametrize("spread", [1.5, 1e-3])
def test_threads_and_block_size_change_nothing(same_each_way, spread):
    """Even if the pairs of a topic are so alike that float32 cannot tell them apart."""
    generator = np.random.default_rng(0)
    topic = generator.integers(0, 40, 2_000)
    points, labels = topical(topic, dimension=48, spread=spread), generator.permutation(40)[topic]

    def packed():
        packing = run_pack(points, labels, 32, refine_rounds=6)
        return packing.batches, packing.remainder

    same_each_way(packed, *({"refine._GAINS_HELD": held} for held in (1, 33 * 96 * 7)))


# runs

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

    def run(remainder, *overrides):
        alpha, beta, gamma = rows(21), rows(13, start=100), rows(5, start=200)
        beta[4]["document"] = "?"
        for other in (alpha, beta, gamma):
            other[0]["document"] = "shared by all domains"
        for name, texts in (("alpha", alpha), ("beta", beta), ("gamma", gamma)):
            write_jsonl(f"{name}.jsonl", texts)
        return run_corpus(DATASETS.replace("REMAINDER", remainder), overrides=overrides)

    return run


def tables_of(plan, domain):
    path = next(step.path for step in plan.steps if (step.stage, step.domain) == ("batches", domain))
    counts = read_artifact(path).manifest.counts
    return pl.read_parquet(path / "batches.parquet"), pl.read_parquet(path / "leftover.parquet"), counts


def ledger_of(plan):
    """(domain, pair_id, where) of each row of batches and leftover; batches have eight slots each."""
    found = []
    for step in plan.steps:
        if step.stage == "batches":
            batches, left, _ = tables_of(plan, step.domain)
            assert batches.sort("batch", "slot")["slot"].to_list() == list(range(8)) * (len(batches) // 8)
            found += [(*key, f"in {step.domain}") for key in batches.select("domain", "pair_id").rows()]
            found += left.select("domain", "pair_id", "reason").rows()
    assert ("beta", 4, "invalid_vector") in found
    return found


EXPECTED = [(name, pair) for name, size in (("alpha", 21), ("beta", 13), ("gamma", 5)) for pair in range(size)]


def test_dropped_remainders_are_left_over(three_domains):
    ledger = ledger_of(three_domains("drop"))
    assert sorted((domain, pair) for domain, pair, _ in ledger) == EXPECTED
    reasons = [where for *_, where in ledger]
    assert reasons.count("remainder") == 21 % 8 + 12 % 8 + 5 and reasons.count("invalid_vector") == 1


def test_mixed_remainders(three_domains):
    plan = three_domains("mix")
    ledger = ledger_of(plan)
    moved = {(domain, pair) for domain, pair, where in ledger if where == "mixed"}
    final = sorted(row for row in ledger if row[2] != "mixed")
    assert [(domain, pair) for domain, pair, _ in final] == EXPECTED
    assert moved == {(domain, pair) for domain, pair, where in final if where in ("in mixed", "remainder")}
    assert sum(where == "remainder" for *_, where in ledger) == (5 + 4 + 5) % 8

    shards = pl.read_parquet(plan.shards / "data" / "*.parquet")
    index = pl.read_parquet(plan.shards / "index.parquet")
    assert index.sort("batch_id")["domain"].to_list() == ["alpha", "alpha", "beta", "mixed"]
    assert shards.select("domain", "pair_id").is_unique().all()
    mixed = shards.filter(pl.col("batch_id") == 3).sort("slot")
    assert mixed["domain"].n_unique() > 1
    prompts = {("alpha", "qa: ", ""), ("beta", "", ""), ("gamma", "", "dg: ")}
    assert set(mixed.select("domain", "query_prompt", "document_prompt").rows()) <= prompts
    texts = mixed["document"].to_list()
    for i, slots in enumerate(mixed["equivalent_slots"].to_list()):
        assert {j for j in range(8) if j != i and texts[j] == texts[i]} <= set(slots)


def test_batches_composed_of_all_domains(three_domains):
    """Groups of four stay in consecutive slots, each of one domain; what fills no group or no batch is left over."""
    plan = three_domains("drop", "pack.compose=corpus", "pack.group_size=4", "pack.num_packings=2")
    for packing in (0, 1):
        ledger = []
        for domain in ("alpha", "beta", "gamma", "mixed"):
            batches, left, counts = tables_of(plan, domain)
            assert counts["batches"] == (4 if domain == "mixed" else 0)
            ledger += [(*key, "in mixed") for key in batches.filter(packing=packing).select("domain", "pair_id").rows()]
            ledger += left.filter(packing=packing).select("domain", "pair_id", "reason").rows()
        moved = {(domain, pair) for domain, pair, where in ledger if where == "mixed"}
        final = sorted(row for row in ledger if row[2] != "mixed")
        assert [(domain, pair) for domain, pair, _ in final] == EXPECTED
        reasons = [where for *_, where in final]
        assert (len(moved), reasons.count("in mixed"), reasons.count("remainder")) == (20 + 12 + 4, 32, 1 + 0 + 1 + 4)

    batches, _, counts = tables_of(plan, "mixed")
    assert counts["crowding_pairs"] == 0
    groups = batches.with_columns(group=pl.col("slot") // 4).group_by("packing", "batch", "group")
    assert groups.agg(pl.col("domain").n_unique())["domain"].to_list() == [1] * 16
    for domain in ("alpha", "beta", "gamma"):
        handed_on = tables_of(plan, domain)[1].filter(packing=0, reason="mixed")["pair_id"].to_list()
        rows = batches.filter(packing=0, domain=domain)["pair_id"].to_list()
        found = {tuple(rows[start : start + 4]) for start in range(0, len(rows), 4)}
        assert found <= {tuple(handed_on[start : start + 4]) for start in range(0, len(handed_on), 4)}
    per_batch = batches.group_by("packing", "batch").agg(pl.col("domain").n_unique())["domain"]
    assert per_batch.max() > 1
    first, second = (batches.filter(packing=packing).drop("packing") for packing in (0, 1))
    assert not first.equals(second)

    index = pl.read_parquet(plan.shards / "index.parquet")
    assert index["domain"].to_list() == ["mixed"] * 8
    assert index["group_hardness"].null_count() == 0


def test_equal_texts_of_two_domains_are_equivalent(run_corpus, write_jsonl, rows):
    """A batch in which all pairs have the same document: each slot has all others in its set, whatever the scores."""
    for number, name in enumerate(("alpha", "beta", "gamma")):
        write_jsonl(f"{name}.jsonl", [{**row, "document": "the one text"} for row in rows(3, start=100 * number)])
    plan = run_corpus(DATASETS.replace("REMAINDER", "mix") + "[write]\nmax_likely = 0.0\n")
    shards = pl.read_parquet(plan.shards / "data" / "*.parquet").sort("slot")
    assert shards["domain"].n_unique() == 3
    assert shards["equivalent_slots"].to_list() == [[j for j in range(8) if j != i] for i in range(8)]


# several packings


PACKINGS = """
corpus = "several"
[[dataset]]
name = "alpha"
source = "alpha.jsonl"
[[dataset]]
name = "beta"
source = "beta.jsonl"
[pack]
batch_size = 8
num_packings = 3
"""


@pytest.fixture
def several(run_corpus, write_jsonl, rows):
    """`several(*overrides)`: three packings of 75 and 44 pairs, of which one of each has no vector."""

    def run(*overrides, stages=("pairs", "answers", "vectors", "clusters", "batches")):
        for name, texts in (("alpha", rows(75)), ("beta", rows(44, start=100))):
            texts[9]["query"] = "?"  # no word: no lexical vector
            write_jsonl(f"{name}.jsonl", texts)
        return run_corpus(PACKINGS, overrides=overrides, stages=stages)

    return run


@pytest.mark.parametrize("group_size", [8, 4, 1])
def test_each_packing_holds_every_pair_once(several, group_size):
    plan = several(f"pack.group_size={group_size}")
    for domain, size in (("alpha", 75), ("beta", 44)):
        batches, leftover, counts = tables_of(plan, domain)
        num_batches, num_left = divmod(size - 1, 8)
        left = {"remainder": num_left, "invalid_vector": 1}
        counted = {"packings": 3, "batches": num_batches, "pairs": num_batches * 8, "leftover": left}
        assert counts == {**counted, "crowding_pairs": 0}  # no text occurs twice
        places = [(p, b, s) for p in range(3) for b in range(num_batches) for s in range(8)]
        assert batches.select("packing", "batch", "slot").rows() == places
        ways = set()
        for packing in range(3):
            rows = batches.filter(packing=packing)
            rest = leftover.filter(packing=packing)
            assert sorted([*rows["pair_id"], *rest["pair_id"]]) == list(range(size))
            assert rest.filter(reason="invalid_vector")["pair_id"].to_list() == [9]
            mates = rows.group_by("batch").agg("pair_id")["pair_id"].to_list()
            ways.add(frozenset(frozenset(batch) for batch in mates))
        assert len(ways) == 3 or (group_size == 8 and len(ways) == 2)  # two tours may come to the same batches
        clusters = set(pl.concat([batches, leftover], how="diagonal").select("pair_id", "cluster_id").iter_rows())
        assert len(clusters) == size  # a pair is of one cluster in all packings


def test_pairs_beyond_what_a_batch_may_hold_are_counted(run_corpus, write_jsonl, rows, monkeypatch):
    """Eight pairs of one document and 24 others: without a cap, several of the eight are in a batch."""
    texts = rows(32)
    for row in texts[:8]:
        row["document"] = texts[0]["document"]
    write_jsonl("alpha.jsonl", texts)
    alone = PACKINGS.replace('[[dataset]]\nname = "beta"\nsource = "beta.jsonl"\n', "")
    stages = ("pairs", "answers", "vectors", "clusters", "batches")
    original = stage_module.pack
    for without_caps in (False, True):
        if without_caps:
            monkeypatch.setattr(stage_module, "pack", lambda *arguments: original(*arguments[:-1]))
        for group_size in (8, 4, 1):
            changed = [f"pack.group_size={group_size}", f"pack.seed={3 * without_caps}"]
            batches, _, counts = tables_of(run_corpus(alone, overrides=changed, stages=stages), "alpha")
            held = batches.filter(pl.col("pair_id") < 8).group_by("packing", "batch").len()["len"]
            assert counts["crowding_pairs"] == sum(number - 2 for number in held if number > 2)
            assert (counts["crowding_pairs"] > 0) == without_caps


def test_the_first_of_several_packings_is_the_only_one_of_one(several):
    three = tables_of(several(), "alpha")[0]
    one = tables_of(several("pack.num_packings=1"), "alpha")[0]
    assert one.rows() == three.filter(packing=0).rows()
    second = tables_of(several("pack.num_packings=1", "pack.seed=1"), "alpha")[0]
    assert second.drop("packing").rows() == three.filter(packing=1).drop("packing").rows()


def test_remainders_are_mixed_packing_by_packing(several):
    plan = several("pack.remainder=mix", stages=None)
    batches, leftover, counts = tables_of(plan, "mixed")
    assert counts == {"packings": 3, "batches": 0, "pairs": 0, "leftover": {"remainder": 2 + 3}}
    plan = several("pack.remainder=mix", "pack.batch_size=16", stages=None)  # 10 + 11 are left
    batches, leftover, counts = tables_of(plan, "mixed")
    assert counts == {"packings": 3, "batches": 1, "pairs": 16, "leftover": {"remainder": 5}}
    for packing in range(3):
        parts = [tables_of(plan, domain)[1].filter(packing=packing, reason="mixed") for domain in ("alpha", "beta")]
        moved = {key for part in parts for key in part.select("domain", "pair_id").iter_rows()}
        found = [table.filter(packing=packing).select("domain", "pair_id").rows() for table in (batches, leftover)]
        assert len(moved) == 21 and moved == {*found[0], *found[1]} and len(found[0]) == 16
    index = pl.read_parquet(plan.shards / "index.parquet")
    assert index.group_by("packing").len().sort("packing").rows() == [(0, 7), (1, 7), (2, 7)]


def test_a_cluster_whose_pairs_have_no_surrogate_vector(run_corpus, write_jsonl, rows):
    """Six pairs without a word are in clusters of their own, by a prompt that only the clustering model gets."""
    texts = [*rows(42), *({"query": "?" * (i + 1), "document": f"!{'?' * i}"} for i in range(6))]
    write_jsonl("pairs.jsonl", texts)
    plan = run_corpus(
        'corpus = "c"\n[[dataset]]\nname = "d"\nsource = "pairs.jsonl"\n'
        "[pack]\nbatch_size = 8\n[cluster]\ncluster_size = 4\n"
        '[embed]\nmodel = "lexical"\nsurrogate_model = "lexical"\n'
        'query_prompt = "nothing asked"\ndocument_prompt = "nothing told"\n'
    )
    clusters = pl.read_parquet(next(s.path for s in plan.steps if s.stage == "clusters") / "clusters.parquet")
    wordless = clusters.filter(pl.col("pair_id") >= 42)["cluster_id"].unique()
    assert set(wordless) - set(clusters.filter(pl.col("pair_id") < 42)["cluster_id"])  # else this tests nothing
    batches, leftover, counts = tables_of(plan, "d")
    assert counts["leftover"] == {"remainder": 2, "invalid_vector": 6}
    assert sorted([*batches["pair_id"], *leftover["pair_id"]]) == list(range(48))


def test_weak_pairs_are_left_over_with_their_reason(run_corpus, write_jsonl, rows):
    """Every fifth document is swapped with that of the next one, so its words are those of another query."""
    texts = rows(45)
    swapped = list(range(0, 40, 5))
    for i in swapped:
        texts[i]["document"], texts[i + 1]["document"] = texts[i + 1]["document"], texts[i]["document"]
    write_jsonl("pairs.jsonl", texts)
    manifest = (
        'corpus = "c"\n[[dataset]]\nname = "d"\nsource = "pairs.jsonl"\n'
        '[embed]\nmodel = "lexical"\nsurrogate_model = "lexical"\n[pack]\nbatch_size = 8\n'
    )
    plan = run_corpus(manifest + "weak_pair_rank = 1\n")
    batches, leftover, counts = tables_of(plan, "d")
    path = next(step.path for step in plan.steps if step.stage == "consistency")
    ranks = load_consistency(path).rank
    weak = leftover.filter(reason="weak_pair")["pair_id"].to_list()
    assert weak == np.flatnonzero(ranks > 1).tolist() and {*swapped, *(i + 1 for i in swapped)} <= {*weak}
    assert counts["leftover"]["weak_pair"] == len(weak) < 45
    assert sorted([*batches["pair_id"], *leftover["pair_id"]]) == list(range(45))

    _, leftover, counts = tables_of(run_corpus(manifest), "d")
    assert counts["leftover"] == {"remainder": 45 % 8}

    # If they are most of the domain, the data card warns. If nothing is left, the error names the setting.
    for i in range(45):
        texts[i]["query"] += " " + texts[(i + 7) % 45]["document"]
    write_jsonl("pairs.jsonl", texts)
    card = (run_corpus(manifest + "weak_pair_rank = 1\n").shards / "README.md").read_text()
    assert "- warning: d: pack.weak_pair_rank leaves out" in card
    with pytest.raises(InputError, match=r"raise pack.weak_pair_rank, which leaves out \d\d of these"):
        run_corpus(manifest.replace("= 8", "= 32") + "weak_pair_rank = 1\n")
