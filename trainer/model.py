"""The two-stage contextual encoder on stock transformers backbones, and the biencoder, which has no first stage.

The first stage M1 turns each context document into one vector. The second stage M2 reads J context
vectors before the tokens of a text, and pools over the text only (Section 4.2 of the paper). Context
tokens all take the first position, so that their order does not matter; the text keeps the positions
that it would have without them.

With `full` context attention, as in the paper, context and text read each other, so the context is
computed again for each text. With `shared`, context vectors read only each other and are computed once
for all texts of a row.

Under packed attention (`hardbatch.trainer.attention`) the texts are computed in one row, one after the
other, and without padding. Both stages take them padded all the same.

This file needs only torch and transformers beside attention.py, because a contextual export carries
copies of both.

Shapes: N texts, T tokens of a padded text, R tokens of a row, J context size, M context documents given,
C context tokens of a row, H hidden width of the backbone.
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

from .attention import PACKED

MODEL_FORMAT_VERSION = 2  # 1 if the context attention is full, so that earlier code reads such a model
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
    """Position ids decide where a token is, and arguments of `forward` reach attention. Otherwise the order of the
    context would matter, and rows cannot be packed."""


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
    context_attention: str = "full"
    """`full`: context and text read each other. `shared`: the context reads only itself."""

    @property
    def architecture(self) -> str:
        """`contextual` or `biencoder`."""
        return "contextual" if self.context_size else "biencoder"


@dataclass(frozen=True, eq=False)
class _Row:
    """Where the tokens of padded texts are in a row without padding."""

    index_R: Tensor
    """Of each token of the row in the padded texts (N · T)."""
    lengths_N: Tensor
    longest: int
    """Tokens of the longest text, or more."""

    @classmethod
    def of(cls, mask_NT: Tensor, num_tokens: int | None) -> _Row:
        """The row of the texts whose tokens `mask_NT` marks; without `num_tokens`, a GPU is asked for their number."""
        mask = mask_NT.flatten()
        index_R = mask.nonzero() if num_tokens is None else torch.nonzero_static(mask, size=num_tokens)
        return cls(index_R=index_R.squeeze(1), lengths_N=mask_NT.long().sum(1), longest=mask_NT.shape[1])

    def take(self, padded: Tensor) -> Tensor:
        """The tokens of the row (R × …) out of padded texts (N × T × …)."""
        taken: Tensor = _TakeOnce.apply(padded.flatten(0, 1), self.index_R)  # type: ignore[no-untyped-call]
        return taken

    def arguments(self) -> dict[str, Any]:
        """What attention needs to know about the row."""
        return {"bounds": F.pad(self.lengths_N.cumsum(0), (1, 0)).int(), "longest": self.longest}

    def mean(self, hidden_RH: Tensor, pooled_NT: Tensor) -> Tensor:
        """Mean of the hidden states (float32, N × H) over the tokens of each text that `pooled_NT` marks."""
        weighted_RH = hidden_RH.float() * self.take(pooled_NT)[:, None]
        sums_NH = torch.segment_reduce(weighted_RH, "sum", lengths=self.lengths_N, axis=0, unsafe=True)
        return sums_NH / pooled_NT.sum(1, keepdim=True).clamp(min=1)


class _TakeOnce(torch.autograd.Function):
    """Takes rows by an index that names none of them twice, so that the gradient is a copy and not a sum."""

    @staticmethod
    def forward(ctx: Any, source: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.num_rows = len(source)
        return source.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        return gradient.new_zeros(ctx.num_rows, *gradient.shape[1:]).index_copy_(0, index, gradient), None


class _Stage(nn.Module):
    """A backbone that reads texts."""

    def __init__(self, backbone: PreTrainedModel) -> None:
        super().__init__()
        self.backbone = backbone
        self._family = family_of(backbone.config.model_type)

    @property
    def is_packed(self) -> bool:
        """Whether the backbone reads packed rows."""
        return bool(self.backbone.config._attn_implementation == PACKED)

    def _mean_of_texts(self, ids_NT: Tensor, mask_NT: Tensor, pooled_NT: Tensor, num_tokens: int | None) -> Tensor:
        """Pooled hidden states (N × H, float32) of texts by themselves."""
        if not self.is_packed:
            return mean_pool(self.backbone(input_ids=ids_NT, attention_mask=mask_NT).last_hidden_state, pooled_NT)

        row, inputs_RH, positions_R = self._pack(ids_NT, mask_NT, num_tokens)
        return row.mean(self._run_row(inputs_RH, positions_R, **row.arguments()), pooled_NT)

    def _pack(self, ids_NT: Tensor, mask_NT: Tensor, num_tokens: int | None) -> tuple[_Row, Tensor, Tensor]:
        """The row of some texts, its token embeddings (R × H) and its positions (R)."""
        row = _Row.of(mask_NT, num_tokens)
        inputs_RH = self.backbone.get_input_embeddings()(row.take(ids_NT))
        return row, inputs_RH, row.take(self._positions(ids_NT).expand_as(ids_NT))

    def _run_row(self, inputs_RH: Tensor, positions_R: Tensor, **spans: Any) -> Tensor:
        """Hidden states (R × H) of a packed row; `spans` are arguments of `packed_attention`."""
        output = self.backbone(inputs_embeds=inputs_RH[None], position_ids=positions_R[None], **spans)
        hidden_RH: Tensor = output.last_hidden_state[0]
        return hidden_RH

    def _positions(self, ids_NT: Tensor) -> Tensor:
        """The positions that the backbone gives these tokens if they come without a context (N × T, or 1 × T)."""
        if not self._family.offset_positions:
            return torch.arange(ids_NT.shape[1], device=ids_NT.device)[None]
        embeddings: Any = self.backbone.embeddings
        positions_NT: Tensor = embeddings.create_position_ids_from_input_ids(ids_NT, embeddings.padding_idx)
        return positions_NT


class FirstStage(_Stage):
    """M1: documents → one vector each, in the scale of M2's token embeddings."""

    def __init__(self, backbone: PreTrainedModel, output_size: int) -> None:
        super().__init__(backbone)
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

    def forward(self, ids_NT: Tensor, mask_NT: Tensor, pooled_NT: Tensor, *, num_tokens: int | None = None) -> Tensor:
        """Embeds documents; the arguments are those of `SecondStage.forward`.

        Returns:
            Vectors (N × H of M2, float32).
        """
        pooled_NH = self._mean_of_texts(ids_NT, mask_NT, pooled_NT, num_tokens)
        unit_NH = pooled_NH * torch.rsqrt(pooled_NH.pow(2).mean(-1, keepdim=True) + 1e-12)
        vectors_NH: Tensor = self.head(unit_NH.to(self.head.weight.dtype))
        return vectors_NH.float()


