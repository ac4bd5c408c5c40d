"""Retrieval figures and the held-out loss of an encoder, on folders of corpus, queries and qrels.

    python -m hardbatch.trainer.evaluate --model DIR --eval DIR[,DIR]

An encoder with context is measured twice: without context, and with J documents of the collection's corpus as the
context of all documents and queries. Where torch.distributed has several ranks, all of them call these functions with
the same arguments, share the work, and return the same figures, those of one rank alone.

Shapes: N documents of a corpus, Q queries, K hits of a query, H width of a vector, B pairs of a batch, M context
documents.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from hardbatch.pipeline.errors import ConfigError, InputError
from hardbatch.trainer.collection import Collection, load_collection
from hardbatch.trainer.draws import derive_seed, draw_context
from hardbatch.trainer.embed import TEXTS_PER_CHUNK, Embedder, go_on, ranks
from hardbatch.trainer.export import exit_code_of, open_model, read_prompts
from hardbatch.trainer.loss import info_nce
from hardbatch.trainer.model import Encoder
from hardbatch.trainer.search import search
from hardbatch.trainer.tokens import TextTokenizer

NUM_HITS = 100
MAX_HELD_OUT_PAIRS = 4_096
_QUERIES_MEASURED_AT_ONCE = 8_192
_MEASURE_NAMES = ("nDCG@10", "recall@100", "MRR@10")


@dataclass(frozen=True, kw_only=True)
class RetrievalMetrics:
    """Means over the queries that have a relevant document, each 0..1."""

    ndcg_at_10: float
    recall_at_100: float
    mrr_at_10: float


@dataclass(frozen=True, kw_only=True)
class HeldOutLoss:
    """Means over batches: InfoNCE, and the share of queries that put their own document first."""

    loss: float
    accuracy: float
    num_batches: int


def evaluate_retrieval(
    encoder: Encoder,
    tokenizer: TextTokenizer,
    collection: Collection,
    *,
    seed: int,
    with_context: bool,
    query_prompt: str = "",
    document_prompt: str = "",
    texts_per_chunk: int = TEXTS_PER_CHUNK,
    precision: torch.dtype | None = None,
    between_blocks: Callable[[], None] = go_on,
) -> RetrievalMetrics:
    """Retrieval from the whole corpus by exact search in float32; `precision` is autocast's while embedding.

    The context is J documents drawn from the corpus by `seed`; a corpus of fewer is its own context, the rest nulls.
    A biencoder has no context whatever `with_context` says. All ranks call `between_blocks` equally often, every few
    seconds: what it raises on all of them ends the evaluation.
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
    context_MH = _draw_context(embedder, collection.documents, seed, 0) if with_context else None
    query_rows_Q = np.unique(collection.query_rows[collection.scores > 0])
    queries_QH = embedder.queries([collection.queries[row] for row in query_rows_Q], context_MH)
    documents_NH = embedder.documents(collection.documents, context_MH)
    hits_QK = search(queries_QH, documents_NH, NUM_HITS, between_blocks)
    return _measure(collection, query_rows_Q, hits_QK, between_blocks)


def held_out_loss(
    encoder: Encoder,
    tokenizer: TextTokenizer,
    collection: Collection,
    *,
    batch_size: int,
    seed: int,
    temperature: float,
    query_prompt: str = "",
    document_prompt: str = "",
    texts_per_chunk: int = TEXTS_PER_CHUNK,
    precision: torch.dtype | None = None,
    max_pairs: int = MAX_HELD_OUT_PAIRS,
    between_blocks: Callable[[], None] = go_on,
) -> HeldOutLoss:
    """Loss and accuracy of the relevant pairs in batches of random order, each with J of its documents as context.

    Order and context are drawn by `seed`. A document that is relevant to a query, or whose text is that of one that
    is, is no negative of it. At most `max_pairs` pairs are taken, but one batch at least; those that do not fill a
    batch are left out, unless there are no others. `between_blocks` as above. Raises InputError where there are fewer
    than two pairs.
    """
    embedder = Embedder(
        encoder=encoder,
        tokenizer=tokenizer,
        query_prompt=query_prompt,
        document_prompt=document_prompt,
        texts_per_chunk=texts_per_chunk,
        precision=precision,
        split_over_ranks=False,
    )
    batches = _draw_batches(collection, batch_size, max_pairs, seed)
    rank, num_ranks = ranks()
    device = next(encoder.parameters()).device
    figures = torch.zeros(len(batches), 2, dtype=torch.float64, device=device)
    for first in range(0, len(batches), num_ranks):
        between_blocks()
        for number in range(first, len(batches))[rank : rank + 1]:
            batch = batches[number]
            documents = [collection.documents[row] for row in batch.document_rows_B]
            context_MH = _draw_context(embedder, documents, seed, number)
            loss = info_nce(
                embedder.queries([collection.queries[row] for row in batch.query_rows_B], context_MH),
                embedder.documents(documents, context_MH),
                torch.from_numpy(batch.equivalent_BB).to(device),
                temperature=temperature,
            )
            figures[number] = torch.stack([loss.value, loss.accuracy])
    if num_ranks > 1:
        dist.all_reduce(figures)
    mean_loss, accuracy = figures.mean(0).tolist()
    return HeldOutLoss(loss=mean_loss, accuracy=accuracy, num_batches=len(batches))


