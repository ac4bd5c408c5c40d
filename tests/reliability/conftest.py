"""Fixtures of the reliability matrix: metrics by row, small disks, a training and a rule that no run is left."""

from __future__ import annotations

import gc
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.reliability import warm
from tests.trainer_models import tiny_backbone


@pytest.fixture
def record_row(record_property: Callable[[str, object], None]) -> Callable[[int, str], None]:
    """`record_row(row, text)`: what was seen of a row of docs/reliability.md, printed at the end of the run."""
    return lambda row, text: record_property(f"reliability row {row}", text)


@pytest.fixture(autouse=True)
def _no_run_is_left() -> Iterator[None]:
    yield
    warm.kill_all()


class Disk:
    """A small tmpfs at `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()
        self._mount("-t", "tmpfs", "-o", "size=64m", "tmpfs", str(path))

    @property
    def used(self) -> int:
        """Bytes that are taken, in whole pages.

        Deleted files whose memory maps wait for the garbage collector are taken too, until it runs.
        """
        gc.collect()
        stat = os.statvfs(self.path)
        return (stat.f_blocks - stat.f_bfree) * stat.f_frsize

    def resize(self, num_bytes: int) -> None:
        """Makes it large enough for `num_bytes`, and too small for one page more."""
        self._mount("-o", f"remount,size={max(4_096, num_bytes)}", str(self.path))

    @staticmethod
    def _mount(*words: str) -> None:
        done = subprocess.run(["mount", *words], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"mounts a small tmpfs, which takes root: {done.stderr.strip()}")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """A small disk, gone after the test."""
    disk = Disk(tmp_path / "disk")
    yield disk
    subprocess.run(["umount", "-l", str(disk.path)], check=True)


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
