"""rates: run logs tell a plan what its steps will take and write."""

from __future__ import annotations

import json
import re
import shutil
from collections import namedtuple
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hardbatch.pipeline.artifacts.artifact import MANIFEST, read_artifact
from hardbatch.pipeline.rates import estimate, read_rates
from hardbatch.pipeline.run import Plan, plan_corpus, run_corpus
from hardbatch.pipeline.runlog import LOGS, list_logs, read_log
from hardbatch.pipeline.step import Step
from hardbatch.pipeline.views.plan import PlannedStep, explain_plan, plan_text

STAGES = ("pairs", "answers", "vectors", "clusters", "hardness", "consistency", "batches", "shards")
NUM_ROWS = 600
MANIFEST_TEXT = """corpus = "c"
[[dataset]]
name = "n"
source = "n.parquet"
[pack]
batch_size = 16
[embed]
model = "lexical"
surrogate_model = "lexical"
"""
VECTORS = {"name": "lexical", "device": "cpu", "dtype": "float32"}


def write_corpus(folder: Path, num_rows: int) -> Path:
    """The manifest of a corpus of one domain of `num_rows` distinct pairs."""
    rows = [{"query": f"what is {i} of {i % 7}", "document": f"{i} is by {i % 5} and {i % 7}"} for i in range(num_rows)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "n.parquet")
    (folder / "c.toml").write_text(MANIFEST_TEXT)
    return folder / "c.toml"


