"""The plan as a person reads it: what a run would do, what it would reuse and why, and what that takes and writes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hardbatch.pipeline.artifacts.artifact import MANIFEST, find_artifact, read_artifact
from hardbatch.pipeline.errors import IntegrityError
from hardbatch.pipeline.progress import duration
from hardbatch.pipeline.rates import UNKNOWN, Estimate, estimate, read_rates
from hardbatch.pipeline.runlog import num_rows
from hardbatch.pipeline.schemas import MIXED_DOMAIN
from hardbatch.pipeline.step import Step
from hardbatch.pipeline.views.report import table


@dataclass(frozen=True, kw_only=True)
class PlannedStep:
    """What a run would do with a step, and why.

    `rows` and `bytes` are None if they are not known. `bytes` are those of the artifact if it is reused,
    otherwise those of its sources. With `rows_at_most` the rows are an upper limit, as the duplicates and
    broken rows of the sources are not known yet. `estimate` is for steps to run.
    """

    step: Step
    reused: bool
    why: str
    rows: int | None
    bytes: int | None
    rows_at_most: bool = False
    estimate: Estimate = UNKNOWN


def explain_plan(steps: Sequence[Step]) -> list[PlannedStep]:
    """For each step whether its artifact is reused, and if not, how it differs from the nearest one that exists."""
    rates = read_rates(_workspace_of(steps[0]))
    rerun: set[Path] = set()
    rows_of: dict[Path, int | None] = {}  # by artifact; an upper limit if its sources have not been read
    texts_of: dict[Path, int | None] = {}  # by artifact of stage `pairs`, likewise
    planned = []
    for step in steps:
        artifact = find_artifact(step.path)
        if artifact is not None:
            counts = artifact.manifest.counts
            rows_of[step.path] = counts["pairs"] if step.stage == "pairs" else num_rows(artifact)
            if step.stage == "pairs":
                texts_of[step.path] = counts["queries"] + counts["documents"]
            planned.append(
                PlannedStep(step=step, reused=True, why="complete", rows=rows_of[step.path], bytes=artifact.bytes)
            )
            continue

        rerun.add(step.path)
        rows = _expected_rows(step, rows_of, texts_of)
        rows_of[step.path] = rows
        if step.stage == "pairs":
            texts_of[step.path] = rows and 2 * rows
        read = [path for name, path in step.inputs.items() if name.split("/")[0] == "pairs"]
        planned.append(
            PlannedStep(
                step=step,
                reused=False,
                why=_difference(step, rerun),
                rows=rows,
                bytes=sum(source["bytes"] for source in step.sources) if step.sources else None,
                rows_at_most=step.stage != "pairs" and (not read or not rerun.isdisjoint(read)),
                estimate=estimate(rates, step, rows),
            )
        )
    return planned


def plan_text(steps: Sequence[Step], shards: Path) -> str:
    """The plan as a table for the terminal, and what is left to do in total."""
    planned = explain_plan(steps)
    header = ["stage", "domain", "", "rows", "reads", "time", "bytes", "why"]
    rows = [
        [
            item.step.stage,
            item.step.domain,
            "reuse" if item.reused else "run",
            "" if item.rows is None else f"{'≤ ' if item.rows_at_most else ''}{item.rows:,}",
            "" if item.reused or item.bytes is None else f"{item.bytes:,}",
            "" if item.estimate.seconds is None else duration(item.estimate.seconds),
            _bytes(item),
            item.why,
        ]
        for item in planned
    ]
    num_run = sum(not item.reused for item in planned)
    text = table(header, rows, left=(0, 1, 2, 7))
    counted = f"steps to run: {num_run}, reused: {len(planned) - num_run}; shards: {shards}"
    return "\n".join([text, counted, *_backends(steps), *_totals(planned)])


def _workspace_of(step: Step) -> Path:
    """The workspace's root: above corpus, stage and key, and except for the shards above the domain."""
    return step.path.parents[2 if step.stage == "shards" else 3]


def _backends(steps: Sequence[Step]) -> list[str]:
    """A line that says which library clusters, and on which device.

    FAISS comes in two builds, and nothing else shows which of them is installed.
    """
    found = []
    for step in steps:
        if step.stage == "clusters":
            backend = step.config.get("backend")
            found.append(f"FAISS ({backend})" if backend else f"torch on {step.runtime['device']}")
    return [f"clustering: {', '.join(dict.fromkeys(found))}"] if found else []


