"""The artifacts of a workspace as a person reads them, and which of them may go."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from hardbatch.pipeline.progress import duration
from hardbatch.pipeline.views.plan import size
from hardbatch.pipeline.views.report import table
from hardbatch.pipeline.workspace import StoredArtifact, delete_artifacts, list_artifacts

_EXPLAINED = (
    "latest: shards of the latest run of the corpus; needed: what they were made from; newer, unfinished: made since; "
    "unused: the rest, which `hardbatch gc` deletes"
)


def list_text(workspace: Path) -> str:
    """The artifacts of a workspace as a table, with their sum."""
    artifacts = list_artifacts(workspace)
    return "\n".join([_table(artifacts), _sum(artifacts), _EXPLAINED])


def collect_garbage(workspace: Path, *, delete: bool) -> str:
    """Finds the artifacts that no latest run needs, and deletes them if `delete` is set; returns what to print.

    Raises:
        InputError: `workspace` holds no corpus.
        LockedError: A run is writing one of the artifacts.
    """
    unused = [artifact for artifact in list_artifacts(workspace) if artifact.state == "unused"]
    if not unused:
        return "nothing to delete: the latest run of each corpus needs every artifact, or it is newer than that run"
    if delete:
        delete_artifacts(unused)
    done = "deleted" if delete else "would be deleted; nothing is yet, add --delete to do it"
    return f"{_table(unused)}\n{_sum(unused)} {done}"


def _table(artifacts: Sequence[StoredArtifact]) -> str:
    now = time.time()
    rows = [
        [
            artifact.corpus,
            artifact.stage,
            artifact.domain,
            artifact.path.name,
            size(artifact.num_bytes),
            duration(max(0.0, now - artifact.modified_s)),
            artifact.state,
        ]
        for artifact in artifacts
    ]
    return table(["corpus", "stage", "domain", "key", "size", "age", "state"], rows, left=(0, 1, 2, 3, 6))


def _sum(artifacts: Sequence[StoredArtifact]) -> str:
    return f"{len(artifacts):,} artifacts, {size(sum(artifact.num_bytes for artifact in artifacts))}"
