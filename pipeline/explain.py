"""The plan as a person reads it: what a run would do, what it would reuse, and why."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.artifact import MANIFEST, Artifact, find_artifact, read_artifact
from pipeline.errors import IntegrityError
from pipeline.report import table
from pipeline.step import Step


@dataclass(frozen=True, kw_only=True)
class PlannedStep:
    """What a run would do with a step, and why; rows and bytes where they are known."""

    step: Step
    reused: bool
    why: str
    rows: int | None
    bytes: int | None


def explain_plan(steps: Sequence[Step]) -> list[PlannedStep]:
    """For each step whether its artifact is reused, and if not, what differs from the nearest one that is there."""
    rerun: set[Path] = set()
    planned = []
    for step in steps:
        artifact = find_artifact(step.path)
        if artifact is not None:
            rows = _artifact_rows(artifact)
            planned.append(PlannedStep(step=step, reused=True, why="complete", rows=rows, bytes=artifact.bytes))
            continue
        rerun.add(step.path)
        rows_known = _source_rows(step) if step.stage == "pairs" else None
        planned.append(
            PlannedStep(
                step=step,
                reused=False,
                why=_difference(step, rerun),
                rows=rows_known,
                bytes=_source_bytes(step),
            )
        )
    return planned


def plan_text(steps: Sequence[Step], shards: Path) -> str:
    """The plan as a table for the terminal."""
    planned = explain_plan(steps)
    header = ["stage", "domain", "", "rows", "bytes", "why"]
    rows = [
        [
            item.step.stage,
            item.step.domain,
            "reuse" if item.reused else "run",
            "" if item.rows is None else f"{item.rows:,}",
            "" if item.bytes is None else f"{item.bytes:,}",
            item.why,
        ]
        for item in planned
    ]
    num_run = sum(not item.reused for item in planned)
    text = table(header, rows, left=(0, 1, 2, 5))
    return f"{text}\nsteps to run: {num_run}, reused: {len(planned) - num_run}; shards: {shards}"


def _artifact_rows(artifact: Artifact) -> int | None:
    """Pairs of an artifact, or texts where it holds vectors."""
    counts = artifact.manifest.counts
    if artifact.manifest.stage == "vectors":
        return int(counts["queries"] + counts["documents"])
    if artifact.manifest.stage == "shards":
        return int(counts["batches"] * counts["batch_size"])
    return counts.get("pairs")


def _source_rows(step: Step) -> int | None:
    """Rows of the sources where they can be told without reading: from Parquet footers, or from the manifest."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    paths = [Path(step.local["files"][source["name"]]) for source in step.sources if source["format"] == "parquet"]
    try:
        rows: int | None = sum(pq.read_metadata(path).num_rows for path in paths if path.is_file())
    except (pa.ArrowException, OSError):
        return None  # not readable: the run will tell
    rows = rows or step.local["num_pairs"]
    limit: int | None = step.config["limit"]
    return min(rows, limit) if limit and rows else rows or limit


def _source_bytes(step: Step) -> int | None:
    return sum(source["bytes"] for source in step.sources) if step.sources else None


def _difference(step: Step, rerun: set[Path]) -> str:
    """How the step differs from the artifact of the same stage and domain that differs least."""
    stale = [name for name, path in step.inputs.items() if path in rerun]
    if stale:
        return f"needs {stale[0].replace('/', ' of ')}"
    differences: list[list[str]] = []
    for path in sorted(step.path.parent.glob(f"*/{MANIFEST}")):
        try:
            manifest = read_artifact(path.parent).manifest
        except IntegrityError:
            continue  # damaged: nothing to compare with
        changed = [
            f"{name} {_short(manifest.config.get(name))} → {_short(value)}"
            for name, value in step.config.items()
            if manifest.config.get(name) != json.loads(json.dumps(value))
        ]
        if manifest.sources != [dict(source) for source in step.sources]:
            changed.append("source files differ")
        if manifest.inputs != {name: path.name for name, path in step.inputs.items()}:
            changed.append("other inputs")
        if manifest.stage_version != step.stage_version:
            changed.append(f"stage version {manifest.stage_version} → {step.stage_version}")
        differences.append(changed)
    if not differences:
        return "not made yet"
    return "; ".join(sorted(differences, key=len)[0]) or "not made yet"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."
