"""views.report: what a person reads of a run, of a plan, of a batch."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pyarrow.parquet as pq
import pytest

from hardbatch.pipeline.artifacts.artifact import MANIFEST
from hardbatch.pipeline.errors import ConfigError, InputError, IntegrityError
from hardbatch.pipeline.run import Plan, plan_corpus, run_corpus, run_step
from hardbatch.pipeline.stages.card import hardness_rows, negatives_rows
from hardbatch.pipeline.stages.figures import DomainSummary, Negatives, Summary
from hardbatch.pipeline.stages.warnings import domain_warnings
from hardbatch.pipeline.views.batch import batch_text
from hardbatch.pipeline.views.plan import explain_plan, plan_text
from hardbatch.pipeline.views.report import batches_text, summary_markdown, summary_text, table
from tests.models import require_minilm

Finished = tuple[Path, Path, Path]


def to_run(plan: Plan) -> dict[str, str]:
    """Stage → why, of the steps that would run."""
    return {item.step.stage: item.why for item in explain_plan(plan.steps) if not item.reused}


# summary


def test_the_summary_counts_rows_and_names_the_folder(finished_run: Finished) -> None:
    shards = finished_run[2]
    text = summary_text(shards)
    row = next(line for line in text.splitlines() if line.startswith("numbers")).split()
    assert row[1:8] == ["48", "0", "0", "48", row[5], "6", "0"]
    assert str(shards) in text and "6 batches of 8 pairs" in text
    assert "no full batch" not in text and "could be held out" not in text
    assert f"Shards: `{shards}`" in summary_markdown(shards)


def test_rows_of_the_summary_add_up(run_corpus: Callable[..., Plan], write_jsonl: Callable[..., Path]) -> None:
    poison = [{"query": None, "document": "x"}, {"query": "same", "document": "same"}]
    good = [{"query": f"what is {i}", "document": f"{i} it is"} for i in range(38)]
    write_jsonl("x.jsonl", [*good, *poison, good[0]])
    text = 'corpus = "c"\n[[dataset]]\nname = "n"\nsource = "x.jsonl"\nholdout = 0.2\n[pack]\nbatch_size = 8\n'
    lines = summary_text(run_corpus(text).shards).splitlines()
    for start in ("n ", "all "):
        line = next(line for line in lines if line.startswith(start)).split()
        rows, quarantined, held_out, pairs, _, batches, left_over = map(int, line[1:8])
        assert (rows, quarantined, held_out) == (41, 3, 7)
        assert rows == quarantined + held_out + pairs
        assert pairs == batches * 8 + left_over


def test_a_domain_without_a_full_batch_is_warned_of_and_left_in_the_ledger(
    run_corpus: Callable[..., Plan], write_jsonl: Callable[..., Path], rows: Callable[..., list[dict[str, str]]]
) -> None:
    write_jsonl("big.jsonl", rows(20))
    write_jsonl("small.jsonl", rows(5, start=100))
    text = 'corpus = "c"\n[pack]\nbatch_size = 8\n'
    for name in ("big", "small"):
        text += f'[[dataset]]\nname = "{name}"\nsource = "{name}.jsonl"\n'
    plan = run_corpus(text)
    (warning,) = [line for line in summary_text(plan.shards).splitlines() if "do not fill" in line]
    assert warning.startswith("warning: small: its 5 pairs do not fill a batch of 8")
    ledger = {step.domain: step.path / "leftover.parquet" for step in plan.steps if step.stage == "batches"}
    assert sorted(pq.read_table(ledger["small"])["pair_id"].to_pylist()) == list(range(5))
    assert set(pq.read_table(ledger["small"])["reason"].to_pylist()) == {"remainder"}
    assert len(pq.read_table(ledger["big"])) == 4


def test_domains_of_no_or_few_pairs_do_not_stop_the_others(
    run_corpus: Callable[..., Plan], write_jsonl: Callable[..., Path], rows: Callable[..., list[dict[str, str]]]
) -> None:
    write_jsonl("big.jsonl", rows(8))
    write_jsonl("none.jsonl", [{"query": "same", "document": "same"}])
    write_jsonl("one.jsonl", rows(1))
    write_jsonl("wordless.jsonl", [{"query": "!" * i, "document": "?" * i} for i in range(1, 9)])
    text = 'corpus = "c"\n[pack]\nbatch_size = 4\n'
    for name in ("big", "none", "one", "wordless"):
        text += f'[[dataset]]\nname = "{name}"\nsource = "{name}.jsonl"\n'
    plan = run_corpus(text)
    counts = json.loads((plan.shards / MANIFEST).read_bytes())["counts"]["domains"]
    assert {name: figures["batches"] for name, figures in counts.items()} == {
        "big": 2, "none": 0, "one": 0, "wordless": counts["wordless"]["batches"],
    }  # fmt: skip
    for name, pairs in (("big", 8), ("none", 0), ("one", 1), ("wordless", 8)):
        assert counts[name]["batches"] * 4 + sum(counts[name]["leftover"].values()) == pairs


def test_surrogate_loss_and_sizes_of_clusters_are_told_where_they_are_known(finished_run: Finished) -> None:
    figures = json.loads((finished_run[2] / MANIFEST).read_bytes())["counts"]["domains"]["numbers"]
    line = [line for line in summary_text(finished_run[2]).splitlines() if line.startswith("numbers")][1].split()
    names = ("hardness", "masked_hardness", "share", "masked_share", "mask_rate", "surrogate_loss")
    assert line[1:7] == [f"{figures[name]:.3f}" for name in names]
    sizes = {"cluster_size_q05": 3, "cluster_size_q50": 61.5, "cluster_size_q95": 1_240}
    unknown = DomainSummary(batches=0, leftover={}, source={})
    header, rows = hardness_rows({"sized": DomainSummary.read({**figures, **sizes}), "unknown": unknown}, 1)
    assert header[-1] == "cluster sizes 5/50/95 %"
    assert [row[-1] for row in rows] == ["3, 61.5, 1,240", ""]
    assert {len(row) for row in rows} == {len(header)}


@pytest.fixture(scope="module")
def two_packings(finished_run: Finished, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of two packings, in a copy of the finished run."""
    folder = shutil.copytree(finished_run[0].parent, tmp_path_factory.mktemp("two") / "copy", symlinks=True)
    manifest, workspace = folder / finished_run[0].name, folder / "workspace"
    return run_corpus(manifest, workspace=workspace, overrides=["pack.num_packings=2"])