@dataclass(frozen=True, kw_only=True, eq=False)
class _KeptContext:
    """Keys and values of a shared context in every layer."""

    key: tuple[Any, ...]
    """The null weight, the precision and the weights of the backbone that they were computed with."""
    context_CH: Tensor
    states: dict[nn.Module, tuple[Tensor, Tensor]]

    def arguments(self) -> dict[str, Any]:
        """What attention needs to know about a context that is not in the row."""
        return {"num_context": len(self.context_CH), "null_weight": self.key[0], "context_states": self.states}


class SecondStage(_Stage):
    """M2: [J context vectors ‖ text tokens] → the text's embedding, pooled over text tokens only."""

    def __init__(self, backbone: PreTrainedModel, context_size: int, context_attention: str = "full") -> None:
        super().__init__(backbone)
        self.context_size = context_size
        self.context_attention = context_attention
        self._kept: _KeptContext | None = None
        if context_attention == "shared" and not self.is_packed:
            raise ValueError("a shared context needs packed attention")
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
        *,
        num_tokens: int | None = None,
    ) -> Tensor:
        """Embeds texts, given the vectors of context documents.

        Args:
            ids_NT: Token ids of the texts.
            mask_NT: True at tokens, False at padding.
            pooled_NT: True at the tokens that are pooled.
            context_MH: First-stage vectors of M ≤ J documents. None or M = 0 is no context. The null
                vector fills places M to J-1.
            keep_NJ: False where a text reads the null vector in place of a context document. A
                shared context has one row (1 × J, on the CPU) for all texts.
            num_tokens: Tokens of all texts. If it is given, packing does not wait for a GPU.

        Returns:
            Unit embeddings (N × H, float32).

        Raises:
            ValueError: M exceeds J.
        """
        if self.context_size == 0:
            pooled_NH = self._mean_of_texts(ids_NT, mask_NT, pooled_NT, num_tokens)
        elif self.context_attention == "shared":
            pooled_NH = self._beside_shared_context(ids_NT, mask_NT, pooled_NT, context_MH, keep_NJ, num_tokens)
        else:
            pooled_NH = self._behind_own_context(ids_NT, mask_NT, pooled_NT, context_MH, keep_NJ, num_tokens)
        return F.normalize(pooled_NH, dim=-1)

    def _behind_own_context(
        self,
        ids_NT: Tensor,
        mask_NT: Tensor,
        pooled_NT: Tensor,
        context_MH: Tensor | None,
        keep_NJ: Tensor | None,
        num_tokens: int | None,
    ) -> Tensor:
        """Pooled hidden states (N × H) of texts that each have the context in front of their own tokens."""
        size = self.context_size
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
        mask_NL = F.pad(mask_NT, (size, 0), value=1)
        positions_NL = F.pad(positions_NT, (size, 0), value=first_position(self.backbone.config))

        if self.is_packed:
            row = _Row.of(mask_NL, None if num_tokens is None else num_tokens + len(ids_NT) * size)
            positions_R = row.take(positions_NL.expand_as(mask_NL))
            hidden_RH = self._run_row(row.take(inputs_NLH), positions_R, **row.arguments(), num_carried=size)
            return row.mean(hidden_RH, F.pad(pooled_NT, (size, 0)))

        hidden_NLH = self.backbone(
            inputs_embeds=inputs_NLH,
            attention_mask=self._attention_mask(inputs_NLH, mask_NL),
            position_ids=positions_NL,
        ).last_hidden_state
        return mean_pool(hidden_NLH[:, size:], pooled_NT)

    def _beside_shared_context(
        self,
        ids_NT: Tensor,
        mask_NT: Tensor,
        pooled_NT: Tensor,
        context_MH: Tensor | None,
        keep_1J: Tensor | None,
        num_tokens: int | None,
    ) -> Tensor:
        """Pooled hidden states (N × H) of texts that read one context, which does not read them."""
        row, inputs_RH, positions_R = self._pack(ids_NT, mask_NT, num_tokens)
        context_CH, null_weight = self._shared_context(context_MH, keep_1J)
        context_CH = context_CH.to(inputs_RH.dtype)

        # What is embedded for search reads the same context again and again, so its states are kept.
        if keep_1J is None and not self.training and not torch.is_grad_enabled():
            spans = self._kept_context(context_CH, null_weight).arguments()
            return row.mean(self._run_row(inputs_RH, positions_R, **row.arguments(), **spans), pooled_NT)

        hidden_RH = self._run_behind(context_CH, null_weight, inputs_RH, positions_R, **row.arguments())
        return row.mean(hidden_RH, pooled_NT)

    def _run_behind(
        self, context_CH: Tensor, null_weight: int, inputs_RH: Tensor, positions_R: Tensor, **spans: Any
    ) -> Tensor:
        """Hidden states (R × H) of texts in a row that begins with the context."""
        size = len(context_CH)
        inputs_RH = torch.cat([context_CH, inputs_RH])
        positions_R = F.pad(positions_R, (size, 0), value=first_position(self.backbone.config))
        return self._run_row(inputs_RH, positions_R, num_context=size, null_weight=null_weight, **spans)[size:]

    def _kept_context(self, context_CH: Tensor, null_weight: int) -> _KeptContext:
        """The states of a context, which are computed again if the context, a weight or the precision changes."""
        device = context_CH.device.type
        precision = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else context_CH.dtype
        weights = tuple((one.data_ptr(), 0 if one.is_inference() else one._version) for one in self.parameters())
        key = null_weight, precision, weights
        kept = self._kept
        if kept is None or kept.key != key or not torch.equal(kept.context_CH, context_CH):
            # A text of one token keeps the row in the form that attention expects.
            kept = _KeptContext(key=key, context_CH=context_CH, states={})
            positions_1 = torch.full((1,), first_position(self.backbone.config), device=context_CH.device)
            bounds = torch.arange(2, dtype=torch.int32, device=context_CH.device)
            spans = {"bounds": bounds, "longest": 1, "context_states": kept.states}
            self._run_behind(context_CH, null_weight, context_CH[:1], positions_1, **spans)
            self._kept = kept
        return kept

    def _shared_context(self, context_MH: Tensor | None, keep_1J: Tensor | None) -> tuple[Tensor, int]:
        """The context (C × H) that all texts read, and how many null vectors its first row stands for, if any."""
        context_MH = self._checked(context_MH)
        kept = range(len(context_MH)) if keep_1J is None else keep_1J[0, : len(context_MH)].nonzero()[:, 0].tolist()
        null_weight = self.context_size - len(kept)

        # The null vector and dropped documents are in the graph, so that they have a gradient for DDP to reduce.
        rows_C = ([0] if null_weight else []) + [1 + row for row in kept]
        candidates = torch.cat([self.null_context[None], context_MH.to(self.null_context.dtype)])
        index_C = torch.tensor(rows_C).to(candidates.device, non_blocking=True)
        return candidates[index_C], null_weight

    def _context(self, num_texts: int, context_MH: Tensor | None, keep_NJ: Tensor | None) -> Tensor:
        null_H = self.null_context
        context_MH = self._checked(context_MH)
        num_given = len(context_MH)
        context_JH = F.pad(context_MH.float(), (0, 0, 0, self.context_size - num_given))
        given_J = torch.arange(self.context_size, device=null_H.device) < num_given
        keep_NJ = given_J.expand(num_texts, -1) if keep_NJ is None else keep_NJ & given_J
        # `where` is always computed, so that the null vector always has a gradient for DDP to reduce.
        return torch.where(keep_NJ[..., None], context_JH, null_H)

    def _checked(self, context_MH: Tensor | None) -> Tensor:
        if context_MH is None:
            return self.null_context.new_zeros(0, len(self.null_context))
        if len(context_MH) > self.context_size:
            raise ValueError(
                f"{len(context_MH)} context documents are given, the model reads at most {self.context_size}"
            )
        return context_MH

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
        self.second_stage_model = SecondStage(second, config.context_size, config.context_attention)

    @property
    def backbone_config(self) -> PreTrainedConfig:
        """Configuration of the backbone of both stages."""
        return self.second_stage_model.backbone.config

    def config_dict(self) -> dict[str, Any]:
        """The content of `config.json` of checkpoints and exports: the backbone's keys, J, and our own keys."""
        shared = self.config.context_attention == "shared"
        own = {
            "format_version": MODEL_FORMAT_VERSION if shared else 1,
            "architecture": self.config.architecture,
            "max_length_tokens": self.config.max_length_tokens,
            "pool_prompt": self.config.pool_prompt,
        }
        if shared:
            own["context_attention"] = "shared"
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


