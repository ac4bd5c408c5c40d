"""Checks shards against their source files with code that shares nothing with the pipeline's writer.

`python tests/check_shards.py SHARDS DATA_ROOT` prints what it counted; tests call `check`. It reads Parquet sources
with columns query and document, the ledger, the quarantine and the surrogate vectors by their documented formats.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import polars as pl

TIE = 1e-6


def check(shards: Path, data_root: Path, packing: int = 0) -> dict[str, dict[str, float]]:
    """Recounts one packing.

    Args:
        shards: The folder of a shards artifact.
        data_root: The folder that the sources of its manifest are relative to.
        packing: The packing to check.

    Returns:
        What was counted, by domain.

    Raises:
        AssertionError: A pair is lost, in two places, or wrongly masked.
    """
    manifest = json.loads((shards / "manifest.json").read_text())
    size = manifest["config"]["batch_size"]
    rows = pl.scan_parquet(shards / "data" / "*.parquet")
    sizes = rows.group_by("batch_id").agg(pl.len(), pl.col("slot").n_unique().alias("slots")).collect()
    assert (sizes["len"] == size).all() and (sizes["slots"] == size).all()
    index = pl.read_parquet(shards / "index.parquet")
    assert sorted(sizes["batch_id"]) == sorted(index["batch_id"])
    rows = rows.filter(pl.col("batch_id").is_in(index.filter(pl.col("packing") == packing)["batch_id"].to_list()))
    return {
        domain: _check_domain(
            rows.filter(pl.col("domain") == domain).collect(), domain, packing, manifest, shards, data_root
        )
        for domain in manifest["config"]["domains"]
    }


def _check_domain(
    rows: pl.DataFrame, domain: str, packing: int, manifest: dict, shards: Path, data_root: Path
) -> dict[str, float]:
    corpus = shards.parent.parent
    keys = manifest["inputs"]
    pairs_folder = corpus / "pairs" / domain / keys[f"pairs/{domain}"]
    pairs_manifest = json.loads((pairs_folder / "manifest.json").read_text())
    source = pl.concat(
        pl.read_parquet(data_root / item["name"], columns=["query", "document"])
        .with_row_index("source_row")
        .with_columns(source_file=pl.lit(number, pl.Int32), source_row=pl.col("source_row").cast(pl.Int64))
        for number, item in enumerate(pairs_manifest["sources"])
    )
    source = source.head(pairs_manifest["config"]["limit"] or len(source))
    quarantine = pl.read_parquet(pairs_folder / "quarantine.parquet")
    leftover = pl.read_parquet(corpus / "batches" / domain / keys[f"batches/{domain}"] / "leftover.parquet")
    left = leftover.filter(pl.col("reason") != "mixed")
    if "batches/mixed" in keys:
        mixed = pl.read_parquet(corpus / "batches" / "mixed" / keys["batches/mixed"] / "leftover.parquet")
        left = pl.concat([left, mixed.filter(pl.col("domain") == domain)])
    left = left.filter(pl.col("packing") == packing)
    held_out = 0
    if (pairs_folder / "holdout" / "qrels.parquet").exists():
        held_out = len(pl.read_parquet(pairs_folder / "holdout" / "qrels.parquet"))
    assert len(source) == len(rows) + len(left) + len(quarantine) + held_out, domain
    assert rows["pair_id"].n_unique() == len(rows) and not set(left["pair_id"]) & set(rows["pair_id"])
    pairs = pl.read_parquet(pairs_folder / "pairs.parquet").join(source, on=["source_file", "source_row"], how="left")
    joined = rows.join(pairs, on="pair_id", how="left", suffix="_source")
    assert (joined["query"] == joined["query_source"]).all() and (joined["document"] == joined["document_source"]).all()
    answers = corpus / "answers" / domain / keys[f"answers/{domain}"]
    query_class, document_class = (np.load(answers / f"{side}.npy") for side in ("queries", "documents"))
    ids = joined.select("query_id", "document_id").to_numpy().T
    for column, text_class, text_ids in zip(("query", "document"), (query_class, document_class), ids, strict=True):
        same = pl.DataFrame({"text": joined[column], "class": text_class[text_ids]})
        assert same.group_by("text").agg(pl.col("class").n_unique())["class"].max() == 1, "equal texts of two classes"
    known = set(
        zip(query_class[pairs["query_row"]].tolist(), document_class[pairs["document_row"]].tolist(), strict=True)
    )
    ranks = pl.read_parquet(corpus / "consistency" / domain / keys[f"consistency/{domain}"] / "ranks" / "*.parquet")
    own_scores = ranks.filter(pl.col("rank") > 0)["own_score"].to_numpy()
    floor = np.quantile(own_scores.astype(np.float64), manifest["config"]["floor_quantile"])
    vectors = {
        side: np.concatenate(
            [
                np.load(file)
                for file in sorted(
                    (corpus / "vectors" / domain / keys[f"surrogate/{domain}"] / "vectors").glob(f"{side}-*.npy")
                )
            ]
        ).astype(np.float64)
        for side in ("queries", "documents")
    }
    size = manifest["config"]["batch_size"]
    wrong = ties = masked = num_batches = 0
    for batch in rows.sort("batch_id", "slot").partition_by("batch_id"):
        if len(batch) < size:
            continue  # a batch of several domains
        num_batches += 1
        scores = vectors["queries"][batch["query_id"]] @ vectors["documents"][batch["document_id"]].T
        own = np.diag(scores) - manifest["config"]["margin"]
        bound = own[:, None]
        if manifest["config"]["likely_rule"] == "symmetric":
            scores, bound = (scores + scores.T) / 2, (own[:, None] + own) / 2
        above = scores - np.maximum(bound, floor)
        queries = query_class[batch["query_id"].to_numpy()].tolist()
        documents = document_class[batch["document_id"].to_numpy()].tolist()
        written = np.array([[j in slots for j in range(size)] for slots in batch["equivalent_slots"].to_list()])
        sure = np.array([[(q, d) in known for d in documents] for q in queries])
        np.fill_diagonal(sure, False)
        is_tie = ~sure & (np.abs(above) < TIE)
        likely = ~sure & (above >= 0)
        for matrix in (is_tie, likely):
            np.fill_diagonal(matrix, False)

        # Of the likely ones, a query loses at most a part of its batch: those that score highest.
        most = int(manifest["config"]["max_likely"] * size)
        for i in np.flatnonzero((likely | is_tie).sum(1) > most):
            lowest = np.sort(scores[i][likely[i]])[::-1][:most][-1]
            is_tie[i] |= (likely[i] | is_tie[i]) & (np.abs(scores[i] - lowest) < TIE)
            likely[i] &= scores[i] >= lowest
        texts = [[" ".join(text.lower().split()) for text in batch[side]] for side in ("query", "document")]
        repeats = np.array(texts[0])[:, None] == np.array(texts[1])
        np.fill_diagonal(repeats, False)
        expected = sure | likely | repeats
        positive = np.array([[j in slots for j in range(size)] for slots in batch["positive_slots"].to_list()])
        ties += int(is_tie.sum())
        wrong += int(((written != expected) & ~is_tie).sum()) + int((positive != sure).sum())
        masked += int(written.sum())
    assert wrong == 0, f"{domain}: {wrong} slots masked wrongly"
    repeats = len(source) - source["document"].n_unique() + len(source) - source["query"].n_unique()
    return {
        "rows": len(source),
        "in_batches": len(rows),
        "left_over": len(left),
        "quarantined": len(quarantine),
        "held_out": held_out,
        "repeated_texts": repeats,
        "mask_rate": masked / (num_batches * size * (size - 1)) if num_batches else 0.0,
        "ties": ties,
    }


if __name__ == "__main__":
    shards, data_root = Path(sys.argv[1]), Path(sys.argv[2])
    for packing in range(json.loads((shards / "manifest.json").read_text())["counts"]["packings"]):
        for name, figures in check(shards, data_root, packing).items():
            print(name, f"packing {packing}", figures)
