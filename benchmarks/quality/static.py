"""A model of token vectors alone: the mean of the vectors of a text's tokens, trained from random ones.

It knows nothing before, so all that it can do comes from the batches, and it trains in about a minute. Sentence
Transformers' StaticEmbedding holds the vectors; the loss is the trainer's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from arms import Arm
from corpus import Sample
from masks import Masking
from measure import Search, by_vectors
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

from hardbatch.pipeline.models.locate import locate_model
from hardbatch.pipeline.run import Plan
from hardbatch.trainer.loss import info_nce
from hardbatch.trainer.stream import BatchStream


class TokenIds:
    """Texts as token ids. Remembers them, since all arms of a family have the same texts."""

    def __init__(self, max_length: int) -> None:
        self.tokenizer = Tokenizer.from_file(str(locate_model("minilm", None, Path())[1] / "tokenizer.json"))
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(max_length)
        self._ids: dict[str, np.ndarray] = {}

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """The ids of all texts, one after another, and where each text begins."""
        new = [text for text in dict.fromkeys(texts) if text not in self._ids]
        for text, encoded in zip(new, self.tokenizer.encode_batch(new, add_special_tokens=False), strict=True):
            self._ids[text] = np.array(encoded.ids, dtype=np.int32)
        ids = [self._ids[text] for text in texts]
        starts = np.cumsum([0, *(len(each) for each in ids[:-1])])
        return torch.from_numpy(np.concatenate(ids).astype(np.int64)), torch.from_numpy(starts)


@dataclass(frozen=True)
class StaticFamily:
    """The family: what is trained on, and how.

    Attributes:
        sample: The corpus.
        dimension: Of the token vectors.
        max_length: At which texts are cut.
        pairs_seen: How many pairs each model sees, whatever its batches are.
        learning_rate: Of Adam after a warm-up of a tenth of the steps; it then falls linearly to 0.
        temperature: Of the loss.
    """

    sample: Sample
    _: KW_ONLY
    dimension: int = 256
    max_length: int = 64
    pairs_seen: int = 150_000
    learning_rate: float = 0.1
    temperature: float = 0.05

    def describe(self) -> dict[str, Any]:
        settings = {field.name: getattr(self, field.name) for field in fields(self)}
        return {"family": "static"} | {name: value for name, value in settings.items() if name != "sample"}

    def train(self, plans: Sequence[Plan], arm: Arm, masking: Masking, seed: int) -> dict[str, Search]:
        """Trains on `pairs_seen` pairs: on as many of each plan, one after another."""
        torch.manual_seed(seed)
        token_ids = _token_ids(self.max_length)
        module = StaticEmbedding(token_ids.tokenizer, embedding_dim=self.dimension)
        module.embedding.sparse = True  # a batch has a few thousand of the 30,522 tokens

        def encode(texts: Sequence[str]) -> Tensor:
            ids, starts = token_ids(texts)
            return F.normalize(module.embedding(ids, starts), dim=1)

        num_steps = self.pairs_seen // arm.settings["pack.batch_size"]
        warm_up = num_steps // 10 + 1
        optimizer = torch.optim.SparseAdam(module.parameters(), lr=self.learning_rate)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / warm_up, (num_steps - step) / (num_steps - warm_up + 1))
        )
        for plan in plans:
            with BatchStream(plan.shards, seed=seed, stop=num_steps // len(plans), num_workers=1) as stream:
                for batch in stream:
                    positive_BB = torch.from_numpy(batch.positive_BB) if arm.positives == "same-answer" else None
                    loss = info_nce(
                        encode(batch.queries),
                        encode(batch.documents),
                        torch.from_numpy(masking(batch)),
                        temperature=self.temperature,
                        positive_BB=positive_BB,
                    )
                    optimizer.zero_grad()
                    loss.value.backward()
                    optimizer.step()
                    schedule.step()
        return {"": by_vectors(encode)}


@cache
def _token_ids(max_length: int) -> TokenIds:
    return TokenIds(max_length)
