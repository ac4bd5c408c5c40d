"""Reading artifacts: folders whose manifest is written last. `commit.py` writes them.

    <workspace>/<corpus>/<stage>/<domain>/<key>/
        manifest.json     written last and only if absent: the artifact is complete if and only if it is valid
        units/NAME.json   one record per committed unit: its files with digests, sizes and row counts
        ...               the files of the units

No timestamps: the same work gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hardbatch.pipeline.artifacts.files import as_user_error, canonical_json, sha256_file
from hardbatch.pipeline.errors import HardbatchError, IntegrityError

# Versions 1 and 2 are still read. They differ in their shards alone: those of version 2 lack the column
# `positive_slots` and the figures of negatives in the index, those of version 1 also the digests and the
# records of footers.
FORMAT_VERSION = 3
MANIFEST = "manifest.json"


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """A committed file: the digest of its bytes, its size in bytes, and its rows if it is a table or an array."""

    sha256: str
    bytes: int
    rows: int | None = None


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What an artifact is, what it was made from, and a record of each of its files."""

    stage: str
    stage_version: int
    domain: str
    key: str
    config: dict[str, Any]
    inputs: dict[str, str]
    sources: list[dict[str, Any]]
    files: dict[str, FileRecord]
    counts: dict[str, Any]
    produced_with: dict[str, str]
    format_version: int = FORMAT_VERSION


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """A complete artifact: its folder and its manifest."""

    path: Path
    manifest: Manifest

    @property
    def bytes(self) -> int:
        """The size of all its files, in bytes."""
        return sum(record.bytes for record in self.manifest.files.values())

    def files(self, folder: str) -> list[Path]:
        """Its files below `folder`, in order of name."""
        return [self.path / name for name in sorted(self.manifest.files) if name.startswith(folder + "/")]


def find_artifact(path: Path) -> Artifact | None:
    """Returns the complete artifact at `path`, or None if there is no manifest.

    The checks are cheap; `verify_artifact` reads every byte.

    Raises:
        IntegrityError: The manifest is damaged or of a newer format, or a file is missing or has another size.
    """
    manifest_path = path / MANIFEST
    try:
        raw = manifest_path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    artifact = Artifact(path=path, manifest=_parse_manifest(raw, manifest_path))
    for name, record in artifact.manifest.files.items():
        try:
            size = (path / name).stat().st_size
        except OSError:
            raise IntegrityError(_damaged(path, name, "is missing")) from None
        if size != record.bytes:
            raise IntegrityError(_damaged(path, name, f"has {size} bytes where the manifest says {record.bytes}"))
    return artifact


def read_artifact(path: Path) -> Artifact:
    """Returns the complete artifact at `path`; raises IntegrityError if it is incomplete or damaged."""
    artifact = find_artifact(path)
    if artifact is None:
        raise IntegrityError(f"{path}: no {MANIFEST} here, so the artifact is not complete; run the pipeline again")
    return artifact


def iter_artifact_paths(root: Path) -> Iterator[Path]:
    """Yields the folders at or below `root` that hold a manifest, in order of path."""
    yield from sorted(path.parent for path in root.rglob(MANIFEST))


def verify_artifact(path: Path) -> list[str]:
    """Checks every byte of the artifact at `path` against its manifest; returns a line for each fault."""
    try:
        raw = (path / MANIFEST).read_bytes()
        manifest = _parse_manifest(raw, path / MANIFEST)
    except OSError as error:
        return [f"{path / MANIFEST}: cannot be read: {error.strerror}"]
    except IntegrityError as error:
        return [str(error)]
    faults = []
    for name, record in sorted(manifest.files.items()):
        file = path / name
        if not file.is_file():
            faults.append(f"{file}: missing")
        elif file.stat().st_size != record.bytes:
            faults.append(f"{file}: {file.stat().st_size} bytes, the manifest says {record.bytes}")
        elif sha256_file(file) != record.sha256:
            faults.append(f"{file}: its bytes are not those that were written (sha256 differs)")
    folders = {path / name.split("/")[0] for name in manifest.files if "/" in name} - {path / "units"}
    for file in sorted(file for folder in folders for file in folder.rglob("*")):
        if file.is_file() and file.relative_to(path).as_posix() not in manifest.files:
            faults.append(f"{file}: not a file of this artifact")
    return faults


@contextmanager
def diagnose_damage(paths: Iterable[Path]) -> Iterator[None]:
    """If the body fails and an artifact in `paths` is damaged, raises IntegrityError instead; reads every file.

    Errors that the user can fix pass unchanged.
    """
    try:
        yield
    except HardbatchError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and as_user_error(error):
            raise
        faults = [fault for path in dict.fromkeys(paths) for fault in verify_artifact(path)]
        if faults:
            raise IntegrityError(*faults) from error
        raise


def _parse_manifest(raw: bytes, path: Path) -> Manifest:
    try:
        content = json.loads(raw)
        version = int(content["format_version"])
        if version > FORMAT_VERSION:
            raise IntegrityError(
                f"{path}: format version {version}, this hardbatch reads up to {FORMAT_VERSION}; use a newer hardbatch"
            )
        written = json.dumps(content, sort_keys=True, separators=(",", ": ")).encode()
        if not raw.endswith(b"\n}\n") or re.sub(rb"\n *", b"", raw) != written:
            # Other bytes with the same meaning, which the digest of the content does not see.
            raise IntegrityError(f"{path}: damaged (its bytes are not those that were written)")
        digest = content.pop("digest")
        if hashlib.sha256(canonical_json(content)).hexdigest() != digest:
            raise IntegrityError(
                f"{path}: damaged (its content is not what its digest says); {rebuild_advice(path.parent)}"
            )
        content["files"] = {name: FileRecord(**record) for name, record in content["files"].items()}
        if any(name.startswith("/") or ".." in name.split("/") for name in content["files"]):
            raise IntegrityError(f"{path}: names files that are not below its folder; do not use it")
        return Manifest(**content)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise IntegrityError(
            f"{path}: not a manifest of hardbatch, or damaged; {rebuild_advice(path.parent)}"
        ) from None


def _damaged(path: Path, name: str, what: str) -> str:
    return f"{path / name} {what}; {rebuild_advice(path)}"


def rebuild_advice(path: Path) -> str:
    """What to do about a damaged artifact."""
    return f"delete the folder {path} and run again to rebuild it"
