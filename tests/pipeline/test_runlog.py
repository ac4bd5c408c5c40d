"""runlog and logtable: a line for each committed unit, beside the artifacts, and their table."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from hardbatch.pipeline import runlog
from hardbatch.pipeline.artifacts.artifact import iter_artifact_paths, read_artifact, verify_artifact
from hardbatch.pipeline.artifacts.commit import open_builder, write_unit
from hardbatch.pipeline.artifacts.files import sha256_file
from hardbatch.pipeline.cli import main
from hardbatch.pipeline.errors import HardbatchError, InputError, IntegrityError
from hardbatch.pipeline.run import plan_corpus
from hardbatch.pipeline.runlog import LOGS, RunLog, open_run_log
from hardbatch.pipeline.step import Progress, Step, Unit, Work, run_pending
from hardbatch.pipeline.views.log import find_log, log_text, read_log

ROOT = Path(__file__).resolve().parents[2]
STAGES = ["pairs", "vectors", "clusters", "hardness", "batches", "shards"]
Finished = tuple[Path, Path, Path]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """`cli(*arguments)`: (exit code, stdout, stderr) of the command in this process."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return run


def records(workspace: Path) -> list[dict[str, Any]]:
    """The records of the newest log in the workspace: every line must be one."""
    lines = find_log(workspace).read_text().splitlines()
    return [json.loads(line) for line in lines]


def of_event(found: Sequence[dict[str, Any]], event: str) -> list[dict[str, Any]]:
    return [record for record in found if record["event"] == event]


def a_step(folder: Path, domain: str = "d") -> Step:
    return Step(stage="vectors", stage_version=1, domain=domain, key="k", path=folder / "vectors" / "k", config={})


# what a run writes


def test_every_committed_unit_has_a_record_beside_the_artifacts(small_manifest: Path, tmp_path: Path, cli: Any) -> None:
    workspace = tmp_path / "w"
    code, out, _ = cli("run", small_manifest, "--workspace", workspace, "--set", "write.batches_per_part=2")
    assert code == 0
    found = records(workspace)
    head = found[0]
    assert head["event"] == "run" and head["manifest_sha256"] == sha256_file(small_manifest)
    assert (head["overrides"], head["pid"]) == ({"write.batches_per_part": "2"}, os.getpid())
    assert {"hardbatch", "numpy", "torch", "python"} <= set(head["libraries"])
    units = of_event(found, "unit")
    written = Counter((unit["stage"], unit["domain"], unit["unit"]) for unit in units)
    committed: Counter[tuple[str, str, str]] = Counter()
    for path in iter_artifact_paths(workspace):
        manifest = read_artifact(path).manifest
        committed.update((manifest.stage, manifest.domain, file.stem) for file in path.glob("units/*.json"))
        assert verify_artifact(path) == []
    committed["pairs", "numbers", "staged-00000"] = 1  # cleared away once they are joined
    assert written == committed
    assert [record["stage"] for record in of_event(found, "finished")] == STAGES
    assert found[-1]["event"] == "end" and found[-1]["exit_code"] == 0
    rows = Counter[str]()
    for unit in units:
        rows[unit["stage"]] += unit["rows"] or 0
        assert unit["time"].endswith("Z") and unit["seconds"] >= 0
    assert rows == {"pairs": 48, "vectors": 96, "clusters": 48, "hardness": 0, "batches": 48, "shards": 48}
    if runlog.HIGH_WATER.exists():
        assert all(10 < unit["peak_rss_mib"] < 100_000 for unit in units)
    shards = Path(out.splitlines()[-1])
    parts = [unit for unit in units if unit["unit"].startswith("part-")]
    assert len(parts) == 3
    data = sum(file.stat().st_size for file in (shards / "data").iterdir())
    assert data < sum(unit["bytes"] for unit in parts) < data + 30_000  # with the pieces of the index


def test_a_run_that_makes_nothing_writes_nothing(copied_run: Finished, cli: Any) -> None:
    manifest, workspace, _ = copied_run
    assert cli("run", manifest, "--workspace", workspace)[0] == 0
    assert list(workspace.rglob(LOGS)) == []
    plan = plan_corpus(manifest, workspace, overrides=["pack.seed=1"])
    (batches,) = (step for step in plan.steps if step.stage == "batches")
    with open_builder(batches.path):
        assert cli("run", manifest, "--workspace", workspace, "--set", "pack.seed=1")[0] == 5
    assert list(workspace.rglob(LOGS)) == []


