"""Held-out queries that hard batches win, and such that they lose, beside the neighbours that made the difference.

    HARDBATCH_DATA=DIR python benchmarks/quality/cases.py COLLECTION --workspace DIR [--group-size 64]

Trains `static` on random and on hard batches. For the queries whose nDCG@10 differs most, prints what both models
find, and the pairs that share a hard group with the wrong document that random batches, or hard ones, rank first.
"""

from __future__ import annotations

import argparse
import os
import textwrap
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "ALL")

import numpy as np
from arms import SAMPLE, written
from measure import ndcg_of_hits
from runs import Runs
from static import StaticFamily

from hardbatch.pipeline.run import Plan
from hardbatch.trainer.collection import Collection
from hardbatch.trainer.shards import open_shards

_SIZE = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("collection", help="a domain of training, or a collection of other origin")
    parser.add_argument("--workspace", type=Path, required=True)
    parser.add_argument("--group-size", type=int, default=64, help="K of the hard batches")
    parser.add_argument("--number", type=int, default=3, help="of queries that are won, and that are lost")
    options = parser.parse_args()

    runs = Runs(StaticFamily(SAMPLE), options.workspace, Path(os.environ["HARDBATCH_DATA"]))
    arms = {"random": written(_SIZE, 1), "hard": written(_SIZE, options.group_size)}
    plans = {name: runs.plan(arm) for name, arm in arms.items()}
    collection = runs.collections(plans["hard"])[options.collection]
    rows = np.unique(collection.query_rows[collection.scores > 0])
    queries = [collection.queries[row] for row in rows]
    hits = {name: runs.train(arm, 0)[""](collection, queries).numpy() for name, arm in arms.items()}
    ndcg = {name: ndcg_of_hits(collection, rows, found.tolist()) for name, found in hits.items()}

    groups = groups_by_document(plans["hard"], options.group_size)
    order = np.argsort(ndcg["random"] - ndcg["hard"], kind="stable")
    for title, places in (("won", order[: options.number]), ("lost", order[::-1][: options.number])):
        for place in places:
            print(f"\n{title}: {_cut(queries[place])}")
            answers = collection.document_rows[collection.query_rows == rows[place]]
            print(f"  answer      {_cut(collection.documents[answers[0]])}")
            for name in arms:
                _print_hits(collection, name, hits[name][place], set(answers.tolist()), ndcg[name][place])
            worse = "random" if title == "won" else "hard"
            wrong = next(row for row in hits[worse][place].tolist() if row not in answers)
            for query, document in groups.get(collection.documents[wrong], [])[:8]:
                print(f"    in its group  {_cut(query, 50)}  →  {_cut(document, 60)}")


def groups_by_document(plan: Plan, group_size: int) -> dict[str, list[tuple[str, str]]]:
    """By document: the pairs of its group, in the first packing."""
    found: dict[str, list[tuple[str, str]]] = {}
    shards = open_shards(plan.shards)
    for row in np.flatnonzero(shards.index.packings_I == 0).tolist():
        batch = shards.read_batch(row, 0)
        pairs = list(zip(batch.queries, batch.documents, strict=True))
        for start in range(0, len(pairs), group_size):
            group = pairs[start : start + group_size]
            found |= {document: group for _, document in group}
    return found


def _print_hits(collection: Collection, name: str, hits: np.ndarray, answers: set[int], ndcg: float) -> None:
    print(f"  {name:<8}{ndcg:.2f}")
    for rank, row in enumerate(hits[:3].tolist(), start=1):
        print(f"    {'answer' if row in answers else '':<8}{rank}  {_cut(collection.documents[row])}")


def _cut(text: str, width: int = 110) -> str:
    return textwrap.shorten(" ".join(text.split()), width, placeholder="…")


if __name__ == "__main__":
    main()
