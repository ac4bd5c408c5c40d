"""Row 4: runs at once on one workspace, and locks that their owners left."""

from __future__ import annotations

import errno
import os
import re
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from hardbatch.pipeline.artifacts.lock import lock
from hardbatch.pipeline.errors import ConfigError, LockedError
from tests.reliability.forked import Forks, Run, kill, wait_until_stopped
from tests.reliability.processes import KILLED
from tests.reliability.workspaces import assert_same, content, faults_in, write_corpus

Record = Callable[[int, str], None]
HELD = r"hardbatch: \S+: being written by process {} on \S+ since 20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ; wait for it"


@pytest.fixture
def command(tmp_path: Path) -> list[object]:
    manifest = write_corpus(tmp_path / "corpus", {"alpha": 60, "beta": 40})
    return ["run", manifest, "--workspace", tmp_path / "workspace"]


@pytest.fixture
def expected(tmp_path: Path, forks: Forks, command: list[object]) -> dict[str, bytes]:
    """What one run alone makes."""
    assert forks.run([*command[:-1], tmp_path / "clean"]).code == 0
    return content(tmp_path / "clean")


def assert_held(run: Run, pid: object = r"\d+") -> None:
    assert run.code == LockedError.exit_code, run.log
    lines = [line for line in run.log.splitlines() if line.startswith("hardbatch: ")]
    assert len(lines) == 1 and re.match(HELD.format(pid), lines[0]), run.log
    assert "Traceback" not in run.log


@pytest.mark.parametrize("point", ["unit.written:1", "unit.renamed:3", "file.fsynced:7", "manifest.written:2"])
def test_a_second_run_leaves_and_says_who_works_since_when(
    tmp_path: Path, forks: Forks, command: list[object], expected: dict[str, bytes], point: str, record_row: Record
) -> None:
    first = forks.start(command, f"{point}=stop")
    assert wait_until_stopped(first)
    assert_held(forks.run(command), first)
    assert faults_in(tmp_path / "workspace") == []
    os.kill(first, signal.SIGCONT)
    assert forks.wait(first).code == 0
    assert_same(tmp_path / "workspace", expected)
    record_row(4, "the owner stopped at 4 points: a second run leaves with 5 and names it, 4 of 4")


def test_an_owner_that_dies_is_taken_over(
    tmp_path: Path, forks: Forks, command: list[object], expected: dict[str, bytes], record_row: Record
) -> None:
    first = forks.start(command, "unit.fsynced:4=stop")
    assert wait_until_stopped(first)
    assert_held(forks.run(command), first)
    kill(first)
    assert forks.wait(first).code == KILLED
    assert list((tmp_path / "workspace").rglob(".*.lock"))
    assert forks.run(command).code == 0
    assert_same(tmp_path / "workspace", expected)
    record_row(4, "a killed owner's lock is taken over")


def start_together(forks: Forks, command: list[object], number: int) -> list[Run]:
    return [forks.wait(pid) for pid in [forks.start(command) for _ in range(number)]]


@pytest.mark.parametrize("number", [2, 4])
def test_runs_that_start_together(
    tmp_path: Path, forks: Forks, command: list[object], expected: dict[str, bytes], number: int, record_row: Record
) -> None:
    assert_one_wins(tmp_path, start_together(forks, command, number), expected)
    record_row(4, f"{number} started together: one works, others leave with 5 or find all done, no mixed artifact")


@pytest.mark.soak
def test_runs_that_start_together_again_and_again(
    tmp_path: Path, forks: Forks, command: list[object], expected: dict[str, bytes], record_row: Record
) -> None:
    num_left = 0
    for trial in range(25):
        folder = tmp_path / str(trial)
        runs = start_together(forks, [*command[:-1], folder / "workspace"], 4)
        assert_one_wins(folder, runs, expected)
        num_left += sum(run.code == LockedError.exit_code for run in runs)
    record_row(4, f"25 times 4 started together: {100 - num_left} worked or waited, {num_left} left with 5, 0 mixed")


def assert_one_wins(folder: Path, runs: list[Run], expected: dict[str, bytes]) -> None:
    assert any(run.code == 0 for run in runs), runs
    for run in runs:
        if run.code != 0:
            assert_held(run)
    assert faults_in(folder / "workspace") == []
    assert_same(folder / "workspace", expected)


# what is left of a lock


@pytest.mark.parametrize(
    "left",
    [
        b"",
        b"\0\xff\xfe" * 5_000,
        b"process 1 on elsewhere since 2020-01-01T00:00:00Z\n",
        f"process {os.getpid()} on {socket.gethostname()} since 2026-01-01T00:00:00Z\n".encode(),
    ],
    ids=["empty", "garbage", "a process of another machine", "a live stranger has its number by now"],
)
def test_a_lock_that_nobody_holds_is_taken_over_whatever_it_says(tmp_path: Path, left: bytes) -> None:
    path = tmp_path / ".key.lock"
    path.write_bytes(left)
    with lock(path):
        told = path.read_text()
        assert re.fullmatch(rf"process {os.getpid()} on \S+ since \S+Z\n", told) and told.encode() != left
        with (
            pytest.raises(LockedError, match=rf"{tmp_path}/key: being written by process {os.getpid()} on"),
            lock(path),
        ):
            pass
    assert not path.exists()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP])
def test_a_filesystem_without_locks_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def flock(*_: object) -> None:
        raise OSError(number, "no locks here")

    monkeypatch.setattr("hardbatch.pipeline.artifacts.lock.fcntl.flock", flock)
    with pytest.raises(ConfigError, match=rf"{tmp_path}: this filesystem has no file locks .*no locks here.*another"):
        lock(tmp_path / ".key.lock").__enter__()
