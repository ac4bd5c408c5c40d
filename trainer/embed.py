"""Texts → vectors of a trained encoder, in chunks of texts of like length.

Where torch.distributed has several ranks, all of them call an Embedder with the same texts: each embeds some of the
chunks and all receive every row, the same that one rank alone would get, since the chunks are the same.

Shapes: N texts, C rows of a chunk, T tokens, H width of a vector, M context documents.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.model import Encoder
from trainer.tokens import TextTokenizer, Tokens, chunk_by_length, concat, pad

TEXTS_PER_CHUNK = 128
_TEXTS_TOKENISED_AT_ONCE = 8_192


def go_on() -> None:
    """Nothing to do between two blocks of work."""


@dataclass(frozen=True, kw_only=True)
class Embedder:
    """An encoder and how it reads texts. Vectors are float32, on the encoder's device, in the order of the texts.

    The encoder runs in evaluation mode without gradients; every module of it is as before afterwards.
    """

    encoder: Encoder
    tokenizer: TextTokenizer
    query_prompt: str = ""
    document_prompt: str = ""
    texts_per_chunk: int = TEXTS_PER_CHUNK
    """Texts of one forward pass."""
    precision: torch.dtype | None = None
    """Of autocast; None for float32 throughout."""
    split_over_ranks: bool = True
    """Whether ranks share the texts; otherwise each embeds what it is given, and waits for nobody."""
    between_blocks: Callable[[], None] = go_on
    """Called by all ranks equally often, between pieces of work that take seconds; what it raises ends the work."""

    def queries(self, texts: Sequence[str], context_MH: Tensor | None = None) -> Tensor:
        """Unit embeddings (N × H) of queries; `context_MH` is what `context` returned, None for no context."""
        return self._embed(texts, self.query_prompt, self._second_stage(context_MH))

    def documents(self, texts: Sequence[str], context_MH: Tensor | None = None) -> Tensor:
        """Unit embeddings (N × H) of documents; `context_MH` is what `context` returned, None for no context."""
        return self._embed(texts, self.document_prompt, self._second_stage(context_MH))

    def context(self, documents: Sequence[str]) -> Tensor:
        """Vectors (M × H) of context documents, by the first stage, which the encoder must have."""
        first_stage = self.encoder.first_stage_model
        assert first_stage is not None, "a biencoder reads no context"
        return self._embed(documents, self.document_prompt, first_stage)

    def _second_stage(self, context_MH: Tensor | None) -> Callable[..., Tensor]:
        def stage(*tensors_CT: Tensor) -> Tensor:
            embeddings_CH: Tensor = self.encoder.second_stage_model(*tensors_CT, context_MH)
            return embeddings_CH

        return stage

    def _embed(self, texts: Sequence[str], prompt: str, stage: Callable[..., Tensor]) -> Tensor:
        encoder, tokenizer = self.encoder, self.tokenizer
        device = next(encoder.parameters()).device
        tokens = self._tokenize(texts, prompt)
        rank, num_ranks = ranks() if self.split_over_ranks else (0, 1)
        vectors_NH = torch.zeros(len(texts), encoder.backbone_config.hidden_size, device=device)
        autocast = torch.autocast(device.type, dtype=self.precision, enabled=self.precision is not None)
        with evaluating(encoder), autocast:
            chunks = chunk_by_length(tokens.lengths_N, self.texts_per_chunk)
            for first in range(0, len(chunks), num_ranks):
                self.between_blocks()
                for rows_C in chunks[first : first + num_ranks][rank : rank + 1]:
                    padded = pad(tokens, rows_C, tokenizer.pad_id)
                    pooled_CT = padded.mask_CT if encoder.config.pool_prompt else padded.without_prompt_CT()
                    tensors_CT = (tensor.to(device) for tensor in (padded.ids_CT, padded.mask_CT, pooled_CT))
                    vectors_NH[rows_C.to(device)] = stage(*tensors_CT)
        if num_ranks > 1:
            dist.all_reduce(vectors_NH)  # a row comes from one rank, the others have zeros there: nothing is rounded
        return vectors_NH

    def _tokenize(self, texts: Sequence[str], prompt: str) -> Tokens:
        parts = []
        for start in range(0, max(1, len(texts)), _TEXTS_TOKENISED_AT_ONCE):
            self.between_blocks()
            parts.append(self.tokenizer.tokenize(texts[start : start + _TEXTS_TOKENISED_AT_ONCE], prompt))
        return concat(parts)


def ranks() -> tuple[int, int]:
    """This process's rank and the number of ranks: (0, 1) where it is alone."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients for the body; every submodule is as before afterwards."""
    was_training = {part: part.training for part in module.modules()}
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, training in was_training.items():
            part.training = training
