"""Rows 12, 13 and 14: trainings that are killed at any moment, and go on as if they had not been.

Figures of a step are compared to the bit; the position behind each says which batches of the order it ate.
"""

from __future__ import annotations

import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from reliability.processes import HARDBATCH, KILLED, finish, wait_until
from reliability.processes import run as run_command
from reliability.trainings import export_of, figures_of, kill_all, log_of, run, start, steps_logged
from trainer_models import tiny_backbone

from pipeline.artifact import verify_artifact
from pipeline.faults import POINTS, TRAINER_POINTS
from trainer.checkpoint import find_checkpoint
from trainer.export import open_model
from trainer.shards import open_shards

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
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT with dropout."""
    return tiny_backbone(tmp_path_factory.mktemp("backbone"))


@pytest.fixture
def flags(finished_run: tuple[Path, Path, Path], backbone: Path, tmp_path: Path) -> dict[str, Any]:
    """2 epochs of 6 batches of 8 pairs, logged at every step, saved at every second."""
    return {
        "--shards": finished_run[2],
        "--output": tmp_path / "out",
        "--backbone": backbone,
        "--dropout": 0.1,
        "--context-size": 6,
        "--max-length": 24,
        "--epochs": 2,
        "--warmup-steps": 3,
        "--learning-rate": 1e-3,
        "--sequence-dropout": 0.1,
        "--first-stage-chunk": 4,
        "--second-stage-chunk": 6,
        "--precision": "fp32",
        "--log-every": 1,
        "--save-every": 2,
    }


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


# -- row 12 ------------------------------------------------------------------------------------------------------------


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
        amid += bool(records)
        again += max(0, (records[-1]["step"] if records else 0) - saved)
        if checkpoint is not None:
            assert verify_artifact(checkpoint) == []
    return amid, again


@pytest.mark.soak
@pytest.mark.parametrize(("ranks", "num_kills"), [(1, 20), (2, 8)])
def test_kills_at_random_moments(
    real_shards: Path, flags: dict[str, Any], tmp_path: Path, ranks: int, num_kills: int, record_row: RecordRow
) -> None:
    max_steps = 9 * num_kills + 20
    flags |= {
        "--shards": real_shards,
        "--backbone": "minilm",
        "--num-layers": 1,
        "--context-size": 8,
        "--max-length": 32,
        "--first-stage-chunk": 8,
        "--second-stage-chunk": 16,
        "--epochs": 100,
        "--max-steps": max_steps,
        "--save-every": 5,
    }
    unbroken = {**flags, "--output": tmp_path / "unbroken"}
    assert run(unbroken, ranks=ranks).code == 0
    amid, again = kill_often(flags, ranks, num_kills, seed=12 + ranks)
    finished = run({**flags, "--resume": "auto"}, ranks=ranks)
    assert finished.code == 0 and "going on from" in finished.errors, finished.errors
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


# -- row 13 ------------------------------------------------------------------------------------------------------------


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


# -- row 14 ------------------------------------------------------------------------------------------------------------


def kill_at(point: str, flags: dict[str, Any], expected: list[tuple[Any, ...]], export: dict[str, bytes]) -> str:
    """A training that dies at `point`, what it leaves, and that it goes on to the same end; "" where nobody passes."""
    ended = run(flags, environment={"HARDBATCH_FAULT": f"{point}=kill"})
    if ended.code == 0:
        return ""
    assert ended.code == KILLED, ended.errors
    output = Path(flags["--output"])
    checkpoint, told = find_checkpoint(output, "auto")
    assert told == [], "what a kill leaves is a whole checkpoint or none"
    if checkpoint is not None:
        assert verify_artifact(checkpoint) == []
        open_model(checkpoint, "--checkpoint")
    again = run({**flags, "--resume": "auto"})
    assert again.code == 0, again.errors
    assert figures_of(flags) == expected and export_of(flags) == export
    assert not [path for path in output.rglob("*.tmp") if "checkpoints/step" not in str(path)]
    assert not list(output.rglob(".*.lock"))
    return checkpoint.name if checkpoint else "none"


QUICK_POINTS = ("unit.renamed:3", "manifest.linked:2", "checkpoint.disowned:3")


def soak_points() -> list[str]:
    """Every point in the first save, in one that replaces another, and in the deletion of old ones."""
    once = [point for point in (*POINTS, *TRAINER_POINTS) if not point.startswith("export.")]
    return [f"{point}:{number}" for point in once for number in (1, 4)]


@pytest.mark.parametrize("points", [QUICK_POINTS, pytest.param((), marks=pytest.mark.soak)], ids=["quick", "soak"])
def test_killed_while_a_checkpoint_is_written(
    flags: dict[str, Any], points: tuple[str, ...], tmp_path: Path, record_row: RecordRow
) -> None:
    flags |= {"--epochs": 1, "--keep-last": 1, "--save-every": 1}
    unbroken = {**flags, "--output": tmp_path / "unbroken"}
    assert run(unbroken).code == 0
    expected, export = figures_of(unbroken), export_of(unbroken)
    left = {}
    for point in points or soak_points():
        own = {**flags, "--output": tmp_path / point.replace(":", "-") / "out"}
        left[point] = kill_at(point, own, expected, export)
        shutil.rmtree(own["--output"].parent)
    passed = {point: name for point, name in left.items() if name}
    assert set(QUICK_POINTS) <= passed.keys() or points == ()
    untouched = {point.split(":")[0] for point in left} - {point.split(":")[0] for point in passed}
    assert untouched <= NOT_OF_A_TRAINER
    record_row(
        14,
        f"killed at {len(passed)} points of saving and deleting checkpoints: a whole checkpoint or none each time, all "
        "went on to the same figures and export",
    )


NOT_OF_A_TRAINER = {"sweep.removed", "unit.unrecorded"}  # a training deletes a checkpoint before it writes it anew
