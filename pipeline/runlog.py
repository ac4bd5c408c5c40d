"""runlog: what a run did, and when. A JSON line for each step, beside the artifacts, never in them.

    <workspace>/<corpus>/logs/<UTC time>-<pid>.jsonl

The file begins with the first step that is made: a run that makes nothing writes nothing. Lines are
appended whole and under a lock, so that several processes may write to one log; a kill loses at most the
line that is being written. `rates.py` estimates from these logs and `views/log.py` shows one.
"""

from __future__ import annotations

import errno
import fcntl
import importlib.metadata
import json
import os
import platform
import shlex
import signal
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hardbatch.pipeline.artifacts.artifact import Artifact, read_artifact
from hardbatch.pipeline.artifacts.files import as_user_error, sha256_file
from hardbatch.pipeline.errors import HardbatchError, InputError, IntegrityError, LeavingError
from hardbatch.pipeline.step import Step

LOG_FORMAT = 1
LOGS = "logs"
_LIBRARIES = (
    "hardbatch", "numpy", "pyarrow", "scipy", "scikit-learn", "torch", "sentence-transformers", "transformers",
    "faiss-cpu", "faiss-gpu-cu12", "prefect",
)  # fmt: skip
_SPEED_SETTINGS = {  # the settings that the speed of a stage depends on most
    "answers": ("near_copies",),
    "vectors": ("name", "device", "dtype"),
    "clusters": ("method", "device", "backend"),
    "batches": ("order", "device"),
}
_LINE_BYTES = 2**20  # no record is this long


def kind_of(step: Step) -> str:
    """The stage of a step and the settings that its speed depends on: steps of one kind can be compared."""
    names = _SPEED_SETTINGS.get(step.stage, ())
    return " ".join([step.stage, *(str(step.config[name]) for name in names if name in step.config)])


def num_rows(artifact: Artifact) -> int | None:
    """What the seconds of a step grow with: source rows of `pairs`, texts of `vectors`, otherwise pairs."""
    counts = artifact.manifest.counts
    match artifact.manifest.stage:
        case "pairs":
            return int(counts["rows"])
        case "vectors":
            return int(counts["queries"] + counts["documents"])
        case "batches":
            return int(counts["pairs"] * counts.get("packings", 1))
        case "shards":
            return int(counts["batches"] * counts["batch_size"])
        case _:
            return counts.get("pairs")


@dataclass(kw_only=True)
class RunLog:
    """Writes the log of one run to `path`; with `path=None` it writes nothing. Picklable.

    `head` is what the first record says about the run. If the log cannot be written, one warning goes to
    standard error and the run continues: the artifacts alone decide what is done.
    """

    path: Path | None = None
    head: Mapping[str, Any] = field(default_factory=dict)
    _waiting: list[dict[str, Any]] = field(default_factory=list)  # until the first step is made
    _warned: bool = False

    @property
    def is_begun(self) -> bool:
        """Whether any process of this run has begun a step."""
        return self.path is not None and self.path.exists()

    def reused(self, step: Step) -> None:
        """Records a step whose artifact was complete already; held back until a step is made."""
        self._waiting.append(_record("reused", step))
        if self.is_begun:
            self.write()

    def begin(self) -> None:
        """Begins the file, as a step is about to be made: a run that is killed in it leaves a log too."""
        self.write()

    def finished(
        self, step: Step, artifact: Artifact, *, seconds: float, units_before: int, warnings: Sequence[str] = ()
    ) -> None:
        """Records that a step was made, in `seconds`; `units_before` of its units were committed before."""
        rows = num_rows(artifact)
        if rows is None:  # `hardness` counts no pairs of its own
            rows = read_artifact(step.inputs["pairs"]).manifest.counts["pairs"]
        self.write(
            _record(
                "finished",
                step,
                kind=kind_of(step),
                units_before=units_before,
                rows=rows,
                seconds=round(seconds, 3),
                bytes=artifact.bytes,
                peak_rss_mib=_peak_rss_mib(),
                **({"warnings": list(warnings)} if warnings else {}),
            )
        )

    def failed(self, step: Step, error: BaseException, *, seconds: float) -> None:
        """Records that a step was given up because of `error`."""
        code, line = outcome(error)
        self.write(_record("failed", step, exit_code=code, line=line, seconds=round(seconds, 3)))

    def write(self, *records: Mapping[str, Any]) -> None:
        """Appends records after those that were held back; the first call begins the file."""
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _append(self.path, _first_record(self.head), [*self._waiting, *records])
            self._waiting.clear()
        except OSError as error:
            if not self._warned:
                print(f"warning: run log {self.path}: {error.strerror}; the run continues without it", file=sys.stderr)
            self._warned = True


@contextmanager
def open_run_log(corpus: Path, manifest: Path, overrides: Sequence[str]) -> Iterator[RunLog]:
    """Opens the log of a run in the folder `corpus`; on leaving, the last record says how the run ended.

    Args:
        corpus: The folder of the corpus in the workspace.
        manifest: The TOML file that the run was given.
        overrides: Strings `stage.field=value`.
    """
    started = time.monotonic()
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%fZ")
    head = {
        "time": _now(),
        "manifest": str(manifest),
        "manifest_sha256": sha256_file(manifest),
        "overrides": dict(override.split("=", 1) for override in overrides),  # the last one of a setting wins
    }
    log = RunLog(path=corpus / LOGS / f"{stamp}-{os.getpid()}.jsonl", head=head)
    code, line = 0, ""
    try:
        yield log
    except BaseException as error:
        code, line = outcome(error)
        raise
    finally:
        if log.is_begun:
            seconds = round(time.monotonic() - started, 3)
            log.write(_record("end", exit_code=code, line=line, seconds=seconds))


