"""Tiny artifacts made by hand: what the stages before `write` would leave, with vectors that depend on the text alone.

Shape letters: M batches of a packing, B slots of a batch, D dimension.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from hardbatch.pipeline import schemas
from hardbatch.pipeline.artifacts.artifact import read_artifact
from hardbatch.pipeline.artifacts.commit import open_builder, write_unit
from hardbatch.pipeline.artifacts.vectors import write_array
from hardbatch.pipeline.progress import SilentProgress
from hardbatch.pipeline.stages import write
from hardbatch.pipeline.step import InlineExecutor, Step

NO_VECTOR = "?"  # the text that has no vector
_DIMENSION = 6
_VECTORS_PER_FILE = 8


def make_artifact(path: Path, files: Mapping[str, pa.Table | np.ndarray], **manifest: Any) -> Path:
    """An artifact of one unit with these files; `manifest` holds its config and its counts."""
    with open_builder(path) as builder:
        with write_unit(path, "all") as writer:
            for name, content in files.items():
                file = writer.add_file(name, rows=len(content))
                if isinstance(content, np.ndarray):
                    write_array(file, content)
                elif name.endswith(".arrow"):
                    with pa.ipc.new_file(file, content.schema) as stream:
                        stream.write_table(content)
                else:
                    pq.write_table(content, file)
        fixed = {"stage": "test", "stage_version": 0, "domain": path.parent.name, "key": path.name}
        builder.finish(**{"units": ["all"], "config": {}, "inputs": {}, **fixed, **manifest})
    return path


def vector_of(text: str, model: str) -> np.ndarray:
    """The unit vector of a text under a model, `vectors` or `surrogate` (float16, D); zeros for NO_VECTOR."""
    numbers = np.random.default_rng(zlib.crc32(f"{model} {text}".encode())).standard_normal(_DIMENSION)
    return (numbers / np.linalg.norm(numbers) * (text != NO_VECTOR)).astype(np.float16)


@dataclass(frozen=True, kw_only=True)
class Domain:
    """The (query, document) of each pair, and the hard negatives of each pair if there are any."""

    pairs: Sequence[tuple[str, str]]
    negatives: Sequence[Sequence[str]] | None = None
    query_prompt: str = ""
    licence: str = ""

    def texts(self, side: str) -> list[str]:
        """The distinct texts of a side, in the order in which they are numbered."""
        if side == "queries":
            return list(dict.fromkeys(query for query, _ in self.pairs))
        negatives = self.negatives or [()] * len(self.pairs)
        texts = ([document, *some] for (_, document), some in zip(self.pairs, negatives, strict=True))
        return list(dict.fromkeys(text for group in texts for text in group))


def own_scores(domain: Domain) -> list[float]:
    """The surrogate's score of the document of each pair that has vectors, for its query."""
    vectors = [[vector_of(text, "surrogate").astype(np.float64) for text in pair] for pair in domain.pairs]
    return [float(query @ document) for query, document in vectors if query.any() and document.any()]


def make_domain(folder: Path, name: str, domain: Domain) -> dict[str, Path]:
    """The artifacts of a domain that writing reads, apart from its batches; by the name of the input."""
    texts = {side: domain.texts(side) for side in schemas.SIDES}
    queries, documents = ({text: row for row, text in enumerate(texts[side])} for side in schemas.SIDES)
    numbers = range(len(domain.pairs))
    pairs: dict[str, Any] = {
        "pair_id": numbers,
        "query_row": [queries[query] for query, _ in domain.pairs],
        "document_row": [documents[document] for _, document in domain.pairs],
        "source_file": [0] * len(numbers),
        "source_row": numbers,
    }
    if domain.negatives is not None:
        pairs["negative_rows"] = [[documents[text] for text in some] for some in domain.negatives]
    schema = schemas.PAIRS if domain.negatives is None else schemas.PAIRS_WITH_NEGATIVES
    tables = {"pairs.parquet": pa.table({key: list(value) for key, value in pairs.items()}, schema)}
    for side in schemas.SIDES:
        tables[f"texts/{side}-00000.arrow"] = pa.table({"text": texts[side]}, schemas.TEXTS)
    counts = {
        "rows": len(numbers) + 1,
        "pairs": len(numbers),
        "quarantined": {"empty": 1},
        "negatives": len(schema) - 5,
    }
    counts |= dict.fromkeys(("held_out", "holdout_target", "texts_cut", "negatives_dropped"), 0)
    classes = {f"{side}.npy": np.arange(len(texts[side])) for side in schemas.SIDES}
    percentiles = np.percentile(own_scores(domain), range(101)).tolist()
    measured = {"own_score_percentiles": percentiles, "rank_percentiles": [1.0] * 101}
    found = {
        "consistency": make_artifact(folder / "consistency" / name / "key", {}, counts=measured),
        "answers": make_artifact(folder / "answers" / name / "key", classes),
        "pairs": make_artifact(folder / "pairs" / name / "key", tables, counts=counts),
        "clusters": make_artifact(folder / "clusters" / name / "key", {}, counts={"clusters": 3}),
        "hardness": make_artifact(folder / "hardness" / name / "key", {}, counts={"random": -0.1, "knn": 0.7}),
    }
    for model in ("vectors", "surrogate"):
        files: dict[str, Any] = {}
        for side in schemas.SIDES:
            rows = np.array([vector_of(text, model) for text in texts[side]])
            for start in range(0, len(rows), _VECTORS_PER_FILE):
                number = start // _VECTORS_PER_FILE
                files[f"vectors/{side}-{number:07d}.npy"] = rows[start : start + _VECTORS_PER_FILE]
            invalid = [{"row": row, "reason": "zero_vector"} for row in np.flatnonzero(~rows.any(axis=1))]
            files[f"invalid-{side}.parquet"] = pa.Table.from_pylist(invalid, schemas.INVALID_ROWS)
        config, counts = {"unit_rows": _VECTORS_PER_FILE}, {"dimension": _DIMENSION}
        found[model] = make_artifact(folder / model / name / "key", files, config=config, counts=counts)
    return {f"{what}/{name}": path for what, path in found.items()}


