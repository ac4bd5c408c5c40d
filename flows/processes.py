"""Processes that outlive their starter, and how to find and end exactly them and all that they started.

A process is known by pid and start time. Its family is itself, its descendants, and on Linux every process
that carries its mark in the environment: what a killed parent leaves behind has no other link to it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

MARK = "HARDBATCH_PROCESS"
"""Environment variable that a family inherits."""
GRACE_S = 20.0


@dataclass(frozen=True)
class Process:
    """One process; `started` tells it from a later one of the same pid, and means nothing else."""

    pid: int
    started: str


def start(command: list[str], *, mark: str, folder: Path, environment: Mapping[str, str], log: Path) -> Process:
    """Start `command` in a session of its own, with `mark` and its output in `log`."""
    with open(log, "wb") as output:
        pid = subprocess.Popen(  # noqa: S603 -- Prefect's own command, its arguments as a list
            command,
            cwd=folder,
            env={**environment, MARK: mark},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        ).pid
    return next((process for process in _living() if process.pid == pid), Process(pid, "gone"))


def is_alive(process: Process | None) -> bool:
    """Whether this very process lives; a zombie does not."""
    return process is not None and process in _living()


def end(leader: Process | None, mark: str, *, spare_leader: bool = False) -> bool:
    """End a family, or all of it but the leader: TERM to each, KILL after `GRACE_S`; False if none lived.

    `leader` is None where its start was never noted; its mark finds it then.
    """
    known = {leader} if leader is not None else set()
    found = False
    for number in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + GRACE_S
        signalled: set[Process] = set()
        while time.monotonic() < deadline:
            family = {process for process in _family(known, mark) if process != leader or not spare_leader}
            if not family:
                break
            found = True
            known |= family
            for process in family - signalled:
                try:
                    os.kill(process.pid, number)
                except ProcessLookupError:
                    pass
            signalled |= family
            time.sleep(0.1)
    return found


def _family(known: set[Process], mark: str) -> set[Process]:
    """The living among `known`, those with the mark, and the descendants of both."""
    living = _living()
    family = {process for process in living if process in known or _carries(process.pid, mark)}
    pids = {process.pid for process in family}
    while children := {process for process, parent in living.items() if parent in pids} - family:
        family |= children
        pids |= {process.pid for process in children}
    return family


def _carries(pid: int, mark: str) -> bool:
    """Whether the environment of a process holds `mark`; False where the system does not tell."""
    try:
        return f"\0{MARK}={mark}\0".encode() in b"\0" + Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return False


def _living() -> dict[Process, int]:
    """Each living process and its parent's pid, from /proc, or from `ps` where there is none (macOS)."""
    if not Path("/proc/self/stat").exists():
        listing = subprocess.run(
            ["ps", "-A", "-o", "pid=,ppid=,stat=,lstart="],  # noqa: S607 -- where it lies differs by system
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        rows = [line.split(maxsplit=3) for line in listing.splitlines()]
        rows = [row for row in rows if row[2][0] != "Z"]
        return {Process(int(pid), started): int(parent) for pid, parent, _, started in rows}

    boot = Path("/proc/sys/kernel/random/boot_id").read_text()[:8]
    living = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:  # after the name in parentheses: state, parent, ..., the 20th is the start in ticks since boot
            fields = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()
        except OSError:
            continue  # ended while we looked
        if fields[0] not in "ZX":
            living[Process(int(entry.name), f"{boot}-{fields[19]}")] = int(fields[1])
    return living
