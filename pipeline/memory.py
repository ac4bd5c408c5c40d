"""Memory of this process: the most that it held, counted anew at will, and what it freed. Linux only."""

from __future__ import annotations

import ctypes
from pathlib import Path

HIGH_WATER = Path("/proc/self/clear_refs")  # writing 5 sets the peak back to what is held now


def peak_rss_mib() -> float | None:
    """The most memory (resident, mapped files included) this process held since the last unit, in MiB; Linux only."""
    try:
        status = Path("/proc/self/status").read_text()
        return round(int(status.split("VmHWM:")[1].split()[0]) / 1024, 1)
    except (OSError, IndexError, ValueError):
        return None


def forget_peak() -> None:
    """Sets the peak back to what is held now, where the system can."""
    try:
        HIGH_WATER.write_text("5")
    except OSError:
        pass  # no Linux, or not allowed: peaks are then those since the process began


def release_freed() -> None:
    """Gives back what was freed: glibc else keeps all of it that lies below anything still in use."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        pass  # another C library
