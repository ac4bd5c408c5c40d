"""Trainings as processes: their flags, ranks, kills, and what their logs say."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from reliability import processes
from reliability.processes import ROOT, Ended

TRAINER = (sys.executable, str(ROOT / "trainer" / "main.py"))
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
Flags = Mapping[str, object]


def command(flags: Flags, *, ranks: int = 1) -> list[object]:
    """The command line of a training: python alone, or torchrun where there are several ranks."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks, TRAINER[1]]
    words = [word for pair in flags.items() for word in pair if word != ""]
    return [*(launcher if ranks > 1 else TRAINER), *words]


def start(
    flags: Flags, *, ranks: int = 1, environment: Mapping[str, str] | None = None, wrapper: tuple[object, ...] = ()
) -> subprocess.Popen[str]:
    """Starts a training, in a session of its own; `wrapper` is put before the command."""
    return processes.start([*wrapper, *command(flags, ranks=ranks)], environment={**ENVIRONMENT, **(environment or {})})


def run(flags: Flags, *, ranks: int = 1, environment: Mapping[str, str] | None = None) -> Ended:
    """Runs a training to its end."""
    return processes.finish(start(flags, ranks=ranks, environment=environment), timeout_s=300)


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
