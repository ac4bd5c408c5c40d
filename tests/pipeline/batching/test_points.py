"""Points by row, and their sums in partitions."""

from __future__ import annotations

import numpy as np

from hardbatch.pipeline.batching import points as module
from hardbatch.pipeline.batching.points import InMemory, Subset, cluster_sums, means_of_labels
from tests.pipeline.batching.examples import folded_points


def test_rows_of_points_in_memory_and_of_a_subset():
    points = folded_points(30)
    in_memory, rows = InMemory(points), np.array([4, 9, 9, 2])
    for asked in (rows, np.arange(5, 9), np.array([5, 7, 6, 8]), np.array([], dtype=np.int64)):
        assert np.array_equal(in_memory.take(asked), points[asked])
    subset = Subset(in_memory, rows)
    assert (len(subset), subset.dimension) == (4, 16)
    assert np.array_equal(subset.take(np.array([3, 0])), points[[2, 4]])


def test_sums_and_means_of_clusters(monkeypatch):
    points = folded_points(200)
    labels = np.random.default_rng(0).integers(0, 9, 200).astype(np.int32)
    expected = np.stack([points[labels == c].astype(np.float64).sum(0) for c in range(9)])
    monkeypatch.setattr(module, "_PARTITION_ROWS", 64)
    sums = cluster_sums(points, labels, 11)
    assert np.allclose(sums[:9], expected, atol=1e-4) and not sums[9:].any()
    means = means_of_labels(InMemory(points), labels, 9)
    assert means.dtype == np.float32
    assert np.allclose(means, expected / np.bincount(labels)[:, None], atol=1e-6)