def choose_attention(asked: str, config: EncoderConfig) -> str:
    """The attention that `auto` stands for, or the one that is asked for.

    Raises:
        ValueError: A shared context is asked for with another attention than packed.
    """
    if config.context_attention == "shared" and asked not in ("auto", "packed"):
        raise ValueError(f"a shared context needs packed attention, {asked} is asked for; give packed or auto")
    if asked == "auto":
        return "packed" if config.context_attention == "shared" else "sdpa"
    return asked


def attention_or_default(attention: str) -> str | None:
    """The attention to ask transformers for. None is its default: sdpa, or eager for mpnet, which has no sdpa."""
    return {"sdpa": None, "packed": PACKED}.get(attention, attention)


def backbone_options(config: PreTrainedConfig, attention: str) -> dict[str, Any]:
    """Arguments besides the configuration. Raises ValueError if this backbone or this attention cannot be used."""
    family = family_of(config.model_type)
    if family.has_windows and attention.startswith("flash"):
        raise ValueError(
            f"{config.model_type} with {attention} hides the context from tokens beyond its window; use sdpa, eager "
            "or packed"
        )
    if not family.reads_context and attention == "packed":
        raise ValueError(f"{config.model_type} cannot read packed rows; use sdpa or eager")
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
        context_attention=own.get("context_attention", "full"),
    )
    return config, AutoConfig.from_pretrained(folder, trust_remote_code=False)


def load_encoder(folder: Path, attention: str = "auto") -> Encoder:
    """Loads the encoder of a checkpoint or an export, in evaluation mode.

    Args:
        folder: Holds `config.json` and `model.safetensors`.
        attention: As in `--attention`.

    Raises:
        ValueError: The configuration is not ours, or does not fit the weights or the attention.
        OSError: A file is missing.
    """
    from safetensors.torch import load_file

    config, backbone = read_encoder_config(folder)
    attention = choose_attention(attention, config)
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
