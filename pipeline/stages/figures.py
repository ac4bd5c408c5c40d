"""The figures of shards: from source rows to batches, how hard these are, and what masking leaves of them.

The manifest of the shards holds them; `counts` writes them there, and `read` takes them back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

OWN_RANKS = {"own_rank_q50": 50, "own_rank_q95": 95}  # percentiles of the rank of the own document
CLUSTER_SIZES = ("cluster_size_q05", "cluster_size_q50", "cluster_size_q95")
_DECIMALS = 4


@dataclass(frozen=True, kw_only=True)
class _Figures:
    """Numbers that manifests hold rounded."""

    def counts(self) -> dict[str, Any]:
        """The fields as manifests hold them."""
        values = asdict(self).items()
        return {name: round(value, _DECIMALS) if isinstance(value, float) else value for name, value in values}

    @classmethod
    def read(cls, counts: Mapping[str, Any]) -> Self:
        """The figures that `counts` made; what an older manifest lacks is None."""
        return cls(**{field.name: counts.get(field.name) for field in fields(cls)})


@dataclass(frozen=True, kw_only=True)
class Hardness(_Figures):
    """How hard some batches are, on average; the fields come in the order in which they are shown.

    The shares are None if there are no bounds to compare with, a masked field also if every negative is masked.
    `group_hardness` is that of the negatives of the own group, None if there are none.
    """

    hardness: float
    group_hardness: float | None
    masked_hardness: float | None
    share: float | None
    masked_share: float | None
    mask_rate: float
    surrogate_loss: float

    def counts(self) -> dict[str, Any]:
        """The fields as manifests hold them, without shares if there are no bounds."""
        found = super().counts()
        return {name: value for name, value in found.items() if self.share is not None or "share" not in name}


@dataclass(frozen=True, kw_only=True)
class Negatives(_Figures):
    """What masking leaves of the batches of a domain; see `docs/negatives.md`.

    Attributes:
        queries: Number of queries, one for each slot of each batch, over all packings.
        mean: The mean of effective negatives, the slots that are not masked for a query.
        q05: Their 5th percentile.
        without: Number of queries without a negative.
        same_answer_share: The share of the masked slots that answer for certain; None if none is masked.
        query_text_share: The share of those whose document is the text of the query. Older shards count
            these as likely, and have None here.
        likely_share: The share of those that are masked by the surrogate alone.
        concentration: The share that belongs to the 10 % of queries with the most masked slots.
        mostly_masked_batches: Number of batches in which more than half of the queries have fewer than half
            of the B−1 negatives.
    """

    queries: int
    mean: float
    q05: int
    without: int
    same_answer_share: float | None
    query_text_share: float | None
    likely_share: float | None
    concentration: float | None
    mostly_masked_batches: int


@dataclass(frozen=True, kw_only=True)
class DomainSummary:
    """From the source rows of a domain to its batches, and how hard these are.

    Attributes:
        batches: Number of batches in each packing.
        leftover: Number of pairs in no batch of a packing, by reason.
        source: What ingest and clustering counted; empty for the batches that mix domains.
        hardness: Over all packings; None without a batch.
        negatives: Over all packings; None without a batch, and in shards of format version 2.
        bounds: Hardness of random batches and of nearest neighbours, which shares are relative to.
        by_packing: Hardness of each packing; empty if there is only one.
        shared_batch_mates: What the packings have in common; None if no pair is in a batch of two of them.
        hard_negatives: What became of the hard negatives in all slots; None if no domain has any.
    """

    batches: int
    leftover: dict[str, int]
    source: dict[str, Any]
    hardness: Hardness | None = None
    negatives: Negatives | None = None
    bounds: tuple[float, float] | None = None
    by_packing: tuple[Hardness, ...] = ()
    shared_batch_mates: float | None = None
    hard_negatives: dict[str, int] | None = None

    def counts(self) -> dict[str, Any]:
        """The summary as manifests hold it: flat, without what does not apply to the domain."""
        counts = {"batches": self.batches, "leftover": self.leftover, **self.source}
        if self.hardness is not None:
            counts |= self.hardness.counts()
        if self.negatives is not None:
            counts["effective_negatives"] = self.negatives.counts()
        if self.hard_negatives is not None:
            counts["hard_negatives"] = self.hard_negatives
        if self.bounds is not None:
            counts |= dict(zip(("hardness_random", "hardness_knn"), self.bounds, strict=True))
        if self.by_packing:
            counts["shared_batch_mates"] = self.shared_batch_mates
            counts["by_packing"] = [hardness.counts() for hardness in self.by_packing]
        return counts

    @classmethod
    def read(cls, counts: Mapping[str, Any]) -> DomainSummary:
        """The summary that `counts` made."""
        own = {"batches", "leftover", "effective_negatives", "hardness_random", "hardness_knn", "by_packing"}
        own |= {"shared_batch_mates", "hard_negatives", *(field.name for field in fields(Hardness))}
        return cls(
            batches=counts["batches"],
            leftover=counts["leftover"],
            source={name: value for name, value in counts.items() if name not in own},
            hardness=Hardness.read(counts) if "hardness" in counts else None,
            negatives=Negatives.read(counts["effective_negatives"]) if "effective_negatives" in counts else None,
            bounds=(counts["hardness_random"], counts["hardness_knn"]) if "hardness_knn" in counts else None,
            by_packing=tuple(map(Hardness.read, counts.get("by_packing", ()))),
            shared_batch_mates=counts.get("shared_batch_mates"),
            hard_negatives=counts.get("hard_negatives"),
        )


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The figures of a corpus; `batches` are those of all packings together."""

    batch_size: int
    batches: int
    packings: int
    domains: dict[str, DomainSummary]

    def counts(self) -> dict[str, Any]:
        """The summary as manifests hold it."""
        return vars(self) | {"domains": {name: domain.counts() for name, domain in self.domains.items()}}

    @classmethod
    def read(cls, counts: Mapping[str, Any]) -> Summary:
        """The summary that `counts` made; manifests hold other counts beside it."""
        domains = {name: DomainSummary.read(domain) for name, domain in counts["domains"].items()}
        return cls(
            batch_size=counts["batch_size"],
            batches=counts["batches"],
            packings=counts["packings"],
            domains=domains,
        )
