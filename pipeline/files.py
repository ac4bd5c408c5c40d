"""Writing and digesting single files.

A file is written under a temporary name beside its target, flushed, fsynced, renamed: a reader sees all or nothing.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import uuid
from collections.abc import Iterable
from pathlib import Path
from stat import S_ISREG
from typing import Any

from pipeline.errors import ConfigError, HardbatchError, InputError, NoSpaceError

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_NO_ACCESS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)


def content_key(**parts: Any) -> str:
    """Short hash of what an artifact is made from: 16 hex digits of the SHA-256 of the parts as canonical JSON."""
    return hashlib.sha256(canonical_json(parts)).hexdigest()[:16]


def write_file_atomic(path: Path, data: bytes) -> None:
    """Writes `data` to `path` so that a reader sees the old bytes or the new ones, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    try:
        temporary.write_bytes(data)
        fsync_path(temporary)
        os.replace(temporary, path)
        fsync_path(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def fsync_path(path: Path) -> None:
    """Flushes a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, as hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_outside(path: Path, ranges: Iterable[tuple[int, int]]) -> str:
    """SHA-256 of the bytes of a file that lie in none of the byte ranges (offset, length), in the file's order.

    With the digests of the ranges themselves it covers the file: of a Parquet file and its row groups, it is that of
    the magic bytes in front and of the footer.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        end = 0
        for offset, length in sorted(ranges):
            if offset > end:
                file.seek(end)
                digest.update(file.read(offset - end))
            end = max(end, offset + length)
        file.seek(end)
        digest.update(file.read())
    return digest.hexdigest()


class DigestCache:
    """Digests of local files by (path, size, mtime), kept in one JSON file: a file is read once until it changes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._changed = False
        self._entries: dict[str, tuple[int, int, str]] = {}
        try:
            for name, (size, mtime, digest) in json.loads(path.read_bytes()).items():
                self._entries[name] = (int(size), int(mtime), str(digest))
        except (OSError, ValueError, TypeError, AttributeError, RecursionError):
            self._entries = {}  # absent or damaged: it is only a cache

    def digest(self, path: Path) -> str:
        """SHA-256 of the file at `path`; raises InputError where it cannot be read."""
        name = str(path.absolute())
        try:
            stat = path.stat()
            if not S_ISREG(stat.st_mode):
                raise InputError(f"{path}: is no regular file but a pipe, a device or a folder; give a file")
            known = self._entries.get(name)
            if known is None or known[:2] != (stat.st_size, stat.st_mtime_ns):
                known = (stat.st_size, stat.st_mtime_ns, sha256_file(path))
                self._entries[name] = known
                self._changed = True
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror}") from None
        return known[2]

    def save(self) -> None:
        """Writes the entries back where one is new."""
        if self._changed:
            write_file_atomic(self._path, canonical_json(self._entries))
            self._changed = False


def as_user_error(error: OSError) -> HardbatchError | None:
    """What an OSError means to a user who can mend it: a full disk, a place that cannot be written; None for others."""
    if error.errno == errno.EFBIG:
        name = error.filename or "a file"
        return NoSpaceError(f"{name} grows beyond what may be written here; raise the limit (ulimit -f) and run again")
    if error.errno in _NO_SPACE:
        where = f" while writing {error.filename}" if error.filename else ""
        return NoSpaceError(f"no space left{where}; free some and run the same command again: it goes on from there")
    if error.errno in _NO_ACCESS:
        return ConfigError(f"{error.filename}: {error.strerror}; choose another place, or mend its permissions")
    return None


def temporary_name(path: Path) -> Path:
    """A hidden name beside `path` that ends in .tmp."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")


def canonical_json(content: Any) -> bytes:
    """The one JSON text of `content`: keys sorted, no white space."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
