"""Steps: a step is one stage on one domain. Units: a step is run in pieces that are committed whole.

Stages know each other only through artifacts: a step holds the folders of its inputs, its resolved settings and the
folder to fill. Steps and units are plain data that can be sent to another process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from hardbatch.pipeline.artifacts.commit import ArtifactBuilder


@dataclass(frozen=True, kw_only=True)
class Step:
    """One stage on one domain. `config` and `sources` enter the key; `runtime` (paths, the GPU, limits) does not."""

    stage: str
    stage_version: int
    domain: str
    key: str
    path: Path
    config: dict[str, Any]
    inputs: dict[str, Path] = field(default_factory=dict)
    sources: tuple[dict[str, Any], ...] = ()
    runtime: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Unit:
    """A piece of a stage's work that is committed whole: items `start` to `stop` of `group`."""

    name: str
    start: int
    stop: int
    group: str = ""
    work: int = 0
    """What progress counts, for example tokens; 0 means the items."""

    @property
    def amount(self) -> int:
        return self.work or self.stop - self.start


@dataclass(frozen=True, kw_only=True)
class StageResult:
    """What a stage made: the names of all its units, its counts, and the libraries it was made with.

    `warnings` go to the run log, as lines for people.
    """

    units: list[str]
    counts: dict[str, Any]
    produced_with: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


class Progress(Protocol):
    """Shows how far a step has come."""

    def start(self, label: str, total: int) -> None: ...

    def advance(self, amount: int) -> None: ...

    def finish(self) -> None: ...


class Worker(Protocol):
    """Does units one after the other, in the process that opened it."""

    def prepare(self, unit: Unit) -> Any:
        """Reads what the unit needs; may run in a thread while another unit is being committed."""

    def commit(self, unit: Unit, prepared: Any) -> None:
        """Computes the unit and commits it."""


class Work(Protocol):
    """What a stage does with its units; picklable, so that any process can open it."""

    def open(self) -> Worker:
        """Loads what all units share, such as a model or memory maps, once per process."""


class Executor(Protocol):
    """Runs units. The result must not depend on who runs them, nor on how many do."""

    def run(self, work: Work, units: Sequence[Unit], progress: Progress) -> None: ...


class InlineExecutor:
    """Runs units in this process, one after the other, reading the next while one is computed."""

    def run(self, work: Work, units: Sequence[Unit], progress: Progress) -> None:
        if not units:
            return
        worker = work.open()
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="prepare") as reader:
            upcoming = reader.submit(worker.prepare, units[0])
            for unit, following in zip(units, [*units[1:], None], strict=True):
                prepared = upcoming.result()
                if following is not None:
                    upcoming = reader.submit(worker.prepare, following)
                worker.commit(unit, prepared)
                progress.advance(unit.amount)


def run_pending(
    builder: ArtifactBuilder, executor: Executor, work: Work, units: Sequence[Unit], progress: Progress, label: str
) -> list[str]:
    """Runs the units that are not committed yet; returns the names of all units."""
    pending = [unit for unit in units if not builder.committed(unit.name)]
    progress.start(label, sum(unit.amount for unit in pending))
    try:
        executor.run(work, pending, progress)
    finally:
        progress.finish()
    return [unit.name for unit in units]


Stage = Callable[[Step, ArtifactBuilder, Executor, Progress], StageResult]
