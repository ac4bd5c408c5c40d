"""cli, mostly as a process of its own: exit codes, last lines, signals, and never a traceback."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from hardbatch.pipeline.artifacts.artifact import MANIFEST
from hardbatch.pipeline.artifacts.commit import open_builder
from hardbatch.pipeline.run import plan_corpus

ROOT = Path(__file__).resolve().parents[2]
Finished = tuple[Path, Path, Path]
MISTAKE = "hardbatch: "


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "hardbatch.pipeline.cli", *map(str, arguments)]


def hardbatch(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in its own process."""
    return subprocess.run(
        command(*arguments),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment},
        timeout=120,
    )


def snapshot(folder: Path) -> dict[str, tuple[int, str]]:
    """Modification time and digest of every file, time of every folder."""
    return {
        str(path): (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "")
        for path in [folder, *folder.rglob("*")]
    }


def assert_one_clear_line(stderr: str) -> None:
    assert "Traceback" not in stderr
    assert sum(line.startswith(MISTAKE) for line in stderr.splitlines()) == 1


# start


def test_help_is_quick_and_tells_the_exit_codes() -> None:
    started = time.monotonic()
    result = hardbatch("--help")
    assert time.monotonic() - started < 3.0
    assert result.returncode == 0
    for word in ("run", "plan", "inspect", "verify", "demo", "7 too many broken rows", "130 and 143"):
        assert word in result.stdout


def test_no_heavy_import_before_it_is_needed() -> None:
    code = "import sys, hardbatch.pipeline.cli; print([name for name in HEAVY if name in sys.modules])"
    heavy = ["torch", "polars", "pyarrow", "numpy", "pydantic", "transformers", "sklearn", "prefect", "faiss"]
    result = subprocess.run(
        [sys.executable, "-c", code.replace("HEAVY", repr(heavy))], capture_output=True, text=True, cwd=ROOT
    )
    assert result.stdout == "[]\n"


# run


def test_a_run_prints_the_shards_last_and_a_second_one_changes_nothing(copied_run: Finished) -> None:
    manifest, workspace, _ = copied_run
    shutil.rmtree(workspace)
    moved = manifest.rename(workspace.parent.parent / "elsewhere.toml")
    command = ("run", moved, "--workspace", workspace, "--data-root", manifest.parent, "--set", "pack.seed=1")
    first = hardbatch(*command)
    assert first.returncode == 0, first.stderr
    shards = Path(first.stdout.splitlines()[-1])
    assert (shards / MANIFEST).is_file() and shards.parent.name == "shards"
    assert "steps run: 8, reused: 0" in first.stderr
    before = snapshot(workspace)
    second = hardbatch(*command)
    assert second.returncode == 0
    assert "steps run: 0, reused: 8" in second.stderr
    assert second.stdout == first.stdout
    assert snapshot(workspace) == before


def test_json_prints_one_object_with_the_figures_of_the_run(finished_run: Finished, cli: Any) -> None:
    manifest, workspace, shards = finished_run
    code, out, _ = cli("run", manifest, "--workspace", workspace, "--json")
    found = json.loads(out)
    assert (code, out.count("\n")) == (0, 1)
    assert (found["shards"], found["corpus"], found["steps_run"], found["steps_reused"]) == (str(shards), "small", 0, 8)
    assert (found["batches"], found["batch_size"], found["packings"]) == (6, 8, 1)
    assert (found["domains"]["numbers"]["rows"], found["warnings"], found["log"]) == (48, [], None)


def test_json_has_the_warnings_and_the_log(small_manifest: Path, tmp_path: Path, cli: Any) -> None:
    (tmp_path / "few.jsonl").write_text('{"query": "a", "document": "b"}\n')
    small_manifest.write_text(small_manifest.read_text() + '[[dataset]]\nname = "few"\nsource = "few.jsonl"\n')
    _, out, _ = cli("run", small_manifest, "--workspace", tmp_path / "w", "--json")
    found = json.loads(out)
    assert found["warnings"][-1].startswith("warning: few: its 1 pairs do not fill a batch of 8, so")
    assert Path(found["log"]).parent == tmp_path / "w" / "small" / "logs"


