"""Row 16, of the pipeline: SIGTERM and SIGINT in each stage; the run leaves, and the next one goes on."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.reliability.forked import Forks, Run, wait_until_stopped
from tests.reliability.processes import HARDBATCH, KILLED, finish, run, start, wait_until
from tests.reliability.workspaces import assert_same, content, faults_in, hidden, write_corpus

Record = Callable[[int, str], None]
STAGES = ("pairs", "vectors", "clusters", "hardness", "batches", "shards")
BAR_S = 30.0


class Corpus:
    """A corpus of one domain, and what a clean run makes of it."""

    def __init__(self, folder: Path, forks: Forks) -> None:
        self.manifest = write_corpus(folder / "corpus", {"alpha": 60}, batches_per_part=1)
        assert forks.run(self.command(folder / "clean")).code == 0
        self.expected = content(folder / "clean")

    def command(self, workspace: Path) -> list[object]:
        return ["run", self.manifest, "--workspace", workspace]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, forks: Forks) -> Corpus:
    return Corpus(tmp_path_factory.mktemp("signals"), forks)


def stop_in(stage: str, workspace: Path, corpus: Corpus, forks: Forks) -> int:
    """A run that stands still while it commits the first unit of a stage; its process id."""
    number = STAGES.index(stage)
    point = "unit.written:1"
    if number:
        before = forks.run(corpus.command(workspace), f"manifest.folder-fsynced:{number}=kill")
        assert before.code == KILLED, before.log
        point = "file.fsynced:1"  # the record of a unit: that of `hardness` has no files
    pid = forks.start(corpus.command(workspace), f"{point}=stop")
    assert wait_until_stopped(pid)
    domain = "" if stage == "shards" else "/alpha"
    (lock,) = [path for path in hidden(workspace) if path.endswith(".lock") and "caches" not in path]
    assert lock.startswith(f"toy/{stage}{domain}/.")
    return pid


def assert_left(run: Run, workspace: Path, signals: tuple[signal.Signals, ...]) -> None:
    """With the code of one of `signals`, whichever came first, said once, and nothing left of what was at work."""
    assert run.code - 128 in signals, run.log
    (line,) = [line for line in run.log.splitlines() if line.startswith("hardbatch: ")]
    said = "terminated" if run.code == 143 else "interrupted"
    assert line == f"hardbatch: {said}; committed work stays, run the same command to continue"
    assert "Traceback" not in run.log
    assert hidden(workspace) == [] and faults_in(workspace) == []


@pytest.mark.parametrize(
    "signals",
    [(signal.SIGTERM,), (signal.SIGINT,), (signal.SIGTERM, signal.SIGINT)],  # the second: while it leaves
    ids=["TERM", "INT", "TERM and INT"],
)
@pytest.mark.parametrize("stage", STAGES)
def test_a_signal_in_a_stage(
    tmp_path: Path,
    corpus: Corpus,
    forks: Forks,
    stage: str,
    signals: tuple[signal.Signals, ...],
    record_row: Record,
) -> None:
    workspace = tmp_path / "workspace"
    pid = stop_in(stage, workspace, corpus, forks)
    for number in signals:
        os.kill(pid, number)
    os.kill(pid, signal.SIGCONT)
    started = time.monotonic()
    assert_left(forks.wait(pid), workspace, signals)
    assert time.monotonic() - started < BAR_S
    assert forks.run(corpus.command(workspace)).code == 0
    assert_same(workspace, corpus.expected)
    names = " and ".join(each.name for each in signals)
    record_row(16, f"pipeline: {names} in each of {len(STAGES)} stages: left with its code, no temporary, resumed")


@pytest.mark.soak
@pytest.mark.parametrize("seed", [31, 32])
def test_signals_at_random_moments(tmp_path: Path, forks: Forks, record_row: Record, seed: int) -> None:
    manifest = write_corpus(tmp_path / "corpus", {"alpha": 160, "beta": 60}, batches_per_part=1)
    command = ["run", manifest, "--workspace"]
    started = time.monotonic()
    assert forks.run([*command, tmp_path / "clean"]).code == 0
    seconds = time.monotonic() - started
    expected = content(tmp_path / "clean")
    draw = random.Random(seed)
    number = num_trials = 0
    while number < 13:
        workspace = tmp_path / str(num_trials)
        num_trials += 1
        pid = forks.start([*command, workspace])
        time.sleep(draw.uniform(0.05 * seconds, 0.9 * seconds))
        chosen = draw.choice([signal.SIGTERM, signal.SIGINT])
        os.kill(pid, chosen)
        if draw.random() < 0.5:
            os.kill(pid, draw.choice([signal.SIGTERM, signal.SIGINT]))
        ended = forks.wait(pid)
        if ended.code == 0 or ended.code == -chosen:
            continue  # it was done, or had not begun to listen
        assert ended.code in (130, 143) and "Traceback" not in ended.log, f"seed {seed}\n{ended.log}"
        assert hidden(workspace) == [] and faults_in(workspace) == [], f"seed {seed}"
        assert forks.run([*command, workspace]).code == 0
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
        ("batches", ["pack.refine_rounds=500", "pack.refine_tolerance=0"], 30_000),
        ("shards", [], 30_000),
    ],
    ids=["vectors", "clusters", "clusters-doubled", "hardness", "batches", "shards"],
)
def test_a_run_at_work_leaves_in_time(
    tmp_path: Path, record_row: Record, stage: str, settings: list[str], limit: int
) -> None:
    """Real pairs, a process of its own, a signal some moments into the work of a stage, not between its units."""
    if "HARDBATCH_DATA" not in os.environ:
        pytest.skip("needs real pairs: set HARDBATCH_DATA to a folder with train/reddit.parquet")
    manifest = tmp_path / "real.toml"
    manifest.write_text(
        f'corpus = "real"\n[[dataset]]\nname = "reddit"\nsource = "train/reddit.parquet"\nlimit = {limit}\n'
        '[embed]\nmodel = "lexical"\nsurrogate_model = "lexical"\n'
    )
    overrides = [word for setting in settings for word in ("--set", setting)]
    workspace = tmp_path / "workspace"
    command = [*HARDBATCH, "run", manifest, "--workspace", workspace, "--data-root", os.environ["HARDBATCH_DATA"]]
    process = start([*command, *overrides])
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
        assert run([*command, *overrides], timeout_s=300).code == 0
    record_row(16, f"pipeline at work on {stage}: left in {seconds:.1f} s")