def main(arguments: Sequence[str]) -> int:
    """Prints a table of figures of one model on several collections. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m hardbatch.trainer.evaluate", description="Retrieval figures of a model."
    )
    parser.add_argument("--model", type=Path, required=True, help="folder of a checkpoint or an export")
    parser.add_argument("--eval", required=True, help="folders of corpus/queries/qrels, separated by commas")
    parser.add_argument("--seed", type=int, default=0, help="draws the context; default: 0")
    parser.add_argument("--texts-per-chunk", type=int, default=TEXTS_PER_CHUNK, help="texts of one forward pass")
    parser.add_argument("--query-prompt", help="text before a query; default: as in training")
    parser.add_argument("--document-prompt", help="text before a document; default: as in training")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
    options = parser.parse_args(arguments)

    def evaluate() -> None:
        if options.texts_per_chunk < 1:
            raise ConfigError(f"--texts-per-chunk {options.texts_per_chunk}: give 1 or more")
        collections = [load_collection(Path(part)) for part in options.eval.split(",") if part]
        if not collections:
            raise ConfigError("--eval: give at least one folder")
        encoder, tokenizer = open_model(options.model, "--model")
        encoder.to(_choose_device(options.device))
        given = {"query": options.query_prompt, "document": options.document_prompt}
        prompts = read_prompts(options.model) | {name: text for name, text in given.items() if text is not None}
        contexts = (False, True) if encoder.config.context_size else (False,)
        width = max(len("collection"), *(len(collection.name) for collection in collections))
        _print_header(width, contexts, encoder.config.context_size)
        for collection in collections:
            figures: list[float] = []
            for with_context in contexts:
                found = evaluate_retrieval(
                    encoder,
                    tokenizer,
                    collection,
                    seed=options.seed,
                    with_context=with_context,
                    query_prompt=prompts["query"],
                    document_prompt=prompts["document"],
                    texts_per_chunk=options.texts_per_chunk,
                )
                figures += astuple(found)
            print(f"{collection.name:<{width}}" + "".join(f"{figure:>12.4f}" for figure in figures), flush=True)

    return exit_code_of(evaluate)


def _draw_context(embedder: Embedder, documents: Sequence[str], seed: int, position: int) -> Tensor | None:
    """Vectors of J of the documents, drawn by (seed, position) as in training; None for a biencoder."""
    size = embedder.encoder.config.context_size
    if size == 0:
        return None
    rows_M = draw_context(len(documents), size, seed=seed, position=position)
    return embedder.context([documents[row] for row in rows_M.tolist()])


def _measure(
    collection: Collection, query_rows_Q: NDArray[np.int64], hits_QK: Tensor, between_blocks: Callable[[], None]
) -> RetrievalMetrics:
    import ir_measures  # here, because a training without evaluation does without it

    measures = (ir_measures.nDCG @ 10, ir_measures.R @ NUM_HITS, ir_measures.RR @ 10)

    # ranks as scores: what is first for `search` stays first, whatever a library does about ties
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
        for measure, mean in ir_measures.calc_aggregate(measures, *of_block).items():
            sums[measure] += mean * len(block)
    ndcg, recall, mrr = (sums[measure] / len(names) for measure in measures)
    return RetrievalMetrics(ndcg_at_10=ndcg, recall_at_100=recall, mrr_at_10=mrr)


@dataclass(frozen=True, kw_only=True)
class _Batch:
    query_rows_B: NDArray[np.int64]
    document_rows_B: NDArray[np.int64]
    equivalent_BB: NDArray[np.bool_]


def _draw_batches(collection: Collection, batch_size: int, max_pairs: int, seed: int) -> list[_Batch]:
    relevant = np.flatnonzero(collection.scores > 0)
    if len(relevant) < 2:
        raise InputError(f"{collection.name}: one relevant pair makes no batch; a held-out loss takes two or more")
    order = np.random.default_rng(derive_seed(seed, "held_out")).permutation(relevant)
    size = min(batch_size, len(order))
    num_batches = min(len(order), max(max_pairs, size)) // size
    query_text_of, document_text_of = _text_ids(collection.queries), _text_ids(collection.documents)
    num_documents = len(collection.documents)
    known = np.unique(
        query_text_of[collection.query_rows[relevant]] * num_documents
        + document_text_of[collection.document_rows[relevant]]
    )
    batches = []
    for start in range(0, num_batches * size, size):
        rows_B = order[start : start + size]
        query_rows_B, document_rows_B = collection.query_rows[rows_B], collection.document_rows[rows_B]
        pairs_BB = query_text_of[query_rows_B][:, None] * num_documents + document_text_of[document_rows_B]
        batches.append(
            _Batch(query_rows_B=query_rows_B, document_rows_B=document_rows_B, equivalent_BB=np.isin(pairs_BB, known))
        )
    return batches


def _text_ids(texts: Sequence[str]) -> NDArray[np.int64]:
    """For each text the row where it first occurs."""
    first: dict[str, int] = {}
    return np.array([first.setdefault(text, row) for row, text in enumerate(texts)], np.int64)


def _choose_device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: no CUDA device can be used here; give auto or cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")

    # cuDNN builds a plan for each new shape of a chunk, and nearly every chunk has a shape of its own.
    torch.backends.cuda.enable_cudnn_sdp(False)
    return torch.device("cuda")


def _print_header(width: int, contexts: Sequence[bool], context_size: int) -> None:
    if len(contexts) > 1:
        groups = ("no context", f"with context (J = {context_size})")
        print(" " * width + "".join(f"{group:>36}" for group in groups))
    print(f"{'collection':<{width}}" + "".join(f"{name:>12}" for name in _MEASURE_NAMES * len(contexts)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
