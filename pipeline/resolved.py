"""Resolved settings: for each stage, what the key of its artifact depends on besides sources and inputs.

A class extends the table of the manifest that its stage reads, so a new setting enters the key without
further ado. It adds what is resolved at planning: defaults that depend on other settings, and the machine's.
"""

from __future__ import annotations

from pydantic import Field

from hardbatch.pipeline.config import ClusterConfig, HardnessConfig, PackConfig, Reading, Table, WriteConfig


class PairsSettings(Reading):
    """Which rows are read, and what is cut, quarantined and held out."""

    holdout: float
    holdout_seed: int | None
    max_characters: int
    decontaminate: list[str]
    decontaminate_sha256: dict[str, str]


class FoldedSettings(ClusterConfig):
    """Clusters by folded K-Means; `restarts` belongs to the other method."""

    cluster_size: int
    iterations: int
    device: str
    restarts: int = Field(exclude=True)


class DoubledSettings(ClusterConfig):
    """Clusters by doubled K-Means; what is left out belongs to the other method."""

    cluster_size: int
    iterations: int
    backend: str
    tolerance: float = Field(exclude=True)
    balance: float = Field(exclude=True)
    two_level_above: int = Field(exclude=True)


class HardnessSettings(HardnessConfig):
    """The bounds of hardness for batches of `batch_size`."""

    batch_size: int


class BatchesSettings(PackConfig):
    """Batches of one domain."""

    group_size: int
    device: str


class MixedSettings(Table):
    """Batches that mix groups, or what is left over, of all domains; the order of `domains` numbers them."""

    compose: str
    batch_size: int
    group_size: int
    seed: int
    num_packings: int
    domains: list[str]


class DatasetOfShards(Table):
    """What the shards say about a dataset."""

    query_prompt: str
    document_prompt: str
    licence: str
    weight: float


class ShardsSettings(WriteConfig):
    """Shards of a corpus; the order of `domains` numbers the batches."""

    compose: str
    batch_size: int
    group_size: int
    domains: list[str]
    datasets: dict[str, DatasetOfShards]
