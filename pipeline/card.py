"""The data card of a shards artifact: what it holds, where it comes from, how to read it."""

from __future__ import annotations

from typing import Any

from pipeline.schemas import SHARDS_WITH_NEGATIVES

_COLUMNS = {
    "batch_id": "number of the batch, unique in the artifact",
    "slot": "place of the pair in its batch, 0 to B-1",
    "domain": "dataset the pair comes from",
    "pair_id": "number of the pair in its domain",
    "cluster_id": "cluster that K-Means put the pair in",
    "query_id": "number of the query among the distinct queries of its domain",
    "document_id": "number of the document among the distinct documents of its domain",
    "query": "text of the query, without prompt",
    "document": "text of the document, without prompt",
    "query_prompt": "put before the query in training",
    "document_prompt": "put before the document in training",
    "negatives": "hard negatives of this query alone, known and likely answers removed",
    "equivalent_slots": "slots of the batch whose document may answer this query as well: no negatives",
}


def data_card(
    corpus: str, key: str, datasets: dict[str, dict[str, Any]], summary: dict[str, Any], with_negatives: bool
) -> str:
    """The card as markdown."""
    licences = [
        f"| {domain} | {summary['domains'][domain]['pairs']:,} | {summary['domains'][domain]['batches']:,} "
        f"| {dataset['licence'] or 'not stated'} |"
        for domain, dataset in datasets.items()
    ]
    names = [name for name in SHARDS_WITH_NEGATIVES.names if with_negatives or name != "negatives"]
    columns = [f"| `{name}` | {_COLUMNS[name]} |" for name in names]
    return "\n".join(
        [
            f"# {corpus}: batches of {summary['batch_size']} pairs",
            "",
            f"{summary['batches']:,} hard, false-negative-masked batches made by hardbatch, key `{key}`.",
            "In `data/`, one Parquet row group is one batch and one row is one slot.",
            "",
            "```python",
            "import polars as pl",
            'pl.scan_parquet("data/*.parquet").filter(pl.col("batch_id") == 0).collect()',
            "```",
            "",
            "| domain | pairs | batches | licence |",
            "|---|---|---|---|",
            *licences,
            "",
            "| column | what it is |",
            "|---|---|",
            *columns,
            "",
            "`index.parquet` has a row per batch: its file, row group, byte range, digest, hardness and mask rate.",
            "`manifest.json` has the settings, the keys of the inputs and the digest of every file;",
            "`hardbatch verify` checks them.",
            "",
        ]
    )
