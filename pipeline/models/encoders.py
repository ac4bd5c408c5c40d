"""Encoders: texts → unit vectors. Any sentence-transformers model of texts, and `lexical` for tests.

A vector depends on its text alone, not on the texts that are encoded with it: texts are grouped by padded length, which
is a function of the text, and the last forward pass of a group is filled with dummy rows to a multiple of
`_ROW_MULTIPLE`.

Shape letters: N texts, B rows of a forward pass, T tokens, D dimension.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from itertools import chain
from typing import Any, Protocol

import numpy as np

from hardbatch.pipeline.arrays import Array
from hardbatch.pipeline.errors import ConfigError, first_line
from hardbatch.pipeline.models.resolve import LEXICAL_FEATURES, ModelSpec

LEXICAL_DIMENSION = 256
_LENGTH_MULTIPLE = 8
_ROW_MULTIPLE = 4
_CHARACTERS_PER_CALL = 2**20
_NO_LIMIT = 1_000_000  # tokenizers that have no limit of their own state a huge one


class Encoder(Protocol):
    """Turns texts into vectors in two steps, so that some texts can be tokenised while others are encoded.

    `max_length` is the number of tokens at which texts are cut; 0: none is.
    """

    max_length: int

    def tokenize(self, texts: list[str]) -> Any: ...

    def encode(self, tokens: Any) -> Array:
        """Unit vectors, float32 (N, D); a text without a vector gets a row of zeros or NaN."""


def is_lexical(spec: ModelSpec) -> bool:
    """Whether `spec` is the built-in lexical encoder, as opposed to a folder of that name."""
    return spec.name == "lexical" and not spec.location


def open_encoder(spec: ModelSpec, corpus: Iterable[list[str]] = ()) -> Encoder:
    """Loads an encoder.

    Args:
        spec: The model.
        corpus: Lists of texts, which the lexical encoder takes its document frequencies from.

    Raises:
        ConfigError: The model cannot be loaded, or is of a kind that is not supported.
    """
    if is_lexical(spec):
        return LexicalEncoder(corpus)
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    model = _load(spec)
    if any(getattr(module, "include_prompt", True) is False for module in model):
        raise ConfigError(f"model '{spec.name}' leaves its prompt out of pooling, which is not supported")
    return (StaticEncoder if isinstance(model[0], StaticEmbedding) else SentenceEncoder)(spec, model)


def _load(spec: ModelSpec) -> Any:
    """The sentence-transformers model of `spec`."""
    import torch
    import transformers
    from sentence_transformers import SentenceTransformer

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    transformers.utils.logging.disable_progress_bar()
    _avoid_cudnn_attention(spec.runs_on)
    try:
        model = SentenceTransformer(
            spec.location,
            device=spec.runs_on,
            trust_remote_code=spec.trust_remote_code,
            model_kwargs={"use_safetensors": True, "dtype": getattr(torch, spec.dtype)},
        )
    except Exception as error:  # damaged weights, a wrong shape, a missing package: the model cannot be used
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise ConfigError(f"model '{spec.name}' at {spec.location} cannot be loaded: {reason}") from error
    return model.eval()


class StaticEncoder:
    """A vector for each token, and their mean: hundreds of times as fast as a transformer on a CPU.

    It computes in float32 whatever `spec.dtype` is, since that costs next to nothing.
    """

    def __init__(self, spec: ModelSpec, model: Any) -> None:
        self._model = model.float()
        self.max_length = spec.max_length_tokens or 0

    def tokenize(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, cut at the maximum length if there is one."""
        found = self._model[0].tokenizer.encode_batch(texts, add_special_tokens=False)
        return [encoding.ids[: self.max_length or None] for encoding in found]

    def encode(self, tokens: list[list[int]]) -> Array:
        """Unit vectors, float32 (N, D); a text without a token gets a row of zeros."""
        import torch

        starts = np.cumsum([0, *map(len, tokens[:-1])])
        ids = np.fromiter(chain.from_iterable(tokens), dtype=np.int64, count=sum(map(len, tokens)))
        features = {"input_ids": torch.from_numpy(ids), "offsets": torch.from_numpy(starts)}
        with torch.inference_mode():
            on_device = {name: tensor.to(self._model.device) for name, tensor in features.items()}
            vectors = self._model(on_device)["sentence_embedding"]
            return np.asarray(torch.nn.functional.normalize(vectors.float(), dim=1).cpu().numpy())


