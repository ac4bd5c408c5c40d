"""measure: the bounds that the hardness of batches is measured against; they depend on vectors and B alone."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np

from hardbatch.pipeline.artifacts.artifact import read_artifact
from hardbatch.pipeline.artifacts.commit import ArtifactBuilder, write_unit
from hardbatch.pipeline.artifacts.vectors import FoldedPoints, load_pairs, open_vectors
from hardbatch.pipeline.batching.hardness import measure_bounds
from hardbatch.pipeline.step import Executor, Progress, StageResult, Step


def build(step: Step, builder: ArtifactBuilder, executor: Executor, progress: Progress) -> StageResult:
    """Builds the `hardness` artifact of one domain.

    Its counts are `random` and `knn`; there are none if the domain has fewer than B pairs.
    """
    if not builder.committed("bounds"):
        progress.start(f"measure {step.domain}", 1)
        pairs = load_pairs(read_artifact(step.inputs["pairs"]))
        vectors = open_vectors(step.inputs["vectors"])
        points = FoldedPoints(vectors=vectors, pairs=pairs, pair_ids=np.flatnonzero(~vectors.invalid_pairs(pairs)))
        bounds = measure_bounds(
            points, step.config["batch_size"], num_anchors=step.config["anchors"], seed=step.config["seed"]
        )
        with write_unit(builder.path, "bounds") as writer:
            writer.counts = asdict(bounds) if bounds else {}
        progress.advance(1)
        progress.finish()
    return StageResult(units=["bounds"], counts=builder.unit_record("bounds").counts)
