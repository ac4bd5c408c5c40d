"""Flags: what they give, and what is said of those that are wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import ConfigError
from trainer.config import TrainConfig, parse_flags

NEEDED = ["--shards", "S", "--output", "O"]
DESIGNED = {  # as docs and scripts name them
    *("--shards", "--output", "--architecture", "--backbone", "--num-layers", "--context-size", "--max-length"),
    *("--epochs", "--max-steps", "--learning-rate", "--warmup-steps", "--temperature", "--sequence-dropout"),
    *("--no-context-rate", "--precision", "--first-stage-chunk", "--second-stage-chunk", "--accumulate", "--seed"),
    *("--eval", "--eval-every", "--save-every", "--resume", "--init-from"),
}


def test_flags_and_defaults():
    config = parse_flags([*NEEDED, "--eval", "a, b/c", "--no-pool-prompt", "--num-layers=3", "--learning-rate", "1e-4"])
    assert config.shards == Path("S") and config.eval == (Path("a"), Path("b/c"))
    assert not config.pool_prompt and config.num_layers == 3 and config.learning_rate == 1e-4
    assert config.warmup_steps == 1000 and config.temperature == 0.02 and config.sequence_dropout == 0.005


def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit) as left:
        parse_flags(["--help"])
    assert left.value.code == 0
    printed = capsys.readouterr().out
    for name in TrainConfig.model_fields:
        assert "--" + name.replace("_", "-") in printed
    assert all(flag in printed for flag in DESIGNED)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--output", "O"], "--shards is required"),
        ([*NEEDED, "--contxt-size", "3"], "unknown argument --contxt-size; did you mean --context-size?"),
        ([*NEEDED, "--learning-rate", "-1"], "--learning-rate: input should be greater than 0, given '-1'"),
        ([*NEEDED, "--epochs", "1.5"], "--epochs: .*given '1.5'"),
        ([*NEEDED, "--epochs"], "--epochs: expected one argument"),
        ([*NEEDED, "--precision", "fp16"], "--precision: input should be 'auto', 'bf16' or 'fp32', given 'fp16'"),
        ([*NEEDED, "--temperature", "nan"], "--temperature: .*finite"),
        ([*NEEDED, "--sequence-dropout", "1"], "--sequence-dropout: input should be less than 1"),
        ([*NEEDED, "--device", "tpu"], "--device: .*given 'tpu'"),
        ([*NEEDED, "--init-from", "x", "--num-layers", "2"], "--init-from brings its own model"),
        ([*NEEDED, "stray"], "unknown argument stray"),
        ([*NEEDED, "--seed", "-1"], "--seed: input should be greater than or equal to 0"),
    ],
)
def test_mistakes_are_told_in_one_line(flags, message):
    with pytest.raises(ConfigError, match=message) as told:
        parse_flags(flags)
    assert "\n" not in str(told.value)


def test_a_biencoder_has_no_context():
    assert parse_flags([*NEEDED, "--architecture", "biencoder", "--context-size", "8"]).model_context_size == 0
    assert parse_flags([*NEEDED, "--context-size", "8"]).model_context_size == 8


def test_trajectory_holds_what_changes_a_training():
    plain = parse_flags(NEEDED).trajectory()
    for flags in (["--accumulate", "4"], ["--workers", "2"], ["--save-every", "7"], ["--second-stage-chunk", "8"]):
        assert parse_flags([*NEEDED, *flags]).trajectory() == plain
    for flags in (["--seed", "1"], ["--learning-rate", "1e-3"], ["--max-steps", "5"], ["--no-pool-prompt"]):
        assert parse_flags([*NEEDED, *flags]).trajectory() != plain
