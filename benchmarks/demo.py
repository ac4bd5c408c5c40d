"""Prepares the last step of `make demo`: what is searched, and the stock model to compare with.

    python benchmarks/demo.py SHARDS OUTPUT

Writes two folders below OUTPUT. `held-out-questions` is a test collection: the questions of all held-out pairs, to be
searched over every document of the corpus, those of the other domains included. `stock` is MiniLM as published, which
reads as many tokens of a text as the trained model does.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from hardbatch.pipeline.models.locate import locate_model
from hardbatch.trainer.collection import load_collection
from hardbatch.trainer.shards import open_shards

MAX_LENGTH_TOKENS = 48  # --max-length of the demo's training


def make_collection(shards: Path, output: Path) -> None:
    """Writes corpus, queries and qrels to `output`, with one row for each distinct text.

    Args:
        shards: Folder of shards; its pairs and holdouts are found in the same workspace.
        output: Folder to write the three Parquet files to.
    """
    documents: dict[str, int] = {}
    queries: dict[str, int] = {}
    answers: set[tuple[int, int]] = set()

    for source in open_shards(shards).pairs:
        held_out = load_collection(shards.resolve().parent.parent / source / "holdout")
        for text in held_out.documents:
            documents.setdefault(text, len(documents))
        for query_row, document_row in zip(held_out.query_rows, held_out.document_rows, strict=True):
            query, document = held_out.queries[query_row], held_out.documents[document_row]
            query_id = queries.setdefault(query, len(queries))
            answers.add((query_id, documents[document]))

    query_ids, document_ids = zip(*sorted(answers), strict=True)
    tables = {
        "corpus": {"doc_id": list(documents.values()), "text": list(documents)},
        "queries": {"query_id": list(queries.values()), "text": list(queries)},
        "qrels": {"query_id": query_ids, "doc_id": document_ids, "score": [1] * len(answers)},
    }
    output.mkdir(parents=True, exist_ok=True)
    for name, columns in tables.items():
        pq.write_table(pa.table(columns), output / f"{name}.parquet")


def copy_stock_model(output: Path) -> None:
    """Copies MiniLM to `output` and sets how many tokens it reads."""
    _, folder, _ = locate_model("minilm", None, Path())
    shutil.copytree(folder, output, dirs_exist_ok=True)
    settings = output / "sentence_bert_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"max_seq_length": MAX_LENGTH_TOKENS}))


if __name__ == "__main__":
    shards_folder, output_folder = map(Path, sys.argv[1:])
    make_collection(shards_folder, output_folder / "held-out-questions")
    copy_stock_model(output_folder / "stock")
