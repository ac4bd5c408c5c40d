"""What a run made, as an object for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hardbatch.pipeline.artifacts.artifact import read_artifact
from hardbatch.pipeline.views.report import summary_text


def run_result(shards: Path, *, num_run: int, num_reused: int, log: Path | None) -> dict[str, Any]:
    """The result of a run; every value is of JSON.

    Args:
        shards: The folder of the shards.
        num_run: Number of steps that were run.
        num_reused: Number of steps whose artifact was complete already.
        log: The run log, or None if none was written.
    """
    artifact = read_artifact(shards)
    return {
        "shards": str(shards),
        "corpus": artifact.manifest.domain,
        "steps_run": num_run,
        "steps_reused": num_reused,
        "log": None if log is None else str(log),
        "warnings": [line for line in summary_text(shards).split("\n") if line.startswith("warning: ")],
        **artifact.manifest.counts,
    }
