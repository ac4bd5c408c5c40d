"""Waiting threads of torch sleep soon: both commands say so before its OpenMP library is loaded, which tells."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("given", [None, "ACTIVE"])
@pytest.mark.parametrize("module", ["hardbatch.pipeline.cli", "hardbatch.trainer.main"])
def test_waiting_threads_sleep_soon_unless_told_otherwise(module, given, small_manifest, tmp_path):
    words = {
        "hardbatch.pipeline.cli": ["run", small_manifest, "--workspace", tmp_path / "workspace"],
        "hardbatch.trainer.main": ["--shards", tmp_path, "--output", tmp_path / "out"],
    }[module]
    environment = {**os.environ, "OMP_DISPLAY_ENV": "VERBOSE", "PYTHONPATH": str(ROOT)}
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        environment.pop(name, None)
    if given:
        environment["OMP_WAIT_POLICY"] = given
    ended = subprocess.run(
        [sys.executable, "-m", module, *map(str, words)], env=environment, capture_output=True, text=True, check=False
    )
    spins = [line.split("'")[1] for line in ended.stderr.splitlines() if "GOMP_SPINCOUNT" in line]
    if not spins:
        pytest.skip("the OpenMP library of this torch does not tell how long its threads spin")
    assert all((number == "3000") == (given is None) for number in spins), spins
