"""Snapshots: the arrays of a long computation, kept beside its artifact so that a killed one goes on from there.

They take no part in the result: a computation that goes on from one gives what it would have given. Each replaces the
one before it whole, and all are deleted when the artifact's unit is committed.
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
_TIMES_ITS_COST = 20  # between two snapshots: they take a twentieth of the time at most


class Snapshots:
    """Snapshots by name in `folder`; where that is None, none are kept."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._next = time.monotonic() + _LEAST_SECONDS_BETWEEN

    def load(self, name: str) -> dict[str, Array] | None:
        """The arrays kept under `name`; None where there are none that can be read."""
        if self._folder is None:
            return None
        try:
            with np.load(self._folder / f"{name}.npz", allow_pickle=False) as arrays:
                return dict(arrays)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile):
            return None

    def load_all(self) -> dict[str, dict[str, Array]]:
        """The arrays of every snapshot that can be read, by name."""
        paths = sorted(self._folder.glob("*.npz")) if self._folder is not None else []
        found = {path.stem: self.load(path.stem) for path in paths}
        return {name: arrays for name, arrays in found.items() if arrays is not None}

    def save(self, name: str, arrays: Callable[[], Mapping[str, Array]]) -> None:
        """Keeps what `arrays()` gives under `name`, if it is time: a kill costs some seconds of work, or one step.

        Where it finds no room, or may not write, the one before it stays: the artifact itself will tell of that.
        """
        started = time.monotonic()
        if self._folder is None or started < self._next:
            return
        state = arrays()
        with contextlib.suppress(OSError):
            self._replace(self._folder / f"{name}.npz", state)
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
        """Deletes all of them."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
