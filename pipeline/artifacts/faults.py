"""Fault points: where tests make this process die, stop or fail, chosen by one environment variable.

    HARDBATCH_FAULT=NAME[:N]=ACTION     the N-th time (from 1) that the point NAME is passed

ACTION is `kill` (SIGKILL to the process group of this process), `stop` (SIGSTOP to this process, which waits for
SIGCONT), or the name of an errno such as `ENOSPC` or `EIO`, raised as an OSError. Only this module reads the variable;
without it a point costs one comparison.
"""

from __future__ import annotations

import errno
import os
import signal
import time

POINTS = (  # in the order in which they are passed: workspace, artifact, unit and its record, manifest
    "folder.made",
    "lock.taken",
    "sweep.removed",
    "unit.written",
    "unit.fsynced",
    "unit.unrecorded",
    "unit.renamed",
    "unit.folder-fsynced",
    "file.written",
    "file.fsynced",
    "file.renamed",
    "file.folder-fsynced",
    "manifest.written",
    "manifest.fsynced",
    "manifest.linked",
    "manifest.unlinked",
    "manifest.folder-fsynced",
)
LONG_POINTS = ("snapshot.saved",)  # in work that takes longer than a test, whose test brings them forward
TRAINER_POINTS = (  # besides those above, as a checkpoint is an artifact
    "checkpoint.saved",
    "checkpoint.disowned",
    "checkpoint.emptied",
    "export.written",
    "export.set-aside",
    "export.replaced",
    "export.swept",
)
_chosen = os.environ.get("HARDBATCH_FAULT", "")
_passed = 0


def fault_point(name: str) -> None:
    """Marks the point `name`: nothing happens unless a test chose it."""
    if not _chosen.startswith(name):
        return
    place, _, action = _chosen.partition("=")
    chosen, _, number = place.partition(":")
    if chosen != name:
        return
    global _passed
    _passed += 1
    if _passed != int(number or 1):
        return
    if action == "kill":
        os.killpg(0, signal.SIGKILL)
        time.sleep(60)  # until the signal arrives
    if action == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
        return
    raise OSError(getattr(errno, action), f"fault point {name}")
