"""Rows 1 and 2, and the long run of the issue: SIGKILL at stage boundaries and at random moments, then a rerun."""

from __future__ import annotations

import os
import random
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hardbatch.pipeline.run import Plan, plan_corpus
from tests.reliability.forked import Forks, kill
from tests.reliability.processes import HARDBATCH, KILLED, Ended, finish, kill_group, run, start, tree
from tests.reliability.workspaces import (
    REDONE_ON_RESUME,
    assert_same,
    committed,
    content,
    faults_in,
    redone,
    write_corpus,
)

Record = Callable[[int, str], None]
DOMAINS = ("medical", "law_dc", "stackexchange", "shell_tldr")
PAIRS_OF_DOMAIN = 2_000
CYCLES = 15  # of each of the seeds below
SEEDS = (11, 12, 13, 14)


def arguments(manifest: Path, workspace: Path) -> list[object]:
    return ["run", manifest, "--workspace", workspace]


def assert_at_most_one_unit_redone(before: dict[Path, tuple[int, int]], workspace: Path) -> int:
    """Of what was committed before a kill, at most the last small unit is committed again; how many."""
    again = redone(before, workspace)
    assert len(again) <= 1 and {Path(name).stem for name in again} <= REDONE_ON_RESUME, again
    return len(again)


def complete(workspace: Path) -> set[Path]:
    return {path.parent for path in workspace.rglob("manifest.json")}


# row 1


def kill_at_each_boundary(forks: Forks, manifest: Path, folder: Path, *, chained: bool) -> tuple[int, int]:
    """Kills a run after each of its steps, in one workspace or in one for each; (kills, units redone)."""
    clean = folder / "clean"
    assert forks.run(arguments(manifest, clean)).code == 0
    expected = content(clean)
    num_steps = len(complete(clean))
    num_redone = 0
    for number in range(1, num_steps + 1):
        workspace = folder / ("chained" if chained else f"killed-{number}")
        point = f"manifest.folder-fsynced:{1 if chained else number}"
        before = committed(workspace)
        killed = forks.run(arguments(manifest, workspace), f"{point}=kill")
        assert killed.code == KILLED, killed.log
        assert len(complete(workspace)) == number
        assert faults_in(workspace) == []
        num_redone += assert_at_most_one_unit_redone(before, workspace)
        if not chained or number == num_steps:
            before = committed(workspace)
            again = forks.run(arguments(manifest, workspace))
            assert again.code == 0, again.log
            assert f"steps run: {num_steps - number}, reused: {number}" in again.log
            num_redone += assert_at_most_one_unit_redone(before, workspace)
            assert_same(workspace, expected)
    return num_steps, num_redone


def test_a_kill_at_every_stage_boundary(tmp_path: Path, forks: Forks, record_row: Record) -> None:
    manifest = write_corpus(tmp_path / "corpus", {"alpha": 26, "beta": 17})
    num_kills, num_redone = kill_at_each_boundary(forks, manifest, tmp_path, chained=True)
    assert num_kills == 11
    record_row(1, f"quick: {num_kills} boundaries, {num_kills} resumed, equal digests, {num_redone} units redone")


@pytest.mark.soak
def test_a_kill_at_every_stage_boundary_of_three_domains(tmp_path: Path, forks: Forks, record_row: Record) -> None:
    manifest = write_corpus(tmp_path / "corpus", {"alpha": 120, "beta": 66, "gamma": 30})
    num_kills, num_redone = kill_at_each_boundary(forks, manifest, tmp_path, chained=False)
    assert num_kills == 16
    record_row(1, f"{num_kills} boundaries, {num_kills} resumed, equal digests, {num_redone} units redone")


# row 2


def kill_at_random(forks: Forks, manifest: Path, folder: Path, *, seed: int, num_kills: int) -> tuple[int, int]:
    """Kills runs at random moments of the time that a clean one takes until `num_kills` came before the end.

    (runs that came to their end, units redone)
    """
    for name in ("clean", "again"):  # the first is slower
        started = time.monotonic()
        assert forks.run(arguments(manifest, folder / name)).code == 0
        seconds = time.monotonic() - started
    expected = content(folder / "clean")
    draw = random.Random(seed)
    killed = num_ends = num_redone = 0
    while killed < num_kills:
        workspace = folder / f"run-{num_ends}"
        before = committed(workspace)
        pid = forks.start(arguments(manifest, workspace))
        time.sleep(draw.uniform(0, seconds))
        kill(pid)
        ended = forks.wait(pid)
        assert ended.code in (0, KILLED), f"seed {seed}\n{ended.log}"
        assert faults_in(workspace) == [], f"seed {seed}"
        num_redone += assert_at_most_one_unit_redone(before, workspace)
        killed += ended.code == KILLED
        if ended.code == 0 or killed == num_kills:
            assert forks.run(arguments(manifest, workspace)).code == 0
            assert_same(workspace, expected, seed)
            num_ends += 1
    return num_ends, num_redone


