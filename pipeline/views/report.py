"""Shards as a person reads them: the summary of a run, the table of batches, one batch as text."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hardbatch.pipeline.artifacts.artifact import (
    MANIFEST,
    Artifact,
    Manifest,
    diagnose_damage,
    find_artifact,
    read_artifact,
)
from hardbatch.pipeline.errors import ConfigError, InputError
from hardbatch.pipeline.schemas import MIXED_DOMAIN
from hardbatch.pipeline.stages.card import figure_rows, markdown_table, packings_text

_TEXT_CHARACTERS = 110
_SLOTS_LISTED = 16


def summary_text(shards: Path) -> str:
    """The summary of a shards artifact as tables for the terminal, with commands to look further."""
    artifact = _read_shards(shards)
    counts = artifact.manifest.counts
    warnings = [line for name, figures in counts["domains"].items() for line in _warnings(name, figures, counts)]
    several = counts["packings"] > 1
    size = f"{counts['batch_size']} pairs"
    if several:
        size += f", {counts['batches'] // counts['packings']:,} in each of {counts['packings']} packings"
    negatives = []
    removed = {name: counts[f"negatives_removed_{name}"] for name in ("known", "equivalent", "no_vector")}
    dropped = sum(figures.get("negatives_dropped", 0) for figures in counts["domains"].values())
    if counts["negatives_kept"] or dropped or any(removed.values()):
        negatives = [
            f"hard negatives{' of all packings' if several else ''}: {counts['negatives_kept']:,} kept; "
            f"removed: {removed['known']:,} known pairs, "
            f"{removed['equivalent']:,} likely answers, {removed['no_vector']:,} without a vector, "
            f"{dropped:,} unusable in the source"
        ]
    return "\n".join(
        [
            table(*_count_rows(artifact.manifest)),
            "",
            table(*figure_rows(_domains(artifact.manifest), counts["packings"]), left=(0, 1) if several else (0,)),
            "share: hardness of the batches; 0 for random ones, 1 if every pair had its nearest pairs beside it",
            *packings_text(counts["packings"]),
            *negatives,
            *warnings,
            "",
            f"{counts['batches']:,} batches of {size}, {artifact.bytes / 2**20:.1f} MiB; to look at them:",
            f"  {_command('hardbatch')} inspect {artifact.path}",
            f'  {_command("python")} -c "import polars as pl; '
            f"print(pl.read_parquet('{artifact.path / 'data'}').select('batch_id', 'query', 'document'))\"",
        ]
    )


def _warnings(domain: str, figures: dict[str, Any], counts: dict[str, Any]) -> list[str]:
    if domain == MIXED_DOMAIN:
        return []
    lines = []
    if figures["pairs"] == 0:
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in figures["quarantined"].items())
        lines.append(f"warning: {domain}: no pair was left of {figures['rows']:,} rows ({reasons})")
    elif figures["batches"] == 0:
        lines.append(f"warning: {domain} has no full batch of {counts['batch_size']}: its pairs are in the ledger")
    if figures["held_out"] < figures["holdout_target"] / 2:
        lines.append(
            f"warning: {domain}: {figures['held_out']:,} of {figures['holdout_target']:,} pairs could be held out: "
            "shared texts, hard negatives included, tie the others together"
        )
    return lines


def summary_markdown(shards: Path) -> str:
    """The summary of a shards artifact as a markdown table."""
    artifact = _read_shards(shards)
    num_packings = artifact.manifest.counts["packings"]
    parts = [
        f"# {artifact.manifest.domain}",
        markdown_table(*_count_rows(artifact.manifest)),
        markdown_table(*figure_rows(_domains(artifact.manifest), num_packings)),
        *packings_text(num_packings),
        f"Shards: `{artifact.path}`\n",
    ]
    return "\n\n".join(parts)


def batches_text(shards: Path, *, limit: int = 20) -> str:
    """The summary of a shards artifact and the table of its first `limit` batches."""
    import polars as pl

    artifact = _read_shards(shards)
    with diagnose_damage([artifact.path]):
        index = pl.read_parquet(artifact.path / "index.parquet")
    several = artifact.manifest.counts["packings"] > 1
    header = ["batch", *["packing"] * several, "domain", "hardness", "masked hardness", "mask rate", "surrogate loss"]
    header += ["file", "row group"]
    rows = [
        [
            str(row["batch_id"]),
            *[str(row["packing"])] * several,
            row["domain"],
            f"{row['hardness']:.4f}",
            "" if row["masked_hardness"] is None else f"{row['masked_hardness']:.4f}",
            f"{row['mask_rate']:.4f}",
            f"{row['surrogate_loss']:.3f}",
            row["file"],
            str(row["row_group"]),
        ]
        for row in index.head(limit).iter_rows(named=True)
    ]
    more = f"\n{len(index) - limit:,} more batches; show one with --batch N" if len(index) > limit else ""
    return f"{summary_text(shards)}\n\n{table(header, rows, left=(header.index('domain'), header.index('file')))}{more}"


def batch_text(shards: Path, batch_id: int, *, num_slots: int | None = None) -> str:
    """One batch as text: each pair, and the slots whose documents are not used as its negatives.

    Args:
        shards: The folder of the shards artifact, or one above it.
        batch_id: The number of the batch.
        num_slots: Show only this many slots, from the middle of the batch; None shows all.

    Raises:
        ConfigError: There is no such batch.
    """
    import polars as pl
    import pyarrow.parquet as pq

    artifact = _read_shards(shards)
    with diagnose_damage([artifact.path]):
        index = pl.read_parquet(artifact.path / "index.parquet")
    chosen = index.filter(pl.col("batch_id") == batch_id)
    if len(chosen) == 0:
        raise ConfigError(f"--batch {batch_id}: these shards have batches 0 to {len(index) - 1}")
    entry = chosen.row(0, named=True)
    with diagnose_damage([artifact.path]), pq.ParquetFile(artifact.path / entry["file"]) as file:
        rows = file.read_row_group(entry["row_group"]).to_pylist()
    packing = f", packing {entry['packing']}" if artifact.manifest.counts["packings"] > 1 else ""
    lines = [
        f"batch {batch_id} of {entry['domain']}{packing}: {len(rows)} pairs, hardness {entry['hardness']:.4f}, "
        f"mask rate {entry['mask_rate']:.4f}, surrogate loss {entry['surrogate_loss']:.3f}"
    ]
    shown = rows if num_slots is None else rows[max(0, (len(rows) - num_slots) // 2) :][:num_slots]
    for row in shown:
        masked = row["equivalent_slots"]
        lines.append(
            f"[{row['slot']:>3}] cluster {row['cluster_id']}  pair {row['pair_id']}  {row['query_prompt']}".rstrip()
        )
        lines.append(f"      q: {_shorten(row['query'])}")
        lines.append(f"      d: {_shorten(row['document'])}")
        lines += [f"      hard negative: {_shorten(negative)}" for negative in row.get("negatives") or []]
        if masked:
            some = ", ".join(map(str, masked[:_SLOTS_LISTED])) + (", …" if len(masked) > _SLOTS_LISTED else "")
            lines.append(f"      masked as its negatives: {len(masked)} of {len(rows) - 1} (slots {some})")
    if len(shown) < len(rows):
        lines.append(
            f"… {len(rows) - len(shown)} more: {_command('hardbatch')} inspect {artifact.path} --batch {batch_id}"
        )
    return "\n".join(lines)


def _command(name: str) -> str:
    """How to call a command of this environment: its name if the shell finds it, otherwise its path."""
    path = Path(sys.executable).parent / name
    if not path.exists() or shutil.which(name) == str(path):
        return name
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _read_shards(path: Path) -> Artifact:
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


def _domains(manifest: Manifest) -> dict[str, dict[str, Any]]:
    found = manifest.counts["domains"]
    return {name: found[name] for name in [*manifest.config["domains"], MIXED_DOMAIN] if name in found}


def _count_rows(manifest: Manifest) -> tuple[list[str], list[list[str]]]:
    """The counts from source rows to batches. Batches and leftover pairs are counted per packing."""
    header = ["domain", "rows", "quarantined", "held out", "pairs", "clusters", "batches", "left over"]
    rows = []
    totals = dict.fromkeys(("rows", "quarantined", "held_out", "pairs", "clusters", "batches", "leftover"), 0)
    for domain, figures in _domains(manifest).items():
        quarantined = sum(figures.get("quarantined", {}).values())
        leftover = sum(count for reason, count in figures["leftover"].items() if reason != "mixed")
        numbers = {**figures, "quarantined": quarantined, "leftover": leftover}
        for name in totals:
            totals[name] += numbers.get(name, 0)
        rows.append([domain] + [f"{numbers[name]:,}" if name in numbers else "" for name in totals])
    rows.append(["all"] + [f"{value:,}" for value in totals.values()])
    return header, rows


def _shorten(text: str) -> str:
    line = "".join(char if char.isprintable() else "\ufffd" for char in " ".join(text.split()))
    return line if len(line) <= _TEXT_CHARACTERS else line[: _TEXT_CHARACTERS - 1] + "…"


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
