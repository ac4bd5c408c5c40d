"""Reads what the stage `consistency` wrote: how well each pair of a domain agrees with the surrogate.

Shape letter: n pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from hardbatch.pipeline.arrays import Array
from hardbatch.pipeline.artifacts.artifact import read_artifact


@dataclass(frozen=True, kw_only=True)
class Consistency:
    """The figures of the pairs of a domain, indexed by `pair_id`.

    Attributes:
        own_score: f(q, d) under the surrogate (float32, n); 0 for a pair without a vector.
        rank: Rank of the own document in the pool (int32, n); 0 for a pair without a vector.
    """

    own_score: Array
    rank: Array


def load_consistency(path: Path) -> Consistency:
    """Reads the `consistency` artifact at `path`, 8 bytes per pair."""
    files = read_artifact(path).files("ranks")
    table = pq.read_table(files, columns=["own_score", "rank"])
    return Consistency(own_score=table["own_score"].to_numpy(), rank=table["rank"].to_numpy())


def load_percentiles(path: Path) -> list[float]:
    """Reads the percentiles 0 to 100 of the own scores of a domain from the manifest at `path`, which opens no file."""
    percentiles: list[float] = read_artifact(path).manifest.counts["own_score_percentiles"]
    return percentiles
