"""The settings of a training, each a flag of `trainer/main.py`.

They are checked once, here, before anything heavy is imported.
"""
# ruff: noqa: RUF009 `_setting` returns a field

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

from hardbatch.pipeline.artifacts.files import user_path
from hardbatch.pipeline.errors import ConfigError


@dataclass(frozen=True)
class _Whole:
    """Parses an integer within limits, or one of `words`."""

    least: int
    below: int | None = None
    words: tuple[str, ...] = ()

    def __call__(self, text: str) -> int | str:
        if text in self.words:
            return text

        try:
            value = int(text)
        except ValueError:
            words = "".join(f"{word!r} or " for word in self.words)
            raise ValueError(f"input should be {words}a whole number") from None

        if value < self.least:
            raise ValueError(f"input should be greater than or equal to {self.least}")
        if self.below is not None and value >= self.below:
            raise ValueError(f"input should be less than {self.below}")
        return value


@dataclass(frozen=True)
class _Number:
    """Parses a finite number within limits."""

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None

    def __call__(self, text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise ValueError("input should be a number") from None

        if not math.isfinite(value):
            raise ValueError("input should be a finite number")
        if self.least is not None and value < self.least:
            raise ValueError(f"input should be greater than or equal to {self.least:g}")
        if self.above is not None and value <= self.above:
            raise ValueError(f"input should be greater than {self.above:g}")
        if self.most is not None and value > self.most:
            raise ValueError(f"input should be less than or equal to {self.most:g}")
        if self.below is not None and value >= self.below:
            raise ValueError(f"input should be less than {self.below:g}")
        return value


@dataclass(frozen=True)
class _Choice:
    """Parses one of a few names."""

    names: tuple[str, ...]

    def __call__(self, text: str) -> str:
        if text not in self.names:
            *others, last = (repr(name) for name in self.names)
            raise ValueError(f"input should be {', '.join(others)} or {last}")
        return text


def _paths(text: str) -> tuple[Path, ...]:
    return tuple(user_path(part.strip()) for part in text.split(",") if part.strip())


def _switch(text: str) -> bool:
    raise AssertionError("argparse turns --name and --no-name into a bool")


def _setting(description: str, read: Callable[[str], Any], *default: Any) -> Any:
    """Declares a field of `TrainConfig`: its help, how its text is parsed, and its default if it has one."""
    metadata = {"description": description, "read": read}
    return dataclasses.field(default=default[0] if default else dataclasses.MISSING, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The settings of a training, made and checked by `parse_flags`.

    Defaults follow the paper's small setting if it gives one (Section 5).
    """

    shards: Path = _setting("folder of shards: the last line that `hardbatch run` prints", user_path)
    output: Path = _setting("folder for checkpoints, logs and the export", user_path)

    architecture: Literal["contextual", "biencoder"] = _setting(
        "whether there is a first stage: contextual has one, biencoder has none",
        _Choice(("contextual", "biencoder")),
        "contextual",
    )
    backbone: str = _setting("minilm, a folder, or NAME or NAME@COMMIT on the Hugging Face hub", str, "minilm")
    num_layers: int | None = _setting("number of the backbone's first layers to keep; default: all", _Whole(1), None)
    random_weights: bool = _setting("start from random weights with the backbone's configuration", _switch, False)
    attention: Literal["auto", "packed", "sdpa", "eager", "flash_attention_2"] = _setting(
        "attention implementation; packed: texts in one row, without padding; auto: packed if the context is shared, "
        "otherwise sdpa",
        _Choice(("auto", "packed", "sdpa", "eager", "flash_attention_2")),
        "auto",
    )
    context_attention: Literal["full", "shared"] = _setting(
        "full: context and text read each other, as in the paper; shared: the context reads only itself and is "
        "computed once for all texts",
        _Choice(("full", "shared")),
        "full",
    )
    dropout: float | None = _setting(
        "dropout of the backbone; default: that of its configuration", _Number(least=0, below=1), None
    )
    context_size: int = _setting("number of context documents (J) that the second stage reads", _Whole(1), 64)
    max_length: int = _setting("maximum tokens of a text, including its prompt and special tokens", _Whole(4), 64)
    pool_prompt: bool = _setting("include the prompt's tokens in mean pooling", _switch, True)

    epochs: int = _setting("passes over one packing of the shards", _Whole(1), 3)
    max_steps: int | None = _setting("maximum number of steps; default: until the last epoch ends", _Whole(1), None)
    learning_rate: float = _setting("peak learning rate of AdamW", _Number(above=0), 2e-5)
    warmup_steps: int = _setting("steps of linear warm-up, followed by linear decay to 0", _Whole(0), 1_000)
    weight_decay: float = _setting(
        "weight decay of AdamW, on matrices only; 0 is the paper's Adam", _Number(least=0), 0.0
    )
    max_gradient_norm: float = _setting("norm to which gradients are clipped", _Number(above=0), 1.0)
    temperature: float = _setting("temperature of InfoNCE", _Number(above=0), 0.02)
    sequence_dropout: float = _setting(
        "rate at which a context vector is replaced by the null vector", _Number(least=0, below=1), 0.005
    )
    no_context_rate: float = _setting(
        "share of batches whose whole context is replaced by null vectors", _Number(least=0, most=1), 0.0
    )
    positives: Literal["own", "same-answer"] = _setting(
        "positives of a query: its own document, or also those of the batch that answer it for certain",
        _Choice(("own", "same-answer")),
        "own",
    )
    hard_negatives: int = _setting("hard negatives to use for each query, if the shards have them", _Whole(0), 0)
    precision: Literal["auto", "bf16", "fp32"] = _setting(
        "autocast; auto: bf16 if the hardware supports it", _Choice(("auto", "bf16", "fp32")), "auto"
    )
    chunk_tokens: int | Literal["auto"] = _setting(
        "tokens computed at once, including padding and context; auto: as many as fit the memory",
        _Whole(1, words=("auto",)),
        "auto",
    )
    accumulate: int = _setting("batches that a rank accumulates in one step", _Whole(1), 1)
    similar_lengths: int = _setting(
        "how many consecutive batches are of similar length, so that as many ranks take equally long over a step",
        _Whole(1),
        1,
    )
    seed: int = _setting("seed of the order, the context and dropout", _Whole(0, below=2**63), 0)

    eval: tuple[Path, ...] = _setting(
        "folders of corpus/queries/qrels, separated by commas; `holdout`: those of the shards", _paths, ()
    )
    eval_every: int | None = _setting(
        "steps between evaluations; default: only before the first step and after the last", _Whole(1), None
    )
    save_every: int = _setting("steps between checkpoints", _Whole(1), 500)
    keep_last: int = _setting("number of newest checkpoints to keep", _Whole(1), 2)
    log_every: int = _setting("steps between lines of the log", _Whole(1), 10)
    resume: str = _setting(
        "never; auto: from the newest checkpoint of --output, if any; or the folder of a checkpoint", str, "never"
    )
    init_from: Path | None = _setting(
        "folder of an export or a checkpoint whose weights to start from", user_path, None
    )
    device: Literal["auto", "cpu", "cuda"] = _setting("auto, cpu or cuda", _Choice(("auto", "cpu", "cuda")), "auto")
    timeout_s: int = _setting("seconds that a rank waits for the others before it fails", _Whole(1), 1_800)
    workers: int = _setting("background threads that read and tokenise", _Whole(1), 1)
    prefetch: int = _setting("batches read ahead", _Whole(1), 4)

    @property
    def model_context_size(self) -> int:
        """The J of the model: 0 for a biencoder."""
        return self.context_size if self.architecture == "contextual" else 0

    def trajectory(self) -> dict[str, Any]:
        """Returns the settings, ready for JSON, that a resumed run must share with its checkpoint.

        A different value of any of them would make a different training.
        """
        settings = {name: getattr(self, name) for name in setting_defaults() if name not in _FREE_TO_CHANGE}
        return {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()}


_FREE_TO_CHANGE = {
    *("shards", "output", "eval", "eval_every", "save_every", "keep_last", "log_every", "resume", "device"),
    *("timeout_s", "workers", "prefetch", "chunk_tokens", "accumulate", "attention"),
}


def setting_defaults() -> dict[str, Any]:
    """Returns the default of each setting, in the order of the flags; `dataclasses.MISSING` if it is required."""
    return {field.name: field.default for field in dataclasses.fields(TrainConfig)}


def parse_flags(arguments: Sequence[str]) -> TrainConfig:
    """Parses the command line; `--help` prints the flags and exits.

    Raises:
        ConfigError: With a line for each mistake: the flag, what was given and what is allowed.
    """
    given = vars(_parser().parse_args(list(arguments)))
    settings: dict[str, Any] = {}
    mistakes: list[str] = []

    for field in dataclasses.fields(TrainConfig):
        value = given.get(field.name, field.default)
        if value is dataclasses.MISSING:
            mistakes.append(f"{_flag(field.name)} is required; see --help")
        elif field.name in given and isinstance(value, str):
            try:
                settings[field.name] = field.metadata["read"](value)
            except ValueError as error:
                mistakes.append(f"{_flag(field.name)}: {error}, given {ascii(value)[:80]}")
        else:
            settings[field.name] = value

    if mistakes:
        raise ConfigError(*mistakes)

    config = TrainConfig(**settings)
    chosen = config.random_weights or config.num_layers is not None or config.dropout is not None
    if config.init_from is not None and chosen:
        raise ConfigError("--init-from brings its own model: remove --random-weights, --num-layers and --dropout")
    if config.context_attention == "shared" and config.architecture == "biencoder":
        raise ConfigError("--context-attention shared: --architecture biencoder reads no context; remove one of them")
    if config.context_attention == "shared" and config.attention not in ("auto", "packed"):
        raise ConfigError(
            f"--context-attention shared: needs --attention packed, given '{config.attention}'; remove --attention"
        )
    return config


class _Parser(argparse.ArgumentParser):
    """Reports a mistake as ConfigError, and suggests a flag for an unknown one."""

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
    for field in dataclasses.fields(TrainConfig):
        required = field.default is dataclasses.MISSING
        default = "required" if required else f"default: {_shown(field.default)}"
        text = f"{field.metadata['description']} ({default})".replace("%", "%%")
        read = field.metadata["read"]
        if read is _switch:
            parser.add_argument(_flag(field.name), action=argparse.BooleanOptionalAction, help=text)
        else:
            metavar = "{" + ",".join(read.names) + "}" if isinstance(read, _Choice) else field.name.upper()
            parser.add_argument(_flag(field.name), help=text, metavar=metavar)
    return parser


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _shown(default: Any) -> str:
    return "none" if default is None or default == () else str(default)
