"""consistency: the own score of each pair under the surrogate, and the rank of its document for its query.

A unit is `_UNIT_PAIRS` consecutive pairs. Every unit ranks against the same pool of documents.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hardbatch.pipeline import schemas
from hardbatch.pipeline.artifacts.answers import load_answers
from hardbatch.pipeline.artifacts.artifact import read_artifact
from hardbatch.pipeline.artifacts.commit import ArtifactBuilder, write_unit
from hardbatch.pipeline.artifacts.vectors import load_pairs, open_vectors
from hardbatch.pipeline.batching.consistency import (
    NO_RANK,
    draw_pool,
    own_scores,
    percentiles,
    rank_own_documents,
)
from hardbatch.pipeline.step import Executor, Progress, StageResult, Step, Unit, run_pending

_UNIT_PAIRS = 65_536
_BLOCK_PAIRS = 4_096  # pairs whose vectors are held at once


def build(step: Step, builder: ArtifactBuilder, executor: Executor, progress: Progress) -> StageResult:
    """Builds the `consistency` artifact of one domain.

    Its counts are the size of the pool, the percentiles of the own scores, and the percentiles of the ranks.
    """
    work = _Ranking(path=builder.path, inputs=step.inputs, pool=step.config["pool"], seed=step.config["seed"])
    num_pairs = read_artifact(step.inputs["pairs"]).manifest.counts["pairs"]
    units = [
        Unit(name=f"ranks-{number:05d}", group="pairs", start=start, stop=min(start + _UNIT_PAIRS, num_pairs))
        for number, start in enumerate(range(0, num_pairs, _UNIT_PAIRS))
    ]
    names = run_pending(builder, executor, work, units, progress, f"rank {step.domain}")

    # Quantiles need all pairs, so they come last; the floors of the shards are read from them.
    tables = [pq.read_table(builder.path / "ranks" / f"{name}.parquet") for name in names]
    table = pa.concat_tables(tables) if tables else schemas.CONSISTENCY.empty_table()
    ranks = table["rank"].to_numpy()
    is_ranked = ranks != NO_RANK
    return StageResult(
        units=names,
        counts={
            "pool": builder.unit_record(names[0]).counts["pool"] if names else 0,
            "own_score_percentiles": percentiles(table["own_score"].to_numpy()[is_ranked]),
            "rank_percentiles": percentiles(ranks[is_ranked]),
        },
    )


@dataclass(frozen=True, kw_only=True)
class _Ranking:
    path: Path
    inputs: dict[str, Path]
    pool: int
    seed: int

    def open(self) -> _RankingWorker:
        return _RankingWorker(self)


class _RankingWorker:
    def __init__(self, work: _Ranking) -> None:
        self._path = work.path
        self._pairs = load_pairs(read_artifact(work.inputs["pairs"]))
        self._vectors = open_vectors(work.inputs["vectors"])
        self._answers = load_answers(work.inputs["answers"], self._pairs).answers
        self._is_valid = ~self._vectors.invalid_pairs(self._pairs)

        # Hard negatives have rows too, but only documents of pairs are what a query competes for.
        documents = np.unique(self._pairs.document_row[self._is_valid])
        self._pool_rows = draw_pool(documents, work.pool, work.seed)
        self._pool_kD = self._vectors.documents.take(self._pool_rows)

    def prepare(self, unit: Unit) -> None:
        return None

    def commit(self, unit: Unit, prepared: None) -> None:
        own_score = np.zeros(unit.stop - unit.start, dtype=np.float32)
        rank = np.full(unit.stop - unit.start, NO_RANK, dtype=np.int32)
        valid = unit.start + np.flatnonzero(self._is_valid[unit.start : unit.stop])
        for start in range(0, len(valid), _BLOCK_PAIRS):
            pair_ids = valid[start : start + _BLOCK_PAIRS]
            query_rows = self._pairs.query_row[pair_ids]
            queries_mD = self._vectors.queries.take(query_rows)
            documents_mD = self._vectors.documents.take(self._pairs.document_row[pair_ids])
            own_score[pair_ids - unit.start] = own_scores(queries_mD, documents_mD)
            rank[pair_ids - unit.start] = rank_own_documents(
                queries_mD, documents_mD, query_rows, self._pool_kD, self._pool_rows, self._answers
            )

        with write_unit(self._path, unit.name) as writer:
            columns = {"pair_id": np.arange(unit.start, unit.stop), "own_score": own_score, "rank": rank}
            table = pa.table(columns, schema=schemas.CONSISTENCY)
            pq.write_table(table, writer.add_file(f"ranks/{unit.name}.parquet", rows=len(table)), compression="zstd")
            writer.counts = {"pool": len(self._pool_rows)}
