"""Arrays: their type, large ones that give their memory back, and giving back what malloc keeps."""

from __future__ import annotations

import ctypes
import mmap
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def empty(shape: tuple[int, int], dtype: type[np.floating[Any]]) -> Array:
    """As `np.empty`, for large arrays: their memory goes back to the system when they are freed, unlike malloc's.

    New pages are cleared each time, which is too dear for blocks that come and go.
    """
    num_bytes = shape[0] * shape[1] * np.dtype(dtype).itemsize
    if num_bytes == 0:
        return np.empty(shape, dtype=dtype)
    room = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(room, dtype=dtype).reshape(shape)


def trim_heap() -> None:
    """Gives back what was freed: glibc else keeps all of it that lies below anything still in use."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        pass  # another C library
