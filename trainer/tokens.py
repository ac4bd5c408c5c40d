"""Texts as ragged token ids, and their padding chunk by chunk. Imports nothing of this project.

A batch is tokenised once, without padding; padding happens where a chunk of rows of like length is read, so that little
of it is computed with.

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

    `ids` are int64, which every embedding takes as it is: at 512 texts of 512 tokens 2 MiB, so nothing is gained by
    less. Only `ids` move with `to`: lengths stay on the CPU, so that shapes are known without waiting for a GPU.
    """

    ids: Tensor  # int64, of all texts
    lengths_N: Tensor  # int64, on the CPU, at least 1
    prompt_lengths_N: Tensor  # int64, on the CPU: leading tokens that belong to a prompt, 0 without one

    def __len__(self) -> int:
        return len(self.lengths_N)

    @cached_property
    def starts_N(self) -> Tensor:  # noqa: N802 the shape of what it returns
        """The place in `ids` (int64, on the CPU) where each text begins.

        Computed once, since `pad` is called for each chunk of what may be millions of texts.
        """
        return self.lengths_N.cumsum(0) - self.lengths_N

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Tokens:
        """The same with `ids` on `device`."""
        return replace(self, ids=self.ids.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Tokens:
        """The same with `ids` in pinned memory."""
        return replace(self, ids=self.ids.pin_memory())


@dataclass(frozen=True, kw_only=True, eq=False)
class Padded:
    """Texts padded on the right to the longest of them."""

    ids_CT: Tensor
    mask_CT: Tensor  # bool: True at tokens of the text, False at padding
    prompt_lengths_C: Tensor

    def without_prompt_CT(self) -> Tensor:  # noqa: N802 the shape of what it returns
        """mask_CT without the tokens of the prompt: what a mean that leaves out the prompt is taken over."""
        places_T = torch.arange(self.mask_CT.shape[1], device=self.mask_CT.device)
        return self.mask_CT & (places_T >= self.prompt_lengths_C[:, None])


def pad(tokens: Tokens, rows_C: Tensor, pad_id: int) -> Padded:
    """The texts `rows_C` (on the CPU, at least one), on the device of the ids."""
    device = tokens.ids.device
    lengths_C = tokens.lengths_N[rows_C]
    starts_C = tokens.starts_N[rows_C]
    places_T = torch.arange(int(lengths_C.max()), device=device)
    of_rows = torch.stack([starts_C, lengths_C, tokens.prompt_lengths_N[rows_C]]).to(device, non_blocking=True)
    mask_CT = places_T < of_rows[1, :, None]
    ids_CT = tokens.ids[(of_rows[0, :, None] + places_T).where(mask_CT, 0)].where(mask_CT, pad_id)
    return Padded(ids_CT=ids_CT, mask_CT=mask_CT, prompt_lengths_C=of_rows[2])


def concat(parts: Sequence[Tokens]) -> Tokens:
    """The texts of all parts, one part after the other."""
    return Tokens(
        ids=torch.cat([part.ids for part in parts]),
        lengths_N=torch.cat([part.lengths_N for part in parts]),
        prompt_lengths_N=torch.cat([part.prompt_lengths_N for part in parts]),
    )


def chunk_by_length(lengths_N: Tensor, chunk_size: int) -> list[Tensor]:
    """Rows in chunks of at most `chunk_size`, every row once, by falling length, ties in order of row.

    The longest come first, so that a chunk too large for the memory shows at once.
    """
    if len(lengths_N) == 0:
        return []
    return list(torch.split(torch.argsort(lengths_N, descending=True, stable=True), chunk_size))


def chunk_by_tokens(lengths_N: Tensor, chunk_tokens: int, *, context_size: int = 0) -> list[Tensor]:
    """Rows in chunks of at most `chunk_tokens` computed tokens, every row once, by falling length.

    What is computed of a chunk is its pieces (`split_tightly`): each text counts as long as the
    longest of its piece, and `context_size` tokens more. A text that alone has more than
    `chunk_tokens` is a chunk by itself. The longest texts come first, ties in order of row, so that
    a chunk too large for the memory shows at once.

    For example, lengths 9, 9, 5 behind 3 tokens of context are 12 tokens each in one piece: two
    chunks of at most 24.
    """
    if len(lengths_N) == 0:
        return []
    order_N = torch.argsort(lengths_N, descending=True, stable=True)
    sizes, size, tokens = [], 0, 0
    longest, piece_size = 0, 0

    for length in lengths_N[order_N].tolist():
        if piece_size == 0 or _ends_piece(length, longest, piece_size):
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
    """Sizes of pieces of a chunk that hold little padding when each is padded by itself.

    The lengths of the chunk fall, as those of `chunk_by_tokens` do.
    """
    lengths = lengths_C.tolist()
    sizes, start = [], 0
    for place, length in enumerate(lengths):
        if _ends_piece(length, lengths[start], place - start):
            sizes.append(place - start)
            start = place
    return [*sizes, len(lengths) - start]


def _ends_piece(length: int, longest: int, size: int) -> bool:
    """Whether a piece of `size` texts ends before a text of `length` tokens.

    A much shorter text would mostly be padding, but pieces of very few texts are slow.
    """
    return size >= _LEAST_TEXTS_OF_PIECE and length < _SHORTEST_OF_PIECE * longest


def computed_tokens(lengths_N: Tensor, chunks: Sequence[Tensor], *, context_size: int = 0) -> int:
    """Tokens that are computed of all chunks: padding and `context_size` tokens a text are included."""
    total = 0
    for rows_C in chunks:
        lengths_C = lengths_N[rows_C]
        for lengths in torch.split(lengths_C, split_tightly(lengths_C)):
            total += len(lengths) * (int(lengths.max()) + context_size)
    return total


def padding_ratio(lengths_N: Tensor, chunks: Sequence[Tensor]) -> float:
    """Tokens computed with, padding included, over tokens of the texts."""
    padded = sum(int(lengths_N[rows_C].max()) * len(rows_C) for rows_C in chunks)
    return padded / sum(int(lengths_N[rows_C].sum()) for rows_C in chunks)


class TextTokenizer:
    """A tokenizer of transformers, set to cut texts at `max_length_tokens` and to pad nothing; threads may share it.

    Its ids are those of `pretrained(texts, truncation=True, max_length=max_length_tokens)`. A text without any token is
    given the unknown token (the padding token where there is none). Raises ValueError for a tokenizer that is not of
    the fast kind, and where the special tokens leave no room for a text.
    """

    def __init__(self, pretrained: Any, max_length_tokens: int) -> None:
        backend = getattr(pretrained, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise ValueError(f"{type(pretrained).__name__} is not a fast tokenizer")
        self._backend = Tokenizer.from_str(backend.to_str())  # that of transformers changes its settings with its calls
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
        """Tokens of prompt + text, for one prompt or a prompt for each text.

        As in sentence-transformers, the length of a prompt is that of its own tokens, special ones in front included
        and one at the end left out; at least one token of a text is left beside it.
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
