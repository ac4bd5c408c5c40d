"""The data card of a shards artifact: what it holds, where it comes from, how to read it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hardbatch.pipeline.schemas import SHARDS_WITH_NEGATIVES

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
_HARDNESS = ("hardness", "masked_hardness", "share", "masked_share", "mask_rate", "surrogate_loss")
CLUSTER_SIZES = ("cluster_size_q05", "cluster_size_q50", "cluster_size_q95")


def data_card(
    corpus: str, key: str, datasets: dict[str, dict[str, Any]], summary: dict[str, Any], with_negatives: bool
) -> str:
    """The card as markdown."""
    num_packings = summary["packings"]
    datasets_header = ["domain", "pairs", "batches of each packing" if num_packings > 1 else "batches", "licence"]
    licences = [
        [
            domain,
            f"{summary['domains'][domain]['pairs']:,}",
            f"{summary['domains'][domain]['batches']:,}",
            dataset["licence"] or "not stated",
        ]
        for domain, dataset in datasets.items()
    ]
    names = [name for name in SHARDS_WITH_NEGATIVES.names if with_negatives or name != "negatives"]
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
            markdown_table(datasets_header, licences),
            "",
            markdown_table(*figure_rows(summary["domains"], num_packings)),
            "",
            "Hardness: how alike the negatives of a batch are. Share: 0 for random batches, 1 for every pair among its",
            "nearest of the domain. Masked: without likely answers. Surrogate loss: InfoNCE after masking.",
            *packings_text(num_packings),
            "",
            markdown_table(["column", "what it is"], [[f"`{name}`", _COLUMNS[name]] for name in names]),
            "",
            "`index.parquet` has a row per batch: its packing, file, row group, byte range, digest and figures.",
            "`manifest.json` has the settings, the keys of the inputs and the digest of every file;",
            "`hardbatch verify` checks them.",
            "",
        ]
    )


def figure_rows(domains: dict[str, dict[str, Any]], num_packings: int) -> tuple[list[str], list[list[str]]]:
    """Header and rows of how hard the batches are: a row per domain, over all packings.

    Where there are several packings, a row of each follows; sizes of clusters where the artifacts know them.
    """
    several = num_packings > 1
    with_sizes = any(CLUSTER_SIZES[0] in figures for figures in domains.values())
    header = ["domain", *["packing"] * several, *(name.replace("_", " ") for name in _HARDNESS)]
    header += ["shared batch-mates"] * several + ["cluster sizes 5/50/95 %"] * with_sizes
    rows = []
    for domain, figures in domains.items():
        sizes = ", ".join(f"{figures[name]:,g}" for name in CLUSTER_SIZES if name in figures)
        of_all = [domain, *["all"] * several, *_hardness_cells(figures)]
        rows.append(of_all + [_cell(figures.get("shared_batch_mates"))] * several + [sizes] * with_sizes)
        for packing, part in enumerate(figures.get("by_packing", [])):
            rows.append(["", str(packing), *_hardness_cells(part), "", *[""] * with_sizes])
    return header, rows


def packings_text(num_packings: int) -> list[str]:
    """What several packings are, for under the figures; nothing where there is one."""
    if num_packings == 1:
        return []
    return [
        f"{num_packings} packings, each another way of cutting the pairs into batches, which are counted per packing.",
        "Shared batch-mates: of the pairs beside a pair in one packing, the fraction beside it in another too.",
    ]


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows under a header, in markdown."""
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *rows])


def _hardness_cells(figures: dict[str, Any]) -> list[str]:
    return [_cell(figures.get(name)) for name in _HARDNESS]


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
