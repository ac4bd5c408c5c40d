"""MiniLM, or its first layers, trained by the product's own trainer."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from arms import Arm
from corpus import Sample
from masks import Masking
from measure import DEPTH, Search, by_vectors, sentence_encoder
from torch import Tensor

from hardbatch.pipeline.errors import HardbatchError
from hardbatch.pipeline.run import Plan
from hardbatch.trainer.collection import Collection
from hardbatch.trainer.context import read_documents
from hardbatch.trainer.embed import Embedder
from hardbatch.trainer.export import open_model
from hardbatch.trainer.main import main as train
from hardbatch.trainer.search import search
from hardbatch.trainer.shards import Shards, TextBatch

_FLAGS = ("--dropout", "0", "--attention", "eager", "--chunk-tokens", "8192", "--log-every", "100")


@dataclass(frozen=True)
class TransformerFamily:
    """The family: what is trained on, and how.

    Attributes:
        sample: The corpus.
        folder: Where models are written, and deleted once they are loaded.
        num_layers: First layers of MiniLM that are kept; None keeps all.
        max_length: Tokens at which texts are cut in training.
        pairs_seen: How many pairs each model sees, whatever its batches are.
        learning_rate: The highest, after a warm-up of a tenth of the steps.
        temperature: Of the loss.
    """

    sample: Sample
    folder: Path
    _: KW_ONLY
    num_layers: int | None = 3
    max_length: int = 32
    pairs_seen: int = 12_800
    learning_rate: float = 1e-4
    temperature: float = 0.02

    def describe(self) -> dict[str, Any]:
        names = ("num_layers", "max_length", "pairs_seen", "learning_rate", "temperature")
        return {"family": "transformer"} | {name: getattr(self, name) for name in names}

    def train(self, plans: Sequence[Plan], arm: Arm, masking: Masking, seed: int) -> dict[str, Search]:
        """Trains as `trainer/main.py` does, and loads the export."""
        (plan,) = plans
        output = self.folder / f"{plan.shards.name}-{seed}"
        shutil.rmtree(output, ignore_errors=True)
        num_steps = self.pairs_seen // arm.settings["pack.batch_size"]
        settings = {
            "shards": plan.shards,
            "output": output,
            "architecture": "contextual" if arm.context_size else "biencoder",
            "context-size": arm.context_size or None,
            "num-layers": self.num_layers,
            "max-length": self.max_length,
            "epochs": 1_000,
            "max-steps": num_steps,
            "warmup-steps": num_steps // 10,
            "learning-rate": self.learning_rate,
            "temperature": self.temperature,
            "positives": arm.positives,
            "save-every": num_steps,
            "seed": seed,
        }
        flags = [f"--{name}={value}" for name, value in settings.items() if value is not None]
        with _masked_by(masking):
            code = train([*flags, *_FLAGS, *arm.flags])
        if code:
            raise HardbatchError(f"{arm.name}: the trainer returned {code}")
        searches = _searches(output / "export", self.max_length)
        shutil.rmtree(output)
        return searches


@contextmanager
def _masked_by(masking: Masking) -> Iterator[None]:
    """Replaces the masks of every batch that is read."""
    read = Shards.read_batch

    def read_masked(shards: Shards, row: int, position: int) -> TextBatch:
        batch = read(shards, row, position)
        return replace(batch, equivalent_BB=masking(batch))

    with patch.object(Shards, "read_batch", read_masked):
        yield


def _searches(export: Path, max_length: int) -> dict[str, Search]:
    """The exported model. A contextual one searches with a context of the searched documents, and with two others."""
    encoder, tokenizer = open_model(export, "the export")
    if encoder.config.context_size == 0:
        return {"": by_vectors(sentence_encoder(export, max_length))}
    precision = torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else None
    embedder = Embedder(encoder=encoder, tokenizer=tokenizer, texts_per_chunk=64, precision=precision)
    default_context_MH = embedder.context(read_documents(export).documents)

    def with_context(context: str) -> Search:
        def find(collection: Collection, queries: Sequence[str]) -> Tensor:
            context_MH = default_context_MH if context == "of training" else None
            if context == "of the collection":
                context_MH = embedder.drawn_context(collection.documents, seed=0, position=0)
            documents_NH = embedder.documents(collection.documents, context_MH)
            return search(embedder.queries(queries, context_MH), documents_NH, DEPTH)

        return find

    return {
        "": with_context("of the collection"),
        "context of training": with_context("of training"),
        "no context": with_context("none"),
    }