def test_json_reports_a_mistake_too(cli: Any) -> None:
    code, out, err = cli("run", "none.toml", "--json")
    assert (code, json.loads(out)) == (2, {"error": "none.toml: no such manifest", "exit_code": 2})
    assert err == "hardbatch: none.toml: no such manifest\n"


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        (["run", "m.toml", "--set", "pack.seed", "7"], "arguments: 7; write --set pack.seed=7, without blanks"),
        (["plan", "--set", "embed.model", "=", "x", "m.toml"], "; write --set embed.model=x, without blanks"),
        (
            ["run", "m.toml", "--batch-size", "8"],
            "--batch-size 8; did you mean 'pack.batch_size'?; give settings as --set",
        ),
        (["run", "m.toml", "--max-length-tokens=8"], "did you mean 'embed.max_length_tokens'?"),
        (["m.toml"], "; to make the shards of a manifest: hardbatch run MANIFEST"),
        (["verify", "x", "y"], "error: unrecognized arguments: y"),
    ],
)
def test_an_argument_of_another_form_is_answered_with_what_to_write(
    cli: Any, arguments: list[str], advice: str
) -> None:
    code, _, err = cli(*arguments)
    assert code == 2
    assert advice in err.splitlines()[-1]


# exit codes


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ([], 2),
        (["frob"], 2),
        (["run"], 2),
        (["run", "none.toml"], 2),
        (["run", "."], 2),
        (["run", "MANIFEST", "--data-root", "none"], 2),
        (["run", "MANIFEST", "--data-root", "MANIFEST"], 2),
        (["run", "MANIFEST", "--workspace", "MANIFEST"], 2),
        (["run", "MANIFEST", "--workspace", "MANIFEST/below"], 2),
        (["run", "MANIFEST", "--set", "pack.batch_size=0"], 2),
        (["run", "MANIFEST", "--set", "pack.batchsize=8"], 2),
        (["run", "MANIFEST", "--set", "seed=8"], 2),
        (["run", "MANIFEST", "--set"], 2),
        (["plan", "none.toml"], 2),
        (["inspect"], 2),
        (["inspect", "SHARDS", "--log", "none"], 2),
        (["inspect", "none"], 3),
        (["inspect", "MANIFEST"], 3),
        (["inspect", "SHARDS", "--batch", "6"], 2),
        (["inspect", "SHARDS", "--batch", "-1"], 2),
        (["inspect", "SHARDS", "--batch", "x"], 2),
        (["inspect", "SHARDS", "--batch", "1", "--limit", "2"], 2),
        (["inspect", "SHARDS", "--batch", "1", "--sort", "hardness"], 2),
        (["inspect", "SHARDS", "--sort", "slots"], 2),
        (["inspect", "--log", "none", "--batch", "1"], 2),
        (["inspect", "--log", "none", "--limit", "2"], 2),
        (["list", "none"], 3),
        (["list", "."], 3),
        (["gc", "MANIFEST"], 3),
        (["look", "none.csv"], 3),
        (["verify", "none"], 4),
        (["verify", "MANIFEST"], 4),
    ],
)
def test_mistakes_end_in_a_clear_line(
    finished_run: Finished, cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int
) -> None:
    monkeypatch.chdir(tmp_path)
    words = {"MANIFEST": str(finished_run[0]), "SHARDS": str(finished_run[2])}
    filled = [words.get(word, word.replace("MANIFEST/", words["MANIFEST"] + "/")) for word in arguments]
    if arguments[:1] in (["run"], ["plan"]) and "--workspace" not in arguments and len(arguments) > 1:
        filled[2:2] = ["--workspace", str(tmp_path / "w")]
    found, out, err = cli(*filled)
    assert found == code
    assert out == ""
    assert "Traceback" not in err
    assert err.strip()


