"""Trainings as processes: their flags, their ranks, how they are killed, and what their logs say."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tests.reliability import processes, warm
from tests.reliability.processes import ROOT, Ended

TRAINER = (sys.executable, str(ROOT / "trainer" / "main.py"))
Flags = Mapping[str, object]


def words_of(flags: Flags) -> list[str]:
    """The flags as words of a command line; a flag whose value is "" stands alone."""
    return [str(word) for pair in flags.items() for word in pair if word != ""]


def start_warm(flags: Flags, fault: str = "") -> warm.Run:
    """Starts a training of one rank in a process that has its libraries loaded."""
    return warm.start(warm.TRAINER, words_of(flags), fault=fault)


def run_warm(flags: Flags, fault: str = "") -> Ended:
    """Runs a training of one rank to its end in a process that has its libraries loaded."""
    return start_warm(flags, fault).wait()


def start_ranks(flags: Flags, number: int) -> list[warm.Run]:
    """Starts a training of several ranks without torchrun, in processes that have their libraries loaded."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    shared = {"WORLD_SIZE": str(number), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        warm.start(warm.TRAINER, words_of(flags), environment={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(number)
    ]


def run_ranks(flags: Flags, number: int) -> list[Ended]:
    """Runs a training of several ranks to its end, as `start_ranks` starts it; how each rank ended."""
    return [run.wait() for run in start_ranks(flags, number)]


def command(flags: Flags, *, ranks: int = 1) -> list[object]:
    """The command line of a training: python alone, or torchrun if there are several ranks."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks, TRAINER[1]]
    return [*(launcher if ranks > 1 else TRAINER), *words_of(flags)]


def start(flags: Flags, *, ranks: int = 1) -> subprocess.Popen[str]:
    """Starts a training by its command line."""
    environment = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return processes.start(command(flags, ranks=ranks), environment=environment)


def run(flags: Flags, *, ranks: int = 1) -> Ended:
    """Runs a training to its end: one rank warm, several ranks under torchrun."""
    return run_warm(flags) if ranks == 1 else processes.finish(start(flags, ranks=ranks), timeout_s=300)


def workers_of(output: Path) -> list[int]:
    """Processes that train into `output`; torchrun starts them in sessions of their own."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if str(output) in (folder / "cmdline").read_bytes().decode(errors="replace").split("\0"):
                found.append(int(folder.name))
    return found


def kill_all(process: subprocess.Popen[str], output: Path) -> None:
    """Sends SIGKILL to a launcher and all its workers; returns when they are gone."""
    victims = [process.pid, *workers_of(output)]
    deadline = time.monotonic() + 30
    while victims:
        assert time.monotonic() < deadline, "workers outlive a SIGKILL"
        for victim in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
        victims = workers_of(output)  # the launcher may have started one after we looked
    process.communicate()


def log_of(flags: Flags, kind: str = "train") -> list[dict[str, Any]]:
    """The records of one kind in the log; a line that a kill cut in two is left out."""
    path = Path(str(flags["--output"])) / "log.jsonl"
    records = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            record: dict[str, Any] = json.loads(line)
            if record["kind"] == kind:
                records.append(record)
    return records


def metrics_of(flags: Flags) -> list[tuple[Any, ...]]:
    """What must be equal to the bit: (step, position, loss, accuracy, gradient norm, learning rate) of every step."""
    names = ("step", "position", "loss", "accuracy", "gradient_norm", "learning_rate")
    return [tuple(record[name] for name in names) for record in log_of(flags)]


def export_of(flags: Flags) -> dict[str, bytes]:
    """The files of the export."""
    return processes.tree(Path(str(flags["--output"])) / "export")


def assert_same_training(flags: Flags, other: Flags) -> None:
    """Both have the same metrics in every step and the same export, to the bit."""
    assert metrics_of(flags) == metrics_of(other) != []
    assert export_of(flags) == export_of(other) != {}


def steps_logged(flags: Flags, number: int) -> Callable[[], bool]:
    """Whether the log has `number` steps."""
    return lambda: len(log_of(flags)) >= number
