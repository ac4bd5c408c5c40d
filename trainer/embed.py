"""Texts → vectors of a trained encoder, in chunks of texts of like length.

If torch.distributed has several ranks, all of them call an Embedder with the same texts. Each rank
tokenises and embeds some of the shelves of texts, and all receive every row, the same that one rank
alone would get, since shelves and chunks are the same.

Shapes: N texts, S texts of a shelf, C rows of a chunk, T tokens, H width of a vector, M context documents.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hardbatch.trainer.model import Encoder
from hardbatch.trainer.shelves import KeptShelves, Shelves
from hardbatch.trainer.tokens import TextTokenizer, Tokens, chunk_by_length, pad

TEXTS_PER_CHUNK = 128
_CHUNKS_PER_SHELF = 16  # with fewer, texts of a chunk differ more in tokens: 6 % of padding grow to 15 % at 4


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
    kept: KeptShelves = field(default_factory=KeptShelves)
    """Tokens of earlier calls, which later calls with the same texts use again."""

    def queries(self, texts: Sequence[str], context_MH: Tensor | None = None) -> Tensor:
        """Unit embeddings (N × H) of queries; `context_MH` is what `context` returned, None for no context."""
        return self._embed("queries", texts, self.query_prompt, self._second_stage(context_MH))

    def documents(self, texts: Sequence[str], context_MH: Tensor | None = None) -> Tensor:
        """Unit embeddings (N × H) of documents; `context_MH` is what `context` returned, None for no context."""
        return self._embed("documents", texts, self.document_prompt, self._second_stage(context_MH))

    def context(self, documents: Sequence[str]) -> Tensor:
        """Vectors (M × H) of context documents, by the first stage, which the encoder must have."""
        first_stage = self.encoder.first_stage_model
        assert first_stage is not None, "a biencoder reads no context"
        return self._embed("context", documents, self.document_prompt, first_stage)

    def _second_stage(self, context_MH: Tensor | None) -> Callable[..., Tensor]:
        def stage(*tensors_CT: Tensor) -> Tensor:
            embeddings_CH: Tensor = self.encoder.second_stage_model(*tensors_CT, context_MH)
            return embeddings_CH

        return stage

    def _embed(self, name: str, texts: Sequence[str], prompt: str, stage: Callable[..., Tensor]) -> Tensor:
        encoder = self.encoder
        device = next(encoder.parameters()).device
        rank, num_ranks = ranks() if self.split_over_ranks else (0, 1)
        vectors_NH = torch.zeros(len(texts), encoder.backbone_config.hidden_size, device=device)

        texts_per_shelf = _CHUNKS_PER_SHELF * self.texts_per_chunk
        shelves = self.kept.shelves(name, texts, prompt, self.tokenizer, texts_per_shelf)
        chunks_at_most = min(_CHUNKS_PER_SHELF, -(-len(texts) // self.texts_per_chunk))

        autocast = torch.autocast(device.type, dtype=self.precision, enabled=self.precision is not None)
        with evaluating(encoder), autocast:
            for turn in _turns(len(shelves), rank, num_ranks):
                self.between_blocks()
                tokens, chunks = self._read(shelves, turn.shelf, device)
                rows_S = shelves.rows(turn.shelf)

                # All ranks count to the same number here, whatever their own shelves hold.
                for start in range(0, chunks_at_most, turn.step):
                    self.between_blocks()
                    for rows_C in chunks[start + turn.first : start + turn.first + 1]:
                        vectors_CH = stage(*self._padded(tokens, rows_C))
                        vectors_NH[_to_device(rows_S[rows_C], device)] = vectors_CH

        if num_ranks > 1:
            dist.all_reduce(vectors_NH)  # a row comes from one rank, the others have zeros there: nothing is rounded
        return vectors_NH

    def _read(self, shelves: Shelves, number: int, device: torch.device) -> tuple[Tokens, list[Tensor]]:
        """The tokens of a shelf with their ids on `device`, copied once for all its chunks; and the chunks."""
        tokens = shelves.tokens(number)
        ids = _to_device(tokens.ids, device).long()
        return replace(tokens, ids=ids), chunk_by_length(tokens.lengths_N, self.texts_per_chunk)

    def _padded(self, tokens: Tokens, rows_C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Ids, mask, and the mask of what the mean is taken over, each C × T."""
        padded = pad(tokens, rows_C, self.tokenizer.pad_id)
        pooled_CT = padded.mask_CT if self.encoder.config.pool_prompt else padded.without_prompt_CT()
        return padded.ids_CT, padded.mask_CT, pooled_CT


@dataclass(frozen=True)
class _Turn:
    """A rank's part of a shelf: the chunks `first`, `first + step`, `first + 2 * step`, ..."""

    shelf: int
    first: int
    step: int


def _turns(num_shelves: int, rank: int, num_ranks: int) -> Iterator[_Turn]:
    """What a rank reads: whole shelves as long as each rank gets one, then its share of each that is left.

    Sharing keeps all ranks busy with a small corpus, for which every rank tokenises those few shelves.
    For example, of 5 shelves on 2 ranks, rank 0 takes shelves 0 and 2, rank 1 takes shelves 1 and 3,
    and both read shelf 4: rank 0 the even chunks and rank 1 the odd ones.
    """
    num_whole = num_shelves // num_ranks * num_ranks
    for start in range(0, num_whole, num_ranks):
        yield _Turn(start + rank, first=0, step=1)
    for shelf in range(num_whole, num_shelves):
        yield _Turn(shelf, first=rank, step=num_ranks)


def _to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`; a copy to a GPU is pinned, so that the CPU need not wait for it."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


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
