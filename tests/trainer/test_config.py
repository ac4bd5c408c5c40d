"""Flags: what they give, and what is said of those that are wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hardbatch.pipeline.errors import ConfigError
from hardbatch.trainer.config import parse_flags, setting_defaults

ROOT = Path(__file__).resolve().parents[2]
NEEDED = ["--shards", "S", "--output", "O"]
DESIGNED = {  # as docs and scripts name them
    *("--shards", "--output", "--architecture", "--backbone", "--num-layers", "--context-size", "--max-length"),
    *("--epochs", "--max-steps", "--learning-rate", "--warmup-steps", "--temperature", "--sequence-dropout"),
    *("--no-context-rate", "--precision", "--chunk-tokens", "--accumulate", "--seed"),
    *("--eval", "--eval-every", "--save-every", "--resume", "--init-from"),
}


def test_flags_and_defaults():
    config = parse_flags([*NEEDED, "--eval", "a, b/c", "--no-pool-prompt", "--num-layers=3", "--learning-rate", "1e-4"])
    assert config.shards == Path("S") and config.eval == (Path("a"), Path("b/c"))
    assert not config.pool_prompt and config.num_layers == 3 and config.learning_rate == 1e-4
    given = parse_flags([*NEEDED, "--init-from", "x", "--chunk-tokens", "512", "--device", "cpu"])
    assert given.init_from == Path("x") and given.chunk_tokens == 512 and config.chunk_tokens == "auto"
    assert config.warmup_steps == 1000 and config.temperature == 0.02 and config.sequence_dropout == 0.005


def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit) as left:
        parse_flags(["--help"])
    assert left.value.code == 0
    printed = capsys.readouterr().out
    for name in setting_defaults():
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
        ([*NEEDED, "--positives", "all"], "--positives: input should be 'own' or 'same-answer', given 'all'"),
        ([*NEEDED, "--temperature", "nan"], "--temperature: .*finite"),
        ([*NEEDED, "--sequence-dropout", "1"], "--sequence-dropout: input should be less than 1"),
        ([*NEEDED, "--device", "tpu"], "--device: .*given 'tpu'"),
        ([*NEEDED, "--init-from", "x", "--num-layers", "2"], "--init-from brings its own model"),
        ([*NEEDED, "--init-from", "x", "--dropout", "0.5"], "--init-from brings its own model"),
        ([*NEEDED, "stray"], "unknown argument stray"),
        ([*NEEDED, "--seed", "-1"], "--seed: input should be greater than or equal to 0"),
        ([*NEEDED, "--seed", str(2**63)], "--seed: input should be less than 9223372036854775808"),
        ([*NEEDED, "--no-context-rate", "1.1"], "--no-context-rate: input should be less than or equal to 1, given"),
        ([*NEEDED, "--weight-decay", "much"], "--weight-decay: input should be a number, given 'much'"),
        ([*NEEDED, "--chunk-tokens", "all"], "--chunk-tokens: input should be 'auto' or a whole number, given 'all'"),
        ([*NEEDED, "--chunk-tokens", "0"], "--chunk-tokens: input should be greater than or equal to 1"),
        ([*NEEDED, "--context-attention", "shared", "--attention", "sdpa"], "needs --attention packed, given 'sdpa'"),
        (
            [*NEEDED, "--context-attention", "shared", "--architecture", "biencoder"],
            "--architecture biencoder reads no context; remove one of them",
        ),
        ([*NEEDED, "--timeout-s", "0"], "--timeout-s: input should be greater than or equal to 1"),
    ],
)
def test_mistakes_are_told_in_one_line(flags, message):
    with pytest.raises(ConfigError, match=message) as caught:
        parse_flags(flags)
    assert "\n" not in str(caught.value)


def test_every_mistake_has_its_line():
    with pytest.raises(ConfigError) as caught:
        parse_flags(["--epochs", "none", "--seed", "-1"])
    lines = str(caught.value).splitlines()
    assert [line.split(":")[0].split()[0] for line in lines] == ["--shards", "--output", "--epochs", "--seed"]


def test_what_a_training_shares_with_its_checkpoint_survives_json():
    settings = parse_flags([*NEEDED, "--init-from", "x"]).trajectory()
    assert json.loads(json.dumps(settings)) == settings and settings["init_from"] == "x"


def test_training_needs_no_pydantic():
    """Nor does any module of the pipeline that the trainer imports."""
    code = (
        "import sys; "
        "sys.modules['pydantic'] = None; "
        "import hardbatch.trainer.main, hardbatch.trainer.loop, hardbatch.trainer.training"
    )
    finished = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr


def test_a_biencoder_has_no_context():
    assert parse_flags([*NEEDED, "--architecture", "biencoder", "--context-size", "8"]).model_context_size == 0
    assert parse_flags([*NEEDED, "--context-size", "8"]).model_context_size == 8


def test_trajectory_holds_what_changes_a_training():
    plain = parse_flags(NEEDED).trajectory()
    for flags in (
        ["--accumulate", "4"],
        ["--workers", "2"],
        ["--save-every", "7"],
        ["--chunk-tokens", "8"],
        ["--timeout-s", "9"],
        ["--attention", "packed"],
    ):
        assert parse_flags([*NEEDED, *flags]).trajectory() == plain
    for flags in (
        ["--context-attention", "shared"],
        ["--seed", "1"],
        ["--learning-rate", "1e-3"],
        ["--max-steps", "5"],
        ["--no-pool-prompt"],
    ):
        assert parse_flags([*NEEDED, *flags]).trajectory() != plain
