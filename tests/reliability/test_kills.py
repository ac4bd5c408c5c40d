"""Rows 1 and 2: SIGKILL at stage boundaries and at random moments, then a rerun."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.reliability import warm
from tests.reliability.processes import KILLED
from tests.reliability.workspaces import (
    REDONE_ON_RESUME,
    assert_same,
    committed,
    content,
    faults_in,
    real_corpus,
    redone,
    run_over,
    write_corpus,
)

Record = Callable[[int, str], None]
soak = pytest.mark.soak


def assert_at_most_one_unit_redone(before: dict[Path, tuple[int, int]], workspace: Path) -> int:
    """Of what was committed before a kill, at most the last small unit is committed again; how many."""
    again = redone(before, workspace)
    assert len(again) <= 1 and {Path(name).stem for name in again} <= REDONE_ON_RESUME, again
    return len(again)


# row 1


@pytest.mark.parametrize(
    ("domains", "num_steps", "chained"),
    [
        pytest.param({"alpha": 26, "beta": 17}, 15, True, id="one workspace for all kills"),
        pytest.param({"alpha": 120, "beta": 66, "gamma": 30}, 22, False, marks=soak, id="a workspace for each kill"),
    ],
)
def test_a_kill_at_every_stage_boundary(
    tmp_path: Path, record_row: Record, domains: dict[str, int], num_steps: int, chained: bool
) -> None:
    command, clean = run_over(write_corpus(tmp_path / "corpus", domains)), tmp_path / "clean"
    assert warm.run(warm.PIPELINE, [*command, clean]).code == 0
    num_redone = 0
    for number in range(1, num_steps + 1):
        workspace = tmp_path / ("chained" if chained else f"killed-{number}")
        before = committed(workspace)
        fault = f"manifest.folder-fsynced:{1 if chained else number}=kill"
        assert warm.run(warm.PIPELINE, [*command, workspace], fault=fault).code == KILLED
        assert len(list(workspace.rglob("manifest.json"))) == number
        assert faults_in(workspace) == []
        num_redone += assert_at_most_one_unit_redone(before, workspace)

        if not chained or number == num_steps:
            before = committed(workspace)
            again = warm.run(warm.PIPELINE, [*command, workspace])
            assert again.code == 0 and f"steps run: {num_steps - number}, reused: {number}" in again.errors
            num_redone += assert_at_most_one_unit_redone(before, workspace)
            assert_same(workspace, content(clean))
    record_row(1, f"{num_steps} boundaries, {num_steps} resumed, equal digests, {num_redone} units redone")


# row 2


def toy(folder: Path, **domains: int) -> list[object]:
    """Most of the time of these runs goes into writing: units of a few rows, parts of one batch."""
    return run_over(write_corpus(folder / "corpus", domains, batches_per_part=1))


def real(folder: Path) -> list[object]:
    domains = dict.fromkeys(("medical", "law_dc", "stackexchange", "shell_tldr"), 2_000)
    embed = '[embed]\nmodel = "lexical"\nsurrogate_model = "lexical"\nunit_rows = 64\n'
    return real_corpus(folder, domains, embed + "[pack]\nbatch_size = 32\n[write]\nbatches_per_part = 2\n")


@pytest.mark.parametrize(
    ("corpus", "seed", "num_kills"),
    [
        pytest.param(lambda folder: toy(folder, alpha=150), 2, 6, id="quick"),
        *(
            pytest.param(lambda folder: toy(folder, alpha=160, beta=60), seed, 13, marks=soak, id=f"writing-{seed}")
            for seed in (21, 22, 23, 24)
        ),
        *(pytest.param(real, seed, 15, marks=soak, id=f"real-pairs-{seed}") for seed in (11, 12, 13, 14)),
    ],
)
def test_kills_at_random_moments(
    tmp_path: Path, record_row: Record, corpus: Callable[[Path], list[object]], seed: int, num_kills: int
) -> None:
    command = corpus(tmp_path)
    for name in ("clean", "again"):  # the first is slower
        started = time.monotonic()
        assert warm.run(warm.PIPELINE, [*command, tmp_path / name]).code == 0
        seconds = time.monotonic() - started
    expected = content(tmp_path / "clean")

    draw = random.Random(seed)
    killed = num_ends = num_units = num_redone = 0
    while killed < num_kills:
        workspace = tmp_path / f"run-{num_ends}"
        before = committed(workspace)
        run = warm.start(warm.PIPELINE, [*command, workspace])
        time.sleep(draw.uniform(0, seconds))
        run.kill()
        ended = run.wait()
        assert ended.code in (0, KILLED), f"seed {seed}\n{ended.errors}"
        assert faults_in(workspace) == [], f"seed {seed}"
        num_redone += assert_at_most_one_unit_redone(before, workspace)
        num_units += sum(path.parent.name == "units" for path in before)
        killed += ended.code == KILLED

        if ended.code == 0 or killed == num_kills:
            assert warm.run(warm.PIPELINE, [*command, workspace]).code == 0
            assert_same(workspace, expected, seed)
            num_ends += 1
    record_row(
        2,
        f"seed {seed}: {num_kills} kills over {num_ends} runs of {seconds:.0f} s, all resumed to the same bytes; of "
        f"{num_units} units met again {num_redone} redone; 0 partial files, 0 wrong manifests",
    )
