"""K-Means of doubled points: Eq. 3 as in the paper.

Clusters the two points d⊕q and q⊕d of each pair with FAISS, spherical as in the authors' code, and gives a
pair the cluster of its d⊕q. Unlike folded K-Means it does not stream: it holds 2n points of 2·D and what they
are made from, 10·n·D float32 values.

Shape letters: n pairs, D dimension.
"""

from __future__ import annotations

import numpy as np

from hardbatch.pipeline.batching.kmeans import Clustering
from hardbatch.pipeline.batching.points import PairPoints, means_of_labels, within_cluster_squares


def doubled_kmeans(
    points: PairPoints, num_clusters: int, *, iterations: int, restarts: int, seed: int, backend: str
) -> Clustering:
    """Clusters pairs with FAISS.

    Args:
        points: The pairs.
        num_clusters: k; empty clusters are dropped.
        iterations: Of each start.
        restarts: How many starts are made; the best is taken.
        seed: Of the starts.
        backend: `faiss-cpu` or `faiss-gpu`.
    """
    import faiss

    documents, queries = points.sides(np.arange(len(points)))
    forward = np.concatenate([documents, queries], axis=1)
    doubled = np.concatenate([forward, np.concatenate([queries, documents], axis=1)])
    doubled /= np.linalg.norm(doubled, axis=1, keepdims=True)

    # Set after construction, max_points_per_centroid has no effect, and only 256 per centroid are trained on.
    trainer = faiss.Kmeans(
        doubled.shape[1],
        num_clusters,
        niter=iterations,
        nredo=restarts,
        seed=seed,
        spherical=True,
        gpu=backend == "faiss-gpu",
        min_points_per_centroid=1,
        max_points_per_centroid=len(doubled),
    )
    trainer.train(doubled)

    _, labels = trainer.index.search(np.ascontiguousarray(doubled[: len(points)]), 1)
    used, compact = np.unique(labels[:, 0], return_inverse=True)
    compact = compact.astype(np.int32)
    centroids = means_of_labels(points, compact, len(used))
    return Clustering(
        labels=compact,
        centroids=centroids,
        objective=[within_cluster_squares(points, compact, centroids)],  # that of FAISS depends on its threads
        levels=[1],
    )
