"""embed: the distinct texts of a domain → a `vectors` artifact, float16, one row per text.

A unit is `unit_rows` consecutive texts of one side. While a unit is computed, the next one is read and tokenised.
A text that an earlier artifact of the domain has a vector of, made with the same settings, is not encoded again: the
vector would be the same. So a source that grows by one file costs the new texts alone.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hardbatch.pipeline import schemas
from hardbatch.pipeline.arrays import Array
from hardbatch.pipeline.artifacts.artifact import MANIFEST, read_artifact, verify_artifact
from hardbatch.pipeline.artifacts.commit import ArtifactBuilder, write_unit
from hardbatch.pipeline.artifacts.vectors import KnownVectors, Texts, write_array
from hardbatch.pipeline.errors import IntegrityError
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
        known=_find_known(step),
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
    label = f"embed {step.domain} ({step.config['name']}), tokens"
    names = run_pending(builder, executor, work, units, progress, label, device=step.runtime["device"])

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


def _find_known(step: Step) -> tuple[Path, Path] | None:
    """The newest artifact of the domain with vectors of the same settings, and the pairs that it was made from."""
    found = []
    for path in step.path.parent.glob(f"*/{MANIFEST}"):
        try:
            manifest = read_artifact(path.parent).manifest
            pairs = step.inputs["pairs"].parent / manifest.inputs["pairs"]
        except (IntegrityError, KeyError):
            continue  # not of this version
        if manifest.stage_version == step.stage_version and _same_settings(manifest.config, step.config):
            found.append((path.stat().st_mtime_ns, path.parent, pairs))

    # What is damaged, or lacks its pairs, is not worth a message: its vectors are made once more.
    if not found:
        return None
    vectors, pairs = max(found)[1:]
    return None if verify_artifact(vectors) or verify_artifact(pairs) else (vectors, pairs)


def _same_settings(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Whether two configs give a text the same vector. The lexical encoder's depend on all texts of the domain."""
    one, other = (json.dumps({**config, "unit_rows": 0}, sort_keys=True) for config in (first, second))
    return one == other and first["name"] != "lexical"


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
    known: tuple[Path, Path] | None

    def open(self) -> _EmbeddingWorker:
        return _EmbeddingWorker(self)


class _EmbeddingWorker:
    def __init__(self, work: _Embedding) -> None:
        self._work = work
        pairs = read_artifact(work.pairs_path)
        self._texts = {side: Texts(pairs, side) for side in schemas.SIDES}
        self._known: tuple[str, KnownVectors] | None = None
        self._prompts = {"queries": work.spec.query_prompt, "documents": work.spec.document_prompt}
        # The lexical encoder takes its document frequencies from this domain, so it is loaded for each domain.
        if is_lexical(work.spec):
            documents = self._texts["documents"]
            starts = range(0, documents.num_rows, _TEXTS_PER_READ)
            corpus = (documents.take(np.arange(s, min(s + _TEXTS_PER_READ, documents.num_rows))) for s in starts)
            self._encoder = open_encoder(work.spec, corpus)
        else:
            self._encoder = _cached_encoder(work.spec)

    def prepare(self, unit: Unit) -> _Prepared:
        prompt = self._prompts[unit.group]
        texts = self._texts[unit.group].take(np.arange(unit.start, unit.stop))
        known = None
        if self._work.known is not None:
            known = self._open_known(unit.group).find(texts)
        return _Prepared(self._encoder.tokenize([prompt + text for text in texts] if prompt else texts), known)

    def commit(self, unit: Unit, prepared: _Prepared) -> None:
        vectors = self._encode(prepared)
        invalid = _invalid_rows(vectors, unit.start)
        with write_unit(self._work.path, unit.name) as writer:
            write_array(writer.add_file(f"vectors/{unit.name}.npy", rows=len(vectors)), vectors.astype(np.float16))
            limit = self._encoder.max_length
            writer.counts = {
                "dimension": vectors.shape[1],
                "invalid": invalid,
                "max_length_tokens": limit,
                "cut": sum(len(tokens) >= limit for tokens in prepared.tokens) if limit else 0,
            }

    def _encode(self, prepared: _Prepared) -> Array:
        if prepared.known is None or not prepared.known[0].any():
            return self._encoder.encode(prepared.tokens)
        is_known, known = prepared.known
        vectors = np.empty((len(is_known), known.shape[1]), dtype=np.float32)
        vectors[is_known] = known
        if not is_known.all():
            vectors[~is_known] = self._encoder.encode([prepared.tokens[i] for i in np.flatnonzero(~is_known)])
        return vectors

    def _open_known(self, side: str) -> KnownVectors:
        """The known vectors of a side. Units come a side at a time, so one is held."""
        if self._known is None or self._known[0] != side:
            assert self._work.known is not None
            vectors, pairs = map(read_artifact, self._work.known)
            self._known = (side, KnownVectors(vectors, pairs, side))
        return self._known[1]


@dataclass(frozen=True)
class _Prepared:
    """The tokens of a unit's texts, and what `KnownVectors.find` says of them if there are known vectors."""

    tokens: Any
    known: tuple[Array, Array] | None


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
