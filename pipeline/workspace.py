"""What is in a workspace: its artifacts, which of them the latest run needs, and deleting the others.

    <workspace>/<corpus>/latest -> shards/<key>     a link to the shards of the latest run

A manifest names the keys of the inputs of its artifact, so what a run needs is found by following them from its shards.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from hardbatch.pipeline.artifacts.artifact import MANIFEST, read_artifact
from hardbatch.pipeline.artifacts.commit import open_builder
from hardbatch.pipeline.artifacts.lock import lock
from hardbatch.pipeline.errors import InputError, IntegrityError
from hardbatch.pipeline.planner import VERSIONS

LATEST = "latest"
SHARDS = "shards"
_STAGES = tuple(VERSIONS)
_KEY = re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True, kw_only=True)
class StoredArtifact:
    """An artifact of a workspace, complete or not.

    Attributes:
        path: Its folder.
        corpus: The name of its corpus.
        stage: The stage that made it.
        domain: Its domain; for shards the corpus.
        state: `latest` for the shards of the latest run of the corpus, `needed` for what these were made from,
            `newer` for what was made after that run, `unfinished` for what has no valid manifest but is newer, and
            `unused` for the rest.
        num_bytes: The bytes of its files.
        modified_s: When it was last written to, in seconds since 1970.
    """

    path: Path
    corpus: str
    stage: str
    domain: str
    state: str
    num_bytes: int
    modified_s: float


def point_latest_at(shards: Path) -> None:
    """Makes the link `latest` of a corpus lead to its folder `shards`, unless it does already.

    It is a convenience, so a filesystem without links is not an error, and neither is a folder in its place, which
    a copy of the workspace may have.
    """
    link = shards.parents[1] / LATEST
    target = Path(shards.parent.name, shards.name)
    temporary = link.with_name(f".{LATEST}.tmp")
    with suppress(OSError):
        if link.readlink() == target if link.is_symlink() else link.exists():
            return
        temporary.unlink(missing_ok=True)  # of a run that was killed here
        temporary.symlink_to(target)
        os.replace(temporary, link)


def list_artifacts(workspace: Path) -> list[StoredArtifact]:
    """Lists the artifacts of a workspace, or of the folder of one corpus.

    They come by corpus, stage and domain, the oldest first.

    Raises:
        InputError: `workspace` is not a folder, or holds no corpus.
    """
    if not workspace.is_dir():
        raise InputError(f"{workspace}: no such folder; give a workspace, the folder that `hardbatch run` writes to")
    corpora = [folder for folder in (workspace, *sorted(workspace.iterdir())) if (folder / _STAGES[0]).is_dir()]
    if not corpora:
        raise InputError(f"{workspace}: holds no corpus; give a workspace, the folder that `hardbatch run` writes to")
    listed = {corpus: _list_corpus(corpus) for corpus in corpora}
    # The folder of a corpus named `pairs` looks like the stage of a corpus, so `workspace` counts last.
    if any(found for corpus, found in listed.items() if corpus != workspace):
        listed.pop(workspace, None)
    return [artifact for found in listed.values() for artifact in found]


def delete_artifacts(artifacts: Sequence[StoredArtifact]) -> None:
    """Deletes artifacts, the manifest of each one first, so that none ever looks complete without being so.

    Raises:
        LockedError: A run is writing to one of their corpora; nothing is deleted.
    """
    # A run may be about to read an artifact that nothing needed before.
    for artifact in artifacts:
        for path in _corpus_of(artifact).rglob(".*.lock"):
            with lock(path):
                pass

    for artifact in artifacts:
        with open_builder(artifact.path):
            (artifact.path / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(artifact.path)
        with suppress(OSError):  # the folder of the domain is not empty
            artifact.path.parent.rmdir()


def _corpus_of(artifact: StoredArtifact) -> Path:
    return artifact.path.parents[1 if artifact.stage == SHARDS else 2]


def _list_corpus(corpus: Path) -> list[StoredArtifact]:
    found = [
        (stage, path)
        for stage in _STAGES
        for path in (corpus / stage).glob("*" if stage == SHARDS else "*/*")
        if _KEY.fullmatch(path.name) and path.is_dir()
    ]
    inputs = {path.name: _inputs(path) for _, path in found}
    shards = [path for stage, path in found if stage == SHARDS and inputs[path.name] is not None]
    latest, since_s = _latest(corpus, shards)
    needed = _reachable(latest.name, inputs) if latest else set()

    artifacts = []
    for stage, path in found:
        files = [file.stat() for file in path.rglob("*") if file.is_file()]
        modified_s = max((file.st_mtime for file in files), default=path.stat().st_mtime)
        if path.name in needed:
            state = "latest" if path == latest else "needed"
        elif modified_s > since_s:
            state = "unfinished" if inputs[path.name] is None else "newer"
        else:
            state = "unused"
        artifacts.append(
            StoredArtifact(
                path=path,
                corpus=corpus.name,
                stage=stage,
                domain=corpus.name if stage == SHARDS else path.parent.name,
                state=state,
                num_bytes=sum(file.st_size for file in files),
                modified_s=modified_s,
            )
        )
    return sorted(artifacts, key=lambda item: (_STAGES.index(item.stage), item.domain, item.modified_s, item.path))


def _latest(corpus: Path, shards: Sequence[Path]) -> tuple[Path | None, float]:
    """The shards of the latest run and when it ended: by the link, or without one the newest shards."""
    link = corpus / LATEST
    if link.is_symlink():
        for path in shards:
            if path.name == link.readlink().name:
                return path, link.lstat().st_mtime
    ended = {path: (path / MANIFEST).stat().st_mtime for path in shards}
    newest = max(shards, key=lambda path: (ended[path], path.name), default=None)
    return newest, ended[newest] if newest else float("-inf")


def _inputs(path: Path) -> list[str] | None:
    """The keys of the inputs of an artifact; None if it is not complete."""
    try:
        return list(read_artifact(path).manifest.inputs.values())
    except IntegrityError:
        return None


def _reachable(key: str, inputs: dict[str, list[str] | None]) -> set[str]:
    """The keys of an artifact and of all that it was made from."""
    found: set[str] = set()
    waiting = [key]
    while waiting:
        key = waiting.pop()
        if key not in found:
            found.add(key)
            waiting += inputs.get(key) or []
    return found
