"""From embeddings to batches and masks, in memory: the method of the pipeline without its files.

Shape letters: n pairs, N texts of a side, B pairs of a batch, D dimension.
"""

from __future__ import annotations

from typing import Any, Literal, TypeVar

import numpy as np
from pydantic import BaseModel, ValidationError

from hardbatch.pipeline.arrays import Array
from hardbatch.pipeline.batching.consistency import floor_at, own_scores, percentiles
from hardbatch.pipeline.batching.equivalence import LikelyRule, likely_answers
from hardbatch.pipeline.batching.pack import Packing, PackSettings, pack
from hardbatch.pipeline.batching.points import PairPoints
from hardbatch.pipeline.config import ClusterConfig, PackConfig, WriteConfig
from hardbatch.pipeline.stages.cluster import cluster

_Settings = TypeVar("_Settings", bound=BaseModel)

_PACK_FIELDS = ("batch_size", "group_size", "seed", "exact_tour_below", "refine_rounds", "refine_tolerance")


class EmbeddedPairs:
    """Pairs of texts whose vectors are in memory; implements `batching.points.PairPoints`.

    Args:
        queries_ND: The vectors of the distinct queries, float16 or float32.
        documents_ND: The vectors of the distinct documents.
        query_row: The row of each pair's query (int64, n).
        document_row: The row of each pair's document.
    """

    def __init__(self, queries_ND: Array, documents_ND: Array, query_row: Array, document_row: Array) -> None:
        self._queries_ND, self._documents_ND = queries_ND, documents_ND
        self._query_row, self._document_row = query_row, document_row

    def __len__(self) -> int:
        return len(self._query_row)

    @property
    def dimension(self) -> int:
        return int(self._queries_ND.shape[1])

    def take(self, rows: Array) -> Array:
        documents, queries = self.sides(rows)
        documents += queries
        return documents

    def sides(self, rows: Array) -> tuple[Array, Array]:
        documents = self._documents_ND[self._document_row[rows]].astype(np.float32)
        return documents, self._queries_ND[self._query_row[rows]].astype(np.float32)

    def joined(self, rows: Array) -> Array:
        return np.concatenate(self.sides(rows), axis=1)

    def at(self, pairs: Array) -> EmbeddedPairs:
        """Some of the pairs, by index."""
        return EmbeddedPairs(self._queries_ND, self._documents_ND, self._query_row[pairs], self._document_row[pairs])

    def has_vectors(self) -> Array:
        """Whether both sides of each pair have a vector that is finite and not zero (bool, n)."""
        has_query, has_document = map(_is_vector, (self._queries_ND, self._documents_ND))
        return np.asarray(has_query[self._query_row] & has_document[self._document_row])


def _is_vector(vectors_ND: Array) -> Array:
    """Whether each row is finite and not zero (bool, N)."""
    return np.asarray(np.isfinite(vectors_ND).all(axis=1) & vectors_ND.any(axis=1))


def pack_embeddings(
    query_embeddings: Any,
    document_embeddings: Any,
    batch_size: int = 64,
    *,
    group_size: int | None = None,
    answer_classes: Any = None,
    seed: int = 0,
) -> Packing:
    """Packs pairs into batches of alike pairs, by their embeddings alone.

    Pairs are clustered by folded K-Means (Eq. 3) and packed as `hardbatch run` does it.

    Args:
        query_embeddings: A row for each pair's query (n × D): an array, a tensor or a column of lists. Rows are
            scaled to unit length.
        document_embeddings: A row for each pair's document (n × D).
        batch_size: B, the number of pairs in every batch.
        group_size: K, the dial of hardness: a batch is B / K groups of K alike pairs, drawn at random. 1 makes
            random batches, `batch_size` batches that are as hard as can be. By default it is the largest
            divisor of B from 4 to 8, or else B.
        answer_classes: The class of each pair's query and of its document (integers or strings, n × 2). The two
            sides have nothing in common. Pairs of one class answer each other's queries, so they go to different
            batches if that is possible. By default no two pairs share a class.
        seed: Draws first centroids, the start of the tour and the groups of a batch.

    Returns:
        A `Packing`: `batches` are indices of pairs (int64, ⌊n/B⌋ × B), in which K consecutive slots are a group;
        `remainder` are the pairs that are in none.

    Raises:
        ValueError: Shapes do not fit each other, rows cannot be scaled, `group_size` does not divide
            `batch_size`, or there are fewer pairs than a batch has.
    """
    queries = _unit_rows("query_embeddings", query_embeddings)
    documents = _unit_rows("document_embeddings", document_embeddings)
    if queries.shape != documents.shape:
        raise ValueError(
            f"query_embeddings and document_embeddings must have the same shape, given {queries.shape} and "
            f"{documents.shape}; row i of each belongs to pair i"
        )
    settings = settings_of(PackConfig, batch_size=batch_size, group_size=group_size, seed=seed)
    if len(queries) < batch_size:
        raise ValueError(f"{len(queries)} pairs do not fill a batch of {batch_size}; lower batch_size")

    classes = None
    if answer_classes is not None:
        classes = np.asarray(answer_classes)
        if classes.shape != (len(queries), 2) or classes.dtype.kind not in "iuU":
            raise ValueError(
                "answer_classes must have a row of 2 for each pair, integers or strings, given "
                f"{classes.dtype} of the shape {classes.shape}"
            )
        classes = np.stack([np.unique(side, return_inverse=True)[1] for side in classes.T], axis=1)
    rows = np.arange(len(queries))
    return pack_points(EmbeddedPairs(queries, documents, rows, rows), settings, classes)


