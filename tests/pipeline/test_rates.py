"""rates: what steps took is kept beside the artifacts, and tells a plan what it will take and write."""

from __future__ import annotations

import json
import re
import shutil
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hardbatch.pipeline.artifacts.artifact import MANIFEST, read_artifact
from hardbatch.pipeline.rates import RATES, Measurement, PairsSize, Rates, load_of, workspace_of
from hardbatch.pipeline.run import Plan, plan_corpus, run_step
from hardbatch.pipeline.step import Step
from hardbatch.pipeline.views.plan import PlannedStep, explain_plan, plan_text

STAGES = ("pairs", "vectors", "clusters", "hardness", "batches", "shards")
NUM_ROWS = 1_200
MANIFEST_TEXT = 'corpus = "c"\n[[dataset]]\nname = "n"\nsource = "n.parquet"\n[pack]\nbatch_size = 16\n'
LEXICAL = '[embed]\nmodel = "lexical"\nsurrogate_model = "lexical"\n'


def write_corpus(folder: Path, num_rows: int) -> Path:
    """The manifest of a corpus of one domain of `num_rows` distinct pairs."""
    folder.mkdir(exist_ok=True)
    rows = [
        {"query": f"what is {i} of {i % 7}", "document": f"{i} lies by {i % 5} and {i % 7}"} for i in range(num_rows)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "n.parquet")
    (folder / "c.toml").write_text(MANIFEST_TEXT + LEXICAL)
    return folder / "c.toml"


