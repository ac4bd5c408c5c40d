"""A run log as a person reads it: a line per stage and domain, totals, and how the run ended."""

from __future__ import annotations

from pathlib import Path

from hardbatch.pipeline.errors import InputError
from hardbatch.pipeline.runlog import LOGS, LoggedRun, LoggedStep, list_logs, read_log
from hardbatch.pipeline.views.report import table


def find_log(path: Path) -> Path:
    """The log at `path`, or the newest one if `path` is a folder of logs, a corpus or a workspace.

    Raises:
        InputError: The folder holds no log.
    """
    if not path.is_dir():
        return path
    found = list_logs(path)
    if not found:
        raise InputError(
            f"--log {path}: no run log here; give a .jsonl file of the folder '{LOGS}' beside the artifacts"
        )
    return found[-1]


def log_text(path: Path) -> str:
    """The table of the steps that a run made, and how that run ended.

    Args:
        path: A log, or a folder that holds some, of which the newest is shown.
    """
    path = find_log(path)
    run = read_log(path)
    steps = list(run.steps.values())
    total = LoggedStep(
        stage="all",
        domain="",
        seconds=sum(step.seconds for step in steps),
        bytes=sum(step.bytes for step in steps),
        peak_rss_mib=max((step.peak_rss_mib for step in steps), default=0.0),
    )
    header = ["stage", "domain", "rows", "seconds", "rows/s", "bytes", "peak RSS MiB", ""]
    lines = [
        f"{path}: {run.head.get('command', '')}, begun {run.head.get('time', '')}",
        table(header, [_row(step) for step in [*steps, total]], left=(0, 1, 7)),
        f"steps run: {sum(not step.failure for step in steps)}, reused: {run.num_reused}",
        *(line for step in steps for line in step.warnings),
        _ending(run),
    ]
    if run.torn_lines:
        lines.append(f"lines that cannot be read, left out: {run.torn_lines}")
    return "\n".join(lines)


def _row(step: LoggedStep) -> list[str]:
    rate = f"{step.rows / step.seconds:,.0f}" if step.rows and step.seconds > 0 else ""
    return [
        step.stage,
        step.domain,
        f"{step.rows:,}" if step.rows else "",
        f"{step.seconds:,.1f}",
        rate,
        f"{step.bytes:,}",
        f"{step.peak_rss_mib:,.0f}" if step.peak_rss_mib else "",
        step.failure,
    ]


def _ending(run: LoggedRun) -> str:
    if run.ended is None:
        return f"no end: killed, or still running; last line at {run.last_time}"
    code, seconds = run.ended.get("exit_code"), run.ended.get("seconds")
    if code == 0:
        return f"done at {run.last_time}, after {seconds} s"
    return f"ended at {run.last_time}, after {seconds} s, with exit code {code}: {run.ended.get('line')}"