class SentenceEncoder:
    """A transformer, which runs on texts of equal padded length, up to a budget of tokens."""

    def __init__(self, spec: ModelSpec, model: Any) -> None:
        import torch
        import transformers

        self._torch = torch
        self._spec = spec
        self._model = model
        _cast(model, getattr(torch, spec.dtype))

        self._tokenizer = self._model.tokenizer
        if not isinstance(self._tokenizer, transformers.PreTrainedTokenizerBase):
            raise ConfigError(
                f"model '{spec.name}' is not a transformer: its tokenizer is a {type(self._tokenizer).__name__}"
            )

        limit = self._model.max_seq_length
        limit = None if limit is None or limit > _NO_LIMIT else int(limit)
        asked = spec.max_length_tokens
        if asked is not None and limit is not None and asked > limit:
            raise ConfigError(
                f"embed.max_length_tokens: {asked} is more than the {limit} tokens that '{spec.name}' can read"
            )
        self.max_length = asked or limit or 0
        if not self.max_length:
            raise ConfigError(f"model '{spec.name}' states no maximum length; set embed.max_length_tokens")

    def tokenize(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, cut at the maximum length."""
        if not texts:
            return []
        stripped = [text.strip() for text in texts]

        # The tokenizer cuts only after it has made all tokens, at some 100 bytes for each character of long texts.
        tokens: list[list[int]] = []
        block = np.cumsum([len(text) for text in stripped]) // _CHARACTERS_PER_CALL
        for number in np.unique(block):
            first, last = np.searchsorted(block, [number, number + 1])
            found = self._tokenizer(
                stripped[first:last],
                truncation=True,
                max_length=self.max_length,
                padding=False,
                return_attention_mask=False,
            )
            tokens += found["input_ids"]
        return tokens

    def encode(self, tokens: list[list[int]]) -> Array:
        """Unit vectors, float32 (N, D)."""
        torch = self._torch
        lengths = np.array([max(1, len(ids)) for ids in tokens])
        padded = -(-lengths // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE
        vectors: Array | None = None
        pending: list[tuple[Array, Any]] = []
        with torch.inference_mode():
            for length in np.unique(padded)[::-1]:
                indices = np.flatnonzero(padded == length)
                num_rows = max(_ROW_MULTIPLE, self._spec.token_budget // int(length) // _ROW_MULTIPLE * _ROW_MULTIPLE)
                for start in range(0, len(indices), num_rows):
                    chosen = indices[start : start + num_rows]
                    pending.append((chosen, self._forward([tokens[i] for i in chosen], int(length))))

            # Results are fetched last, so that a GPU never waits for a copy.
            for chosen, output in pending:
                rows = torch.nn.functional.normalize(output[: len(chosen)].float(), dim=1).cpu().numpy()
                if vectors is None:
                    vectors = np.empty((len(tokens), rows.shape[1]), dtype=np.float32)
                vectors[chosen] = rows
        assert vectors is not None, "encode needs at least one text"
        return vectors

    def _forward(self, tokens: list[list[int]], length: int) -> Any:
        """Vectors (B, D) of texts padded to `length` tokens, with dummy rows of one token behind them."""
        torch = self._torch
        num_rows = -(-len(tokens) // _ROW_MULTIPLE) * _ROW_MULTIPLE
        ids_BT = np.full((num_rows, length), self._tokenizer.pad_token_id, dtype=np.int64)
        mask_BT = np.zeros((num_rows, length), dtype=np.int64)
        for row, ids in enumerate(tokens):
            ids_BT[row, : len(ids)] = ids
            mask_BT[row, : len(ids)] = 1
        mask_BT[len(tokens) :, 0] = 1
        features = {
            "input_ids": torch.from_numpy(ids_BT).to(self._model.device),
            "attention_mask": torch.from_numpy(mask_BT).to(self._model.device),
        }
        return self._model(features)["sentence_embedding"]


def _avoid_cudnn_attention(device: str) -> None:
    """Turns cuDNN's attention off in this process if the model runs on CUDA.

    torch prefers it on recent GPUs, but it builds a plan for each new shape, and nearly every forward
    pass here has a shape of its own. Its backward pass can also return NaN if there is a mask
    (pytorch/pytorch#196678). The other backends need no plans and give the same attention.
    """
    if device.startswith("cuda"):
        import torch

        torch.backends.cuda.enable_cudnn_sdp(False)


def _cast(model: Any, dtype: Any) -> None:
    """Casts to `dtype` what loading has not cast yet, and leaves the weights of transformers alone.

    Loading gives those weights `dtype` already, apart from the few that transformers keeps in float32
    because they overflow in float16, such as `wo` of T5. A plain `model.to(dtype)` would undo that.
    """
    from transformers import PreTrainedModel

    loaded = {
        id(weight)
        for module in model.modules()
        if isinstance(module, PreTrainedModel)
        for weight in module.parameters()
    }

    for tensor in (*model.parameters(), *model.buffers()):
        if id(tensor) not in loaded and tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)


class LexicalEncoder:
    """Hashed TF-IDF under a random projection: the paper's sparse baseline, and fast vectors for tests.

    Args:
        corpus: Lists of texts, for the document frequencies.
    """

    max_length = 0

    def __init__(self, corpus: Iterable[list[str]]) -> None:
        from sklearn.feature_extraction.text import HashingVectorizer

        self._vectorizer = HashingVectorizer(n_features=LEXICAL_FEATURES, norm=None, alternate_sign=False)
        num_texts = 0
        frequency = np.zeros(LEXICAL_FEATURES)
        for texts in corpus:
            num_texts += len(texts)
            counts = self._vectorizer.transform(texts)
            frequency += np.bincount(counts.indices, minlength=LEXICAL_FEATURES)

        # The weights of the terms are part of the projection, so that encoding is a single product.
        idf = np.log((1 + num_texts) / (1 + frequency)) + 1
        projection = np.random.default_rng(0).standard_normal((LEXICAL_FEATURES, LEXICAL_DIMENSION), dtype=np.float32)
        projection *= idf[:, None]
        self._projection = projection

    def tokenize(self, texts: list[str]) -> Any:
        """Term counts on a logarithmic scale, sparse (N, features)."""
        counts = self._vectorizer.transform(texts)
        counts.data = (1 + np.log(counts.data)).astype(np.float32)
        return counts.astype(np.float32)

    def encode(self, tokens: Any) -> Array:
        """Unit vectors, float32 (N, D); a text without a word gets a row of zeros."""
        vectors = np.asarray(tokens @ self._projection, dtype=np.float32)
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        return np.asarray(np.divide(vectors, norms, out=np.zeros_like(vectors), where=norms > 0))
