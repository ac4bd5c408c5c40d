"""Texts → vectors of a trained encoder, in chunks of texts of similar length.

If torch.distributed has several ranks, all of them call an Embedder with the same texts. Each rank
tokenises and embeds some of the shelves of texts, and all ranks receive every row. The rows are
those that one rank alone would get, because shelves and chunks do not depend on the number of ranks.

Shapes: N texts, S texts of a shelf, C rows of a chunk, T tokens, H width of a vector, M context documents.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hardbatch.trainer.draws import draw_context
from hardbatch.trainer.model import Encoder
from hardbatch.trainer.shelves import KeptShelves, Shelves
from hardbatch.trainer.tokens import TextTokenizer, Tokens, chunk_by_length, pad

TEXTS_PER_CHUNK = 128
_CHUNKS_PER_SHELF = 16  # padding is 6 % at 16 and 15 % at 4, where texts of a chunk differ more


def no_op() -> None:
    """The default of `between_blocks`."""


@dataclass(frozen=True, kw_only=True)
class Embedder:
    """An encoder and how it reads texts.

    Vectors are float32, on the encoder's device, in the order of the texts. The encoder runs in
    evaluation mode without gradients; afterwards each of its modules has the mode that it had.
    """

    encoder: Encoder
    tokenizer: TextTokenizer
    query_prompt: str = ""
    document_prompt: str = ""
    texts_per_chunk: int = TEXTS_PER_CHUNK
    """Texts in one forward pass."""
    precision: torch.dtype | None = None
    """The type of autocast; None is float32 throughout."""
    split_over_ranks: bool = True
    """Whether ranks share the texts. If not, each rank embeds its own texts and waits for no other."""
    between_blocks: Callable[[], None] = no_op
    """Called by all ranks equally often, every few seconds. An exception that it raises ends the work."""
    kept: KeptShelves = field(default_factory=KeptShelves)
    """Tokens of earlier calls, reused by later calls with the same texts."""

    def queries(self, texts: Sequence[str], context_MH: Tensor | None = None) -> Tensor:
        """Unit embeddings (N × H) of queries. `context_MH` comes from `context`; None is no context."""
        return self._embed("queries", texts, self.query_prompt, self._second_stage(context_MH))

    def documents(self, texts: Sequence[str], context_MH: Tensor | None = None) -> Tensor:
        """Unit embeddings (N × H) of documents. `context_MH` comes from `context`; None is no context."""
        return self._embed("documents", texts, self.document_prompt, self._second_stage(context_MH))

    def context(self, documents: Sequence[str]) -> Tensor:
        """First-stage vectors (M × H) of context documents; the encoder must be contextual."""
        first_stage = self.encoder.first_stage_model
        assert first_stage is not None, "a biencoder reads no context"
        return self._embed("context", documents, self.document_prompt, first_stage)

    def drawn_context(self, documents: Sequence[str], *, seed: int, position: int) -> Tensor | None:
        """First-stage vectors of J documents that (seed, position) draws as in training; None for a biencoder."""
        size = self.encoder.config.context_size
        if size == 0:
            return None
        rows_M = draw_context(len(documents), size, seed=seed, position=position)
        return self.context([documents[row] for row in rows_M.tolist()])

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
            dist.all_reduce(vectors_NH)  # exact: each row comes from one rank, and the others have zeros there
        return vectors_NH

    def _read(self, shelves: Shelves, number: int, device: torch.device) -> tuple[Tokens, list[Tensor]]:
        """The tokens of a shelf, with their ids copied to `device` once for all chunks, and the chunks."""
        tokens = shelves.tokens(number)
        ids = _to_device(tokens.ids, device).long()
        return replace(tokens, ids=ids), chunk_by_length(tokens.lengths_N, self.texts_per_chunk)

    def _padded(self, tokens: Tokens, rows_C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Ids, their mask, and the mask of the tokens that are pooled, each C × T."""
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
    """What a rank reads: whole shelves while there is one for each rank, then a share of each remaining shelf.

    The shares keep all ranks busy with a small corpus. For example, of 5 shelves on 2 ranks, rank 0
    takes shelves 0 and 2, rank 1 takes shelves 1 and 3, and both read shelf 4: rank 0 its even
    chunks and rank 1 its odd ones.
    """
    num_whole = num_shelves // num_ranks * num_ranks
    for start in range(0, num_whole, num_ranks):
        yield _Turn(start + rank, first=0, step=1)
    for shelf in range(num_whole, num_shelves):
        yield _Turn(shelf, first=rank, step=num_ranks)


def _to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`. It is pinned for a copy to a GPU, so that the CPU does not wait."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def ranks() -> tuple[int, int]:
    """This process's rank and the number of ranks: (0, 1) if it is alone."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients for the body; afterwards each submodule has its former mode."""
    was_training = {part: part.training for part in module.modules()}
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, training in was_training.items():
            part.training = training
