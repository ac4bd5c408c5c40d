"""Measures what decides that a document is not a negative: rules of masking against labels, and what they leave.

    HARDBATCH_DATA=DIR python benchmarks/negatives.py [--domains medical,factbook] [--limit 1500] [--sizes 32,64]
        [--pairs 1000] [--models minilm,lexical] [--workspace DIR] [--json FILE]
    python benchmarks/negatives.py --cases all [--code DIR] [--json FILE]

labels: pairs of banking77, each a test question and a training question of the same intent. Batches are
neighbourhoods, an anchor and its B-1 nearest pairs. A mask is right if the intents are equal. `P` and `R` are
precision and recall of the rule; `P own` is the precision of the rule `own` (Eq. 4) at the same recall, which it
reaches by another margin, and `gain` is the quotient.

several answers: batches of a domain in which queries have several known documents (--known). `R` is the part of
these that the rule finds by itself. Read it with care: for two pairs of one query the symmetric score equals the mean
of their own scores, so the symmetric rules meet the own bound by construction and `R` measures their floor and cap
alone; the rule `own` finds one of the two by construction, hence .5.

concentration: hard batches of real domains, made by our clustering and packing. `masks` is the mean number of
masked slots of a query, `top 10 %` the part of all masks that the tenth of the queries with most of them holds,
`none` the number of queries without a negative, `eff` and `eff 5 %` mean and 5th percentile of effective negatives.

near-copies: the table of near_copies.py.

cases: corpora with few answers, made from drawn words, which go through `hardbatch run` with the lexical model.
`none` and `fewest` are counted from the shards themselves, so the table also measures another version of the code
(--code, a folder with its checkout). It needs no HARDBATCH_DATA, and no other table is made.

Shape letters: M batches, B slots, n pairs, D dimension.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import polars as pl

from hardbatch.pipeline.arrays import Array, PairSet
from hardbatch.pipeline.artifacts.artifact import read_artifact
from hardbatch.pipeline.artifacts.vectors import FoldedPoints, Texts, load_pairs, open_vectors
from hardbatch.pipeline.batching.consistency import floor_at, own_scores, percentiles
from hardbatch.pipeline.batching.equivalence import LikelyRule, likely_answers
from hardbatch.pipeline.batching.kmeans import kmeans
from hardbatch.pipeline.batching.pack import PackSettings, pack
from hardbatch.pipeline.run import plan_corpus, run_step

DOMAINS = "intents_clinc,shell_tldr,stackexchange,factbook,medical,code_python"
_NUM_ANCHORS = 300


@dataclass(frozen=True, kw_only=True)
class Domain:
    """The pairs of a domain under one model: d and q (float32, n × D), and which (query, document) are known."""

    points: FoldedPoints
    documents: Array
    queries: Array
    query_texts: list[str]
    known: Array  # bool, n × n

    @property
    def percentiles(self) -> list[float]:
        return percentiles(own_scores(self.queries, self.documents))


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What a rule sees of M batches: f(q_i, d_j), own scores, and the domain's percentiles of own scores."""

    queries: Array  # M × B × D
    documents: Array
    score: Array  # M × B × B
    own: Array  # M × B
    percentiles: list[float]


Rule = Callable[[Scores, float], Array]  # (scores, margin) → mask, M × B × B


def one_sided(quantile: float = 0.0, factor: float = 1.0) -> Rule:
    """f(q_i, d_j) ≥ factor · own_i − margin, above a floor."""

    def mask(scores: Scores, margin: float) -> Array:
        floor = floor_at(scores.percentiles, quantile) if quantile else -1.0
        return scores.score >= np.maximum(factor * scores.own[:, :, None] - margin, floor)

    return mask


def symmetric_of_own(quantile: float) -> Rule:
    """The symmetric score, compared with own_i alone."""

    def mask(scores: Scores, margin: float) -> Array:
        floor = floor_at(scores.percentiles, quantile) if quantile else -1.0
        both = (scores.score + scores.score.transpose(0, 2, 1)) / 2
        return both >= np.maximum(scores.own[:, :, None] - margin, floor)

    return mask


