"""The plan as a person reads it: what a run would do, what it would reuse and why, what that takes and writes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hardbatch.pipeline.artifacts.artifact import MANIFEST, Artifact, find_artifact, read_artifact
from hardbatch.pipeline.errors import IntegrityError
from hardbatch.pipeline.rates import (
    UNKNOWN,
    Estimate,
    PairsSize,
    Rates,
    load_of,
    num_packings,
    pairs_paths,
    pairs_size,
    workspace_of,
)
from hardbatch.pipeline.step import Step
from hardbatch.pipeline.views.report import table

_START_UP_S, _START_UP_OF_MODELS_S = 2.0, 5.0  # typical, once a run: to load torch, and sentence-transformers


@dataclass(frozen=True, kw_only=True)
class PlannedStep:
    """What a run would do with a step, and why; rows and bytes where they are known.

    `bytes` are those of the artifact where it is reused, else those of its sources. `rows_at_most`: duplicates and
    broken rows of the sources are not known yet. `estimate` is of a step to run.
    """

    step: Step
    reused: bool
    why: str
    rows: int | None
    bytes: int | None
    rows_at_most: bool = False
    estimate: Estimate = UNKNOWN


def explain_plan(steps: Sequence[Step]) -> list[PlannedStep]:
    """For each step whether its artifact is reused, and if not, what differs from the nearest one that is there."""
    rerun: set[Path] = set()
    planned = []
    rates = Rates(workspace_of(steps[0]))
    config_of = {step.path: step.config for step in steps}.__getitem__
    sizes: dict[Path, PairsSize | None] = {}  # of each `pairs` step, as it is or at most
    for step in steps:
        artifact = find_artifact(step.path)
        if artifact is not None:
            if step.stage == "pairs":
                sizes[step.path] = pairs_size(artifact)
            rows = _artifact_rows(artifact)
            planned.append(PlannedStep(step=step, reused=True, why="complete", rows=rows, bytes=artifact.bytes))
            continue
        rerun.add(step.path)
        if step.stage == "pairs":
            sizes[step.path] = _expected_pairs(step, rates)
        found = [sizes[path] for path in pairs_paths(step)]
        known = [size for size in found if size is not None]
        load = load_of(step, known, num_packings(step, config_of)) if len(known) == len(found) else None
        planned.append(
            PlannedStep(
                step=step,
                reused=False,
                why=_difference(step, rerun),
                rows=load.rows if load else None,
                bytes=_source_bytes(step),
                rows_at_most=step.stage != "pairs" and (not found or not rerun.isdisjoint(pairs_paths(step))),
                estimate=rates.estimate(step, load) if load else UNKNOWN,
            )
        )
    return planned


def plan_text(steps: Sequence[Step], shards: Path) -> str:
    """The plan as a table for the terminal, and what is left to do in all."""
    planned = explain_plan(steps)
    header = ["stage", "domain", "", "rows", "reads", "time", "bytes", "rates", "why"]
    rows = [
        [
            item.step.stage,
            item.step.domain,
            "reuse" if item.reused else "run",
            "" if item.rows is None else f"{'≤ ' if item.rows_at_most else ''}{item.rows:,}",
            "" if item.reused or item.bytes is None else f"{item.bytes:,}",
            "" if item.estimate.seconds is None else _duration(item.estimate.seconds),
            _bytes(item),
            item.estimate.source,
            item.why,
        ]
        for item in planned
    ]
    num_run = sum(not item.reused for item in planned)
    text = table(header, rows, left=(0, 1, 2, 7, 8))
    counted = f"steps to run: {num_run}, reused: {len(planned) - num_run}; shards: {shards}"
    return "\n".join([text, counted, *_backends(steps), *_totals(planned)])


def _backends(steps: Sequence[Step]) -> list[str]:
    """A line that says which library clusters, and on which device.

    FAISS comes in two builds, and which of them is installed does not show otherwise.
    """
    found = []
    for step in steps:
        if step.stage == "clusters":
            backend = step.config.get("backend")
            found.append(f"FAISS ({backend})" if backend else f"torch on {step.runtime['device']}")
    return [f"clustering: {', '.join(dict.fromkeys(found))}"] if found else []


def _totals(planned: Sequence[PlannedStep]) -> list[str]:
    """Seconds left, bytes to be written, free space; a warning where the bytes do not fit."""
    workspace = workspace_of(planned[0].step)
    free = shutil.disk_usage(workspace).free
    to_run = [item for item in planned if not item.reused]
    seconds = [item.estimate.seconds for item in to_run if item.estimate.seconds is not None]
    num_bytes = [item.estimate.bytes for item in to_run if item.estimate.bytes is not None]
    left = "nothing"
    if to_run:
        of_models = any(item.step.stage == "vectors" and item.step.config["name"] != "lexical" for item in to_run)
        start_up_s = _START_UP_OF_MODELS_S if of_models else _START_UP_S
        time = _at_least(_duration(sum(seconds) + start_up_s), len(seconds), len(to_run))
        left = f"time {time}, to write {_at_least(_size(sum(num_bytes)), len(num_bytes), len(to_run))}"
    lines = [f"left: {left}; free on the workspace's disk: {_size(free)}"]
    unknown = [item.step.domain for item in to_run if item.step.stage == "pairs" and item.rows is None]
    if unknown:
        lines.insert(
            0, f"rows not known before they are read: {', '.join(unknown)} (num_pairs of a dataset tells them)"
        )
    if sum(num_bytes) > free:
        lines.append(
            f"warning: {_size(sum(num_bytes))} to write do not fit on the disk of {workspace}, {_size(free)} are free: "
            "free some, or choose another --workspace"
        )
    return lines


def _at_least(total: str, num_known: int, num_steps: int) -> str:
    return total if num_known == num_steps else f"at least {total}" if num_known else "unknown"


def _bytes(item: PlannedStep) -> str:
    """Bytes of an artifact to the byte where it is there, rounded after ~ where they are estimated."""
    if item.reused:
        return f"{item.bytes:,}"
    return "" if item.estimate.bytes is None else f"~ {_size(item.estimate.bytes)}"


def _duration(seconds: float) -> str:
    for unit, length, limit in (("s", 1, 100), ("min", 60, 100), ("h", 3_600, 48)):
        if seconds / length < limit:
            digits = 1 if unit == "h" else 0
            return f"{seconds / length:.{digits}f} {unit}" if seconds >= 0.5 else "< 1 s"
    return f"{seconds / 86_400:,.1f} d"


def _size(num_bytes: float) -> str:
    for unit, length in (("KiB", 2**10), ("MiB", 2**20), ("GiB", 2**30)):
        if num_bytes < 1_000 * length:
            return f"{num_bytes / length:.1f} {unit}" if num_bytes else "0"
    return f"{num_bytes / 2**40:,.1f} TiB"


def _expected_pairs(step: Step, rates: Rates) -> PairsSize | None:
    """The size at most of a `pairs` step to run: no duplicates, no broken rows; None where its rows are not known."""
    rows = _source_rows(step)
    if rows is None:
        return None
    size = PairsSize(rows=rows, pairs=rows, texts=2 * rows, bytes=None)
    return replace(size, bytes=rates.estimate(step, load_of(step, [size])).bytes)


def _artifact_rows(artifact: Artifact) -> int | None:
    """Pairs of an artifact, or texts where it holds vectors."""
    counts = artifact.manifest.counts
    if artifact.manifest.stage == "vectors":
        return int(counts["queries"] + counts["documents"])
    if artifact.manifest.stage == "shards":
        return int(counts["batches"] * counts["batch_size"])
    if artifact.manifest.stage == "batches":
        return int(counts["pairs"] * counts.get("packings", 1))
    return counts.get("pairs")


def _source_rows(step: Step) -> int | None:
    """Rows of the sources where they can be told without reading: from Parquet footers, or from the manifest."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    paths = [Path(step.runtime["files"][source["name"]]) for source in step.sources if source["format"] == "parquet"]
    try:
        rows: int | None = sum(pq.read_metadata(path).num_rows for path in paths if path.is_file())
    except (pa.ArrowException, OSError):
        return None  # not readable: the run will tell
    rows = rows or step.runtime["num_pairs"]
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
