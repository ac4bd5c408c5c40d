"""From the name of a backbone to a new encoder: finds it, checks it, and loads or draws its weights."""

from __future__ import annotations

import contextlib
import json
import logging
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from hardbatch.pipeline.artifacts.artifact import MANIFEST, verify_artifact
from hardbatch.pipeline.errors import ConfigError, HardbatchError, IntegrityError, first_line
from hardbatch.pipeline.models.locate import locate_model, require_safetensors
from hardbatch.trainer.config import TrainConfig
from hardbatch.trainer.model import (
    Encoder,
    EncoderConfig,
    attention_or_default,
    backbone_options,
    choose_attention,
    family_of,
    load_encoder,
    longest_text_tokens,
    new_backbone,
)

_DROPOUTS = (  # names of dropout rates in the configurations of the backbones
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "attention_dropout",
    "dropout",
    "embedding_dropout",
    "mlp_dropout",
)


def find_backbone(name: str) -> Path:
    """The folder of a backbone, given as minilm, a folder, or NAME or NAME@COMMIT on the hub.

    Raises:
        ConfigError: There is no such backbone.
    """
    if name == "lexical":
        raise ConfigError("--backbone: lexical has no weights to train; give minilm, a folder, or a name on the hub")
    hub_name, _, revision = name.partition("@")
    if Path(name).expanduser().is_dir():
        hub_name, revision = name, ""
    _, folder, _ = locate_model(hub_name, revision or None, Path())
    folder = _transformer_folder(folder)
    if not (folder / "config.json").is_file():
        raise ConfigError(f"--backbone {name}: {folder} has no config.json; give the folder of a transformers model")
    return folder


def _transformer_folder(folder: Path) -> Path:
    """The folder of the transformers model in `folder`, which older sentence-transformers put below it."""
    with contextlib.suppress(OSError, ValueError, KeyError, IndexError, TypeError):
        first: str = json.loads((folder / "modules.json").read_bytes())[0]["path"]
        if re.fullmatch(r"\w+", first) and (folder / first / "config.json").is_file():
            return folder / first
    return folder


def ignored_modules(folder: Path) -> list[str]:
    """What a sentence-transformers folder does after its transformer, besides what this trainer does there too.

    Texts are pooled here by the mean over their tokens. A model that was trained with another pooling, or with
    further layers, starts worse than it is.

    Args:
        folder: The folder of the transformer, or one that `find_backbone` found below the folder of the model.

    Returns:
        For example `pooling by cls` and `Dense`; empty if nothing is ignored, or if the folder is of another kind.
    """
    for root in (folder, folder.parent):
        try:
            modules = json.loads((root / "modules.json").read_bytes())
            kinds = {str(module["type"]).rsplit(".", 1)[-1]: str(module["path"]) for module in modules}
            pooling = json.loads((root / kinds["Pooling"] / "config.json").read_bytes()) if "Pooling" in kinds else {}
        except (OSError, ValueError, KeyError, TypeError):
            continue
        modes = pooling.get("pooling_mode")
        if modes is None:  # older folders have a switch for each
            modes = [
                key.removeprefix("pooling_mode_").removesuffix("_token") for key in pooling if pooling[key] is True
            ]
        modes = modes if isinstance(modes, list) else [modes]
        others = [mode for mode in modes if mode not in ("mean", "mean_tokens", "include_prompt")]
        found = [f"pooling by {mode}" for mode in others]
        return found + [kind for kind in kinds if kind not in ("Transformer", "Pooling", "Normalize")]
    return []


def build_encoder(config: TrainConfig, folder: Path) -> Encoder:
    """Builds a new encoder on the backbone in `folder`, pretrained or with random weights drawn by the seed.

    Raises:
        ConfigError: The backbone has an unsupported type, fewer layers or positions than the settings
            ask for, no safetensors, or no such attention.
    """
    backbone = _read_config(folder, config)
    own = EncoderConfig(
        context_size=config.model_context_size,
        max_length_tokens=config.max_length,
        pool_prompt=config.pool_prompt,
        context_attention=config.context_attention,
    )
    if not config.random_weights:
        require_safetensors(config.backbone, folder)

    num_stages = 2 if own.context_size else 1
    with _as_user_error(f"--backbone {config.backbone}"), torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        attention = choose_attention(config.attention, own)
        stages = [_load_backbone(folder, backbone, config, attention) for _ in range(num_stages)]
        encoder = Encoder(own, stages[0] if own.context_size else None, stages[-1])
        if encoder.first_stage_model is not None:
            encoder.first_stage_model.initialise_head(stages[-1].get_input_embeddings().weight)
    return encoder


