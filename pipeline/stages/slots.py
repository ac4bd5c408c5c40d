"""The slots of a batch: their pairs with texts, prompts and vectors, and which documents answer which query.

Shape letters: M batches of a packing, B slots of a batch, D dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from hardbatch.pipeline import schemas
from hardbatch.pipeline.arrays import Array
from hardbatch.pipeline.artifacts.answers import load_answers
from hardbatch.pipeline.artifacts.artifact import read_artifact
from hardbatch.pipeline.artifacts.consistency import load_percentiles
from hardbatch.pipeline.artifacts.leaks import load_leaks
from hardbatch.pipeline.artifacts.vectors import ExtraRows, Texts, load_pairs, open_vectors
from hardbatch.pipeline.batching.consistency import floor_at
from hardbatch.pipeline.batching.copies import find_copies


class OpenDomain:
    """The artifacts of one domain that shards are written from; texts and vectors are memory-mapped.

    Args:
        name: The domain.
        inputs: The folders of the artifacts, by `pairs/NAME`, `vectors/NAME` and so on.
        query_prompt: What is put before its queries in training.
        document_prompt: The same for its documents.
        floor_quantile: A likely answer scores as high as this fraction of the domain's own pairs; 0: no floor.
    """

    def __init__(
        self, name: str, inputs: dict[str, Path], query_prompt: str, document_prompt: str, floor_quantile: float
    ) -> None:
        pairs = read_artifact(inputs[f"pairs/{name}"])
        self.name = name
        self.query_prompt = query_prompt
        self.document_prompt = document_prompt
        self.pairs = load_pairs(pairs)
        self.queries, self.documents = (Texts(pairs, side) for side in schemas.SIDES)
        self.extra = ExtraRows(pairs)
        self.vectors = open_vectors(inputs[f"vectors/{name}"])
        self.surrogate = open_vectors(inputs[f"surrogate/{name}"])
        self.answers = load_answers(inputs[f"answers/{name}"], self.pairs).answers
        self.leaking_documents = load_leaks(inputs.get(f"leaks/{name}")).documents
        self.floor = floor_at(load_percentiles(inputs[f"consistency/{name}"]), floor_quantile)


@dataclass(frozen=True, kw_only=True)
class Packing:
    """The batches of one packing of a domain, or of the batches that mix domains."""

    domain: str
    pair_id_MB: Array
    cluster_id_MB: Array
    domains_MB: Array | None  # names, only if batches mix domains

    def slots_by_domain(self, batch: int) -> list[tuple[str, Array]]:
        """The domains of a batch, each with the slots that hold its pairs."""
        if self.domains_MB is None:
            return [(self.domain, np.arange(self.pair_id_MB.shape[1]))]
        names = self.domains_MB[batch]
        return [(str(name), np.flatnonzero(names == name)) for name in np.unique(names)]


def read_packing(path: Path, domain: str, packing: int, batch_size: int) -> Packing:
    """Reads one packing of the `batches` artifact at `path`."""
    read_artifact(path)
    is_mixed = domain == schemas.MIXED_DOMAIN
    columns = ["pair_id", "cluster_id"] + ["domain"] * is_mixed
    table = pq.read_table(path / "batches.parquet", columns=columns, filters=[("packing", "==", packing)])
    shape = (-1, batch_size)
    return Packing(
        domain=domain,
        pair_id_MB=table["pair_id"].to_numpy().reshape(shape),
        cluster_id_MB=table["cluster_id"].to_numpy().reshape(shape),
        domains_MB=np.array(table["domain"].to_pylist()).reshape(shape) if is_mixed else None,
    )


@dataclass(frozen=True, kw_only=True)
class Slots:
    """The pairs of one batch, by slot: columns of the shards, vectors of both models, and the certain answers.

    `floor_B` is the floor of each slot's domain. `same_answer_BB[i, j]` says whether the document of slot j
    answers the query of slot i for certain; it is False on the diagonal.
    """

    pair_id: Array
    cluster_id: Array
    domain: Array
    query_id: Array
    document_id: Array
    query: Array
    document: Array
    query_prompt: Array
    document_prompt: Array
    queries_BD: Array
    documents_BD: Array
    surrogate_queries_BD: Array
    surrogate_documents_BD: Array
    floor_B: Array
    same_answer_BB: Array


def gather_slots(pair_id: Array, cluster_id: Array, parts: Sequence[tuple[OpenDomain, Array]]) -> Slots:
    """Collects what is in the slots of a batch.

    Args:
        pair_id: The pair of each slot.
        cluster_id: Its cluster.
        parts: The domains of the batch, each with the slots that hold its pairs.
    """
    slots = _empty_slots(pair_id, cluster_id, parts[0][0])
    for domain, at in parts:
        _fill(slots, at, domain)

    # Classes are numbered per domain. Between two domains, copies of one side tell what answers.
    if len(parts) > 1:
        for texts in (slots.document, slots.query):
            class_B = find_copies([texts.tolist()]).text_class
            slots.same_answer_BB[:] |= class_B[:, None] == class_B
    np.fill_diagonal(slots.same_answer_BB, False)
    return slots


def _empty_slots(pair_id: Array, cluster_id: Array, domain: OpenDomain) -> Slots:
    """Slots to be filled; any of the batch's domains gives the dimensions of the vectors."""
    size = len(pair_id)
    texts = ("domain", "query", "document", "query_prompt", "document_prompt")
    vectors_BD = np.zeros((2, size, domain.vectors.dimension), dtype=np.float32)
    surrogate_BD = np.zeros((2, size, domain.surrogate.dimension), dtype=np.float32)
    columns: dict[str, Any] = {name: np.full(size, "", dtype=object) for name in texts}
    return Slots(
        pair_id=pair_id,
        cluster_id=cluster_id,
        query_id=np.empty(size, dtype=np.int64),
        document_id=np.empty(size, dtype=np.int64),
        queries_BD=vectors_BD[0],
        documents_BD=vectors_BD[1],
        surrogate_queries_BD=surrogate_BD[0],
        surrogate_documents_BD=surrogate_BD[1],
        floor_B=np.empty(size),
        same_answer_BB=np.zeros((size, size), dtype=bool),
        **columns,
    )


def _fill(slots: Slots, at: Array, domain: OpenDomain) -> None:
    """Fills the slots `at`, whose pairs are of `domain`."""
    query_rows = domain.pairs.query_row[slots.pair_id[at]]
    document_rows = domain.pairs.document_row[slots.pair_id[at]]
    slots.domain[at] = domain.name
    slots.query_id[at] = query_rows
    slots.document_id[at] = document_rows
    slots.query[at] = domain.queries.take(query_rows)
    slots.document[at] = domain.documents.take(document_rows)
    slots.query_prompt[at] = domain.query_prompt
    slots.document_prompt[at] = domain.document_prompt
    slots.queries_BD[at] = domain.vectors.queries.take(query_rows)
    slots.documents_BD[at] = domain.vectors.documents.take(document_rows)
    slots.surrogate_queries_BD[at] = domain.surrogate.queries.take(query_rows)
    slots.surrogate_documents_BD[at] = domain.surrogate.documents.take(document_rows)
    slots.floor_B[at] = domain.floor
    slots.same_answer_BB[np.ix_(at, at)] = domain.answers(query_rows[:, None], document_rows[None, :])
