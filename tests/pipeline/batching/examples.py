"""Pairs about topics, what every clustering of them must be, and what their batches are worth."""

from __future__ import annotations

import numpy as np
import pytest


def folded_points(num_points, dimension=16, seed=0, num_topics=12, spread=4.0):
    """s = d + q of pairs about topics, some of which are much more frequent.

    `spread` is the distance of a pair to its topic.
    """
    generator = np.random.default_rng(seed)
    topics = generator.standard_normal((num_topics, dimension)) / dimension**0.5
    often = 1 / np.arange(1, num_topics + 1)
    topic = generator.choice(num_topics, num_points, p=often / often.sum())
    sides = topics[topic] + spread / dimension**0.5 * generator.standard_normal((2, num_points, dimension))
    sides /= np.linalg.norm(sides, axis=2, keepdims=True)
    return sides.astype(np.float16).astype(np.float32).sum(0)


def topical_sides(topic, dimension, spread, seed=0):
    """Unit d and q of pairs about the topics (float32, 2 × n × D); `spread` is the distance of a pair to its topic."""
    generator = np.random.default_rng(seed)
    topics = generator.standard_normal((int(topic.max(initial=0)) + 1, dimension)) / dimension**0.5
    sides = topics[topic] + spread / dimension**0.5 * generator.standard_normal((2, len(topic), dimension))
    return (sides / np.linalg.norm(sides, axis=2, keepdims=True)).astype(np.float32)


def equation_2(documents, queries, batches):
    """Σ d_i·q_j over the ordered pairs i ≠ j of each batch, in float64."""
    value = 0.0
    for batch in batches:
        products = documents[batch].astype(np.float64) @ queries[batch].astype(np.float64).T
        value += products.sum() - np.trace(products)
    return float(value)


def assert_sound(clustering, points):
    """Labels are compact, no cluster is empty, centroids are means, the last objective is that of labels and means."""
    num_clusters = len(clustering.centroids)
    assert clustering.labels.shape == (len(points),) and clustering.labels.dtype == np.int32
    assert set(clustering.labels.tolist()) == set(range(num_clusters))
    assert clustering.centroids.shape == (num_clusters, points.shape[1]) and clustering.centroids.dtype == np.float32
    assert clustering.prices.shape == (num_clusters,) and np.isfinite(clustering.prices).all()
    assert clustering.levels == sorted(clustering.levels) and len(clustering.levels) == len(clustering.objective)
    means = np.zeros(clustering.centroids.shape)
    np.add.at(means, clustering.labels, points.astype(np.float64))
    means /= np.bincount(clustering.labels)[:, None]
    assert np.allclose(clustering.centroids, means, atol=1e-4)  # equal points are summed in float32
    expected = ((points - means[clustering.labels]) ** 2).sum()
    whole = float((points.astype(np.float64) ** 2).sum())
    assert clustering.objective[-1] == pytest.approx(expected, rel=1e-5, abs=2e-5 * whole)
