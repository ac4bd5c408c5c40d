"""Asymmetric K-Means: what `folded` promises about Eq. 3, and `doubled` on FAISS."""

from __future__ import annotations

import importlib.util

import numpy as np
import pyarrow.parquet as pq
import pytest

from hardbatch.pipeline.artifacts.artifact import read_artifact
from hardbatch.pipeline.artifacts.vectors import load_pairs, open_vectors
from hardbatch.pipeline.errors import HardbatchError
from hardbatch.pipeline.run import plan_corpus
from hardbatch.pipeline.stages.cluster import cluster
from tests.samples import Sides


@pytest.fixture(params=["folded", "doubled"])
def method(request):
    """Either method, if it is installed."""
    if request.param == "doubled":
        pytest.importorskip("faiss", reason="doubled needs FAISS: pip install 'hardbatch[cpu]'")
    return request.param


def make_sides(num_pairs, dimension=12, num_topics=10, seed=0, offset=0.0):
    """Pairs about some topics; `offset` moves all queries away from all documents, as real models do."""
    generator = np.random.default_rng(seed)
    topics = generator.standard_normal((num_topics, dimension))[np.arange(num_pairs) % num_topics]
    found = []
    for sign in (1, -1):
        side = topics + 0.4 * generator.standard_normal((num_pairs, dimension))
        side[:, 0] += sign * offset
        found.append((side / np.linalg.norm(side, axis=1, keepdims=True)).astype(np.float16).astype(np.float32))
    return Sides(*found)


def settings(method="folded", cluster_size=10, **changes):
    chosen = {"method": method, "cluster_size": cluster_size, "iterations": 30, "seed": 0}
    if method == "folded":
        chosen |= {"tolerance": 0.0, "balance": 0.0, "two_level_above": 1_024, "device": "cpu"}
    else:
        chosen |= {"restarts": 2, "backend": "faiss-cpu"}
    return chosen | changes


def equation_3(points, centroids):
    """‖d−a‖² + ‖q−a‖² of each pair and swap-symmetric centroid (a, a), in float64."""
    sides = np.stack([points.documents, points.queries]).astype(float)[:, :, None]
    return ((sides - centroids.astype(float) / 2) ** 2).sum((0, 3))


def test_folded_puts_each_pair_where_equation_3_is_least():
    points = make_sides(120)
    found = cluster(points, settings(iterations=200))
    costs = equation_3(points, found.centroids)
    own = costs[np.arange(120), found.labels]
    assert (own <= costs.min(1) + 1e-5).all()
    assert (costs.max(1) - own > 0.1).mean() > 0.9


def test_folded_centroids_minimise_equation_3_for_their_pairs():
    points = make_sides(60)
    found = cluster(points, settings())
    generator = np.random.default_rng(0)
    least = equation_3(points, found.centroids)[np.arange(60), found.labels].sum()
    for _ in range(20):
        moved = found.centroids + 0.05 * generator.standard_normal(found.centroids.shape)
        assert equation_3(points, moved)[np.arange(60), found.labels].sum() > least


def assert_means(centroids, labels, points):
    """Labels are those of centroids, each of which is the mean of d + q of its pairs."""
    assert set(labels.tolist()) == set(range(len(centroids)))
    for label, centroid in enumerate(centroids):
        assert np.allclose(centroid, points[labels == label].mean(0), atol=1e-5)


