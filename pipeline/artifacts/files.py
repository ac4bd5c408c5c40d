"""Writing and digesting single files.

A file is written under a temporary name beside its target, flushed, fsynced and renamed, so a reader sees all of it
or nothing. Between these steps are fault points (`pipeline/artifacts/faults.py`), where tests kill the process or
make a step fail.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from stat import S_ISREG
from typing import Any

from hardbatch.pipeline.artifacts.faults import fault_point
from hardbatch.pipeline.artifacts.lock import lock
from hardbatch.pipeline.errors import ConfigError, DiskError, HardbatchError, InputError, LockedError, NoSpaceError

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_NO_ACCESS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)
DIGESTS = ".digests.json"  # in the root of a workspace; may be deleted
_CACHES_LOCK = ".caches.lock"


def content_key(**parts: Any) -> str:
    """A short hash of what an artifact is made from: 16 hex digits of the SHA-256 of the parts as canonical JSON."""
    return hashlib.sha256(canonical_json(parts)).hexdigest()[:16]


def write_file_atomic(path: Path, data: bytes) -> None:
    """Writes `data` to `path` so that a reader sees either the old bytes or the new ones, never a part."""
    make_folder(path.parent)
    temporary = temporary_name(path)
    try:
        temporary.write_bytes(data)
        fault_point("file.written")
        fsync_path(temporary)
        fault_point("file.fsynced")
        os.replace(temporary, path)
        fault_point("file.renamed")
        fsync_path(path.parent)
        fault_point("file.folder-fsynced")
    finally:
        temporary.unlink(missing_ok=True)


def make_folder(path: Path) -> None:
    """Makes a folder and its missing parents durably: they survive a crash of the machine."""
    if path.is_dir():
        return
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    fault_point("folder.made")
    for folder in missing:
        fsync_path(folder.parent)


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
    """SHA-256 of the bytes of a file outside the byte ranges (offset, length), in the file's order.

    Together with the digests of the ranges it covers the whole file. If the ranges are the row groups of a Parquet
    file, the bytes outside are the magic bytes at the start and the footer.
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


def write_cache(path: Path, data: bytes) -> None:
    """Writes a cache of a workspace. If several processes try at the same time, one of them does."""
    with suppress(LockedError), _caches_locked(path.parent):  # the next run computes again what was not written
        write_file_atomic(path, data)


def sweep_caches(workspace: Path) -> None:
    """Removes what a run that was killed while it wrote a cache left in `workspace`; touches nothing otherwise."""
    if (workspace / _CACHES_LOCK).exists():
        with suppress(LockedError), _caches_locked(workspace):
            pass


@contextmanager
def _caches_locked(workspace: Path) -> Iterator[None]:
    with lock(workspace / _CACHES_LOCK):
        for leftover in list(workspace.glob(f".{DIGESTS}.*.tmp")):
            leftover.unlink(missing_ok=True)
        yield


class DigestCache:
    """Digests of local files by (path, size, mtime), kept in one JSON file: a file is read again only if it changes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._changed = False
        self._entries: dict[str, tuple[int, int, str]] = {}
        try:
            for name, (size, mtime, digest) in json.loads(path.read_bytes()).items():
                self._entries[name] = (int(size), int(mtime), str(digest))
        except (OSError, ValueError, TypeError, AttributeError, RecursionError):
            self._entries = {}  # absent or damaged, which is harmless for a cache

    def digest(self, path: Path) -> str:
        """SHA-256 of the file at `path`; raises InputError if it cannot be read."""
        name = str(path.absolute())
        try:
            stat = path.stat()
            if not S_ISREG(stat.st_mode):
                raise InputError(f"{path}: is not a regular file but a pipe, a device or a folder; give a file")
            known = self._entries.get(name)
            if known is None or known[:2] != (stat.st_size, stat.st_mtime_ns):
                known = (stat.st_size, stat.st_mtime_ns, sha256_file(path))
                self._entries[name] = known
                self._changed = True
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror}") from None
        return known[2]

    def save(self) -> None:
        """Writes the entries back if one is new."""
        if self._changed:
            write_cache(self._path, canonical_json(self._entries))
            self._changed = False


def as_user_error(error: OSError) -> HardbatchError | None:
    """Returns what an OSError means to the user: a full or failing disk, or a place that cannot be written.

    None if the user cannot fix it.
    """
    if error.errno == errno.EFBIG:
        name = error.filename or "a file"
        return NoSpaceError(f"{name} exceeds the limit on file sizes here; raise it (ulimit -f) and run again")
    if error.errno in _NO_SPACE:
        where = f" while writing {error.filename}" if error.filename else ""
        return NoSpaceError(f"no space left{where}; free some and run the same command again: it continues from there")
    if error.errno in _NO_ACCESS:
        return ConfigError(f"{error.filename}: {error.strerror}; choose another place, or fix its permissions")
    if error.errno == errno.EIO:
        where = f"{error.filename}: " if error.filename else ""
        return DiskError(
            f"{where}the disk failed to read or write (input/output error); committed work stays: check the disk, "
            "then run the same command again"
        )
    return None


def user_path(path: str | Path) -> Path:
    """A path that a user gave, with the home folder in place of ~, which a shell leaves alone after `--option=`."""
    try:
        return Path(path).expanduser()
    except RuntimeError:  # the home of a user that does not exist
        return Path(path)


def temporary_name(path: Path) -> Path:
    """A hidden name beside `path` that ends in `.tmp`."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")


def canonical_json(content: Any) -> bytes:
    """The canonical JSON of `content`: keys sorted, no white space."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
