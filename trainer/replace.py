"""Replaces a folder. A kill in between leaves the earlier folder under a hidden name, and the next run restores it.

Both functions expect the lock of the target to be held.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from hardbatch.pipeline.artifacts.faults import fault_point
from hardbatch.pipeline.artifacts.files import fsync_path


def replace_folder(new: Path, target: Path) -> None:
    """Moves the folder `new` to `target` and deletes what was there. Readers find one of the two, whole; between the
    two renames there is none for an instant.
    """
    if target.exists():
        os.replace(target, _earlier(target))
        fault_point("export.set-aside")
    try:
        os.replace(new, target)
        fsync_path(target.parent)
        fault_point("export.replaced")
    finally:
        sweep(target)
    fault_point("export.swept")


def sweep(target: Path) -> None:
    """Restores the earlier folder if nothing replaced it, and deletes what else a killed run left beside `target`."""
    if not target.exists() and _earlier(target).exists():
        os.replace(_earlier(target), target)
    for leftover in target.parent.glob(f".{target.name}.*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)


def _earlier(target: Path) -> Path:
    return target.with_name(f".{target.name}.earlier.tmp")
