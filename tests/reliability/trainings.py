"""Trainings as processes: their flags, ranks, kills, and what their logs say.

`fork` starts one rank alone from a process that has torch loaded, in a second; it is a process like any other, the
leader of a session of its own. `start` and `run` start the command itself, of one rank or of several.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tests.reliability import processes
from tests.reliability.processes import ROOT, Ended

TRAINER = (sys.executable, str(ROOT / "trainer" / "main.py"))
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
Flags = Mapping[str, object]
_FORKS = multiprocessing.get_context("forkserver")
_started: list[BaseProcess] = []
_FORKS.set_forkserver_preload(
    ["torch", "hardbatch.trainer.loop", "hardbatch.trainer.training", "hardbatch.trainer.sentence_module"]
)


def words_of(flags: Flags) -> list[str]:
    """The flags as words of a command line; a flag whose value is "" stands alone."""
    return [str(word) for pair in flags.items() for word in pair if word != ""]


def fork(flags: Flags, log: Path, *, fault: str = "", program: str = "hardbatch.trainer.main") -> BaseProcess:
    """Starts `program` in a fork; `log` receives all that it prints."""
    log.unlink(missing_ok=True)
    process = _FORKS.Process(target=_forked, args=(program, words_of(flags), str(log), fault))
    process.start()
    _started.append(process)
    return process


def kill_forks() -> None:
    """Kills the forks that a test left behind: one that is stopped would never end."""
    while _started:
        process = _started.pop()
        process.kill()
        process.join()


def join(process: BaseProcess, log: Path, *, timeout_s: float = 120) -> Ended:
    """Waits for the end of a fork; one that outlives the timeout is killed, and fails the test."""
    process.join(timeout_s)
    if process.exitcode is None:
        process.kill()
        raise AssertionError(f"still running after {timeout_s} s\n{log.read_text()}")
    return Ended(code=process.exitcode, output="", errors=log.read_text(errors="replace") if log.exists() else "")


def run_fork(flags: Flags, log: Path, **options: Any) -> Ended:
    """Runs a fork to its end."""
    return join(fork(flags, log, **options), log)


def _forked(program: str, words: Sequence[str], log: str, fault: str) -> None:
    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(output, stream)
    import torch

    from hardbatch.pipeline.artifacts import faults

    torch.set_num_threads(1)
    faults._chosen = fault
    try:
        code = importlib.import_module(program).main(words)
    except SystemExit as leaving:
        code = leaving.code
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def command(flags: Flags, *, ranks: int = 1) -> list[object]:
    """The command line of a training: python alone, or torchrun where there are several ranks."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks, TRAINER[1]]
    return [*(launcher if ranks > 1 else TRAINER), *words_of(flags)]


def start(flags: Flags, *, ranks: int = 1) -> subprocess.Popen[str]:
    """Starts a training, in a session of its own."""
    return processes.start(command(flags, ranks=ranks), environment=ENVIRONMENT)


def run(flags: Flags, *, ranks: int = 1) -> Ended:
    """Runs a training to its end."""
    return processes.finish(start(flags, ranks=ranks), timeout_s=300)


def workers_of(output: Path) -> list[int]:
    """Processes that train into `output`; torchrun starts them in sessions of their own."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if str(output) in (folder / "cmdline").read_bytes().decode(errors="replace").split("\0"):
                found.append(int(folder.name))
    return found


def kill_all(process: subprocess.Popen[str], output: Path) -> None:
    """SIGKILL to a launcher and all its workers; returns when they are gone."""
    for victim in [process.pid, *workers_of(output)]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)
    process.communicate()
    deadline = time.monotonic() + 30
    while workers_of(output):
        assert time.monotonic() < deadline, "workers outlive a SIGKILL"
        for victim in workers_of(output):  # one that the launcher started after we looked
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
        time.sleep(0.02)


def log_of(flags: Flags, kind: str = "train") -> list[dict[str, Any]]:
    """The records of one kind in the log; a line that a kill cut in two is left out."""
    path = Path(str(flags["--output"])) / "log.jsonl"
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError):
            record: dict[str, Any] = json.loads(line)
            if record["kind"] == kind:
                records.append(record)
    return records


def figures_of(flags: Flags) -> list[tuple[Any, ...]]:
    """What must be equal to the bit: (step, position, loss, accuracy, gradient norm, learning rate) of every step."""
    names = ("step", "position", "loss", "accuracy", "gradient_norm", "learning_rate")
    return [tuple(record[name] for name in names) for record in log_of(flags)]


def export_of(flags: Flags) -> dict[str, bytes]:
    """The files of the export."""
    return processes.tree(Path(str(flags["--output"])) / "export")


def steps_logged(flags: Flags, number: int) -> Callable[[], bool]:
    """Whether the log has `number` steps."""
    return lambda: len(log_of(flags)) >= number


def state_of(pid: int) -> str:
    """The state of a process as the kernel tells it: T where it is stopped, Z where it has ended."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
