"""Row 14: trainings that are killed while they write a checkpoint or an export, and go on as if they had not been."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hardbatch.pipeline.artifacts.artifact import verify_artifact
from hardbatch.pipeline.artifacts.faults import POINTS, TRAINER_POINTS
from hardbatch.trainer.checkpoint import find_checkpoint
from hardbatch.trainer.export import open_model
from tests.reliability import warm
from tests.reliability.processes import KILLED, tree
from tests.reliability.trainings import assert_same_training, run_warm
from tests.trainer_models import save_model_folder, tiny_encoder

RecordRow = Callable[[int, str], None]

QUICK_POINTS = ("unit.renamed:3", "checkpoint.disowned:1")

# Every point as it is passed first, and later, while an earlier checkpoint is there.
ALL_POINTS = tuple(f"{point}:{number}" for point in (*POINTS, *TRAINER_POINTS) for number in (1, 4))

# A training deletes a checkpoint before it writes it again, and sweeps only what a kill left.
NOT_OF_A_TRAINING = {"sweep.removed", "unit.unrecorded", "export.set-aside"}


def name_of(point: str) -> str:
    return point.split(":")[0]


def resume_after_kill(point: str, flags: dict[str, Any]) -> bool:
    """A training that dies at `point` and continues to its end; False if it does not pass that point."""
    ended = run_warm(flags, f"{point}=kill")
    if ended.code == 0:
        return False
    assert ended.code == KILLED, ended.errors
    output = Path(flags["--output"])
    checkpoint, notices = find_checkpoint(output, "auto")
    assert notices == [], "what a kill leaves is a whole checkpoint or none"
    if checkpoint is not None:
        assert verify_artifact(checkpoint) == []
        open_model(checkpoint, "--checkpoint")

    again = run_warm({**flags, "--resume": "auto"})
    assert again.code == 0, again.errors
    newest = sorted((output / "checkpoints").glob("step-*"))[-1:]
    left = [path for path in output.rglob(".*") if path.parent not in newest and path.name != ".training.lock"]
    assert left == [], "nothing of a killed run stays but in the checkpoint that it had just finished"
    return True


@pytest.mark.parametrize(
    "points", [QUICK_POINTS, pytest.param(ALL_POINTS, marks=pytest.mark.soak)], ids=["quick", "soak"]
)
def test_killed_while_a_checkpoint_is_written(
    flags: dict[str, Any], points: tuple[str, ...], tmp_path: Path, record_row: RecordRow
) -> None:
    flags |= {"--epochs": 1, "--keep-last": 1, "--save-every": 1}
    unbroken = {**flags, "--output": tmp_path / "unbroken"}
    assert run_warm(unbroken).code == 0
    passed = set()
    for point in points:
        shutil.rmtree(flags["--output"], ignore_errors=True)
        if resume_after_kill(point, flags):
            assert_same_training(flags, unbroken)
            passed.add(point)
    assert {name_of(point) for point in points} - {name_of(point) for point in passed} <= NOT_OF_A_TRAINING
    record_row(
        14,
        f"killed at {len(passed)} points of saving and deleting checkpoints and of the export: a whole checkpoint or "
        "none each time; all continued to the same metrics and export",
    )


def test_killed_while_an_export_is_replaced(flags: dict[str, Any], tmp_path: Path, record_row: RecordRow) -> None:
    flags |= {"--epochs": 1, "--save-every": 3}
    assert run_warm(flags).code == 0
    first, last = sorted((tmp_path / "out" / "checkpoints").glob("step-*"))
    target = tmp_path / "exports" / "export"

    def export(checkpoint: Path, fault: str = "") -> int:
        return warm.run(warm.EXPORT, ["--checkpoint", checkpoint, "--output", target], fault=fault).code

    assert export(first) == 0
    earlier = tree(target)
    assert export(last) == 0
    later = tree(target)
    assert earlier.keys() == later.keys() and earlier != later
    for point in ("export.written", "export.set-aside", "export.replaced", "export.swept"):
        assert export(first) == 0
        assert export(last, f"{point}=kill") == KILLED
        if point == "export.set-aside":  # the one moment without an export; the next run begins by putting it back
            assert not target.exists()
            assert export(last, "export.written=kill") == KILLED
        assert tree(target) == (earlier if point in ("export.written", "export.set-aside") else later)
        open_model(target, "--model")
        assert export(last) == 0 and tree(target) == later
        assert list(target.parent.iterdir()) == [target], "nothing is left beside it"
    record_row(14, "an export killed at every point of its replacement: the earlier one or the new one, whole")


def test_two_exports_to_one_folder(tmp_path: Path) -> None:
    """The second one leaves, and does not sweep what the first one writes."""
    checkpoint = save_model_folder(tmp_path / "checkpoint", tiny_encoder())
    words = ["--checkpoint", checkpoint, "--output", tmp_path / "exports" / "export"]
    first = warm.start(warm.EXPORT, words, fault="export.written=stop")
    first.wait_until_stopped()
    second = warm.run(warm.EXPORT, words)
    assert second.code == 5 and f"being written by process {first.pid}" in second.errors
    os.kill(first.pid, signal.SIGCONT)
    assert first.wait().code == 0
    open_model(tmp_path / "exports" / "export", "--model")
