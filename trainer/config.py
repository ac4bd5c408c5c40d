"""The settings of a training, each a flag of `trainer/main.py`.

They are checked once, here, before anything heavy is imported.
"""
# ruff: noqa: RUF009 what `_setting` returns is a field

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

from hardbatch.pipeline.errors import ConfigError


@dataclass(frozen=True)
class _Whole:
    """Reads a whole number within limits, or one of `words`."""

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
    """Reads a finite number within limits."""

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
    """Reads one of a few names."""

    names: tuple[str, ...]

    def __call__(self, text: str) -> str:
        if text not in self.names:
            *others, last = (repr(name) for name in self.names)
            raise ValueError(f"input should be {', '.join(others)} or {last}")
        return text


def _paths(text: str) -> tuple[Path, ...]:
    return tuple(Path(part.strip()) for part in text.split(",") if part.strip())


def _switch(text: str) -> bool:
    raise AssertionError("argparse turns --name and --no-name into a bool")


def _setting(description: str, read: Callable[[str], Any], *default: Any) -> Any:
    """A field of `TrainConfig`: its help, how its text is read, and its default if it has one."""
    metadata = {"description": description, "read": read}
    return dataclasses.field(default=default[0] if default else dataclasses.MISSING, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The settings of a training. `parse_flags` makes and checks it.

    Defaults are the paper's small setting where it gives one (Section 5).
    """

    shards: Path = _setting("folder of shards: the last line that `hardbatch run` prints", Path)
    output: Path = _setting("folder for checkpoints, logs and the export", Path)

    architecture: Literal["contextual", "biencoder"] = _setting(
        "with or without first stage", _Choice(("contextual", "biencoder")), "contextual"
    )
    backbone: str = _setting("minilm, a folder, or NAME or NAME@COMMIT on the hub", str, "minilm")
    num_layers: int | None = _setting("keep only the first layers of the backbone", _Whole(1), None)
    random_weights: bool = _setting("take the backbone's configuration, not its weights", _switch, False)
    attention: Literal["sdpa", "eager", "flash_attention_2"] = _setting(
        "attention implementation", _Choice(("sdpa", "eager", "flash_attention_2")), "sdpa"
    )
    dropout: float | None = _setting(
        "the backbone's own dropout; default: as it is set", _Number(least=0, below=1), None
    )
    context_size: int = _setting("context documents J that the second stage reads", _Whole(1), 64)
    max_length: int = _setting("tokens of a text, prompt and special tokens included", _Whole(4), 64)
    pool_prompt: bool = _setting("whether the prompt's tokens take part in mean pooling", _switch, True)

    epochs: int = _setting("passes over one packing of the shards", _Whole(1), 3)
    max_steps: int | None = _setting("stop after so many steps, if before the last epoch ends", _Whole(1), None)
    learning_rate: float = _setting("peak of AdamW's learning rate", _Number(above=0), 2e-5)
    warmup_steps: int = _setting("steps of linear warm-up; then linear decay to 0", _Whole(0), 1_000)
    weight_decay: float = _setting("AdamW's, on matrices only; 0 is the paper's Adam", _Number(least=0), 0.0)
    max_gradient_norm: float = _setting("gradients are clipped to this norm", _Number(above=0), 1.0)
    temperature: float = _setting("of InfoNCE", _Number(above=0), 0.02)
    sequence_dropout: float = _setting("rate at which context vectors become null", _Number(least=0, below=1), 0.005)
    no_context_rate: float = _setting("rate of batches whose whole context becomes null", _Number(least=0, most=1), 0.0)
    hard_negatives: int = _setting("hard negatives of each query to use, where the shards have them", _Whole(0), 0)
    precision: Literal["auto", "bf16", "fp32"] = _setting(
        "auto: bf16 autocast where hardware has it", _Choice(("auto", "bf16", "fp32")), "auto"
    )
    chunk_tokens: int | Literal["auto"] = _setting(
        "tokens computed at once, padding and context included; auto: what the memory holds",
        _Whole(1, words=("auto",)),
        "auto",
    )
    accumulate: int = _setting("batches of a rank in one step", _Whole(1), 1)
    seed: int = _setting("draws order, context and dropout", _Whole(0, below=2**63), 0)

    eval: tuple[Path, ...] = _setting(
        "folders of corpus/queries/qrels, by commas; `holdout`: the shards' own", _paths, ()
    )
    eval_every: int | None = _setting("steps between evaluations; default: first and last only", _Whole(1), None)
    save_every: int = _setting("steps between checkpoints", _Whole(1), 500)
    keep_last: int = _setting("checkpoints that are kept", _Whole(1), 2)
    log_every: int = _setting("steps between lines of the log", _Whole(1), 10)
    resume: str = _setting("auto: from the newest checkpoint of --output; or a checkpoint's folder", str, "never")
    init_from: Path | None = _setting("start from the weights of an export or a checkpoint", Path, None)
    device: Literal["auto", "cpu", "cuda"] = _setting("auto, cpu or cuda", _Choice(("auto", "cpu", "cuda")), "auto")
    timeout_s: int = _setting("seconds that a rank waits for the others before it gives up", _Whole(1), 1_800)
    workers: int = _setting("background threads that read and tokenise", _Whole(1), 1)
    prefetch: int = _setting("batches read ahead", _Whole(1), 4)

    @property
    def model_context_size(self) -> int:
        """J of the model: 0 for a biencoder."""
        return self.context_size if self.architecture == "contextual" else 0

    def trajectory(self) -> dict[str, Any]:
        """The settings, ready for JSON, that a resumed run must share with its checkpoint.

        With another value of one of them it would be another training.
        """
        settings = {name: getattr(self, name) for name in setting_defaults() if name not in _FREE_TO_CHANGE}
        return {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()}


_FREE_TO_CHANGE = {
    *("shards", "output", "eval", "eval_every", "save_every", "keep_last", "log_every", "resume", "device"),
    *("timeout_s", "workers", "prefetch", "chunk_tokens", "accumulate", "attention"),
}


def setting_defaults() -> dict[str, Any]:
    """The default of each setting, in the order of the flags; `dataclasses.MISSING` if required."""
    return {field.name: field.default for field in dataclasses.fields(TrainConfig)}


def parse_flags(arguments: Sequence[str]) -> TrainConfig:
    """Returns the settings that the command line gives; `--help` prints and exits.

    Raises:
        ConfigError: a line for each mistake: the flag, what was given and what is allowed.
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
        raise ConfigError("--init-from brings its own model: leave --random-weights, --num-layers and --dropout out")
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
