"""flows.processes: families are found and ended, strangers are not."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hardbatch.flows.processes import Process, end, is_alive, start

pytestmark = pytest.mark.skipif(shutil.which("ps") is None, reason="looks at processes with ps")
SLEEPER = [sys.executable, "-c", "import time; time.sleep(300)"]
PARENT = """
import pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"], start_new_session=True)
pathlib.Path("child").write_text(str(child.pid))
{then}
"""


def start_parent(folder: Path, mark: str, then: str) -> tuple[Process, int]:
    """A process with a child in another session, once both run, and the child's pid."""
    command = [sys.executable, "-c", PARENT.format(then=then)]
    parent = start(command, mark=mark, folder=folder, environment=os.environ, log=folder / "log")
    wait_until(lambda: (folder / "child").exists() and bool((folder / "child").read_text()))
    return parent, int((folder / "child").read_text())


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def lives(pid: int) -> bool:
    """Whether a process that is no zombie has this pid."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout
    return bool(state) and not state.startswith("Z")


def test_end_reaches_a_child_in_another_session(tmp_path: Path) -> None:
    parent, child = start_parent(tmp_path, secrets.token_hex(8), "time.sleep(300)")
    assert is_alive(parent) and lives(child)
    assert end(parent, "no such mark")
    assert not is_alive(parent) and not lives(child)


def test_the_leader_can_be_spared(tmp_path: Path) -> None:
    mark = secrets.token_hex(8)
    parent, child = start_parent(tmp_path, mark, "time.sleep(300)")
    try:
        assert end(parent, mark, spare_leader=True)
        assert is_alive(parent) and not lives(child)
    finally:
        end(parent, mark)


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="environments are only shown by /proc")
def test_the_mark_finds_what_a_dead_parent_left(tmp_path: Path) -> None:
    mark = secrets.token_hex(8)
    parent, child = start_parent(tmp_path, mark, "")
    wait_until(lambda: not is_alive(parent))
    assert lives(child)
    assert end(None, mark)
    assert not lives(child)


def test_a_stranger_with_the_pid_is_left_alone() -> None:
    stranger = subprocess.Popen(SLEEPER)
    try:
        recorded = Process(stranger.pid, "long ago")
        assert not is_alive(recorded)
        assert not end(recorded, "no such mark")
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_term_is_followed_by_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hardbatch.flows.processes.GRACE_S", 0.5)
    code = "import pathlib, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
    code += "pathlib.Path('ready').touch(); time.sleep(300)"
    mark = secrets.token_hex(8)
    command = [sys.executable, "-c", code]
    stubborn = start(command, mark=mark, folder=tmp_path, environment=os.environ, log=tmp_path / "log")
    wait_until((tmp_path / "ready").exists)
    assert end(stubborn, mark)
    assert not is_alive(stubborn)
