"""Snapshots: the state of a long computation, kept beside its artifact so that a killed one can resume.

A snapshot has no influence on the result: a computation that resumes from one returns what it would have
returned without being killed. Each snapshot replaces the one before, and the last is deleted when the
artifact's unit is committed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from hardbatch.pipeline.arrays import Array
from hardbatch.pipeline.artifacts.faults import fault_point
from hardbatch.pipeline.artifacts.files import fsync_path, temporary_name

_LEAST_SECONDS_BETWEEN = 10.0
_TIMES_ITS_COST = 20  # snapshots take at most a twentieth of the time


class Snapshots:
    """The latest snapshot in `folder`; if that is None, none is kept."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._next = time.monotonic() + _LEAST_SECONDS_BETWEEN

    def load(self) -> dict[str, Array] | None:
        """The arrays of the latest snapshot; None if there is none that can be read."""
        if self._folder is None:
            return None
        try:
            with np.load(self._folder / "state.npz", allow_pickle=False) as arrays:
                return dict(arrays)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile):
            return None

    def save(self, arrays: Callable[[], Mapping[str, Array]]) -> None:
        """Keeps what `arrays()` returns, if enough time has passed since the last snapshot.

        If the disk is full or may not be written to, the previous snapshot stays, and the error is left to
        the artifact itself.
        """
        started = time.monotonic()
        if self._folder is None or started < self._next:
            return
        with contextlib.suppress(OSError):
            self._replace(self._folder / "state.npz", arrays())
        ended = time.monotonic()
        self._next = ended + max(_LEAST_SECONDS_BETWEEN, _TIMES_ITS_COST * (ended - started))
        fault_point("snapshot.saved")

    def _replace(self, path: Path, arrays: Mapping[str, Array]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = temporary_name(path)
        try:
            with temporary.open("wb") as file:
                np.savez(file, allow_pickle=False, **arrays)
            fsync_path(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def clear(self) -> None:
        """Deletes the snapshot."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
