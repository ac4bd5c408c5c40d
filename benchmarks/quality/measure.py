"""nDCG@10 of each query, by exact search."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import ir_measures
import numpy as np
import torch
from torch import Tensor

from hardbatch.trainer.collection import Collection
from hardbatch.trainer.search import search

_TEXTS_AT_ONCE = 1_024
_DEPTH = 10


@torch.inference_mode()
def ndcg_by_query(encode: Callable[[Sequence[str]], Tensor], collection: Collection) -> np.ndarray:
    """nDCG@10 of the queries that have an answer, in the order of their rows."""
    rows = np.unique(collection.query_rows[collection.scores > 0])
    queries_QH = _in_blocks(encode, [collection.queries[row] for row in rows])
    hits_QK = search(queries_QH, _in_blocks(encode, collection.documents), _DEPTH)
    return ndcg_of_hits(collection, rows, hits_QK.tolist())


def ndcg_of_hits(collection: Collection, rows: np.ndarray, hits: Sequence[Sequence[int]]) -> np.ndarray:
    """nDCG@10 of the queries `rows`, whose hits are rows of documents, the best first."""
    run = {
        str(q): {str(d): float(-rank) for rank, d in enumerate(of)} for q, of in zip(rows.tolist(), hits, strict=True)
    }
    qrels: dict[str, dict[str, int]] = {query: {} for query in run}
    for query, document, score in zip(collection.query_rows, collection.document_rows, collection.scores, strict=True):
        qrels[str(query)][str(document)] = int(score)
    measure = ir_measures.nDCG @ _DEPTH
    found = {metric.query_id: metric.value for metric in ir_measures.iter_calc([measure], qrels, run)}
    return np.array([found[query] for query in run])


def _in_blocks(encode: Callable[[Sequence[str]], Tensor], texts: Sequence[str]) -> Tensor:
    return torch.cat([encode(texts[start : start + _TEXTS_AT_ONCE]) for start in range(0, len(texts), _TEXTS_AT_ONCE)])
