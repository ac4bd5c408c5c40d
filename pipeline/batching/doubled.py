"""K-Means of doubled points, Eq. 3 to the letter.

Clusters the two points d⊕q and q⊕d of each pair with FAISS, spherical as the reference does, all points
trained on, and gives a pair the cluster of its d⊕q. It holds 2n points of 2·D, and what they are
made from, in memory: 10·n·D float32; `folded` streams.
"""

from __future__ import annotations

import numpy as np

from hardbatch.pipeline.batching.kmeans import Clustering
from hardbatch.pipeline.batching.points import PairPoints, means_of_labels, within_cluster_squares


def doubled_kmeans(
    points: PairPoints, num_clusters: int, *, iterations: int, restarts: int, seed: int, backend: str
) -> Clustering:
    """Clusters the pairs behind `points` on FAISS; `backend` is `faiss-cpu` or `faiss-gpu`."""
    import faiss

    documents, queries = points.sides(np.arange(len(points)))
    forward = np.concatenate([documents, queries], axis=1)
    doubled = np.concatenate([forward, np.concatenate([queries, documents], axis=1)])
    doubled /= np.linalg.norm(doubled, axis=1, keepdims=True)
    trainer = faiss.Kmeans(
        doubled.shape[1],
        num_clusters,
        niter=iterations,
        nredo=restarts,
        seed=seed,
        spherical=True,
        gpu=backend == "faiss-gpu",
        min_points_per_centroid=1,
        max_points_per_centroid=len(doubled),  # in the constructor: set later it has no effect, and 256 are trained on
    )
    trainer.train(doubled)
    _, labels = trainer.index.search(np.ascontiguousarray(doubled[: len(points)]), 1)
    used, compact = np.unique(labels[:, 0], return_inverse=True)
    compact = compact.astype(np.int32)
    centroids = means_of_labels(points, compact, len(used))
    return Clustering(
        labels=compact,
        centroids=centroids,
        objective=[within_cluster_squares(points, compact, centroids)],  # FAISS's own depends on its threads
        levels=[1],
    )
