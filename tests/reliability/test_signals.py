"""Row 16, of the pipeline: SIGTERM and SIGINT in each stage; the run leaves, and the next one continues."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from tests.reliability import warm
from tests.reliability.processes import HARDBATCH, KILLED, finish, run, start, wait_until
from tests.reliability.workspaces import assert_same, content, faults_in, hidden, real_corpus, run_over, write_corpus

Record = Callable[[int, str], None]
STAGES = ("pairs", "answers", "vectors", "clusters", "hardness", "consistency", "batches", "shards")
BAR_S = 30.0


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """A run over a corpus of one domain."""
    folder = tmp_path_factory.mktemp("signals")
    return run_over(write_corpus(folder / "corpus", {"alpha": 60}, batches_per_part=1))


@pytest.fixture(scope="module")
def expected(command: list[object], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a clean run makes."""
    workspace = tmp_path_factory.mktemp("clean") / "workspace"
    assert warm.run(warm.PIPELINE, [*command, workspace]).code == 0
    return content(workspace)


def stop_in(stage: str, command: list[object], workspace: Path) -> warm.Run:
    """A run that stands still while it commits the first unit of a stage."""
    number = STAGES.index(stage)
    point = "unit.written:1"
    if number:
        fault = f"manifest.folder-fsynced:{number}=kill"
        assert warm.run(warm.PIPELINE, [*command, workspace], fault=fault).code == KILLED
        point = "file.fsynced:1"  # the record of a unit: that of `hardness` has no files
    run = warm.start(warm.PIPELINE, [*command, workspace], fault=f"{point}=stop")
    run.wait_until_stopped()
    domain = "" if stage == "shards" else "/alpha"
    (lock,) = [path for path in hidden(workspace) if path.endswith(".lock") and "caches" not in path]
    assert lock.startswith(f"toy/{stage}{domain}/.")
    return run


@pytest.mark.parametrize(
    "signals",
    [(signal.SIGTERM,), (signal.SIGINT,), (signal.SIGTERM, signal.SIGINT)],  # the second: while it leaves
    ids=["TERM", "INT", "TERM and INT"],
)
@pytest.mark.parametrize("stage", STAGES)
def test_a_signal_in_a_stage(
    tmp_path: Path,
    command: list[object],
    expected: dict[str, bytes],
    stage: str,
    signals: tuple[signal.Signals, ...],
    record_row: Record,
) -> None:
    """The run ends with the code of one of the signals, says so once, and leaves nothing half-written."""
    workspace = tmp_path / "workspace"
    run = stop_in(stage, command, workspace)
    for number in (*signals, signal.SIGCONT):
        os.kill(run.pid, number)
    left = run.wait(BAR_S)
    assert left.code - 128 in signals, left.errors
    (line,) = [line for line in left.errors.splitlines() if line.startswith("hardbatch: ")]
    said = "terminated" if left.code == 143 else "interrupted"
    assert line == f"hardbatch: {said}; committed work stays, run the same command to continue"
    assert "Traceback" not in left.errors
    assert hidden(workspace) == [] and faults_in(workspace) == []

    assert warm.run(warm.PIPELINE, [*command, workspace]).code == 0
    assert_same(workspace, expected)
    names = " and ".join(each.name for each in signals)
    record_row(16, f"pipeline: {names} in each of {len(STAGES)} stages: left with its code, no temporary, resumed")


@pytest.mark.soak
@pytest.mark.parametrize("seed", [31, 32])
def test_signals_at_random_moments(tmp_path: Path, record_row: Record, seed: int) -> None:
    command = run_over(write_corpus(tmp_path / "corpus", {"alpha": 160, "beta": 60}, batches_per_part=1))
    started = time.monotonic()
    assert warm.run(warm.PIPELINE, [*command, tmp_path / "clean"]).code == 0
    seconds = time.monotonic() - started
    expected = content(tmp_path / "clean")

    draw = random.Random(seed)
    number = num_trials = 0
    while number < 13:
        workspace = tmp_path / str(num_trials)
        num_trials += 1
        run = warm.start(warm.PIPELINE, [*command, workspace])
        time.sleep(draw.uniform(0.05 * seconds, 0.9 * seconds))
        chosen = draw.choice([signal.SIGTERM, signal.SIGINT])
        with suppress(ProcessLookupError):
            os.kill(run.pid, chosen)
            if draw.random() < 0.5:
                os.kill(run.pid, draw.choice([signal.SIGTERM, signal.SIGINT]))
        ended = run.wait()
        if ended.code in (0, -chosen):
            continue  # it was done, or had not begun to listen
        assert ended.code in (130, 143) and "Traceback" not in ended.errors, f"seed {seed}\n{ended.errors}"
        assert hidden(workspace) == [] and faults_in(workspace) == [], f"seed {seed}"
        assert warm.run(warm.PIPELINE, [*command, workspace]).code == 0
        assert_same(workspace, expected, seed)
        number += 1
    record_row(16, f"pipeline: {number} signals at random moments, seed {seed}: all left, resumed, no temporary left")


@pytest.mark.soak
@pytest.mark.parametrize(
    ("stage", "settings", "limit"),
    [
        ("vectors", ["embed.model=minilm", "embed.surrogate_model=minilm", "embed.unit_rows=1024"], 4_000),
        ("clusters", ["cluster.iterations=200", "cluster.tolerance=0"], 30_000),
        ("clusters", ["cluster.method=doubled"], 30_000),
        ("hardness", [], 30_000),
        ("consistency", [], 30_000),
        ("batches", ["pack.refine_rounds=500", "pack.refine_tolerance=0"], 30_000),
        ("shards", [], 30_000),
    ],
    ids=["vectors", "clusters", "clusters-doubled", "hardness", "consistency", "batches", "shards"],
)
def test_a_run_at_work_leaves_in_time(
    tmp_path: Path, record_row: Record, stage: str, settings: list[str], limit: int
) -> None:
    """Real pairs, a process of its own, a signal some moments into the work of a stage, not between its units."""
    workspace = tmp_path / "workspace"
    words = [*real_corpus(tmp_path, {"reddit": limit}), workspace]
    command = [*HARDBATCH, *words, *(word for setting in settings for word in ("--set", setting))]
    process = start(command)
    at_work = f"real/{stage}/.*.lock" if stage == "shards" else f"real/{stage}/reddit/.*.lock"
    assert wait_until(lambda: any(workspace.glob(at_work)), process, timeout_s=300)
    time.sleep({"vectors": 8.0, "shards": 0.3}.get(stage, 0.6))
    process.send_signal(signal.SIGTERM)
    started = time.monotonic()
    ended = finish(process)
    seconds = time.monotonic() - started
    assert ended.code == 143, ended.errors
    assert seconds < BAR_S
    assert hidden(workspace) == [] and faults_in(workspace) == []
    if stage != "vectors":  # the long half of it is embedding, which other tests finish
        assert run(command, timeout_s=300).code == 0
    record_row(16, f"pipeline at work on {stage}: left in {seconds:.1f} s")
