"""Retrieval metrics of a model on collections, beside those of BM25.

    python -m hardbatch.trainer.evaluate --model MODEL --collection DIR [--collection DIR ...]

MODEL is a checkpoint, an export, or any sentence-transformers model: a folder, `minilm`, or a name on
the hub. A contextual model is measured with a context of the searched corpus, with the default
context of its export, and with no context.

All ranks of torch.distributed call `evaluate_retrieval` with the same arguments. They share the work,
and all of them return the metrics that one rank alone would.

Shapes: N documents of a corpus, Q queries, K hits of a query, H width of a vector, M context documents.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hardbatch.pipeline.artifacts.files import user_path
from hardbatch.pipeline.errors import ConfigError
from hardbatch.pipeline.models.locate import locate_model, require_safetensors
from hardbatch.trainer.collection import Collection, load_collection
from hardbatch.trainer.context import read_documents
from hardbatch.trainer.embed import TEXTS_PER_CHUNK, Embedder, no_op
from hardbatch.trainer.export import exit_code_of, open_model, read_prompts
from hardbatch.trainer.model import CONFIG_KEY, Encoder
from hardbatch.trainer.ranks import choose_device
from hardbatch.trainer.search import search
from hardbatch.trainer.tokens import TextTokenizer

NUM_HITS = 100
_QUERIES_MEASURED_AT_ONCE = 8_192
_METRIC_NAMES = ("nDCG@10", "recall@100", "MRR@10")
_BM25_WORDS = r"[^\W_]+"  # splits identifiers: shortest_path is two words


@dataclass(frozen=True, kw_only=True)
class RetrievalMetrics:
    """Means over the queries that have a relevant document, each 0..1."""

    ndcg_at_10: float
    recall_at_100: float
    mrr_at_10: float


def evaluate_retrieval(
    encoder: Encoder,
    tokenizer: TextTokenizer,
    collection: Collection,
    *,
    seed: int,
    with_context: bool,
    default_context_MH: Tensor | None = None,
    query_prompt: str = "",
    document_prompt: str = "",
    texts_per_chunk: int = TEXTS_PER_CHUNK,
    precision: torch.dtype | None = None,
    between_blocks: Callable[[], None] = no_op,
) -> RetrievalMetrics:
    """Measures retrieval from the whole corpus, by exact search in float32.

    Args:
        encoder: Contextual, or a biencoder, which never reads a context.
        tokenizer: The tokenizer of the encoder.
        collection: Corpus, queries and judgements.
        seed: Draws the context.
        with_context: Use J documents of the corpus as context, all of them if there are fewer.
        default_context_MH: The context if `with_context` is False; None is no context.
        query_prompt: Text before each query.
        document_prompt: Text before each document.
        texts_per_chunk: Texts in one forward pass.
        precision: The type of autocast while texts are embedded; None is float32.
        between_blocks: Called by all ranks equally often, every few seconds. An exception that it
            raises on all of them ends the evaluation.
    """
    embedder = Embedder(
        encoder=encoder,
        tokenizer=tokenizer,
        query_prompt=query_prompt,
        document_prompt=document_prompt,
        texts_per_chunk=texts_per_chunk,
        precision=precision,
        between_blocks=between_blocks,
        kept=collection.kept,
    )
    context_MH = default_context_MH
    if with_context:
        context_MH = embedder.drawn_context(collection.documents, seed=seed, position=0)

    query_rows_Q, queries = _answered(collection)
    queries_QH = embedder.queries(queries, context_MH)
    documents_NH = embedder.documents(collection.documents, context_MH)
    hits_QK = search(queries_QH, documents_NH, NUM_HITS, between_blocks)
    return measure(collection, query_rows_Q, hits_QK, between_blocks)


def evaluate_sentence_transformer(
    model: Any,
    collection: Collection,
    *,
    query_prompt: str | None = None,
    document_prompt: str | None = None,
    texts_per_chunk: int = TEXTS_PER_CHUNK,
) -> RetrievalMetrics:
    """Measures retrieval of any `SentenceTransformer`, by exact search with its own similarity.

    Args:
        model: The model.
        collection: Corpus, queries and judgements.
        query_prompt: Text before each query; None is what the model has for `encode_query`.
        document_prompt: Text before each document; None is what it has for `encode_document`.
        texts_per_chunk: Texts in one forward pass.

    Raises:
        ConfigError: The model compares by something else than cosine or dot product.
    """
    similarity = model.similarity_fn_name
    if similarity not in ("cosine", "dot"):
        raise ConfigError(f"--model: compares by {similarity}; only cosine and dot can be evaluated")
    options: dict[str, Any] = {
        "batch_size": texts_per_chunk,
        "convert_to_tensor": True,
        "normalize_embeddings": similarity == "cosine",
        "show_progress_bar": False,
    }
    query_rows_Q, queries = _answered(collection)
    queries_QH = model.encode_query(queries, prompt=query_prompt, **options).float()
    documents_NH = model.encode_document(collection.documents, prompt=document_prompt, **options).float()
    return measure(collection, query_rows_Q, search(queries_QH, documents_NH, NUM_HITS))


def evaluate_bm25(collection: Collection) -> RetrievalMetrics:
    """Measures BM25 (k1 = 1.5, b = 0.75) on lower-case words, without stemming or stop words."""
    query_rows_Q, queries = _answered(collection)
    return measure(collection, query_rows_Q, find_by_bm25(collection, queries))


def find_by_bm25(collection: Collection, queries: Sequence[str]) -> Tensor:
    """Searches the documents of a collection with BM25, see `evaluate_bm25`.

    Returns:
        Rows of documents, the best first (int64, Q × K; at most 100 for each query).
    """
    import bm25s

    def words(texts: Sequence[str]) -> Any:
        return bm25s.tokenize(texts, token_pattern=_BM25_WORDS, stopwords=None, show_progress=False)

    index = bm25s.BM25(k1=1.5, b=0.75)
    index.index(words(collection.documents), show_progress=False)
    num_hits = min(NUM_HITS, len(collection.documents))
    hits_QK, _ = index.retrieve(words(queries), k=num_hits, show_progress=False)
    return torch.from_numpy(hits_QK.astype(np.int64))


def measure(
    collection: Collection,
    query_rows_Q: NDArray[np.int64],
    hits_QK: Tensor,
    between_blocks: Callable[[], None] = no_op,
) -> RetrievalMetrics:
    """The metrics of the hits (rows of documents, the best first) of the queries `query_rows_Q`."""
    import ir_measures  # late: a training without evaluation does not need it

    measures = (ir_measures.nDCG @ 10, ir_measures.R @ NUM_HITS, ir_measures.RR @ 10)

    # Ranks serve as scores, so that no library reorders hits with equal scores.
    hits = zip(query_rows_Q.tolist(), hits_QK.tolist(), strict=True)
    run = {str(query): {str(row): float(-rank) for rank, row in enumerate(rows)} for query, rows in hits}
    qrels: dict[str, dict[str, int]] = {query: {} for query in run}
    columns = (collection.query_rows, collection.document_rows, collection.scores)
    for query, document, score in zip(*(column.tolist() for column in columns), strict=True):
        if str(query) in qrels:
            qrels[str(query)][str(document)] = score

    names = list(run)
    sums = dict.fromkeys(measures, 0.0)
    for start in range(0, len(names), _QUERIES_MEASURED_AT_ONCE):
        between_blocks()
        block = names[start : start + _QUERIES_MEASURED_AT_ONCE]
        of_block = ({name: judged[name] for name in block} for judged in (qrels, run))
        for metric, mean in ir_measures.calc_aggregate(measures, *of_block).items():
            sums[metric] += mean * len(block)
    ndcg, recall, mrr = (sums[metric] / len(names) for metric in measures)
    return RetrievalMetrics(ndcg_at_10=ndcg, recall_at_100=recall, mrr_at_10=mrr)


def main(arguments: Sequence[str]) -> int:
    """Prints a table for each collection. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m hardbatch.trainer.evaluate",
        description="Retrieval metrics of models on collections, beside those of BM25.",
    )
    add = parser.add_argument
    add(
        "--model",
        action="append",
        required=True,
        help="checkpoint, export, or sentence-transformers model (folder, minilm, or name on the hub); may be repeated",
    )
    add(
        "--collection",
        "--eval",
        action="append",
        type=user_path,
        required=True,
        metavar="DIR",
        help="folder of corpus, queries and qrels, as Parquet or in the layout of BEIR or MTEB; may be repeated",
    )
    add("--seed", type=int, default=0, help="draws the context of a corpus; default: 0")
    add("--texts-per-chunk", type=int, default=TEXTS_PER_CHUNK, help="texts in one forward pass")
    add("--query-prompt", help="text before a query; default: the model's own")
    add("--document-prompt", help="text before a document; default: the model's own")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
    options = parser.parse_args(arguments)

    def evaluate() -> None:
        if options.texts_per_chunk < 1:
            raise ConfigError(f"--texts-per-chunk {options.texts_per_chunk}: give 1 or more")
        collections = [load_collection(folder) for folder in options.collection]
        models = [_open(name, options) for name in options.model]
        for collection in collections:
            num_queries = len(_answered(collection)[0])
            print(
                f"{collection.name}: {len(collection.documents):,} documents ({collection.source}), "
                f"{num_queries:,} queries"
            )
            print(f"  {'':<44}" + "".join(f"{name:>12}" for name in _METRIC_NAMES))
            for rows_of in (*models, _bm25_rows):
                for name, metrics in rows_of(collection):
                    values = "".join(f"{value:>12.4f}" for value in astuple(metrics))
                    print(f"  {name:<44}{values}", flush=True)

    return exit_code_of(evaluate)


