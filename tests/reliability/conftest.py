"""Figures of the reliability matrix: tests record them by row, and the run ends with the table."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.reliability.forked import Forks
from tests.reliability.trainings import kill_forks
from tests.trainer_models import tiny_backbone

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


@pytest.fixture(scope="session")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT with dropout."""
    return tiny_backbone(tmp_path_factory.mktemp("backbone"))


@pytest.fixture
def flags(finished_run: tuple[Path, Path, Path], backbone: Path, tmp_path: Path) -> dict[str, Any]:
    """2 epochs of 6 batches of 8 pairs, logged at every step, saved at every second."""
    return {
        "--shards": finished_run[2],
        "--output": tmp_path / "out",
        "--backbone": backbone,
        "--dropout": 0.1,
        "--context-size": 6,
        "--max-length": 24,
        "--epochs": 2,
        "--warmup-steps": 3,
        "--learning-rate": 1e-3,
        "--sequence-dropout": 0.1,
        "--chunk-tokens": 120,
        "--precision": "fp32",
        "--log-every": 1,
        "--save-every": 2,
    }


@pytest.fixture(autouse=True)
def _no_fork_is_left() -> Iterator[None]:
    yield
    kill_forks()
