"""Row 14: trainings that are killed while they write a checkpoint or an export, and go on as if they had not been."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hardbatch.pipeline.artifacts.artifact import verify_artifact
from hardbatch.pipeline.artifacts.faults import POINTS, TRAINER_POINTS
from hardbatch.trainer.checkpoint import find_checkpoint
from hardbatch.trainer.export import open_model
from tests.reliability.processes import KILLED, Ended, tree
from tests.reliability.trainings import export_of, figures_of, fork, join, run_fork, state_of
from tests.trainer_models import save_model_folder, tiny_encoder

RecordRow = Callable[[int, str], None]

QUICK_POINTS = ("unit.renamed:3", "checkpoint.disowned:1")
# a training deletes a checkpoint before it writes it anew, and sweeps nothing but what a kill left
NOT_OF_A_TRAINING = {"sweep.removed", "unit.unrecorded", "export.set-aside"}


def soak_points() -> list[str]:
    """Every point as it is passed first, and later, while an earlier checkpoint is there."""
    return [f"{point}:{number}" for point in (*POINTS, *TRAINER_POINTS) for number in (1, 4)]


def resume_after_kill(point: str, flags: dict[str, Any], log: Path) -> bool:
    """A training that dies at `point`, and goes on to its end; False where it does not pass that point."""
    ended = run_fork(flags, log, fault=f"{point}=kill")
    if ended.code == 0:
        return False
    assert ended.code == KILLED, ended.errors
    output = Path(flags["--output"])
    checkpoint, told = find_checkpoint(output, "auto")
    assert told == [], "what a kill leaves is a whole checkpoint or none"
    if checkpoint is not None:
        assert verify_artifact(checkpoint) == []
        open_model(checkpoint, "--checkpoint")
    again = run_fork({**flags, "--resume": "auto"}, log)
    assert again.code == 0, again.errors
    newest = sorted((output / "checkpoints").glob("step-*"))[-1:]
    left = [path for path in output.rglob(".*") if path.parent not in newest and path.name != ".training.lock"]
    assert left == [], "nothing of a killed run stays but in the checkpoint that it had just finished"
    return True


@pytest.mark.parametrize("points", [QUICK_POINTS, pytest.param((), marks=pytest.mark.soak)], ids=["quick", "soak"])
def test_killed_while_a_checkpoint_is_written(
    flags: dict[str, Any], points: tuple[str, ...], tmp_path: Path, record_row: RecordRow
) -> None:
    flags |= {"--epochs": 1, "--keep-last": 1, "--save-every": 1}
    unbroken = {**flags, "--output": tmp_path / "unbroken"}
    assert run_fork(unbroken, tmp_path / "log").code == 0
    expected, export = figures_of(unbroken), export_of(unbroken)
    passed, others = set(), set()
    for point in points or soak_points():
        shutil.rmtree(flags["--output"], ignore_errors=True)
        if resume_after_kill(point, flags, tmp_path / "log"):
            assert figures_of(flags) == expected and export_of(flags) == export
            passed.add(point)
        else:
            others.add(point.split(":")[0])
    assert others - {point.split(":")[0] for point in passed} <= NOT_OF_A_TRAINING
    record_row(
        14,
        f"killed at {len(passed)} points of saving and deleting checkpoints and of the export: a whole checkpoint or "
        "none each time; all went on to the same figures and export",
    )


def test_killed_while_an_export_is_replaced(flags: dict[str, Any], tmp_path: Path, record_row: RecordRow) -> None:
    flags |= {"--epochs": 1, "--save-every": 3}
    log = tmp_path / "log"
    assert run_fork(flags, log).code == 0
    first, last = sorted((tmp_path / "out" / "checkpoints").glob("step-*"))
    target = tmp_path / "exports" / "export"

    def export(checkpoint: Path, fault: str = "") -> Ended:
        words = {"--checkpoint": checkpoint, "--output": target}
        return run_fork(words, log, fault=fault, program="hardbatch.trainer.export")

    assert export(first).code == 0
    earlier = tree(target)
    assert export(last).code == 0
    later = tree(target)
    assert earlier.keys() == later.keys() and earlier != later
    for point in ("export.written", "export.set-aside", "export.replaced", "export.swept"):
        assert export(first).code == 0
        assert export(last, fault=f"{point}=kill").code == KILLED
        if point == "export.set-aside":  # the one moment without; the next run begins by putting it back
            assert not target.exists()
            assert export(last, fault="export.written=kill").code == KILLED
        assert tree(target) == (earlier if point in ("export.written", "export.set-aside") else later)
        open_model(target, "--model")
        assert export(last).code == 0 and tree(target) == later
        assert list(target.parent.iterdir()) == [target], "nothing is left beside it"
    record_row(14, "an export killed at every point of its replacement: the earlier one or the new one, whole")


def test_two_exports_to_one_folder(tmp_path: Path) -> None:
    """The second one leaves, and does not sweep what the first one writes."""
    checkpoint = save_model_folder(tmp_path / "checkpoint", tiny_encoder())
    words = {"--checkpoint": checkpoint, "--output": tmp_path / "exports" / "export"}
    process = fork(words, tmp_path / "log", program="hardbatch.trainer.export", fault="export.written=stop")
    while state_of(process.pid) != "T":
        assert process.is_alive()
        time.sleep(0.01)
    second = run_fork(words, tmp_path / "second", program="hardbatch.trainer.export")
    assert second.code == 5 and f"being written by process {process.pid}" in second.errors
    os.kill(process.pid, signal.SIGCONT)
    assert join(process, tmp_path / "log").code == 0
    open_model(tmp_path / "exports" / "export", "--model")
