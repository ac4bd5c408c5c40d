"""Opens files that may be compressed. What they are is known by their first bytes, whatever their names."""

from __future__ import annotations

import bz2
import gzip
import importlib.util
import io
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from hardbatch.pipeline.errors import InputError

SUFFIXES = (".gz", ".zst", ".zstd", ".bz2", ".xz")
BROKEN = (EOFError, OSError, zlib.error, lzma.LZMAError)
"""What reading a file that is cut off or broken may raise."""

_ZSTD = b"\x28\xb5\x2f\xfd"
_HEADER_BYTES = 18
_ZSTD_READ = 2**12  # a few bytes may decompress to 128 KiB, so more at a time could fill the memory
_PLAIN_WINDOW_LOG = 27  # as far as zstd goes unless it is told to; `zstd --long=31` needs 2 GiB of memory to read


def without_suffix(name: str) -> str:
    """Removes the suffix of a compression from a file name."""
    for suffix in SUFFIXES:
        if name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return name


def open_decompressed(path: Path) -> BinaryIO:
    """Opens a file for reading its decompressed bytes.

    Args:
        path: A plain file, or one compressed with gzip, zstd, bzip2 or xz.

    Raises:
        InputError: It is an archive, or compressed in a way that cannot be read here.
        OSError: It cannot be read.
    """
    with path.open("rb") as file:
        start = file.read(_HEADER_BYTES)
    if start.startswith(b"\x1f\x8b"):
        return cast(BinaryIO, gzip.open(path, "rb"))
    if start.startswith(b"BZh"):
        return cast(BinaryIO, bz2.open(path, "rb"))
    if start.startswith(b"\xfd7zXZ\0"):
        return cast(BinaryIO, lzma.open(path, "rb"))
    if start.startswith(_ZSTD) or start[1:4] == b"\x2a\x4d\x18":  # a frame, or one to be skipped
        return _open_zstd(path, start)
    if start.startswith(b"PK\x03\x04"):
        raise InputError(f"{path}: is a zip archive; unpack it, and name the files in it")
    return path.open("rb")


def _open_zstd(path: Path, start: bytes) -> BinaryIO:
    if _window_log(start) <= _PLAIN_WINDOW_LOG:
        import pyarrow as pa

        return io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(path)), "zstd"))  # raises at a cut-off end
    if importlib.util.find_spec("zstandard") is None:
        raise InputError(
            f"{path}: is compressed with zstd --long={_window_log(start)}, which needs a package: "
            "pip install zstandard, or compress the file again without --long"
        )
    return io.BufferedReader(_LongZstd(path))


class _LongZstd(io.RawIOBase):
    """Frames of zstd with windows of up to 2 GiB, which pyarrow refuses; raises EOFError at a cut-off end."""

    def __init__(self, path: Path) -> None:
        self._chunks = self._decompress(path)
        self._left = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._left:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._left = memoryview(chunk)
        size = min(len(buffer), len(self._left))
        buffer[:size], self._left = self._left[:size], self._left[size:]
        return size

    def _decompress(self, path: Path) -> Iterator[bytes]:
        import zstandard

        with path.open("rb") as file:
            data = file.read(_ZSTD_READ)
            while data:
                frame = zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()
                while not frame.eof:
                    if not data:
                        raise EOFError("the file ends within a frame of zstd")
                    try:
                        yield frame.decompress(data)
                    except zstandard.ZstdError as error:
                        raise OSError(str(error)) from None
                    data = b"" if frame.eof else file.read(_ZSTD_READ)
                data = frame.unused_data or file.read(_ZSTD_READ)


def _window_log(start: bytes) -> int:
    """The base-2 logarithm of the window that a frame of zstd asks for (RFC 8878, 3.1.1.1), rounded up."""
    if start[:4] != _ZSTD or len(start) < _HEADER_BYTES:
        return 0
    flags = start[4]
    if not flags & 0x20:
        exponent, mantissa = start[5] >> 3, start[5] & 7
        return 10 + exponent + (mantissa > 0)

    # A single segment has no window of its own: it is as large as the content.
    first = 5 + (0, 1, 2, 4)[flags & 3]
    num_bytes = (1, 2, 4, 8)[flags >> 6]
    return int.from_bytes(start[first : first + num_bytes], "little").bit_length()
