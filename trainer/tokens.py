"""Texts as ragged token ids, and their padding chunk by chunk. Imports nothing of this project.

A batch is tokenised once, without padding. Rows of similar length are padded together when their
chunk is computed, so that little padding is computed.

Legend: N texts, C texts of a chunk, T tokens of the longest of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

_SHORTEST_OF_PIECE = 0.8  # of the longest text of a piece
_LEAST_TEXTS_OF_PIECE = 16


@dataclass(frozen=True, kw_only=True, eq=False)
class Tokens:
    """N texts as token ids, one after the other without padding.

    Only `ids` move with `to`. The lengths stay on the CPU, so that shapes are known without waiting
    for a GPU.
    """

    ids: Tensor
    """int64, the tokens of all texts. Embeddings take int64 as it is, and a batch of 512 texts of
    512 tokens is only 2 MiB."""
    lengths_N: Tensor
    """int64, on the CPU, at least 1."""
    prompt_lengths_N: Tensor
    """int64, on the CPU: leading tokens that belong to a prompt, 0 without one."""

    def __len__(self) -> int:
        return len(self.lengths_N)

    @cached_property
    def starts_N(self) -> Tensor:  # noqa: N802 the shape of what it returns
        """The index in `ids` (int64, on the CPU) at which each text begins.

        It is computed once, since `pad` is called for each chunk of what may be millions of texts.
        """
        return self.lengths_N.cumsum(0) - self.lengths_N

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Tokens:
        """Returns the same texts with `ids` on `device`."""
        return replace(self, ids=self.ids.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Tokens:
        """Returns the same texts with `ids` in pinned memory."""
        return replace(self, ids=self.ids.pin_memory())


@dataclass(frozen=True, kw_only=True, eq=False)
class Padded:
    """Texts padded on the right to the longest of them."""

    ids_CT: Tensor
    mask_CT: Tensor  # bool: True at tokens of the text, False at padding
    prompt_lengths_C: Tensor

    def without_prompt_CT(self) -> Tensor:  # noqa: N802 the shape of what it returns
        """Returns mask_CT without the tokens of the prompt, for a mean that leaves the prompt out."""
        places_T = torch.arange(self.mask_CT.shape[1], device=self.mask_CT.device)
        return self.mask_CT & (places_T >= self.prompt_lengths_C[:, None])


def pad(tokens: Tokens, rows_C: Tensor, pad_id: int) -> Padded:
    """Pads some of the texts, on the device of their ids.

    Args:
        tokens: The texts.
        rows_C: Which of them, on the CPU; at least one.
        pad_id: The id of the padding token.
    """
    device = tokens.ids.device
    lengths_C = tokens.lengths_N[rows_C]
    starts_C = tokens.starts_N[rows_C]
    places_T = torch.arange(int(lengths_C.max()), device=device)

    # One copy to the device instead of three.
    of_rows = torch.stack([starts_C, lengths_C, tokens.prompt_lengths_N[rows_C]]).to(device, non_blocking=True)
    mask_CT = places_T < of_rows[1, :, None]
    ids_CT = tokens.ids[(of_rows[0, :, None] + places_T).where(mask_CT, 0)].where(mask_CT, pad_id)
    return Padded(ids_CT=ids_CT, mask_CT=mask_CT, prompt_lengths_C=of_rows[2])


def concat(parts: Sequence[Tokens]) -> Tokens:
    """Joins the texts of all parts, one part after the other."""
    return Tokens(
        ids=torch.cat([part.ids for part in parts]),
        lengths_N=torch.cat([part.lengths_N for part in parts]),
        prompt_lengths_N=torch.cat([part.prompt_lengths_N for part in parts]),
    )


def chunk_by_length(lengths_N: Tensor, chunk_size: int) -> list[Tensor]:
    """Cuts rows into chunks of at most `chunk_size` by decreasing length; ties keep the order of the rows.

    The longest texts come first, so that a chunk too large for the memory fails at once.
    """
    if len(lengths_N) == 0:
        return []
    return list(torch.split(torch.argsort(lengths_N, descending=True, stable=True), chunk_size))


def chunk_by_tokens(
    lengths_N: Tensor, chunk_tokens: int, *, context_size: int = 0, packed: bool = False
) -> list[Tensor]:
    """Cuts rows into chunks of at most `chunk_tokens` computed tokens, by decreasing length.

    A padded chunk is computed in pieces (`split_tightly`): each text counts as long as the longest of
    its piece, plus `context_size` tokens. A text that alone exceeds `chunk_tokens` is a chunk by
    itself. The longest texts come first, so that a chunk too large for the memory fails at once; ties
    keep the order of the rows.

    For example, texts of 9, 9 and 5 tokens with 3 tokens of context count 12 tokens each in one
    piece. At `chunk_tokens` = 24 they make two chunks.

    Args:
        lengths_N: Tokens of each text.
        chunk_tokens: The largest number of tokens of a chunk, padding and context included.
        context_size: Tokens of context in front of each text.
        packed: Whether chunks are packed rows, in which each text counts its own tokens.

    Returns:
        The rows of each chunk; every row is in one chunk.
    """
    if len(lengths_N) == 0:
        return []

    order_N = torch.argsort(lengths_N, descending=True, stable=True)
    sizes, size, tokens = [], 0, 0  # of finished chunks; of the chunk at hand
    longest, piece_size = 0, 0  # of the piece at hand

    for length in lengths_N[order_N].tolist():
        if packed or piece_size == 0 or _ends_piece(length, longest, piece_size):
            longest, piece_size = length, 0

        if size and tokens + longest + context_size > chunk_tokens:
            sizes.append(size)
            size, tokens = 0, 0
            longest, piece_size = length, 0

        size += 1
        piece_size += 1
        tokens += longest + context_size
    return list(torch.split(order_N, [*sizes, size]))


def split_tightly(lengths_C: Tensor) -> list[int]:
    """Returns the sizes of pieces of a chunk that have little padding if each is padded by itself.

    The lengths must decrease, as they do in the chunks of `chunk_by_tokens`.
    """
    lengths = lengths_C.tolist()
    sizes, start = [], 0
    for index, length in enumerate(lengths):
        if _ends_piece(length, lengths[start], index - start):
            sizes.append(index - start)
            start = index
    return [*sizes, len(lengths) - start]


def _ends_piece(length: int, longest: int, size: int) -> bool:
    """Returns whether a piece of `size` texts ends before a text of `length` tokens.

    A much shorter text would be mostly padding, but pieces of very few texts are slow.
    """
    return size >= _LEAST_TEXTS_OF_PIECE and length < _SHORTEST_OF_PIECE * longest


def computed_tokens(lengths_N: Tensor, chunks: Sequence[Tensor], *, context_size: int = 0, packed: bool = False) -> int:
    """Counts the tokens computed for all chunks, including `context_size` tokens a text and, unless packed, padding."""
    if packed:
        return int(lengths_N.sum()) + len(lengths_N) * context_size

    total = 0
    for rows_C in chunks:
        lengths_C = lengths_N[rows_C]
        for lengths in torch.split(lengths_C, split_tightly(lengths_C)):
            total += len(lengths) * (int(lengths.max()) + context_size)
    return total


def padding_ratio(lengths_N: Tensor, chunks: Sequence[Tensor]) -> float:
    """Returns the tokens of padded chunks divided by the tokens of their texts."""
    padded = sum(int(lengths_N[rows_C].max()) * len(rows_C) for rows_C in chunks)
    return padded / sum(int(lengths_N[rows_C].sum()) for rows_C in chunks)


class TextTokenizer:
    """A tokenizer of transformers that truncates texts and pads nothing; threads may share it.

    Its ids are those of `pretrained(texts, truncation=True, max_length=max_length_tokens)`. A text
    without any token becomes the unknown token, or the padding token if there is none.
    """

    def __init__(self, pretrained: Any, max_length_tokens: int) -> None:
        """Takes the settings of a tokenizer of transformers.

        Args:
            pretrained: A fast tokenizer.
            max_length_tokens: Where texts are truncated, prompt and special tokens included.

        Raises:
            ValueError: If the tokenizer is not a fast one, or if its special tokens leave no room
                for a text.
        """
        backend = getattr(pretrained, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise ValueError(f"{type(pretrained).__name__} is not a fast tokenizer")

        # A copy, since transformers changes the settings of its own from call to call.
        self._backend = Tokenizer.from_str(backend.to_str())
        least = self._backend.num_special_tokens_to_add(False) + 1
        if max_length_tokens < least:
            raise ValueError(
                f"{max_length_tokens} tokens leave no room beside the special tokens; give {least} or more"
            )
        self._backend.no_padding()
        self._backend.enable_truncation(max_length_tokens, direction=pretrained.truncation_side)

        self.max_length_tokens = max_length_tokens
        self.pad_id: int = pretrained.pad_token_id if pretrained.pad_token_id is not None else 0
        self.largest_id: int = max(self._backend.get_vocab(with_added_tokens=True).values())
        self._special_ids = frozenset(pretrained.all_special_ids)
        unknown = pretrained.unk_token_id
        self._for_no_token = [self.pad_id if unknown is None else unknown]
        self._prompt_lengths: dict[str, int] = {"": 0}

    def tokenize(self, texts: Sequence[str], prompts: str | Sequence[str] = "") -> Tokens:
        """Tokenises prompt + text, with one prompt for all texts or a prompt for each.

        As in sentence-transformers, the length of a prompt is that of its own tokens, with special
        tokens in front and without one at the end. At least one token of a text does not count as
        its prompt.
        """
        of_texts = [prompts] * len(texts) if isinstance(prompts, str) else prompts
        encodings = self._backend.encode_batch_fast(
            [prompt + text for prompt, text in zip(of_texts, texts, strict=True)]
        )
        ids_of = [np.array(encoding.ids or self._for_no_token, dtype=np.int64) for encoding in encodings]
        lengths_N = torch.tensor([len(ids) for ids in ids_of], dtype=torch.int64)
        prompt_lengths_N = torch.tensor([self._prompt_length(prompt) for prompt in of_texts], dtype=torch.int64)
        return Tokens(
            ids=torch.from_numpy(np.concatenate([np.empty(0, dtype=np.int64), *ids_of])),
            lengths_N=lengths_N,
            prompt_lengths_N=torch.minimum(prompt_lengths_N, lengths_N - 1),
        )

    def _prompt_length(self, prompt: str) -> int:
        length = self._prompt_lengths.get(prompt)
        if length is None:
            ids = self._backend.encode(prompt).ids
            length = len(ids) - (1 if ids and ids[-1] in self._special_ids else 0)
            self._prompt_lengths[prompt] = length
        return length