def initial_encoder(config: TrainConfig, folder: Path, *, flag: str, verified: bool = False) -> Encoder:
    """Loads the encoder of an export or a checkpoint, whose settings must be those of `config`.

    Args:
        config: The settings.
        folder: The export or the checkpoint.
        flag: The option that named the folder, for messages.
        verified: Whether the files of a checkpoint have been compared with their digests.

    Raises:
        ConfigError: The settings differ, or the folder does not hold a model of ours.
        IntegrityError: A file is damaged.
    """
    if not (folder / "config.json").is_file() or not (folder / "model.safetensors").is_file():
        raise ConfigError(
            f"{flag} {folder}: no config.json and model.safetensors here; give the folder of an export or of "
            "one checkpoint"
        )
    if not verified and (folder / MANIFEST).is_file():
        faults = verify_artifact(folder)
        if faults:
            raise IntegrityError(*faults)
    with _as_user_error(flag):
        encoder = load_encoder(folder, attention=config.attention)

    given = {
        "context_size": config.model_context_size,
        "pool_prompt": config.pool_prompt,
        "context_attention": config.context_attention,
    }
    for name, value in given.items():
        saved = getattr(encoder.config, name)
        if saved != value:
            setting = "--" + name.replace("_", "-")
            raise ConfigError(
                f"{flag} {folder}: its model has {setting} {saved} ({encoder.config.architecture}), "
                f"this training asks for {value}; give the same --architecture and {setting}"
            )
    _check_length(encoder.backbone_config, config, str(folder))
    encoder.config = replace(encoder.config, max_length_tokens=config.max_length)
    return encoder


def _read_config(folder: Path, config: TrainConfig) -> PreTrainedConfig:
    flag, path = f"--backbone {config.backbone}", folder / "config.json"
    try:
        content = json.loads(path.read_bytes())
        model_type = content.get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"{flag}: {path} cannot be read: {first_line(error)}") from None
    with _as_user_error(flag):
        family_of(model_type)
        backbone = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    _check_length(backbone, config, config.backbone)

    if config.dropout is not None:
        for name in _DROPOUTS:
            if hasattr(backbone, name):
                setattr(backbone, name, config.dropout)

    if config.num_layers is not None:
        if config.num_layers > backbone.num_hidden_layers:
            raise ConfigError(
                f"--num-layers {config.num_layers}: {config.backbone} has {backbone.num_hidden_layers} layers"
            )
        backbone.num_hidden_layers = config.num_layers
        if getattr(backbone, "layer_types", None):
            backbone.layer_types = backbone.layer_types[: config.num_layers]
    return backbone


def _check_length(backbone: PreTrainedConfig, config: TrainConfig, name: str) -> None:
    with _as_user_error(name):
        limit = longest_text_tokens(backbone)
    if limit is not None and config.max_length > limit:
        raise ConfigError(f"--max-length {config.max_length}: {name} reads at most {limit} tokens")


def _load_backbone(folder: Path, backbone: PreTrainedConfig, config: TrainConfig, attention: str) -> PreTrainedModel:
    if config.random_weights:
        return new_backbone(backbone, attention)
    options: dict[str, Any] = backbone_options(backbone, attention)
    with _quiet():
        model, report = AutoModel.from_pretrained(
            folder,
            config=backbone,
            attn_implementation=attention_or_default(attention),
            dtype=torch.float32,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ValueError(f"{folder} lacks {len(missing)} of its weights, first: {missing[0]}")
    return model


@contextlib.contextmanager
def _as_user_error(flag: str) -> Iterator[None]:
    try:
        yield
    except HardbatchError:
        raise
    except Exception as error:  # whatever torch, transformers and safetensors say about files that do not fit
        raise ConfigError(f"{flag}: {' '.join(str(error).split())[:500]}") from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hides the report of weights that are not loaded on purpose: the pooler, and layers beyond --num-layers."""
    disable_progress_bar()
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
