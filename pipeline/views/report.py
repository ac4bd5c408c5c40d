"""Shards as a person reads them: the summary of a run and the table of batches. `batch.py` shows one batch."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from hardbatch.pipeline.artifacts.artifact import MANIFEST, Artifact, diagnose_damage, find_artifact, read_artifact
from hardbatch.pipeline.errors import ConfigError, InputError
from hardbatch.pipeline.schemas import MIXED_DOMAIN
from hardbatch.pipeline.stages.card import (
    hardness_rows,
    markdown_table,
    negatives_rows,
    negatives_text,
    packings_text,
)
from hardbatch.pipeline.stages.figures import Summary
from hardbatch.pipeline.stages.warnings import REMOVED, corpus_warnings, reasons_text

# How `batches_text` can sort: by which columns of the index, and whether their largest values come first.
SORTS = {
    "mask-rate": {"mask_rate": True},
    "negatives": {"queries_without_negatives": True, "min_negatives": False, "mean_negatives": False},
    "hardness": {"hardness": True},
}


def summary_text(shards: Path) -> str:
    """The summary of a shards artifact as tables for the terminal, with commands to look further."""
    artifact = read_shards(shards)
    summary = read_summary(artifact)
    several = summary.packings > 1
    size = f"{summary.batch_size} pairs"
    if several:
        size += f", {summary.batches // summary.packings:,} in each of {summary.packings} packings"

    header, rows = negatives_rows(summary.domains)
    negatives = ["", table(header, rows), *negatives_text(summary.batch_size)] if rows else []
    return "\n".join(
        [
            table(*_count_rows(summary)),
            *_reasons_text(summary),
            "",
            table(*hardness_rows(summary.domains, summary.packings), left=(0, 1) if several else (0,)),
            "share: hardness of the batches; 0 for random ones, 1 if every pair had its nearest pairs beside it",
            *packings_text(summary.packings),
            *negatives,
            *_hard_negatives_text(artifact, summary),
            *corpus_warnings(summary),
            "",
            f"{summary.batches:,} batches of {size}, {artifact.bytes / 2**20:.1f} MiB; to look at them:",
            f"  {command('hardbatch')} inspect {artifact.path}",
            f'  {command("python")} -c "import polars as pl; '
            f"print(pl.read_parquet('{artifact.path / 'data'}').select('batch_id', 'query', 'document'))\"",
        ]
    )


def _reasons_text(summary: Summary) -> list[str]:
    """A line for each domain: why rows are not read, or in quarantine, why pairs are left over, and texts cut."""
    lines = []
    for name, domain in summary.domains.items():
        left = {reason: count for reason, count in domain.leftover.items() if reason != "mixed"}
        parts = {
            "not read": {"where": domain.source.get("rows_filtered", 0)},
            "quarantined": domain.source.get("quarantined", {}),
            "left over": left,
            "cut": {"at ingest.max_characters": domain.source.get("texts_cut", 0)},
        }
        texts = [f"{what}: {reasons_text(counts)}" for what, counts in parts.items() if any(counts.values())]
        if texts:
            lines.append(f"{name}: {'; '.join(texts)}")
    return lines


def _hard_negatives_text(artifact: Artifact, summary: Summary) -> list[str]:
    """A line about the hard negatives of the sources, if there are any."""
    counts = artifact.manifest.counts
    sources = [domain.source for domain in summary.domains.values()]
    dropped, joined = (
        sum(source.get(name, 0) for source in sources) for name in ("negatives_dropped", "negatives_joined")
    )
    removed = {text: counts.get(f"negatives_removed_{name}", 0) for name, text in REMOVED.items()}
    removed["unusable in the source"] = dropped
    if not counts["negatives_kept"] and not any(removed.values()):
        return []
    shown = ", ".join(f"{count:,} {text}" for text, count in removed.items() if count)
    return [
        f"hard negatives{' of all packings' if summary.packings > 1 else ''}: {counts['negatives_kept']:,} kept"
        + (f"; removed: {shown}" if shown else "")
        + (f"; {joined:,} come from rows that repeat a pair" if joined else "")
    ]


def summary_markdown(shards: Path) -> str:
    """The summary of a shards artifact as markdown tables."""
    artifact = read_shards(shards)
    summary = read_summary(artifact)
    header, rows = negatives_rows(summary.domains)
    parts = [
        f"# {artifact.manifest.domain}",
        markdown_table(*_count_rows(summary)),
        *_reasons_text(summary),
        markdown_table(*hardness_rows(summary.domains, summary.packings)),
        *packings_text(summary.packings),
        *([markdown_table(header, rows)] if rows else []),
        *corpus_warnings(summary),
        f"Shards: `{artifact.path}`\n",
    ]
    return "\n\n".join(parts)


def batches_text(shards: Path, *, limit: int = 20, sort: str | None = None) -> str:
    """The summary of a shards artifact and the table of its first `limit` batches.

    Args:
        shards: The folder of the shards artifact, or one above it.
        limit: Number of batches to show.
        sort: One of `SORTS`: `mask-rate` and `hardness` show the highest first, `negatives` the batches with
            the most queries without a negative, then those whose queries keep the fewest. By default the
            batches come in the order of their numbers.

    Raises:
        ConfigError: The index does not have what to sort by, because the shards are of an older format.
    """
    import polars as pl

    artifact = read_shards(shards)
    with diagnose_damage([artifact.path]):
        index = pl.read_parquet(artifact.path / "index.parquet")
    if sort is not None:
        if missing := SORTS[sort].keys() - set(index.columns):
            raise ConfigError(
                f"--sort {sort}: these shards are of format version {artifact.manifest.format_version} and lack "
                f"{min(missing)}; sort by mask-rate, or run the pipeline again"
            )
        index = index.sort([*SORTS[sort], "batch_id"], descending=[*SORTS[sort].values(), False])

    several = artifact.manifest.counts["packings"] > 1
    columns = {
        "batch": "batch_id", **({"packing": "packing"} if several else {}), "domain": "domain",
        "hardness": "hardness", "masked hardness": "masked_hardness", "mask rate": "mask_rate",
        "surrogate loss": "surrogate_loss", "negatives": "mean_negatives", "fewest": "min_negatives",
        "queries without": "queries_without_negatives", "file": "file", "row group": "row_group",
    }  # fmt: skip
    header = [title for title, column in columns.items() if column in index.columns]
    shown = index.head(limit).select(columns[title] for title in header)
    rows = [[_cell(value) for value in row] for row in shown.iter_rows()]
    more = f"\n{len(index) - limit:,} more batches; show one with --batch N" if len(index) > limit else ""
    return f"{summary_text(shards)}\n\n{table(header, rows, left=(header.index('domain'), header.index('file')))}{more}"


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def command(name: str) -> str:
    """How to call a command of this environment: its name if the shell finds it, otherwise its path."""
    path = Path(sys.executable).parent / name
    if not path.exists() or shutil.which(name) == str(path):
        return name
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def read_shards(path: Path) -> Artifact:
    """The shards artifact at `path`, or the only one below it; raises InputError if there is none or several."""
    artifact = find_artifact(path)
    if artifact is None and path.is_dir():
        below = [found.parent for found in path.rglob(MANIFEST) if found.parent.parent.name == "shards"]
        if len(below) == 1:
            artifact = read_artifact(below[0])
        elif below:
            raise InputError(
                f"{path}: holds several shards folders; give one of them: {', '.join(map(str, sorted(below)))}"
            )
    if artifact is None:
        raise InputError(f"{path}: no complete shards here; give the folder that `hardbatch run` printed last")
    if artifact.manifest.stage != "shards":
        raise InputError(f"{path}: is a '{artifact.manifest.stage}' artifact; give a shards folder")
    return artifact


def read_summary(artifact: Artifact) -> Summary:
    """The figures of shards, domains in the order of the user's manifest."""
    manifest = artifact.manifest
    counts = manifest.counts["domains"]
    order = [name for name in [*manifest.config["domains"], MIXED_DOMAIN] if name in counts]
    return Summary.read({**manifest.counts, "domains": {name: counts[name] for name in order}})


def _count_rows(summary: Summary) -> tuple[list[str], list[list[str]]]:
    """The counts from source rows to batches. Batches and leftover pairs are counted per packing."""
    header = ["domain", "rows", "quarantined", "held out", "pairs", "clusters", "batches", "left over"]
    rows = []
    totals = dict.fromkeys(("rows", "quarantined", "held_out", "pairs", "clusters", "batches", "leftover"), 0)
    for name, domain in summary.domains.items():
        numbers = {
            **domain.source,
            "quarantined": sum(domain.source.get("quarantined", {}).values()),
            "batches": domain.batches,
            "leftover": sum(count for reason, count in domain.leftover.items() if reason != "mixed"),
        }
        for column in totals:
            totals[column] += numbers.get(column, 0)
        rows.append([name] + [f"{numbers[column]:,}" if column in numbers else "" for column in totals])
    rows.append(["all"] + [f"{value:,}" for value in totals.values()])
    return header, rows


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> str:
    """Formats rows under a header; the columns in `left` are aligned to the left, the others to the right."""
    widths = [max(len(line[i]) for line in [header, *rows]) for i in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
