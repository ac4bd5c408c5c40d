"""What executors with workers in other processes share: who runs which unit, and what happens if a worker dies.

A worker is asked to open a work, then to run one unit after the other. It answers every request with None or with
what went wrong. The executor alone decides who runs what, so a worker that dies takes nothing with it but its
unit in hand, which another worker runs.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import pickle
import platform
import sys
import traceback
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from hardbatch.pipeline.errors import ConfigError, WorkerError
from hardbatch.pipeline.step import Progress, Unit, UnitRunner, Work

_MAX_DEATHS = 3
_DISTRIBUTIONS = (
    "hardbatch", "numpy", "pyarrow", "scikit-learn", "scipy", "sentence-transformers", "torch", "transformers",
)  # fmt: skip


@cache
def code_version() -> dict[str, str]:
    """What must be the same in all processes of a run: our code, and the libraries that results depend on."""
    root = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root).as_posix()}\n".encode() + path.read_bytes())
    return {
        "the code of hardbatch.pipeline": digest.hexdigest()[:12],
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in _DISTRIBUTIONS},
    }


@dataclass(frozen=True, kw_only=True)
class Opening:
    """A work to open. It is pickled, so that a worker with other code can refuse it before it reads it."""

    version: Mapping[str, str]
    work: bytes


class Bench:
    """The side of the worker: opens works and runs their units. What goes wrong is the answer, never raised."""

    def __init__(self) -> None:
        self._runner: UnitRunner | None = None

    def open(self, opening: Opening) -> Exception | None:
        """Opens a work, in place of the one before."""
        if self._runner is not None:
            self._runner.close()
            self._runner = None
        try:
            _refuse_other_version(opening.version)
            self._runner = UnitRunner(pickle.loads(opening.work))  # noqa: S301 -- from our own executor
        except Exception as error:
            return _portable(error)
        return None

    def run(self, unit: Unit, following: Unit | None) -> Exception | None:
        """Commits a unit while the following one is prepared."""
        assert self._runner is not None, "open a work first"
        try:
            self._runner.run(unit, following)
        except Exception as error:
            return _portable(error)
        return None


def _refuse_other_version(of_run: Mapping[str, str]) -> None:
    here = code_version()
    differs = [
        f"{name} {here.get(name, 'none')} there and {of_run.get(name, 'none')} here"
        for name in sorted(here.keys() | of_run.keys())
        if here.get(name) != of_run.get(name)
    ]
    if differs:
        raise ConfigError(
            f"a worker on {platform.node()} has other versions than this run: {', '.join(differs)}; "
            "install the same on every node, and restart what started the worker"
        )


def _portable(error: Exception) -> Exception:
    """The error as another process can read it, with its traceback as a note."""
    note = "".join(traceback.format_exception(error))
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301 -- our own bytes
    except Exception:
        error = RuntimeError(f"{type(error).__name__}: {error}")
    error.add_note(f"in a worker:\n{note}")
    return error


@dataclass(frozen=True)
class Lost:
    """In place of an answer: the worker has died, and how."""

    how: str


Answer = Exception | Lost | None


class RemoteWorker(Protocol):
    """A worker as its executor sees it. Requests go to methods of its `Bench`; one is under way at a time."""

    def open(self, opening: Opening) -> None: ...

    def run(self, unit: Unit, following: Unit | None) -> None: ...


W = TypeVar("W", bound=RemoteWorker)


@dataclass
class _Team(Generic[W]):
    """Workers of one kind, by number. Those in `opening` have not answered yet to an earlier stage."""

    workers: dict[int, W] = field(default_factory=dict)
    opening: set[int] = field(default_factory=set)


class PoolExecutor(ABC, Generic[W]):
    """Runs units on workers in other processes, which are kept for the stages that follow.

    Args:
        num_workers: The number of workers that run units at a time.
    """

    has_teams = False  # whether workers are made for a device, and others are kept for another one

    def __init__(self, num_workers: int) -> None:
        self._num_workers = num_workers
        self._teams: dict[str, _Team[W]] = {}

    @abstractmethod
    def _start(self, number: int, device: str) -> W:
        """Starts a worker for work on a device; it need not be up yet when this returns."""

    @abstractmethod
    def _wait(self, workers: Mapping[int, W]) -> Iterable[tuple[int, Answer]]:
        """Waits until one of these workers has answered or died, and returns the answers that are there."""

    @abstractmethod
    def _end(self, workers: Sequence[W]) -> None:
        """Ends workers, and returns when they are gone."""

    def close(self) -> None:
        """Ends all workers."""
        teams, self._teams = self._teams, {}
        self._end([worker for team in teams.values() for worker in team.workers.values()])

    def run(self, work: Work, units: Sequence[Unit], progress: Progress, device: str = "cpu") -> int:
        """Runs units; see `Executor`.

        Raises:
            ConfigError: A worker has other code, or `device` is one GPU where every worker gets its own.
            WorkerError: The workers die over a unit again and again.
            Exception: What a unit raised in its worker, with the worker's traceback as a note.
        """
        if device.startswith("cuda:"):
            raise ConfigError(
                f"embed.device: '{device}' is one GPU, but an executor gives every worker its own; set it to cuda"
            )
        if not units:
            return 0
        team = self._teams.setdefault(device if self.has_teams else "", _Team())
        try:
            return self._run(work, units, progress, team, device)
        except BaseException:
            self.close()  # nobody may write to the artifact once its lock is free
            raise

    def _run(self, work: Work, units: Sequence[Unit], progress: Progress, team: _Team[W], device: str) -> int:
        opening = Opening(version=code_version(), work=pickle.dumps(work))
        schedule = _Schedule(units)
        deaths: Counter[str] = Counter()
        outdated, team.opening = team.opening, set()
        in_hand: dict[int, Unit | None] = {}  # None: the worker is opening the work

        def open_at(number: int) -> None:
            if number not in team.workers:
                team.workers[number] = self._start(number, device)
            if number not in outdated:
                team.workers[number].open(opening)
            in_hand[number] = None

        for number in range(min(self._num_workers, len(units))):
            open_at(number)
        idle: set[int] = set()
        while schedule.num_left:
            for number, answer in self._wait({number: team.workers[number] for number in in_hand}):
                unit = in_hand.pop(number)
                if isinstance(answer, Lost):
                    self._count_death(unit, answer, deaths)
                    if unit is not None:
                        schedule.put_back(unit)
                    outdated.discard(number)
                    del team.workers[number]
                    open_at(number)
                elif number in outdated:  # the answer to an earlier stage, which went well without it
                    outdated.discard(number)
                    open_at(number)
                elif answer is not None:
                    raise answer
                else:
                    if unit is not None:
                        schedule.num_left -= 1
                        progress.advance(unit.amount)
                    idle.add(number)

            for number in sorted(idle):
                unit, following = schedule.take(number)
                if unit is not None:
                    team.workers[number].run(unit, following)
                    in_hand[number] = unit
                    idle.discard(number)
        team.opening = set(in_hand) | outdated
        return deaths.total()

    def _count_death(self, unit: Unit | None, lost: Lost, deaths: Counter[str]) -> None:
        """Warns of a death, or raises WorkerError if it is one too many over the same unit."""
        what = f"unit {unit.name}" if unit else "opening its work"
        deaths[what] += 1
        if deaths[what] >= _MAX_DEATHS * (1 if unit else self._num_workers):
            raise WorkerError(
                f"workers died {deaths[what]} times over {what} ({lost.how}), which often means that memory ran out; "
                "use fewer --workers, or smaller units"
            )
        print(f"warning: a worker died over {what} ({lost.how}); another one takes it", file=sys.stderr)


class _Schedule:
    """The units that nobody has begun, in order, and which of them a worker is preparing."""

    def __init__(self, units: Sequence[Unit]) -> None:
        self.num_left = len(units)  # that are not committed
        self._waiting = {unit.name: unit for unit in units}
        self._preparing: dict[int, str] = {}

    def take(self, worker: int) -> tuple[Unit | None, Unit | None]:
        """The unit for a worker to run now, and the one to prepare meanwhile; None where there is none.

        A worker runs the unit that it has prepared. At the end, one that has nothing to do takes what another
        is preparing, since a prepared unit is worth less than an idle worker.
        """
        own = self._preparing.pop(worker, None)
        reserved = set(self._preparing.values())
        free = [name for name in self._first(len(reserved) + 2) if name not in reserved]
        name = own if own in self._waiting else next(iter(free or self._waiting), None)
        if name is None:
            return None, None
        unit = self._waiting.pop(name)

        following = next((self._waiting[other] for other in free if other in self._waiting), None)
        if following is not None:
            self._preparing[worker] = following.name
        return unit, following

    def put_back(self, unit: Unit) -> None:
        """Gives back the unit of a worker that died; it is the next to be run."""
        self._waiting = {unit.name: unit, **self._waiting}

    def _first(self, number: int) -> list[str]:
        return [name for name, _ in zip(self._waiting, range(number), strict=False)]
