"""Row 15: trainings and exports on a full disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hardbatch.pipeline.artifacts.artifact import verify_artifact
from hardbatch.trainer.checkpoint import find_checkpoint
from tests.reliability import warm
from tests.reliability.conftest import Disk
from tests.reliability.processes import tree
from tests.reliability.trainings import assert_same_training, metrics_of, run, words_of

RecordRow = Callable[[int, str], None]
MIB = 2**20


def run_unbroken(flags: dict[str, Any], tmp_path: Path, ranks: int = 1) -> dict[str, Any]:
    """Runs a training that has room to its end; returns its flags."""
    unbroken = {**flags, "--output": tmp_path / "unbroken"}
    ended = run(unbroken, ranks=ranks)
    assert ended.code == 0, ended.errors
    return unbroken


def finish(flags: dict[str, Any], unbroken: dict[str, Any], ranks: int = 1) -> None:
    """Once there is room, the training continues to the metrics and the export of one that always had room."""
    ended = run({**flags, "--resume": "auto"}, ranks=ranks)
    assert ended.code == 0, ended.errors
    assert_same_training(flags, unbroken)


def out_of_space(flags: dict[str, Any], ranks: int = 1) -> str:
    """The one line with which a training leaves that has no space; torchrun's own code is 1 whatever its ranks say."""
    ended = run({**flags, "--resume": "auto"}, ranks=ranks)
    lines = [line for line in ended.errors.splitlines() if line.startswith("trainer: ")]
    assert len(lines) == 1 and "no space left" in lines[0], ended.errors
    if ranks == 1:
        assert ended.code == 6 and "Traceback" not in ended.errors and "Exception" not in ended.errors, ended.errors
    assert ended.code
    return lines[0]


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.soak)])
def test_no_room_for_a_checkpoint_and_for_the_export(
    flags: dict[str, Any], disk: Disk, tmp_path: Path, ranks: int, record_row: RecordRow
) -> None:
    flags |= {"--epochs": 2 * ranks}
    unbroken = run_unbroken(flags, tmp_path, ranks)
    size = sum(len(content) for content in tree(sorted((tmp_path / "unbroken" / "checkpoints").iterdir())[-1]).values())
    output = disk.path / "out"
    flags |= {"--output": output, "--keep-last": 1}

    disk.resize(size + size // 2)
    assert "no space left while writing" in out_of_space(flags, ranks)
    checkpoint, notices = find_checkpoint(output, "auto")
    assert checkpoint is not None and notices == [] and verify_artifact(checkpoint) == []
    assert checkpoint.name == "step-00000002" and list(output.rglob("*.tmp")) == []

    disk.resize(2 * size + size // 8)  # for two checkpoints, not for the export beside them
    assert "export" in out_of_space({**flags, "--keep-last": 2, "--save-every": 1_000}, ranks)
    assert not (output / "export").exists()

    disk.resize(4 * size)
    finish(flags, unbroken, ranks)
    record_row(
        15,
        f"{ranks} rank{'s' * (ranks > 1)}: no room for a checkpoint, then none for the export: exit code 6, the "
        "checkpoint before whole; with room on to the same metrics and export",
    )


@pytest.mark.parametrize("full", ["log.jsonl", pytest.param("tensorboard", marks=pytest.mark.soak)])
def test_no_room_for_the_log(
    flags: dict[str, Any], disk: Disk, tmp_path: Path, full: str, record_row: RecordRow
) -> None:
    """What was written of a line of the log is dropped on resume; curves are given up with a warning."""
    flags |= {"--epochs": 4}
    unbroken = run_unbroken(flags, tmp_path)
    output = Path(flags["--output"])
    output.mkdir()
    (disk.path / "tensorboard").mkdir()
    (output / full).symlink_to(disk.path / full)
    disk.resize(4096)  # some lines
    if full == "tensorboard":
        ended = run(flags)
        assert ended.code == 0 and ended.errors.count("no more curves for TensorBoard") == 1, ended.errors
        assert_same_training(flags, unbroken)
        record_row(15, "no room for the curves: a warning, the same metrics and export")
        return

    out_of_space(flags)
    assert len(metrics_of(flags)) < len(metrics_of(unbroken)), "it left before its end"
    disk.resize(MIB)
    finish(flags, unbroken)
    record_row(15, "no room for the log: exit code 6, one line; with room on to the same metrics and export")


def test_an_earlier_export_stays_if_there_is_no_room_for_another(
    flags: dict[str, Any], disk: Disk, tmp_path: Path
) -> None:
    unbroken = run_unbroken(flags, tmp_path)
    words = words_of({"--checkpoint": find_checkpoint(unbroken["--output"], "auto")[0], "--output": disk.path / "e"})
    assert warm.run(warm.EXPORT, words).code == 0
    before = tree(disk.path)
    disk.resize(disk.used + MIB)
    ended = warm.run(warm.EXPORT, words)
    assert ended.code == 6 and ended.errors.startswith("trainer: no space left"), ended.errors
    assert tree(disk.path) == before
