"""Commands in sessions of their own, which can be killed whole."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HARDBATCH = (sys.executable, "-m", "hardbatch.pipeline.cli")
KILLED = -signal.SIGKILL


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a command ended: its exit code (negative: the signal), and what it printed."""

    code: int
    output: str
    errors: str


def start(command: Sequence[object], *, environment: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    """Starts `command` in a session of its own, at the root of the project, with `environment` on top of this one."""
    return subprocess.Popen(
        [str(word) for word in command],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], *, timeout_s: float = 120) -> Ended:
    """Waits for the end of a command; one that outlives the timeout is killed, with its group, and fails the test."""
    try:
        output, errors = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        kill_group(process)
        output, errors = process.communicate()
        raise AssertionError(f"still running after {timeout_s} s: {process.args}\n{errors}") from None
    return Ended(code=process.returncode, output=output, errors=errors)


def run(command: Sequence[object], *, environment: Mapping[str, str] | None = None, timeout_s: float = 120) -> Ended:
    """Runs `command` to its end."""
    return finish(start(command, environment=environment), timeout_s=timeout_s)


def kill_group(process: subprocess.Popen[str]) -> None:
    """SIGKILL to the process group of a command."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def wait_until(ready: Callable[[], bool], process: subprocess.Popen[str], *, timeout_s: float = 60) -> bool:
    """Whether `ready()` came true while the command was running."""
    deadline = time.monotonic() + timeout_s
    while process.poll() is None and time.monotonic() < deadline:
        if ready():
            return True
        time.sleep(0.005)
    return False


def tree(root: Path) -> dict[str, bytes]:
    """{path: bytes} of all files below `root` but run logs, which tell times."""
    files = [path for path in root.rglob("*") if path.is_file() and path.parent.name != "logs"]
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}
