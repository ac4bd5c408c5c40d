"""Row 15: a full disk at any step ends in exit code 6, with all before it whole, and the run can continue later."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from hardbatch.pipeline import cli
from hardbatch.pipeline.artifacts.artifact import iter_artifact_paths, verify_artifact
from hardbatch.pipeline.run import plan_corpus, run_step
from hardbatch.pipeline.step import Step
from tests.reliability import processes
from tests.reliability.conftest import Disk

SETTINGS = """corpus = "c"
[[dataset]]
name = "n"
source = "pairs.jsonl"
holdout = 0.1
[embed]
model = "lexical"
surrogate_model = "lexical"
unit_rows = 64
[pack]
batch_size = 8
[write]
batches_per_part = 16
"""
ROOMY = 64 * 2**20
Record = Callable[[int, str], None]


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Step]]:
    """(manifest, steps) of a run on a roomy disk."""
    folder = tmp_path_factory.mktemp("clean")
    draw = random.Random(0)
    words = ["".join(draw.choices("aeioubcdfglmnprst", k=draw.randint(2, 9))) for _ in range(2_000)]
    rows = ({side: " ".join(draw.choices(words, k=30)) for side in ("query", "document")} for _ in range(500))
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "c.toml").write_text(SETTINGS)
    steps = list(plan_corpus(folder / "c.toml", folder / "workspace").steps)
    for step in steps:
        run_step(step)
    return folder / "c.toml", steps


def lay_out(clean: tuple[Path, list[Step]], number: int, workspace: Path) -> Step:
    """Copies the artifacts of the steps before `number`; returns the step to come."""
    _, steps = clean
    workspace.mkdir(parents=True)
    for step in steps[:number]:
        shutil.copytree(step.path, workspace / step.path.relative_to(steps[-1].path.parents[1]))
    return steps[number]


def bytes_of(step: Step) -> int:
    """Bytes that the artifact of a step takes, in whole pages."""
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in step.path.rglob("*") if path.is_file())


def check_full(errors: str, workspace: Path, steps: list[Step]) -> int:
    """One clear line, the steps before the full one whole, that one not visible; returns its number."""
    lines = [line for line in errors.splitlines() if line.startswith("hardbatch:")]
    assert len(lines) == 1 and "Traceback" not in errors, errors
    assert "no space left" in lines[0] and "run the same command again" in lines[0]
    found = list(iter_artifact_paths(workspace))
    assert sorted(path.name for path in found) == sorted(step.key for step in steps[: len(found)])
    assert [fault for path in found for fault in verify_artifact(path)] == []
    return len(found)


def check_same(workspace: Path, steps: list[Step]) -> None:
    """Every artifact has the bytes of the clean run, and nothing is left beside them."""
    for step in steps:
        assert processes.tree(workspace / step.path.relative_to(steps[-1].path.parents[1])) == processes.tree(step.path)
    assert [path for path in workspace.rglob(".*") if path.name != ".digests.json"] == []


def test_a_disk_that_fills_in_one_step_after_the_other(
    clean: tuple[Path, list[Step]], disk: Disk, capsys: pytest.CaptureFixture[str], record_row: Record
) -> None:
    manifest, steps = clean
    workspace = disk.path / "workspace"
    command = ["run", str(manifest), "--workspace", str(workspace)]
    planned = plan_corpus(manifest, workspace).steps
    for number, step in enumerate(steps):
        disk.resize(disk.used + bytes_of(step) // 2)
        assert cli.main(command) == 6
        assert check_full(capsys.readouterr().err, workspace, steps) == number
        disk.resize(ROOMY)
        assert run_step(planned[number])
    assert cli.main(command) == 0
    check_same(workspace / "c", steps)
    record_row(15, f"full at each of {len(steps)} stages: exit code 6, all before whole, same bytes once there is room")


@pytest.mark.parametrize(
    ("stage", "part"),
    [
        ("pairs", 0.0),
        *(
            pytest.param(stage, part, marks=pytest.mark.soak)
            for stage in ("pairs", "answers", "vectors", "clusters", "hardness", "consistency", "batches", "shards")
            for part in (0.0, 0.25, 0.75, 0.9)
            if (stage, part) != ("pairs", 0.0)
        ),
    ],
)
def test_a_disk_that_fills_in_a_step(
    clean: tuple[Path, list[Step]], disk: Disk, stage: str, part: float, record_row: Record
) -> None:
    manifest, steps = clean
    number = [step.stage for step in steps].index(stage)
    workspace = disk.path / "workspace"
    step = lay_out(clean, number, workspace / "c")
    plan_corpus(manifest, workspace)
    disk.resize(disk.used + int(bytes_of(step) * part))
    words = ["run", manifest, "--workspace", workspace]
    ended = processes.run([*processes.HARDBATCH, *words])
    assert ended.code == 6, ended.errors
    assert check_full(ended.errors, workspace, steps) == number
    disk.resize(ROOMY)
    assert cli.main(list(map(str, words))) == 0
    check_same(workspace / "c", steps)
    record_row(15, "by the command itself, with 0, 25, 75, 90 % of what a stage needs: the same")


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
from hardbatch.pipeline.cli import main
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize(
    "limit", [100_000, *(pytest.param(limit, marks=pytest.mark.soak) for limit in (100, 2_000, 20_000, 40_000, 70_000))]
)
def test_a_limit_of_the_size_of_files(
    clean: tuple[Path, list[Step]], tmp_path: Path, limit: int, record_row: Record
) -> None:
    """`ulimit -f`: as a full disk, but the line says which limit it is."""
    manifest, steps = clean
    words = ["run", manifest, "--workspace", tmp_path / "workspace"]
    ended = processes.run([sys.executable, "-c", LIMITED, limit, *words])
    assert ended.code == 6, ended.errors
    lines = [line for line in ended.errors.splitlines() if line.startswith("hardbatch:")]
    assert len(lines) == 1 and "ulimit -f" in lines[0] and "Traceback" not in ended.errors
    assert cli.main(list(map(str, words))) == 0
    check_same(tmp_path / "workspace" / "c", steps)
    record_row(15, "a limit of file sizes (ulimit -f): exit code 6, continues without it")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_output_that_finds_no_room(clean: tuple[Path, list[Step]]) -> None:
    manifest, steps = clean
    command = [*processes.HARDBATCH, "run", manifest, "--workspace", steps[-1].path.parents[2]]
    with open("/dev/full", "w") as full:
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, cwd=processes.ROOT)
    assert ended.returncode == 6
    assert ended.stderr.splitlines()[-1].startswith("hardbatch: no space left") and "Exception" not in ended.stderr
