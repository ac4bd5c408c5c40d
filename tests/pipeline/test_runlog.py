"""runlog and views.log: a line for each step, beside the artifacts, and the table of a log."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from hardbatch.pipeline import runlog
from hardbatch.pipeline.artifacts.artifact import iter_artifact_paths, read_artifact, verify_artifact
from hardbatch.pipeline.artifacts.commit import open_builder
from hardbatch.pipeline.artifacts.files import sha256_file
from hardbatch.pipeline.errors import HardbatchError, InputError, IntegrityError
from hardbatch.pipeline.run import plan_corpus, run_step
from hardbatch.pipeline.runlog import LOGS, RunLog, open_run_log, read_log
from hardbatch.pipeline.views.log import find_log, log_text

ROOT = Path(__file__).resolve().parents[2]
STAGES = ["pairs", "answers", "vectors", "clusters", "hardness", "consistency", "batches", "shards"]
HEAD = {"event": "run", "format": 1}
Finished = tuple[Path, Path, Path]


def records(workspace: Path) -> list[dict[str, Any]]:
    """The records of the newest log in the workspace: every line must be one."""
    return [json.loads(line) for line in find_log(workspace).read_text().splitlines()]


def stages_of(found: Sequence[dict[str, Any]], event: str) -> list[str]:
    return [record["stage"] for record in found if record["event"] == event]


# what a run writes


def test_every_step_has_a_record_beside_the_artifacts(small_manifest: Path, tmp_path: Path, cli: Any) -> None:
    code, _, _ = cli("run", small_manifest, "--workspace", tmp_path / "w", "--set", "write.batches_per_part=2")
    assert code == 0
    head, *steps, end = records(tmp_path / "w")
    assert (head["event"], head["manifest_sha256"]) == ("run", sha256_file(small_manifest))
    assert (head["overrides"], head["pid"]) == ({"write.batches_per_part": "2"}, os.getpid())
    assert {"hardbatch", "numpy", "torch", "python"} <= set(head["libraries"])
    assert (end["event"], end["exit_code"]) == ("end", 0)
    assert stages_of(steps, "finished") == STAGES
    made = {path.name: read_artifact(path) for path in iter_artifact_paths(tmp_path / "w")}
    for step in steps:
        assert step["bytes"] == made[step["key"]].bytes and verify_artifact(made[step["key"]].path) == []
        assert step["rows"] == (96 if step["stage"] == "vectors" else 48) and step["units_before"] == 0
        assert step["time"].endswith("Z") and step["seconds"] > 0
        assert not Path("/proc/self/status").exists() or 10 < step["peak_rss_mib"] < 100_000


def test_a_run_that_makes_nothing_writes_nothing(copied_run: Finished, cli: Any) -> None:
    manifest, workspace, _ = copied_run
    assert cli("run", manifest, "--workspace", workspace)[0] == 0
    (batches,) = (s for s in plan_corpus(manifest, workspace, overrides=["pack.seed=1"]).steps if s.stage == "batches")
    with open_builder(batches.path):
        assert cli("run", manifest, "--workspace", workspace, "--set", "pack.seed=1")[0] == 5
    assert list(workspace.rglob(LOGS)) == []


def test_what_is_reused_is_recorded_once_something_is_made(copied_run: Finished, cli: Any) -> None:
    manifest, workspace, _ = copied_run
    assert cli("run", manifest, "--workspace", workspace, "--set", "pack.seed=1")[0] == 0
    found = records(workspace)
    assert [record["event"] for record in found] == ["run", *["reused"] * 6, *["finished"] * 2, "end"]
    assert (stages_of(found, "reused"), stages_of(found, "finished")) == (STAGES[:6], STAGES[6:])
    text = log_text(workspace)
    assert "steps run: 2, reused: 6" in text and "done at " in text


def test_a_failure_is_recorded_as_its_user_read_it(small_manifest: Path, tmp_path: Path, cli: Any) -> None:
    (tmp_path / "pairs.jsonl").write_text("not json\n" * 9)
    code, _, err = cli("run", small_manifest, "--workspace", tmp_path / "w")
    line = err.splitlines()[-1].removeprefix("hardbatch: ")
    _, failed, end = records(tmp_path / "w")
    assert code == 7 and (failed["event"], failed["stage"], end["event"]) == ("failed", "pairs", "end")
    assert (failed["exit_code"], failed["line"]) == (end["exit_code"], end["line"]) == (7, line)
    text = log_text(tmp_path / "w")
    assert f"with exit code 7: {line}" in text and "failed, exit code 7" in text and "steps run: 0, reused: 0" in text


def test_damage_of_an_input_is_recorded_as_such(copied_run: Finished, cli: Any) -> None:
    manifest, workspace, _ = copied_run
    (pairs,) = workspace.rglob("pairs.parquet")
    pairs.write_bytes(b"PAR1" + bytes(pairs.stat().st_size - 8) + b"PAR1")
    code, _, err = cli("run", manifest, "--workspace", workspace, "--set", "pack.seed=1")
    (failed,) = (record for record in records(workspace) if record["event"] == "failed")
    assert (code, failed["exit_code"], failed["stage"]) == (4, 4, "batches")
    assert failed["line"] in err and "pairs.parquet" in failed["line"]


def test_an_unforeseen_error_is_recorded_as_what_it_is(
    small_manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stage(*_: object) -> None:
        raise ZeroDivisionError("of a stage")

    monkeypatch.setattr("hardbatch.pipeline.stages.ingest.build", stage)
    step = plan_corpus(small_manifest, tmp_path / "w").steps[0]
    settings = ["pack.seed=1", "pack.seed=2"]
    with pytest.raises(ZeroDivisionError), open_run_log(tmp_path / "w" / "c", small_manifest, settings) as log:
        run_step(step, log=log)
    found = records(tmp_path / "w")
    assert [record["event"] for record in found] == ["run", "failed", "end"]
    assert found[0]["overrides"] == {"pack.seed": "2"}
    assert (found[2]["exit_code"], found[2]["line"]) == (1, "ZeroDivisionError: of a stage")


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM])
def test_an_ended_run_leaves_whole_lines_and_the_next_its_own_log(
    small_manifest: Path, tmp_path: Path, sent: signal.Signals, cli: Any
) -> None:
    workspace = tmp_path / "w"
    process = subprocess.Popen(
        [sys.executable, "-m", "hardbatch.pipeline.cli", "run", str(small_manifest), "--workspace", str(workspace)],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not list(workspace.glob("*/vectors/*/*")):  # this step loads its libraries first
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, sent)
    process.wait(60)
    found, text = records(workspace), log_text(workspace)
    assert stages_of(found, "finished") == ["pairs", "answers"]
    if sent == signal.SIGKILL:
        assert "no end: killed, or still running; last line at " + found[-1]["time"] in text
    else:
        assert (found[-1]["exit_code"], found[-1]["line"]) == (143, "terminated")
        assert "with exit code 143: terminated" in text
    assert cli("run", small_manifest, "--workspace", workspace)[0] == 0
    assert len(list(workspace.glob(f"*/{LOGS}/*"))) == 2
    assert stages_of(records(workspace), "reused") == ["pairs", "answers"]


# lines


def reused(number: int, **more: Any) -> dict[str, Any]:
    return {"event": "reused", "time": f"t{number}", "stage": "pairs", "domain": "ü", "key": "k", **more}


def test_a_torn_last_line_is_left_out_wherever_it_is_torn(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    log = RunLog(path=path)
    for number in range(3):
        log.write(reused(number))
    whole = path.read_bytes()
    last = whole.rindex(b"\n", 0, -1) + 1
    for end in range(last, len(whole) - 1):
        path.write_bytes(whole[:end])
        run = read_log(path)
        assert (run.num_reused, run.last_time, run.torn_lines) == (2, "t1", int(end > last))
    log.write(reused(3))
    run = read_log(path)
    assert (run.num_reused, run.last_time, run.torn_lines) == (3, "t3", 1)
    assert "lines that cannot be read, left out: 1" in log_text(path)


def _write_many(path: Path, writer: int) -> None:
    log = RunLog(path=path)
    for number in range(150):
        log.write({"event": "reused", "writer": writer, "number": number, "filling": "x" * (number * 37 % 9_000)})


def test_lines_of_several_processes_are_never_mixed(tmp_path: Path) -> None:
    path = tmp_path / LOGS / "log.jsonl"
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_write_many, args=(path, writer)) for writer in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    head, *found = map(json.loads, path.read_text().splitlines())
    assert head["event"] == "run" and all(len(record["filling"]) == record["number"] * 37 % 9_000 for record in found)
    for writer in range(4):
        assert [record["number"] for record in found if record["writer"] == writer] == list(range(150))


def test_a_line_that_does_not_fit_is_taken_back_and_warned_of_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log = RunLog(path=tmp_path / "log.jsonl")
    log.write(reused(0))
    before = (tmp_path / "log.jsonl").read_bytes()
    write = os.write
    monkeypatch.setattr(runlog.os, "write", lambda descriptor, data: write(descriptor, data[:9]))
    for _ in range(3):
        log.write(reused(1))
    assert (tmp_path / "log.jsonl").read_bytes() == before
    assert capsys.readouterr().err.count("No space left on device; the run continues without it") == 1
    monkeypatch.undo()
    log.write(reused(2))
    assert read_log(tmp_path / "log.jsonl").last_time == "t2"


def test_a_full_disk_of_the_logs_ends_no_run(finished_run: Finished, tmp_path: Path) -> None:
    manifest, _, shards = finished_run
    logs = tmp_path / "w" / "small" / LOGS
    logs.mkdir(parents=True)
    if os.getuid() != 0 or shutil.which("mount") is None:
        pytest.skip("needs root, to mount a small tmpfs")
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", str(logs)], capture_output=True).returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    try:
        (logs / "filling").write_bytes(bytes(4_096))
        command = [sys.executable, "-m", "hardbatch.pipeline.cli", "run", manifest, "--workspace", tmp_path / "w"]
        result = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=ROOT)
        assert (result.returncode, result.stderr.count("No space left on device")) == (0, 1), result.stderr
    finally:
        subprocess.run(["umount", str(logs)], check=True)
    made = Path(result.stdout.splitlines()[-1])
    assert (made / "manifest.json").read_bytes() == (shards / "manifest.json").read_bytes()


def test_a_file_in_the_place_of_the_logs_ends_no_run(copied_run: Finished, cli: Any) -> None:
    manifest, workspace, _ = copied_run
    (workspace / "small" / LOGS).write_text("x")
    code, _, err = cli("run", manifest, "--workspace", workspace, "--set", "pack.seed=1")
    assert (code, err.count("the run continues without it")) == (0, 1)


# the table


def test_the_table_adds_up_what_steps_took(tmp_path: Path) -> None:
    log = RunLog(path=tmp_path / "c" / LOGS / "2026.jsonl", head={"command": "hardbatch run x"})
    step = {"event": "finished", "time": "t", "stage": "vectors", "domain": "d", "key": "k"}
    log.write({**step, "event": "unit"}, {**step, "rows": 4_000, "seconds": 8.0, "bytes": 3_000, "peak_rss_mib": 300.4})
    log.write({**step, "stage": "hardness", "seconds": 2.0, "bytes": 0})  # as earlier versions wrote it
    log.write({"event": "end", "time": "t9", "exit_code": 0, "line": "", "seconds": 10.5})
    lines = log_text(tmp_path).splitlines()
    assert lines[3].split() == ["vectors", "d", "4,000", "8.0", "500", "3,000", "300"]
    assert lines[4].split() == ["hardness", "d", "2.0", "0"]
    assert lines[5].split() == ["all", "10.0", "3,000", "300"]
    assert lines[-2:] == ["steps run: 2, reused: 0", "done at t9, after 10.5 s"]


def test_the_newest_log_of_a_folder_is_shown(tmp_path: Path) -> None:
    for corpus, name in (("a", "20261125T1"), ("b", "20261125T3"), ("c", "20261125T2")):
        RunLog(path=tmp_path / corpus / LOGS / f"{name}.jsonl").write({"event": "end", "time": name})
    assert find_log(tmp_path).parent.parent.name == "b"
    assert find_log(tmp_path / "a").name == find_log(tmp_path / "a" / LOGS).name == "20261125T1.jsonl"


@pytest.mark.parametrize(
    ("content", "error", "words"),
    [
        (None, InputError, "No such file"),
        (b"", InputError, "is empty"),
        (b"PAR1" + bytes(range(256)) * 9, InputError, "is not a run log"),
        (b"[" * 50_000, InputError, "is not a run log"),
        (b'["run"]\n', InputError, "is not a run log"),
        (b'{"event": "end"}\n', InputError, "is not a run log"),
        (b'{"event": "run", "format": "1"}\n', InputError, "is not a run log"),
        (json.dumps(HEAD).encode()[:-4], InputError, "cut off in its first line"),
        (b'{"event": "run", "format": 2}\n', IntegrityError, "format version 2, this hardbatch reads up to 1"),
    ],
)
def test_what_is_no_log_is_refused_in_one_line(
    tmp_path: Path, content: bytes | None, error: type[HardbatchError], words: str, cli: Any
) -> None:
    path = tmp_path / "log.jsonl"
    if content is not None:
        path.write_bytes(content)
    code, out, err = cli("inspect", "--log", path)
    assert (code, out, len(err.splitlines())) == (error.exit_code, "", 1)
    assert str(path) in err and words in err


def test_a_folder_without_logs_is_refused(tmp_path: Path, cli: Any) -> None:
    code, _, err = cli("inspect", "--log", tmp_path)
    assert code == 3 and "no run log here" in err


@pytest.mark.parametrize(
    "line",
    [
        b"{", b"\xff\xfe", b"[]", b"null", b'{"event": "new", "time": "t"}', b'{"event": "finished", "time": 1}',
        b'{"event": "finished", "time": "t", "stage": "s", "domain": "d", "rows": "many", "seconds": 1, "bytes": 1}',
        b'{"event": "failed", "time": "t", "stage": "s", "domain": "d", "seconds": 1}',
    ],
)  # fmt: skip
def test_a_line_that_is_none_of_ours_is_counted(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "log.jsonl"
    end = b'{"event": "end", "time": "t", "exit_code": 0, "line": "", "seconds": 1}\n'
    path.write_bytes(json.dumps(HEAD).encode() + b"\n" + line + b"\n" + end)
    run = read_log(path)
    assert run.torn_lines == 1 and run.ended is not None and not run.steps
    assert "left out: 1" in log_text(path)
