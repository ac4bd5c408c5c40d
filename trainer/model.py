"""The two-stage contextual encoder on stock transformers backbones, and the biencoder, which has no first stage.

The first stage M1 turns each context document into one vector. The second stage M2 reads J context
vectors before the tokens of a text, and pools over the text only (Section 4.2 of the paper). Context
tokens all take the first position, so that their order does not matter; the text keeps the positions
that it would have without them.

This file needs only torch and transformers, because a contextual export carries a copy of it.

Shapes: N texts, T tokens, J context size, M context documents given, H hidden width of the backbone.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import create_bidirectional_mask, create_bidirectional_sliding_window_mask

MODEL_FORMAT_VERSION = 1
CONFIG_KEY = "hardbatch"  # in config.json, beside the keys of the backbone


@dataclass(frozen=True, kw_only=True)
class BackboneFamily:
    """What sets the backbones of one model type of transformers apart from others."""

    has_pooler: bool = False
    """transformers adds a pooler, which would get no gradient, unless asked not to."""
    offset_positions: bool = False
    """The first token of a text has position `pad_token_id` + 1, not 0; padding has `pad_token_id`."""
    has_windows: bool = False
    """Some layers attend to near tokens only, and nearness is counted in the sequence."""
    reads_context: bool = True
    """Position ids decide where a token is. Otherwise the order of the context would matter."""


_ROBERTA = BackboneFamily(has_pooler=True, offset_positions=True)
BACKBONES = {
    "bert": BackboneFamily(has_pooler=True),
    "camembert": _ROBERTA,
    "distilbert": BackboneFamily(),
    "modernbert": BackboneFamily(has_windows=True),
    "mpnet": BackboneFamily(has_pooler=True, offset_positions=True, reads_context=False),
    "nomic_bert": BackboneFamily(),
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
}


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """The settings of an encoder beside its backbone: J, and how texts are cut and pooled."""

    context_size: int
    """J; 0 is a biencoder, which has no first stage."""
    max_length_tokens: int
    pool_prompt: bool = True
    """Whether the tokens of a prompt are pooled."""

    @property
    def architecture(self) -> str:
        """`contextual` or `biencoder`."""
        return "contextual" if self.context_size else "biencoder"


class FirstStage(nn.Module):
    """M1: documents → one vector each, in the scale of M2's token embeddings."""

    def __init__(self, backbone: PreTrainedModel, output_size: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(backbone.config.hidden_size, output_size, bias=False)

    def initialise_head(self, token_embeddings: Tensor) -> None:
        """Initialises the head: the identity if widths agree, scaled to the RMS of `token_embeddings` (V × H).

        The embedding layer of M2 adds its own terms to the context vectors and normalises the sum.
        Much smaller vectors than those of tokens would vanish in these terms, and much larger ones
        would hide them.
        """
        (nn.init.eye_ if self.head.in_features == self.head.out_features else nn.init.orthogonal_)(self.head.weight)
        with torch.no_grad():
            self.head.weight.mul_(token_embeddings.float().pow(2).mean().sqrt())

    def forward(self, ids_NT: Tensor, mask_NT: Tensor, pooled_NT: Tensor) -> Tensor:
        """Vectors (N × H of M2, float32) of the documents; `pooled_NT` marks the tokens that are pooled."""
        hidden_NTH = self.backbone(input_ids=ids_NT, attention_mask=mask_NT).last_hidden_state
        pooled_NH = mean_pool(hidden_NTH, pooled_NT)
        unit_NH = pooled_NH * torch.rsqrt(pooled_NH.pow(2).mean(-1, keepdim=True) + 1e-12)
        vectors_NH: Tensor = self.head(unit_NH.to(self.head.weight.dtype))
        return vectors_NH.float()


class SecondStage(nn.Module):
    """M2: [J context vectors ‖ text tokens] → the text's embedding, pooled over text tokens only."""

    def __init__(self, backbone: PreTrainedModel, context_size: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.context_size = context_size
        self._family = family_of(backbone.config.model_type)
        if context_size:
            if not self._family.reads_context:
                others = ", ".join(name for name, family in BACKBONES.items() if family.reads_context)
                raise ValueError(
                    f"{backbone.config.model_type} cannot read a context: its attention depends on the distance of "
                    "tokens in the sequence, not on their position ids, so the order of the context would matter; "
                    f"give --architecture biencoder, or a backbone of type {others}"
                )
            std = backbone.get_input_embeddings().weight.detach().float().pow(2).mean().sqrt().item()
            self.null_context = nn.Parameter(torch.empty(backbone.config.hidden_size).normal_(std=std))

    def forward(
        self,
        ids_NT: Tensor,
        mask_NT: Tensor,
        pooled_NT: Tensor,
        context_MH: Tensor | None = None,
        keep_NJ: Tensor | None = None,
    ) -> Tensor:
        """Embeds texts, given the vectors of context documents.

        Args:
            ids_NT: Token ids of the texts.
            mask_NT: True at tokens, False at padding.
            pooled_NT: True at the tokens that are pooled.
            context_MH: First-stage vectors of M ≤ J documents. None or M = 0 is no context. The null
                vector fills places M to J-1.
            keep_NJ: False where a text reads the null vector in place of a context document.

        Returns:
            Unit embeddings (N × H, float32).

        Raises:
            ValueError: M exceeds J.
        """
        if self.context_size == 0:
            hidden_NTH = self.backbone(input_ids=ids_NT, attention_mask=mask_NT).last_hidden_state
            return F.normalize(mean_pool(hidden_NTH, pooled_NT), dim=-1)

        positions_NT = self._positions(ids_NT)
        if len(ids_NT) == 1 and self.backbone.config._attn_implementation.startswith("flash"):
            # For one text without padding, transformers would take the context's equal positions for
            # starts of packed sequences.
            ids_NT, mask_NT, pooled_NT, positions_NT = (
                F.pad(tensor, (0, 1)) for tensor in (ids_NT, mask_NT, pooled_NT, positions_NT)
            )

        inputs_NTH = self.backbone.get_input_embeddings()(ids_NT)
        context_NJH = self._context(len(ids_NT), context_MH, keep_NJ).to(inputs_NTH.dtype)
        inputs_NLH = torch.cat([context_NJH, inputs_NTH], 1)
        mask_NL = F.pad(mask_NT, (self.context_size, 0), value=1)
        hidden_NLH = self.backbone(
            inputs_embeds=inputs_NLH,
            attention_mask=self._attention_mask(inputs_NLH, mask_NL),
            position_ids=F.pad(positions_NT, (self.context_size, 0), value=first_position(self.backbone.config)),
        ).last_hidden_state
        return F.normalize(mean_pool(hidden_NLH[:, self.context_size :], pooled_NT), dim=-1)

    def _positions(self, ids_NT: Tensor) -> Tensor:
        """The positions that the backbone gives these tokens if they come without a context (N × T, or 1 × T)."""
        if not self._family.offset_positions:
            return torch.arange(ids_NT.shape[1], device=ids_NT.device)[None]
        embeddings: Any = self.backbone.embeddings
        positions_NT: Tensor = embeddings.create_position_ids_from_input_ids(ids_NT, embeddings.padding_idx)
        return positions_NT

    def _context(self, num_texts: int, context_MH: Tensor | None, keep_NJ: Tensor | None) -> Tensor:
        null_H = self.null_context
        if context_MH is None:
            context_MH = null_H.new_zeros(0, len(null_H))
        num_given = len(context_MH)
        if num_given > self.context_size:
            raise ValueError(f"{num_given} context documents are given, the model reads at most {self.context_size}")
        context_JH = F.pad(context_MH.float(), (0, 0, 0, self.context_size - num_given))
        given_J = torch.arange(self.context_size, device=null_H.device) < num_given
        keep_NJ = given_J.expand(num_texts, -1) if keep_NJ is None else keep_NJ & given_J
        # `where` is always computed, so that the null vector always has a gradient for DDP to reduce.
        return torch.where(keep_NJ[..., None], context_JH, null_H)

    def _attention_mask(self, inputs_NLH: Tensor, mask_NL: Tensor) -> Any:
        if not self._family.has_windows:
            return mask_NL

        # A window counts places in the sequence: let every token see the context.
        config, size = self.backbone.config, self.context_size

        def reads_context(batch: Any, head: Any, query: Any, key: Any) -> Any:
            return (query < size) | (key < size)

        inputs = {"config": config, "inputs_embeds": inputs_NLH, "attention_mask": mask_NL}
        return {
            "full_attention": create_bidirectional_mask(**inputs),
            "sliding_attention": create_bidirectional_sliding_window_mask(**inputs, or_mask_function=reads_context),
        }


class Encoder(nn.Module):
    """Both stages, or the second alone in a biencoder. Queries and documents share all weights."""

    def __init__(self, config: EncoderConfig, first: PreTrainedModel | None, second: PreTrainedModel) -> None:
        super().__init__()
        assert (first is None) == (config.context_size == 0), "a first stage if and only if there is context"
        self.config = config
        self.first_stage_model = FirstStage(first, second.config.hidden_size) if first is not None else None
        self.second_stage_model = SecondStage(second, config.context_size)

    @property
    def backbone_config(self) -> PreTrainedConfig:
        """Configuration of the backbone of both stages."""
        return self.second_stage_model.backbone.config

    def config_dict(self) -> dict[str, Any]:
        """The content of `config.json` of checkpoints and exports: the backbone's keys, J, and our own keys."""
        own = {
            "format_version": MODEL_FORMAT_VERSION,
            "architecture": self.config.architecture,
            "max_length_tokens": self.config.max_length_tokens,
            "pool_prompt": self.config.pool_prompt,
        }
        backbone = self.backbone_config.to_dict()
        for key in ("_name_or_path", "architectures", "dtype", "torch_dtype"):
            backbone.pop(key, None)
        return {**backbone, "transductive_corpus_size": self.config.context_size, CONFIG_KEY: own}


def mean_pool(hidden_NTH: Tensor, pooled_NT: Tensor) -> Tensor:
    """Mean of the hidden states (float32, N × H) over the tokens that `pooled_NT` marks."""
    weights_NT1 = pooled_NT.to(torch.float32)[..., None]
    return (hidden_NTH.float() * weights_NT1).sum(1) / weights_NT1.sum(1).clamp(min=1)


def new_backbone(config: PreTrainedConfig, attention: str = "sdpa") -> PreTrainedModel:
    """A backbone with random weights. Raises ValueError for an unsupported model type or attention."""
    options = backbone_options(config, attention)
    return AutoModel.from_config(config, attn_implementation=attention_or_default(attention), **options)


def attention_or_default(attention: str) -> str | None:
    """The attention to ask transformers for. None is its default: sdpa, or eager for mpnet, which has no sdpa."""
    return None if attention == "sdpa" else attention


def backbone_options(config: PreTrainedConfig, attention: str) -> dict[str, Any]:
    """Arguments besides the configuration. Raises ValueError if this backbone or this attention cannot be used."""
    family = family_of(config.model_type)
    if family.has_windows and attention.startswith("flash"):
        raise ValueError(
            f"{config.model_type} with {attention} hides the context from tokens beyond its window; use sdpa or eager"
        )
    return {"add_pooling_layer": False} if family.has_pooler else {}


def family_of(model_type: str) -> BackboneFamily:
    """The family of a model type of transformers. Raises ValueError if it is not one of `BACKBONES`."""
    if model_type not in BACKBONES:
        shown = (name if family.reads_context else f"{name} (biencoder only)" for name, family in BACKBONES.items())
        raise ValueError(f"a backbone of type '{model_type}' is not supported; supported: {', '.join(shown)}")
    return BACKBONES[model_type]


def first_position(config: PreTrainedConfig) -> int:
    """The position of the first token of a text. Raises ValueError if the configuration does not tell."""
    if not family_of(config.model_type).offset_positions:
        return 0
    if config.pad_token_id is None:
        raise ValueError(f"{config.model_type} counts positions from pad_token_id, which its config.json lacks")
    return int(config.pad_token_id) + 1


def longest_text_tokens(config: PreTrainedConfig) -> int | None:
    """The most tokens of a text, which the positions of the backbone limit; None if nothing does."""
    limit: int | None = getattr(config, "max_position_embeddings", None)
    return None if limit is None else limit - first_position(config)


def read_encoder_config(folder: Path) -> tuple[EncoderConfig, PreTrainedConfig]:
    """Reads the configuration of the model in `folder`. Raises ValueError if it is foreign or of a newer format."""
    content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    own = content.get(CONFIG_KEY) if isinstance(content, dict) else None
    if not isinstance(own, dict):
        raise ValueError(
            f"{folder / 'config.json'}: not the configuration of a trained model (no '{CONFIG_KEY}' in it)"
        )
    if own["format_version"] > MODEL_FORMAT_VERSION:
        raise ValueError(
            f"{folder / 'config.json'}: format version {own['format_version']}, this code reads up to "
            f"{MODEL_FORMAT_VERSION}; use a newer hardbatch"
        )
    config = EncoderConfig(
        context_size=content["transductive_corpus_size"],
        max_length_tokens=own["max_length_tokens"],
        pool_prompt=own["pool_prompt"],
    )
    return config, AutoConfig.from_pretrained(folder, trust_remote_code=False)


def load_encoder(folder: Path, attention: str = "sdpa") -> Encoder:
    """Loads the encoder of a checkpoint or an export, in evaluation mode.

    Args:
        folder: Holds `config.json` and `model.safetensors`.
        attention: The attention implementation of transformers.

    Raises:
        ValueError: The configuration is not ours, or does not fit the weights.
        OSError: A file is missing.
    """
    from safetensors.torch import load_file

    config, backbone = read_encoder_config(folder)
    first = new_backbone(backbone, attention) if config.context_size else None
    encoder = Encoder(config, first, new_backbone(backbone, attention))
    weights = load_file(folder / "model.safetensors")

    # The export of a biencoder has the weights of its backbone under the backbone's own names.
    prefix = "second_stage_model.backbone."
    if config.context_size == 0 and not any(name.startswith(prefix) for name in weights):
        weights = {prefix + name: tensor for name, tensor in weights.items()}

    missing, unexpected = encoder.load_state_dict(weights, strict=False)
    if missing or unexpected:
        raise ValueError(
            f"{folder / 'model.safetensors'}: its weights are not those of config.json "
            f"({len(missing)} missing, {len(unexpected)} unexpected, first: {[*missing, *unexpected][0]})"
        )
    return encoder.eval()
