"""Row 15: trainings and exports on a full disk."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hardbatch.pipeline.artifacts.artifact import verify_artifact
from hardbatch.trainer.checkpoint import find_checkpoint
from tests.reliability.processes import tree
from tests.reliability.trainings import export_of, figures_of, run, run_fork

RecordRow = Callable[[int, str], None]
MIB = 2**20


class Disk:
    """A small tmpfs at `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        self._mount("-t", "tmpfs", "-o", "size=64m", "tmpfs", str(path))

    def resize(self, num_bytes: int) -> None:
        """Makes it large enough for `num_bytes`, or too small for one byte more."""
        self._mount("-o", f"remount,size={num_bytes}", str(self.path))

    @property
    def used(self) -> int:
        """Bytes that are taken, in whole pages."""
        stat = os.statvfs(self.path)
        return (stat.f_blocks - stat.f_bfree) * stat.f_frsize

    def unmount(self) -> None:
        subprocess.run(["umount", "-l", str(self.path)], check=True)

    @staticmethod
    def _mount(*words: str) -> None:
        done = subprocess.run(["mount", *words], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"mounts a small tmpfs, which takes root: {done.stderr.strip()}")


@pytest.fixture
def disk_at() -> Iterator[Callable[[Path], Disk]]:
    """`disk_at(path)`: a small disk, gone after the test."""
    disks: list[Disk] = []

    def mount(path: Path) -> Disk:
        disks.append(Disk(path))
        return disks[-1]

    yield mount
    for disk in disks:
        disk.unmount()


def run_unbroken(flags: dict[str, Any], tmp_path: Path, ranks: int = 1) -> dict[str, Any]:
    """A training that has room, run to its end; its flags."""
    unbroken = {**flags, "--output": tmp_path / "unbroken"}
    code, errors = end_of(unbroken, tmp_path, ranks)
    assert code == 0, errors
    return unbroken


def end_of(flags: dict[str, Any], tmp_path: Path, ranks: int) -> tuple[int, str]:
    """Exit code and messages of a training of one rank, in a fork, or of several."""
    ended = run_fork(flags, tmp_path / "log") if ranks == 1 else run(flags, ranks=ranks)
    return ended.code, ended.errors


def out_of_space(flags: dict[str, Any], tmp_path: Path, ranks: int = 1) -> str:
    """The one line with which a training leaves that has no space; torchrun's own code is 1 whatever its ranks say."""
    code, errors = end_of({**flags, "--resume": "auto"}, tmp_path, ranks)
    told = [line for line in errors.splitlines() if line.startswith("trainer: ")]
    assert (code == 6 if ranks == 1 else code) and len(told) == 1 and "no space left" in told[0], errors
    if ranks == 1:
        assert "Traceback" not in errors and "Exception" not in errors, errors
    return told[0]


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.soak)])
def test_no_room_for_a_checkpoint_and_for_the_export(
    flags: dict[str, Any],
    disk_at: Callable[[Path], Disk],
    tmp_path: Path,
    ranks: int,
    record_row: RecordRow,
) -> None:
    flags |= {"--epochs": 2 * ranks}
    unbroken = run_unbroken(flags, tmp_path, ranks)
    size = sum(len(content) for content in tree(sorted((tmp_path / "unbroken" / "checkpoints").iterdir())[-1]).values())
    disk = disk_at(tmp_path / "disk")
    flags |= {"--output": disk.path / "out", "--keep-last": 1}
    disk.resize(size + size // 2)
    assert "no space left while writing" in out_of_space(flags, tmp_path, ranks)
    output = Path(flags["--output"])
    checkpoint, told = find_checkpoint(output, "auto")
    assert checkpoint is not None and told == [] and verify_artifact(checkpoint) == []
    assert checkpoint.name == "step-00000002" and list(output.rglob("*.tmp")) == []
    disk.resize(2 * size + size // 8)  # for two checkpoints, not for the export beside them
    errors = out_of_space({**flags, "--keep-last": 2, "--save-every": 1_000}, tmp_path, ranks)
    assert "export" in errors and not (output / "export").exists()
    disk.resize(4 * size)
    code, errors = end_of({**flags, "--resume": "auto"}, tmp_path, ranks)
    assert code == 0, errors
    assert figures_of(flags) == figures_of(unbroken) and export_of(flags) == export_of(unbroken)
    record_row(
        15,
        f"{ranks} rank{'s' * (ranks > 1)}: no room for a checkpoint, then none for the export: exit code 6, the "
        "checkpoint before whole; with room on to the same figures and export",
    )


@pytest.mark.parametrize("full", ["log.jsonl", pytest.param("tensorboard", marks=pytest.mark.soak)])
def test_no_room_for_the_log(
    flags: dict[str, Any],
    disk_at: Callable[[Path], Disk],
    tmp_path: Path,
    full: str,
    record_row: RecordRow,
) -> None:
    """What is written of a line is dropped when the training goes on."""
    flags |= {"--epochs": 4}
    unbroken = run_unbroken(flags, tmp_path)
    disk, output = disk_at(tmp_path / "disk"), Path(flags["--output"])
    output.mkdir()
    (disk.path / "folder").mkdir()
    (output / full).symlink_to(disk.path / ("folder" if full == "tensorboard" else "file"))
    disk.resize(4096)  # some lines
    out_of_space(flags, tmp_path)
    lost = figures_of(unbroken)[len(figures_of(flags)) :]
    assert lost, "it left before its end"
    disk.resize(MIB)
    code, errors = end_of({**flags, "--resume": "auto"}, tmp_path, 1)
    assert code == 0, errors
    assert figures_of(flags) == figures_of(unbroken) and export_of(flags) == export_of(unbroken)
    record_row(15, f"no room for {full}: exit code 6, one line; with room on to the same figures and export")


def test_an_earlier_export_stays_where_there_is_no_room_for_another(
    flags: dict[str, Any], disk_at: Callable[[Path], Disk], tmp_path: Path
) -> None:
    unbroken = run_unbroken(flags, tmp_path)
    disk = disk_at(tmp_path / "disk")
    words = {"--checkpoint": find_checkpoint(unbroken["--output"], "auto")[0], "--output": disk.path / "export"}
    assert run_fork(words, tmp_path / "log", program="hardbatch.trainer.export").code == 0
    before = tree(disk.path)
    disk.resize(disk.used + MIB)
    ended = run_fork(words, tmp_path / "log", program="hardbatch.trainer.export")
    assert ended.code == 6 and ended.errors.startswith("trainer: no space left"), ended.errors
    assert tree(disk.path) == before