def test_figures_are_shown_over_all_packings_and_of_each(two_packings: Path) -> None:
    figures = json.loads((two_packings / MANIFEST).read_bytes())["counts"]["domains"]["numbers"]
    lines = [line.split() for line in summary_text(two_packings).splitlines()]
    place = next(i for i, line in enumerate(lines) if line[:2] == ["numbers", "all"])
    assert f"{figures['shared_batch_mates']:.3f}" in lines[place]
    for line, part in zip(lines[place : place + 3], [figures, *figures["by_packing"]], strict=True):
        assert f"{part['share']:.3f}" in line and f"{part['masked_share']:.3f}" in line
    assert [line[0] for line in lines[place + 1 : place + 3]] == ["0", "1"]
    text = summary_text(two_packings)
    assert "12 batches of 8 pairs, 6 in each of 2 packings" in text and "2 packings, each another way" in text
    assert "| shared batch-mates |" in summary_markdown(two_packings)


def test_batches_of_several_packings_say_which(two_packings: Path) -> None:
    lines = [line.split() for line in batches_text(two_packings).splitlines() if ".parquet " in line]
    assert [line[:2] for line in lines] == [[str(i), str(i // 6)] for i in range(12)]
    assert batch_text(two_packings, 7).startswith("batch 7 of numbers, packing 1: 8 pairs")


def test_tables_are_no_wider_than_a_terminal() -> None:
    """A name of 20 letters, several packings and sizes of clusters at once."""
    figures = dict.fromkeys(("hardness", "masked_hardness", "share", "masked_share", "mask_rate"), -0.125)
    figures |= {"surrogate_loss": 10.5, "shared_batch_mates": 0.5, "batches": 9_999, "leftover": {}}
    figures |= {"cluster_size_q05": 12, "cluster_size_q50": 512, "cluster_size_q95": 2_048}
    domains = {"d" * 20: replace(DomainSummary.read({**figures, "by_packing": [figures] * 2}), negatives=NEGATIVES)}
    for rows in (hardness_rows(domains, num_packings=2), negatives_rows(domains)):
        assert max(map(len, table(*rows).splitlines())) <= 150


NEGATIVES = Negatives(
    queries=1_234_567, mean=511.5, q05=7, without=1_234, same_answer_share=0.25, query_text_share=0.05,
    likely_share=0.7, concentration=0.6, mostly_masked_batches=40,
)  # fmt: skip


def test_negatives_are_shown_and_warned_of_with_their_numbers() -> None:
    ranks = {"own_rank_q50": 3.0, "own_rank_q95": 97.0}
    domain = DomainSummary(batches=50, leftover={}, source=ranks, negatives=NEGATIVES)
    summary = Summary(batch_size=512, batches=100, packings=2, domains={"d": domain})
    assert negatives_rows(summary.domains)[1] == [
        ["d", "511.5", "7", "1,234", "25%", "5%", "70%", "60%", "40", "3, 97"]
    ]
    without, mostly = domain_warnings("d", domain, summary)
    assert without.startswith("warning: d: 1,234 of 1,234,567 queries have no negative in their batch")
    assert mostly.startswith(
        "warning: d: 40 of 100 batches are mostly masked (25% of the masks are same answers, 70% likely"
    )
    none = replace(NEGATIVES, without=0, mostly_masked_batches=0)
    assert domain_warnings("d", replace(domain, negatives=none), summary) == []


@pytest.mark.parametrize("num_weak", [500, 501])
def test_a_rank_that_leaves_out_more_than_half_of_the_pairs_is_warned_of(num_weak: int) -> None:
    leftover = {"remainder": 12, "weak_pair": num_weak}
    domain = DomainSummary(batches=0, leftover=leftover, source={"pairs": 1_000})
    summary = Summary(batch_size=64, batches=0, packings=1, domains={"d": domain})
    expected = "warning: d: pack.weak_pair_rank leaves out 501 of 1,000 pairs, more than half: the surrogate ranks"
    lines = domain_warnings("d", domain, summary)
    assert [line[: len(expected)] for line in lines] == ([expected] if num_weak > 500 else [])


# plan


def test_a_plan_of_nothing_done_runs_all_in_order(tmp_path: Path, small_manifest: Path) -> None:
    plan = plan_corpus(small_manifest, tmp_path / "new")
    stages = ["pairs", "answers", "vectors", "clusters", "hardness", "consistency", "batches", "shards"]
    assert [step.stage for step in plan.steps] == stages
    why = to_run(plan)
    assert list(why) == stages
    assert why["pairs"] == "not made yet"
    assert [path.name for path in (tmp_path / "new").iterdir()] == [".digests.json"]


@pytest.mark.parametrize("num_gpus", [0, 1])
def test_a_plan_says_what_clusters(
    tmp_path: Path, small_manifest: Path, monkeypatch: pytest.MonkeyPatch, num_gpus: int
) -> None:
    faiss = ModuleType("faiss")
    faiss.__spec__ = ModuleSpec("faiss", None)
    faiss.get_num_gpus = lambda: num_gpus
    monkeypatch.setitem(sys.modules, "faiss", faiss)

    def backend_line(overrides: list[str]) -> str:
        plan = plan_corpus(small_manifest, tmp_path / "workspace", overrides=overrides)
        (line,) = [x for x in plan_text(plan.steps, plan.shards).splitlines() if x.startswith("clustering: ")]
        return line

    assert backend_line([]) == "clustering: torch on cpu"
    expected = "faiss-gpu" if num_gpus else "faiss-cpu"
    assert backend_line(["cluster.method=doubled"]) == f"clustering: FAISS ({expected})"


def test_a_plan_names_the_gpu_that_clusters(
    tmp_path: Path, small_manifest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    require_minilm()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    overrides = ["embed.model=minilm", "embed.device=cuda:1", "embed.dtype=float16"]
    plan = plan_corpus(small_manifest, tmp_path / "workspace", overrides=overrides)
    assert "clustering: torch on cuda:1" in plan_text(plan.steps, plan.shards).splitlines()


@pytest.mark.parametrize(
    ("override", "stages", "why"),
    [
        ("pack.seed=3", ["batches", "shards"], "seed 0 → 3"),
        ("write.margin=0.5", ["shards"], "margin 0.0 → 0.5"),
        ("hardness.anchors=7", ["hardness", "shards"], "anchors 4096 → 7"),
        ("cluster.seed=1", ["clusters", "batches", "shards"], "seed 0 → 1"),
        (
            "embed.unit_rows=32",
            ["vectors", "clusters", "hardness", "consistency", "batches", "shards"],
            "unit_rows 8192 → 32",
        ),
        (
            "ingest.max_characters=99",
            ["pairs", "answers", "vectors", "clusters", "hardness", "consistency", "batches", "shards"],
            "32768 → 99",
        ),
        ("ingest.max_quarantined_fraction=0.2", [], ""),
        ("cluster.restarts=1", [], ""),
    ],
)
def test_a_changed_setting_runs_what_depends_on_it_and_the_plan_says_why(
    copied_run: Finished, override: str, stages: list[str], why: str
) -> None:
    plan = plan_corpus(*copied_run[:2], overrides=[override])
    reasons = to_run(plan)
    assert list(reasons) == stages
    if stages:
        assert why in reasons[stages[0]]
        assert all("needs " in reasons[stage] for stage in stages[1:])
    assert [step.stage for step in plan.steps if run_step(step)] == stages  # the run does what the plan said


def test_a_changed_source_file_is_the_reason(copied_run: Finished) -> None:
    source = copied_run[0].parent / "pairs.jsonl"
    source.touch()
    assert to_run(plan_corpus(*copied_run[:2])) == {}
    source.write_text(source.read_text().replace("number 3 ", "number three "))
    reasons = to_run(plan_corpus(*copied_run[:2]))
    assert list(reasons) == ["pairs", "answers", "vectors", "clusters", "hardness", "consistency", "batches", "shards"]
    assert reasons["pairs"] == "source files differ"


def test_a_deleted_artifact_is_made_again_to_the_byte(copied_run: Finished) -> None:
    before = {
        path: path.read_bytes() for path in copied_run[1].rglob("*") if path.is_file() and path.name != ".digests.json"
    }
    shutil.rmtree(copied_run[1] / "small" / "clusters")
    plan = plan_corpus(*copied_run[:2])
    assert [step.stage for step in plan.steps if run_step(step)] == ["clusters"]
    assert {path: path.read_bytes() for path in before} == before


def test_a_damaged_artifact_of_another_key_does_not_stop_the_plan(copied_run: Finished) -> None:
    (manifest,) = (copied_run[1] / "small" / "batches").glob(f"*/*/{MANIFEST}")
    manifest.write_bytes(manifest.read_bytes()[:40])
    assert list(to_run(plan_corpus(*copied_run[:2], overrides=["pack.seed=3"]))) == ["batches", "shards"]


def test_a_damaged_artifact_of_this_key_is_refused(copied_run: Finished) -> None:
    (manifest,) = (copied_run[1] / "small" / "batches").glob(f"*/*/{MANIFEST}")
    manifest.write_bytes(manifest.read_bytes()[:40])
    plan = plan_corpus(*copied_run[:2])
    with pytest.raises(IntegrityError, match="batches"):
        explain_plan(plan.steps)


def test_rows_of_a_broken_parquet_source_are_not_known(tmp_path: Path, write_manifest: Callable[..., Path]) -> None:
    (tmp_path / "x.parquet").write_bytes(b"PAR1 nonsense PAR1")
    plan = plan_corpus(write_manifest('corpus = "c"\n[[dataset]]\nname = "n"\nsource = "x.parquet"\n'), tmp_path / "w")
    assert {item.rows for item in explain_plan(plan.steps)} == {None}


# batches


def test_the_table_of_batches(finished_run: Finished) -> None:
    text = batches_text(finished_run[2], limit=4)
    assert "2 more batches" in text
    assert [line.split()[0] for line in text.splitlines() if "part-00000.parquet" in line] == ["0", "1", "2", "3"]
    assert "more batches" not in batches_text(finished_run[2])


def test_a_batch_as_text_shows_every_slot(finished_run: Finished) -> None:
    shards = finished_run[2]
    rows = pq.ParquetFile(shards / "data/part-00000.parquet").read_row_group(2).to_pylist()
    text = batch_text(shards, 2)
    assert text.startswith("batch 2 of numbers: 8 pairs")
    for row in rows:
        assert f"q: {row['query']}" in text and f"d: {row['document']}" in text and f"pair {row['pair_id']}" in text
    blocks = text.split("\n[")[1:]
    for row, block in zip(rows, blocks, strict=True):
        assert sorted(int(slot) for slot in re.findall(r"\n        \[ *(\d+)\] ", block)) == row["equivalent_slots"]


@pytest.mark.parametrize("batch", [-1, 6, 10**25])
def test_a_batch_out_of_range_is_refused_with_the_range(finished_run: Finished, batch: int) -> None:
    with pytest.raises(ConfigError, match=rf"--batch {batch}: these shards have batches 0 to 5"):
        batch_text(finished_run[2], batch)


@pytest.mark.parametrize("num_slots", [2, 8, pytest.param(16)])
def test_some_slots_of_a_batch(finished_run: Finished, num_slots: int) -> None:
    text = batch_text(finished_run[2], 0, num_slots=num_slots)
    assert text.count("      q: ") == min(num_slots, 8)
    assert ("6 more" in text) == (num_slots == 2)


def test_a_text_does_not_command_the_terminal(
    run_corpus: Callable[..., Plan], write_jsonl: Callable[..., Path]
) -> None:
    write_jsonl("x.jsonl", [{"query": f"\x1b[2J what {i}", "document": f"doc {i}"} for i in range(4)])
    text = 'corpus = "c"\n[[dataset]]\nname = "n"\nsource = "x.jsonl"\n[pack]\nbatch_size = 4\n'
    assert "\x1b" not in batch_text(run_corpus(text).shards, 0)


@pytest.mark.parametrize("below", [".", "small", "small/shards", "small/shards/KEY"])
def test_shards_are_found_from_above(finished_run: Finished, below: str) -> None:
    _, workspace, shards = finished_run
    assert batches_text(workspace / below.replace("KEY", shards.name)).startswith(summary_text(shards))


def test_what_is_no_shards_folder_is_refused(finished_run: Finished, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path, tmp_path / "none", tmp_path / "file"):
        with pytest.raises(InputError, match="no complete shards here"):
            batches_text(path)
    (pairs,) = (finished_run[1] / "small" / "pairs").glob("*/*")
    with pytest.raises(InputError, match="is a 'pairs' artifact"):
        batches_text(pairs)


def test_several_shards_folders_are_named(copied_run: Finished) -> None:
    plan = plan_corpus(*copied_run[:2], overrides=["pack.seed=3"])
    for step in plan.steps:
        run_step(step)
    with pytest.raises(InputError, match="several shards folders") as caught:
        batches_text(copied_run[1])
    assert str(plan.shards) in str(caught.value) and str(copied_run[2]) in str(caught.value)


@pytest.mark.parametrize("name", ["index.parquet", "data/part-00000.parquet"])
def test_damaged_shards_are_an_integrity_error(copied_run: Finished, name: str) -> None:
    file = copied_run[2] / name
    file.write_bytes(b"PAR1" + bytes(file.stat().st_size - 8) + b"PAR1")
    with pytest.raises(IntegrityError, match=name):
        batch_text(copied_run[2], 0)


def test_a_domain_of_which_nothing_came_through_is_told(run_corpus: Callable[..., Plan], write_jsonl, rows) -> None:
    write_jsonl("good.jsonl", rows(16))
    write_jsonl("same.jsonl", [{"query": f"text {i}", "document": f"text {i}"} for i in range(9)])
    tied = [{"query": f"q{i}", "document": f"d{i}", "neg": ["shared by all"]} for i in range(20)]
    write_jsonl("tied.jsonl", tied)
    plan = run_corpus(
        'corpus = "c"\n[pack]\nbatch_size = 8\n[[dataset]]\nname = "good"\nsource = "good.jsonl"\n'
        '[[dataset]]\nname = "same"\nsource = "same.jsonl"\n'
        '[[dataset]]\nname = "tied"\nsource = "tied.jsonl"\nholdout = 0.2\ncolumns = {negatives = "neg"}\n'
    )
    text = summary_text(plan.shards)
    assert "warning: same: no pair was left of 9 rows (query_equals_document 9)" in text
    assert "warning: tied: 0 of 4 pairs could be held out" in text
