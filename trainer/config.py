"""The settings of a training, each a flag of `trainer/main.py`; checked here, once, before heavy imports."""

from __future__ import annotations

import argparse
import difflib
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipeline.errors import ConfigError


class TrainConfig(BaseModel):
    """Settings of a training. Defaults are the paper's small setting where it gives one (Section 5)."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    shards: Path = Field(description="folder of shards: the last line that `hardbatch run` prints")
    output: Path = Field(description="folder for checkpoints, logs and the export")

    architecture: Literal["contextual", "biencoder"] = Field("contextual", description="with or without first stage")
    backbone: str = Field("minilm", description="minilm, a folder, or NAME or NAME@COMMIT on the hub")
    num_layers: int | None = Field(None, ge=1, description="keep only the first layers of the backbone")
    random_weights: bool = Field(False, description="take the backbone's configuration, not its weights")
    attention: Literal["sdpa", "eager", "flash_attention_2"] = Field("sdpa", description="attention implementation")
    dropout: float | None = Field(None, ge=0, lt=1, description="the backbone's own dropout; default: as it is set")
    context_size: int = Field(64, ge=1, description="context documents J that the second stage reads")
    max_length: int = Field(64, ge=4, description="tokens of a text, prompt and special tokens included")
    pool_prompt: bool = Field(True, description="whether the prompt's tokens take part in mean pooling")

    epochs: int = Field(3, ge=1, description="passes over one packing of the shards")
    max_steps: int | None = Field(None, ge=1, description="stop after so many steps, if before the last epoch ends")
    learning_rate: float = Field(2e-5, gt=0, description="peak of AdamW's learning rate")
    warmup_steps: int = Field(1_000, ge=0, description="steps of linear warm-up; then linear decay to 0")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's, on matrices only; 0 is the paper's Adam")
    max_gradient_norm: float = Field(1.0, gt=0, description="gradients are clipped to this norm")
    temperature: float = Field(0.02, gt=0, description="of InfoNCE")
    sequence_dropout: float = Field(0.005, ge=0, lt=1, description="rate at which context vectors become null")
    no_context_rate: float = Field(0.0, ge=0, le=1, description="rate of batches whose whole context becomes null")
    hard_negatives: int = Field(0, ge=0, description="hard negatives of each query to use, where the shards have them")
    precision: Literal["auto", "bf16", "fp32"] = Field("auto", description="auto: bf16 autocast where hardware has it")
    first_stage_chunk: int = Field(256, ge=1, description="context documents of a forward pass of the first stage")
    second_stage_chunk: int = Field(256, ge=1, description="texts of a forward pass of the second stage")
    accumulate: int = Field(1, ge=1, description="batches of a rank in one step")
    seed: int = Field(0, ge=0, lt=2**63, description="draws order, context and dropout")

    eval: tuple[Path, ...] = Field(
        (), description="folders of corpus/queries/qrels, by commas; `holdout`: the shards' own"
    )
    eval_every: int | None = Field(None, ge=1, description="steps between evaluations; default: first and last only")
    save_every: int = Field(500, ge=1, description="steps between checkpoints")
    keep_last: int = Field(2, ge=1, description="checkpoints that are kept")
    log_every: int = Field(10, ge=1, description="steps between lines of the log")
    resume: str = Field("never", description="auto: from the newest checkpoint of --output; or a checkpoint's folder")
    init_from: Path | None = Field(None, description="start from the weights of an export or a checkpoint")
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda)$", description="auto, cpu or cuda")
    workers: int = Field(1, ge=1, description="background threads that read and tokenise")
    prefetch: int = Field(4, ge=1, description="batches read ahead")

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        chosen = self.random_weights or self.num_layers is not None or self.dropout is not None
        if self.init_from is not None and chosen:
            raise ValueError("--init-from brings its own model: leave --random-weights, --num-layers and --dropout out")
        return self

    @property
    def model_context_size(self) -> int:
        """J of the model: 0 for a biencoder."""
        return self.context_size if self.architecture == "contextual" else 0

    def trajectory(self) -> dict[str, Any]:
        """The settings that a resumed run must share with its checkpoint: with others it would be another training."""
        return {name: value for name, value in self.model_dump(mode="json").items() if name not in _FREE_TO_CHANGE}


_FREE_TO_CHANGE = {
    *("shards", "output", "eval", "eval_every", "save_every", "keep_last", "log_every", "resume", "device"),
    *("workers", "prefetch", "first_stage_chunk", "second_stage_chunk", "accumulate", "attention"),
}


def parse_flags(arguments: Sequence[str]) -> TrainConfig:
    """The settings that the command line gives. Raises ConfigError naming the flag, what was given and what is allowed.

    `--help` prints and exits.
    """
    given = vars(_parser().parse_args(list(arguments)))
    if isinstance(given.get("eval"), str):
        given["eval"] = [part.strip() for part in given["eval"].split(",") if part.strip()]
    try:
        return TrainConfig.model_validate(given)
    except ValidationError as error:
        raise ConfigError(*(_explain(item) for item in error.errors(include_url=False))) from None


class _Parser(argparse.ArgumentParser):
    """Tells a mistake as ConfigError, and suggests a flag for an unknown one."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        options, unknown = self.parse_known_args(args, namespace)
        if unknown:
            known = [flag for action in self._actions for flag in action.option_strings]
            close = difflib.get_close_matches(unknown[0].partition("=")[0], known, n=1)
            self.error(f"unknown argument {unknown[0]}" + (f"; did you mean {close[0]}?" if close else ""))
        return options

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see --help")


def _parser() -> _Parser:
    parser = _Parser(
        prog="trainer/main.py",
        description="Trains a contextual document embedding model on batch shards.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    for name, field in TrainConfig.model_fields.items():
        default = "required" if field.is_required() else f"default: {_shown(field.default)}"
        text = f"{field.description} ({default})".replace("%", "%%")
        if field.annotation is bool:
            parser.add_argument(_flag(name), action=argparse.BooleanOptionalAction, help=text)
        else:
            choices = typing.get_args(field.annotation) if typing.get_origin(field.annotation) is Literal else None
            metavar = "{" + ",".join(choices) + "}" if choices else name.upper()
            parser.add_argument(_flag(name), help=text, metavar=metavar)
    return parser


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _shown(default: Any) -> str:
    return "none" if default is None or default == () else str(default)


def _explain(item: Any) -> str:
    if item["type"] == "value_error":
        return str(item["ctx"]["error"])
    flag = _flag(str(item["loc"][0]))
    if item["type"] == "missing":
        return f"{flag} is required; see --help"
    return f"{flag}: {item['msg'][0].lower()}{item['msg'][1:]}, given {ascii(item['input'])[:80]}"
