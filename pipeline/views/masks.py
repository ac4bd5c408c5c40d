"""Why slots of a batch are masked: from the texts of the batch, and the artifacts that its shards were made from.

Shape letters: B slots of a batch, D dimension.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from hardbatch.pipeline.arrays import Array
from hardbatch.pipeline.artifacts.artifact import Artifact, diagnose_damage, find_artifact
from hardbatch.pipeline.artifacts.consistency import load_percentiles
from hardbatch.pipeline.artifacts.vectors import open_vectors
from hardbatch.pipeline.batching.consistency import floor_at
from hardbatch.pipeline.batching.equivalence import Likely, LikelyRule, likely_answers, repeats_query
from hardbatch.pipeline.schemas import SIDES

LIKELY = "likely"  # by the surrogate alone; the other reasons are known from texts and pairs
NEAR_COPY = "near-copy"
REPEATS = "text of the query"


@dataclass(frozen=True, kw_only=True)
class Mask:
    """A slot that is masked for the query of another one, and why.

    Attributes:
        slot: The masked slot.
        reason: `same document` or `same query` as the slot that it is masked for, `known pair`, `near-copy` (of
            one side of a known pair), `text of the query` or `likely`. Where what would tell them apart is
            gone: `same answer` for the certain ones, or `known pair or likely`.
        score: The surrogate's score of its document for the query; None if the vectors are gone.
        bound: What a likely answer had to score; None for other reasons, or if the vectors are gone.
        overlap: How much the texts of near-copies have in common, from 0 to 1; None for other reasons, and if
            the two slots are joined by a pair outside the batch.
    """

    slot: int
    reason: str
    score: float | None
    bound: float | None
    overlap: float | None


@dataclass(frozen=True, kw_only=True)
class BatchMasks:
    """The masks of a batch by slot, the most certain first, and the surrogate's score of each own document.

    `floors` holds, by domain, the lowest score of a likely answer; empty before format version 3. `missing`
    says what could not be told, because the artifacts for it are gone.
    """

    by_slot: list[list[Mask]]
    own_scores: list[float] | None
    floors: dict[str, float]
    missing: list[str]


def explain_masks(shards: Artifact, rows: Sequence[Mapping[str, Any]]) -> BatchMasks:
    """Finds the reason for every masked slot of a batch.

    Args:
        shards: The shards artifact.
        rows: The rows of the batch, by slot. Without `positive_slots`, as in format version 2, what the texts and
            the known pairs do not explain is likely.
    """
    missing: list[str] = []
    known = _known_pairs(shards, rows, missing)
    vectors = _vectors(shards, rows, missing)
    floors = _floors(shards, rows)
    floor_B = np.array([floors[row["domain"]] for row in rows]) if floors else None
    scores = None if vectors is None else _score(*vectors, floor_B, shards.manifest.config)
    classes = _classes(shards, rows)
    by_slot = []
    for i, row in enumerate(rows):
        masks = []
        for j in row["equivalent_slots"]:
            reason = _reason(row, rows[j], known)
            score = None if scores is None else float(scores.score_BB[i, j])
            bound = None if scores is None or reason != LIKELY else float(scores.bound_BB[i, j])
            overlap = _overlap(classes, i, j) if reason == NEAR_COPY else None
            masks.append(Mask(slot=j, reason=reason, score=score, bound=bound, overlap=overlap))
        by_slot.append(sorted(masks, key=lambda mask: (mask.reason == LIKELY, -(mask.score or 0), mask.slot)))
    own = None if scores is None else [float(score) for score in np.diag(scores.score_BB)]
    return BatchMasks(by_slot=by_slot, own_scores=own, floors=floors, missing=missing)


def _reason(row: Mapping[str, Any], other: Mapping[str, Any], known: set[tuple[str, int, int]] | None) -> str:
    if row["document"] == other["document"]:
        return "same document"
    if row["query"] == other["query"]:
        return "same query"

    # A row number means something in its own domain only.
    is_one_domain = row["domain"] == other["domain"]
    if is_one_domain and known is not None and (row["domain"], row["query_id"], other["document_id"]) in known:
        return "known pair"
    if "positive_slots" in row:
        if other["slot"] not in row["positive_slots"]:
            return REPEATS if repeats_query([row["query"]], [other["document"]])[0, 0] else LIKELY
        return NEAR_COPY if known is not None else "same answer"
    return LIKELY if known is not None else "known pair or likely"


def _known_pairs(
    shards: Artifact, rows: Sequence[Mapping[str, Any]], missing: list[str]
) -> set[tuple[str, int, int]] | None:
    """The known pairs of the batch's queries: (domain, query row, document row); None if an artifact is gone."""
    import polars as pl

    known = set()
    for domain in sorted({row["domain"] for row in rows}):
        folder = _input_folder(shards, f"pairs/{domain}")
        if find_artifact(folder) is None:
            missing.append(f"which of the certain masks are known pairs: {folder} is gone")
            return None
        queries = sorted({row["query_id"] for row in rows if row["domain"] == domain})
        with diagnose_damage([folder]):
            pairs = pl.scan_parquet(folder / "pairs.parquet").select("query_row", "document_row")
            found = pairs.filter(pl.col("query_row").is_in(queries)).collect()
        known |= {(domain, query, document) for query, document in found.iter_rows()}
    return known


