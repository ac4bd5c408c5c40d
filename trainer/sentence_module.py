"""The module by which sentence-transformers (5.4 or newer) loads an export: text in, vectors of one of the stages out.

    context = model.encode(minicorpus, prompt_name="document")                                  first stage
    model.encode(texts, prompt_name="query", dataset_embeddings=context)                        second stage
    model.encode(texts, prompt_name="query", dataset_embeddings=torch.empty(0, width))          second stage, no context

An export carries copies of this file and of those that it imports relatively, and needs nothing else of this project.

Shapes: N texts, T tokens, H width of a vector, M context documents given, J context size.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from safetensors.torch import save_file
from sentence_transformers.base.modules import InputModule
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from .model import Encoder, FirstStage, SecondStage, load_encoder
from .tokens import TextTokenizer, pad

_HELP = 'give what encode(minicorpus, prompt_name="document") of this model returns'


class ContextualModule(InputModule):
    """An encoder and its tokenizer behind `SentenceTransformer.encode`."""

    forward_kwargs: ClassVar[set[str]] = {"dataset_embeddings"}

    def __init__(self, encoder: Encoder, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        self.encoder = encoder
        self._tokenizer = tokenizer
        self._text_tokenizer = TextTokenizer(tokenizer, encoder.config.max_length_tokens)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """That of transformers."""
        return self._tokenizer

    @property
    def first_stage_model(self) -> FirstStage | None:
        """M1; None in a biencoder."""
        return self.encoder.first_stage_model

    @property
    def second_stage_model(self) -> SecondStage:
        """M2."""
        return self.encoder.second_stage_model

    @property
    def transductive_corpus_size(self) -> int:
        """J, the most context documents that the second stage reads; 0 in a biencoder."""
        return self.encoder.config.context_size

    @property
    def max_seq_length(self) -> int:
        """Tokens of a text, prompt and special tokens included; longer ones are cut."""
        return self.encoder.config.max_length_tokens

    @max_seq_length.setter
    def max_seq_length(self, value: int) -> None:
        self._text_tokenizer = TextTokenizer(self._tokenizer, value)
        self.encoder.config = replace(self.encoder.config, max_length_tokens=value)

    def get_embedding_dimension(self) -> int:
        """H, of both stages."""
        return int(self.encoder.backbone_config.hidden_size)

    def get_config_dict(self) -> dict[str, Any]:
        """What a printed model shows."""
        config = self.encoder.config
        return {
            "architecture": config.architecture,
            "transductive_corpus_size": config.context_size,
            "max_seq_length": config.max_length_tokens,
            "pool_prompt": config.pool_prompt,
        }

    def preprocess(self, inputs: Sequence[str], prompt: str | None = None, **kwargs: Any) -> dict[str, Tensor]:
        """Token ids of prompt + text, their mask, and which of them take part in the mean; each N × T."""
        tokens = self._text_tokenizer.tokenize(inputs, prompt or "")
        padded = pad(tokens, torch.arange(len(tokens)), self._text_tokenizer.pad_id)
        pooled_NT = padded.mask_CT if self.encoder.config.pool_prompt else padded.without_prompt_CT()
        return {"input_ids": padded.ids_CT, "attention_mask": padded.mask_CT, "pooled_mask": pooled_NT}

    def forward(
        self, features: dict[str, Any], dataset_embeddings: Tensor | np.ndarray | None = None
    ) -> dict[str, Any]:
        """Adds `sentence_embedding` (N × H): of the first stage where a model with context is given none (None).

        Raises ValueError for `dataset_embeddings` that are not M ≤ J vectors of the first stage; M = 0: no context.
        """
        device = features["input_ids"].device
        tensors_NT = features["input_ids"], features["attention_mask"], features["pooled_mask"]
        if self.first_stage_model is not None and dataset_embeddings is None:
            vectors_NH = self.first_stage_model(*tensors_NT)
        else:
            vectors_NH = self.second_stage_model(*tensors_NT, self._context(dataset_embeddings, device))
        return {**features, "sentence_embedding": vectors_NH}

    def _context(self, dataset_embeddings: Tensor | np.ndarray | None, device: torch.device) -> Tensor | None:
        if dataset_embeddings is None:
            return None
        if not isinstance(dataset_embeddings, Tensor | np.ndarray):
            kind = type(dataset_embeddings).__name__
            raise ValueError(f"dataset_embeddings is a {kind}, it must be a tensor or an array: {_HELP}")
        context_MH = torch.as_tensor(dataset_embeddings, device=device)
        if context_MH.numel() == 0:
            return None
        size, width = self.transductive_corpus_size, self.get_embedding_dimension()
        if size == 0:
            raise ValueError("this model reads no context (transductive_corpus_size 0): leave dataset_embeddings out")
        if context_MH.ndim != 2 or context_MH.shape[1] != width:
            shape = " × ".join(map(str, context_MH.shape))
            raise ValueError(f"dataset_embeddings is {shape}, it must be at most {size} × {width}: {_HELP}")
        if len(context_MH) > size:
            raise ValueError(
                f"dataset_embeddings holds {len(context_MH)} context documents, this model reads at most {size}: draw "
                f"{size} documents of the corpus and encode those"
            )
        return context_MH

    def save(self, output_path: str | Path, *args: Any, **kwargs: Any) -> None:
        """Writes configuration, weights (float32) and tokenizer into the folder `output_path`."""
        folder = Path(output_path)
        config = json.dumps(self.encoder.config_dict(), indent=1, sort_keys=True)
        (folder / "config.json").write_text(config + "\n", encoding="utf-8")
        weights = {
            name: tensor.detach().float().cpu().contiguous() for name, tensor in self.encoder.state_dict().items()
        }
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        self.tokenizer.save_pretrained(folder)

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
        """The module in a folder or a repository of the hub. `model_kwargs` may have attn_implementation and dtype.

        Raises ValueError for other `model_kwargs`, or where the folder is not an export.
        """
        folder = cls.load_dir_path(
            model_name_or_path,
            subfolder=subfolder,
            token=token,
            cache_folder=cache_folder,
            revision=revision,
            local_files_only=local_files_only,
        )
        if folder is None:
            raise ValueError(f"{model_name_or_path}: no such model")
        options = dict(model_kwargs or {})
        encoder = load_encoder(Path(folder), attention=options.pop("attn_implementation", None) or "sdpa")
        dtype = options.pop("dtype", options.pop("torch_dtype", None))
        dtype = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype  # "auto" is what the file has
        if options:
            raise ValueError(f"model_kwargs {sorted(options)}: this model takes attn_implementation and dtype")
        return cls(encoder.to(dtype) if dtype is not None else encoder, AutoTokenizer.from_pretrained(folder))
