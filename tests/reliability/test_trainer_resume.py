"""Rows 12 and 13: trainings that are killed at any moment, and go on as if they had not been.

Figures of a step are compared to the bit; the position behind each says which batches of the order it ate.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hardbatch.pipeline.artifacts.artifact import verify_artifact
from hardbatch.trainer.checkpoint import find_checkpoint
from hardbatch.trainer.shards import open_shards
from tests.reliability.processes import HARDBATCH, finish, wait_until
from tests.reliability.processes import run as run_command
from tests.reliability.trainings import export_of, figures_of, kill_all, log_of, run, start, steps_logged

RecordRow = Callable[[int, str], None]
TWO_DOMAINS = """
corpus = "real"
[[dataset]]
name = "medical"
source = "train/medical.parquet"
limit = 1600
[[dataset]]
name = "intents"
source = "train/intents_clinc.parquet"
limit = 960
[embed]
model = "lexical"
surrogate_model = "lexical"
[pack]
batch_size = 16
"""


@pytest.fixture(scope="module")
def real_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 2,560 real pairs, 160 batches of 16."""
    if "HARDBATCH_DATA" not in os.environ:
        pytest.skip("needs real pairs: set HARDBATCH_DATA to a folder with train/medical.parquet")
    folder = tmp_path_factory.mktemp("real")
    (folder / "real.toml").write_text(TWO_DOMAINS)
    data = ["--workspace", folder / "workspace", "--data-root", os.environ["HARDBATCH_DATA"]]
    ended = run_command([*HARDBATCH, "run", folder / "real.toml", *data])
    assert ended.code == 0, ended.errors
    return Path(ended.output.splitlines()[-1])


def kill_often(flags: dict[str, Any], ranks: int, num_kills: int, seed: int) -> tuple[int, int]:
    """Kills a training that always resumes; returns (kills amid steps, steps done again)."""
    generator = random.Random(seed)
    amid, again = 0, 0
    for kill in range(num_kills):
        process = start({**flags, "--resume": "auto"}, ranks=ranks)
        before = len(log_of(flags))
        at_once = kill % 5 == 4  # while it starts; else some steps later
        ready = (lambda: True) if at_once else steps_logged(flags, before + generator.randrange(4, 10))
        alive = wait_until(ready, process, timeout_s=120)
        assert alive, process.communicate()
        time.sleep(generator.uniform(0, 4 if at_once else 0.4))
        kill_all(process, flags["--output"])
        records = log_of(flags)
        checkpoint, told = find_checkpoint(flags["--output"], "auto")
        assert told == [], "no checkpoint is damaged by a kill"
        saved = int(checkpoint.name.removeprefix("step-")) if checkpoint else 0
        amid += not at_once
        again += max(0, (records[-1]["step"] if records else 0) - saved)
        if checkpoint is not None:
            assert verify_artifact(checkpoint) == []
    return amid, again


@pytest.mark.soak
@pytest.mark.parametrize(("ranks", "num_kills"), [(1, 20), (2, 8)])
def test_kills_at_random_moments(
    real_shards: Path, flags: dict[str, Any], tmp_path: Path, ranks: int, num_kills: int, record_row: RecordRow
) -> None:
    max_steps = 15 * num_kills + 20
    flags |= {
        "--shards": real_shards,
        "--context-size": 8,
        "--max-length": 32,
        "--chunk-tokens": 512,
        "--epochs": 100,
        "--max-steps": max_steps,
        "--save-every": 5,
    }
    unbroken = {**flags, "--output": tmp_path / "unbroken"}
    assert run(unbroken, ranks=ranks).code == 0
    amid, again = kill_often(flags, ranks, num_kills, seed=12 + ranks)
    finished = run({**flags, "--resume": "auto"}, ranks=ranks)
    assert finished.code == 0 and "resuming from" in finished.errors, finished.errors
    expected, found = figures_of(unbroken), figures_of(flags)
    assert len(expected) == max_steps and found == expected
    assert [record["position"] for record in log_of(flags)] == expected_positions(real_shards, ranks, max_steps)
    assert export_of(flags) == export_of(unbroken)
    record_row(
        12,
        f"{ranks} rank{'s' * (ranks > 1)}: {num_kills} kills ({amid} amid steps) and resumes, {again} steps again; "
        f"figures of all {max_steps} steps equal to the bit, each batch once an epoch, export byte-identical",
    )


def expected_positions(shards: Path, ranks: int, num_steps: int) -> list[int]:
    """The position behind each step: W batches a step, a tail of an epoch that is too short left out."""
    order = open_shards(shards).order()
    positions, start_at = [], 0
    for _ in range(num_steps):
        start_at = order.step_at(start_at, ranks)
        start_at += ranks
        positions.append(start_at)
    return positions


@pytest.mark.soak
def test_any_number_of_ranks_goes_on_in_the_same_order(
    real_shards: Path, flags: dict[str, Any], tmp_path: Path, record_row: RecordRow
) -> None:
    """With a learning rate that changes no weight, the loss of a step says which batches it ate."""
    flags |= {"--shards": real_shards, "--learning-rate": 1e-30, "--warmup-steps": 0, "--epochs": 2, "--save-every": 7}
    alone = {**flags, "--output": tmp_path / "alone"}
    assert run(alone).code == 0
    loss_behind = {record["position"]: record["loss"] for record in log_of(alone)}
    num_batches = open_shards(real_shards).order().epoch_length
    assert sorted(loss_behind) == list(range(1, 2 * num_batches + 1))
    eaten: list[int] = []
    sizes: dict[int, int] = {}
    for ranks, until in ((1, 9), (2, 24), (4, 40), (2, 60), (4, 75), (1, None)):
        process = start({**flags, "--resume": "auto"}, ranks=ranks)
        if until is None:
            assert finish(process, timeout_s=300).code == 0
        else:
            assert wait_until(steps_logged(flags, until), process, timeout_s=120)
            kill_all(process, flags["--output"])
        for record in log_of(flags):
            sizes.setdefault(record["step"], ranks)
        checkpoint, _ = find_checkpoint(flags["--output"], "auto")
        saved = int(checkpoint.name.removeprefix("step-")) if checkpoint else 0
        sizes = {step: size for step, size in sizes.items() if step <= saved}  # what follows is done again
    worst = 0.0
    for record in log_of(flags):
        batches = range(record["position"] - sizes[record["step"]], record["position"])
        expected = sum(loss_behind[position + 1] for position in batches) / len(batches)
        worst = max(worst, abs(record["loss"] - expected) / expected)
        eaten += batches
    assert worst < 1e-6
    assert set(sizes.values()) == {1, 2, 4} and len(eaten) == len(set(eaten))
    left_out = set(range(2 * num_batches)) - set(eaten)
    assert all(position % num_batches >= num_batches - 3 for position in left_out), "the tail of an epoch at most"
    assert eaten == sorted(eaten)
    record_row(
        13,
        f"killed and resumed at 1, 2, 4, 2, 4, 1 ranks over 2 epochs of {num_batches} batches: {len(eaten)} batches in "
        f"the order of one rank, each once, {len(left_out)} in a tail; losses those of their batches ({worst:.0e})",
    )