def test_what_is_reused_is_told_once_something_is_made(copied_run: Finished, cli: Any) -> None:
    manifest, workspace, _ = copied_run
    assert cli("run", manifest, "--workspace", workspace, "--set", "pack.seed=1")[0] == 0
    found = records(workspace)
    assert [record["stage"] for record in of_event(found, "reused")] == STAGES[:4]
    assert [record["stage"] for record in of_event(found, "finished")] == STAGES[4:]
    assert [record["event"] for record in found[:6]] == ["run", *["reused"] * 4, "begin"]
    text = log_text(workspace)
    assert "steps run: 2, reused: 4" in text and "done at " in text


def test_a_failure_is_told_as_its_user_read_it(small_manifest: Path, tmp_path: Path, cli: Any) -> None:
    (tmp_path / "pairs.jsonl").write_text("not json\n" * 9)
    code, _, err = cli("run", small_manifest, "--workspace", tmp_path / "w")
    assert code == 7
    found = records(tmp_path / "w")
    told = err.splitlines()[-1].removeprefix("hardbatch: ")
    (failed,) = of_event(found, "failed")
    assert (failed["stage"], failed["exit_code"], failed["line"]) == ("pairs", 7, told)
    assert (found[-1]["event"], found[-1]["exit_code"], found[-1]["line"]) == ("end", 7, told)
    text = log_text(tmp_path / "w")
    assert f"with exit code 7: {told}" in text and "failed, exit code 7" in text


def test_damage_of_an_input_is_told_as_such(copied_run: Finished, cli: Any) -> None:
    manifest, workspace, _ = copied_run
    (pairs,) = workspace.rglob("pairs.parquet")
    pairs.write_bytes(b"PAR1" + bytes(pairs.stat().st_size - 8) + b"PAR1")
    code, _, err = cli("run", manifest, "--workspace", workspace, "--set", "pack.seed=1")
    assert code == 4
    (failed,) = of_event(records(workspace), "failed")
    assert (failed["exit_code"], failed["stage"]) == (4, "batches")
    assert failed["line"] in err and "pairs.parquet" in failed["line"]


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM])
def test_an_ended_run_leaves_whole_lines_and_the_next_its_own_log(
    small_manifest: Path, tmp_path: Path, sent: signal.Signals, cli: Any
) -> None:
    workspace = tmp_path / "w"
    process = subprocess.Popen(
        [sys.executable, "-m", "hardbatch.pipeline.cli", "run", str(small_manifest), "--workspace", str(workspace)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while not list(workspace.glob("*/pairs/*/*/manifest.json")):  # the next step loads its libraries
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, sent)
    process.wait(60)
    found = records(workspace)
    text = log_text(workspace)
    assert [unit["unit"] for unit in of_event(found, "unit")][:2] == ["staged-00000", "assembled"]
    if sent == signal.SIGKILL:
        assert of_event(found, "end") == []
        assert "no end: killed, or still running; last line at " + found[-1]["time"] in text
    else:
        assert (found[-1]["exit_code"], found[-1]["line"]) == (143, "terminated")
        assert "with exit code 143: terminated" in text
    assert cli("run", small_manifest, "--workspace", workspace)[0] == 0
    assert len(list(workspace.glob(f"*/{LOGS}/*"))) == 2
    again = records(workspace)
    assert [record["stage"] for record in of_event(again, "reused")][:1] == ["pairs"]
    assert again[-1]["exit_code"] == 0


# lines


def test_a_torn_last_line_is_left_out_wherever_it_is_torn(tmp_path: Path) -> None:
    log = RunLog(path=tmp_path / "log.jsonl")
    for number in range(3):
        log.write({"event": "reused", "time": f"t{number}", "stage": "pairs", "domain": "ü", "key": "k"})
    whole = (tmp_path / "log.jsonl").read_bytes()
    last = whole.rindex(b"\n", 0, -1) + 1
    for end in range(last, len(whole) - 1):
        (tmp_path / "log.jsonl").write_bytes(whole[:end])
        run = read_log(tmp_path / "log.jsonl")
        assert (run.num_reused, run.last_time, run.torn_lines) == (2, "t1", int(end > last))
    log.write({"event": "reused", "time": "t3", "stage": "pairs", "domain": "ü", "key": "k"})
    run = read_log(tmp_path / "log.jsonl")
    assert (run.num_reused, run.last_time, run.torn_lines) == (3, "t3", 1)
    assert "lines that cannot be read, left out: 1" in log_text(tmp_path / "log.jsonl")


def _write_many(path: Path, writer: int) -> None:
    log = RunLog(path=path, head={"writer": writer})
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
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["event"] for record in found].count("run") == 1 and found[0]["event"] == "run"
    for writer in range(4):
        own = [record for record in found[1:] if record["writer"] == writer]
        assert [record["number"] for record in own] == list(range(150))
        assert all(len(record["filling"]) == record["number"] * 37 % 9_000 for record in own)


