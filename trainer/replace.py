"""A folder in the place of an earlier one, without an instant in which neither is there.

    replace_folder    new ⇄ target in one step, where the system and the file system can; then the earlier one goes
                    elsewhere (NFS): target → .NAME.earlier.tmp, new → target; `sweep` undoes the half of it
    sweep           what a killed owner left: hidden folders .NAME.*.tmp

Both want the lock of the target to be held.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
from pathlib import Path

from hardbatch.pipeline.artifacts.faults import fault_point
from hardbatch.pipeline.artifacts.files import fsync_path

_HERE = -100  # AT_FDCWD of Linux
_EXCHANGE = 2  # RENAME_EXCHANGE of Linux, RENAME_SWAP of macOS
_CANNOT = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)  # what a file system or a system says that has no such step


def replace_folder(new: Path, target: Path) -> None:
    """Moves the folder `new` to `target` and deletes what was there before; readers find one of the two, whole."""
    if not target.exists():
        os.replace(new, target)
    elif not _exchange(new, target):
        os.replace(target, _earlier(target))
        fault_point("export.set-aside")
        os.replace(new, target)
    fsync_path(target.parent)
    fault_point("export.replaced")
    sweep(target)
    fault_point("export.swept")


def sweep(target: Path) -> None:
    """Deletes what a killed owner left beside `target`; an earlier one that nothing has replaced is put back."""
    if not target.exists() and _earlier(target).exists():
        os.replace(_earlier(target), target)
    for leftover in target.parent.glob(f".{target.name}.*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)


def _earlier(target: Path) -> Path:
    return target.with_name(f".{target.name}.earlier.tmp")


def _exchange(first: Path, second: Path) -> bool:
    """Exchanges two names in one step; False where the system or the file system cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    names = os.fsencode(first), os.fsencode(second)
    if hasattr(libc, "renameat2"):
        failed = libc.renameat2(_HERE, names[0], _HERE, names[1], _EXCHANGE)
    elif hasattr(libc, "renamex_np"):
        failed = libc.renamex_np(names[0], names[1], _EXCHANGE)
    else:
        return False
    code = ctypes.get_errno()
    if failed and code not in _CANNOT:
        raise OSError(code, os.strerror(code), str(second))
    return not failed
