"""Leaving in good order: a signal is noted, and obeyed when the step is done."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType


@contextlib.contextmanager
def noted_signals() -> Iterator[Stop]:
    """Notes SIGTERM and SIGINT for the end of the step; a second one ends the process at once."""
    stop = Stop()

    def note(signum: int, frame: FrameType | None) -> None:
        if stop.noted:
            raise SystemExit(128 + signum)
        stop.noted = signum

    before = {signum: signal.signal(signum, note) for signum in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


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
