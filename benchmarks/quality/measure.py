"""nDCG@10 of each query, by exact search, and the models that nothing here trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import ir_measures
import numpy as np
import torch
from torch import Tensor

from hardbatch.pipeline.models.locate import locate_model
from hardbatch.trainer.collection import Collection
from hardbatch.trainer.evaluate import find_by_bm25
from hardbatch.trainer.search import search

Encode = Callable[[Sequence[str]], Tensor]  # texts → unit vectors
Search = Callable[[Collection, Sequence[str]], Tensor]  # queries → rows of documents, the best first (Q × 10 or more)

DEPTH = 10
_TEXTS_AT_ONCE = 1_024


def references(max_length: int) -> Mapping[str, Search]:
    """BM25, and MiniLM as published, which reads as many tokens as the models that are trained."""
    _, folder, _ = locate_model("minilm", None, Path())
    return {"BM25": find_by_bm25, "MiniLM as published": by_vectors(sentence_encoder(folder, max_length))}


def sentence_encoder(folder: Path, max_length: int) -> Encode:
    """A sentence-transformers model, in bfloat16 where the hardware has it."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu", model_kwargs={"attn_implementation": "eager"})
    model.max_seq_length = max_length
    if torch.cpu._is_avx512_bf16_supported():
        model.bfloat16()

    def encode(texts: Sequence[str]) -> Tensor:
        vectors = model.encode(list(texts), batch_size=64, convert_to_tensor=True, show_progress_bar=False)
        return torch.nn.functional.normalize(vectors.float(), dim=1)

    return encode


def by_vectors(encode: Encode) -> Search:
    """Exact search by dot product."""

    @torch.inference_mode()
    def find(collection: Collection, queries: Sequence[str]) -> Tensor:
        return search(_in_blocks(encode, queries), _in_blocks(encode, collection.documents), DEPTH)

    return find


def ndcg_by_query(find: Search, collection: Collection) -> np.ndarray:
    """nDCG@10 of the queries that have an answer, in the order of their rows."""
    rows = np.unique(collection.query_rows[collection.scores > 0])
    hits = find(collection, [collection.queries[row] for row in rows])
    return ndcg_of_hits(collection, rows, hits[:, :DEPTH].tolist())


def ndcg_of_hits(collection: Collection, rows: np.ndarray, hits: Sequence[Sequence[int]]) -> np.ndarray:
    """nDCG@10 of the queries `rows`, whose hits are rows of documents, the best first."""
    run = {
        str(q): {str(d): float(-rank) for rank, d in enumerate(of)} for q, of in zip(rows.tolist(), hits, strict=True)
    }
    qrels: dict[str, dict[str, int]] = {query: {} for query in run}
    for query, document, score in zip(collection.query_rows, collection.document_rows, collection.scores, strict=True):
        qrels[str(query)][str(document)] = int(score)
    measure = ir_measures.nDCG @ DEPTH
    found = {metric.query_id: metric.value for metric in ir_measures.iter_calc([measure], qrels, run)}
    return np.array([found[query] for query in run])


def _in_blocks(encode: Encode, texts: Sequence[str]) -> Tensor:
    return torch.cat([encode(texts[start : start + _TEXTS_AT_ONCE]) for start in range(0, len(texts), _TEXTS_AT_ONCE)])