def pack_points(points: PairPoints, config: PackConfig, classes: Array | None) -> Packing:
    """Clusters and packs pairs by the settings of the pipeline, with its defaults for clustering.

    Args:
        points: The pairs.
        config: Batch size, group size and seed.
        classes: The query class and the document class of each pair (int64, n × 2), or None.
    """
    config = config.with_group_size()
    clustering = cluster(points, {**ClusterConfig().resolved(config).model_dump(), "device": "cpu"})
    how = PackSettings(**{name: getattr(config, name) for name in _PACK_FIELDS})
    return pack(points, clustering.labels, clustering.centroids, how, classes)


def false_negative_mask(
    query_embeddings: Any,
    document_embeddings: Any,
    *,
    same_answer: Any = None,
    likely_rule: Literal["one-sided", "symmetric"] = "one-sided",
    margin: float = 0.0,
    margin_strategy: Literal["absolute", "relative"] = "absolute",
    floor: float | None = None,
    max_likely: float = 0.25,
) -> Array:
    """Marks the documents of a batch that are not negatives of a query, since they may answer it as well (Eq. 4).

    Args:
        query_embeddings: Embeddings of the batch's queries by the guide model (B × D): an array, a tensor or a
            column of lists. Rows are scaled to unit length.
        document_embeddings: The same of their documents.
        same_answer: Documents that are known to answer (bool, B × B): `same_answer[i, j]` says that document j
            answers query i. They are marked whatever they score.
        likely_rule: `one-sided` compares f(q_i, d_j) with f(q_i, d_i); `symmetric` also asks that each of two
            documents fits the other query.
        margin: How far below its own document's score a document may score to be marked. A negative margin asks
            that it leads by this much.
        margin_strategy: `absolute` subtracts the margin from the own score, `relative` that part of it.
        floor: No document below this score is marked. By default it is the median of the batch's own scores
            f(q_i, d_i). The median over all pairs of the corpus is better; `Batches.floor` is that.
        max_likely: The largest part of the batch that is marked for one query, besides `same_answer`.

    Returns:
        The marks (bool, B × B), False on the diagonal. Row i belongs to query i.

    Raises:
        ValueError: Shapes do not fit each other, or rows cannot be scaled.
    """
    queries = _unit_rows("query_embeddings", query_embeddings)
    documents = _unit_rows("document_embeddings", document_embeddings)
    if queries.shape != documents.shape:
        raise ValueError(f"both sides must have the same shape, given {queries.shape} and {documents.shape}")
    certain = np.zeros((len(queries), len(queries)), dtype=bool)
    if same_answer is not None:
        certain = np.array(same_answer, dtype=bool)
        if certain.shape != (len(queries), len(queries)):
            raise ValueError(f"same_answer must be {len(queries)} × {len(queries)}, given the shape {certain.shape}")
        np.fill_diagonal(certain, False)
    if floor is None:
        floor = floor_at(percentiles(own_scores(queries, documents)), WriteConfig().floor_quantile)
    checked = settings_of(
        WriteConfig, likely_rule=likely_rule, margin=margin, margin_strategy=margin_strategy, max_likely=max_likely
    )
    return np.asarray(likely_answers(queries, documents, rule_of(checked), floor, certain).mask_BB | certain)


def settings_of(kind: type[_Settings], **arguments: Any) -> _Settings:
    """The settings that a caller gives as arguments, with the pipeline's checks.

    Raises:
        ValueError: An argument is not allowed; the message says what is.
    """
    arguments = {name: given.item() if isinstance(given, np.generic) else given for name, given in arguments.items()}
    try:
        return kind(**arguments)
    except ValidationError as error:
        # For a mistake, pydantic names the class of settings and its own website, which a caller has not heard of.
        lines = [
            f"{item['loc'][0]}: {item['ctx']['error']}"
            if item["type"] == "value_error"
            else f"{item['loc'][0]}: {item['msg'][0].lower()}{item['msg'][1:]}, given {item['input']!r}"
            for item in error.errors()
        ]
        raise ValueError("; ".join(lines)) from None


def rule_of(config: WriteConfig) -> LikelyRule:
    """The rule of likely answers that the settings describe."""
    return LikelyRule(
        likely_rule=config.likely_rule,
        margin=config.margin,
        margin_strategy=config.margin_strategy,
        max_likely=config.max_likely,
    )


def _unit_rows(name: str, embeddings: Any) -> Array:
    """The embeddings as float32 with rows of unit length."""
    if hasattr(embeddings, "detach"):  # a tensor: numpy takes none in bfloat16, on a GPU or with a gradient
        embeddings = embeddings.detach().float().cpu()
    try:
        given = np.asarray(embeddings, dtype=np.float32)
    except (TypeError, ValueError):
        given = _stacked(name, embeddings)
    if given.ndim != 2 or 0 in given.shape:
        raise ValueError(f"{name} must have a row for each pair (n × D), given the shape {given.shape}")
    lengths = np.linalg.norm(given, axis=1, keepdims=True)
    faulty = np.flatnonzero(~(np.isfinite(lengths[:, 0]) & (lengths[:, 0] > 0)))
    if len(faulty):
        raise ValueError(
            f"{name}: {len(faulty)} of {len(given)} rows are zero or not finite, the first is row {faulty[0]}; leave "
            "these pairs out on both sides"
        )
    return np.asarray(given / lengths)


def _stacked(name: str, embeddings: Any) -> Array:
    """The rows of a column of lists, as a frame of polars or pandas has them."""
    try:
        return np.stack([np.asarray(row, dtype=np.float32) for row in embeddings])
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{name} must have a row of D numbers for each pair (n × D), given a {type(embeddings).__name__} of "
            f"something else ({error})"
        ) from None
