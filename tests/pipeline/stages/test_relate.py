"""The `answers` artifact: classes by row, which document answers which query, and a run that was cut off."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from hardbatch.pipeline.artifacts.answers import load_answers
from hardbatch.pipeline.artifacts.artifact import read_artifact
from hardbatch.pipeline.artifacts.commit import open_builder
from hardbatch.pipeline.artifacts.vectors import load_pairs
from hardbatch.pipeline.progress import SilentProgress
from hardbatch.pipeline.stages import relate
from hardbatch.pipeline.step import InlineExecutor, Step
from tests.artifacts import Domain, make_domain

PAIRS = [
    ("How do I list files?", "Use ls."),
    ("how do i list files", "Type dir at the prompt"),
    ("Open a file", "Use LS"),
    ("Count lines", "wc -l"),
    ("Count the lines", "Use cat and count."),
    ("Longest line", "wc -L"),
]
NEGATIVES = [[], [], ["type DIR at the prompt."], [], [], ["vim"]]


@pytest.fixture
def domain(tmp_path: Path) -> dict[str, Path]:
    return make_domain(tmp_path, "d", Domain(pairs=PAIRS, negatives=NEGATIVES))


def build(path: Path, pairs: Path, *, near_copies: bool = True):
    step = Step(
        stage="answers", stage_version=1, domain="d", key="key", path=path,
        config={"near_copies": near_copies}, inputs={"pairs": pairs},
    )  # fmt: skip
    with open_builder(path) as builder:
        result = relate.build(step, builder, InlineExecutor(), SilentProgress())
        builder.finish(
            units=result.units, stage="answers", stage_version=1, domain="d", key="key", config=step.config,
            inputs={}, sources=(), counts=result.counts, produced_with=result.produced_with,
        )  # fmt: skip
    return load_answers(path, load_pairs(read_artifact(pairs)))


def test_a_known_pair_joins_classes_and_nothing_else_does(domain, tmp_path):
    answers = build(tmp_path / "answers", domain["pairs/d"])
    assert answers.query_class.tolist() == [0, 0, 1, 2, 2, 3]
    documents = ["Use ls.", "Type dir at the prompt", "Use LS", "type DIR at the prompt.", "wc -l",
                 "Use cat and count.", "wc -L", "vim"]  # fmt: skip
    classes = dict(zip(documents, [0, 1, 0, 1, 2, 3, 4, 5], strict=True))
    assert answers.document_class.tolist() == list(classes.values())

    known = {(answers.query_class[row], classes[document]) for row, (_, document) in enumerate(PAIRS)}
    found = answers.answers(np.arange(6)[:, None], np.arange(8)[None, :])
    for query, document in product(range(6), range(8)):
        assert found[query, document] == ((answers.query_class[query], answers.document_class[document]) in known)
    assert found[0].tolist() == [True, True, True, True, False, False, False, False]
    assert found[2].tolist() == [True, False, True, False, False, False, False, False]  # not by a shared partner

    counts = read_artifact(tmp_path / "answers").manifest.counts
    assert counts["pairs"] == 6
    assert counts["documents"] == {
        "texts": 8, "classes": 6, "largest_class_pairs": 2,
        "joins": {"normal_form": 2, "function_words": 0, "sentences": 0},
    }  # fmt: skip
    assert counts["queries"]["joins"] == {"normal_form": 1, "function_words": 1, "sentences": 0}
    joins = pq.read_table(tmp_path / "answers" / "queries-joins.parquet")
    assert joins.to_pylist()[0] == {"row": 1, "other_row": 0, "kind": "normal_form", "overlap": 1.0}


def test_without_near_copies_only_equal_texts_are_one_class(domain, tmp_path):
    answers = build(tmp_path / "answers", domain["pairs/d"], near_copies=False)
    assert answers.query_class.tolist() == list(range(6)) and answers.document_class.tolist() == list(range(8))
    known = answers.answers(np.arange(6)[:, None], np.arange(8)[None, :])
    assert known.sum() == len(PAIRS)


def test_a_side_that_was_committed_is_not_read_again(domain, tmp_path, monkeypatch):
    build(tmp_path / "whole", domain["pairs/d"])
    find, sides = relate.find_copies, []

    def failing(blocks):
        sides.append(1)
        if len(sides) == 2:
            raise OSError("cut off")
        return find(blocks)

    monkeypatch.setattr(relate, "find_copies", failing)
    with pytest.raises(OSError, match="cut off"):
        build(tmp_path / "again", domain["pairs/d"])
    build(tmp_path / "again", domain["pairs/d"])
    assert len(sides) == 3
    for name in ("manifest.json", "queries.npy", "documents-joins.parquet"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
