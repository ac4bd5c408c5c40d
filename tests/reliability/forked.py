"""The command line in forks of one process that has its libraries loaded: a run takes tenths of a second.

`Forks` talks to that process, a line of JSON each way. A fork is a process like any other, the leader of a session of
its own: it reads HARDBATCH_FAULT, takes locks, and is killed whole.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.reliability.processes import ROOT

TIMEOUT_S = 120.0
COUNT = "count"


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run that ended: its exit code (negative: the signal), and all it printed."""

    code: int
    log: str


class Forks:
    """Starts and awaits runs; made by the fixture `forks`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._num_started = 0
        self._logs: dict[int, Path] = {}
        self._parent = subprocess.Popen(
            [sys.executable, "-m", "tests.reliability.forked"],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HARDBATCH_FAULT": ""},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(self, arguments: Sequence[object], fault: str = "") -> int:
        """Starts `hardbatch ARGUMENTS` with `fault` as HARDBATCH_FAULT; returns its process id."""
        self._num_started += 1
        log = self._folder / f"{self._num_started}.log"
        log.touch()  # a run may be killed before it has written anything
        words = [str(word) for word in arguments]
        pid = int(self._ask({"arguments": words, "fault": fault, "log": str(log)}))
        self._logs[pid] = log
        return pid

    def wait(self, pid: int) -> Run:
        """Waits for the end of a run; kills it, and fails, where it does not come."""
        code = self._ask({"wait": pid})
        log = self._logs.pop(pid).read_text(errors="replace")
        assert code is not None, f"still running after {TIMEOUT_S} s\n{log}"
        return Run(code=code, log=log)

    def run(self, arguments: Sequence[object], fault: str = "") -> Run:
        """Runs `hardbatch ARGUMENTS` to its end."""
        return self.wait(self.start(arguments, fault))

    def count_points(self, arguments: Sequence[object]) -> dict[str, int]:
        """Runs `hardbatch ARGUMENTS` to its end; how often it passed each fault point."""
        run = self.run(arguments, fault=COUNT)
        assert run.code == 0, run.log
        counts: dict[str, int] = json.loads(run.log.splitlines()[-1])
        return counts

    def close(self) -> None:
        """Ends the process and what it started."""
        self._parent.stdin.close()
        self._parent.wait()
        self._parent.stdout.close()

    def _ask(self, question: dict[str, Any]) -> Any:
        print(json.dumps(question), file=self._parent.stdin, flush=True)
        return json.loads(self._parent.stdout.readline())


def kill(pid: int) -> None:
    """SIGKILL to the process group of a run."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def wait_until_stopped(pid: int) -> bool:
    """Whether a run came to a fault point that stops it; False where it ended before."""
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        if state in "TZ":
            return state == "T"
        time.sleep(0.005)
    raise AssertionError(f"process {pid} neither stopped nor ended")


def _serve() -> None:
    """Answers questions until there are no more: a run to start, or to wait for."""
    import polars  # noqa: F401
    import sklearn.feature_extraction.text  # noqa: F401
    import torch  # noqa: F401

    from hardbatch.pipeline import run  # noqa: F401
    from hardbatch.pipeline.models import encoders
    from hardbatch.pipeline.models import resolve as models
    from hardbatch.pipeline.stages import cluster, embed, ingest, pack, write  # noqa: F401
    from hardbatch.pipeline.views import report  # noqa: F401

    encoders.LEXICAL_FEATURES = models.LEXICAL_FEATURES = 1_024  # whose projection is drawn in no time

    alive: set[int] = set()
    for line in sys.stdin:
        question = json.loads(line)
        if "wait" in question:
            answer = _wait(question["wait"])
            alive.discard(question["wait"])
        else:
            answer = os.fork()
            if answer == 0:
                _run(**question)
            while os.getpgid(answer) != answer:  # from then on it can be killed whole
                time.sleep(0.0005)
            alive.add(answer)
        print(json.dumps(answer), flush=True)
    for pid in alive:
        kill(pid)


def _wait(pid: int) -> int | None:
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    kill(pid)
    os.waitpid(pid, 0)
    return None


def _run(arguments: list[str], fault: str, log: str) -> None:
    """What a fork does: the command, with its output in `log`, and never returns."""
    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.environ["HARDBATCH_FAULT"] = fault
    code = 1
    try:
        import importlib
        from collections import Counter

        from hardbatch.pipeline import cli
        from hardbatch.pipeline.artifacts import commit, faults, files, lock

        importlib.reload(faults)  # it read the variable when it was loaded, and its functions look here
        counts = Counter[str]()
        if fault == COUNT:
            for module in (commit, files, lock):
                module.fault_point = lambda name: counts.update([name])  # type: ignore[attr-defined]
        code = cli.main(arguments)
        if fault == COUNT:
            print(json.dumps(counts))
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve()
