"""The tour over a graph of nearest neighbours against the exact greedy one, on centroids of real pairs.

    HARDBATCH_DATA=DIR python benchmarks/tour.py [--clusters 2048 8192 32768] [--dimension 768] [--rounds 3] [--faiss]

Pairs of all domains of DIR/train, mixed, in lexical vectors of `--dimension`, are clustered by 6. Each round takes all
sizes, and the medians stand in the table, in wall seconds. `length` and `1-cos` are of the whole tour: the sum of
Euclidean distances and the mean of 1 - cosine between consecutive unit centroids, over those of exact greedy. `--faiss`
compares the graph with one from FAISS's IndexIVFFlat of √k lists of which 16 are probed; `recall` is of 32 neighbours.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import torch

from hardbatch.pipeline.artifacts.artifact import read_artifact
from hardbatch.pipeline.batching import tour
from hardbatch.pipeline.batching.neighbours import nearest_neighbours
from hardbatch.pipeline.models import encoders
from hardbatch.pipeline.run import plan_corpus, run_step

CLUSTER_SIZE = 6
NUM_NEIGHBOURS = 32
EXACT_BYTES = 8 * 2**30
RECALL_ROWS = 1_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clusters", type=int, nargs="+", default=[2_048, 8_192, 32_768])
    parser.add_argument("--dimension", type=int, default=768)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--faiss", action="store_true")
    options = parser.parse_args()
    if "HARDBATCH_DATA" not in os.environ:
        print("skipped: HARDBATCH_DATA names no folder with train/<domain>.parquet")
        return
    encoders.LEXICAL_DIMENSION = options.dimension
    sets = [real_centroids(Path(os.environ["HARDBATCH_DATA"]) / "train", num) for num in options.clusters]
    print(f"D={options.dimension}, {torch.get_num_threads()} threads, medians of {options.rounds} rounds, seconds")
    rounds = [[measure(unit_kD) for unit_kD in sets] for _ in range(options.rounds)]
    print(f"{'k':>7}{'exact':>9}{'graph':>9}{'walk':>9}{'total':>9}{'growth':>9}{'length':>9}{'1-cos':>9}")
    total = None
    for number, unit_kD in enumerate(sets):
        exact, graph, walk, length, cosine = (
            statistics.median(values) for values in zip(*(taken[number] for taken in rounds), strict=True)
        )
        growth = f"{(graph + walk) / total:.1f}x" if total else ""
        total = graph + walk
        row = f"{len(unit_kD):>7}{exact:>9.2f}{graph:>9.2f}{walk:>9.2f}{total:>9.2f}{growth:>9}"
        print(f"{row}{length:>9.4f}{cosine:>9.4f}", flush=True)
    if options.faiss:
        for unit_kD in sets:
            compare_graphs(unit_kD, options.rounds)


def real_centroids(data: Path, num_clusters: int) -> np.ndarray:
    """Unit centroids (float32, about num_clusters × D) of `CLUSTER_SIZE` pairs each, of all domains mixed."""
    folder = Path(tempfile.mkdtemp())
    pairs = pl.concat([pl.scan_parquet(path).select("query", "document") for path in sorted(data.glob("*.parquet"))])
    merged = pairs.collect().sample(num_clusters * CLUSTER_SIZE, shuffle=True, seed=0)
    merged.with_columns(pl.all().str.slice(0, 400)).write_parquet(folder / "merged.parquet")
    manifest = folder / "manifest.toml"
    manifest.write_text(
        'corpus = "tour"\n[embed]\nmodel = "lexical"\nsurrogate_model = "lexical"\n'
        f'[cluster]\ncluster_size = {CLUSTER_SIZE}\n[[dataset]]\nname = "merged"\nsource = "merged.parquet"\n'
    )
    steps = {step.stage: step for step in plan_corpus(manifest, folder / "workspace").steps}
    for stage in ("pairs", "vectors", "clusters"):
        run_step(steps[stage])
    centroids = np.load(next(path for path in read_artifact(steps["clusters"].path).path.rglob("centroids.npy")))
    shutil.rmtree(folder)
    return (centroids / np.linalg.norm(centroids, axis=1, keepdims=True)).astype(np.float32)


def measure(unit_kD: np.ndarray) -> tuple[float, float, float, float, float]:
    """Seconds of the exact tour, of the graph and of the walk, and the walk's lengths over the exact tour's.

    The exact tour is left out, as NaN, where its matrix is above `EXACT_BYTES`.
    """
    graph_s: list[float] = []

    def timed_neighbours(vectors_kD: np.ndarray, num_neighbours: int) -> np.ndarray:
        found, seconds = timed(lambda: nearest_neighbours(vectors_kD, num_neighbours))
        graph_s.append(seconds)
        return found

    tour.nearest_neighbours = timed_neighbours
    walked, seconds = timed(lambda: tour.greedy_tour(unit_kD, 0, exact_below=1))
    exact_s, ratios = np.nan, (np.nan, np.nan)
    if 4 * len(unit_kD) ** 2 <= EXACT_BYTES:
        exact, exact_s = timed(lambda: tour.greedy_tour(unit_kD, 0, exact_below=len(unit_kD) + 1))
        pairs = zip(lengths(unit_kD, walked), lengths(unit_kD, exact), strict=True)
        ratios = tuple(ours / theirs for ours, theirs in pairs)
    return exact_s, graph_s[0], seconds - graph_s[0], *ratios


def timed(function: Callable[[], np.ndarray]) -> tuple[np.ndarray, float]:
    """What `function` returns, and the seconds it took."""
    start = time.perf_counter()
    return function(), time.perf_counter() - start


def lengths(unit_kD: np.ndarray, order: np.ndarray) -> tuple[float, float]:
    """Sum of Euclidean distances and mean of 1 - cosine between consecutive centroids."""
    here, there = unit_kD[order[1:]].astype(np.float64), unit_kD[order[:-1]].astype(np.float64)
    return float(np.linalg.norm(here - there, axis=1).sum()), float(1 - (here * there).sum(1).mean())


def compare_graphs(unit_kD: np.ndarray, rounds: int) -> None:
    """Prints seconds and recall of our graph and of FAISS's."""
    sample = np.random.default_rng(0).choice(len(unit_kD), RECALL_ROWS, replace=False)
    scores = unit_kD[sample] @ unit_kD.T
    scores[np.arange(len(sample)), sample] = -np.inf
    best = np.argsort(-scores, axis=1)[:, :NUM_NEIGHBOURS]
    for name, find in (("ours", nearest_neighbours), ("FAISS", faiss_neighbours)):
        taken = [timed(lambda find=find: find(unit_kD, NUM_NEIGHBOURS)) for _ in range(rounds)]
        found = taken[0][0][sample]
        recall = np.mean([np.isin(row, known).mean() for row, known in zip(best, found, strict=True)])
        seconds = statistics.median(seconds for _, seconds in taken)
        print(f"k={len(unit_kD)} {name}: {seconds:.2f} s, recall {recall:.3f}", flush=True)


def faiss_neighbours(vectors_kD: np.ndarray, num_neighbours: int) -> np.ndarray:
    """Of each vector, itself among them."""
    import faiss

    dimension = vectors_kD.shape[1]
    index = faiss.IndexIVFFlat(
        faiss.IndexFlatIP(dimension), dimension, round(len(vectors_kD) ** 0.5), faiss.METRIC_INNER_PRODUCT
    )
    index.train(vectors_kD)
    index.add(vectors_kD)
    index.nprobe = 16
    return index.search(vectors_kD, num_neighbours + 1)[1]


if __name__ == "__main__":
    main()
