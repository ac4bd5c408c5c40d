"""Small collections in the layouts of BEIR and MTEB."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

DOCUMENTS: list[dict[str, Any]] = [
    {"_id": "d0", "title": "One", "text": 'the "first" document', "metadata": {}},
    {"_id": "d1", "title": "", "text": "the second", "metadata": {"url": "x"}},
    {"_id": "d2", "title": "Three", "text": "the third", "metadata": {"url": None}},
]
QUERIES: list[dict[str, Any]] = [{"_id": f"q{i}", "text": f"which is {i}?", "metadata": {}} for i in range(3)]
QRELS: list[tuple[str, str, int]] = [("q0", "d0", 1), ("q1", "d1", 2), ("q1", "d2", 1), ("q2", "d0", 0)]


def write_beir(folder: Path, *splits: str, qrels: list[tuple[str, str, int]] = QRELS) -> Path:
    """Writes corpus.jsonl, queries.jsonl.gz and qrels/SPLIT.tsv for each split, `test` by default."""
    (folder / "qrels").mkdir(parents=True)
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in DOCUMENTS))
    queries = "".join(json.dumps(row) + "\n" for row in QUERIES)
    (folder / "queries.jsonl.gz").write_bytes(gzip.compress(queries.encode(), mtime=0))
    rows = ["query-id\tcorpus-id\tscore\n", *(f"{query}\t{document}\t{score}\n" for query, document, score in qrels)]
    for split in splits or ("test",):
        (folder / "qrels" / f"{split}.tsv").write_text("".join(rows))
    return folder


def write_mteb(folder: Path, split: str = "test") -> Path:
    """Writes corpus/, queries/ and data/ as Parquet, the judgements in two files."""
    tables = {
        f"corpus/{split}-00000-of-00001": pa.table(
            {name: [row[name] for row in DOCUMENTS] for name in ("_id", "title", "text")}
        ),
        f"queries/{split}-00000-of-00001": pa.table({name: [row[name] for row in QUERIES] for name in ("_id", "text")}),
    }
    for number, rows in enumerate((QRELS[:2], QRELS[2:])):
        columns = dict(zip(("query-id", "corpus-id", "score"), map(list, zip(*rows, strict=True)), strict=True))
        tables[f"data/{split}-{number:05d}-of-00002"] = pa.table(columns)
    for name, table in tables.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, folder / f"{name}.parquet")
    return folder
