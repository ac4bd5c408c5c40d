"""The module that sentence-transformers (5.4 or newer) loads from a contextual export.

    model.encode(texts, prompt_name="query")                                        default context
    context = model.encode(minicorpus, prompt_name="document", first_stage=True)    vectors for a context
    model.encode(texts, prompt_name="query", dataset_embeddings=context)            that context
    model.encode(texts, prompt_name="query", dataset_embeddings=context[:0])        no context

An export carries a copy of this file and of the files that it imports relatively. It needs nothing
else of this project.

Shapes: N texts, T tokens, H width of a vector, M context documents given, J context size.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers.base.modules import InputModule
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from .model import Encoder, FirstStage, SecondStage, load_encoder
from .tokens import TextTokenizer, pad

CONVENTIONS = ("default", "cde")
CONTEXT_TEXTS, CONTEXT_VECTORS = "context.json", "context.safetensors"
_VECTORS = "dataset_embeddings"  # the name of the tensor in CONTEXT_VECTORS
_UNIT_TOLERANCE = 1e-4
_HELP = 'give what encode(minicorpus, prompt_name="document", first_stage=True) of this model returns'


@dataclass(frozen=True, kw_only=True)
class DefaultContext:
    """The context that `encode` uses if it is given none: documents and their first-stage vectors."""

    documents: Sequence[str]
    origin: str  # a sentence for people: where the documents come from
    vectors_MH: Tensor


class ContextualModule(InputModule):
    """An encoder and its tokenizer behind `SentenceTransformer.encode`.

    Attributes:
        convention: What `encode` does without `dataset_embeddings`. "default" embeds with the
            default context; "cde" returns first-stage vectors, as cde-small does. May be assigned.
        default_context: First-stage vectors (M × H) of the default context; M may be 0.
    """

    forward_kwargs: ClassVar[set[str]] = {"dataset_embeddings", "first_stage"}

    default_context: Tensor

    def __init__(
        self,
        encoder: Encoder,
        tokenizer: PreTrainedTokenizerBase,
        context: DefaultContext | None = None,
        convention: str = "default",
    ) -> None:
        super().__init__()
        if encoder.first_stage_model is None:
            raise ValueError("a biencoder reads no context: it needs stock modules only")
        if convention not in CONVENTIONS:
            raise ValueError(f"convention is {convention!r}, it must be one of {CONVENTIONS}")
        self.encoder = encoder
        self.convention = convention
        self._tokenizer = tokenizer
        self._text_tokenizer = TextTokenizer(tokenizer, encoder.config.max_length_tokens)

        if context is None:
            empty_MH = torch.empty(0, self.get_embedding_dimension())
            context = DefaultContext(documents=(), origin="none", vectors_MH=empty_MH)
        self._context_texts = {"origin": context.origin, "documents": list(context.documents)}

        # A buffer moves with the model. `save` writes it to a file of its own, not with the weights.
        self.register_buffer("default_context", context.vectors_MH, persistent=False)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of transformers."""
        return self._tokenizer

    @property
    def first_stage_model(self) -> FirstStage:
        """M1."""
        first_stage = self.encoder.first_stage_model
        assert first_stage is not None, "checked by the constructor"
        return first_stage

    @property
    def second_stage_model(self) -> SecondStage:
        """M2."""
        return self.encoder.second_stage_model

    @property
    def transductive_corpus_size(self) -> int:
        """J, the most context documents that the second stage reads."""
        return self.encoder.config.context_size

    @property
    def max_seq_length(self) -> int:
        """Tokens of a text, with prompt and special tokens. Longer texts are cut."""
        return self.encoder.config.max_length_tokens

    @max_seq_length.setter
    def max_seq_length(self, value: int) -> None:
        self._text_tokenizer = TextTokenizer(self._tokenizer, value)
        self.encoder.config = replace(self.encoder.config, max_length_tokens=value)

    def get_embedding_dimension(self) -> int:
        """H, of both stages."""
        return int(self.encoder.backbone_config.hidden_size)

    def get_config_dict(self) -> dict[str, Any]:
        """The settings that a printed model shows."""
        config = self.encoder.config
        return {
            "transductive_corpus_size": config.context_size,
            "max_seq_length": config.max_length_tokens,
            "pool_prompt": config.pool_prompt,
            "context_attention": config.context_attention,
            "convention": self.convention,
        }

    def preprocess(self, inputs: Sequence[str], prompt: str | None = None, **kwargs: Any) -> dict[str, Tensor]:
        """Token ids of prompt + text, their mask, and the mask of the tokens that are pooled (N × T)."""
        tokens = self._text_tokenizer.tokenize(inputs, prompt or "")
        padded = pad(tokens, torch.arange(len(tokens)), self._text_tokenizer.pad_id)
        pooled_NT = padded.mask_CT if self.encoder.config.pool_prompt else padded.without_prompt_CT()
        return {
            "input_ids": padded.ids_CT,
            "attention_mask": padded.mask_CT,
            "pooled_mask": pooled_NT,
        }

    def forward(
        self,
        features: dict[str, Any],
        dataset_embeddings: Tensor | np.ndarray | None = None,
        first_stage: bool = False,
    ) -> dict[str, Any]:
        """Adds `sentence_embedding` (N × H) to the features.

        Args:
            features: What `preprocess` returned.
            dataset_embeddings: First-stage vectors of M ≤ J context documents; M = 0 is no context.
                None is the default context, or the first stage under the convention "cde".
            first_stage: Return first-stage vectors, for use as `dataset_embeddings`.

        Raises:
            ValueError: `dataset_embeddings` are not such vectors, or both arguments are given.
        """
        tensors_NT = features["input_ids"], features["attention_mask"], features["pooled_mask"]
        device = features["input_ids"].device

        if first_stage and dataset_embeddings is not None:
            raise ValueError("first_stage=True takes no dataset_embeddings: the first stage reads texts only")
        plain = dataset_embeddings is None
        if first_stage or (plain and self.convention == "cde"):
            vectors_NH = self.first_stage_model(*tensors_NT)
        else:
            context_MH = self.default_context if plain else self._checked(dataset_embeddings, device)
            vectors_NH = self.second_stage_model(*tensors_NT, context_MH)
        return {**features, "sentence_embedding": vectors_NH}

    def _checked(self, dataset_embeddings: Tensor | np.ndarray | None, device: torch.device) -> Tensor | None:
        if not isinstance(dataset_embeddings, Tensor | np.ndarray):
            kind = type(dataset_embeddings).__name__
            raise ValueError(f"dataset_embeddings is a {kind}, it must be a tensor or an array: {_HELP}")
        context_MH = torch.as_tensor(dataset_embeddings, device=device)
        if context_MH.numel() == 0:
            return None

        size, width = self.transductive_corpus_size, self.get_embedding_dimension()
        if context_MH.ndim != 2 or context_MH.shape[1] != width:
            shape = " × ".join(map(str, context_MH.shape))
            raise ValueError(f"dataset_embeddings is {shape}, it must be at most {size} × {width}: {_HELP}")
        if len(context_MH) > size:
            raise ValueError(
                f"dataset_embeddings holds {len(context_MH)} context documents, this model reads at "
                f"most {size}: draw {size} documents of the corpus and encode those"
            )

        # Search embeddings have norm 1 and first-stage vectors do not. Whoever passes the former
        # has left out first_stage=True, and would get poor embeddings without noticing.
        norms_M = context_MH.float().norm(dim=1)
        if ((norms_M - 1).abs() < _UNIT_TOLERANCE).all():
            raise ValueError(
                f"dataset_embeddings are search embeddings (all of norm 1), not first-stage vectors: {_HELP}"
            )
        return context_MH

    def save(self, output_path: str | Path, *args: Any, **kwargs: Any) -> None:
        """Writes configuration, weights (float32), tokenizer and default context into a folder."""
        folder = Path(output_path)
        config = json.dumps(self.encoder.config_dict(), indent=1, sort_keys=True)
        (folder / "config.json").write_text(config + "\n", encoding="utf-8")
        weights = {name: _for_file(tensor) for name, tensor in self.encoder.state_dict().items()}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        self.tokenizer.save_pretrained(folder)

        texts = {"convention": self.convention, **self._context_texts}
        content = json.dumps(texts, indent=1, ensure_ascii=False)
        (folder / CONTEXT_TEXTS).write_text(content + "\n", encoding="utf-8")
        save_file({_VECTORS: _for_file(self.default_context)}, folder / CONTEXT_VECTORS)

    @classmethod
    def load(
        cls,
        model_name_or_path: str,
        subfolder: str = "",
        token: bool | str | None = None,
        cache_folder: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        model_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> ContextualModule:
        """Loads the module from a folder or a repository of the hub.

        Args:
            model_kwargs: May have `attn_implementation` and `dtype`.

        Raises:
            ValueError: There is no such model, it is not an export, or `model_kwargs` has other keys.
        """
        found = cls.load_dir_path(
            model_name_or_path,
            subfolder=subfolder,
            token=token,
            cache_folder=cache_folder,
            revision=revision,
            local_files_only=local_files_only,
        )
        if found is None:
            raise ValueError(f"{model_name_or_path}: no such model")
        folder = Path(found)

        options = dict(model_kwargs or {})
        attention = options.pop("attn_implementation", None) or "auto"
        dtype = options.pop("dtype", options.pop("torch_dtype", None))
        dtype = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype  # "auto": as saved
        if options:
            raise ValueError(f"model_kwargs {sorted(options)}: this model takes attn_implementation and dtype")
        encoder = load_encoder(folder, attention=attention)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        module = cls(encoder, tokenizer, *read_default_context(folder))
        return module.to(dtype) if dtype is not None else module


def read_default_context(folder: Path) -> tuple[DefaultContext | None, str]:
    """Reads the default context of the export in `folder`, and its convention.

    Exports that were made before there was a default context have the convention "cde".
    """
    if not (folder / CONTEXT_TEXTS).is_file():
        return None, "cde"
    texts = json.loads((folder / CONTEXT_TEXTS).read_text(encoding="utf-8"))
    vectors_MH = load_file(folder / CONTEXT_VECTORS)[_VECTORS]
    context = DefaultContext(documents=texts["documents"], origin=texts["origin"], vectors_MH=vectors_MH)
    return context, texts["convention"]


def _for_file(tensor: Tensor) -> Tensor:
    return tensor.detach().float().cpu().contiguous()
