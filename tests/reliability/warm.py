"""Commands that start in tenths of a second: forks of a server process that has the libraries loaded.

The server is Python's own fork server. A run is a process like any other and the leader of a
session of its own: it takes locks, it can be stopped, and it can be killed whole.
"""

from __future__ import annotations

import importlib
import itertools
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import pytest

from tests.reliability.processes import Ended

PIPELINE, TRAINER, EXPORT = "hardbatch.pipeline.cli", "hardbatch.trainer.main", "hardbatch.trainer.export"
TIMEOUT_S = 120.0
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    [
        "__main__",
        "tests.reliability.warm",
        "torch",
        "polars",
        "sklearn.feature_extraction.text",
        *(f"hardbatch.pipeline.stages.{name}" for name in ("ingest", "embed", "cluster", "measure", "pack", "write")),
        "hardbatch.pipeline.views.report",
        "hardbatch.pipeline.cli",
        "hardbatch.trainer.loop",
        "hardbatch.trainer.sentence_module",
    ]
)
_numbers = itertools.count()
_started: list[Run] = []

# A lexical model whose projection is drawn in no time.
SMALL_MODEL = {f"hardbatch.pipeline.models.{name}.LEXICAL_FEATURES": 1_024 for name in ("encoders", "resolve")}


class Run:
    """A command that was started; made by `start`."""

    def __init__(
        self, program: str, words: Sequence[str], constants: Mapping[str, object], environment: Mapping[str, str]
    ) -> None:
        self._log = Path(_folder_of_logs().name) / f"{next(_numbers)}.log"
        self._process = _SERVER.Process(target=_main, args=(program, words, self._log, constants, environment))
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid
        self.wait_until(self._log.exists)  # from then on it leads its session and can be killed whole

    @property
    def log(self) -> str:
        """All that it has printed so far."""
        return self._log.read_text(errors="replace")

    def wait(self, timeout_s: float = TIMEOUT_S) -> Ended:
        """Waits for the end; a run that outlives the timeout is killed and fails the test."""
        self._process.join(timeout_s)
        if self._process.exitcode is None:
            self.kill()
            raise AssertionError(f"still running after {timeout_s} s\n{self.log}")
        return Ended(code=self._process.exitcode, output="", errors=self.log)

    def wait_until(self, ready: Callable[[], bool]) -> None:
        """Waits until `ready()` is true; the test fails if the run ends before that."""
        deadline = time.monotonic() + TIMEOUT_S
        while not ready():
            assert self._process.is_alive() and time.monotonic() < deadline, self._log.exists() and self.log
            time.sleep(0.002)

    def wait_until_stopped(self) -> None:
        """Waits until the run has come to a fault point that stops it."""
        if not Path("/proc/self/stat").exists():
            pytest.skip("looks at processes in /proc")
        self.wait_until(lambda: Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T")

    def kill(self) -> None:
        """Sends SIGKILL to the process group of the run."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)


def start(
    program: str,
    words: Sequence[object],
    *,
    fault: str = "",
    constants: Mapping[str, object] | None = None,
    environment: Mapping[str, str] | None = None,
) -> Run:
    """Starts the `main` of a module.

    Args:
        program: The module.
        words: The command line.
        fault: As HARDBATCH_FAULT would choose it.
        constants: Values of constants, by the name of the module and of the constant.
        environment: Variables on top of this process's own.
    """
    chosen = {**SMALL_MODEL, "hardbatch.pipeline.artifacts.faults._chosen": fault, **(constants or {})}
    _started.append(Run(program, [str(word) for word in words], chosen, environment or {}))
    return _started[-1]


def run(program: str, words: Sequence[object], **options: object) -> Ended:
    """Runs the `main` of a module to its end; what it printed is in `errors`."""
    return start(program, words, **options).wait()  # type: ignore[arg-type]


def kill_all() -> None:
    """Kills the runs that a test left behind: a stopped one would never end."""
    while _started:
        _started.pop().kill()


def run_ranks(rank_main: Callable[..., None], num_ranks: int, *arguments: object) -> None:
    """Calls `rank_main(rank, num_ranks, port, *arguments)` in as many processes, and waits for them.

    Args:
        rank_main: A function of a test's module.
        num_ranks: The number of processes.
        arguments: Passed on; `port` is a free one, for the ranks to meet at.

    Raises:
        torch.multiprocessing.ProcessRaisedException: A rank raised.
    """
    import torch.multiprocessing

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(
        rank_main, (num_ranks, port, *arguments), num_ranks, start_method="forkserver"
    )


@lru_cache
def _folder_of_logs() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="hardbatch-warm-")


def _main(
    program: str, words: Sequence[str], log: Path, constants: Mapping[str, object], environment: Mapping[str, str]
) -> None:
    os.setsid()
    os.environ.update(environment)
    output = os.open(log, os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(output, stream)

    code: object = 1
    try:
        importlib.import_module("torch").set_num_threads(1)
        for name, value in constants.items():
            module, _, constant = name.rpartition(".")
            assert hasattr(importlib.import_module(module), constant), name
            setattr(importlib.import_module(module), constant, value)
        code = importlib.import_module(program).main(words)
    except SystemExit as leaving:
        code = leaving.code
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(int(str(code)))
