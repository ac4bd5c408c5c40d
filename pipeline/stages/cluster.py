"""cluster: asymmetric K-Means of the pairs of a domain (Eq. 3): `folded`, or `doubled` as in the paper."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hardbatch.pipeline import schemas
from hardbatch.pipeline.arrays import Array
from hardbatch.pipeline.artifacts.artifact import read_artifact
from hardbatch.pipeline.artifacts.commit import ArtifactBuilder, write_unit
from hardbatch.pipeline.artifacts.snapshots import Snapshots
from hardbatch.pipeline.artifacts.vectors import FoldedPoints, load_pairs, open_vectors, write_array
from hardbatch.pipeline.batching.doubled import doubled_kmeans
from hardbatch.pipeline.batching.kmeans import Clustering, kmeans
from hardbatch.pipeline.batching.points import PairPoints
from hardbatch.pipeline.batching.two_level import two_level_kmeans
from hardbatch.pipeline.step import Executor, Progress, StageResult, Step


def build(step: Step, builder: ArtifactBuilder, executor: Executor, progress: Progress) -> StageResult:
    """Builds the `clusters` artifact of one domain; pairs without a vector get no cluster."""
    snapshots = Snapshots(builder.path / "snapshots")
    if not builder.committed("clusters"):
        progress.start(f"cluster {step.domain}", 1)
        pairs = load_pairs(read_artifact(step.inputs["pairs"]))
        vectors = open_vectors(step.inputs["vectors"])
        pair_ids = np.flatnonzero(~vectors.invalid_pairs(pairs))
        points = FoldedPoints(vectors=vectors, pairs=pairs, pair_ids=pair_ids)

        # The index of the GPU is in `runtime`, because keys are made of `config`.
        clustering = cluster(points, {**step.config, **step.runtime}, snapshots)
        _write(builder, pair_ids, clustering)
        progress.advance(1)
        progress.finish()
    snapshots.clear()

    versions = {name: importlib.metadata.version(name) for name in ("numpy", "torch")}
    if step.config["method"] == "doubled":
        versions["faiss"] = _faiss_version()
    return StageResult(units=["clusters"], counts=builder.unit_record("clusters").counts, produced_with=versions)


def cluster(points: PairPoints, config: dict[str, Any], snapshots: Snapshots | None = None) -> Clustering:
    """Clusters the pairs behind `points` by the settings of `ClusterConfig`, with k = ceil(n / cluster_size).

    With `folded`, it resumes from the snapshot of an earlier call and leaves its own there.
    """
    num_clusters = -(-len(points) // config["cluster_size"])
    if num_clusters == 0:
        empty = np.zeros((0, points.dimension), dtype=np.float32)
        return Clustering(labels=np.zeros(0, dtype=np.int32), centroids=empty, objective=[])

    settings = {name: config[name] for name in ("iterations", "seed")}
    if config["method"] == "doubled":
        return doubled_kmeans(points, num_clusters, restarts=config["restarts"], backend=config["backend"], **settings)

    snapshots = snapshots or Snapshots()
    settings.update({name: config[name] for name in ("tolerance", "balance", "device")})
    settings.update(on_iteration=snapshots.save, resume_from=snapshots.load())
    if num_clusters > config["two_level_above"]:
        return two_level_kmeans(points, num_clusters, **settings)
    return kmeans(points, num_clusters, **settings)


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
