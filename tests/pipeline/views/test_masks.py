"""views.masks and views.batch: why a slot is masked, from shards of pairs whose relations are known."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest

from hardbatch.pipeline.artifacts.artifact import Artifact, read_artifact
from hardbatch.pipeline.run import run_corpus
from hardbatch.pipeline.views.batch import batch_text
from hardbatch.pipeline.views.masks import explain_masks
from hardbatch.pipeline.views.report import batches_text
from tests.artifacts import make_artifact
from tests.samples import LEXICAL

# In one batch: (a, x) and (b, x) share a document, (a, x) and (a, y) a query, and (a, y) makes the document of (c, y)
# an answer to the query of (a, x).
PAIRS = [
    ("how to bake bread", "mix flour and water"),
    ("steps of baking", "mix flour and water"),
    ("how to bake bread", "knead it and wait"),
    ("dough resting time", "knead it and wait"),
    *((f"colour of planet {i}", f"planet {i} is grey") for i in range(4)),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of one batch of the pairs above."""
    folder = tmp_path_factory.mktemp("masks")
    pl.DataFrame(PAIRS, ["query", "document"], orient="row").write_parquet(folder / "x.parquet")
    manifest = folder / "c.toml"
    source = '[[dataset]]\nname = "n"\nsource = "x.parquet"\n'
    manifest.write_text(f'corpus = "c"\n{source}{LEXICAL}[pack]\nbatch_size = 8\n')
    return run_corpus(manifest, workspace=folder / "workspace")


@pytest.fixture
def shards(made: Path, tmp_path: Path) -> Artifact:
    """These shards in a copy of their corpus, to be changed."""
    return read_artifact(shutil.copytree(made.parents[1], tmp_path / "c") / "shards" / made.name)


def rows_of(shards: Artifact) -> list[dict[str, Any]]:
    """The rows of batch 0, by slot, as if every slot were masked for every other one."""
    rows = pl.read_parquet(shards.path / "data" / "*.parquet").sort("batch_id", "slot").head(8).to_dicts()
    return [{**row, "equivalent_slots": [j for j in range(8) if j != row["slot"]]} for row in rows]


def reasons(shards: Artifact, rows: Sequence[dict[str, Any]]) -> dict[tuple[int, int], str]:
    """By the pairs of two slots, why the second one is masked for the first one."""
    found = explain_masks(shards, rows).by_slot
    pair = [row["pair_id"] for row in rows]
    return {(pair[i], pair[mask.slot]): mask.reason for i, masks in enumerate(found) for mask in masks}


def test_reasons_are_those_of_the_texts_and_the_known_pairs(shards: Artifact) -> None:
    found = reasons(shards, rows_of(shards))
    certain = {
        (0, 1): "same document", (1, 0): "same document", (2, 3): "same document", (3, 2): "same document",
        (0, 2): "same query", (2, 0): "same query",
        (0, 3): "known pair", (2, 1): "known pair",
    }  # fmt: skip
    assert found == {(i, j): certain.get((i, j), "likely") for i in range(8) for j in range(8) if j != i}

    # Only what is certain is a positive, and format version 2 tells the same from the known pairs.
    assert {(i, j) for i, j in positives(rows_of(shards))} == set(certain)
    old = [{name: value for name, value in row.items() if name != "positive_slots"} for row in rows_of(shards)]
    assert reasons(shards, old) == found


def positives(rows: Sequence[dict[str, Any]]) -> list[tuple[int, int]]:
    return [(row["pair_id"], rows[slot]["pair_id"]) for row in rows for slot in row["positive_slots"]]


def test_a_certain_slot_that_no_pair_explains_is_a_near_copy(shards: Artifact) -> None:
    rows = rows_of(shards)
    first, second = (next(row for row in rows if row["pair_id"] == pair) for pair in (4, 5))
    first["positive_slots"] = [second["slot"]]
    found = reasons(shards, rows)
    assert (found[4, 5], found[5, 4]) == ("near-copy", "likely")

    # Rows are numbered per domain: the same numbers in another domain are another pair.
    rows[rows.index(next(row for row in rows if row["pair_id"] == 3))]["domain"] = "elsewhere"
    shutil.copytree(shards.path.parents[1] / "pairs" / "n", shards.path.parents[1] / "pairs" / "elsewhere")
    shutil.copytree(shards.path.parents[1] / "vectors" / "n", shards.path.parents[1] / "vectors" / "elsewhere")
    names = ("pairs", "surrogate", "answers", "consistency")
    shards.manifest.inputs.update({f"{name}/elsewhere": shards.manifest.inputs[f"{name}/n"] for name in names})
    assert reasons(shards, rows)[0, 3] == "near-copy"