@dataclass(frozen=True)
class _Work:
    """Commits units of a file each."""

    path: Path

    def open(self) -> _Work:
        return self

    def prepare(self, unit: Unit) -> None:
        return None

    def commit(self, unit: Unit, prepared: None) -> None:
        with write_unit(self.path, unit.name) as writer:
            writer.add_file(f"data/{unit.name}", rows=unit.stop - unit.start).write_text(unit.name)


class _InProcesses:
    """Runs each half of the units in a process of its own."""

    def run(self, work: Work, units: Sequence[Unit], progress: Progress) -> None:
        with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
            for done in [pool.submit(_run_units, work, units[start::2]) for start in (0, 1)]:
                done.result()


def _run_units(work: Work, units: Sequence[Unit]) -> None:
    worker = work.open()
    for unit in units:
        worker.commit(unit, worker.prepare(unit))


def test_units_that_other_processes_run_are_told_too(tmp_path: Path) -> None:
    from hardbatch.pipeline.progress import SilentProgress

    step = a_step(tmp_path)
    units = [Unit(name=f"u{number}", start=number * 10, stop=number * 10 + 10) for number in range(6)]
    log = RunLog(path=tmp_path / LOGS / "log.jsonl")
    log.reused(a_step(tmp_path, "other"))
    with open_builder(step.path) as builder:
        _run_units(_Work(step.path), units[:1])
        with log.step(step) as told:
            told.begin({"u0"})
            work = _Work(step.path)
            names = run_pending(builder, told.units_by(_InProcesses()), work, units, SilentProgress(), "x")
            with write_unit(step.path, "joined"):
                pass
            told.committed([*names, "joined"])
    found = [json.loads(line) for line in log.path.read_text().splitlines()] if log.path else []
    told_units = of_event(found, "unit")
    assert sorted(unit["unit"] for unit in told_units) == ["joined", "u1", "u2", "u3", "u4", "u5"]
    assert len({unit["pid"] for unit in told_units}) == 3
    assert sum(unit["rows"] or 0 for unit in told_units) == 50
    assert (found[1]["event"], found[2]["units_before"]) == ("reused", 1)


# a disk that is full