@pytest.mark.parametrize(
    ("content", "overrides", "code", "words"),
    [
        (b'{"query": "a"}\n', [], 3, ["pairs.jsonl", "no column 'document'", "columns.document"]),
        (b"", [], 3, ["pairs.jsonl", "empty (0 bytes)"]),
        (b"\x1f\x8b\x08\x00cut", [], 3, ["pairs.jsonl", "cut off or broken"]),
        (b"not json\n" * 9, [], 7, ["dataset 'numbers': 9 of 9 rows are broken", "broken_json 9", "staged"]),
        (
            b"not json\n" * 9,
            ["ingest.max_quarantined_fraction=1"],
            3,
            ["numbers 0 of 9 rows: broken_json 9); fix the source"],
        ),
        (b'{"query": "a", "document": "a"}\n', [], 3, ["columns.query and columns.document have the same texts"]),
        (None, ["pack.batch_size=64"], 3, ["no domain fills a batch of 64", "48", "lower pack.batch_size"]),
    ],
)
def test_bad_input_is_told_with_its_exit_code(
    small_manifest: Path, tmp_path: Path, content: bytes | None, overrides: list[str], code: int, words: list[str]
) -> None:
    if content is not None:
        (tmp_path / "pairs.jsonl").write_bytes(content)
    settings = [word for override in overrides for word in ("--set", override)]
    result = hardbatch("run", small_manifest, "--workspace", tmp_path / "w", *settings)
    assert result.returncode == code
    assert result.stdout == ""
    assert_one_clear_line(result.stderr)
    assert all(word in result.stderr for word in words)


def test_a_locked_artifact_is_exit_code_5_and_names_its_owner(small_manifest: Path, tmp_path: Path) -> None:
    step = plan_corpus(small_manifest, tmp_path / "w").steps[0]
    with open_builder(step.path):
        result = hardbatch("run", small_manifest, "--workspace", tmp_path / "w")
    assert result.returncode == 5
    assert_one_clear_line(result.stderr)
    assert f"process {os.getpid()} on " in result.stderr and "since" in result.stderr
    assert not (step.path / MANIFEST).exists()


def test_a_file_in_the_place_of_the_corpus_folder(small_manifest: Path, tmp_path: Path, cli: Any) -> None:
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "small").write_text("x")
    assert cli("run", small_manifest, "--workspace", tmp_path / "w")[0] == 2


# signals and pipes


def test_a_command_runs_in_a_thread(finished_run: Finished, cli: Any) -> None:
    """As web servers and notebooks call it; only the main thread may handle signals."""
    manifest, workspace, shards = finished_run
    with ThreadPoolExecutor(1) as pool:
        code, out, err = pool.submit(cli, "run", manifest, "--workspace", workspace).result()
    assert (code, out.splitlines()[-1:]) == (0, [str(shards)]), err


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_has_its_exit_code_and_the_run_can_go_on(
    copied_run: Finished, sent: signal.Signals, code: int
) -> None:
    manifest, workspace, shards = copied_run
    expected = (shards / MANIFEST).read_bytes()
    shutil.rmtree(workspace)
    process = subprocess.Popen(
        command("run", manifest, "--workspace", workspace), stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT
    )
    deadline = time.monotonic() + 30
    while not list(workspace.rglob(MANIFEST)):  # the first step is done, the next loads its libraries
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(sent)
    out, err = process.communicate(timeout=30)
    assert process.returncode == code, err
    assert out == b""
    assert b"Traceback" not in err and b"run the same command to continue" in err
    again = hardbatch("run", manifest, "--workspace", workspace)
    assert again.returncode == 0
    assert " 0 reused" not in again.stderr
    assert (shards / MANIFEST).read_bytes() == expected