@pytest.mark.parametrize("num_pairs", [1, 2, 9, 10, 11, 105])
def test_labels_are_compact_and_centroids_means(method, num_pairs):
    points = make_sides(num_pairs)
    found = cluster(points, settings(method))
    assert found.labels.dtype == np.int32 and found.labels.shape == (num_pairs,)
    assert len(found.centroids) <= -(-num_pairs // 10)
    assert_means(found.centroids, found.labels, points.take(np.arange(num_pairs)))


def test_no_pairs(method):
    found = cluster(make_sides(0), settings(method))
    assert found.labels.shape == (0,) and found.centroids.shape == (0, 12) and found.objective == []


def test_topics_are_found(method):
    points = make_sides(200, num_topics=10)
    labels = cluster(points, settings(method, cluster_size=20)).labels
    topics = np.arange(200) % 10
    same = topics[:, None] == topics[None, :]
    together = labels[:, None] == labels[None, :]
    assert together[same].mean() > 0.6
    assert together[~same].mean() < 0.15


def test_doubled_trains_on_all_points_of_both_orientations(monkeypatch):
    faiss = pytest.importorskip("faiss", reason="doubled needs FAISS: pip install 'hardbatch[cpu]'")
    seen = {}
    inner = faiss.Kmeans

    class Recorded(inner):
        def train(self, points, *arguments, **keywords):
            seen["points"], seen["limit"] = points.copy(), self.cp.max_points_per_centroid
            seen["spherical"], seen["restarts"], seen["iterations"] = self.cp.spherical, self.cp.nredo, self.cp.niter
            return super().train(points, *arguments, **keywords)

    monkeypatch.setattr(faiss, "Kmeans", Recorded)
    points = make_sides(1_200, dimension=4)
    cluster(points, settings("doubled", cluster_size=1_200, iterations=7))  # one centroid: FAISS would sample 256
    assert seen["points"].shape == (2_400, 8)
    assert seen["limit"] * 1 >= 2_400
    assert (seen["spherical"], seen["restarts"], seen["iterations"]) == (True, 2, 7)
    assert np.allclose(np.linalg.norm(seen["points"], axis=1), 1, atol=1e-5)
    documents, queries = points.sides(np.arange(1_200))
    scaled = seen["points"] * np.sqrt(2)
    assert np.allclose(scaled[:1_200], np.concatenate([documents, queries], axis=1), atol=1e-3)
    assert np.allclose(scaled[1_200:], np.concatenate([queries, documents], axis=1), atol=1e-3)


def test_folded_keeps_its_clusters_if_queries_are_far_from_documents():
    assert len(cluster(make_sides(400, offset=2.0), settings()).centroids) == 40


@pytest.mark.parametrize("balance", [0.0, 0.02])
def test_many_clusters_are_found_in_two_levels(balance):
    points = make_sides(300)
    found = cluster(points, settings(two_level_above=29, balance=balance))
    assert 2 in found.levels
    assert 2 not in cluster(points, settings(two_level_above=30, balance=balance)).levels
    assert set(found.labels.tolist()) == set(range(30)) and len(found.centroids) == 30


@pytest.mark.parametrize("two_level_above", [1, 1_024])
def test_balance_evens_the_sizes_of_clusters(two_level_above):
    points = make_sides(2_000, num_topics=2_000, dimension=16)
    ratios = []
    for seed in range(3):
        both = {"cluster_size": 20, "two_level_above": two_level_above, "seed": seed}
        plain, balanced = (np.bincount(cluster(points, settings(balance=b, **both)).labels) for b in (0.0, 0.02))
        assert len(plain) == len(balanced) == 100
        ratios.append(balanced.std() / plain.std())
    assert np.mean(ratios) < 0.8


def test_the_seed_decides(method):
    points = make_sides(300, num_topics=300)
    first, again, other = (cluster(points, settings(method, seed=seed)).labels for seed in (0, 0, 5))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_artifact_of_a_domain(run_corpus, write_jsonl, rows, method):
    texts = rows(40)
    texts[7]["query"] = "?"  # no word: no lexical vector
    write_jsonl("pairs.jsonl", texts)
    plan = run_corpus(
        'corpus = "c"\n[[dataset]]\nname = "d"\nsource = "pairs.jsonl"\n[pack]\nbatch_size = 8\n'
        f'[cluster]\nmethod = "{method}"\n',
        stages=("pairs", "vectors", "clusters"),
    )
    step = next(step for step in plan.steps if step.stage == "clusters")
    artifact = read_artifact(step.path)
    table = pq.read_table(step.path / "clusters.parquet")
    centroids = np.load(step.path / "centroids.npy")
    assert table["pair_id"].to_pylist() == [i for i in range(40) if i != 7]
    assert artifact.manifest.counts["pairs"] == 39
    assert artifact.manifest.counts["clusters"] == len(centroids) <= 5
    sizes = np.sort(np.bincount(table["cluster_id"].to_numpy()))
    assert artifact.manifest.counts["largest_cluster"] == sizes[-1]
    quantiles = [artifact.manifest.counts[f"cluster_size_q{q:02}"] for q in (5, 50, 95)]
    assert quantiles == [sizes[int(q / 100 * (len(sizes) - 1))] for q in (5, 50, 95)]
    objective = pq.read_table(step.path / "objective.parquet")
    assert len(objective) == artifact.manifest.counts["iterations"] > 0
    pairs, vectors = load_pairs(read_artifact(step.inputs["pairs"])), open_vectors(step.inputs["vectors"])
    sums = vectors.documents.take(pairs.document_row) + vectors.queries.take(pairs.query_row)
    assert_means(centroids, table["cluster_id"].to_numpy(), sums[table["pair_id"].to_numpy()])
    assert ("faiss" in artifact.manifest.produced_with) == (method == "doubled")


def test_doubled_without_faiss_is_refused_before_anything_runs(monkeypatch, small_manifest, tmp_path):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "faiss" else find_spec(name))
    with pytest.raises(HardbatchError, match=r"pip install faiss-cpu"):
        plan_corpus(small_manifest, tmp_path / "workspace", overrides=["cluster.method=doubled"])
