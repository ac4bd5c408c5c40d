"""runlog: what a run did, and when: a JSON line for each unit as it is committed, beside the artifacts, never in them.

    <workspace>/<corpus>/logs/<UTC time>-<pid>.jsonl

The file begins with the first step that is made: a run that makes nothing writes nothing. Lines are written whole and
under a lock, so that several processes may write to one log; a kill loses at most the line that is being written.
What reads a log is in views/log.py.
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

from hardbatch.pipeline.artifacts.artifact import Artifact
from hardbatch.pipeline.artifacts.commit import ArtifactBuilder, UnitRecord
from hardbatch.pipeline.artifacts.files import as_user_error, sha256_file
from hardbatch.pipeline.errors import HardbatchError, LeavingError
from hardbatch.pipeline.step import Executor, Progress, Step, Unit, Work, Worker

LOG_FORMAT = 1
LOGS = "logs"
HIGH_WATER = Path("/proc/self/clear_refs")  # writing 5 sets the peak back to what is held now
_LIBRARIES = (
    "hardbatch", "numpy", "pyarrow", "scipy", "scikit-learn", "torch", "sentence-transformers", "transformers",
    "faiss-cpu", "faiss-gpu-cu12", "prefect",
)  # fmt: skip


@dataclass(kw_only=True)
class RunLog:
    """The log of one run, at `path`; None: of no run, nothing is written. Plain data, may go to other processes.

    `head` is what the first record says of the run. A log that cannot be written is told once, on standard error, and
    ends no run: what is done is decided by the artifacts alone.
    """

    path: Path | None = None
    head: Mapping[str, Any] = field(default_factory=dict)
    _waiting: list[dict[str, Any]] = field(default_factory=list)  # until the first step is made
    _warned: bool = False

    def reused(self, step: Step) -> None:
        """A step whose artifact was complete; kept back until a step is made."""
        record = _record("reused", **_names(step))
        if self.is_begun:
            self.write(record)
        else:
            self._waiting.append(record)

    @property
    def is_begun(self) -> bool:
        """Whether a step was made, by whichever process."""
        return self.path is not None and self.path.exists()

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends a record, after what waited for it; the first one begins the file."""
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _append(self.path, _first_record(self.head), [*self._waiting, record])
            self._waiting.clear()
        except OSError as error:
            if not self._warned:
                print(f"warning: run log {self.path}: {error.strerror}; the run goes on without it", file=sys.stderr)
            self._warned = True

    @contextmanager
    def step(self, step: Step) -> Iterator[StepLog]:
        """The records of a step that may have to be made: from its `begin` on, also how it failed."""
        records = StepLog(log=self, step=step)
        try:
            yield records
        except BaseException as error:
            if records.is_begun:
                code, line = told(error)
                self.write(_record("failed", **_names(step), exit_code=code, line=line))
            raise


@contextmanager
def open_run_log(corpus: Path, manifest: Path, overrides: Sequence[str]) -> Iterator[RunLog]:
    """The log of a run below the folder of its corpus; closes with how the run ended, where a step was made."""
    started = time.monotonic()
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%fZ")
    head = {
        "time": _now(),
        "manifest": str(manifest),
        "manifest_sha256": sha256_file(manifest),
        "overrides": dict(override.split("=", 1) for override in overrides),  # the last of a setting holds
    }
    log = RunLog(path=corpus / LOGS / f"{stamp}-{os.getpid()}.jsonl", head=head)
    code, line = 0, ""
    try:
        yield log
    except BaseException as error:
        code, line = told(error)
        raise
    finally:
        if log.is_begun:
            seconds = round(time.monotonic() - started, 3)
            log.write(_record("end", exit_code=code, line=line, seconds=seconds))


def told(error: BaseException) -> tuple[int, str]:
    """The exit code of a run that ends by `error`, and the line that its user reads."""
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


