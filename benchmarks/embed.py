"""embed against plain `SentenceTransformer.encode` in its defaults: same texts, same model, same dtype, interleaved.

    HARDBATCH_DATA=DIR python benchmarks/embed.py [--dtype float32|bfloat16] [--rounds 5] [--pairs 600]

Ours is the whole stage, reading texts and writing committed units included; theirs is `encode` of all queries and
of all documents, as a script would do it. Models are loaded before the clock starts. Two corpora: `lengths`, pairs of
five domains without a repeated text, and `repeats`, many questions on one paragraph (squad_dev).
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import polars as pl
import torch
from sentence_transformers import SentenceTransformer

from hardbatch.pipeline.artifacts.artifact import read_artifact
from hardbatch.pipeline.artifacts.vectors import load_pairs, open_vectors
from hardbatch.pipeline.models.locate import locate_model
from hardbatch.pipeline.run import plan_corpus, run_step

MIXED = ("techdocs", "medical", "reddit", "code_python", "science_acl")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pairs", type=int, default=600)
    options = parser.parse_args()
    data = Path(os.environ["HARDBATCH_DATA"])
    theirs = SentenceTransformer(str(locate_model("minilm", None, Path())[1]), device="cpu")
    theirs.to(getattr(torch, options.dtype))
    print(f"{options.dtype}, {torch.get_num_threads()} threads, {options.rounds} rounds, {options.pairs} pairs")
    corpora = (("lengths", mixed_pairs(data, options.pairs)), ("repeats", repeated_pairs(data, options.pairs)))
    for name, pairs in corpora:
        compare(name, pairs, theirs, options.dtype, options.rounds)


def mixed_pairs(data: Path, num_pairs: int) -> pl.DataFrame:
    """Pairs of several domains, lengths mixed, no text twice."""
    parts = [pl.read_parquet(data / "train" / f"{name}.parquet", columns=["query", "document"]) for name in MIXED]
    pairs = pl.concat([part.sample(num_pairs, seed=0) for part in parts])
    pairs = pairs.unique("query", maintain_order=True).unique("document", maintain_order=True)
    return pairs.sample(num_pairs, seed=0)


def repeated_pairs(data: Path, num_pairs: int) -> pl.DataFrame:
    """(question, paragraph) pairs in which a paragraph comes with all its questions."""
    folder = data / "eval" / "squad_dev"
    corpus = pl.read_parquet(folder / "corpus.parquet").select("doc_id", document="text")
    queries = pl.read_parquet(folder / "queries.parquet").select("query_id", query="text")
    joined = pl.read_parquet(folder / "qrels.parquet").join(corpus, on="doc_id").join(queries, on="query_id")
    return joined.sort("doc_id", "query_id").head(num_pairs).select("query", "document")


def compare(name: str, pairs: pl.DataFrame, theirs: SentenceTransformer, dtype: str, rounds: int) -> None:
    """Prints the medians of both and the median of the ratios, round by round."""
    folder = Path(tempfile.mkdtemp())
    pairs.write_parquet(folder / "pairs.parquet")
    manifest = folder / "manifest.toml"
    manifest.write_text(
        f'corpus = "bench"\n[embed]\ndtype = "{dtype}"\n[[dataset]]\nname = "{name}"\nsource = "pairs.parquet"\n'
    )
    steps = {step.stage: step for step in plan_corpus(manifest, folder / "workspace").steps}
    run_step(steps["pairs"])
    run_step(steps["vectors"])  # loads the model
    queries, documents = pairs["query"].to_list(), pairs["document"].to_list()
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    for _ in range(rounds):
        shutil.rmtree(steps["vectors"].path)
        start = time.perf_counter()
        run_step(steps["vectors"])
        seconds["ours"].append(time.perf_counter() - start)
        start = time.perf_counter()
        plain = [theirs.encode(texts, convert_to_tensor=True).float().numpy() for texts in (queries, documents)]
        seconds["theirs"].append(time.perf_counter() - start)
    vectors = open_vectors(steps["vectors"].path)
    rows = load_pairs(read_artifact(steps["pairs"].path))
    ours = [vectors.queries.take(rows.query_row), vectors.documents.take(rows.document_row)]
    cosines = np.concatenate([cosine(a, b) for a, b in zip(ours, plain, strict=True)])
    ratios = [b / a for a, b in zip(seconds["ours"], seconds["theirs"], strict=True)]
    distinct = pairs["query"].n_unique() + pairs["document"].n_unique()
    print(
        f"{name}: {2 * len(pairs)} texts, {distinct} distinct; ours {statistics.median(seconds['ours']):.2f} s, "
        f"encode {statistics.median(seconds['theirs']):.2f} s, ratio {statistics.median(ratios):.2f} "
        f"({min(ratios):.2f} to {max(ratios):.2f}), cosine at least {cosines.min():.6f}",
        flush=True,
    )
    shutil.rmtree(folder)


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine row by row, in float64."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    return (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))


if __name__ == "__main__":
    main()
