"""Compares our batching, whole and in parts, with the paper's procedure on FAISS, on the same pairs and vectors.

    HARDBATCH_DATA=DIR python benchmarks/batching.py [--domains medical,reddit:33000] [--sizes 64,256] [--seeds 3]
        [--slow-seeds 1] [--workspace DIR] [--plot FILE.svg] [--without described,shipped]

Clusters are made and measured with MiniLM. Masks come from MiniLM and, as a second model, from the lexical embedder.
The methods take turns within a seed. Figures are medians over seeds (over --slow-seeds for the paper's procedure), and
the cluster size is B. Seconds are those of clustering and packing, from vectors in memory-mapped files.

The paper's procedure runs `as described` (2n doubled points, all used for training, spherical, 100 iterations, best of
3) and `as shipped` (FAISS keeps 256 points per centroid; at B = 64 there are only 128, so the two are the same). Both
assign q⊕d, walk a tour over the centroids, and cut. B3 wants the package pymetis; leave it out with --without b3.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import faiss
import numpy as np
import torch
from batching_figures import Corpus, measure, plot, print_table
from scipy.sparse import csr_array

from hardbatch.pipeline.arrays import Array
from hardbatch.pipeline.artifacts.artifact import read_artifact
from hardbatch.pipeline.artifacts.vectors import FoldedPoints, Vectors, load_pairs, open_vectors
from hardbatch.pipeline.batching.hardness import measure_bounds
from hardbatch.pipeline.batching.kmeans import Clustering, kmeans
from hardbatch.pipeline.batching.pack import PackSettings, pack
from hardbatch.pipeline.batching.points import means_of_labels
from hardbatch.pipeline.batching.refine import refine
from hardbatch.pipeline.batching.tour import greedy_tour
from hardbatch.pipeline.batching.two_level import two_level_kmeans
from hardbatch.pipeline.run import plan_corpus, run_step

DOMAINS = "medical,reddit:33000,code_python,intents_clinc"
_ROWS_AT_ONCE = 1_024
Method = Callable[[FoldedPoints, int, int], tuple[Array, Array]]  # (points, B, seed) → batches, labels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--domains", default=DOMAINS)
    parser.add_argument("--sizes", default="64,256")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--slow-seeds", type=int, default=1, help="seeds for which the paper's procedure runs")
    parser.add_argument("--workspace", type=Path, default=Path(tempfile.gettempdir()) / "hardbatch-benchmark")
    parser.add_argument("--without", default="", help="methods to leave out, by their first word")
    parser.add_argument("--plot", type=Path, help="draw masked share against seconds, for each domain and B")
    parser.add_argument("--output", type=Path, help="write every figure to this file, as JSON lines")
    options = parser.parse_args()
    if "HARDBATCH_DATA" not in os.environ:
        raise SystemExit(
            "HARDBATCH_DATA is not set: set it to the folder of real pairs, which has train/<domain>.parquet"
        )
    left_out = tuple(filter(None, options.without.split(",")))
    methods = {name: method for name, method in METHODS.items() if not name.startswith(left_out or ("\0",))}
    medians = []
    for domain in options.domains.split(","):
        corpus = load(domain, Path(os.environ["HARDBATCH_DATA"]) / "train", options.workspace)
        for batch_size in map(int, options.sizes.split(",")):
            bounds = measure_bounds(corpus.points, batch_size, num_anchors=4_096, seed=0)
            assert bounds is not None
            found: dict[str, list[dict[str, float]]] = {name: [] for name in methods}
            reference: float | None = None
            for seed in range(options.seeds):
                for name, method in methods.items():
                    if name.startswith(("described", "shipped")) and seed >= options.slow_seeds:
                        continue
                    start = time.perf_counter()
                    batches, labels = method(corpus.points, batch_size, seed)
                    seconds = time.perf_counter() - start
                    figures = measure(corpus, batches, labels, bounds, reference)
                    if name.startswith("shipped"):
                        reference = figures["mask rate"]
                    found[name].append({"seconds": seconds, **figures})
                    if options.output:
                        line = {"domain": domain, "B": batch_size, "method": name, "seed": seed, **found[name][-1]}
                        with options.output.open("a") as file:
                            print(json.dumps(line), file=file)
            print_table(f"{domain.partition(':')[0]}, {len(corpus.points):,} pairs, B = {batch_size}", found)
            for name, runs in found.items():
                row = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
                medians.append((domain.partition(":")[0], batch_size, name, row))
    if options.plot:
        plot(medians, options.plot)


def load(domain: str, data: Path, workspace: Path) -> Corpus:
    """Embeds a domain (NAME or NAME:LIMIT) with both models, or reads the vectors that exist."""
    name, _, limit = domain.partition(":")
    workspace.mkdir(parents=True, exist_ok=True)
    manifest = workspace / f"{name}.toml"
    cut = f"limit = {limit}\n" if limit else ""
    manifest.write_text(f'corpus = "batching"\n[[dataset]]\nname = "{name}"\nsource = "{name}.parquet"\n{cut}')
    overrides = ["embed.model=minilm", "embed.surrogate_model=lexical"]
    steps = plan_corpus(manifest, workspace, data_root=data, overrides=overrides).steps
    for step in steps:
        if step.stage in ("pairs", "vectors"):
            run_step(step)
    pairs = load_pairs(read_artifact(next(step.path for step in steps if step.stage == "pairs")))
    opened: list[Vectors] = [open_vectors(step.path) for step in steps if step.stage == "vectors"]
    invalid = opened[0].invalid_pairs(pairs) | opened[1].invalid_pairs(pairs)
    sides = [FoldedPoints(vectors=vectors, pairs=pairs, pair_ids=np.flatnonzero(~invalid)) for vectors in opened]
    every = np.arange(len(sides[0]))
    own, other = (tuple(map(torch.from_numpy, points.sides(every))) for points in sides)
    return Corpus(
        points=sides[0],
        query_row=torch.from_numpy(pairs.query_row[sides[0].pair_ids]),
        document_row=torch.from_numpy(pairs.document_row[sides[0].pair_ids]),
        own=own,  # type: ignore[arg-type]
        other=other,  # type: ignore[arg-type]
    )


def doubled(points_per_centroid: int | None) -> Method:
    """Returns the paper's K-Means and packing; FAISS keeps that many points per centroid, or all if None."""

    def batch(points: FoldedPoints, batch_size: int, seed: int) -> tuple[Array, Array]:
        documents, queries = points.sides(np.arange(len(points)))
        forward = np.concatenate([documents, queries], axis=1)
        both = np.concatenate([forward, np.concatenate([queries, documents], axis=1)])
        both /= np.linalg.norm(both, axis=1, keepdims=True)
        trainer = faiss.Kmeans(
            both.shape[1],
            -(-len(points) // batch_size),
            niter=100,
            nredo=3,
            seed=seed + 1,
            spherical=True,
            min_points_per_centroid=1,
            max_points_per_centroid=points_per_centroid or len(both),
        )
        trainer.train(both)
        _, labels = trainer.index.search(np.ascontiguousarray(both[: len(points)]), 1)
        return tour_and_cut(points, labels[:, 0], batch_size, seed)

    return batch


def faiss_labels(points: FoldedPoints, batch_size: int, seed: int) -> Array:
    """Clusters by FAISS's K-Means on s = d + q, with 10 iterations, one start and all points."""
    folded = points.take(np.arange(len(points)))
    trainer = faiss.Kmeans(
        folded.shape[1],
        -(-len(points) // batch_size),
        niter=10,
        seed=seed + 1,
        min_points_per_centroid=1,
        max_points_per_centroid=len(folded),
    )
    trainer.train(folded)
    return np.asarray(trainer.index.search(folded, 1)[1][:, 0])


def our_clusters(points: FoldedPoints, batch_size: int, seed: int, *, balance: float, levels: int) -> Clustering:
    """Clusters by our folded K-Means, with 10 iterations, in one level or two."""
    find = kmeans if levels == 1 else two_level_kmeans
    num_clusters = -(-len(points) // batch_size)
    return find(points, num_clusters, iterations=10, tolerance=1e-3, balance=balance, seed=seed)


def tour_and_cut(points: FoldedPoints, labels: Array, batch_size: int, seed: int) -> tuple[Array, Array]:
    """Orders clusters along a greedy tour, keeps the order of the corpus within each, and cuts every B pairs."""
    used, labels = np.unique(labels, return_inverse=True)
    centroids = means_of_labels(points, labels, len(used))
    tour = greedy_tour(centroids, int(np.random.default_rng(seed).integers(len(used))), exact_below=8_192)
    place_on_tour = np.empty(len(tour), dtype=np.int64)
    place_on_tour[tour] = np.arange(len(tour))
    row = np.argsort(place_on_tour[labels], kind="stable")
    return row[: len(row) // batch_size * batch_size].reshape(-1, batch_size), labels


def fill_and_refine(points: FoldedPoints, labels: Array, batch_size: int, seed: int) -> tuple[Array, Array]:
    """Packs FAISS's clusters as we do."""
    used, labels = np.unique(labels, return_inverse=True)
    centroids = means_of_labels(points, labels, len(used))
    settings = PackSettings(batch_size=batch_size, group_size=batch_size, seed=seed)
    return pack(points, labels, centroids, settings).batches, labels


def cut_and_refine(points: FoldedPoints, labels: Array, batch_size: int, seed: int) -> tuple[Array, Array]:
    """Cuts FAISS's clusters along the tour every B pairs, and refines the batches as we do."""
    batches, labels = tour_and_cut(points, labels, batch_size, seed)
    vectors = torch.from_numpy(points.joined(batches.ravel()))
    return refine(vectors, batches, rounds=30, tolerance=5e-4).batches, labels


def ours(balance: float, levels: int = 1, rounds: int | None = None) -> Method:
    """Returns our clustering with our packing, or cut along the tour if `rounds` is None."""

    def batch(points: FoldedPoints, batch_size: int, seed: int) -> tuple[Array, Array]:
        found = our_clusters(points, batch_size, seed, balance=balance, levels=levels)
        if rounds is None:
            return tour_and_cut(points, found.labels, batch_size, seed)
        settings = PackSettings(batch_size=batch_size, group_size=batch_size, seed=seed, refine_rounds=rounds)
        return pack(points, found.labels, found.centroids, settings).batches, found.labels

    return batch


def b3(skip: int, num_neighbours: int = 100) -> Method:
    """Returns the method of B3 (arXiv 2505.11293), by our model.

    It ranks the documents of all pairs for each query. The `skip` best are left out, because they may be answers; the
    `num_neighbours` ranks after them are neighbours, and two pairs that are neighbours of each other are joined by an
    edge. METIS cuts this graph into parts of about B pairs with as few edges between them as possible. Parts are not of
    exactly B pairs, so all parts are laid in a row, which is cut after every B pairs.
    """

    def batch(points: FoldedPoints, batch_size: int, seed: int) -> tuple[Array, Array]:
        parts = _cut_by_metis(points, batch_size, skip, num_neighbours, seed)
        row = np.argsort(parts, kind="stable")
        return row[: len(row) // batch_size * batch_size].reshape(-1, batch_size), parts

    return batch


def _cut_by_metis(points: FoldedPoints, batch_size: int, skip: int, num_neighbours: int, seed: int) -> Array:
    import pymetis

    documents_nD, queries_nD = points.sides(np.arange(len(points)))
    size = len(queries_nD)
    last = min(skip + num_neighbours, size)
    neighbours = np.empty((size, last - skip), dtype=np.int64)
    for start in range(0, size, _ROWS_AT_ONCE):
        scores = queries_nD[start : start + _ROWS_AT_ONCE] @ documents_nD.T
        best = np.argpartition(-scores, last - 1, axis=1)[:, :last]
        order = np.argsort(-np.take_along_axis(scores, best, axis=1), axis=1, kind="stable")
        neighbours[start : start + _ROWS_AT_ONCE] = np.take_along_axis(best, order, axis=1)[:, skip:]

    rows = np.repeat(np.arange(size), neighbours.shape[1])
    directed = csr_array((np.ones(len(rows), dtype=np.int8), (rows, neighbours.ravel())), (size, size))
    graph = directed.multiply(directed.T).tocsr()
    graph.setdiag(0)
    graph.eliminate_zeros()
    options = pymetis.Options(seed=seed)
    num_parts = -(-size // batch_size)
    adjacency = pymetis.CSRAdjacency(graph.indptr, graph.indices)
    _, parts = pymetis.part_graph(num_parts, adjacency, options=options)
    return np.asarray(parts, dtype=np.int64)


METHODS: dict[str, Method] = {
    "random": lambda points, size, seed: (
        np.random.default_rng(seed).permutation(len(points))[: len(points) // size * size].reshape(-1, size),
        np.zeros(0, dtype=np.int64),
    ),
    "described: doubled, all points, 100 × 3; tour": doubled(None),
    "shipped: doubled, 256 a centroid, 100 × 3; tour": doubled(256),
    "b3: mutual neighbours from rank 30 on, METIS": b3(30),
    "b3: mutual neighbours from rank 0 on, METIS": b3(0),
    "faiss: s, 10 × 1; tour": lambda points, size, seed: tour_and_cut(
        points, faiss_labels(points, size, seed), size, seed
    ),
    "faiss: s, 10 × 1; fill, refine": lambda points, size, seed: fill_and_refine(
        points, faiss_labels(points, size, seed), size, seed
    ),
    "faiss: s, 10 × 1; tour, refine": lambda points, size, seed: cut_and_refine(
        points, faiss_labels(points, size, seed), size, seed
    ),
    "part: folded; tour": ours(0.0),
    "part: folded, two levels; tour": ours(0.0, levels=2),
    "part: folded, balanced; tour": ours(0.02),
    "part: folded, balanced; fill": ours(0.02, rounds=0),
    "part: folded, two levels; fill, refine": ours(0.02, levels=2, rounds=30),
    "part: folded, not balanced; fill, refine": ours(0.0, rounds=30),
    "whole: folded, balanced; fill, refine": ours(0.02, rounds=30),
}


if __name__ == "__main__":
    main()