def _classes(shards: Artifact, rows: Sequence[Mapping[str, Any]]) -> list[list[tuple[str, int, float]]]:
    """By side and slot: the domain, the class of the text, and the overlap that joined it to that class.

    Both sides are empty if the shards were made without the stage `answers`, or if its artifact is gone.
    """
    import polars as pl

    classes = [[("", 0, 1.0)] * len(rows) for _ in SIDES]
    for domain in sorted({row["domain"] for row in rows}):
        name = f"answers/{domain}"
        if name not in shards.manifest.inputs or find_artifact(_input_folder(shards, name)) is None:
            return [[], []]
        folder = _input_folder(shards, name)
        at = [slot for slot, row in enumerate(rows) if row["domain"] == domain]
        for of_side, side, column in zip(classes, SIDES, ("query_id", "document_id"), strict=True):
            text_rows = [rows[slot][column] for slot in at]
            with diagnose_damage([folder]):
                text_class = np.load(folder / f"{side}.npy", mmap_mode="r")[text_rows]
                joins = pl.scan_parquet(folder / f"{side}-joins.parquet").filter(pl.col("row").is_in(text_rows))
                overlaps = dict(joins.group_by("row").agg(pl.col("overlap").min()).collect().iter_rows())
            for slot, row, number in zip(at, text_rows, text_class, strict=True):
                of_side[slot] = (domain, int(number), overlaps.get(row, 1.0))
    return classes


def _overlap(classes: list[list[tuple[str, int, float]]], i: int, j: int) -> float | None:
    """The overlap of the documents of two slots, or else of their queries, if they are of one class."""
    for of_side in reversed(classes):
        if of_side and of_side[i][:2] == of_side[j][:2]:
            return min(of_side[i][2], of_side[j][2])
    return None


def _score(queries_BD: Array, documents_BD: Array, floor_B: Array | None, config: Mapping[str, Any]) -> Likely:
    """Scores a batch by the rule that its shards were written with."""
    if floor_B is None:
        score_BB = queries_BD @ documents_BD.T
        bound_BB = np.broadcast_to(np.diag(score_BB)[:, None] - config["margin"], score_BB.shape)
        return Likely(mask_BB=score_BB >= bound_BB, score_BB=score_BB, bound_BB=bound_BB)
    settings = {"likely_rule": "symmetric", **config}  # older shards of format 3 do not name their rule
    rule = LikelyRule(**{field.name: settings[field.name] for field in fields(LikelyRule)})
    return likely_answers(queries_BD, documents_BD, rule, floor_B)


def _floors(shards: Artifact, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The floor of each domain of a batch; empty before format version 3, whose rule had no floor."""
    floors: dict[str, float] = {}
    if "floor_quantile" not in shards.manifest.config:
        return floors
    for domain in sorted({row["domain"] for row in rows}):
        folder = _input_folder(shards, f"consistency/{domain}")
        percentiles = load_percentiles(folder) if find_artifact(folder) is not None else []
        floors[domain] = floor_at(percentiles, shards.manifest.config["floor_quantile"])
    return floors


def _vectors(shards: Artifact, rows: Sequence[Mapping[str, Any]], missing: list[str]) -> tuple[Array, Array] | None:
    """The surrogate's vectors of the queries and of the documents by slot (float32, B × D); None if they are gone."""
    sides: list[list[Array]] = [[np.empty(0)] * len(rows) for _ in SIDES]
    for domain in sorted({row["domain"] for row in rows}):
        folder = _input_folder(shards, f"surrogate/{domain}")
        if find_artifact(folder) is None:
            missing.append(f"scores: {folder} is gone")
            return None
        at = [slot for slot, row in enumerate(rows) if row["domain"] == domain]
        with diagnose_damage([folder]):
            vectors = open_vectors(folder)
            for side, column, file in zip(sides, ("query_id", "document_id"), SIDES, strict=True):
                taken_BD = getattr(vectors, file).take(np.array([rows[slot][column] for slot in at]))
                for slot, vector_D in zip(at, taken_BD, strict=True):
                    side[slot] = vector_D
    queries_BD, documents_BD = map(np.stack, sides)
    return queries_BD, documents_BD


def _input_folder(shards: Artifact, name: str) -> Path:
    """The folder of an input of the shards, whether it is still there or not."""
    stage, domain = name.split("/", 1)
    stage = "vectors" if stage == "surrogate" else stage
    return shards.path.parents[1] / stage / domain / shards.manifest.inputs[name]
