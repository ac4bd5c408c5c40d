"""Row 16: a training that is told to leave is gone within 30 s, whatever it does, and can go on."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hardbatch.pipeline.artifacts.artifact import verify_artifact
from hardbatch.trainer.checkpoint import find_checkpoint
from hardbatch.trainer.signals import deferred_signals
from tests.models import require_minilm
from tests.reliability.processes import finish, wait_until
from tests.reliability.trainings import (
    export_of,
    figures_of,
    fork,
    join,
    log_of,
    run_fork,
    start,
    state_of,
    steps_logged,
    workers_of,
)
from tests.samples import WORDS

RecordRow = Callable[[int, str], None]
LIMIT_S = 30.0
TERMINATED = (143, -signal.SIGTERM)  # the second: it had nothing to leave in order yet


@pytest.fixture(scope="module")
def minutes_of_evaluation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A collection of 30,000 documents, which six layers embed in minutes, twice, and a tiny model in seconds."""
    folder = tmp_path_factory.mktemp("collections") / "large"
    folder.mkdir()
    generator = np.random.default_rng(0)
    texts = [" ".join(generator.choice(WORDS, 20)) for _ in range(30_000)]
    ids = [str(row) for row in range(len(texts))]
    for name, columns in {
        "corpus": {"doc_id": ids, "text": texts},
        "queries": {"query_id": ids[:50], "text": texts[:50]},
        "qrels": {"query_id": ids[:50], "doc_id": ids[:50], "score": [1] * 50},
    }.items():
        pq.write_table(pa.table(columns), folder / f"{name}.parquet")
    return folder


@pytest.fixture
def slow(flags: dict[str, Any]) -> dict[str, Any]:
    """A training of 6 steps of a model that is slow to evaluate."""
    require_minilm()
    return flags | {"--backbone": "minilm", "--max-length": 32, "--epochs": 1, "--save-every": 100}


def terminate(pids: Sequence[int]) -> float:
    for pid in pids:
        os.kill(pid, signal.SIGTERM)
    return time.monotonic()


def wait_for(ready: Callable[[], bool], process: BaseProcess) -> None:
    deadline = time.monotonic() + 120
    while not ready():
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.01)


def wait_for_stop(process: BaseProcess) -> None:
    assert process.pid is not None
    wait_for(lambda: state_of(process.pid) == "T", process)


@pytest.mark.parametrize("model", ["tiny", pytest.param("minilm", marks=pytest.mark.soak)])
def test_amid_an_evaluation(
    request: pytest.FixtureRequest,
    model: str,
    minutes_of_evaluation: Path,
    tmp_path: Path,
    record_row: RecordRow,
) -> None:
    """Before step 1, where there is nothing to save; and after some steps, which are saved first."""
    flags: dict[str, Any] = request.getfixturevalue("slow" if model == "minilm" else "flags")
    log = tmp_path / "log"
    unbroken = {**flags, "--output": tmp_path / "unbroken"}
    assert run_fork(unbroken, log).code == 0
    evaluated = {**flags, "--resume": "auto", "--eval": minutes_of_evaluation, "--eval-every": 1}
    seconds = []
    for steps in (0, 2):
        if steps:  # without an evaluation to step 2 or a little more
            process = fork({**flags, "--resume": "auto"}, log)
            wait_for(steps_logged(flags, steps), process)
            since = terminate([process.pid])
            assert join(process, log, timeout_s=LIMIT_S).code == 143
            seconds.append(time.monotonic() - since)
        process = fork(evaluated, log)
        wait_for(lambda: log.exists() and "batches" in log.read_text(), process)
        time.sleep(0.5)
        since = terminate([process.pid])
        ended = join(process, log, timeout_s=LIMIT_S)
        seconds.append(time.monotonic() - since)
        assert ended.code == 143 and "add --resume auto" in ended.errors and "Traceback" not in ended.errors
        assert log_of(flags, "eval/large") == [], "it did not wait for the end"
        checkpoint, _ = find_checkpoint(Path(flags["--output"]), "auto")
        assert (checkpoint is not None) == bool(steps)
    finished = run_fork({**flags, "--resume": "auto"}, log)
    assert finished.code == 0, finished.errors
    assert figures_of(flags) == figures_of(unbroken) and export_of(flags) == export_of(unbroken)
    record_row(16, f"{model}: SIGTERM amid a step or an evaluation: gone after {max(seconds):.1f} s at most, resumed")


def test_while_it_starts(flags: dict[str, Any], tmp_path: Path, record_row: RecordRow) -> None:
    codes = []
    for delay_s in (0.3, 1.5):
        process = start(flags)
        time.sleep(delay_s)
        process.send_signal(signal.SIGTERM)
        ended = finish(process, timeout_s=LIMIT_S)
        assert ended.code in TERMINATED and "Traceback" not in ended.errors, ended.errors
        codes.append(ended.code)
    assert run_fork({**flags, "--resume": "auto"}, tmp_path / "log").code == 0
    record_row(16, f"SIGTERM while it starts: gone at once ({len(codes)} times), and it begins anew")


