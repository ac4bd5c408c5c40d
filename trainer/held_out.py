"""The held-out loss of an encoder: the loss of training, over relevant pairs of a collection in random batches.

All ranks of torch.distributed call `held_out_loss` with the same arguments. They share the batches,
and all of them return the figures that one rank alone would.

Shapes: B pairs of a batch, M context documents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from hardbatch.pipeline.errors import InputError
from hardbatch.trainer.collection import Collection
from hardbatch.trainer.draws import derive_seed
from hardbatch.trainer.embed import TEXTS_PER_CHUNK, Embedder, no_op, ranks
from hardbatch.trainer.loss import info_nce
from hardbatch.trainer.model import Encoder
from hardbatch.trainer.tokens import TextTokenizer

MAX_HELD_OUT_PAIRS = 4_096


@dataclass(frozen=True, kw_only=True)
class HeldOutLoss:
    """Means over batches: InfoNCE, and the share of queries whose own document scores highest."""

    loss: float
    accuracy: float
    num_batches: int


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
    between_blocks: Callable[[], None] = no_op,
) -> HeldOutLoss:
    """Measures loss and accuracy on batches of relevant pairs in random order.

    The context of a batch is J of its documents. Documents that are relevant to a query, and exact
    copies of them, are not used as its negatives.

    Args:
        encoder: Contextual, or a biencoder.
        tokenizer: The tokenizer of the encoder.
        collection: Supplies the pairs.
        batch_size: B. Pairs that do not fill a batch are left out, unless there are no others.
        seed: Draws the order and the contexts.
        temperature: τ of InfoNCE.
        query_prompt: Text before each query.
        document_prompt: Text before each document.
        texts_per_chunk: Texts in one forward pass.
        precision: The type of autocast; None is float32 throughout.
        max_pairs: The most pairs that are used; one batch is always used.
        between_blocks: Called by all ranks equally often, every few seconds. An exception that it
            raises on all of them ends the evaluation.

    Raises:
        InputError: There are fewer than two relevant pairs.
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
    metrics = torch.zeros(len(batches), 2, dtype=torch.float64, device=device)

    for first in range(0, len(batches), num_ranks):
        between_blocks()
        for number in range(first, len(batches))[rank : rank + 1]:
            batch = batches[number]
            documents = [collection.documents[row] for row in batch.document_rows_B]
            context_MH = embedder.drawn_context(documents, seed=seed, position=number)
            loss = info_nce(
                embedder.queries([collection.queries[row] for row in batch.query_rows_B], context_MH),
                embedder.documents(documents, context_MH),
                torch.from_numpy(batch.equivalent_BB).to(device),
                temperature=temperature,
            )
            metrics[number] = torch.stack([loss.value, loss.accuracy])

    if num_ranks > 1:
        dist.all_reduce(metrics)
    mean_loss, accuracy = metrics.mean(0).tolist()
    return HeldOutLoss(loss=mean_loss, accuracy=accuracy, num_batches=len(batches))


@dataclass(frozen=True, kw_only=True)
class _Batch:
    query_rows_B: NDArray[np.int64]
    document_rows_B: NDArray[np.int64]
    equivalent_BB: NDArray[np.bool_]


def _draw_batches(collection: Collection, batch_size: int, max_pairs: int, seed: int) -> list[_Batch]:
    relevant = np.flatnonzero(collection.scores > 0)
    if len(relevant) < 2:
        raise InputError(f"{collection.name}: has one relevant pair, and a held-out loss needs two or more")
    order = np.random.default_rng(derive_seed(seed, "held_out")).permutation(relevant)
    size = min(batch_size, len(order))
    num_batches = min(len(order), max(max_pairs, size)) // size

    # Known pairs as numbers, query text · N + document text, so that copies of a text are one.
    query_text_of, document_text_of = _text_ids(collection.queries), _text_ids(collection.documents)
    num_documents = len(collection.documents)
    query_texts = query_text_of[collection.query_rows[relevant]]
    known = np.unique(query_texts * num_documents + document_text_of[collection.document_rows[relevant]])

    batches = []
    for start in range(0, num_batches * size, size):
        rows_B = order[start : start + size]
        query_rows_B, document_rows_B = collection.query_rows[rows_B], collection.document_rows[rows_B]
        pairs_BB = query_text_of[query_rows_B][:, None] * num_documents + document_text_of[document_rows_B]
        batch = _Batch(
            query_rows_B=query_rows_B,
            document_rows_B=document_rows_B,
            equivalent_BB=np.isin(pairs_BB, known),
        )
        batches.append(batch)
    return batches


def _text_ids(texts: Sequence[str]) -> NDArray[np.int64]:
    """For each text, the row of its first occurrence."""
    first: dict[str, int] = {}
    return np.array([first.setdefault(text, row) for row, text in enumerate(texts)], np.int64)
