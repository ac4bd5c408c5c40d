"""Texts on shelves of similar length. A shelf is tokenised when it is first read, and kept for the next pass.

Ranks share a corpus shelf by shelf, so that none of them tokenises all of it. Which texts are on a
shelf depends on the texts alone, never on the number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from hardbatch.trainer.tokens import TextTokenizer, Tokens

_KEPT_BYTES = 2**30  # of token ids that a rank keeps of one list of texts: 268 million tokens


class Shelves:
    """N texts by decreasing length in bytes, `texts_per_shelf` on each shelf; the last one may have fewer.

    Bytes stand in for tokens, which are not known before a shelf is read.
    """

    def __init__(self, texts: Sequence[str], prompt: str, tokenizer: TextTokenizer, texts_per_shelf: int) -> None:
        self._texts = texts
        self._prompt = prompt
        self._tokenizer = tokenizer
        self._texts_per_shelf = texts_per_shelf
        self._kept: dict[int, Tokens] = {}
        self._room_bytes = _KEPT_BYTES

        lengths_N = np.fromiter((len(text.encode()) for text in texts), np.int64, len(texts))
        self._order_N = torch.from_numpy(np.argsort(-lengths_N, kind="stable"))

    def __len__(self) -> int:
        return -(-len(self._texts) // self._texts_per_shelf)

    def are_of(self, texts: Sequence[str], prompt: str, tokenizer: TextTokenizer, texts_per_shelf: int) -> bool:
        """Whether the arguments would give these same shelves."""
        same_settings = (prompt, texts_per_shelf) == (self._prompt, self._texts_per_shelf)
        same_texts = texts is self._texts or texts == self._texts
        return same_settings and tokenizer is self._tokenizer and same_texts

    def rows(self, number: int) -> Tensor:
        """Rows (int64, on the CPU) that the texts of a shelf have in the list of all texts."""
        start = number * self._texts_per_shelf
        return self._order_N[start : start + self._texts_per_shelf]

    def tokens(self, number: int) -> Tokens:
        """The tokens of a shelf, in the order of its `rows`. Ids are int32, half the size of int64."""
        kept = self._kept.get(number)
        if kept is not None:
            return kept

        texts = [self._texts[row] for row in self.rows(number).tolist()]
        tokens = self._tokenizer.tokenize(texts, self._prompt)
        tokens = replace(tokens, ids=tokens.ids.int())

        # A shelf that exceeds the limit is tokenised again by the next pass; the others are kept.
        if tokens.ids.nbytes <= self._room_bytes:
            self._room_bytes -= tokens.ids.nbytes
            self._kept[number] = tokens
        return tokens


class KeptShelves:
    """The shelves of the latest list of texts under each name, so that a second pass tokenises nothing."""

    def __init__(self) -> None:
        self._shelves_of: dict[str, Shelves] = {}

    def shelves(
        self, name: str, texts: Sequence[str], prompt: str, tokenizer: TextTokenizer, texts_per_shelf: int
    ) -> Shelves:
        """The shelves of `texts`: those of the latest call with this name if nothing has changed since."""
        found = self._shelves_of.get(name)
        if found is None or not found.are_of(texts, prompt, tokenizer, texts_per_shelf):
            found = Shelves(texts, prompt, tokenizer, texts_per_shelf)
            self._shelves_of[name] = found
        return found