def test_amid_a_save_and_an_export(flags: dict[str, Any], tmp_path: Path, record_row: RecordRow) -> None:
    log = tmp_path / "log"
    unbroken = {**flags, "--output": tmp_path / "unbroken"}
    assert run_fork(unbroken, log).code == 0
    for fault, expected in (("unit.written:2=stop", 143), ("export.written=stop", 0)):
        process = fork({**flags, "--resume": "auto"}, log, fault=fault)
        wait_for_stop(process)
        terminate([process.pid])
        os.kill(process.pid, signal.SIGCONT)
        ended = join(process, log, timeout_s=LIMIT_S)
        assert ended.code == expected, ended.errors
        checkpoint, told = find_checkpoint(Path(flags["--output"]), "auto")
        assert checkpoint is not None and told == [] and verify_artifact(checkpoint) == []
    assert figures_of(flags) == figures_of(unbroken) and export_of(flags) == export_of(unbroken)
    record_row(16, "SIGTERM amid a save ends it and leaves; amid the export the training ends as if it had not come")


def test_a_second_one_leaves_at_once(flags: dict[str, Any], tmp_path: Path, record_row: RecordRow) -> None:
    """Amid the save that the first one asked for: the checkpoint before stays the newest, and nothing half-written."""
    log, output = tmp_path / "log", Path(flags["--output"])
    flags |= {"--epochs": 100_000, "--save-every": 100_000, "--resume": "auto"}
    process = fork(flags, log)
    wait_for(steps_logged(flags, 3), process)
    terminate([process.pid])
    assert join(process, log, timeout_s=LIMIT_S).code == 143
    before, _ = find_checkpoint(output, "auto")
    assert before is not None
    process = fork(flags, log, fault="unit.written:2=stop")
    wait_for(steps_logged(flags, len(figures_of(flags)) + 3), process)
    terminate([process.pid])
    wait_for_stop(process)
    time.sleep(2.5)
    terminate([process.pid])
    os.kill(process.pid, signal.SIGCONT)
    assert join(process, log, timeout_s=LIMIT_S).code == 143
    assert find_checkpoint(output, "auto") == (before, []) and verify_artifact(before) == []
    assert list(output.rglob("*.tmp")) == []
    record_row(16, "a second SIGTERM amid that save leaves at once, the checkpoint before is whole")


def test_two_signals_of_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    with deferred_signals() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # from the scheduler, and from torchrun, which it told too
        assert stop.signum == signal.SIGTERM
        monkeypatch.setattr("hardbatch.trainer.signals._ONE_REQUEST_S", 0.0)
        with pytest.raises(SystemExit) as left:
            os.kill(os.getpid(), signal.SIGTERM)
        assert left.value.code == 143


@pytest.mark.soak
@pytest.mark.parametrize("everywhere", [False, True], ids=["torchrun", "all-processes"])
def test_two_ranks(
    slow: dict[str, Any], minutes_of_evaluation: Path, tmp_path: Path, everywhere: bool, record_row: RecordRow
) -> None:
    """The launcher is told, or, by a scheduler, every process; amid a step, then amid an evaluation."""
    slow |= {"--epochs": 200}
    seconds = []
    evaluated = {**slow, "--resume": "auto", "--eval": minutes_of_evaluation, "--eval-every": 1}
    curves = Path(slow["--output"]) / "tensorboard"  # a file for each run that came to its evaluation
    for flags, ready in ((slow, steps_logged(slow, 3)), (evaluated, lambda: len(list(curves.iterdir())) == 2)):
        process = start(flags, ranks=2)
        assert wait_until(ready, process, timeout_s=120)
        time.sleep(2)
        since = terminate([process.pid, *(workers_of(slow["--output"]) if everywhere else [])])
        leave_within(process, slow["--output"], since)
        seconds.append(time.monotonic() - since)
        last = figures_of(slow)[-1][0]
        checkpoint, told = find_checkpoint(Path(slow["--output"]), "auto")
        assert told == [] and checkpoint is not None and checkpoint.name == f"step-{last:08d}", "nothing was lost"
    record_row(
        16,
        f"2 ranks, SIGTERM to {'every process' if everywhere else 'torchrun'}: gone after {max(seconds):.1f} s at most "
        "amid a step and amid an evaluation of minutes, no step lost",
    )


def leave_within(process: subprocess.Popen[str], output: Path, since: float) -> None:
    ended = finish(process, timeout_s=LIMIT_S + 10)
    assert ended.code != 0
    while workers_of(output):
        assert time.monotonic() - since < LIMIT_S
        time.sleep(0.05)
    assert time.monotonic() - since < LIMIT_S