@pytest.fixture(scope="module")
def logged_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(manifest, workspace) of a run with its log. Read only."""
    folder = tmp_path_factory.mktemp("logged")
    manifest = write_corpus(folder, NUM_ROWS)
    run_corpus(manifest, workspace=folder / "workspace")
    return manifest, folder / "workspace"


@pytest.fixture
def copied(logged_run: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    """The logged run, copied, to be changed."""
    folder = shutil.copytree(logged_run[0].parent, tmp_path / "copy")
    return folder / "c.toml", folder / "workspace"


def a_step(stage: str, domain: str = "n", **config: Any) -> Step:
    return Step(stage=stage, stage_version=1, domain=domain, key="k", path=Path("c"), config=config)


def write_log(workspace: Path, name: str, *steps: dict[str, Any]) -> None:
    """A log of steps of 10,000 rows, 5 s and 4 MB that are of kind `shards` and domain `n` unless they say more."""
    record = {"event": "finished", "time": "t", "stage": "shards", "domain": "n", "kind": "shards", "units_before": 0}
    record |= {"rows": 10_000, "seconds": 5.0, "bytes": 4_000_000}
    lines = [{"event": "run", "format": 1}, *({**record, **step} for step in steps)]
    (workspace / "c" / LOGS).mkdir(parents=True, exist_ok=True)
    (workspace / "c" / LOGS / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def seconds(workspace: Path, step: Step, rows: int = 10_000) -> float | None:
    return estimate(read_rates(workspace), step, rows).seconds


# estimates


def test_seconds_and_bytes_grow_with_the_rows(tmp_path: Path) -> None:
    write_log(tmp_path, "1", {}, {"stage": "clusters", "kind": "clusters"})
    linear, steep = (estimate(read_rates(tmp_path), a_step(stage), 40_000) for stage in ("shards", "clusters"))
    assert (linear.seconds, linear.bytes) == (pytest.approx(20), pytest.approx(16e6))
    assert (steep.seconds, steep.bytes) == (pytest.approx(40), pytest.approx(16e6))


def test_the_newest_step_of_the_domain_is_taken_else_the_largest_of_another(tmp_path: Path) -> None:
    other = {"domain": "small", "rows": 100, "seconds": 1.0}
    write_log(tmp_path, "1", {"seconds": 7.0}, other)
    write_log(tmp_path, "2", {"seconds": 9.0}, {"seconds": 3.0, "units_before": 2}, {"event": "failed", "exit_code": 6})
    write_log(tmp_path, "3", {"stage": "pairs", "kind": "pairs"})
    assert seconds(tmp_path, a_step("shards")) == seconds(tmp_path, a_step("shards", "new")) == pytest.approx(7.0)
    write_log(tmp_path, "2", {"seconds": 9.0}, other)
    assert seconds(tmp_path, a_step("shards")) == seconds(tmp_path, a_step("shards", "new")) == pytest.approx(9.0)


@pytest.mark.parametrize("changed", [{}, {"name": "minilm"}, {"device": "cuda"}, {"dtype": "bfloat16"}])
def test_steps_of_another_speed_are_not_compared(tmp_path: Path, changed: dict[str, str]) -> None:
    write_log(tmp_path, "1", {"stage": "vectors", "kind": "vectors lexical cpu float32"})
    assert (seconds(tmp_path, a_step("vectors", **{**VECTORS, **changed})) is None) == bool(changed)


@pytest.mark.parametrize(
    "broken",
    [
        {"rows": 0},
        {"rows": None},
        {"rows": "many"},
        {"seconds": 0},
        {"seconds": float("inf")},
        {"seconds": float("nan")},
        {"bytes": -1},
        {"bytes": 10**400},
    ],
)
def test_numbers_that_cannot_be_are_ignored(tmp_path: Path, broken: dict[str, object]) -> None:
    write_log(tmp_path, "1", broken)
    assert seconds(tmp_path, a_step("shards")) is None


def test_a_log_that_cannot_be_read_is_ignored(tmp_path: Path) -> None:
    write_log(tmp_path, "1", {})
    (tmp_path / "c" / LOGS / "2.jsonl").write_bytes(b"\xff\xfe")
    (tmp_path / "c" / LOGS / "3.jsonl").write_text('{"event": "run", "format": 9}\n')
    assert seconds(tmp_path, a_step("shards")) == pytest.approx(5.0)


@pytest.mark.parametrize("stage", ["vectors", "shards"])
def test_a_step_that_continued_from_committed_units_says_nothing(copied: tuple[Path, Path], stage: str) -> None:
    manifest, workspace = copied
    before = read_rates(workspace)
    (step,) = (step for step in plan_corpus(manifest, workspace).steps if step.stage == stage)
    (step.path / MANIFEST).unlink()
    run_corpus(manifest, workspace=workspace)
    assert read_log(list_logs(workspace)[-1]).steps[stage, step.domain].units_before > 0
    assert read_rates(workspace) == before


# the plan


def items(plan: Plan) -> dict[str, PlannedStep]:
    return {item.step.stage: item for item in explain_plan(plan.steps)}


def test_rows_are_carried_from_the_source_to_the_shards(tmp_path: Path) -> None:
    plan = plan_corpus(write_corpus(tmp_path, 48), tmp_path / "w", overrides=["pack.num_packings=3"])
    expected = {
        "pairs": 48,
        "answers": 48,
        "vectors": 96,
        "clusters": 48,
        "hardness": 48,
        "consistency": 48,
        "batches": 144,
        "shards": 144,
    }
    found = {stage: (item.rows, item.rows_at_most) for stage, item in items(plan).items()}
    assert found == {stage: (rows, stage != "pairs") for stage, rows in expected.items()}
    assert items(plan)["pairs"].bytes == (tmp_path / "n.parquet").stat().st_size
    text = plan_text(plan.steps, plan.shards)
    assert "≤ 96" in text and "left: unknown, no earlier run to estimate from; free on" in text
    assert [path.name for path in (tmp_path / "w").iterdir()] == [".digests.json"]


def test_what_is_there_is_told_exactly(copied: tuple[Path, Path]) -> None:
    plan = plan_corpus(*copied, overrides=["pack.num_packings=2"])
    found = items(plan)
    assert found["pairs"].reused and (found["batches"].rows, found["batches"].rows_at_most) == (2 * NUM_ROWS, False)
    assert f"{found['vectors'].bytes:,}" in plan_text(plan.steps, plan.shards)
    vectors = items(plan_corpus(*copied, overrides=["embed.unit_rows=4096"]))["vectors"]
    assert (vectors.rows, vectors.rows_at_most) == (2 * NUM_ROWS, False)


def test_a_plan_of_the_double_is_near_what_the_run_then_writes(copied: tuple[Path, Path]) -> None:
    manifest, workspace = copied
    write_corpus(manifest.parent, 2 * NUM_ROWS)
    planned = explain_plan(plan_corpus(manifest, workspace).steps)
    run_corpus(manifest, workspace=workspace)
    for item in planned:
        assert item.estimate.seconds is not None
        assert item.estimate.bytes == pytest.approx(read_artifact(item.step.path).bytes, rel=0.25, abs=10_000)


def test_unknown_rows_stay_blank_and_the_total_says_so(
    write_jsonl: Callable[..., Path], write_manifest: Callable[..., Path], rows: Callable[..., Any], tmp_path: Path
) -> None:
    write_jsonl("a.jsonl", rows(40))
    write_jsonl("b.jsonl", rows(40))
    text = 'corpus = "c"\n[[dataset]]\nname = "a"\nsource = "a.jsonl"\n'
    text += '[[dataset]]\nname = "b"\nsource = "b.jsonl"\nnum_pairs = 2_000_000\n'
    plan = plan_corpus(write_manifest(text), tmp_path / "w")
    assert {item.rows for item in explain_plan(plan.steps) if item.step.domain == "a"} == {None}
    write_log(tmp_path / "w", "1", {"stage": "pairs", "kind": "pairs", "bytes": 10_000_000})
    shown = plan_text(plan.steps, plan.shards)
    assert "rows not known before they are read: a (" in shown and "≤ 4,000,000" in shown
    assert re.search(r"left: time at least 17 min, to write at least 1\.9 GiB;", shown)


def test_remainders_that_are_mixed_are_planned(tmp_path: Path) -> None:
    plan = plan_corpus(write_corpus(tmp_path, 48), tmp_path / "w", overrides=["pack.remainder=mix"])
    found = {item.step.domain: item for item in explain_plan(plan.steps)}
    assert (found["mixed"].rows, found["mixed"].rows_at_most) == (15, True)
    assert found["c"].rows == 48


def test_what_does_not_fit_on_the_disk_is_warned_of(copied: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**30, 2**30 - 2**20, 2**20))
    manifest, workspace = copied
    done = plan_corpus(manifest, workspace)
    assert plan_text(done.steps, done.shards).endswith("left: nothing; free on the workspace's disk: 1.0 MiB")
    large = plan_corpus(write_corpus(manifest.parent, 16 * NUM_ROWS), workspace)
    warning = plan_text(large.steps, large.shards).splitlines()[-1]
    assert warning.startswith("warning: ") and "do not fit" in warning
    assert str(workspace) in warning and "1.0 MiB are free" in warning


def test_of_steps_that_were_reused_the_earlier_log_tells(copied: tuple[Path, Path]) -> None:
    manifest, workspace = copied
    run_corpus(manifest, workspace=workspace, overrides=["pack.seed=1"])
    assert {step.stage for step in read_log(list_logs(workspace)[-1]).steps.values()} == {"batches", "shards"}
    rates = read_rates(workspace)
    assert {kind.split()[0] for kind in rates} == set(STAGES)
    (vectors,) = (step for kind, steps in rates.items() if kind.startswith("vectors") for step in steps.values())
    assert vectors == replace(vectors, rows=2 * NUM_ROWS)
