"""views.compare: what differs between two shards."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl

from hardbatch.pipeline.cli import main
from hardbatch.pipeline.run import Plan
from hardbatch.pipeline.views.compare import compare_text

TEXT = 'corpus = "c"\n[[dataset]]\nname = "n"\nsource = "pairs.jsonl"\n[pack]\nbatch_size = 8\n'


def test_settings_and_figures_that_differ(
    run_corpus: Callable[..., Plan], write_jsonl: Callable[..., Path], rows: Callable[..., list], capsys
) -> None:
    write_jsonl("pairs.jsonl", rows(64))
    hard = run_corpus(TEXT, overrides=["pack.group_size=8"]).shards
    random = run_corpus(TEXT, overrides=["pack.group_size=1", "cluster.cluster_size=8"]).shards
    text = compare_text(hard, random)
    lines = [line.split() for line in text.splitlines()]
    assert ["shards.group_size", "8", "1"] in lines
    assert ["batches.group_size", "of", "n", "8", "1"] in lines
    assert not any(line[:1] == ["clusters.cluster_size"] for line in lines)  # it is the same in both
    (share,) = [line for line in lines if line[:2] == ["n", "share"]]
    assert float(share[3]) - float(share[2]) < -0.3 and float(share[4]) < -0.3
    assert ["n", "batches", "8", "8", "+0"] in lines

    # Batch-mates, counted pair by pair.
    batch_of = []
    for shards in (hard, random):
        frame = pl.read_parquet(shards / "data" / "*.parquet").sort("pair_id")
        batch_of.append(frame["batch_id"].to_numpy())
    mates, mates_too = (of[:, None] == of for of in batch_of)
    np.fill_diagonal(mates, False)
    assert f"n: {(mates & mates_too).sum() / mates.sum():.1%} of a pair's batch-mates" in text

    assert main(["compare", str(hard), str(hard)]) == 0
    printed = capsys.readouterr().out
    assert "no setting differs" in printed and "n: 100.0% of a pair's batch-mates" in printed


def test_shards_of_other_pairs(
    run_corpus: Callable[..., Plan], write_jsonl: Callable[..., Path], rows: Callable[..., list], tmp_path: Path
) -> None:
    """A copy without its workspace, and a corpus of another domain: what is known is shown."""
    write_jsonl("pairs.jsonl", rows(24))
    first = run_corpus(TEXT).shards
    other = run_corpus(TEXT.replace('"n"', '"m"').replace("8", "4")).shards
    copy = shutil.copytree(first, tmp_path / "copied" / "shards" / first.name)
    text = compare_text(copy, other)
    assert "the two have no domain with the same pairs" in text
    assert "shards.batch_size" in text and "\nn " in text and "\nm " in text
