"""SIGTERM and SIGINT during a training: a signal is noted, and the training ends after the current step."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from types import FrameType

# Signals within so many seconds are one request: a scheduler may signal all processes, and torchrun,
# which is one of them, passes the signal on.
_ONE_REQUEST_S = 2.0


@contextlib.contextmanager
def deferred_signals() -> Iterator[Stop]:
    """Notes SIGTERM and SIGINT for the end of the step; a second request ends the process at once."""
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
    """A signal arrived during work that is not worth finishing."""


class Stop:
    """Whether to stop: because of a signal, or because torchrun, which would pass one on, is gone."""

    def __init__(self) -> None:
        self.noted = 0
        self._launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None

    @property
    def signum(self) -> int:
        """The signal to obey, 0 if there is none."""
        orphaned = self._launcher is not None and os.getppid() != self._launcher
        return self.noted or (signal.SIGTERM if orphaned else 0)