def test_kills_at_random_moments(tmp_path: Path, forks: Forks, record_row: Record) -> None:
    manifest = write_corpus(tmp_path / "corpus", {"alpha": 150}, batches_per_part=1)
    num_ends, num_redone = kill_at_random(forks, manifest, tmp_path, seed=2, num_kills=6)
    record_row(2, f"quick: 6 kills, {num_ends} runs, {num_redone} units redone, 0 partial files, 0 wrong manifests")


@pytest.mark.soak
@pytest.mark.parametrize("seed", [21, 22, 23, 24])
def test_kills_at_random_moments_of_writing(tmp_path: Path, forks: Forks, record_row: Record, seed: int) -> None:
    """Most of the time of these runs goes into writing: units of a few rows, parts of one batch."""
    manifest = write_corpus(tmp_path / "corpus", {"alpha": 160, "beta": 60}, batches_per_part=1)
    num_ends, num_redone = kill_at_random(forks, manifest, tmp_path, seed=seed, num_kills=13)
    record_row(
        2, f"seed {seed}: 13 kills, {num_ends} runs, {num_redone} units redone, 0 partial files, 0 wrong manifests"
    )


# the long run: real pairs, processes of their own


def real_corpus(folder: Path) -> tuple[Path, Path]:
    """(manifest, folder of the sources) of 4 domains of 2,000 real pairs."""
    if "HARDBATCH_DATA" not in os.environ:
        pytest.skip("needs real pairs: set HARDBATCH_DATA to a folder with train/medical.parquet and others")
    text = 'corpus = "real"\n'
    for name in DOMAINS:
        text += f'[[dataset]]\nname = "{name}"\nsource = "train/{name}.parquet"\nlimit = {PAIRS_OF_DOMAIN}\n'
    text += '[embed]\nmodel = "lexical"\nsurrogate_model = "lexical"\nunit_rows = 64\n'
    text += "[pack]\nbatch_size = 32\n[write]\nbatches_per_part = 2\n"
    manifest = folder / "real.toml"
    manifest.write_text(text)
    return manifest, Path(os.environ["HARDBATCH_DATA"])


def real_command(manifest: Path, data: Path, workspace: Path) -> list[object]:
    return [*HARDBATCH, *arguments(manifest, workspace), "--data-root", data]


def plan_of(manifest: Path, data: Path, workspace: Path) -> Plan:
    return plan_corpus(manifest, workspace, data_root=data)


def kill_at(command: list[object], seconds: float) -> Ended:
    """Starts a command and kills it after so many seconds."""
    process = start(command)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        kill_group(process)
    return finish(process)


@pytest.mark.soak
@pytest.mark.parametrize("seed", SEEDS)
def test_kill_and_resume_over_real_pairs(tmp_path: Path, record_row: Record, seed: int) -> None:
    manifest, data = real_corpus(tmp_path)
    started = time.monotonic()
    assert run(real_command(manifest, data, tmp_path / "clean")).code == 0
    seconds = time.monotonic() - started
    expected = tree(plan_of(manifest, data, tmp_path / "clean").shards)
    everything = content(tmp_path / "clean")
    draw = random.Random(seed)
    num_kills = num_runs = num_redone = num_units = 0
    while num_kills < CYCLES:
        workspace = tmp_path / f"killed-{num_runs}"
        ended = None
        while ended is None or ended.code == KILLED:
            before = committed(workspace)
            is_last = num_kills == CYCLES
            command = real_command(manifest, data, workspace)
            ended = run(command) if is_last else kill_at(command, draw.uniform(0, seconds))
            assert ended.code in (0, KILLED), f"seed {seed}\n{ended.errors}"
            assert faults_in(workspace) == [], f"seed {seed}"
            num_redone += assert_at_most_one_unit_redone(before, workspace)
            num_units += sum(path.parent.name == "units" for path in before)
            num_kills += ended.code == KILLED
        assert tree(plan_of(manifest, data, workspace).shards) == expected, f"seed {seed}"
        assert_same(workspace, everything, seed)
        num_runs += 1
    record_row(
        2,
        f"real pairs, seed {seed}: {num_kills} kills over {num_runs} runs of {seconds:.0f} s, all resumed, shards "
        f"byte-identical; of {num_units} units met again {num_redone} redone; 0 partial files, 0 wrong manifests",
    )