Batch = Sequence[tuple[str, int]]  # (domain, pair_id) by slot
Packing = Mapping[str, Sequence[Batch]]  # the batches of each domain, `mixed` among them


def write_corpus(folder: Path, domains: Mapping[str, Domain], packings: Sequence[Packing], **config: Any) -> Written:
    """Runs the stage `write` on these domains and packings; `config` replaces settings."""
    inputs = {}
    for name, domain in domains.items():
        inputs |= make_domain(folder, name, domain)
    for name, batches in packings[0].items():
        rows = [
            {"packing": number, "batch": batch, "slot": slot, "domain": where, "pair_id": pair, "cluster_id": pair % 5}
            for number, packing in enumerate(packings)
            for batch, slots in enumerate(packing[name])
            for slot, (where, pair) in enumerate(slots)
        ]
        table = pa.Table.from_pylist(rows, schemas.BATCHES)
        left = {} if name not in domains else {"remainder": len(domains[name].pairs) - sum(map(len, batches))}
        counts = {"batches": len(batches), "leftover": left, "packings": len(packings)}
        path = folder / "batches" / name / "key"
        inputs[f"batches/{name}"] = make_artifact(path, {"batches.parquet": table}, counts=counts)
    datasets = {
        name: {"query_prompt": domain.query_prompt, "document_prompt": "", "licence": domain.licence}
        for name, domain in domains.items()
    }
    sizes = {len(slots) for packing in packings for batches in packing.values() for slots in batches}
    settings = {
        "domains": list(domains),
        "datasets": datasets,
        "batch_size": sizes.pop(),
        "group_size": 2,
        "compose": "domain",
    }
    settings |= {
        "likely_rule": "symmetric",
        "margin": 0.0,
        "margin_strategy": "absolute",
        "floor_quantile": 0.25,
        "max_likely": 1.0,
    }
    step = Step(
        stage="shards",
        stage_version=0,
        domain="corpus",
        key="key",
        path=folder / "shards" / "key",
        config={**settings, "batches_per_part": 4, **config},
        inputs=inputs,
    )
    return Written(run_write(step))


def run_write(step: Step) -> Step:
    """Runs the stage `write`; returns the step."""
    with open_builder(step.path) as builder:
        built = write.build(step, builder, InlineExecutor(), SilentProgress())
        builder.finish(
            units=built.units, stage=step.stage, stage_version=0, domain=step.domain, key=step.key, config=step.config,
            inputs={}, counts=built.counts,
        )  # fmt: skip
    return step


@dataclass(frozen=True)
class Written:
    """Shards, and what is in them."""

    step: Step

    @property
    def path(self) -> Path:
        return self.step.path

    @property
    def counts(self) -> dict[str, Any]:
        return read_artifact(self.path).manifest.counts

    @cached_property
    def frame(self) -> pl.DataFrame:
        return pl.read_parquet(self.path / "data" / "*.parquet").sort("batch_id", "slot")

    @cached_property
    def index(self) -> pl.DataFrame:
        return pl.read_parquet(self.path / "index.parquet")
