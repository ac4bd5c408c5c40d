"""Steps: a step is one stage on one domain. Units: a step is run in pieces that are committed whole.

Stages know each other only through artifacts: a step holds the folders of its inputs, its resolved settings and the
folder to fill. Steps and units are plain data that can be sent to another process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
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

    def run(self, work: Work, units: Sequence[Unit], progress: Progress, device: str = "cpu") -> int:
        """Runs all units and returns how many workers died over them, which leave temporary files.

        Args:
            work: What to do with the units.
            units: The units, in the order in which they are begun.
            progress: Advances as units are committed.
            device: Where the work runs: `cpu`, or as in `embed.device`.
        """


class UnitRunner:
    """Opens a work and runs its units in this process: the loop of every executor and every worker.

    While a unit is committed, the one that is likely to be next is prepared in a thread.
    """

    def __init__(self, work: Work) -> None:
        self._worker = work.open()
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prepare")
        self._upcoming: tuple[Unit, Future[Any]] | None = None

    def run(self, unit: Unit, following: Unit | None = None) -> None:
        """Commits `unit` while `following`, probably the unit of the next call, is prepared."""
        if self._upcoming is None or self._upcoming[0] != unit:
            self._prepare(unit)
        assert self._upcoming is not None
        prepared = self._upcoming[1].result()
        self._upcoming = None

        if following is not None:
            self._prepare(following)
        self._worker.commit(unit, prepared)

    def close(self) -> None:
        """Waits for the unit that is being prepared."""
        self._reader.shutdown(cancel_futures=True)

    def _prepare(self, unit: Unit) -> None:
        self._upcoming = unit, self._reader.submit(self._worker.prepare, unit)


class InlineExecutor:
    """Runs units in this process, one after the other."""

    def run(self, work: Work, units: Sequence[Unit], progress: Progress, device: str = "cpu") -> int:
        if not units:
            return 0
        with closing(UnitRunner(work)) as runner:
            for unit, following in zip(units, [*units[1:], None], strict=True):
                runner.run(unit, following)
                progress.advance(unit.amount)
        return 0


def run_pending(
    builder: ArtifactBuilder,
    executor: Executor,
    work: Work,
    units: Sequence[Unit],
    progress: Progress,
    label: str,
    device: str = "cpu",
) -> list[str]:
    """Runs the units that are not committed yet; returns the names of all units."""
    pending = [unit for unit in units if not builder.committed(unit.name)]
    progress.start(label, sum(unit.amount for unit in pending))
    try:
        if executor.run(work, pending, progress, device):
            builder.remove_temporaries()
    finally:
        progress.finish()
    return [unit.name for unit in units]


Stage = Callable[[Step, ArtifactBuilder, Executor, Progress], StageResult]
