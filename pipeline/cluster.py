"""cluster: asymmetric K-Means of the pairs of a domain (Eq. 3), `folded` by default, `doubled` to the letter.

`doubled` clusters the two points d⊕q and q⊕d of each pair with FAISS, spherical as the reference does, all points
trained on, and gives a pair the cluster of its d⊕q. It holds 2n points of 2·D, and what they are
made from, in memory: 10·n·D float32; `folded` streams.
"""

from __future__ import annotations

import importlib.metadata
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import schemas
from pipeline.artifact import read_artifact
from pipeline.commit import ArtifactBuilder, write_unit
from pipeline.kmeans import Clustering, kmeans
from pipeline.points import means_of_labels, within_cluster_squares
from pipeline.snapshots import Snapshots
from pipeline.step import Built, Executor, Progress, Step
from pipeline.two_level import two_level_kmeans
from pipeline.vectors import Array, FoldedPoints, load_pairs, open_vectors, write_array


def build(step: Step, builder: ArtifactBuilder, executor: Executor, progress: Progress) -> Built:
    """Builds the `clusters` artifact of one domain; pairs without a vector get no cluster."""
    snapshots = Snapshots(builder.path / "snapshots")
    if not builder.committed("clusters"):
        progress.start(f"cluster {step.domain}", 1)
        pairs = load_pairs(read_artifact(step.inputs["pairs"]))
        vectors = open_vectors(step.inputs["vectors"])
        pair_ids = np.flatnonzero(~vectors.invalid_pairs(pairs))
        points = FoldedPoints(vectors=vectors, pairs=pairs, pair_ids=pair_ids)
        settings = {**step.config, **step.local}  # the number of the GPU is not in the key, so not in the config
        clustering = cluster(points, settings, snapshots)
        _write(builder, pair_ids, clustering)
        progress.advance(1)
        progress.finish()
    snapshots.clear()
    versions = {name: importlib.metadata.version(name) for name in ("numpy", "torch")}
    if step.config["method"] == "doubled":
        versions["faiss"] = _faiss_version()
    return Built(units=["clusters"], counts=builder.unit_record("clusters").counts, produced_with=versions)


def cluster(points: FoldedPoints, config: dict[str, Any], snapshots: Snapshots | None = None) -> Clustering:
    """Clusters the pairs behind `points` by the settings of `ClusterConfig`; k = ceil(n / cluster_size).

    Goes on from `snapshots` of the same clustering (`folded`), and leaves some there.
    """
    num_clusters = -(-len(points) // config["cluster_size"])
    if num_clusters == 0:
        empty = np.zeros((0, points.dimension), dtype=np.float32)
        return Clustering(labels=np.zeros(0, dtype=np.int32), centroids=empty, objective=[])
    settings = {name: config[name] for name in ("iterations", "seed")}
    if config["method"] == "doubled":
        return _doubled(points, num_clusters, restarts=config["restarts"], backend=config["backend"], **settings)
    settings.update({name: config[name] for name in ("tolerance", "balance", "device")})
    if num_clusters > config["two_level_above"]:
        return two_level_kmeans(points, num_clusters, snapshots=snapshots, **settings)
    return kmeans(points, num_clusters, snapshots=snapshots, **settings)


def _doubled(
    points: FoldedPoints, num_clusters: int, *, iterations: int, restarts: int, seed: int, backend: str
) -> Clustering:
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


def _write(builder: ArtifactBuilder, pair_ids: Array, clustering: Clustering) -> None:
    sizes = np.bincount(clustering.labels, minlength=1)
    with write_unit(builder.path, "clusters") as writer:
        table = pa.table({"pair_id": pair_ids, "cluster_id": clustering.labels}, schema=schemas.CLUSTERS)
        pq.write_table(table, writer.add_file("clusters.parquet", rows=len(table)), compression="zstd")
        write_array(writer.add_file("centroids.npy", rows=len(clustering.centroids)), clustering.centroids)
        objective = pa.table(
            {
                "level": clustering.levels,
                "iteration": np.arange(len(clustering.objective), dtype=np.int32),
                "objective": clustering.objective,
            },
            schema=schemas.OBJECTIVE,
        )
        pq.write_table(objective, writer.add_file("objective.parquet", rows=len(objective)))
        writer.counts = {
            "pairs": len(pair_ids),
            "clusters": len(clustering.centroids),
            "iterations": len(clustering.objective),
            **{f"cluster_size_q{q:02}": int(np.quantile(sizes, q / 100, method="lower")) for q in (5, 50, 95)},
            "largest_cluster": int(sizes.max()),
        }


def _faiss_version() -> str:
    import faiss

    return str(faiss.__version__)
