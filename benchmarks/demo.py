"""Makes the test collection of `make demo`: held-out questions, to be searched over all documents.

    python benchmarks/demo.py SHARDS OUTPUT

The pipeline's holdout of a domain contains only the documents of its held-out pairs: some dozens, among which an
answer is easy to find. Here every document of every domain is searched, those of the training pairs included.
The last line printed is the folder of the collection.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hardbatch.pipeline import schemas
from hardbatch.pipeline.artifacts.artifact import read_artifact
from hardbatch.pipeline.artifacts.vectors import Texts
from hardbatch.trainer.collection import load_collection
from hardbatch.trainer.shards import open_shards


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
        pairs = shards.resolve().parent.parent / source
        trained = Texts(read_artifact(pairs), "documents")
        for text in trained.take(np.arange(trained.num_rows)):
            documents.setdefault(text, len(documents))

        held_out = load_collection(pairs / "holdout")
        for query_row, document_row in zip(held_out.query_rows, held_out.document_rows, strict=True):
            query, document = held_out.queries[query_row], held_out.documents[document_row]
            query_id = queries.setdefault(query, len(queries))
            answers.add((query_id, documents.setdefault(document, len(documents))))

    tables = {
        "corpus": pa.table(
            {
                "doc_id": [f"d{row}" for row in documents.values()],
                "text": list(documents),
                "title": [""] * len(documents),
            },
            schema=schemas.HOLDOUT_CORPUS,
        ),
        "queries": pa.table(
            {"query_id": [f"q{row}" for row in queries.values()], "text": list(queries)},
            schema=schemas.HOLDOUT_QUERIES,
        ),
        "qrels": pa.table(
            {
                "query_id": [f"q{query}" for query, _ in sorted(answers)],
                "doc_id": [f"d{document}" for _, document in sorted(answers)],
                "score": [1] * len(answers),
            },
            schema=schemas.HOLDOUT_QRELS,
        ),
    }
    output.mkdir(parents=True, exist_ok=True)
    for name, table in tables.items():
        pq.write_table(table, output / f"{name}.parquet")
    print(f"{len(queries):,} held-out questions, searched over all {len(documents):,} documents", file=sys.stderr)


if __name__ == "__main__":
    make_collection(Path(sys.argv[1]), Path(sys.argv[2]))
    print(sys.argv[2])
