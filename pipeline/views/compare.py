"""Two shards side by side: which settings differ, and what that does to the figures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import polars as pl

from hardbatch.pipeline.artifacts.artifact import Artifact, diagnose_damage, find_artifact
from hardbatch.pipeline.stages.figures import DomainSummary
from hardbatch.pipeline.views.report import read_shards, read_summary, table

_HARDNESS_FIGURES = ("hardness", "group_hardness", "share", "masked_share", "mask_rate", "surrogate_loss")
_NEGATIVES_FIGURES = {"mean": "negatives", "q05": "negatives, 5th percentile", "without": "queries without"}


def compare_text(first: Path, second: Path) -> str:
    """Compares two shards as text for the terminal.

    Args:
        first: The folder of a shards artifact, or one above it.
        second: The same of another one.

    Returns:
        The settings that differ, with those of the artifacts that the shards were made from as far as these are
        still there; a table of the figures of each domain; and how many batch-mates of a pair in the first are its
        batch-mates in the second too.

    Raises:
        InputError: There are no shards, or several.
    """
    artifacts = [read_shards(path) for path in (first, second)]
    summaries = [read_summary(artifact) for artifact in artifacts]
    lines = [f"{name}: {artifact.path}" for name, artifact in zip("AB", artifacts, strict=True)]
    settings = [dict(_settings(artifact)) for artifact in artifacts]
    differing = [name for name in settings[0] | settings[1] if settings[0].get(name) != settings[1].get(name)]
    rows = [[name, *(str(of_one.get(name, "")) for of_one in settings)] for name in differing]
    lines += ["", table(["setting", "A", "B"], rows, left=(0, 1, 2)) if rows else "no setting differs"]

    figures = []
    for domain in summaries[0].domains | summaries[1].domains:
        found = [dict(_figures(summary.domains.get(domain))) for summary in summaries]
        for name in found[0] | found[1]:
            values = [of_one.get(name) for of_one in found]
            figures.append([domain, name, *map(_cell, values), _difference(*values)])
    lines += ["", table(["domain", "figure", "A", "B", "B - A"], figures, left=(0, 1))]
    return "\n".join([*lines, *_mates_lines(*artifacts)])


def _settings(artifact: Artifact) -> Iterator[tuple[str, Any]]:
    """The settings of an artifact and of what it was made from, as `stage.field`, or `stage.field of domain`."""
    seen: set[Path] = set()
    waiting = [artifact]
    while waiting:
        one = waiting.pop()
        if one.path in seen:
            continue
        seen.add(one.path)
        manifest = one.manifest
        of_domain = "" if manifest.stage == "shards" else f" of {manifest.domain}"
        for name, value in _flat(manifest.config):
            yield f"{manifest.stage}.{name}{of_domain}", value
        workspace = artifact.path.parents[1]
        for name, key in manifest.inputs.items():
            stage, _, domain = name.partition("/")
            stage = "vectors" if stage == "surrogate" else stage
            found = find_artifact(workspace / stage / (domain or manifest.domain) / key)
            waiting += [found] if found is not None else []


def _flat(config: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value


def _figures(domain: DomainSummary | None) -> Iterator[tuple[str, float]]:
    if domain is None:
        return
    yield "batches", domain.batches
    yield "left over", sum(count for reason, count in domain.leftover.items() if reason != "mixed")
    for name in _HARDNESS_FIGURES:
        if (value := getattr(domain.hardness, name, None)) is not None:
            yield name.replace("_", " "), value
    for name, shown in _NEGATIVES_FIGURES.items():
        if (value := getattr(domain.negatives, name, None)) is not None:
            yield shown, value


def _cell(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.4f}" if isinstance(value, float) else f"{value:,}"


def _difference(first: float | None, second: float | None) -> str:
    if first is None or second is None:
        return ""
    apart = second - first
    return f"{apart:+.4f}" if isinstance(apart, float) else f"{apart:+,}"


def _mates_lines(first: Artifact, second: Artifact) -> list[str]:
    """For each domain that both have in common: the share of batch-mates that stay batch-mates."""
    names = [name for name in first.manifest.inputs if name.startswith("pairs/")]
    common = [name for name in names if first.manifest.inputs[name] == second.manifest.inputs.get(name)]
    if not common:
        return ["", "the two have no domain with the same pairs, so their batches cannot be compared pair by pair"]

    frames = []
    for artifact, number in ((first, "a"), (second, "b")):
        with diagnose_damage([artifact.path]):
            index = pl.scan_parquet(artifact.path / "index.parquet").filter(pl.col("packing") == 0).select("batch_id")
            slots = pl.scan_parquet(artifact.path / "data" / "*.parquet").select("domain", "pair_id", "batch_id")
            found = slots.join(index, on="batch_id", how="semi").collect()
        frames.append(found.with_columns(pl.col("domain").cast(pl.String)).rename({"batch_id": number}))

    lines = [""]
    for name in common:
        domain = name.removeprefix("pairs/")
        one, other = (frame.filter(pl.col("domain") == domain) for frame in frames)
        sizes = one.group_by("a").len()["len"]
        together = one.join(other, on="pair_id").group_by("a", "b").len()["len"]
        if (total := int((sizes * (sizes - 1)).sum())) > 0:
            share = int((together * (together - 1)).sum()) / total
            lines.append(f"{domain}: {share:.1%} of a pair's batch-mates in A are its batch-mates in B too (packing 0)")
    return lines
