"""Forward pass, loss and gradients of one batch, in chunks that fit the memory (two-stage GradCache, Section 4.3).

    pass 1, no graph   context documents ─ M1 ─► context_MH ;  texts, context ─ M2 ─► embeddings_ND ─► loss
    backward           loss ─► gradient of each embedding
    pass 2, per chunk  texts ─ M2 ─► its part of that gradient ─► parameters of M2, gradient of context_MH
                       context documents ─ M1 ─► their part of that gradient ─► parameters of M1

The gradients equal those of one graph over the same chunks and draws, since dropout is replayed.
Ranks average their gradients after the batches of a step (`Ranks.average_gradients`); this module
does not depend on them.

A chunk has texts of similar length, as many as make `chunk_tokens` computed tokens. Under packed
attention it is one row without padding; otherwise it goes through a stage in pieces of nearly equal
length, so that little is padded. Embeddings return to the order of the slots. A batch whose two stages
together have no more tokens than a chunk takes a single pass.

A shared context is computed once a chunk, and its dropped documents are the same for all texts of a
batch; with full context attention each text has a context of its own.

Shapes: N texts of a batch (queries, documents, hard negatives), M context documents, C rows of a chunk, T tokens,
J context size, H width of a context vector, D width of an embedding.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hardbatch.trainer.batch import Batch, Tokens, chunk_by_tokens, computed_tokens, concat, pad, split_tightly
from hardbatch.trainer.draws import draw_context, draw_kept_context, replayed
from hardbatch.trainer.loss import Loss, info_nce
from hardbatch.trainer.model import Encoder


@dataclass(frozen=True, kw_only=True)
class StepConfig:
    """The settings of a step, with the names of the flags in `hardbatch.trainer.config`."""

    chunk_tokens: int
    temperature: float
    sequence_dropout: float
    no_context_rate: float
    seed: int
    autocast: torch.dtype | None = None
    pad_id: int = 0


class GradCache:
    """Losses and gradients of batches under an encoder."""

    def __init__(self, encoder: Encoder, config: StepConfig) -> None:
        self._model = encoder.config
        self._config = config
        self._first = encoder.first_stage_model
        self._second = encoder.second_stage_model
        self._packed = encoder.second_stage_model.is_packed
        self._shared = encoder.config.context_attention == "shared"
        self._device = next(encoder.parameters()).device

    def backward(self, batch: Batch, *, scale: float = 1.0) -> Loss:
        """Adds the gradients of `scale` times the loss of a batch to the parameters.

        Returns:
            The unscaled loss.
        """
        plan = self._plan(batch.to(self._device, non_blocking=True))

        # A small batch needs one pass only.
        if plan.num_tokens <= self._config.chunk_tokens:
            loss = self._loss(plan, self._embed(plan, self._embed_context(plan)))
            torch.autograd.backward(loss.value * scale)
            return Loss(value=loss.value.detach(), accuracy=loss.accuracy)

        # Pass 1: embeddings without a graph, and the gradient of each of them.
        with torch.no_grad():
            context_MH = self._embed_context(plan)
            embeddings_ND = self._embed(plan, context_MH)
        loss = self._loss(plan, embeddings_ND.requires_grad_())
        torch.autograd.backward(loss.value * scale)
        assert embeddings_ND.grad is not None

        # Pass 2, texts: each chunk again with a graph, which also gathers the gradient of the context.
        if context_MH is not None:
            context_MH.requires_grad_()
        for number, rows_C in enumerate(plan.text_chunks):
            gradient_CD = embeddings_ND.grad[self._to_device(rows_C)]
            torch.autograd.backward(self._embed_chunk(plan, number, context_MH), gradient_CD)

        # Pass 2, context documents.
        for number, rows_C in enumerate(plan.context_chunks):
            assert context_MH is not None and context_MH.grad is not None
            gradient_CH = context_MH.grad[self._to_device(rows_C)]
            torch.autograd.backward(self._embed_context_chunk(plan, number), gradient_CH)
        return Loss(value=loss.value.detach(), accuracy=loss.accuracy)

    def _plan(self, batch: Batch) -> _Plan:
        config, context_size = self._config, self._model.context_size
        texts = concat(batch.sides)

        draw = {"seed": config.seed, "position": batch.position}
        context_rows_M = draw_context(len(batch.documents), context_size, **draw)
        keep_NJ = draw_kept_context(
            1 if self._shared else len(texts),
            context_size,
            sequence_dropout=config.sequence_dropout,
            no_context_rate=config.no_context_rate,
            **draw,
        )

        # A shared context counts once in each chunk of texts, any other once in front of each text.
        of_chunk, of_text = (context_size, 0) if self._shared else (0, context_size)
        sizes: dict[str, Any] = {"context_size": of_text, "packed": self._packed}
        text_chunks = chunk_by_tokens(texts.lengths_N, max(1, config.chunk_tokens - of_chunk), **sizes)
        num_tokens = computed_tokens(texts.lengths_N, text_chunks, **sizes) + of_chunk * len(text_chunks)

        context_lengths_M = batch.documents.lengths_N[context_rows_M]
        context_chunks = (
            chunk_by_tokens(context_lengths_M, config.chunk_tokens, packed=self._packed) if context_size else []
        )
        num_tokens += computed_tokens(context_lengths_M, context_chunks, packed=self._packed) if context_size else 0
        return _Plan(
            batch=batch,
            texts=texts,
            text_chunks=text_chunks,
            context_rows_M=context_rows_M,
            context_chunks=context_chunks,
            keep_NJ=keep_NJ,
            num_tokens=num_tokens,
        )

    def _embed_context(self, plan: _Plan) -> Tensor | None:
        if self._first is None:
            return None
        chunks = [self._embed_context_chunk(plan, number) for number in range(len(plan.context_chunks))]
        return _in_order(chunks, plan.context_chunks)

    def _embed_context_chunk(self, plan: _Plan, number: int) -> Tensor:
        assert self._first is not None
        rows_C = plan.context_rows_M[plan.context_chunks[number]]
        with replayed(self._device, self._config.seed, plan.batch.position, "first_stage", number), self._autocast():
            pieces = self._pieces(plan.batch.documents, rows_C)
            return torch.cat([self._first(*piece, num_tokens=num_tokens) for _, piece, num_tokens in pieces])

    def _embed(self, plan: _Plan, context_MH: Tensor | None) -> Tensor:
        chunks = [self._embed_chunk(plan, number, context_MH) for number in range(len(plan.text_chunks))]
        return _in_order(chunks, plan.text_chunks)

    def _embed_chunk(self, plan: _Plan, number: int, context_MH: Tensor | None) -> Tensor:
        rows_C = plan.text_chunks[number]
        with replayed(self._device, self._config.seed, plan.batch.position, "second_stage", number), self._autocast():
            embeddings = [
                self._second(*piece, context_MH, self._keep(plan, piece_rows), num_tokens=num_tokens)
                for piece_rows, piece, num_tokens in self._pieces(plan.texts, rows_C)
            ]
            return torch.cat(embeddings)

    def _keep(self, plan: _Plan, rows: Tensor) -> Tensor:
        return plan.keep_NJ if self._shared else self._to_device(plan.keep_NJ[rows])

    def _loss(self, plan: _Plan, embeddings_ND: Tensor) -> Loss:
        size = len(plan.batch.queries)
        return info_nce(
            embeddings_ND[:size],
            embeddings_ND[size : 2 * size],
            self._to_device(plan.batch.equivalent_BB),
            temperature=self._config.temperature,
            positive_BB=None if plan.batch.positive_BB is None else self._to_device(plan.batch.positive_BB),
            negatives_MD=embeddings_ND[2 * size :],
            negative_owner_M=self._to_device(plan.batch.negative_owner_M),
        )

    def _pieces(self, tokens: Tokens, rows_C: Tensor) -> Iterator[tuple[Tensor, tuple[Tensor, Tensor, Tensor], int]]:
        """Yields the rows of each piece of a chunk, its ids, mask and pooled tokens on the device, and its tokens.

        A packed chunk is a single piece, since its padding is taken out again before it is computed.
        """
        sizes = [len(rows_C)] if self._packed else split_tightly(tokens.lengths_N[rows_C])
        for piece_rows in torch.split(rows_C, sizes):
            padded = pad(tokens, piece_rows, self._config.pad_id)
            pooled = padded.mask_CT if self._model.pool_prompt else padded.without_prompt_CT()
            yield (
                piece_rows,
                (
                    self._to_device(padded.ids_CT),
                    self._to_device(padded.mask_CT),
                    self._to_device(pooled),
                ),
                int(tokens.lengths_N[piece_rows].sum()),
            )

    def _to_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._device, non_blocking=True)

    def _autocast(self) -> AbstractContextManager[object]:
        # Entered again for each chunk: autocast caches the cast weights, and one that was cast in
        # pass 1, without a graph, would get no gradient in pass 2.
        if self._config.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self._device.type, dtype=self._config.autocast)


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """A batch cut into chunks, and its draws; rows, chunks and lengths are on the CPU."""

    batch: Batch
    texts: Tokens
    text_chunks: list[Tensor]
    context_rows_M: Tensor
    context_chunks: list[Tensor]
    keep_NJ: Tensor
    """1 × J if the context is shared."""
    num_tokens: int
    """Tokens computed in both stages, padding and context included."""


def _in_order(chunks: Sequence[Tensor], rows: Sequence[Tensor]) -> Tensor:
    """Joins the chunks and puts their rows back in order."""
    order = torch.argsort(torch.cat(list(rows)))
    return torch.cat(list(chunks))[order.to(chunks[0].device)]
