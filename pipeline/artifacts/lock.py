"""One builder per artifact: a file lock that the kernel frees when its owner dies, however it dies.

The text in the file is informational. The kernel's lock decides: an owner that is gone holds nothing, even if
another process has its pid by now.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hardbatch.pipeline.artifacts.faults import fault_point
from hardbatch.pipeline.errors import ConfigError, LockedError

_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
_TRIES, _SECONDS_BETWEEN = 100, 0.01  # that an owner has to write who it is


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """Holds the lock file at `path` for the body; raises LockedError if a live process holds it."""
    descriptor = _acquire(path)
    try:
        since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        line = f"process {os.getpid()} on {socket.gethostname()} since {since}\n".encode()
        os.pwrite(descriptor, line, 0)  # one write over what a dead owner left, as readers take the first line
        os.truncate(descriptor, len(line))
        fault_point("lock.taken")
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _acquire(path: Path) -> int:
    tries = _TRIES
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(descriptor).st_ino == path.stat().st_ino:
                return descriptor
        except BlockingIOError:
            holder = os.pread(descriptor, 4096, 0).decode(errors="replace").partition("\n")[0]
            tries -= 1
            if holder or not tries:
                os.close(descriptor)
                raise LockedError(_held(path, holder or "another process")) from None
            time.sleep(_SECONDS_BETWEEN)
        except FileNotFoundError:
            pass
        except OSError as error:
            os.close(descriptor)
            if error.errno in _NO_LOCKS:
                raise ConfigError(
                    f"{path.parent}: this filesystem has no file locks (flock: {error.strerror}), without which two "
                    "runs could mix; put the workspace on another one, or mount this one with locks"
                ) from None
            raise
        os.close(descriptor)  # the last owner removed the file between our open and our lock: try the new one


def _held(path: Path, holder: str) -> str:
    artifact = path.parent / path.name.removeprefix(".").removesuffix(".lock")
    return f"{artifact}: being written by {holder}; wait for it, or write elsewhere"