@dataclass(kw_only=True)
class StepLog:
    """Writes the records of a step; seconds of a unit are those since the one before it was committed."""

    log: RunLog
    step: Step
    is_begun: bool = False
    _known: set[str] = field(default_factory=set)  # units that were there before, or have their record
    _started: float = 0.0
    _last: float = 0.0

    def begin(self, committed: set[str]) -> None:
        """The step is being made; `committed` are the units that are there."""
        self._known = set(committed)
        self._started = self._last = time.monotonic()
        self.is_begun = True
        self.log.write(_record("begin", **_names(self.step), units_before=len(committed)))
        if self.log.path is not None:
            forget_peak()

    def units_by(self, executor: Executor) -> Executor:
        """An executor that runs units as `executor` does and writes the record of each."""
        return executor if self.log.path is None else _LoggedExecutor(executor, self)

    def wait(self) -> None:
        """Begins the clock of the next unit."""
        self._last = time.monotonic()

    def unit(self, name: str, *, with_rows: bool = True) -> None:
        """The unit `name` is committed."""
        if self.log.path is None:
            return
        found = ArtifactBuilder(self.step.path).unit_record(name)
        now = time.monotonic()
        self.log.write(
            _record(
                "unit",
                **_names(self.step),
                unit=name,
                rows=_rows(found) if with_rows else None,
                seconds=round(now - self._last, 3),
                bytes=sum(file.bytes for file in found.files.values()),
                peak_rss_mib=peak_rss_mib(),
                pid=os.getpid(),
            )
        )
        self._last = now
        forget_peak()

    def ran(self, names: set[str]) -> None:
        """Units that an executor has run, in this process or others: each has its record."""
        self._known |= names
        self._last = time.monotonic()

    def committed(self, units: Sequence[str]) -> None:
        """All `units` of the step are committed: those that no executor ran are told now."""
        joins = bool(self._known)  # what joins other units counts their rows again
        for name in units:
            if name not in self._known:
                self.unit(name, with_rows=not joins)

    def finish(self, artifact: Artifact) -> None:
        """The artifact is complete."""
        seconds = round(time.monotonic() - self._started, 3)
        self.log.write(_record("finished", **_names(self.step), seconds=seconds, bytes=artifact.bytes))


@dataclass(frozen=True)
class _LoggedExecutor:
    executor: Executor
    records: StepLog

    def run(self, work: Work, units: Sequence[Unit], progress: Progress) -> None:
        self.executor.run(_LoggedWork(work, self.records), units, progress)
        self.records.ran({unit.name for unit in units})


@dataclass(frozen=True)
class _LoggedWork:
    work: Work
    records: StepLog

    def open(self) -> Worker:
        worker = self.work.open()
        self.records.wait()
        return _LoggedWorker(worker, self.records)


@dataclass(frozen=True)
class _LoggedWorker:
    worker: Worker
    records: StepLog

    def prepare(self, unit: Unit) -> Any:
        return self.worker.prepare(unit)

    def commit(self, unit: Unit, prepared: Any) -> None:
        self.worker.commit(unit, prepared)
        self.records.unit(unit.name)


def _rows(unit: UnitRecord) -> int | None:
    """Source rows of staged units; else of its files that of most rows, which holds pairs or texts."""
    rows = [file.rows for file in unit.files.values() if file.rows is not None]
    return unit.counts.get("rows", max(rows, default=None))


def _names(step: Step) -> dict[str, str]:
    return {"stage": step.stage, "domain": step.domain, "key": step.key}


def _record(event: str, **fields: Any) -> dict[str, Any]:
    return {"event": event, "time": _now(), **fields}


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
    """Appends whole lines or none; `first` where the file is new. A torn last line of a killed process stays alone."""
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        size = os.fstat(descriptor).st_size
        lines = records if size else [first, *records]
        data = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            data = b"\n" + data
        try:
            if os.write(descriptor, data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        except OSError:
            os.ftruncate(descriptor, size)
            raise
    finally:
        os.close(descriptor)


def peak_rss_mib() -> float | None:
    """The most memory (resident, mapped files included) this process held since the last unit, in MiB; Linux only."""
    try:
        status = Path("/proc/self/status").read_text()
        return round(int(status.split("VmHWM:")[1].split()[0]) / 1024, 1)
    except (OSError, IndexError, ValueError):
        return None


def forget_peak() -> None:
    """Sets the peak back to what is held now, where the system can."""
    try:
        HIGH_WATER.write_text("5")
    except OSError:
        pass  # no Linux, or not allowed: peaks are then those since the process began