def test_a_signal_whose_error_compiled_code_replaces_still_ends_the_command(
    small_manifest: Path, cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def replacing(*arguments: object, **options: object) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        except BaseException:
            raise TypeError("expected str, bytes or os.PathLike object, not BufferedReader") from None

    monkeypatch.setattr("hardbatch.pipeline.run.plan_corpus", replacing)
    code, _, err = cli("plan", small_manifest)
    assert code == 143 and "terminated" in err


def test_a_reader_that_leaves_is_no_error(finished_run: Finished) -> None:
    read, write = os.pipe()
    os.close(read)
    try:
        result = subprocess.run(command("inspect", finished_run[2]), stdout=write, stderr=subprocess.PIPE, cwd=ROOT)
    finally:
        os.close(write)
    assert (result.returncode, result.stderr) == (0, b"")


def test_output_on_a_terminal_without_unicode(finished_run: Finished) -> None:
    result = hardbatch(
        "plan", finished_run[0], "--workspace", finished_run[1], "--set", "pack.seed=9", PYTHONIOENCODING="latin-1"
    )
    assert result.returncode == 0


# plan, inspect, verify


def test_plan_tells_what_would_run_and_changes_nothing(copied_run: Finished, cli: Any) -> None:
    cli("plan", copied_run[0], "--workspace", copied_run[1])  # digests are cached by path, and the copy has another
    before = snapshot(copied_run[1])
    code, out, _ = cli("plan", copied_run[0], "--workspace", copied_run[1], "--set", "pack.seed=4")
    assert code == 0
    assert "seed 0 → 4" in out and "steps to run: 2, reused: 6" in out
    last = out.splitlines()[-1]
    assert last.startswith("left: unknown, no earlier run to estimate from; free on the workspace's disk: ")
    assert snapshot(copied_run[1]) == before
    (copied_run[0].parent / "pairs.jsonl").write_text('{"query": "a", "document": "b"}\n')
    code, out, _ = cli("plan", copied_run[0], "--workspace", copied_run[1])
    assert "source files differ" in out and "steps to run: 8, reused: 0" in out
    assert "rows not known before they are read: numbers" in out


def test_inspect_shows_the_table_and_a_batch(finished_run: Finished, cli: Any) -> None:
    code, out, _ = cli("inspect", finished_run[2], "--limit", "2")
    assert (code, "4 more batches" in out) == (0, True)
    code, out, _ = cli("inspect", finished_run[2], "--batch", "5")
    assert code == 0 and out.startswith("batch 5 of numbers")


def test_verify_reads_a_whole_workspace(finished_run: Finished, cli: Any) -> None:
    code, out, err = cli("verify", finished_run[1])
    assert (code, err) == (0, "")
    assert out == "artifacts read: 8, faults: 0\n"
    assert cli("verify", finished_run[2])[1] == "artifacts read: 1, faults: 0\n"


@pytest.mark.parametrize("name", ["data/part-00000.parquet", "index.parquet", "README.md", MANIFEST])
def test_verify_names_the_file_of_a_flipped_bit(copied_run: Finished, cli: Any, name: str) -> None:
    file = copied_run[2] / name
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)
    code, out, err = cli("verify", copied_run[1])
    assert code == 4
    assert out == "artifacts read: 8, faults: 1\n"
    assert_one_clear_line(err)
    assert str(file) in err


@pytest.mark.parametrize("fault", ["truncated", "deleted", "swapped"])
def test_a_run_over_a_faulty_artifact_stops_with_exit_code_4(copied_run: Finished, cli: Any, fault: str) -> None:
    (clusters,) = copied_run[1].rglob("clusters.parquet")
    if fault == "truncated":
        clusters.write_bytes(clusters.read_bytes()[:-1])
    elif fault == "deleted":
        clusters.unlink()
    else:
        shutil.copy(clusters.parent / "objective.parquet", clusters)
    code, _, err = cli("run", copied_run[0], "--workspace", copied_run[1])
    assert code == 4
    assert_one_clear_line(err)
    assert "clusters.parquet" in err and f"delete the folder {clusters.parent} and run again" in err
    shutil.rmtree(clusters.parent)
    assert cli("run", copied_run[0], "--workspace", copied_run[1])[0] == 0
