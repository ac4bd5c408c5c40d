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
from tests.reliability import warm
from tests.reliability.processes import KILLED, Ended
from tests.reliability.workspaces import assert_same, content, faults_in, run_over, write_corpus

Record = Callable[[int, str], None]
HELD = r"hardbatch: \S+: being written by process {} on \S+ since 20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ; wait for it"


@pytest.fixture
def command(tmp_path: Path) -> list[object]:
    return run_over(write_corpus(tmp_path / "corpus", {"alpha": 60, "beta": 40}))


@pytest.fixture
def expected(tmp_path: Path, command: list[object]) -> dict[str, bytes]:
    """What a single run makes."""
    assert warm.run(warm.PIPELINE, [*command, tmp_path / "clean"]).code == 0
    return content(tmp_path / "clean")


def assert_held(run: Ended, pid: object = r"\d+") -> None:
    assert run.code == LockedError.exit_code, run.errors
    lines = [line for line in run.errors.splitlines() if line.startswith("hardbatch: ")]
    assert len(lines) == 1 and re.match(HELD.format(pid), lines[0]), run.errors
    assert "Traceback" not in run.errors


@pytest.mark.parametrize(
    ("point", "dies"),
    [
        *((point, False) for point in ("unit.written:1", "unit.renamed:3", "file.fsynced:7", "manifest.written:2")),
        ("unit.fsynced:4", True),
    ],
)
def test_a_second_run_leaves_and_names_the_owner(
    tmp_path: Path, command: list[object], expected: dict[str, bytes], point: str, dies: bool, record_row: Record
) -> None:
    """While the owner is alive; if it dies, its lock is taken over."""
    workspace = tmp_path / "workspace"
    owner = warm.start(warm.PIPELINE, [*command, workspace], fault=f"{point}=stop")
    owner.wait_until_stopped()
    assert_held(warm.run(warm.PIPELINE, [*command, workspace]), owner.pid)
    assert faults_in(workspace) == []
    if dies:
        owner.kill()
        assert owner.wait().code == KILLED
        assert list(workspace.rglob(".*.lock"))
        assert warm.run(warm.PIPELINE, [*command, workspace]).code == 0
    else:
        os.kill(owner.pid, signal.SIGCONT)
        assert owner.wait().code == 0
    assert_same(workspace, expected)
    record_row(4, "a second run leaves with 5 and names the owner; the lock of an owner that was killed is taken over")


@pytest.mark.parametrize(("number", "trials"), [(2, 1), (4, 1), pytest.param(4, 25, marks=pytest.mark.soak)])
def test_runs_that_start_together(
    tmp_path: Path, command: list[object], expected: dict[str, bytes], number: int, trials: int, record_row: Record
) -> None:
    num_left = 0
    for trial in range(trials):
        workspace = tmp_path / f"workspace-{trial}"
        started = [warm.start(warm.PIPELINE, [*command, workspace]) for _ in range(number)]
        runs = [run.wait() for run in started]
        left = [run for run in runs if run.code != 0]
        assert len(left) < number, runs
        for run in left:
            assert_held(run)
        assert faults_in(workspace) == []
        assert_same(workspace, expected)
        num_left += len(left)
    record_row(4, f"{trials} times {number} started together: {num_left} left with 5, others worked or waited, 0 mixed")


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
