"""The corpora of the quality benchmark: training domains, and the collections that models are measured on.

Each domain is a random sample of pairs, of which some are held out. The held-out queries are searched over all
documents of the sample, those of training included. Collections of other origin are searched as they are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from hardbatch.pipeline.artifacts.artifact import read_artifact
from hardbatch.pipeline.artifacts.vectors import Texts
from hardbatch.pipeline.run import Plan, plan_corpus, run_step
from hardbatch.trainer.collection import Collection, load_collection

OUT_OF_DOMAIN = ("squad_dev", "covid_qa", "code_networkx", "banking77", "reddit_titles")


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What a family of models is trained on.

    Attributes:
        domains: Their names.
        num_pairs: The most pairs of a domain, drawn at random.
        max_length_tokens: At which texts are cut for clusters and masks.
        model: Of the vectors for clusters and masks.
        holdout: The part of the pairs that is held out.
        max_queries: The most queries of a collection of other origin.
        out_of_domain: The collections of other origin.
    """

    domains: tuple[str, ...]
    num_pairs: int
    max_length_tokens: int
    model: str = "minilm"
    holdout: float = 0.1
    max_queries: int = 1_000
    out_of_domain: tuple[str, ...] = OUT_OF_DOMAIN

    @property
    def name(self) -> str:
        """The name of the corpus, which says what was drawn from where."""
        domains = "-".join(self.domains) if len(self.domains) <= 3 else f"{len(self.domains)}-domains"
        return f"{domains}-{self.num_pairs}-holdout-{round(100 * self.holdout)}"


def write_manifest(sample: Sample, data: Path, folder: Path) -> Path:
    """Draws the sample once, and writes it with its manifest to `folder`."""
    folder = folder / sample.name
    manifest = folder / "manifest.toml"
    if not manifest.exists():
        folder.mkdir(parents=True, exist_ok=True)
        lines = [
            f'corpus = "{sample.name}"',
            "[embed]",
            f'model = "{sample.model}"',
            f'surrogate_model = "{sample.model}"',
            f"max_length_tokens = {sample.max_length_tokens}",
        ]
        for domain in sample.domains:
            pairs = pl.read_parquet(data / "train" / f"{domain}.parquet", columns=["query", "document"])
            drawn = pairs.sample(n=min(sample.num_pairs, len(pairs)), seed=0, shuffle=True)
            drawn.write_parquet(folder / f"{domain}.parquet")
            lines += [
                "[[dataset]]",
                f'name = "{domain}"',
                f'source = "{domain}.parquet"',
                f"holdout = {sample.holdout}",
            ]
        manifest.write_text("\n".join(lines) + "\n")
    return manifest


def make_shards(manifest: Path, workspace: Path, settings: Mapping[str, Any]) -> Plan:
    """Makes the shards of an arm. What arms have in common, above all the vectors, is made once."""
    overrides = [f"{name}={json.dumps(value)}" for name, value in settings.items()]
    plan = plan_corpus(manifest, workspace, overrides=overrides)
    for step in plan.steps:
        run_step(step)
    return plan


def load_collections(sample: Sample, plan: Plan, data: Path) -> dict[str, Collection]:
    """The collections that every model of a family is measured on, those of the domains first."""
    pairs = {step.domain: step.path for step in plan.steps if step.stage == "pairs"}
    found = {domain: _held_out(domain, pairs[domain]) for domain in sample.domains}
    for name in sample.out_of_domain:
        found[name] = _fewer_queries(load_collection(data / "eval" / name), sample.max_queries)
    return found


def _held_out(domain: str, pairs: Path) -> Collection:
    """The held-out queries of a domain, and all of its documents."""
    trained = Texts(read_artifact(pairs), "documents")
    held_out = load_collection(pairs / "holdout")
    documents = list(dict.fromkeys([*trained.take(np.arange(trained.num_rows)), *held_out.documents]))
    row_of = {text: row for row, text in enumerate(documents)}
    return Collection(
        name=domain,
        documents=documents,
        queries=held_out.queries,
        query_rows=held_out.query_rows,
        document_rows=np.array([row_of[held_out.documents[row]] for row in held_out.document_rows]),
        scores=held_out.scores,
    )


def _fewer_queries(collection: Collection, limit: int) -> Collection:
    """The collection with `limit` of its queries, drawn at random from those that have an answer."""
    answered = np.unique(collection.query_rows[collection.scores > 0])
    kept = np.sort(np.random.default_rng(0).permutation(answered)[:limit])
    is_kept = np.isin(collection.query_rows, kept)
    return Collection(
        name=collection.name,
        documents=collection.documents,
        queries=[collection.queries[row] for row in kept],
        query_rows=np.searchsorted(kept, collection.query_rows[is_kept]),
        document_rows=collection.document_rows[is_kept],
        scores=collection.scores[is_kept],
    )
