"""Row 16: a training that gets a signal is gone within 30 s, whatever it is doing, and can be resumed."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hardbatch.pipeline.artifacts.artifact import verify_artifact
from hardbatch.trainer.checkpoint import find_checkpoint
from hardbatch.trainer.signals import deferred_signals
from tests.models import require_minilm
from tests.reliability import warm
from tests.reliability.processes import finish, wait_until
from tests.reliability.trainings import (
    assert_same_training,
    log_of,
    run_warm,
    start,
    start_warm,
    steps_logged,
    workers_of,
)
from tests.samples import WORDS
from tests.trainer.test_evaluate import write_collection

RecordRow = Callable[[int, str], None]
LIMIT_S = 30.0
TERMINATED = (143, -signal.SIGTERM)  # the second: it had nothing to leave in order yet


@pytest.fixture(scope="module")
def minutes_of_evaluation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A collection of 30,000 documents, which six layers embed in minutes, twice, and a tiny model in seconds."""
    generator = np.random.default_rng(0)
    texts = [" ".join(generator.choice(WORDS, 20)) for _ in range(30_000)]
    ids = [str(row) for row in range(len(texts))]
    return write_collection(
        tmp_path_factory.mktemp("collections") / "large",
        corpus={"doc_id": ids, "text": texts},
        queries={"query_id": ids[:50], "text": texts[:50]},
        qrels={"query_id": ids[:50], "doc_id": ids[:50], "score": [1] * 50},
    )


@pytest.fixture
def slow(flags: dict[str, Any]) -> dict[str, Any]:
    """A training of 6 steps of a model that is slow to evaluate."""
    require_minilm()
    return flags | {"--backbone": "minilm", "--max-length": 32, "--epochs": 1, "--save-every": 100}


def terminate(pids: Sequence[int]) -> float:
    """Sends SIGTERM; returns when."""
    for pid in pids:
        os.kill(pid, signal.SIGTERM)
    return time.monotonic()


@pytest.mark.parametrize("model", ["tiny", pytest.param("minilm", marks=pytest.mark.soak)])
def test_amid_an_evaluation(
    request: pytest.FixtureRequest,
    model: str,
    minutes_of_evaluation: Path,
    tmp_path: Path,
    record_row: RecordRow,
) -> None:
    """Before step 1, when there is nothing to save; and after some steps, which are saved first."""
    flags: dict[str, Any] = request.getfixturevalue("slow" if model == "minilm" else "flags")
    unbroken = {**flags, "--output": tmp_path / "unbroken"}
    assert run_warm(unbroken).code == 0
    flags["--resume"] = "auto"
    seconds = []

    def stop(run: warm.Run) -> str:
        since = terminate([run.pid])
        ended = run.wait(LIMIT_S)
        seconds.append(time.monotonic() - since)
        assert ended.code == 143 and "Traceback" not in ended.errors, ended.errors
        return ended.errors

    for steps in (0, 2):
        if steps:  # without an evaluation to step 2 or a little more
            run = start_warm(flags)
            run.wait_until(steps_logged(flags, steps))
            stop(run)
        run = start_warm({**flags, "--eval": minutes_of_evaluation, "--eval-every": 1})
        run.wait_until(lambda: "batches" in run.log)  # noqa: B023 called at once
        time.sleep(0.5)
        assert "add --resume auto" in stop(run)
        assert log_of(flags, "eval/large") == [], "it did not wait for the end"
        checkpoint, _ = find_checkpoint(Path(flags["--output"]), "auto")
        assert (checkpoint is not None) == bool(steps)
    finished = run_warm(flags)
    assert finished.code == 0, finished.errors
    assert_same_training(flags, unbroken)
    record_row(16, f"{model}: SIGTERM amid a step or an evaluation: gone after {max(seconds):.1f} s at most, resumed")