@pytest.fixture(scope="module")
def measured_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(manifest, workspace) of a run that is large enough to be measured. Read only."""
    folder = tmp_path_factory.mktemp("measured")
    manifest = write_corpus(folder, NUM_ROWS)
    for step in plan_corpus(manifest, folder / "workspace").steps:
        run_step(step)
    return manifest, folder / "workspace"


@pytest.fixture
def copied(measured_run: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    """The measured run, copied, to be changed."""
    folder = shutil.copytree(measured_run[0].parent, tmp_path / "copy")
    return folder / "c.toml", folder / "workspace"


def kept(workspace: Path) -> dict[str, list[dict[str, Any]]]:
    """What is kept in the workspace, by the first word of its kind, the stage."""
    kinds = json.loads((workspace / RATES).read_bytes())["kinds"]
    return {kind.split()[0]: items for kind, items in kinds.items()}


def a_step(stage: str, tmp_path: Path, domain: str = "n", **config: Any) -> Step:
    """A step to estimate, with the settings that its stage needs."""
    needed: dict[str, dict[str, Any]] = {
        "vectors": {"name": "lexical", "device": "cpu", "dtype": "float32", "max_length_tokens": None},
        "clusters": {"method": "folded", "cluster_size": 64, "iterations": 10, "two_level_above": 1_024},
        "hardness": {"anchors": 4_096},
        "batches": {"order": "tour", "batch_size": 64},
        "shards": {"batch_size": 64},
    }
    folder = tmp_path / "c" / stage / ("key" if stage == "shards" else f"{domain}/key")
    settings = {**needed.get(stage, {}), **config}
    return Step(stage=stage, stage_version=1, domain=domain, key="key", path=folder, config=settings)


def size_of(num_pairs: int) -> PairsSize:
    return PairsSize(rows=num_pairs, pairs=num_pairs, texts=2 * num_pairs, bytes=600.0 * num_pairs)


def measurement(rows: int, seconds: float, num_bytes: int = 0, domain: str = "n", work: float = 0) -> Measurement:
    return Measurement(domain=domain, rows=rows, work=work or rows, seconds=seconds, bytes=num_bytes)


# what is kept


def test_every_step_from_nothing_is_kept_with_its_size(measured_run: tuple[Path, Path]) -> None:
    manifest, workspace = measured_run
    found = kept(workspace)
    assert sorted(found) == sorted(STAGES)
    for step in plan_corpus(manifest, workspace).steps:
        (item,) = found[step.stage]
        assert item["rows"] == (2 * NUM_ROWS if step.stage == "vectors" else NUM_ROWS)
        assert item["bytes"] == read_artifact(step.path).bytes
        assert 0 < item["seconds"] < 60
        assert item["domain"] == step.domain
        assert workspace_of(step) == workspace


def test_a_look_up_keeps_nothing(copied: tuple[Path, Path]) -> None:
    manifest, workspace = copied
    before = (workspace / RATES).read_bytes(), (workspace / RATES).stat().st_mtime_ns
    assert not any(run_step(step) for step in plan_corpus(manifest, workspace).steps)
    assert ((workspace / RATES).read_bytes(), (workspace / RATES).stat().st_mtime_ns) == before


def test_small_steps_are_not_kept(finished_run: tuple[Path, Path, Path]) -> None:
    assert not (finished_run[1] / RATES).exists()


@pytest.mark.parametrize("stage", ["vectors", "shards"])
def test_a_step_that_went_on_from_committed_units_is_not_kept(copied: tuple[Path, Path], stage: str) -> None:
    manifest, workspace = copied
    (step,) = (step for step in plan_corpus(manifest, workspace).steps if step.stage == stage)
    (step.path / MANIFEST).unlink()
    assert run_step(step)
    assert len(kept(workspace)[stage]) == 1
    shutil.rmtree(step.path)
    assert run_step(step)
    assert len(kept(workspace)[stage]) == 2


def test_only_the_last_few_of_a_domain_are_kept(tmp_path: Path) -> None:
    for number in range(1, 9):
        Rates(tmp_path).add("shards 1 64", measurement(10_000, number))
    for number in range(200):
        Rates(tmp_path).add("pairs 1", measurement(10_000, 1, domain=f"d{number}"))
    assert [item["seconds"] for item in kept(tmp_path)["shards"]] == [8, 7, 6]
    assert len(kept(tmp_path)["pairs"]) == 60
    assert [path.name for path in tmp_path.iterdir()] == [RATES]


FOREIGN = [
    b"", b"\xff\xfe", b"[]", b"{}", b"null", b'{"format": 2}', b'{"format": 3, "kinds": {}}',
    b'{"format": 2, "kinds": []}',
    b'{"format": 2, "kinds": {"pairs 1": [{"rows": 5}]}}', b"[" * 5_000,
    *(
        b'{"format":2,"kinds":{"pairs 1":[{"bytes":1,"domain":"n","rows":%b,"seconds":1,"work":9}]}}' % rows
        for rows in (b"0", b"-4", b"NaN", b"Infinity", b'"9"', b"null", b"1" + b"0" * 400)
    ),
]  # fmt: skip


@pytest.mark.parametrize("content", FOREIGN)
def test_content_that_is_not_ours_is_ignored_and_replaced(tmp_path: Path, content: bytes) -> None:
    step = a_step("pairs", tmp_path)
    load = load_of(step, [size_of(10_000)])
    typical = Rates(tmp_path / "none").estimate(step, load)
    (tmp_path / RATES).write_bytes(content)
    assert Rates(tmp_path).estimate(step, load) == typical
    Rates(tmp_path).add(load.kind, measurement(10_000, 5.0))
    assert Rates(tmp_path).estimate(step, load).seconds == pytest.approx(5.0)


def test_a_run_does_not_fail_where_rates_cannot_be_written(copied: tuple[Path, Path]) -> None:
    manifest, workspace = copied
    (workspace / RATES).unlink()
    (workspace / RATES).mkdir()
    (step,) = (step for step in plan_corpus(manifest, workspace).steps if step.stage == "batches")
    shutil.rmtree(step.path)
    assert run_step(step)
    assert [path.name for path in workspace.iterdir() if path.name.startswith(".rates")] == [RATES]
    assert "~" in plan_text(plan_corpus(manifest, workspace, overrides=["pack.seed=1"]).steps, workspace)


def test_of_two_writers_the_last_one_wins(tmp_path: Path) -> None:
    one, two = Rates(tmp_path), Rates(tmp_path)
    one.add("shards 1 64", measurement(10_000, 1.0))
    two.add("shards 1 64", measurement(10_000, 2.0))
    assert [item["seconds"] for item in kept(tmp_path)["shards"]] == [2.0]


# estimates


def test_the_median_is_taken_of_the_same_domain_where_there_is_one(tmp_path: Path) -> None:
    step = a_step("shards", tmp_path)
    load = load_of(step, [size_of(20_000)])
    for domain, seconds in (("other", 50.0), ("other", 60.0), ("n", 1.0), ("n", 9.0), ("n", 2.0)):
        Rates(tmp_path).add(load.kind, measurement(10_000, seconds, int(seconds) * 1_000_000, domain))
    estimate = Rates(tmp_path).estimate(step, load)
    assert (estimate.seconds, estimate.bytes, estimate.source) == (pytest.approx(4.0), pytest.approx(4e6), "measured")
    Rates(tmp_path).add(load.kind, measurement(20_000, 7.0, domain="as-large"))
    elsewhere = Rates(tmp_path).estimate(a_step("shards", tmp_path, domain="new"), load)
    assert elsewhere.seconds == pytest.approx(7.0)  # of 7, and of the others the last ones: 4 and 18


def test_short_steps_tell_seconds_only_of_steps_not_much_larger(tmp_path: Path) -> None:
    step = a_step("shards", tmp_path)
    Rates(tmp_path).add(load_of(step, []).kind, measurement(2_000, 0.1, 100_000))
    near, far = (Rates(tmp_path).estimate(step, load_of(step, [size_of(rows)])) for rows in (8_000, 9_000))
    assert (near.seconds, near.source) == (pytest.approx(0.4), "measured")
    assert far.source == "typical, bytes measured"
    assert far.seconds == Rates(tmp_path / "none").estimate(step, load_of(step, [size_of(9_000)])).seconds
    assert far.bytes == pytest.approx(450_000)


def test_what_a_step_takes_before_its_first_row_is_not_multiplied(tmp_path: Path) -> None:
    step = a_step("vectors", tmp_path)
    small, large = (load_of(step, [size_of(rows)]) for rows in (1_000, 100_000))
    Rates(tmp_path).add(small.kind, measurement(small.rows, 1.3, work=small.work))
    assert Rates(tmp_path).estimate(step, large).seconds == pytest.approx(100.3)


def test_other_settings_of_which_the_speed_depends_are_another_kind(tmp_path: Path) -> None:
    step = a_step("vectors", tmp_path, name="minilm", dtype="bfloat16")
    load = load_of(step, [size_of(10_000)])
    Rates(tmp_path).add(load.kind, measurement(load.rows, 500.0, work=load.work))
    for name, value in (("name", "gtr"), ("device", "cuda"), ("dtype", "float32"), ("max_length_tokens", 64)):
        other = a_step("vectors", tmp_path, **{"name": "minilm", "dtype": "bfloat16", name: value})
        assert Rates(tmp_path).estimate(other, load_of(other, [size_of(10_000)])).source != "measured"
    assert Rates(tmp_path).estimate(step, load).source == "measured"


def test_where_there_is_no_figure_nothing_is_told(tmp_path: Path) -> None:
    for config in ({"name": "gtr"}, {"name": "minilm", "device": "cuda"}, {"name": "minilm", "dtype": "float16"}):
        step = a_step("vectors", tmp_path, **config)
        estimate = Rates(tmp_path).estimate(step, load_of(step, [size_of(10_000)]))
        assert (estimate.seconds, estimate.bytes, estimate.source) == (None, None, "")


@pytest.mark.parametrize(
    ("stage", "low", "high"),
    [
        ("pairs", 4, 4),
        ("vectors", 3.8, 4),
        ("clusters", 5, 9),
        ("hardness", 4, 4),
        ("batches", 4, 4.1),
        ("shards", 4, 4),
    ],
)
def test_typical_seconds_grow_as_the_stage_does(tmp_path: Path, stage: str, low: float, high: float) -> None:
    step = a_step(stage, tmp_path)
    seconds = [
        Rates(tmp_path).estimate(step, load_of(step, [size_of(num_pairs)])).seconds or 0.0
        for num_pairs in (96_000, 384_000)
    ]
    assert low * 0.999 <= seconds[1] / seconds[0] <= high * 1.001
    assert 1 < seconds[0] < 60


def test_longer_texts_take_longer_up_to_the_models_limit(tmp_path: Path) -> None:
    step = a_step("vectors", tmp_path, name="minilm", dtype="bfloat16", max_length_tokens=64)
    work = [
        load_of(step, [PairsSize(rows=10, pairs=10, texts=10, bytes=10.0 * num_bytes)]).work
        for num_bytes in (40, 80, 256, 4_000)
    ]
    assert work == [100, 200, 640, 640]


def test_packings_multiply_batches_and_shards(tmp_path: Path) -> None:
    for stage, factor in (("batches", 3), ("shards", 3), ("pairs", 1), ("clusters", 1)):
        step = a_step(stage, tmp_path)
        one, three = (load_of(step, [size_of(6_400)], number if factor > 1 else 1) for number in (1, 3))
        assert (three.rows, three.work) == (factor * one.rows, factor * one.work)


# the plan


def items(plan: Plan) -> dict[str, PlannedStep]:
    return {item.step.stage: item for item in explain_plan(plan.steps)}


def test_rows_are_carried_from_the_source_to_the_shards(tmp_path: Path) -> None:
    plan = plan_corpus(write_corpus(tmp_path, 48), tmp_path / "w")
    found = items(plan)
    assert {stage: (item.rows, item.rows_at_most) for stage, item in found.items()} == {
        stage: (96 if stage == "vectors" else 48, stage != "pairs") for stage in STAGES
    }
    assert all(item.estimate.source == "typical" for item in found.values())
    text = plan_text(plan.steps, plan.shards)
    assert "≤ 96" in text and "left: time 2 s, to write " in text and "at least" not in text
    assert [path.name for path in (tmp_path / "w").iterdir()] == [".digests.json"]


def test_texts_are_exact_where_the_pairs_are_there(copied: tuple[Path, Path]) -> None:
    plan = plan_corpus(*copied, overrides=["embed.unit_rows=4096"])
    found = items(plan)
    assert found["pairs"].reused
    assert (found["vectors"].rows, found["vectors"].rows_at_most) == (2 * NUM_ROWS, False)
    assert found["vectors"].estimate.source == "measured"
    made = read_artifact(plan_corpus(*copied).steps[1].path)
    assert found["vectors"].estimate.bytes == pytest.approx(made.bytes)
    assert f"{found['pairs'].bytes:,}" in plan_text(plan.steps, plan.shards)  # to the byte, as it is there


def test_a_plan_of_the_double_is_near_what_the_run_then_writes(copied: tuple[Path, Path]) -> None:
    manifest, workspace = copied
    write_corpus(manifest.parent, 2 * NUM_ROWS)
    plan = plan_corpus(manifest, workspace)
    planned = explain_plan(plan.steps)
    for step, item in zip(plan.steps, planned, strict=True):
        assert run_step(step)
        assert item.estimate.source in ("measured", "typical, bytes measured")
        assert item.estimate.bytes == pytest.approx(read_artifact(step.path).bytes, rel=0.25, abs=10_000)


def test_unknown_rows_stay_blank_and_the_total_says_so(
    write_jsonl: Callable[..., Path], write_manifest: Callable[..., Path], rows: Callable[..., Any], tmp_path: Path
) -> None:
    write_jsonl("a.jsonl", rows(40))
    write_jsonl("b.jsonl", rows(40))
    text = 'corpus = "c"\n[[dataset]]\nname = "a"\nsource = "a.jsonl"\n'
    plan = plan_corpus(write_manifest(text), tmp_path / "w")
    assert all(item.rows is None and item.estimate.seconds is None for item in explain_plan(plan.steps))
    assert "left: time unknown, to write unknown" in plan_text(plan.steps, plan.shards)
    both = text + '[[dataset]]\nname = "b"\nsource = "b.jsonl"\nnum_pairs = 2_000_000\n'
    told = plan_text(plan_corpus(write_manifest(both), tmp_path / "w").steps, plan.shards)
    assert "rows not known before they are read: a (" in told and "≤ 4,000,000" in told
    assert re.search(r"left: time at least \d+ min, to write at least \d\.\d GiB;", told)


def test_remainders_that_are_mixed_are_planned(tmp_path: Path) -> None:
    plan = plan_corpus(write_corpus(tmp_path, 48), tmp_path / "w", overrides=["pack.remainder=mix"])
    (mixed,) = (item for item in explain_plan(plan.steps) if item.step.domain == "mixed")
    assert (mixed.rows, mixed.rows_at_most) == (15, True)
    assert mixed.estimate.seconds is not None


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One MiB is free on every disk."""
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**30, 2**30 - 2**20, 2**20))
    return


def test_what_does_not_fit_on_the_disk_is_warned_of(tmp_path: Path, full_disk: None) -> None:
    small = plan_corpus(write_corpus(tmp_path, 48), tmp_path / "w")
    assert plan_text(small.steps, small.shards).endswith("; free on the workspace's disk: 1.0 MiB")
    large = plan_corpus(write_corpus(tmp_path, 4_800), tmp_path / "w")
    warning = plan_text(large.steps, large.shards).splitlines()[-1]
    assert warning.startswith("warning: ") and "do not fit" in warning
    assert str(tmp_path / "w") in warning and "1.0 MiB are free" in warning


def test_nothing_is_left_of_a_finished_run(measured_run: tuple[Path, Path]) -> None:
    plan = plan_corpus(*measured_run)
    assert "left: nothing; free on" in plan_text(plan.steps, plan.shards).splitlines()[-1]