_Rows = Iterator[tuple[str, RetrievalMetrics]]


def _open(name: str, options: argparse.Namespace) -> Callable[[Collection], _Rows]:
    """Loads a model. Returns a function that gives the rows of its table for a collection."""
    device = choose_device(options.device)
    shown, folder, _ = locate_model(name, None, Path())
    if _is_ours(folder):
        return _open_own(folder, shown, options, device)

    require_safetensors(name, folder)
    from sentence_transformers import SentenceTransformer

    try:
        model = SentenceTransformer(str(folder), device=str(device), trust_remote_code=False)
    except Exception as error:  # whatever transformers says about files that do not fit
        raise ConfigError(f"--model {name}: {' '.join(str(error).split())[:300]}") from None

    def rows(collection: Collection) -> _Rows:
        yield (
            shown,
            evaluate_sentence_transformer(
                model,
                collection,
                query_prompt=options.query_prompt,
                document_prompt=options.document_prompt,
                texts_per_chunk=options.texts_per_chunk,
            ),
        )

    return rows


def _open_own(
    folder: Path, name: str, options: argparse.Namespace, device: torch.device
) -> Callable[[Collection], _Rows]:
    encoder, tokenizer = open_model(folder, "--model")
    encoder.to(device)
    given = {"query": options.query_prompt, "document": options.document_prompt}
    prompts = read_prompts(folder) | {key: text for key, text in given.items() if text is not None}

    contexts: dict[str, dict[str, Any]] = {"": {"with_context": False}}
    if encoder.config.context_size:
        contexts = {", context of the corpus": {"with_context": True}}
        documents = read_documents(folder).documents
        if documents:
            embedder = Embedder(encoder=encoder, tokenizer=tokenizer, document_prompt=prompts["document"])
            contexts[", default context"] = {
                "with_context": False,
                "default_context_MH": embedder.context(documents),
            }
        contexts[", no context"] = {"with_context": False}

    def rows(collection: Collection) -> _Rows:
        for suffix, context in contexts.items():
            metrics = evaluate_retrieval(
                encoder,
                tokenizer,
                collection,
                seed=options.seed,
                query_prompt=prompts["query"],
                document_prompt=prompts["document"],
                texts_per_chunk=options.texts_per_chunk,
                **context,
            )
            yield name + suffix, metrics

    return rows


def _bm25_rows(collection: Collection) -> _Rows:
    yield "BM25", evaluate_bm25(collection)


def _is_ours(folder: Path) -> bool:
    try:
        return CONFIG_KEY in json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError, TypeError):
        return False


def _answered(collection: Collection) -> tuple[NDArray[np.int64], list[str]]:
    """Rows and texts of the queries that have a relevant document."""
    rows_Q = np.unique(collection.query_rows[collection.scores > 0])
    return rows_Q, [collection.queries[row] for row in rows_Q]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
