"""The commit protocol: an artifact is written unit by unit, its manifest last. `artifact.py` says what it is.

A file is written under a temporary name beside its target, flushed, fsynced and renamed. A unit is committed
once its record exists; otherwise it is redone, and gives the same bytes. The lock of an artifact is a file beside
its folder, held by `flock`, so that the kernel frees it when its owner dies. The process may die between any two
steps: tests make it do so at the fault points (`pipeline/artifacts/faults.py`).
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hardbatch.pipeline.artifacts.artifact import MANIFEST, Artifact, FileRecord, Manifest, read_artifact
from hardbatch.pipeline.artifacts.faults import fault_point
from hardbatch.pipeline.artifacts.files import (
    canonical_json,
    fsync_path,
    make_folder,
    sha256_file,
    temporary_name,
    write_file_atomic,
)
from hardbatch.pipeline.artifacts.lock import lock
from hardbatch.pipeline.errors import ConfigError, LockedError

_NO_HARD_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


@dataclass(frozen=True, kw_only=True)
class UnitRecord:
    """A committed unit: its files and what it counted."""

    files: dict[str, FileRecord]
    counts: dict[str, Any]


class ArtifactBuilder:
    """Commits units to the artifact at `path`; made by `open_builder`, which holds the lock."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def remove_temporaries(self) -> None:
        """Removes the temporary files of writers that died; nobody may be writing."""
        for leftover in self.path.rglob(".*.tmp"):
            leftover.unlink(missing_ok=True)
            fault_point("sweep.removed")

    def committed(self, unit: str) -> bool:
        """Whether the unit is committed and its files hold the bytes that were written; reads them all."""
        record = self._read_record(unit)
        return record is not None and all(
            sha256_file(self.path / name) == file.sha256 for name, file in record.files.items()
        )

    def unit_record(self, unit: str) -> UnitRecord:
        """Returns the record of a committed unit."""
        record = self._read_record(unit)
        assert record is not None, f"unit {unit} of {self.path} is not committed"
        return record

    def finish(
        self,
        *,
        units: Sequence[str],
        stage: str,
        stage_version: int,
        domain: str,
        key: str,
        config: Mapping[str, Any],
        inputs: Mapping[str, str],
        sources: Sequence[Mapping[str, Any]] = (),
        counts: Mapping[str, Any] | None = None,
        produced_with: Mapping[str, str] | None = None,
    ) -> Artifact:
        """Writes the manifest of the files of `units`, which makes the artifact complete."""
        files: dict[str, FileRecord] = {}
        for unit in units:
            files.update(self.unit_record(unit).files)
        manifest = Manifest(
            stage=stage,
            stage_version=stage_version,
            domain=domain,
            key=key,
            config=dict(config),
            inputs=dict(inputs),
            sources=[dict(source) for source in sources],
            files=dict(sorted(files.items())),
            counts=dict(counts or {}),
            produced_with=dict(produced_with or {}),
        )
        content = asdict(manifest)
        content["digest"] = hashlib.sha256(canonical_json(content)).hexdigest()
        temporary = temporary_name(self.path / MANIFEST)
        try:
            temporary.write_bytes(json.dumps(content, indent=1, sort_keys=True).encode() + b"\n")
            fault_point("manifest.written")
            fsync_path(temporary)
            fault_point("manifest.fsynced")
            _create_if_absent(temporary, self.path / MANIFEST)
            fault_point("manifest.linked")
        finally:
            temporary.unlink(missing_ok=True)
        fault_point("manifest.unlinked")
        fsync_path(self.path)
        fault_point("manifest.folder-fsynced")
        return read_artifact(self.path)

    def _read_record(self, unit: str) -> UnitRecord | None:
        try:
            content = json.loads((self.path / "units" / f"{unit}.json").read_bytes())
            files = {name: FileRecord(**record) for name, record in content["files"].items()}
            if all((self.path / name).stat().st_size == record.bytes for name, record in files.items()):
                return UnitRecord(files=files, counts=content["counts"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            pass
        return None


@contextmanager
def open_builder(path: Path) -> Iterator[ArtifactBuilder]:
    """Locks the artifact at `path` and removes the temporary files that a dead owner left.

    Raises:
        LockedError: A live process is building it; the message says which, and since when.
        ConfigError: A file is in the way of the folder.
    """
    try:
        make_folder(path)
    except (FileExistsError, NotADirectoryError) as error:
        raise ConfigError(f"{error.filename}: is a file where a folder is needed; choose another workspace") from None
    with lock(_lock_path(path)):
        builder = ArtifactBuilder(path)
        builder.remove_temporaries()
        yield builder


def clean_up_after_crash(path: Path) -> None:
    """Removes what an owner left that was killed after it had written the manifest; its lock file shows that."""
    if _lock_path(path).exists():
        with suppress(LockedError), open_builder(path):
            pass


@dataclass(kw_only=True)
class UnitWriter:
    """The files of one unit, invisible until they are committed together; see `write_unit`."""

    artifact_path: Path
    unit: str
    counts: dict[str, Any] = field(default_factory=dict)
    _pending: dict[str, tuple[Path, int | None]] = field(default_factory=dict)

    def add_file(self, name: str, rows: int | None = None) -> Path:
        """Announces the file `name`, relative to the artifact; returns the temporary path to write it to."""
        target = self.artifact_path / name
        make_folder(target.parent)
        self._pending[name] = (temporary_name(target), rows)
        return self._pending[name][0]


@contextmanager
def write_unit(artifact_path: Path, unit: str) -> Iterator[UnitWriter]:
    """Commits the files added in its body, and the unit's record last; after an error nothing is visible.

    An earlier record is removed first, so that no record ever describes other files than those beside it.
    """
    writer = UnitWriter(artifact_path=artifact_path, unit=unit)
    record_path = artifact_path / "units" / f"{unit}.json"
    try:
        yield writer
        records = {}
        for name, (temporary, rows) in sorted(writer._pending.items()):
            fault_point("unit.written")
            fsync_path(temporary)
            fault_point("unit.fsynced")
            records[name] = FileRecord(sha256=sha256_file(temporary), bytes=temporary.stat().st_size, rows=rows)
        if record_path.exists():
            record_path.unlink()
            fsync_path(record_path.parent)
            fault_point("unit.unrecorded")
        for name, (temporary, _) in sorted(writer._pending.items()):
            os.replace(temporary, artifact_path / name)
            fault_point("unit.renamed")
        for folder in sorted({(artifact_path / name).parent for name in records}):
            fsync_path(folder)
            fault_point("unit.folder-fsynced")
        content = {"counts": writer.counts, "files": {name: asdict(record) for name, record in records.items()}}
        write_file_atomic(record_path, canonical_json(content) + b"\n")
    finally:
        for temporary, _ in writer._pending.values():
            temporary.unlink(missing_ok=True)


def _lock_path(path: Path) -> Path:
    return path.parent / f".{path.name}.lock"


def _create_if_absent(temporary: Path, path: Path) -> None:
    """Links the file `temporary` to the name `path` as well, unless a file of that name exists."""
    try:
        os.link(temporary, path)  # unlike a rename, this fails if the file exists
    except FileExistsError:
        pass
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        if not path.exists():  # nobody else can write here: this process holds the lock
            os.replace(temporary, path)
