"""A work whose units can be slow, fail, or kill their worker; workers import it, so it imports little."""

from __future__ import annotations

import os
import signal
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from hardbatch.pipeline.artifacts.commit import write_unit
from hardbatch.pipeline.errors import InputError
from hardbatch.pipeline.step import Unit


def units(number: int) -> list[Unit]:
    return [Unit(name=f"unit-{i}", start=i, stop=i + 1) for i in range(number)]


@dataclass(frozen=True, kw_only=True)
class Toy:
    """Writes a file for each unit, which takes `seconds`.

    Args:
        path: The artifact.
        deaths: The folder that remembers how often a unit has killed its worker.
        kills: How often each unit kills its worker, as it has written a part of its file.
        fails: What each unit raises.
    """

    path: Path
    deaths: Path
    seconds: float = 0.0
    kills: Mapping[str, int] = field(default_factory=dict)
    fails: Mapping[str, type[Exception]] = field(default_factory=dict)
    kills_as_it_opens: bool = False

    def open(self) -> ToyWorker:
        if self.kills_as_it_opens:
            os.kill(os.getpid(), signal.SIGKILL)
        return ToyWorker(self)


class ToyWorker:
    def __init__(self, work: Toy) -> None:
        self.work = work

    def prepare(self, unit: Unit) -> str:
        return f"{unit.name} prepared"

    def commit(self, unit: Unit, prepared: str) -> None:
        with write_unit(self.work.path, unit.name) as writer:
            path = writer.add_file(f"files/{unit.name}")
            path.write_text(prepared)
            writer.counts = {"worker": os.getpid(), "threads": os.environ.get("OMP_NUM_THREADS")}
            if error := self.work.fails.get(unit.name):
                raise error(f"{unit.name}: wrong")
            if len(list(self.work.deaths.glob(f"{unit.name}.*"))) < self.work.kills.get(unit.name, 0):
                (self.work.deaths / f"{unit.name}.{uuid.uuid4().hex}").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(self.work.seconds)


class OddError(Exception):
    """An error that does not come out of a pickle."""

    def __init__(self, one: str, two: str = "") -> None:
        super().__init__()


FAILURES: tuple[type[Exception], ...] = (InputError, ValueError, OddError)


class Unloadable:
    """An actor whose node lacks a package."""

    def __init__(self, threads: int) -> None:
        raise ModuleNotFoundError("No module named 'hardbatch'")

    def open(self, opening: object) -> None: ...