def test_near_copies_show_how_much_their_texts_have_in_common(shards: Artifact) -> None:
    """The classes of `answers` say that pairs 4 and 5 have documents of one class, and 6 and 7 queries of one class."""
    rows = rows_of(shards)
    slot_of, row_of = ({row["pair_id"]: row[name] for row in rows} for name in ("slot", "document_id"))
    query_of = {row["pair_id"]: row["query_id"] for row in rows}
    classes = {side: np.arange(16) for side in ("queries", "documents")}
    classes["documents"][row_of[5]] = row_of[4]
    classes["queries"][query_of[7]] = query_of[6]
    joins = {"documents": (row_of[5], row_of[4], 0.75), "queries": (query_of[7], query_of[6], 0.5)}
    files: dict[str, Any] = {f"{side}.npy": rows_ for side, rows_ in classes.items()}
    for side, (row, other, overlap) in joins.items():
        files[f"{side}-joins.parquet"] = pa.table({"row": [row], "other_row": [other], "overlap": [overlap]})
    make_artifact(shards.path.parents[1] / "answers" / "n" / "key", files)
    shards.manifest.inputs["answers/n"] = "key"

    for row in rows:  # every slot answers every query for certain
        row["positive_slots"] = row["equivalent_slots"]
    found = explain_masks(shards, rows).by_slot
    overlaps = {(i, mask.slot): mask.overlap for i, masks in enumerate(found) for mask in masks}
    known = {pair: overlap for pair, overlap in overlaps.items() if overlap is not None}
    assert known == {
        (slot_of[i], slot_of[j]): overlap
        for first, second, overlap in ((4, 5, 0.75), (6, 7, 0.5))
        for i, j in ((first, second), (second, first))
    }


@pytest.mark.parametrize("rule", ["one-sided", "symmetric"])
def test_scores_are_those_of_the_surrogate_and_likely_slots_come_from_the_highest(made: Path, rule: str) -> None:
    manifest = made.parents[3] / "c.toml"
    shards = read_artifact(run_corpus(manifest, workspace=made.parents[2], overrides=[f"write.likely_rule={rule}"]))
    rows = rows_of(shards)
    folder = shards.path.parents[1] / "vectors" / "n" / shards.manifest.inputs["surrogate/n"] / "vectors"
    queries, documents = (
        np.load(folder / f"{side}-0000000.npy").astype(np.float64) for side in ("queries", "documents")
    )
    found = explain_masks(shards, rows)
    assert found.own_scores is not None
    consistency = shards.path.parents[1] / "consistency" / "n" / shards.manifest.inputs["consistency/n"]
    floor = np.median(pl.read_parquet(consistency / "ranks" / "*.parquet")["own_score"])
    assert found.floors == {"n": pytest.approx(floor, abs=1e-6)}
    for row, masks, own in zip(rows, found.by_slot, found.own_scores, strict=True):
        others = [rows[mask.slot] for mask in masks]
        scores = np.array([queries[row["query_id"]] @ documents[other["document_id"]] for other in others])
        bounds = np.full(len(masks), own)
        if rule == "symmetric":
            scores += [queries[other["query_id"]] @ documents[row["document_id"]] for other in others]
            scores /= 2
            bounds = (bounds + [found.own_scores[mask.slot] for mask in masks]) / 2
        bounds = np.maximum(bounds, floor)
        assert own == pytest.approx(queries[row["query_id"]] @ documents[row["document_id"]], abs=1e-6)
        assert [mask.score for mask in masks] == pytest.approx(scores, abs=1e-6)
        assert [mask.bound for mask in masks] == [
            pytest.approx(bound, abs=1e-6) if mask.reason == "likely" else None
            for mask, bound in zip(masks, bounds, strict=True)
        ]
        likely = [mask.score for mask in masks if mask.reason == "likely"]
        assert likely == sorted(likely, reverse=True) and "likely" not in [m.reason for m in masks[: -len(likely)]]


def test_without_the_artifacts_before_the_shards_say_what_they_know(shards: Artifact) -> None:
    folder = shards.path.parents[1]
    shutil.rmtree(folder / "vectors")
    found = explain_masks(shards, rows_of(shards))
    assert found.own_scores is None and {mask.score for masks in found.by_slot for mask in masks} == {None}
    assert "own score" not in batch_text(shards.path, 0)

    shutil.rmtree(folder / "pairs")
    found_reasons = reasons(shards, rows_of(shards))
    assert (found_reasons[0, 1], found_reasons[0, 3], found_reasons[4, 5]) == ("same document", "same answer", "likely")
    lines = [line for line in batch_text(shards.path, 0).splitlines() if line.startswith("not known: ")]
    assert [line.split(": ")[1] for line in lines] == ["which of the certain masks are known pairs", "scores"]
    assert all(line.endswith(" is gone") for line in lines)


def test_a_batch_says_how_many_negatives_its_queries_keep(shards: Artifact) -> None:
    masked = pl.read_parquet(shards.path / "data" / "*.parquet")["equivalent_slots"].list.len()
    text = batch_text(shards.path, 0)
    assert f"negatives per query, of 7: {7 - masked.mean():.1f} on average, {7 - masked.max()} at the fewest" in text
    assert "same document" in text and "same query" in text


@pytest.mark.parametrize(
    ("sort", "expected"),
    [
        ("mask-rate", ["mask_rate"]),
        ("negatives", ["queries_without_negatives", "min_negatives", "mean_negatives"]),
        ("hardness", ["hardness"]),
    ],
)
def test_batches_come_in_the_order_asked_for(
    finished_run: tuple[Path, Path, Path], sort: str, expected: list[str]
) -> None:
    index = pl.read_parquet(finished_run[2] / "index.parquet")
    signs = {"min_negatives": 1, "mean_negatives": 1}
    key = [index[name] * signs.get(name, -1) for name in expected]
    order = sorted(range(len(index)), key=lambda i: ([column[i] for column in key], i))
    lines = [
        line.split() for line in batches_text(finished_run[2], sort=sort, limit=4).splitlines() if ".parquet " in line
    ]
    assert [int(line[0]) for line in lines] == order[:4]
