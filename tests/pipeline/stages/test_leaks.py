"""stages.leaks: what one domain holds out is trained on in no other, and only what depends on it is made again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from hardbatch.pipeline.artifacts.artifact import read_artifact
from hardbatch.pipeline.run import Plan

SIZE = 'corpus = "c"\n[pack]\nbatch_size = 4\n'


def make_pair(number: int) -> dict[str, Any]:
    return {"query": f"where does bus number {number} stop", "document": f"Bus {number} stops at place {number * 7}."}


def dataset(name: str, *lines: str) -> str:
    return "\n".join(["[[dataset]]", f'name = "{name}"', f'source = "{name}.jsonl"', *lines, ""])


def forms(texts: list[str]) -> set[str]:
    return {" ".join(text.casefold().strip("?!.").split()) for text in texts}


def step_of(plan: Plan, stage: str, domain: str) -> Path:
    return next(step.path for step in plan.steps if (step.stage, step.domain) == (stage, domain))


def held_out(plan: Plan, domain: str) -> list[str]:
    folder = step_of(plan, "pairs", domain) / "holdout"
    return [text for name in ("queries", "corpus") for text in pl.read_parquet(folder / f"{name}.parquet")["text"]]


@pytest.fixture
def files(write_jsonl: Callable[..., Path]) -> None:
    """Domain a; b with half of its pairs, spelt otherwise, and with hard negatives that a has as documents."""
    write_jsonl("a.jsonl", [make_pair(i) for i in range(60)])
    copies = [{key: text.upper() + "?" for key, text in make_pair(i).items()} | {"bad": []} for i in range(30)]
    others = [make_pair(i) | {"bad": [make_pair(i - 100)["document"], f"no bus {i}"]} for i in range(100, 160)]
    write_jsonl("b.jsonl", [*copies, *others])


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_no_batch_has_a_text_that_another_domain_holds_out(
    run_corpus: Callable[..., Plan], files: None, order: str
) -> None:
    sets = {
        "a": dataset("a", "holdout = 0.3"),
        "b": dataset("b", "holdout = 0.1", 'columns = {negatives = "bad"}'),
    }
    plan = run_corpus(SIZE + "".join(sets[name] for name in order))
    shards = pl.read_parquet(plan.shards / "data")
    for name, other in ("ab", "ba"):
        out = forms(held_out(plan, name))
        trained = shards.filter(pl.col("domain") == other)
        texts = [*trained["query"], *trained["document"], *trained["negatives"].explode().drop_nulls()]
        assert out and not out & forms(texts)

    # The ledger has every pair with such a text, and no other one under this reason.
    for name, other in ("ab", "ba"):
        left = pl.read_parquet(step_of(plan, "batches", other) / "leftover.parquet")
        found = set(left.filter(pl.col("reason") == "held_out_elsewhere")["pair_id"])
        folder = step_of(plan, "pairs", other)
        pairs = pl.read_parquet(folder / "pairs.parquet")
        sides = {
            side: pl.read_ipc(folder / "texts" / f"{side}-00000.arrow")["text"].to_list()
            for side in ("queries", "documents")
        }
        out = forms(held_out(plan, name))
        expected = {
            row["pair_id"]
            for row in pairs.iter_rows(named=True)
            if forms([sides["queries"][row["query_row"]], sides["documents"][row["document_row"]]]) & out
        }
        assert found == expected
        counts = read_artifact(plan.shards).manifest.counts["domains"][other]
        assert counts["leftover"].get("held_out_elsewhere", 0) == len(expected)
        assert read_artifact(step_of(plan, "leaks", other)).manifest.counts["leaking_pairs"] == len(expected)
        assert counts["pairs"] == counts["batches"] * 4 + sum(counts["leftover"].values())
        assert expected or other == "a"
    removed = read_artifact(plan.shards).manifest.counts["negatives_removed_held_out"]
    assert removed > 0


def test_only_domains_beside_a_holdout_are_compared(run_corpus: Callable[..., Plan], files: None) -> None:
    def steps(*lines: str) -> dict[tuple[str, str], str]:
        plan = run_corpus(SIZE + dataset("a", *lines) + dataset("b"), stages=())
        return {(step.stage, step.domain): step.key for step in plan.steps}

    def stages_of(made: dict[tuple[str, str], str], domain: str) -> set[str]:
        return {stage for stage, name in made if name == domain}

    plain, with_holdout = steps(), steps("holdout = 0.3")
    assert "leaks" not in stages_of(plain, "b") | stages_of(with_holdout, "a")
    assert "leaks" in stages_of(with_holdout, "b")

    # Another holdout of a changes which pairs of b are packed, and none of its vectors.
    other = steps("holdout = 0.2")
    changed = {key for key in other if other[key] != with_holdout[key] and key[1] == "b"}
    assert changed == {("leaks", "b"), ("batches", "b")}
    assert other["shards", "c"] != with_holdout["shards", "c"]
