"""Figures of the reliability matrix: tests record them by row, and the run ends with the table."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from reliability.forked import Forks

_PREFIX = "reliability row "


@pytest.fixture
def record_row(record_property: Callable[[str, object], None]) -> Callable[[int, str], None]:
    """`record_row(row, figure)`: a figure of a row of docs/reliability.md, told at the end of the run."""

    def record(row: int, figure: str) -> None:
        record_property(f"{_PREFIX}{row}", figure)

    return record


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """Runs of the command line that start in no time; see forked.py."""
    if not Path("/proc/self/stat").exists():
        pytest.skip("looks at processes in /proc")
    forks = Forks(tmp_path_factory.mktemp("forks"))
    yield forks
    forks.close()