def test_a_line_that_does_not_fit_is_taken_back_and_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log = RunLog(path=tmp_path / "log.jsonl")
    log.write({"event": "reused", "time": "t0"})
    before = (tmp_path / "log.jsonl").read_bytes()
    write = os.write
    monkeypatch.setattr(runlog.os, "write", lambda descriptor, data: write(descriptor, data[:9]))
    for _ in range(3):
        log.write({"event": "reused", "time": "t1"})
    assert (tmp_path / "log.jsonl").read_bytes() == before
    assert capsys.readouterr().err.count("No space left on device; the run goes on without it") == 1
    monkeypatch.undo()
    log.write({"event": "reused", "time": "t2"})
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
        result = subprocess.run(
            [sys.executable, "-m", "hardbatch.pipeline.cli", "run", str(manifest), "--workspace", str(tmp_path / "w")],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert (result.returncode, result.stderr.count("No space left on device")) == (0, 1), result.stderr
        found = records(tmp_path / "w")  # every line is whole
        assert 2 < len(found) < 20 and found[0]["event"] == "run"
    finally:
        subprocess.run(["umount", str(logs)], check=True)
    made = Path(result.stdout.splitlines()[-1])
    assert (made / "manifest.json").read_bytes() == (shards / "manifest.json").read_bytes()


def test_a_file_in_the_place_of_the_logs_ends_no_run(copied_run: Finished, cli: Any) -> None:
    manifest, workspace, _ = copied_run
    (workspace / "small" / LOGS).write_text("x")
    code, _, err = cli("run", manifest, "--workspace", workspace, "--set", "pack.seed=1")
    assert (code, err.count("the run goes on without it")) == (0, 1)


# the table


def test_the_table_adds_up_what_units_took(tmp_path: Path) -> None:
    log = RunLog(path=tmp_path / "c" / LOGS / "2026.jsonl", head={"command": "hardbatch run x"})
    step = {"stage": "vectors", "domain": "d", "key": "k"}
    unit = {"event": "unit", "time": "t", **step, "unit": "u", "seconds": 2.0, "bytes": 1_000, "pid": 1}
    log.write({"event": "begin", "time": "t", **step, "units_before": 0})
    log.write({**unit, "rows": 3_000, "peak_rss_mib": 200.0})
    log.write({**unit, "rows": 1_000, "peak_rss_mib": 300.4})
    log.write({**unit, "rows": None, "peak_rss_mib": None})
    unfinished = log_text(tmp_path).splitlines()
    assert unfinished[3].split() == ["vectors", "d", "3", "4,000", "6.0", "667", "3,000", "300", "not", "finished"]
    assert "steps run: 0, reused: 0" in unfinished and unfinished[-1].startswith("no end: killed, or still running")
    log.write({"event": "finished", "time": "t", **step, "seconds": 8.0, "bytes": 3_000})
    log.write({"event": "end", "time": "t9", "exit_code": 0, "line": "", "seconds": 9.5})
    done = log_text(tmp_path / "c").splitlines()
    assert done[3].split() == ["vectors", "d", "3", "4,000", "8.0", "500", "3,000", "300"]
    assert done[4].split() == ["all", "3", "8.0", "3,000", "300"]
    assert done[-2:] == ["steps run: 1, reused: 0", "done at t9, after 9.5 s"]


def test_the_newest_log_of_a_folder_is_shown(tmp_path: Path) -> None:
    for corpus, name in (("a", "20261125T1"), ("b", "20261125T3"), ("c", "20261125T2")):
        RunLog(path=tmp_path / corpus / LOGS / f"{name}.jsonl").write({"event": "end", "time": name})
    assert find_log(tmp_path).parent.parent.name == "b"
    assert find_log(tmp_path / "a").name == find_log(tmp_path / "a" / LOGS).name == "20261125T1.jsonl"


HEAD = {"event": "run", "format": 1}


@pytest.mark.parametrize(
    ("content", "error", "words"),
    [
        (None, InputError, "No such file"),
        (b"", InputError, "is empty"),
        (b"PAR1" + bytes(range(256)) * 9, InputError, "is no run log"),
        (b"[" * 50_000, InputError, "is no run log"),
        (b'["run"]\n', InputError, "is no run log"),
        (b'{"event": "unit"}\n', InputError, "is no run log"),
        (b'{"event": "run", "format": "1"}\n', InputError, "is no run log"),
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


def test_a_folder_without_logs_and_arguments_that_do_not_go_together(
    finished_run: Finished, tmp_path: Path, cli: Any
) -> None:
    code, _, err = cli("inspect", "--log", tmp_path)
    assert code == 3 and "no run log here" in err
    for arguments in ([], [finished_run[2], "--log", tmp_path]):
        code, _, err = cli("inspect", *arguments)
        assert code == 2 and "either a shards folder or --log" in err


@pytest.mark.parametrize(
    "line",
    [
        b"{", b"\xff\xfe", b"[]", b"null", b'{"event": "new"}', b'{"event": "unit", "time": 1}',
        b'{"event": "unit", "time": "t", "stage": "s", "domain": "d", "rows": "many", "seconds": 1, "bytes": 1}',
    ],
)  # fmt: skip
def test_a_line_that_is_none_of_ours_is_counted(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "log.jsonl"
    end = b'{"event": "end", "time": "t", "exit_code": 0, "line": "", "seconds": 1}\n'
    path.write_bytes(json.dumps(HEAD).encode() + b"\n" + line + b"\n" + end)
    run = read_log(path)
    assert run.torn_lines == 1 and run.ended is not None
    assert "left out: 1" in log_text(path)


def test_an_unforeseen_error_is_told_as_what_it_is(small_manifest: Path, tmp_path: Path) -> None:
    with (
        pytest.raises(ZeroDivisionError),
        open_run_log(tmp_path / "c", small_manifest, ["pack.seed=1", "pack.seed=2"]) as log,
        log.step(a_step(tmp_path)) as told,
    ):
        told.begin(set())
        raise ZeroDivisionError("of a stage")
    found = records(tmp_path)
    assert [record["event"] for record in found] == ["run", "begin", "failed", "end"]
    assert found[0]["overrides"] == {"pack.seed": "2"}
    assert (found[3]["exit_code"], found[3]["line"]) == (1, "ZeroDivisionError: of a stage")
