"""Leaving in good order: a signal is noted, and obeyed when the step is done."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from types import FrameType

_ONE_REQUEST_S = 2.0  # a scheduler that signals all processes, torchrun among them, which passes it on, asks once


@contextlib.contextmanager
def deferred_signals() -> Iterator[Stop]:
    """Notes SIGTERM and SIGINT for the end of the step; one that comes later still ends the process at once."""
    stop = Stop()
    noted_at = 0.0

    def note(signum: int, frame: FrameType | None) -> None:
        nonlocal noted_at
        if not stop.noted:
            stop.noted, noted_at = signum, time.monotonic()
        elif time.monotonic() - noted_at > _ONE_REQUEST_S:
            raise SystemExit(128 + signum)

    before = {signum: signal.signal(signum, note) for signum in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


class StoppedError(Exception):
    """A signal came amid a piece of work that is not worth finishing."""


class Stop:
    """Whether to stop: a signal came, or torchrun, which would send one, is gone."""

    def __init__(self) -> None:
        self.noted = 0
        self._launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None

    @property
    def signum(self) -> int:
        """The signal, 0 for none."""
        orphaned = self._launcher is not None and os.getppid() != self._launcher
        return self.noted or (signal.SIGTERM if orphaned else 0)
