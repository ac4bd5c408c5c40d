"""embed: the distinct texts of a domain → a `vectors` artifact, float16, one row per text.

A unit is `unit_rows` consecutive texts of one side. While a unit is computed, the next one is read and tokenised.
"""

from __future__ import annotations

import importlib.metadata
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hardbatch.pipeline import schemas
from hardbatch.pipeline.arrays import Array
from hardbatch.pipeline.artifacts.artifact import read_artifact
from hardbatch.pipeline.artifacts.commit import ArtifactBuilder, write_unit
from hardbatch.pipeline.artifacts.vectors import Texts, write_array
from hardbatch.pipeline.models.encoders import Encoder, is_lexical, open_encoder
from hardbatch.pipeline.models.resolve import ModelSpec
from hardbatch.pipeline.step import Executor, Progress, StageResult, Step, Unit, run_pending

_TEXTS_PER_READ = 8_192
_TEXTS_PER_ESTIMATE = 64
_CHARACTERS_PER_TOKEN = 4
_USUAL_MAX_LENGTH_TOKENS = 512


def build(step: Step, builder: ArtifactBuilder, executor: Executor, progress: Progress) -> StageResult:
    """Builds the `vectors` artifact of one domain with one model; see `docs/artifacts.md` for its files."""
    config = dict(step.config)
    unit_rows = config.pop("unit_rows")
    work = _Embedding(
        path=builder.path,
        pairs_path=step.inputs["pairs"],
        spec=ModelSpec(**config, location=step.runtime["model"], runs_on=step.runtime["device"]),
    )
    pairs = read_artifact(step.inputs["pairs"])
    counts = pairs.manifest.counts
    units = []
    for side in schemas.SIDES:
        texts = Texts(pairs, side)
        for number, start in enumerate(range(0, counts[side], unit_rows)):
            stop = min(start + unit_rows, counts[side])
            tokens = _estimate_tokens(texts, start, stop, work.spec.max_length_tokens)
            units.append(Unit(name=f"{side}-{number:07d}", group=side, start=start, stop=stop, work=tokens))
    names = run_pending(
        builder, executor, work, units, progress, f"embed {step.domain} ({step.config['name']}), tokens"
    )

    # Every unit lists its rows without a vector; together they are one more unit, a table per side.
    made = [(unit.group, builder.unit_record(unit.name).counts) for unit in units]
    reasons = Counter[str]()
    with write_unit(builder.path, "invalid") as writer:
        for side in schemas.SIDES:
            invalid = [
                {"row": row, "reason": reason}
                for group, unit_counts in made
                for row, reason in unit_counts["invalid"]
                if group == side
            ]
            reasons.update(row["reason"] for row in invalid)
            table = pa.Table.from_pylist(invalid, schemas.INVALID_ROWS)
            pq.write_table(table, writer.add_file(f"invalid-{side}.parquet", rows=len(invalid)))
    libraries = ["sentence-transformers", "torch", "transformers"]
    if is_lexical(work.spec):
        libraries = ["numpy", "scikit-learn", "scipy"]
    cut = Counter[str]()
    for group, unit_counts in made:
        cut[f"{group}_cut"] += unit_counts.get("cut", 0)  # units of an older version do not count it
    return StageResult(
        units=[*names, "invalid"],
        counts={
            "dimension": made[-1][1]["dimension"] if made else 0,
            "zero_vector": reasons["zero_vector"],
            "nan_vector": reasons["nan_vector"],
            "max_length_tokens": max((unit_counts.get("max_length_tokens", 0) for _, unit_counts in made), default=0),
            **{side: counts[side] for side in schemas.SIDES},
            **{f"{side}_cut": cut[f"{side}_cut"] for side in schemas.SIDES},
        },
        produced_with={name: importlib.metadata.version(name) for name in libraries},
    )


def _estimate_tokens(texts: Texts, start: int, stop: int, max_length: int | None) -> int:
    """About how many tokens rows `start` to `stop` have, from the lengths of a few of them.

    Progress counts these and not texts: queries come first and are short, so that texts per second promise too much.
    """
    rows = np.unique(np.linspace(start, stop - 1, _TEXTS_PER_ESTIMATE, dtype=np.int64))
    lengths = np.array([len(text) for text in texts.take(rows)]) / _CHARACTERS_PER_TOKEN + 2
    return max(1, round(float(lengths.clip(max=max_length or _USUAL_MAX_LENGTH_TOKENS).mean()) * (stop - start)))


@dataclass(frozen=True, kw_only=True)
class _Embedding:
    path: Path
    pairs_path: Path
    spec: ModelSpec

    def open(self) -> _EmbeddingWorker:
        return _EmbeddingWorker(self)


class _EmbeddingWorker:
    def __init__(self, work: _Embedding) -> None:
        self._work = work
        pairs = read_artifact(work.pairs_path)
        self._texts = {side: Texts(pairs, side) for side in schemas.SIDES}
        self._prompts = {"queries": work.spec.query_prompt, "documents": work.spec.document_prompt}
        # The lexical encoder takes its document frequencies from this domain, so it is loaded for each domain.
        if is_lexical(work.spec):
            documents = self._texts["documents"]
            starts = range(0, documents.num_rows, _TEXTS_PER_READ)
            corpus = (documents.take(np.arange(s, min(s + _TEXTS_PER_READ, documents.num_rows))) for s in starts)
            self._encoder = open_encoder(work.spec, corpus)
        else:
            self._encoder = _cached_encoder(work.spec)

    def prepare(self, unit: Unit) -> Any:
        prompt = self._prompts[unit.group]
        texts = self._texts[unit.group].take(np.arange(unit.start, unit.stop))
        return self._encoder.tokenize([prompt + text for text in texts] if prompt else texts)

    def commit(self, unit: Unit, prepared: Any) -> None:
        vectors = self._encoder.encode(prepared)
        invalid = _invalid_rows(vectors, unit.start)
        with write_unit(self._work.path, unit.name) as writer:
            write_array(writer.add_file(f"vectors/{unit.name}.npy", rows=len(vectors)), vectors.astype(np.float16))
            limit = self._encoder.max_length
            writer.counts = {
                "dimension": vectors.shape[1],
                "invalid": invalid,
                "max_length_tokens": limit,
                "cut": sum(len(tokens) >= limit for tokens in prepared) if limit else 0,
            }


@lru_cache(maxsize=2)
def _cached_encoder(spec: ModelSpec) -> Encoder:
    """The encoder of `spec`, which is loaded once per process however many domains there are."""
    return open_encoder(spec)


def _invalid_rows(vectors: Array, start: int) -> list[tuple[int, str]]:
    """(row, reason) of the rows that are not finite or zero; those that are not finite are set to zero."""
    is_nan = np.asarray(~np.isfinite(vectors).all(axis=1))
    vectors[is_nan] = 0
    is_zero = ~vectors.any(axis=1)
    return [(start + int(row), "nan_vector" if is_nan[row] else "zero_vector") for row in np.flatnonzero(is_zero)]
