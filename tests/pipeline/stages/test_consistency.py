"""The stage `consistency` against a loop over the texts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hardbatch.pipeline.artifacts.artifact import read_artifact
from hardbatch.pipeline.artifacts.commit import open_builder
from hardbatch.pipeline.artifacts.consistency import Consistency, load_consistency, load_percentiles
from hardbatch.pipeline.progress import SilentProgress
from hardbatch.pipeline.stages import consistency
from hardbatch.pipeline.step import InlineExecutor, Step
from tests.artifacts import NO_VECTOR, Domain, make_domain, vector_of

# Queries and documents repeat, one pair has no vector, and "far" is only a hard negative.
PAIRS = [(f"q{i % 17}", f"d{i % 11}") for i in range(40)]
DOMAIN = Domain(pairs=[*PAIRS, ("q1", NO_VECTOR)], negatives=[["far"]] * 41)


def run_stage(folder: Path, pool: int) -> Path:
    """Runs the stage on DOMAIN; returns the artifact's folder."""
    inputs = make_domain(folder, "plain", DOMAIN)
    path = folder / "ranked" / "plain" / "key"
    step = Step(
        stage="consistency",
        stage_version=0,
        domain="plain",
        key="key",
        path=path,
        config={"pool": pool, "seed": 0},
        inputs={
            "pairs": inputs["pairs/plain"],
            "vectors": inputs["surrogate/plain"],
            "answers": inputs["answers/plain"],
        },
    )
    with open_builder(path) as builder:
        built = consistency.build(step, builder, InlineExecutor(), SilentProgress())
        builder.finish(
            units=built.units, stage="consistency", stage_version=0, domain="plain", key="key", config=step.config,
            inputs={}, counts=built.counts,
        )  # fmt: skip
    return path


def brute_force() -> Consistency:
    """Own scores and ranks by a loop in float64."""
    vectors = {text: vector_of(text, "surrogate").astype(np.float64) for pair in DOMAIN.pairs for text in pair}
    documents = {document for _, document in PAIRS}
    own, rank = [], []
    for query, document in DOMAIN.pairs:
        score = float(vectors[query] @ vectors[document])
        better = [other for other in documents if vectors[query] @ vectors[other] > score]
        own.append(score)
        rank.append(0 if document == NO_VECTOR else 1 + sum((query, other) not in DOMAIN.pairs for other in better))
    return Consistency(own_score=np.array(own, dtype=np.float32), rank=np.array(rank))


@pytest.mark.parametrize("unit_pairs", [65_536, 7])
def test_scores_and_ranks_are_those_of_a_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unit_pairs: int) -> None:
    monkeypatch.setattr(consistency, "_UNIT_PAIRS", unit_pairs)
    path = run_stage(tmp_path, pool=100)
    found, expected = load_consistency(path), brute_force()
    assert found.rank.tolist() == expected.rank.tolist() and found.rank.max() > 3
    assert np.allclose(found.own_score, expected.own_score, atol=1e-7)

    counts = read_artifact(path).manifest.counts
    assert counts["pool"] == 11
    assert np.allclose(load_percentiles(path), np.percentile(expected.own_score[:40], range(101)), atol=1e-6)
    assert counts["rank_percentiles"][100] == expected.rank.max() and counts["rank_percentiles"][0] == 1


def test_a_smaller_pool_ranks_no_pair_worse(tmp_path: Path) -> None:
    whole, sampled = (load_consistency(run_stage(tmp_path / str(pool), pool)) for pool in (100, 4))
    assert (sampled.rank <= whole.rank).all() and sampled.rank.max() <= 5 < whole.rank.max()
    assert np.array_equal(sampled.own_score, whole.own_score)
