"""stages.summary: figures of a corpus, and what its packings have in common, against a count by hand."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hardbatch.pipeline.artifacts.artifact import read_artifact
from hardbatch.pipeline.artifacts.commit import open_builder
from hardbatch.pipeline.run import Plan, plan_corpus, run_step
from hardbatch.pipeline.stages.summary import count_packings, shared_batch_mates
from hardbatch.pipeline.step import Step
from tests.packings import join_packings
from tests.samples import LEXICAL, make_rows

B = 8
MANIFEST = f"""
corpus = "three"
[[dataset]]
name = "alpha"
source = "alpha.jsonl"
[[dataset]]
name = "beta"
source = "beta.jsonl"
[pack]
batch_size = {B}
remainder = "mix"
"""
PACKINGS = ((), ("pack.seed=1",), ("pack.order=random",))


def shared_by_hand(first: Sequence[Sequence[Hashable]], second: Sequence[Sequence[Hashable]]) -> float | None:
    """The mean over pairs that are in a batch of both of |batch-mates in both| / (B-1)."""
    mates = [{pair: set(batch) - {pair} for batch in packing for pair in batch} for packing in (first, second)]
    both = mates[0].keys() & mates[1].keys()
    if not both:
        return None
    return sum(len(mates[0][pair] & mates[1][pair]) / (len(first[0]) - 1) for pair in both) / len(both)


# batch-mates


@given(num_pairs=st.integers(0, 60), batch_size=st.integers(2, 9), spread=st.integers(0, 99), seed=st.integers(0, 99))
def test_shared_batch_mates_are_those_counted_by_hand(num_pairs: int, batch_size: int, spread: int, seed: int) -> None:
    """From packings that are the same to ones with nothing in common: pairs move as far as `spread` lets them."""
    generator = np.random.default_rng(seed)
    row = 3 * generator.permutation(num_pairs)
    moved = row[np.argsort(np.arange(num_pairs) + spread * generator.random(num_pairs))]
    cut = num_pairs // batch_size * batch_size
    first, second = (places[:cut].reshape(-1, batch_size) for places in (row, moved))
    found = shared_batch_mates(first, second)
    assert found == pytest.approx(shared_by_hand(first.tolist(), second.tolist()))
    assert found == pytest.approx(shared_batch_mates(second, first))
    assert spread > 0 or cut == 0 or found == 1.0


def test_many_batches_share_as_counted_by_hand() -> None:
    generator = np.random.default_rng(0)
    first = generator.permutation(7_000).reshape(-1, 2)
    second = first.ravel()[np.argsort(np.arange(7_000) + 3 * generator.random(7_000))].reshape(-1, 2)
    found = shared_batch_mates(first, second)
    assert found == pytest.approx(shared_by_hand(first.tolist(), second.tolist()))
    assert 0.1 < found < 0.9


def test_rows_and_columns_of_a_square_share_nothing() -> None:
    square = np.arange(25).reshape(5, 5)
    assert shared_batch_mates(square, square.T) == 0.0


def test_packings_without_a_common_pair_have_no_share() -> None:
    assert shared_batch_mates(np.array([[0, 1], [2, 3]]), np.array([[4, 5], [9, 7]])) is None


# a corpus of three packings


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> tuple[Step, list[Plan]]:
    """The step that has written shards of three packings of two domains, and the run of each packing."""
    root = tmp_path_factory.mktemp("several")
    for name, rows in (("alpha", make_rows(101)), ("beta", make_rows(45, start=500))):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "three.toml").write_text(MANIFEST + LEXICAL)
    plans = [plan_corpus(root / "three.toml", root / "workspace", overrides=overrides) for overrides in PACKINGS]
    for plan in plans:
        for step in plan.steps:
            run_step(step)
    step = join_packings(plans)
    run_step(step)
    return step, plans


def figures_of(path: Path) -> dict[str, Any]:
    return read_artifact(path).manifest.counts["domains"]


def test_batches_and_ledger_are_counted_per_packing(several: tuple[Step, list[Plan]]) -> None:
    counts = read_artifact(several[0].path).manifest.counts
    assert (counts["packings"], counts["batches"]) == (3, 3 * (12 + 5 + 1))
    for name, pairs, batches, leftover in (("alpha", 101, 12, 5), ("beta", 45, 5, 5)):
        figures = counts["domains"][name]
        assert (figures["pairs"], figures["batches"], figures["leftover"]) == (pairs, batches, {"mixed": leftover})
    assert (counts["domains"]["mixed"]["batches"], counts["domains"]["mixed"]["leftover"]) == (1, {"remainder": 2})


def test_figures_of_each_packing_are_those_of_its_own_shards(several: tuple[Step, list[Plan]]) -> None:
    step, plans = several
    for name, figures in figures_of(step.path).items():
        assert len(figures["by_packing"]) == 3
        for packing, plan in zip(figures["by_packing"], plans, strict=True):
            alone = figures_of(plan.shards)[name]
            assert packing == {key: alone[key] for key in packing}
            assert ("share" in packing) == (name != "mixed") and "hardness" in packing
        for key in ("hardness", "mask_rate", "surrogate_loss"):
            assert figures[key] == pytest.approx(np.mean([part[key] for part in figures["by_packing"]]), abs=1e-4)
    shares = [part["share"] for part in figures_of(step.path)["alpha"]["by_packing"]]
    assert shares[2] < min(shares[:2])  # the packing of random batches


def test_shared_batch_mates_of_a_corpus(several: tuple[Step, list[Plan]]) -> None:
    step, plans = several
    found = figures_of(step.path)
    for name, figures in found.items():
        packings = []
        for plan in plans:
            rows = pl.read_parquet(plan.steps[-1].inputs[f"batches/{name}"] / "batches.parquet").sort("batch", "slot")
            pairs = rows.select("domain", "pair_id").rows()
            packings.append([pairs[start : start + B] for start in range(0, len(pairs), B)])
        shared = [shared_by_hand(*both) for both in combinations(packings, 2)]
        known = [share for share in shared if share is not None]
        assert figures["shared_batch_mates"] == (pytest.approx(np.mean(known), abs=1e-4) if known else None)
    assert 0 < found["alpha"]["shared_batch_mates"] < 1


def test_one_packing_says_nothing_of_others(several: tuple[Step, list[Plan]]) -> None:
    for plan in several[1]:
        assert read_artifact(plan.shards).manifest.counts["packings"] == 1
        for figures in figures_of(plan.shards).values():
            assert not {"shared_batch_mates", "by_packing"} & figures.keys()


def test_domains_have_as_many_packings_as_each_other() -> None:
    assert count_packings({"old": {"batches": 3}, "new": {"packings": 1}}) == 1
    with pytest.raises(AssertionError, match="differ in their number of packings"):
        count_packings({"one": {"packings": 1}, "two": {"packings": 2}})


def test_sizes_of_clusters_are_told_where_they_are_known(run_corpus: Callable[..., Plan], small_manifest: Path) -> None:
    plan = run_corpus(small_manifest.read_text())
    last = plan.steps[-1]
    sizes = {"cluster_size_q05": 2, "cluster_size_q50": 8.5, "cluster_size_q95": 13}
    for name, known in (("with", sizes), ("without", {})):
        path = last.inputs["clusters/numbers"].parent / name
        with open_builder(path) as builder:
            builder.finish(
                units=[], stage="clusters", stage_version=0, domain="numbers", key=name, config={}, inputs={},
                counts={"clusters": 6, **known},
            )  # fmt: skip
        step = replace(last, path=last.path.parent / name, inputs={**last.inputs, "clusters/numbers": path})
        run_step(step)
        figures = figures_of(step.path)["numbers"]
        assert {key: value for key, value in figures.items() if key.startswith("cluster_size")} == known
