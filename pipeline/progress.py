"""Progress of a step: a bar with rate and time left on a terminal, plain lines otherwise."""

from __future__ import annotations

import sys
import time
from typing import Any, TextIO

_SECONDS_BETWEEN_LINES = 10.0


class SilentProgress:
    """Shows nothing."""

    def start(self, label: str, total: int) -> None:
        pass

    def advance(self, amount: int) -> None:
        pass

    def finish(self) -> None:
        pass


class LineProgress:
    """Prints a line every ten seconds, and one when the step ends."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def start(self, label: str, total: int) -> None:
        self._label, self._total, self._done = label, total, 0
        self._started = self._shown = time.monotonic()

    def advance(self, amount: int) -> None:
        self._done += amount
        now = time.monotonic()
        if now - self._shown >= _SECONDS_BETWEEN_LINES and self._done < self._total:
            self._shown = now
            rate = self._done / (now - self._started)
            left = (self._total - self._done) / rate
            self._print(f"{self._label}: {self._done:,} of {self._total:,}, {rate:,.0f}/s, {left:,.0f} s left")

    def finish(self) -> None:
        if self._total:
            self._print(f"{self._label}: {self._done:,} in {time.monotonic() - self._started:.1f} s")

    def _print(self, line: str) -> None:
        print(line, file=self._stream, flush=True)


class BarProgress:
    """Shows a bar with rate and estimated time left."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def start(self, label: str, total: int) -> None:
        from tqdm import tqdm

        self._bar: Any = tqdm(total=total, desc=label, file=self._stream, unit_scale=True, leave=total > 0)

    def advance(self, amount: int) -> None:
        self._bar.update(amount)

    def finish(self) -> None:
        self._bar.close()


def choose_progress(stream: TextIO | None = None) -> BarProgress | LineProgress:
    """Chooses bars if `stream` (by default standard error) is a terminal, otherwise lines."""
    stream = stream or sys.stderr
    return BarProgress(stream) if stream.isatty() else LineProgress(stream)


def duration(seconds: float) -> str:
    """Seconds as a person writes them: `< 1 s`, `42 s`, `17 min`, `3.5 h`, `2.1 d`."""
    for unit, length, limit in (("s", 1, 100), ("min", 60, 100), ("h", 3_600, 48)):
        if seconds / length < limit:
            digits = 1 if unit == "h" else 0
            return f"{seconds / length:.{digits}f} {unit}" if seconds >= 0.5 else "< 1 s"
    return f"{seconds / 86_400:,.1f} d"
