"""The data card of a shards artifact: what it holds, where it comes from, how to read it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
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
CLUSTER_SIZES = ("cluster_size_q05", "cluster_size_q50", "cluster_size_q95")


@dataclass(frozen=True, kw_only=True)
class Hardness:
    """How hard some batches are, on average; the fields come in the order in which they are shown.

    The shares are None if there are no bounds to compare with, a masked field also if every negative is masked.
    """

    hardness: float
    masked_hardness: float | None
    share: float | None
    masked_share: float | None
    mask_rate: float
    surrogate_loss: float

    def counts(self) -> dict[str, float | None]:
        """The fields as manifests hold them: rounded, without shares if there are no bounds."""
        known = {name: value for name, value in asdict(self).items() if self.share is not None or "share" not in name}
        return {name: None if value is None else round(value, 4) for name, value in known.items()}


@dataclass(frozen=True, kw_only=True)
class DomainSummary:
    """From the source rows of a domain to its batches, and how hard these are.

    Attributes:
        batches: Number of batches in each packing.
        leftover: Number of pairs in no batch of a packing, by reason.
        source: What ingest and clustering counted; empty for the batches that mix domains.
        hardness: Over all packings; None without a batch.
        bounds: Hardness of random batches and of nearest neighbours, which shares are relative to.
        by_packing: Hardness of each packing; empty if there is only one.
        shared_batch_mates: What the packings have in common; None if no pair is in a batch of two of them.
    """

    batches: int
    leftover: dict[str, int]
    source: dict[str, Any]
    hardness: Hardness | None = None
    bounds: tuple[float, float] | None = None
    by_packing: tuple[Hardness, ...] = ()
    shared_batch_mates: float | None = None

    def counts(self) -> dict[str, Any]:
        """The summary as manifests hold it: flat, without what does not apply to the domain."""
        counts = {"batches": self.batches, "leftover": self.leftover, **self.source}
        if self.hardness is not None:
            counts |= self.hardness.counts()
        if self.bounds is not None:
            counts |= dict(zip(("hardness_random", "hardness_knn"), self.bounds, strict=True))
        if self.by_packing:
            counts["shared_batch_mates"] = self.shared_batch_mates
            counts["by_packing"] = [hardness.counts() for hardness in self.by_packing]
        return counts


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The counts of a corpus; `batches` are those of all packings together."""

    batch_size: int
    batches: int
    packings: int
    domains: dict[str, DomainSummary]

    def counts(self) -> dict[str, Any]:
        """The summary as manifests hold it."""
        return vars(self) | {"domains": {name: domain.counts() for name, domain in self.domains.items()}}


def data_card(corpus: str, key: str, licences: Mapping[str, str], summary: Summary, with_negatives: bool) -> str:
    """The card as markdown; `licences` names the licence of each dataset, or is empty for it."""
    domains = summary.counts()["domains"]
    several = summary.packings > 1
    datasets_header = ["domain", "pairs", "batches of each packing" if several else "batches", "licence"]
    datasets = [
        [name, f"{domains[name]['pairs']:,}", f"{domains[name]['batches']:,}", licence or "not stated"]
        for name, licence in licences.items()
    ]
    names = [name for name in SHARDS_WITH_NEGATIVES.names if with_negatives or name != "negatives"]
    return "\n".join(
        [
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
            markdown_table(datasets_header, datasets),
            "",
            markdown_table(*figure_rows(domains, summary.packings)),
            "",
            "Hardness: how alike the negatives of a batch are. Share: 0 for random batches, 1 for every pair among its",
            "nearest of the domain. Masked: without likely answers. Surrogate loss: InfoNCE after masking.",
            *packings_text(summary.packings),
            "",
            markdown_table(["column", "what it is"], [[f"`{name}`", _COLUMNS[name]] for name in names]),
            "",
            "`index.parquet` has a row per batch: its packing, file, row group, byte range, digest and figures.",
            "`manifest.json` has the settings, the keys of the inputs and the digest of every file;",
            "`hardbatch verify` checks them.",
            "",
        ]
    )


def figure_rows(domains: Mapping[str, Mapping[str, Any]], num_packings: int) -> tuple[list[str], list[list[str]]]:
    """How hard the batches are, as a table: a row per domain, over all packings.

    If there are several packings, a row for each follows. Cluster sizes are shown if the artifacts have them.

    Args:
        domains: By domain, its `DomainSummary.counts()`, as the manifest of the shards holds them.
        num_packings: Number of packings.

    Returns:
        The header and the rows.
    """
    several = num_packings > 1
    with_sizes = any(CLUSTER_SIZES[0] in counts for counts in domains.values())
    header = ["domain", *["packing"] * several, *(field.name.replace("_", " ") for field in fields(Hardness))]
    header += ["shared batch-mates"] * several + ["cluster sizes 5/50/95 %"] * with_sizes
    rows = []
    for domain, counts in domains.items():
        sizes = ", ".join(f"{counts[name]:,g}" for name in CLUSTER_SIZES if name in counts)
        of_all = [domain, *["all"] * several, *_hardness_cells(counts)]
        rows.append(of_all + [_cell(counts.get("shared_batch_mates"))] * several + [sizes] * with_sizes)
        for packing, part in enumerate(counts.get("by_packing", [])):
            rows.append(["", str(packing), *_hardness_cells(part), "", *[""] * with_sizes])
    return header, rows


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


def _hardness_cells(counts: Mapping[str, Any]) -> list[str]:
    return [_cell(counts.get(field.name)) for field in fields(Hardness)]


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