def ours(likely_rule: Literal["one-sided", "symmetric"], quantile: float = 0.0, max_likely: float = 1.0) -> Rule:
    """The rules of the pipeline, with a floor and a cap."""

    def mask(scores: Scores, margin: float) -> Array:
        floor = floor_at(scores.percentiles, quantile) if quantile else -1.0
        rule = LikelyRule(likely_rule=likely_rule, margin=margin, max_likely=max_likely)
        batches = zip(scores.queries, scores.documents, strict=True)
        return np.array([likely_answers(q, d, rule, floor).mask_BB for q, d in batches])

    return mask


RULES: dict[str, tuple[Rule, float]] = {  # with the margin that they are usually run with
    "own": (one_sided(), 0.0),
    "own - .05": (one_sided(), 0.05),
    "Qwen3: own + .1": (one_sided(), -0.1),
    "NV-Retriever: 95 % of own": (one_sided(factor=0.95), 0.0),
    "own, floor .25": (one_sided(0.25), 0.0),
    "own, floor .5": (one_sided(0.5), 0.0),
    "one-sided, floor .5, cap .25: the default": (ours("one-sided", 0.5, 0.25), 0.0),
    "symmetric, of own": (symmetric_of_own(0.0), 0.0),
    "symmetric": (ours("symmetric"), 0.0),
    "symmetric, floor .25": (ours("symmetric", 0.25), 0.0),
    "symmetric, floor .5": (ours("symmetric", 0.5), 0.0),
    "symmetric, floor .5, cap .25": (ours("symmetric", 0.5, 0.25), 0.0),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--domains", default=DOMAINS)
    parser.add_argument("--known", default="stackexchange", help="domains whose queries have several known documents")
    parser.add_argument("--limit", type=int, default=1_500, help="pairs of each domain")
    parser.add_argument("--pairs", type=int, default=1_000, help="pairs of banking77")
    parser.add_argument("--sizes", default="32,64")
    parser.add_argument("--models", default="minilm,lexical")
    parser.add_argument("--workspace", type=Path, default=Path(tempfile.gettempdir()) / "hardbatch-negatives")
    parser.add_argument("--near-copies", type=int, default=400, help="texts of each side to edit; 0: leave these out")
    parser.add_argument("--json", type=Path, help="write every figure to this file, as JSON lines")
    parser.add_argument("--cases", help=f"make only the table of cases: all, or some of {', '.join(CASES)}")
    parser.add_argument(
        "--code", type=Path, default=Path(__file__).parents[1], help="checkout whose code runs the cases"
    )
    options = parser.parse_args()
    if options.cases:
        names = list(CASES) if options.cases == "all" else options.cases.split(",")
        show([row for name in names for row in run_case(name, options.code)], options.json)
        return
    if "HARDBATCH_DATA" not in os.environ:
        raise SystemExit(
            "HARDBATCH_DATA is not set: set it to the folder of real pairs, which has train/<domain>.parquet"
        )
    data = Path(os.environ["HARDBATCH_DATA"])
    sizes = [int(size) for size in options.sizes.split(",")]
    models = options.models.split(",")
    rows: list[dict[str, Any]] = []

    intents = write_banking77(data / "eval" / "banking77", options.workspace, options.pairs)
    banking = load("banking77", options.workspace, options.workspace, None, models)
    for model, domain in banking.items():
        label = np.array([intents[text] for text in domain.query_texts])
        rows += [row for size in sizes for row in labels(domain, banking["minilm"], label, size, model)]

    for name in options.domains.split(","):
        found = load(name, data / "train", options.workspace, options.limit, models)
        batches = {size: hard_batches(found["minilm"], size) for size in sizes}
        for model, domain in found.items():
            for size in sizes:
                rows += concentration(domain, batches[size], name, model)
                rows += several_answers(domain, batches[size], name, model) if name in options.known.split(",") else []

    rows += near_copies(data, options.near_copies) if options.near_copies else []
    show(rows, options.json)


def show(rows: list[dict[str, Any]], file: Path | None) -> None:
    """Prints the tables, and writes the rows to `file` as JSON lines."""
    print_tables(rows)
    if file:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_banking77(folder: Path, workspace: Path, num_pairs: int) -> dict[str, str]:
    """Writes pairs of one intent each, and returns the intent of each query."""
    intents = json.loads((folder / "labels.json").read_text())
    generator = np.random.default_rng(0)
    corpus, queries = (pl.read_parquet(folder / f"{side}.parquet") for side in ("corpus", "queries"))
    documents: dict[str, list[str]] = {}
    for row in generator.permutation(len(corpus)):
        documents.setdefault(intents["docs"][corpus["doc_id"][int(row)]], []).append(corpus["text"][int(row)])
    pairs: list[dict[str, str]] = []
    for row in generator.permutation(len(queries)):
        intent = intents["queries"][queries["query_id"][int(row)]]
        if documents[intent] and len(pairs) < num_pairs:
            pairs.append({"query": queries["text"][int(row)].strip(), "document": documents[intent].pop()})
    workspace.mkdir(parents=True, exist_ok=True)
    pl.DataFrame(pairs).write_parquet(workspace / "banking77.parquet")
    texts = zip(queries["text"], queries["query_id"], strict=True)
    return {text.strip(): intents["queries"][query_id] for text, query_id in texts}


def load(name: str, data: Path, workspace: Path, limit: int | None, models: list[str]) -> dict[str, Domain]:
    """Embeds the first pairs of a domain with the models, or reads the vectors that exist; MiniLM always."""
    manifest = workspace / f"{name}.toml"
    cut = f"limit = {limit}\n" if limit else ""
    manifest.write_text(f'corpus = "negatives"\n[[dataset]]\nname = "{name}"\nsource = "{name}.parquet"\n{cut}')
    overrides = ["embed.model=minilm", "embed.surrogate_model=lexical"]
    steps = plan_corpus(manifest, workspace, data_root=data, overrides=overrides).steps
    steps = tuple(step for step in steps if step.stage in ("pairs", "vectors"))
    for step in steps:
        run_step(step)

    artifact = read_artifact(steps[0].path)
    pairs = load_pairs(artifact)
    opened = {step.config["name"]: open_vectors(step.path) for step in steps[1:]}
    pair_ids = np.flatnonzero(~np.any([vectors.invalid_pairs(pairs) for vectors in opened.values()], axis=0))
    query_rows, document_rows = pairs.query_row[pair_ids], pairs.document_row[pair_ids]
    domains = {}
    for model in dict.fromkeys(["minilm", *models]):
        points = FoldedPoints(vectors=opened[model], pairs=pairs, pair_ids=pair_ids)
        documents, queries = points.sides(np.arange(len(points)))
        domains[model] = Domain(
            points=points,
            documents=documents,
            queries=queries,
            query_texts=[text.strip() for text in Texts(artifact, "queries").take(query_rows)],
            known=PairSet(pairs.query_row, pairs.document_row).contains(query_rows[:, None], document_rows),
        )
    return domains


def hard_batches(domain: Domain, batch_size: int) -> Array:
    """The batches that the pipeline would make (int, M × B)."""
    num_clusters = -(-len(domain.points) // batch_size)
    found = kmeans(domain.points, num_clusters, iterations=10, tolerance=1e-3, balance=0.02, seed=0)
    return pack(
        domain.points, found.labels, found.centroids, PackSettings(batch_size=batch_size, group_size=batch_size)
    ).batches


def neighbourhoods(domain: Domain, batch_size: int) -> Array:
    """Anchors, each with its B-1 nearest pairs (int, M × B)."""
    anchors = np.random.default_rng(0).permutation(len(domain.points))[:_NUM_ANCHORS]
    similar = domain.documents[anchors] @ domain.queries.T + domain.queries[anchors] @ domain.documents.T
    similar[np.arange(len(anchors)), anchors] = np.inf
    return np.argsort(-similar, axis=1, kind="stable")[:, :batch_size]


def scores_of(domain: Domain, batches: Array) -> Scores:
    queries, documents = domain.queries[batches], domain.documents[batches]
    score = np.einsum("mid,mjd->mij", queries, documents, optimize=True)
    own = np.einsum("mii->mi", score)
    return Scores(queries=queries, documents=documents, score=score, own=own, percentiles=domain.percentiles)


def labels(domain: Domain, clustered: Domain, label: Array, batch_size: int, model: str) -> list[dict[str, Any]]:
    """Precision and recall of each rule against labels."""
    batches = neighbourhoods(clustered, batch_size)
    scores = scores_of(domain, batches)
    others = ~np.eye(batch_size, dtype=bool)
    is_same = (label[batches][:, :, None] == label[batches][:, None, :])[:, others]

    # The rule `own` at every recall: its leads over the own score, from the highest down.
    lead = (scores.score - scores.own[:, :, None])[:, others].ravel()
    hits = np.cumsum(is_same.ravel()[np.argsort(-lead, kind="stable")])
    rows = []
    for name, (rule, margin) in RULES.items():
        mask = rule(scores, margin)[:, others]
        hit = int((mask & is_same).sum())
        precision = hit / max(1, int(mask.sum()))
        own = hit / (1 + int(np.searchsorted(hits, hit)))
        rows.append(
            {
                "table": "labels", "name": "banking77", "model": model, "B": batch_size, "rule": name, "P": precision,
                "R": hit / int(is_same.sum()), "P own": own, "gain": precision / own if own else None,
            }
        )  # fmt: skip
    return rows


def several_answers(domain: Domain, batches: Array, name: str, model: str) -> list[dict[str, Any]]:
    """How many of the known answers each rule finds by itself."""
    scores = scores_of(domain, batches)
    known = domain.known[batches[:, :, None], batches[:, None, :]] & ~np.eye(batches.shape[1], dtype=bool)
    shared = {"table": "several answers", "name": name, "model": model, "B": batches.shape[1]}
    return [
        {**shared, "rule": rule, "R": float((run(scores, margin) & known).sum() / known.sum())}
        for rule, (run, margin) in RULES.items()
    ]


def concentration(domain: Domain, batches: Array, name: str, model: str) -> list[dict[str, Any]]:
    """How the masks of each rule spread over queries; known pairs are masked besides, and not counted as its masks."""
    scores = scores_of(domain, batches)
    size = batches.shape[1]
    known = domain.known[batches[:, :, None], batches[:, None, :]] | np.eye(size, dtype=bool)
    rows = []
    for rule, (run, margin) in RULES.items():
        mask = run(scores, margin) & ~known
        masked = np.sort(mask.sum(2).ravel())[::-1]
        effective = size - (mask | known).sum(2).ravel()
        rows.append(
            {
                "table": "concentration", "name": name, "model": model, "B": size, "rule": rule,
                "masks": float(masked.mean()),
                "top 10 %": float(masked[: len(masked) // 10].sum() / max(1, masked.sum())),
                "most": int(masked[0]), "none": int((effective == 0).sum()), "eff": float(effective.mean()),
                "eff 5 %": float(np.percentile(effective, 5)),
            }
        )  # fmt: skip
    return rows


def near_copies(data: Path, num_texts: int) -> list[dict[str, Any]]:
    """Precision and recall on near-copies and their opposites, if their benchmark is there."""
    try:
        import near_copies as benchmark
    except ImportError:
        return []
    scores, _ = benchmark.measure(data, num_texts)
    summary = benchmark.summary(scores)
    return [{"table": "near-copies", "name": "all domains", "rule": "same answer", **summary}]


def paraphrases(draw: random.Random, topic: list[str], number: int) -> list[str]:
    """Distinct questions about a topic: openings and endings of words around two of the topic's words."""
    openings = ["how do i", "what about", "where can i", "please explain", "i cannot", "help me", "is it true that"]
    endings = ["", "today", "with my account", "at home", "again", "for a friend", "in the app", "by next week"]
    found: dict[str, None] = {}
    while len(found) < number:
        first, second = draw.sample(topic, 2)
        # The tail keeps thousands of questions about one topic apart.
        tail = [word(draw)] if number > 100 else []
        found[" ".join([draw.choice(openings), first, second, draw.choice(endings), *tail]).strip()] = None
    return list(found)


def word(draw: random.Random) -> str:
    return "".join(draw.choice("bdfgklmnprstvz") + draw.choice("aeiou") for _ in range(4))


def sentence(draw: random.Random, topic: list[str], length: int) -> str:
    return " ".join(draw.choice(topic) if draw.random() < 0.5 else word(draw) for _ in range(length))


def few_answers(num_answers: int, num_questions: int) -> Iterator[tuple[str, str]]:
    """Pairs of each of a few answers with each of its paraphrased questions."""
    draw = random.Random(0)
    for _ in range(num_answers):
        topic = [word(draw) for _ in range(6)]
        answer = sentence(draw, topic, 25)
        yield from ((question, answer) for question in paraphrases(draw, topic, num_questions))


def one_query(num_positives: int, num_pairs: int) -> Iterator[tuple[str, str]]:
    """A query with many documents, and other pairs that have a query of their own."""
    draw = random.Random(0)
    topic = [word(draw) for _ in range(6)]
    query = " ".join(topic)
    yield from ((query, sentence(draw, topic, 20)) for _ in range(num_positives))
    yield from other_pairs(draw, num_pairs - num_positives)


def equal_texts(num_equal: int, num_pairs: int) -> Iterator[tuple[str, str]]:
    """Distinct queries, many of which have one and the same document."""
    draw = random.Random(0)
    topic = [word(draw) for _ in range(40)]
    document = sentence(draw, topic, 25)
    for number in range(num_equal):
        yield f"{sentence(draw, topic, 6)} {word(draw)} {number}", document
    yield from other_pairs(draw, num_pairs - num_equal)


def other_pairs(draw: random.Random, number: int) -> Iterator[tuple[str, str]]:
    topics = [[word(draw) for _ in range(12)] for _ in range(200)]
    for _ in range(number):
        topic = draw.choice(topics)
        yield sentence(draw, topic, 8), sentence(draw, topic, 20)


CASES: dict[str, tuple[Callable[[], Iterator[tuple[str, str]]], tuple[int, ...]]] = {  # with batch sizes
    "faq": (lambda: few_answers(60, 25), (8, 16, 32)),
    "six_documents": (lambda: few_answers(6, 200), (32,)),
    "one_query": (lambda: one_query(2_000, 8_000), (32,)),
    "equal_texts": (lambda: equal_texts(50_000, 100_000), (64,)),
}


def run_case(name: str, code: Path) -> Iterator[dict[str, Any]]:
    """Runs a corpus through the pipeline of `code`, and counts the negatives that its shards leave."""
    pairs, sizes = CASES[name]
    for size in sizes:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            pl.DataFrame(list(pairs()), schema=["query", "document"], orient="row").write_parquet(folder / "p.parquet")
            (folder / "case.toml").write_text(
                f'corpus = "case"\n[[dataset]]\nname = "{name}"\nsource = "p.parquet"\n'
                f'[embed]\nmodel = "lexical"\nsurrogate_model = "lexical"\n[pack]\nbatch_size = {size}\n'
            )
            ran = subprocess.run(
                [sys.executable, "-m", "hardbatch.pipeline.cli", "run", folder / "case.toml", "--workspace", folder],
                cwd=folder,  # Python looks there first
                env={**os.environ, "PYTHONPATH": str(code.resolve())},
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            shards = Path(ran.stdout.split("\n")[-2])
            slots = pl.read_parquet(shards / "data" / "*.parquet", columns=["equivalent_slots"])
            masked = slots["equivalent_slots"].list.len().to_numpy().astype(np.int64)
            kept = size - 1 - masked.reshape(-1, size)  # a batch is the next B rows
            yield {
                "table": "cases", "case": name, "B": size, "batches": len(kept),
                "batches without": int((kept == 0).all(1).sum()), "none": int((kept == 0).sum()),
                "fewest": int(kept.min()), "mean": float(kept.mean()),
                "seconds": ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in stage_seconds(folder).items()),
                "warnings": " / ".join(line for line in ran.stdout.split("\n") if line.startswith("warning")) or "none",
            }  # fmt: skip


def stage_seconds(workspace: Path) -> dict[str, float]:
    """Seconds of each stage, from the log of the only run."""
    (log,) = workspace.glob("*/logs/*.jsonl")
    seconds: dict[str, float] = {}
    for record in map(json.loads, log.read_text().splitlines()):
        if record["event"] == "finished":
            seconds[record["stage"]] = seconds.get(record["stage"], 0.0) + record["seconds"]
    return seconds


def print_tables(rows: list[dict[str, Any]]) -> None:
    """Prints one Markdown table for each kind of rows."""
    for title in dict.fromkeys(row["table"] for row in rows):
        of_title = [row for row in rows if row["table"] == title]
        keys = [key for key in of_title[0] if key != "table"]
        print(f"\n{title}\n\n| {' | '.join(keys)} |\n|{'---|' * len(keys)}")
        for row in of_title:
            values = [f"{row[key]:.3f}" if isinstance(row[key], float) else str(row[key]) for key in keys]
            print(f"| {' | '.join(values)} |")


if __name__ == "__main__":
    main()
