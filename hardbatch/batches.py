"""Batches for training, made in memory from a dataset of pairs: `build_batches`.

What `hardbatch run` does with files is done here with lists and arrays, by the same functions: the batches
and the masks of both are the same.

Shape letters: n pairs, N texts of a side, M batches, B slots of a batch, D dimension.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from hardbatch.embeddings import EmbeddedPairs, pack_points, rule_of, settings_of
from hardbatch.inputs import as_frame, column_names, distinct_texts, embed_texts, reasons_text, usable_rows
from hardbatch.pipeline.arrays import Array
from hardbatch.pipeline.artifacts.answers import Answers
from hardbatch.pipeline.artifacts.vectors import Pairs
from hardbatch.pipeline.batching.consistency import floor_at, own_scores, percentiles
from hardbatch.pipeline.batching.copies import find_copies
from hardbatch.pipeline.batching.equivalence import LikelyRule, likely_answers, repeats_query
from hardbatch.pipeline.batching.hardness import measure_bounds
from hardbatch.pipeline.config import HardnessConfig, PackConfig, WriteConfig

if TYPE_CHECKING:
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer

    from hardbatch.integration import BatchSamplerMaker, MaskedInfoNCELoss

logger = logging.getLogger(__name__)

_BLOCK_PAIRS = 4_096
_FEW_USED = 0.9  # below this part of the rows in batches, there is a warning
_MANY_MASKED = 0.5  # above this part of the slots masked, there is a warning


def build_batches(
    dataset: Any,
    *,
    model: str | SentenceTransformer = "minilm",
    guide: str | SentenceTransformer | None = None,
    anchor_column_name: str | None = None,
    positive_column_name: str | None = None,
    batch_size: int = 64,
    group_size: int | None = None,
    margin: float = 0.0,
    query_prompt: str | None = None,
    corpus_prompt: str | None = None,
    seed: int = 0,
    show_progress_bar: bool = False,
) -> Batches:
    """Makes batches of alike pairs, and finds the false negatives of each.

    Args:
        dataset: The pairs: a `datasets.Dataset`, a polars or pandas frame, a mapping of columns, or two lists
            (queries, documents).
        model: The model whose embeddings say which pairs are alike: a `SentenceTransformer`, or a name as
            `embed.model` takes it (`minilm`, `lexical`, a folder, or a name on the hub).
        guide: The model that judges false negatives. By default `model`.
        anchor_column_name: The column of queries. By default the first column, other than that of documents.
        positive_column_name: The column of documents. By default the next column.
        batch_size: B, the number of pairs in every batch.
        group_size: K, the dial of hardness: a batch is B / K groups of K alike pairs. See `pack_embeddings`.
        margin: How far below its own document's score a document may score to count as a false negative.
        query_prompt: Is put before each query when `model` embeds it; for a `SentenceTransformer`, its own
            prompt for queries by default.
        corpus_prompt: The same for documents.
        seed: Draws the batches. Another seed makes other batches of the same hardness.
        show_progress_bar: Whether to show how far embedding is.

    Returns:
        The batches.

    Raises:
        TypeError: `dataset` is something else.
        ValueError: A column is missing, a setting is not allowed, or the pairs do not fill one batch.
        ConfigError: A model cannot be loaded.
    """
    config = settings_of(PackConfig, batch_size=batch_size, group_size=group_size, seed=seed).with_group_size()
    rule = rule_of(settings_of(WriteConfig, margin=margin))
    frame = as_frame(dataset)
    names = column_names(frame, anchor_column_name, positive_column_name)
    rows, texts, leftover = usable_rows(*(frame[name].to_list() for name in names))
    if len(rows) < batch_size:
        raise ValueError(
            f"{len(rows)} of {len(frame)} rows can be used (not used: {reasons_text(leftover)}), which do not fill a "
            f"batch of {batch_size}; lower batch_size, or check that {names[0]!r} and {names[1]!r} are the columns of "
            "queries and documents"
        )

    distinct, numbers = zip(*(distinct_texts(side) for side in texts), strict=True)
    embedded = embed_texts(model, "cluster", distinct, (query_prompt, corpus_prompt), show=show_progress_bar)
    guided = embedded
    if guide is not None and guide is not model:
        guided = embed_texts(guide, "surrogate", distinct, (None, None), show=show_progress_bar)
    points, guide_points = (EmbeddedPairs(*vectors, *numbers) for vectors in (embedded, guided))

    has_vectors = points.has_vectors() & guide_points.has_vectors()
    leftover["invalid_vector"] = rows[~has_vectors]
    pairs = Pairs(query_row=numbers[0], document_row=numbers[1], negative_offsets=None, negative_rows=None)
    query_class, document_class = (find_copies([side]).text_class for side in distinct)
    answers = Answers(query_class=query_class, document_class=document_class, pairs=pairs)

    kept = np.flatnonzero(has_vectors)
    if len(kept) < batch_size:
        raise ValueError(f"{len(kept)} of {len(rows)} pairs have a vector, which do not fill a batch of {batch_size}")
    classes = np.stack([query_class[numbers[0]], document_class[numbers[1]]], axis=1)
    packing = pack_points(points.at(kept), config, classes[kept])
    leftover["remainder"] = rows[kept[packing.remainder]]

    batches = Batches(
        frame=frame,
        names=names,
        rows=rows,
        pairs_MB=kept[packing.batches],
        leftover={reason: left for reason, left in leftover.items() if len(left)},
        config=config,
        points=points,
        guide_points=guide_points,
        answers=answers,
        kept=kept,
        rule=rule,
    )
    batches._warn()
    return batches


class Batches:
    """Batches of B pairs each, in memory. `build_batches` makes them.

    `len(batches)` is M. `batches[i]` shows batch i as a polars frame, with the columns of the dataset, and
    `batches[i:j]` those of several batches, one after the other.

    Attributes:
        indices: The rows of the dataset that each batch holds (int64, M × B). K consecutive slots are a group.
        leftover: The rows that are in no batch, by reason (int64 each).
        batch_size: B.
        group_size: K.
    """

    def __init__(
        self,
        *,
        frame: pl.DataFrame,
        names: tuple[str, str],
        rows: Array,
        pairs_MB: Array,
        leftover: Mapping[str, Array],
        config: PackConfig,
        points: EmbeddedPairs,
        guide_points: EmbeddedPairs,
        answers: Answers,
        kept: Array,
        rule: LikelyRule,
    ) -> None:
        self.indices: Array = rows[pairs_MB]
        self.leftover = dict(leftover)
        self.batch_size = config.batch_size
        self.group_size = config.group_size
        self._frame, self._names, self._pairs_MB = frame, names, pairs_MB
        self._points, self._guide_points, self._kept = points, guide_points, kept
        self._answers, self._rule = answers, rule

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, number: int | slice) -> pl.DataFrame:
        found: pl.DataFrame = self._frame[self.indices[number].ravel()]
        return found

    def __repr__(self) -> str:
        left = reasons_text(self.leftover)
        return (
            f"Batches({len(self)} batches of {self.batch_size} pairs in groups of {self.group_size}; hardness "
            f"{self.share:.3f} (0: random, 1: bound); {self.mask_rate:.2%} of slots masked; rows in no batch: {left})"
        )

    @cached_property
    def floor(self) -> float:
        """The median of the guide's scores f(q, d) over all pairs; no false negative scores below it."""
        scores = [
            own_scores(queries, documents) for documents, queries in map(self._guide_points.sides, _blocks(self._kept))
        ]
        return floor_at(percentiles(np.concatenate(scores).astype(np.float32)), WriteConfig().floor_quantile)

    def same_answers(self, number: int) -> Array:
        """Marks the documents of batch `number` that answer a query for certain, besides its own (bool, B × B)."""
        pairs = self._answers.pairs
        of_batch = self._pairs_MB[number]
        same_BB = self._answers.answers(pairs.query_row[of_batch][:, None], pairs.document_row[of_batch][None, :])
        np.fill_diagonal(same_BB, False)
        return same_BB

    def false_negatives(self, number: int) -> Array:
        """Marks the documents of batch `number` that are not negatives of a query (bool, B × B, Eq. 4).

        These are `same_answers`, likely answers by the guide, and documents that repeat the query. Row i belongs
        to the query of slot i; the diagonal is False.
        """
        certain_BB = self.same_answers(number)
        documents_BD, queries_BD = self._guide_points.sides(self._pairs_MB[number])
        likely = likely_answers(queries_BD, documents_BD, self._rule, self.floor, certain_BB)
        batch = self[number]
        queries, documents = (batch[name].to_list() for name in self._names)
        mask_BB = certain_BB | likely.mask_BB | repeats_query(queries, documents)
        np.fill_diagonal(mask_BB, False)
        return mask_BB

    @cached_property
    def mask_rate(self) -> float:
        """The part of the B(B−1) other slots of a batch that are false negatives, over all batches."""
        masked = sum(int(self.false_negatives(number).sum()) for number in range(len(self)))
        return masked / (self.indices.size * (self.batch_size - 1))

    @cached_property
    def hardness(self) -> float:
        """The mean of (d_i·q_j + d_j·q_i) / 2 over two pairs of one batch, in `model`'s embeddings."""
        total = 0.0
        for of_batch in self._pairs_MB:
            documents_BD, queries_BD = (side.astype(np.float64) for side in self._points.sides(of_batch))
            total += float(documents_BD.sum(0) @ queries_BD.sum(0) - np.einsum("bd,bd->", documents_BD, queries_BD))
        return total / (self.indices.size * (self.batch_size - 1))

    @cached_property
    def share(self) -> float:
        """Where `hardness` stands between random batches (0) and every pair among its nearest (1)."""
        how = HardnessConfig()
        bounds = measure_bounds(self._points.at(self._kept), self.batch_size, num_anchors=how.anchors, seed=how.seed)
        assert bounds is not None, "there is at least one batch"
        return bounds.share(self.hardness)

    def to_dataset(self, *, masks: bool = False) -> Dataset:
        """The pairs in the order of their batches, as `datasets` holds them: slot s of batch i is row i·B + s.

        Args:
            masks: Whether to add the columns `batch_id`, `slot` and `equivalent_slots`, the slots of the batch that
                are false negatives of the row's query. They are for other trainers: `SentenceTransformerTrainer`
                would take them for texts.

        Returns:
            The columns of queries and documents, and `label`, the number of the row. Losses of sentence-transformers
            get nothing but texts and labels, so it tells `loss` which batch it sees.
        """
        try:
            import datasets
        except ModuleNotFoundError:
            raise ModuleNotFoundError("a dataset needs the package `datasets`: pip install datasets") from None
        number = pl.int_range(self.indices.size, dtype=pl.Int64, eager=True)
        frame = self._frame[self.indices.ravel()].select(*self._names).with_columns(label=number)
        if masks:
            slots = [row.nonzero()[0].tolist() for i in range(len(self)) for row in self.false_negatives(i)]
            frame = frame.with_columns(
                batch_id=number // self.batch_size,
                slot=(number % self.batch_size).cast(pl.Int32),
                equivalent_slots=pl.Series(slots, dtype=pl.List(pl.UInt16)),
            )
        return datasets.Dataset(frame.to_arrow())

    def save_to_disk(self, path: str | Path) -> None:
        """Writes `to_dataset(masks=True)`; `datasets.load_from_disk` reads it."""
        self.to_dataset(masks=True).save_to_disk(str(path))

    @property
    def batch_sampler(self) -> BatchSamplerMaker:
        """For `SentenceTransformerTrainingArguments(batch_sampler=...)`: each epoch, all batches in a new order."""
        from hardbatch.integration import BatchSamplerMaker

        return BatchSamplerMaker(self.batch_size)

    def loss(self, model: SentenceTransformer, *, temperature: float = 0.05) -> MaskedInfoNCELoss:
        """InfoNCE from queries to documents without the false negatives, for `SentenceTransformerTrainer`.

        Args:
            model: The model that is trained.
            temperature: Divides the cosines. At .05 a short fine-tuning gains more than at .02 (docs/quality.md).
        """
        from hardbatch.integration import MaskedInfoNCELoss

        return MaskedInfoNCELoss(model, self, temperature=temperature)

    def _warn(self) -> None:
        """Warns of what makes batches useless, or nearly so."""
        negatives = [name for name in self._frame.columns if name.lower().startswith("negative")]
        if negatives:
            logger.warning(
                "hard negatives are not used here (columns %s); hardbatch.run_corpus uses them", ", ".join(negatives)
            )
        used = self.indices.size / len(self._frame)
        if used < _FEW_USED:
            logger.warning("%.0f %% of the rows are in a batch: %s", 100 * used, reasons_text(self.leftover))
        if self.mask_rate > _MANY_MASKED:
            logger.warning(
                "%.0f %% of the slots are masked, so most queries have few negatives: is every document an answer "
                "to most queries?",
                100 * self.mask_rate,
            )


def _blocks(numbers: Array) -> list[Array]:
    return [numbers[start : start + _BLOCK_PAIRS] for start in range(0, len(numbers), _BLOCK_PAIRS)]