def outcome(error: BaseException) -> tuple[int, str]:
    """The exit code of a run that `error` ends, and the line that its user reads."""
    if isinstance(error, OSError):
        error = as_user_error(error) or error
    if isinstance(error, HardbatchError):
        return error.exit_code, str(error)
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted"
    if isinstance(error, LeavingError):
        return 128 + error.signum, "interrupted" if error.signum == signal.SIGINT else "terminated"
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1, "terminated"
    return 1, f"{type(error).__name__}: {error}"


@dataclass(frozen=True, kw_only=True)
class LoggedStep:
    """A step as a log describes it; `failure` is empty if its artifact was completed."""

    stage: str
    domain: str
    kind: str = ""
    units_before: int = 0
    rows: int = 0
    seconds: float = 0.0
    bytes: int = 0
    peak_rss_mib: float = 0.0
    failure: str = ""
    warnings: tuple[str, ...] = ()


@dataclass(kw_only=True)
class LoggedRun:
    """A run as its log describes it. `ended` is the last record of a run that was not killed."""

    head: dict[str, Any]
    steps: dict[tuple[str, str], LoggedStep] = field(default_factory=dict)  # by stage and domain; the last try of each
    num_reused: int = 0
    last_time: str = ""
    ended: dict[str, Any] | None = None
    torn_lines: int = 0


def list_logs(folder: Path) -> list[Path]:
    """The logs of a workspace, a corpus or a folder of logs, the oldest first."""
    folders = [folder] if folder.name == LOGS else [*folder.glob(LOGS), *folder.glob(f"*/{LOGS}")]
    found = [file for logs in folders for file in logs.glob("*.jsonl")]
    return sorted(found, key=lambda file: file.name)  # names begin with the time


def read_log(path: Path) -> LoggedRun:
    """Reads a run log. A line that a kill tore apart is left out and counted.

    Raises:
        InputError: `path` cannot be read or is not a run log.
        IntegrityError: The log has a newer format.
    """
    try:
        with path.open("rb") as file:
            run = LoggedRun(head=_check_head(path, file.readline(_LINE_BYTES)))
            while line := file.readline(_LINE_BYTES):
                if not _add_record(run, _parse(line)):
                    run.torn_lines += 1
    except OSError as error:
        raise InputError(f"--log {path}: cannot be read: {error.strerror}") from None
    return run


def _check_head(path: Path, line: bytes) -> dict[str, Any]:
    head = _parse(line)
    if not line:
        raise InputError(f"--log {path}: is empty; give a run log that holds at least one line")
    if head.get("event") != "run" or not isinstance(head.get("format"), int):
        raise InputError(f"--log {path}: is not a run log of hardbatch, or was cut off in its first line")
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


def _add_record(run: LoggedRun, record: Mapping[str, Any]) -> bool:
    """Adds a record to the run; False if it is not one of ours."""
    try:
        run.last_time = str(record["time"])
        event = record["event"]
        run.ended = dict(record) if event == "end" else None  # another process of the run may write after an end
        run.num_reused += event == "reused"
        if event in ("finished", "failed"):
            stage, domain = str(record["stage"]), str(record["domain"])
            run.steps[stage, domain] = LoggedStep(
                stage=stage,
                domain=domain,
                kind=str(record.get("kind", "")),
                units_before=int(record.get("units_before", 0)),
                rows=int(record.get("rows") or 0),
                seconds=float(record.get("seconds", 0.0)),
                bytes=int(record.get("bytes", 0)),
                peak_rss_mib=float(record.get("peak_rss_mib") or 0.0),
                failure=f"failed, exit code {int(record['exit_code'])}" if event == "failed" else "",
                warnings=tuple(map(str, record.get("warnings", ()))),
            )
    except (KeyError, TypeError, ValueError):
        return False
    return event in ("finished", "failed", "reused", "end", "begin", "unit")  # the last two: of earlier versions


def _record(event: str, step: Step | None = None, **fields: Any) -> dict[str, Any]:
    names = {"stage": step.stage, "domain": step.domain, "key": step.key} if step else {}
    return {"event": event, "time": _now(), **names, **fields}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _first_record(head: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "event": "run",
        "format": LOG_FORMAT,
        **head,
        "command": shlex.join(sys.argv),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "machine": platform.machine(),
        "libraries": {"python": platform.python_version(), **dict(_versions())},
    }


def _versions() -> Iterator[tuple[str, str]]:
    for name in _LIBRARIES:
        try:
            yield name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pass


def _append(path: Path, first: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> None:
    """Appends whole lines or none, `first` before them if the file is new.

    A last line that a killed process tore apart stays on a line of its own.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        size = os.fstat(descriptor).st_size
        lines = records if size else [first, *records]
        data = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
        if data and size and os.pread(descriptor, 1, size - 1) != b"\n":
            data = b"\n" + data
        try:
            if os.write(descriptor, data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        except OSError:
            os.ftruncate(descriptor, size)
            raise
    finally:
        os.close(descriptor)


def _peak_rss_mib() -> float | None:
    """The most resident memory of this process so far, mapped files included, in MiB; None outside Linux."""
    try:
        status = Path("/proc/self/status").read_text()
        return round(int(status.split("VmHWM:")[1].split()[0]) / 1024, 1)
    except (OSError, IndexError, ValueError):
        return None