def test_while_it_starts(flags: dict[str, Any], record_row: RecordRow) -> None:
    for delay_s in (0.3, 1.5):
        process = start(flags)
        time.sleep(delay_s)
        process.send_signal(signal.SIGTERM)
        ended = finish(process, timeout_s=LIMIT_S)
        assert ended.code in TERMINATED and "Traceback" not in ended.errors, ended.errors
    assert run_warm({**flags, "--resume": "auto"}).code == 0
    record_row(16, "SIGTERM while it starts: gone at once (2 times), and it begins again")


def test_amid_a_save_and_an_export(flags: dict[str, Any], tmp_path: Path, record_row: RecordRow) -> None:
    unbroken = {**flags, "--output": tmp_path / "unbroken"}
    assert run_warm(unbroken).code == 0
    for fault, expected in (("unit.written:2=stop", 143), ("export.written=stop", 0)):
        run = start_warm({**flags, "--resume": "auto"}, fault)
        run.wait_until_stopped()
        terminate([run.pid])
        os.kill(run.pid, signal.SIGCONT)
        ended = run.wait(LIMIT_S)
        assert ended.code == expected, ended.errors
        checkpoint, notices = find_checkpoint(Path(flags["--output"]), "auto")
        assert checkpoint is not None and notices == [] and verify_artifact(checkpoint) == []
    assert_same_training(flags, unbroken)
    record_row(16, "SIGTERM amid a save ends it and leaves; amid the export the training ends as if it had not come")


def test_a_second_one_leaves_at_once(flags: dict[str, Any], record_row: RecordRow) -> None:
    """Amid the save that the first one asked for: the checkpoint before stays the newest, and nothing half-written."""
    output = Path(flags["--output"])
    flags |= {"--epochs": 100_000, "--save-every": 100_000, "--resume": "auto"}
    run = start_warm(flags)
    run.wait_until(steps_logged(flags, 3))
    terminate([run.pid])
    assert run.wait(LIMIT_S).code == 143
    before, _ = find_checkpoint(output, "auto")
    assert before is not None

    run = start_warm(flags, "unit.written:2=stop")
    run.wait_until(steps_logged(flags, len(log_of(flags)) + 3))
    terminate([run.pid])
    run.wait_until_stopped()
    time.sleep(2.5)
    terminate([run.pid])
    os.kill(run.pid, signal.SIGCONT)
    assert run.wait(LIMIT_S).code == 143
    assert find_checkpoint(output, "auto") == (before, []) and verify_artifact(before) == []
    assert list(output.rglob("*.tmp")) == []
    record_row(16, "a second SIGTERM amid that save leaves at once, the checkpoint before is whole")


def test_two_signals_of_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    with deferred_signals() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # from the scheduler, and from torchrun, which got it too
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
    """The launcher gets the signal or, from a scheduler, every process; amid a step, then amid an evaluation."""
    slow |= {"--epochs": 200}
    seconds = []
    evaluated = {**slow, "--resume": "auto", "--eval": minutes_of_evaluation, "--eval-every": 1}
    curves = Path(slow["--output"]) / "tensorboard"  # a file for each run that came to its evaluation
    for flags, ready in ((slow, steps_logged(slow, 3)), (evaluated, lambda: len(list(curves.iterdir())) == 2)):
        process = start(flags, ranks=2)
        assert wait_until(ready, process, timeout_s=120)
        time.sleep(2)
        since = terminate([process.pid, *(workers_of(slow["--output"]) if everywhere else [])])
        assert finish(process, timeout_s=LIMIT_S + 10).code != 0
        while workers_of(slow["--output"]):
            assert time.monotonic() - since < LIMIT_S
            time.sleep(0.05)
        seconds.append(time.monotonic() - since)
        assert seconds[-1] < LIMIT_S
        last = log_of(slow)[-1]["step"]
        checkpoint, notices = find_checkpoint(Path(slow["--output"]), "auto")
        assert notices == [] and checkpoint is not None and checkpoint.name == f"step-{last:08d}", "nothing was lost"
    record_row(
        16,
        f"2 ranks, SIGTERM to {'every process' if everywhere else 'torchrun'}: gone after {max(seconds):.1f} s at most "
        "amid a step and amid an evaluation of minutes, no step lost",
    )
