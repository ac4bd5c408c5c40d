"""The data card of a shards artifact: what it holds, where it comes from, how to read it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields

import pyarrow as pa

from hardbatch.pipeline.sources.extra import kind_of
from hardbatch.pipeline.stages.figures import CLUSTER_SIZES, OWN_RANKS, DomainSummary, Hardness, Summary
from hardbatch.pipeline.stages.warnings import corpus_warnings

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
    "negative_places": "place of each of these in the list of the source, from 0; null if another row had it",
    "positive_slots": "other slots of the batch whose document answers this query for certain",
    "equivalent_slots": "these slots and those whose document is likely to answer it: not used as negatives",
}
# The configurations of `load_dataset` and of the hub's viewer. Without them both would take index.parquet, which has
# other columns, for batches.
_FRONT_MATTER = (
    "---",
    "configs:",
    "- config_name: default",
    "  data_files:",
    "  - split: train",
    "    path: data/*.parquet",
    "- config_name: index",
    "  data_files:",
    "  - split: train",
    "    path: index.parquet",
    "---",
    "",
)


def data_card(
    corpus: str, key: str, licences: Mapping[str, str], summary: Summary, names: Sequence[str], extra: pa.Schema
) -> str:
    """The data card as markdown.

    Args:
        corpus: The name of the corpus.
        key: The key of the shards.
        licences: The licence of each dataset, or an empty text.
        summary: The figures of the shards.
        names: The columns of the shards, in their order.
        extra: Those of them that come from the sources as they are.
    """
    domains = summary.domains
    several = summary.packings > 1
    datasets_header = ["domain", "pairs", "batches of each packing" if several else "batches", "licence"]
    datasets = [
        [name, f"{domains[name].source['pairs']:,}", f"{domains[name].batches:,}", licence or "not stated"]
        for name, licence in licences.items()
    ]
    columns = _COLUMNS | {field.name: f"extra column of the source: {kind_of(field.type)}" for field in extra}
    warnings = [f"- {line}" for line in corpus_warnings(summary)]
    return "\n".join(
        [
            *_FRONT_MATTER,
            f"# {corpus}: batches of {summary.batch_size} pairs",
            "",
            f"{summary.batches:,} hard, false-negative-masked batches made by hardbatch, key `{key}`.",
            "In `data/`, one Parquet row group is one batch and one row is one slot.",
            "",
            "```python",
            "import polars as pl",
            'pl.scan_parquet("data/*.parquet").filter(pl.col("batch_id") == 0).collect()',
            "```",
            "",
            "or with `datasets`, a list of each column for every batch:",
            "",
            "```python",
            "from datasets import load_dataset",
            'load_dataset("FOLDER_OR_HUB_NAME", split="train", streaming=True).batch(by_column="batch_id")',
            "```",
            "",
            markdown_table(datasets_header, datasets),
            "",
            markdown_table(*hardness_rows(domains, summary.packings)),
            "",
            "Hardness: how alike the negatives of a batch are. Share: 0 for random batches, 1 for every pair among its",
            "nearest of the domain. Masked: without likely answers. Surrogate loss: InfoNCE after masking.",
            "Group hardness: that of the negatives of a pair's own group, where a batch has several groups.",
            *packings_text(summary.packings),
            "",
            markdown_table(*negatives_rows(domains)),
            "",
            *negatives_text(summary.batch_size),
            *warnings,
            "",
            markdown_table(["column", "what it is"], [[f"`{name}`", columns[name]] for name in names]),
            "",
            "`index.parquet` has a row per batch: its packing, file, row group, byte range, digest and figures.",
            "`manifest.json` has the settings, the keys of the inputs and the digest of every file;",
            "`hardbatch verify` checks them.",
            "",
        ]
    )


def hardness_rows(domains: Mapping[str, DomainSummary], num_packings: int) -> tuple[list[str], list[list[str]]]:
    """How hard the batches are, as a header and rows: one per domain, over all packings.

    If there are several packings, a row for each follows. Cluster sizes are shown if the artifacts have them.
    """
    several = num_packings > 1
    with_sizes = any(CLUSTER_SIZES[0] in domain.source for domain in domains.values())
    shown = [field.name for field in fields(Hardness)]
    if not any(_has_groups(domain.hardness) for domain in domains.values()):
        shown.remove("group_hardness")
    header = ["domain", *["packing"] * several, *(name.replace("_", " ") for name in shown)]
    header += ["shared batch-mates"] * several + ["cluster sizes 5/50/95 %"] * with_sizes
    rows = []
    for name, domain in domains.items():
        sizes = ", ".join(f"{domain.source[size]:,g}" for size in CLUSTER_SIZES if size in domain.source)
        of_all = [name, *["all"] * several, *_hardness_cells(domain.hardness, shown)]
        rows.append(of_all + [_cell(domain.shared_batch_mates)] * several + [sizes] * with_sizes)
        for packing, part in enumerate(domain.by_packing):
            rows.append(["", str(packing), *_hardness_cells(part, shown), "", *[""] * with_sizes])
    return header, rows


def negatives_rows(domains: Mapping[str, DomainSummary]) -> tuple[list[str], list[list[str]]]:
    """What masking leaves of the batches, as a header and a row per domain, over all packings.

    No rows if the shards are of format version 2, which did not count this.
    """
    header = ["domain", "negatives", "5th percentile", "queries without", "same answer", "query text"]
    header += ["likely", "top 10 %", "mostly masked", "own rank 50/95 %"]
    rows = []
    for name, domain in domains.items():
        if (found := domain.negatives) is not None:
            shares = [found.same_answer_share, found.query_text_share, found.likely_share, found.concentration]
            left = [f"{found.mean:.1f}", f"{found.q05:,}", f"{found.without:,}"]
            ranks = ", ".join(f"{domain.source[rank]:,.0f}" for rank in OWN_RANKS if rank in domain.source)
            rows.append([name, *left, *map(_percent, shares), f"{found.mostly_masked_batches:,}", ranks])
    return header, rows


def negatives_text(batch_size: int) -> list[str]:
    """Lines that explain `negatives_rows`, to go below it."""
    return [
        f"Negatives: of the {batch_size - 1} other slots, those that are not masked for a query: the mean, then",
        "the 5th percentile. Of the masked slots: the share by reason (same answer: certain; query text: the",
        "document is the query itself; likely: by the surrogate alone), and the share that the most masked 10 %",
        "of the queries hold. Mostly masked: batches in which more than half of the queries keep fewer than half",
        "of the negatives. Own rank: of a pair's own document for its query, by the surrogate, among",
        "consistency.pool documents: median, 95th percentile.",
    ]


def packings_text(num_packings: int) -> list[str]:
    """Lines that explain what several packings are, to go below the table; none if there is only one."""
    if num_packings == 1:
        return []
    return [
        f"{num_packings} packings, each another way of cutting the pairs into batches, which are counted per packing.",
        "Shared batch-mates: of the pairs beside a pair in one packing, the fraction beside it in another too.",
    ]


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows under a header, in markdown."""
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *rows])


def _has_groups(hardness: Hardness | None) -> bool:
    """Whether batches have groups whose hardness is not that of the whole batch."""
    return hardness is not None and hardness.group_hardness not in (None, hardness.hardness)


def _hardness_cells(hardness: Hardness | None, names: Sequence[str]) -> list[str]:
    return [_cell(getattr(hardness, name, None)) for name in names]


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"
