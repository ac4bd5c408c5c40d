"""logtable: the run log of `runlog.py` as a person reads it: a line per stage and domain, totals, how the run ended."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from hardbatch.pipeline.errors import InputError, IntegrityError
from hardbatch.pipeline.runlog import LOG_FORMAT, LOGS
from hardbatch.pipeline.views.report import table

_LINE_BYTES = 2**20  # no record is as long
_EVENTS = ("begin", "unit", "finished", "failed", "reused", "end")


@dataclass(kw_only=True)
class MadeStep:
    """What a run did of one step; `state` is empty once the artifact is complete."""

    stage: str
    domain: str
    units: int = 0
    rows: int = 0
    seconds: float = 0.0
    bytes: int = 0
    peak_rss_mib: float = 0.0
    state: str = "not finished"


@dataclass(kw_only=True)
class LoggedRun:
    """A run as its log tells it. `ended` is the last record of a run that was not killed."""

    head: dict[str, Any]
    steps: dict[tuple[str, str], MadeStep] = field(default_factory=dict)
    num_reused: int = 0
    last_time: str = ""
    ended: dict[str, Any] | None = None
    torn_lines: int = 0


def find_log(path: Path) -> Path:
    """The log at `path`; of a folder of logs, a corpus or a workspace the newest. Raises InputError where none is."""
    if not path.is_dir():
        return path
    folders = [path] if path.name == LOGS else [*path.glob(LOGS), *path.glob(f"*/{LOGS}")]
    found = [file for folder in folders for file in folder.glob("*.jsonl")]
    if not found:
        raise InputError(
            f"--log {path}: no run log here; give a .jsonl file of the folder '{LOGS}' beside the artifacts"
        )
    return max(found, key=lambda file: file.name)  # names begin with the time


def read_log(path: Path) -> LoggedRun:
    """Reads a run log; a line that a kill tore is left out and counted.

    Raises InputError where it is no run log, IntegrityError where it is of a newer format.
    """
    try:
        with path.open("rb") as file:
            run = LoggedRun(head=_read_head(path, file))
            while line := file.readline(_LINE_BYTES):
                record = _parse(line)
                if record.get("event") not in _EVENTS or not _take(run, record):
                    run.torn_lines += 1
    except OSError as error:
        raise InputError(f"--log {path}: cannot be read: {error.strerror}") from None
    return run


def log_text(path: Path) -> str:
    """The stage table of the log at `path`, a file or a folder that holds some, and how that run ended."""
    path = find_log(path)
    run = read_log(path)
    made = list(run.steps.values())
    header = ["stage", "domain", "units", "rows", "seconds", "rows/s", "bytes", "peak RSS MiB", ""]
    rows = [_row(step) for step in made]
    total = MadeStep(
        stage="all",
        domain="",
        units=sum(step.units for step in made),
        seconds=sum(step.seconds for step in made),
        bytes=sum(step.bytes for step in made),
        peak_rss_mib=max((step.peak_rss_mib for step in made), default=0.0),
        state="",
    )
    lines = [
        f"{path}: {run.head.get('command', '')}, begun {run.head.get('time', '')}",
        table(header, [*rows, _row(total)], left=(0, 1, 8)),
        f"steps run: {sum(not step.state for step in made)}, reused: {run.num_reused}",
        _ending(run),
    ]
    if run.torn_lines:
        lines.append(f"lines that cannot be read, left out: {run.torn_lines}")
    return "\n".join(lines)


def _row(step: MadeStep) -> list[str]:
    rate = f"{step.rows / step.seconds:,.0f}" if step.rows and step.seconds > 0 else ""
    return [
        step.stage,
        step.domain,
        f"{step.units:,}",
        f"{step.rows:,}" if step.rows else "",
        f"{step.seconds:,.1f}",
        rate,
        f"{step.bytes:,}",
        f"{step.peak_rss_mib:,.0f}" if step.peak_rss_mib else "",
        step.state,
    ]


def _ending(run: LoggedRun) -> str:
    if run.ended is None:
        return f"no end: killed, or still running; last line at {run.last_time}"
    code, seconds = run.ended.get("exit_code"), run.ended.get("seconds")
    if code == 0:
        return f"done at {run.last_time}, after {seconds} s"
    return f"ended at {run.last_time}, after {seconds} s, with exit code {code}: {run.ended.get('line')}"


def _read_head(path: Path, file: BinaryIO) -> dict[str, Any]:
    line = file.readline(_LINE_BYTES)
    head = _parse(line)
    if not line:
        raise InputError(f"--log {path}: is empty; give a run log in which a line was written")
    if head.get("event") != "run" or not isinstance(head.get("format"), int):
        raise InputError(f"--log {path}: is no run log of hardbatch, or was cut off in its first line")
    if head["format"] > LOG_FORMAT:
        raise IntegrityError(
            f"--log {path}: format version {head['format']}, this hardbatch reads up to {LOG_FORMAT}; "
            "use a newer hardbatch"
        )
    return head


def _parse(line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def _take(run: LoggedRun, record: Mapping[str, Any]) -> bool:
    """Adds a record to the run; False where it is none of ours."""
    try:
        run.last_time = str(record["time"])
        event = record["event"]
        if event == "end":
            run.ended = dict(record)
            return True
        run.ended = None  # another process of the run goes on
        if event == "reused":
            run.num_reused += 1
            return True
        stage, domain = str(record["stage"]), str(record["domain"])
        step = run.steps.setdefault((stage, domain), MadeStep(stage=stage, domain=domain))
        if event == "unit":
            _add_unit(step, record)
        elif event == "finished":
            step.seconds, step.state = float(record["seconds"]), ""
        elif event == "failed":
            step.state = f"failed, exit code {int(record['exit_code'])}"
    except (KeyError, TypeError, ValueError):
        return False
    return True


def _add_unit(step: MadeStep, record: Mapping[str, Any]) -> None:
    rows, seconds, num_bytes = int(record["rows"] or 0), float(record["seconds"]), int(record["bytes"])
    step.units += 1
    step.rows += rows
    step.seconds += seconds
    step.bytes += num_bytes
    step.peak_rss_mib = max(step.peak_rss_mib, float(record["peak_rss_mib"] or 0.0))
