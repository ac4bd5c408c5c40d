"""Rules of masking to compare, applied to the texts of a batch and the surrogate's vectors.

A rule is named in words: `written` (the masks of the shards), `none`, `same-answer` (the certain masks alone), or the
certain masks and those of a likely rule with its settings, such as `one-sided margin=0.05 floor=0.5 cap=0.25`:

    one-sided    f(q_i, d_j) ≥ own_i                                  Eq. 4 as the paper has it
    transposed   f(q_i, d_j) ≥ own_j
    either       one of these two
    symmetric    (f(q_i, d_j) + f(q_j, d_i)) / 2 ≥ (own_i + own_j) / 2

where own_i = f(q_i, d_i). The margin is subtracted from the right side. What is masked must also reach the floor, a
quantile of the domain's own scores, and the cap is the part of a batch that a query loses at most.

Shape letters: B slots of a batch, D dimension.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from hardbatch.pipeline.arrays import Array
from hardbatch.pipeline.artifacts.artifact import read_artifact
from hardbatch.pipeline.artifacts.consistency import load_percentiles
from hardbatch.pipeline.artifacts.vectors import Texts, open_vectors
from hardbatch.pipeline.batching.consistency import floor_at
from hardbatch.pipeline.run import Plan
from hardbatch.trainer.shards import TextBatch

Masking = Callable[[TextBatch], Array]  # batch → the documents j to mask for query i (bool, B × B)


class Surrogate:
    """The surrogate's vectors by text, and the percentiles of its own scores by domain."""

    def __init__(self, plan: Plan) -> None:
        self._sides: dict[str, tuple[dict[str, Array], dict[str, Array]]] = {}
        self.percentiles: dict[str, list[float]] = {}
        shards = plan.steps[-1]
        for step in plan.steps:
            if step.stage == "pairs":
                vectors = open_vectors(shards.inputs[f"surrogate/{step.domain}"])
                pairs = read_artifact(step.path)
                queries, documents = Texts(pairs, "queries"), Texts(pairs, "documents")
                self._sides[step.domain] = (
                    _by_text(queries, vectors.queries.take),
                    _by_text(documents, vectors.documents.take),
                )
            if step.stage == "consistency":
                self.percentiles[step.domain] = load_percentiles(step.path)

    def scores(self, batch: TextBatch) -> Array:
        """f(q_i, d_j) at [i, j] (float32, B × B)."""
        queries, documents = self._sides[batch.domain]
        queries_BD = np.stack([queries[text] for text in batch.queries])
        documents_BD = np.stack([documents[text] for text in batch.documents])
        return np.asarray(queries_BD @ documents_BD.T)


def find_masking(name: str, surrogate: Surrogate) -> Masking:
    """Returns the rule of that name."""
    if name == "written":
        return lambda batch: batch.equivalent_BB
    if name == "none":
        return lambda batch: np.zeros_like(batch.equivalent_BB)
    if name == "same-answer":
        return _same_answer
    kind, *settings = name.split()
    values = {key: float(value) for key, value in (setting.split("=") for setting in settings)}
    margin, quantile, cap = values.get("margin", 0.0), values.get("floor", 0.0), values.get("cap", 1.0)

    def mask(batch: TextBatch) -> Array:
        score_BB = surrogate.scores(batch)
        own_B = np.diag(score_BB)
        if kind == "symmetric":
            score_BB = (score_BB + score_BB.T) / 2
        bound_BB = {
            "one-sided": own_B[:, None],
            "transposed": own_B[None, :],
            "either": np.minimum(own_B[:, None], own_B),
            "symmetric": (own_B[:, None] + own_B) / 2,
        }[kind]
        floor = floor_at(surrogate.percentiles[batch.domain], quantile)
        mask_BB = score_BB >= np.maximum(bound_BB - margin, floor)
        np.fill_diagonal(mask_BB, False)
        limit = int(cap * len(mask_BB))
        for row in np.flatnonzero(mask_BB.sum(1) > limit):
            marked = np.flatnonzero(mask_BB[row])
            mask_BB[row, marked[np.argsort(-score_BB[row, marked], kind="stable")[limit:]]] = False
        return np.asarray(mask_BB | _same_answer(batch))

    return mask


def _same_answer(batch: TextBatch) -> Array:
    assert batch.positive_BB is not None
    return batch.positive_BB


def _by_text(texts: Texts, vectors: Callable[[Array], Array]) -> dict[str, Array]:
    rows = np.arange(texts.num_rows)
    return dict(zip(texts.take(rows), vectors(rows), strict=True))
