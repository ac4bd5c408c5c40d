"""The array type, and how large arrays give their memory back.

A stage holds hundreds of MiB for a moment and should not keep them. Four habits of the libraries
below stand in the way. This is the one place that explains what the code does about each; what it
saves is in docs/benchmarks.md.

- glibc returns freed memory to the system only from the top of its heap, so one small live block
  keeps everything below it. `empty` takes large arrays from `mmap`, which returns them when they
  are freed; `trim_heap` returns the rest, and is called where many blocks have just been freed.
- torch aligns its buffers on the CPU, and glibc often cannot reuse a freed aligned piece. Large
  buffers that come and go are therefore numpy arrays that torch writes into.
- oneDNN, which computes torch's products on the CPU, keeps the code it generated for every shape
  it has met. `pad_rows` rounds shapes up, so that there are few of them.
- A float64 reduction of a float32 tensor first converts the whole tensor. Such sums are computed
  a slice at a time.
"""

from __future__ import annotations

import ctypes
import mmap
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


class PairSet:
    """A set of pairs (first, second) of whole numbers from 0, 8 bytes each, that finds many at a time.

    Args:
        first: One number of each pair (int64); pairs may repeat.
        second: The other number of each pair (int64).
    """

    def __init__(self, first: Array, second: Array) -> None:
        self._width = int(second.max(initial=0)) + 1
        self._codes = np.unique(first * self._width + second)

    def contains(self, first: Array, second: Array) -> Array:
        """Whether each (first, second) is in the set (bool); the two arrays broadcast."""
        codes = first * self._width + second
        if len(self._codes) == 0:
            return np.zeros(codes.shape, dtype=bool)
        indices = np.searchsorted(self._codes, codes).clip(max=len(self._codes) - 1)

        # A number beyond the width would have the code of another pair.
        return np.asarray((self._codes[indices] == codes) & (second < self._width))


def empty(shape: tuple[int, int], dtype: type[np.floating[Any]]) -> Array:
    """Like `np.empty`, for large arrays: their memory is returned when they are freed.

    The system clears new pages each time, which is too slow for blocks that come and go.
    """
    num_bytes = shape[0] * shape[1] * np.dtype(dtype).itemsize
    if num_bytes == 0:
        return np.empty(shape, dtype=dtype)

    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(pages, dtype=dtype).reshape(shape)


def pad_rows(vectors: Array, multiple: int) -> Array:
    """Appends rows of zeros up to a multiple of rows; returns the array itself if none is missing."""
    missing = -len(vectors) % multiple
    if missing == 0:
        return vectors
    return np.concatenate([vectors, np.zeros((missing, vectors.shape[1]), dtype=vectors.dtype)])


def trim_heap() -> None:
    """Returns freed memory of the heap to the system, if the C library is glibc."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        pass
