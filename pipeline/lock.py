"""One builder per artifact: a file lock that the kernel frees when its owner dies."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.errors import LockedError


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """Holds the lock file at `path`; raises LockedError where a live process holds it."""
    descriptor = _acquire(path)
    try:
        since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()} since {since}".encode(), 0)
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _acquire(path: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 4096, 0).decode(errors="replace") or "another process"
            os.close(descriptor)
            artifact = path.parent / path.name.removeprefix(".").removesuffix(".lock")
            raise LockedError(f"{artifact}: being written by {holder}; wait for it, or write elsewhere") from None
        try:
            if os.fstat(descriptor).st_ino == path.stat().st_ino:
                return descriptor
        except FileNotFoundError:
            pass
        os.close(descriptor)  # its last owner removed the file between our open and our lock: try the new one
