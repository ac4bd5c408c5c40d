"""What a corpus would take on given workers, from rates that were measured elsewhere: `hardbatch plan --rates`.

Nothing is read but the manifest and the rates, so neither the network nor the data are needed. The rows are those
that the manifest states as `num_pairs`.
"""

from __future__ import annotations

import heapq
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hardbatch.pipeline.config import CorpusManifest
from hardbatch.pipeline.errors import ConfigError
from hardbatch.pipeline.progress import duration
from hardbatch.pipeline.views.plan import size
from hardbatch.pipeline.views.report import table

STAGES = ("pairs", "answers", "vectors", "clusters", "hardness", "consistency", "batches", "shards")

Positive = Annotated[float, Field(gt=0)]
AtLeast0 = Annotated[float, Field(ge=0)]


class StageRate(BaseModel):
    """What one stage costs one worker.

    Rows are pairs; in `vectors` they are texts, two for each pair and model.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    microseconds_per_row: Positive
    growth: Annotated[float, Field(ge=1, le=2)] = 1.0
    """Seconds grow as rows of a domain to this power."""
    measured_rows: Positive | None = None
    """The rows of the domain that was measured; needed if `growth` is not 1."""
    bytes_per_row: AtLeast0 = 0.0
    memory_bytes_per_row: AtLeast0 = 0.0
    memory_bytes: AtLeast0 = 0.0
    shared: Literal["units", "domains", "nothing"] = "domains"
    """What several workers share: the units of a domain, whole domains, or nothing."""

    def seconds(self, rows: int) -> float:
        """Of one worker, for a domain of `rows` rows."""
        grown = (rows / self.measured_rows) ** (self.growth - 1) if self.measured_rows else 1.0
        return rows * self.microseconds_per_row * 1e-6 * grown


@dataclass(frozen=True, kw_only=True)
class StageNeed:
    """What a stage takes: rows and bytes of all domains, seconds until the last worker is done, memory of a process."""

    stage: str
    rows: int
    seconds: float
    bytes: float
    memory: float
    longest: str
    """The domain that takes longest, and its part of the seconds of one worker."""


def read_rates_file(path: Path) -> dict[str, StageRate]:
    """Reads a TOML file that has a table for each stage; raises ConfigError with one line for each mistake."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"--rates {path}: cannot be read: {error}") from None
    mistakes = [f"--rates {path}: no table [{stage}]; a file of rates has {', '.join(STAGES)}"
                for stage in STAGES if stage not in content]  # fmt: skip
    mistakes += [
        f"--rates {path}: [{stage}] is not a stage; stages: {', '.join(STAGES)}"
        for stage in content
        if stage not in STAGES
    ]
    rates = {}
    for stage in STAGES:
        try:
            rates[stage] = StageRate.model_validate(content.get(stage, {"microseconds_per_row": 1}))
        except ValidationError as error:
            mistakes += [
                f"--rates {path}: {stage}.{'.'.join(map(str, item['loc']))}: {item['msg']}"
                for item in error.errors(include_url=False)
            ]
            continue
        if rates[stage].growth != 1 and rates[stage].measured_rows is None:
            mistakes.append(f"--rates {path}: {stage}.growth needs {stage}.measured_rows, the rows it was measured at")
    if mistakes:
        raise ConfigError(*mistakes)
    return rates


def estimate_corpus(manifest: CorpusManifest, rates: dict[str, StageRate], num_workers: int) -> list[StageNeed]:
    """What each stage takes on `num_workers` workers; raises ConfigError if a dataset has no `num_pairs`."""
    unknown = [dataset.name for dataset in manifest.dataset if dataset.num_pairs is None]
    if unknown:
        raise ConfigError(
            f"--rates needs the number of pairs of every dataset; num_pairs is missing in {', '.join(unknown)}"
        )
    pairs = {dataset.name: dataset.num_pairs or 0 for dataset in manifest.dataset}
    num_models = len({manifest.embed.model, manifest.embed.surrogate_model})
    factors = {"vectors": 2 * num_models, "batches": manifest.pack.num_packings, "shards": manifest.pack.num_packings}

    needs = []
    for stage, rate in rates.items():
        rows = {name: number * factors.get(stage, 1) for name, number in pairs.items()}
        if stage == "shards":  # one artifact for the whole corpus
            rows = {"all domains": sum(rows.values())}
        seconds = {name: rate.seconds(number) for name, number in rows.items()}
        longest = max(seconds, key=lambda name: seconds[name])
        needs.append(
            StageNeed(
                stage=stage,
                rows=sum(rows.values()),
                seconds=_on_workers(rate, list(seconds.values()), num_workers),
                bytes=sum(rows.values()) * rate.bytes_per_row,
                memory=rate.memory_bytes + max(rows.values()) * rate.memory_bytes_per_row,
                longest=f"{longest} {seconds[longest] / sum(seconds.values()):.0%}",
            )
        )
    return needs


def capacity_text(manifest: CorpusManifest, rates: dict[str, StageRate], num_workers: int) -> str:
    """The table of `estimate_corpus`, and its totals."""
    needs = estimate_corpus(manifest, rates, num_workers)
    header = ["stage", "rows", "time", "memory", "bytes", "workers share", "longest domain"]
    rows = [
        [
            need.stage, f"{need.rows:,}", duration(need.seconds), size(need.memory), size(need.bytes),
            rates[need.stage].shared, need.longest,
        ]
        for need in needs
    ]  # fmt: skip
    workers = f"{num_workers} worker{'s' * (num_workers != 1)}"
    return "\n".join(
        [
            table(header, rows, left=(0, 5, 6)),
            f"{manifest.corpus}: {needs[0].rows:,} pairs of {len(manifest.dataset)} domains on {workers}: "
            f"{duration(sum(need.seconds for need in needs))}, {size(sum(need.bytes for need in needs))} on disk, "
            f"at most {size(max(need.memory for need in needs))} in one process",
        ]
    )


def _on_workers(rate: StageRate, seconds: Sequence[float], num_workers: int) -> float:
    """How long the domains take, which need `seconds` on one worker each."""
    if rate.shared == "nothing":
        return sum(seconds)
    if rate.shared == "units":
        return sum(seconds) / num_workers

    # Whole domains, the longest first, each to the worker that is free next.
    free_at = [0.0] * num_workers
    for each in sorted(seconds, reverse=True):
        heapq.heapreplace(free_at, free_at[0] + each)
    return max(free_at)