def _totals(planned: Sequence[PlannedStep]) -> list[str]:
    """Seconds left, bytes to be written, free space, and a warning if the bytes do not fit."""
    workspace = _workspace_of(planned[0].step)
    free = shutil.disk_usage(workspace).free
    to_run = [item for item in planned if not item.reused]
    known = [item.estimate for item in to_run if item.estimate.seconds is not None]
    num_bytes = sum(each.bytes or 0.0 for each in known)
    lines = []

    unknown = [item.step.domain for item in to_run if item.step.stage == "pairs" and item.rows is None]
    if unknown:
        lines.append(f"rows not known before they are read: {', '.join(unknown)} (num_pairs of a dataset gives them)")

    left = "nothing"
    if to_run and known:
        at_least = "at least " if len(known) < len(to_run) else ""
        left = f"time {at_least}{duration(sum(each.seconds or 0.0 for each in known))}, "
        left += f"to write {at_least}{size(num_bytes)}"
    elif to_run:
        left = f"unknown, {'as the rows are not known' if unknown else 'no earlier run to estimate from'}"
    lines.append(f"left: {left}; free on the workspace's disk: {size(free)}")

    if num_bytes > free:
        lines.append(
            f"warning: {size(num_bytes)} to write do not fit on the disk of {workspace}, {size(free)} are free: "
            "free some, or choose another --workspace"
        )
    return lines


def _bytes(item: PlannedStep) -> str:
    """Exact bytes of an artifact that exists; rounded after ~ if they are estimated."""
    if item.reused:
        return f"{item.bytes:,}"
    return "" if item.estimate.bytes is None else f"~ {size(item.estimate.bytes)}"


def size(num_bytes: float) -> str:
    """Bytes as a person writes them, for example `2.5 MiB`."""
    for unit, length in (("KiB", 2**10), ("MiB", 2**20), ("GiB", 2**30)):
        if num_bytes < 1_000 * length:
            return f"{num_bytes / length:.1f} {unit}" if num_bytes else "0"
    return f"{num_bytes / 2**40:,.1f} TiB"


def _expected_rows(step: Step, rows_of: dict[Path, int | None], texts_of: dict[Path, int | None]) -> int | None:
    """The rows of a step to run, given those of the steps before it; None if its sources must be read first."""
    config = step.config
    if step.stage == "pairs":
        return _source_rows(step)
    if step.stage == "vectors":
        return texts_of[step.inputs["pairs"]]
    is_mixed = (step.stage, step.domain) == ("batches", MIXED_DOMAIN)
    if is_mixed and config["compose"] == "domain":  # what is left over
        return int((config["batch_size"] - 1) * len(config["domains"]) * config["num_packings"])
    if is_mixed or step.stage == "shards":
        mixed = f"batches/{MIXED_DOMAIN}"  # holds pairs that the domains' own batches count already
        found = [rows_of[path] for name, path in step.inputs.items() if name.startswith("batches/") and name != mixed]
        known = [rows for rows in found if rows is not None]
        return sum(known) if len(known) == len(found) else None
    rows = rows_of[step.inputs["pairs"]]
    return rows and rows * int(config.get("num_packings", 1))


def _source_rows(step: Step) -> int | None:
    """Rows of the sources if they are known without reading them: from Parquet footers, or from the manifest."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    paths = [Path(step.runtime["files"][source["name"]]) for source in step.sources if source["format"] == "parquet"]
    try:
        rows: int | None = sum(pq.read_metadata(path).num_rows for path in paths if path.is_file())
    except (pa.ArrowException, OSError):
        return None  # not readable, which the run will report
    rows = rows or step.runtime["num_pairs"]
    limit: int | None = min(filter(None, (step.config["limit"], step.config["sample"])), default=None)
    return min(rows, limit) if limit and rows else rows or limit


def _difference(step: Step, rerun: set[Path]) -> str:
    """How the step differs from the most similar artifact of the same stage and domain."""
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
            f"{name} {_short(manifest.config.get(name))} → {_short(step.config.get(name))}"
            for name in {**step.config, **manifest.config}  # a key may be in one of them alone
            if manifest.config.get(name) != json.loads(json.dumps(step.config.get(name)))
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
