"""A batch of shards as tokens: the input of a training step.

Legend: B slots of a batch, M hard negatives of all its queries.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hardbatch.pipeline.errors import ConfigError, first_line
from hardbatch.trainer.shards import TextBatch
from hardbatch.trainer.tokens import (
    Padded,
    TextTokenizer,
    Tokens,
    chunk_by_length,
    chunk_by_tokens,
    computed_tokens,
    concat,
    pad,
    padding_ratio,
    split_tightly,
)

__all__ = [
    "Batch",
    "Padded",
    "TextTokenizer",
    "Tokenizer",
    "Tokens",
    "chunk_by_length",
    "chunk_by_tokens",
    "computed_tokens",
    "concat",
    "load_tokenizer",
    "pad",
    "padding_ratio",
    "split_tightly",
]


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """B pairs as tokens, prompts included, by slot.

    `equivalent_BB[i, j]` is True if document j may answer query i too and is therefore not used as
    a negative of it. `positive_BB[i, j]` is True if it answers query i for certain and is therefore
    one of its positives; None if every query has its own document as its only positive. Both are
    False on the diagonal.
    """

    position: int
    batch_id: int
    domain: str
    queries: Tokens
    documents: Tokens
    negatives: Tokens | None  # None if no query has any
    negative_owner_M: Tensor  # int64: the slot whose query each negative belongs to
    equivalent_BB: Tensor  # bool
    positive_BB: Tensor | None = None  # bool

    @property
    def sides(self) -> list[Tokens]:
        """Queries, documents and, if there are any, negatives."""
        return [self.queries, self.documents] + ([self.negatives] if self.negatives is not None else [])

    @property
    def num_tokens(self) -> int:
        """Tokens of all texts, without padding."""
        return sum(len(tokens.ids) for tokens in self.sides)

    @property
    def num_positives(self) -> int:
        """Positives of all queries together, at least one each."""
        return len(self.queries) + (0 if self.positive_BB is None else int(self.positive_BB.sum()))

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """Returns the same batch on `device`; lengths stay on the CPU."""
        return replace(
            self,
            queries=self.queries.to(device, non_blocking=non_blocking),
            documents=self.documents.to(device, non_blocking=non_blocking),
            negatives=None if self.negatives is None else self.negatives.to(device, non_blocking=non_blocking),
            negative_owner_M=self.negative_owner_M.to(device, non_blocking=non_blocking),
            equivalent_BB=self.equivalent_BB.to(device, non_blocking=non_blocking),
            positive_BB=None if self.positive_BB is None else self.positive_BB.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> Batch:
        """Returns the same batch in pinned memory, so that `to` may be non-blocking."""
        return replace(
            self,
            queries=self.queries.pin_memory(),
            documents=self.documents.pin_memory(),
            negatives=None if self.negatives is None else self.negatives.pin_memory(),
            negative_owner_M=self.negative_owner_M.pin_memory(),
            equivalent_BB=self.equivalent_BB.pin_memory(),
            positive_BB=None if self.positive_BB is None else self.positive_BB.pin_memory(),
        )


class Tokenizer(TextTokenizer):
    """Turns a `TextBatch` into a `Batch`; made by `load_tokenizer`.

    The batch has the first `hard_negatives` of each query and, with `same_answer`, more positives of
    a query than its own document.
    """

    def __init__(
        self, pretrained: Any, max_length_tokens: int, *, hard_negatives: int = 0, same_answer: bool = False
    ) -> None:
        super().__init__(pretrained, max_length_tokens)
        self._hard_negatives = hard_negatives
        self._same_answer = same_answer

    def __call__(self, batch: TextBatch) -> Batch:
        size = len(batch.queries)
        texts, prompts = batch.queries + batch.documents, batch.query_prompts + batch.document_prompts

        # All texts of the batch are tokenised in one call, and split afterwards.
        owners: list[int] = []
        if self._hard_negatives and batch.negatives is not None:
            kept = [of_slot[: self._hard_negatives] for of_slot in batch.negatives]
            owners = [slot for slot, of_slot in enumerate(kept) for _ in of_slot]
            texts += [negative for of_slot in kept for negative in of_slot]
            prompts += [batch.document_prompts[slot] for slot in owners]

        positive_BB = batch.positive_BB if self._same_answer else None
        queries, documents, negatives = _split(self.tokenize(texts, prompts), [size, size, len(owners)])
        return Batch(
            position=batch.position,
            batch_id=batch.batch_id,
            domain=batch.domain,
            queries=queries,
            documents=documents,
            negatives=negatives if owners else None,
            negative_owner_M=torch.tensor(owners, dtype=torch.int64),
            equivalent_BB=torch.from_numpy(batch.equivalent_BB),
            positive_BB=None if positive_BB is None else torch.from_numpy(positive_BB),
        )


def load_tokenizer(
    folder: Path | str,
    *,
    max_length_tokens: int,
    vocab_size: int | None = None,
    hard_negatives: int = 0,
    same_answer: bool = False,
) -> Tokenizer:
    """Loads the tokenizer of a model.

    Args:
        folder: The folder of the model.
        max_length_tokens: Where texts are truncated, prompt and special tokens included.
        vocab_size: That of the backbone, which every id must be below; None leaves this unchecked.
        hard_negatives: How many hard negatives of each query to tokenise.
        same_answer: Whether the documents of `positive_slots` become positives of a query.

    Raises:
        ConfigError: If there is no fast tokenizer, if it does not match the backbone, or if
            `max_length_tokens` leaves no room for a text.
    """
    from transformers import AutoTokenizer

    try:
        pretrained = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # of many kinds; `tokenizers` raises plain ones
        reason = first_line(error)
        if not Path(folder, "tokenizer.json").is_file() and importlib.util.find_spec("sentencepiece") is None:
            for path in Path(folder).glob("*.model"):  # transformers would ask for another package, tiktoken
                reason = f"without tokenizer.json, {path.name} needs a package: pip install sentencepiece"
        raise ConfigError(f"{folder}: no tokenizer that transformers can load: {reason}") from None

    try:
        tokenizer = Tokenizer(pretrained, max_length_tokens, hard_negatives=hard_negatives, same_answer=same_answer)
    except ValueError as error:
        raise ConfigError(f"{folder}: {error}") from None

    if len(pretrained.get_vocab()) <= len(set(pretrained.all_special_ids)):
        raise ConfigError(f"{folder}: has no vocabulary; add the tokenizer's files (tokenizer.json) to it")
    if vocab_size is not None and tokenizer.largest_id >= vocab_size:
        raise ConfigError(
            f"{folder}: the tokenizer has ids up to {tokenizer.largest_id}, the backbone a vocabulary of {vocab_size}: "
            "they do not belong together"
        )
    return tokenizer


def _split(tokens: Tokens, sizes: list[int]) -> list[Tokens]:
    """Splits texts into parts of `sizes`."""
    lengths = torch.split(tokens.lengths_N, sizes)
    ids = torch.split(tokens.ids, [int(part.sum()) for part in lengths])
    prompt_lengths = torch.split(tokens.prompt_lengths_N, sizes)
    return [
        Tokens(ids=i, lengths_N=n, prompt_lengths_N=p) for i, n, p in zip(ids, lengths, prompt_lengths, strict=True)
    ]
