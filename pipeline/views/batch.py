"""One batch as a person reads it: its pairs, and for each masked slot why it is masked."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hardbatch.pipeline.artifacts.artifact import diagnose_damage
from hardbatch.pipeline.errors import ConfigError
from hardbatch.pipeline.schemas import NEGATIVE_PLACES, SHARDS_WITH_NEGATIVES
from hardbatch.pipeline.views.masks import BatchMasks, Mask, explain_masks
from hardbatch.pipeline.views.report import command, read_shards

_TEXT_CHARACTERS = 110
_MASKED_TEXT_CHARACTERS = 70
_MASKS_LISTED = 16


def batch_text(shards: Path, batch_id: int, *, num_slots: int | None = None) -> str:
    """One batch as text: each pair, the slots whose documents are not used as its negatives, and why.

    The reasons come from the artifacts that the shards were made from. If these are gone, the text says so
    and gives what the shards themselves tell.

    Args:
        shards: The folder of the shards artifact, or one above it.
        batch_id: The number of the batch.
        num_slots: Show only this many slots, from the middle of the batch; None shows all.

    Raises:
        ConfigError: There is no such batch.
    """
    import polars as pl
    import pyarrow.parquet as pq

    artifact = read_shards(shards)
    with diagnose_damage([artifact.path]):
        index = pl.read_parquet(artifact.path / "index.parquet")
    chosen = index.filter(pl.col("batch_id") == batch_id)
    if len(chosen) == 0:
        raise ConfigError(f"--batch {batch_id}: these shards have batches 0 to {len(index) - 1}")
    entry = chosen.row(0, named=True)
    with diagnose_damage([artifact.path]), pq.ParquetFile(artifact.path / entry["file"]) as file:
        rows = file.read_row_group(entry["row_group"]).to_pylist()
        masks = explain_masks(artifact, rows)

    packing = f", packing {entry['packing']}" if artifact.manifest.counts["packings"] > 1 else ""
    lines = [
        f"batch {batch_id} of {entry['domain']}{packing}: {len(rows)} pairs, hardness {entry['hardness']:.4f}, "
        f"mask rate {entry['mask_rate']:.4f}, surrogate loss {entry['surrogate_loss']:.3f}",
        *_negatives_lines(masks),
    ]
    shown = rows if num_slots is None else rows[max(0, (len(rows) - num_slots) // 2) :][:num_slots]
    for row in shown:
        lines += _slot_lines(row, rows, masks)
    if len(shown) < len(rows):
        lines.append(
            f"… {len(rows) - len(shown)} more: {command('hardbatch')} inspect {artifact.path} --batch {batch_id}"
        )
    return "\n".join(lines)


def _negatives_lines(masks: BatchMasks) -> list[str]:
    """What masking leaves of the batch, what it masks and why, and warnings if that is much."""
    size = len(masks.by_slot)
    kept = [size - 1 - len(of_slot) for of_slot in masks.by_slot]
    num_few = sum(2 * number < size - 1 for number in kept)
    reasons = _count_reasons([mask for of_slot in masks.by_slot for mask in of_slot])
    lines = [
        f"negatives per query, of {size - 1}: {sum(kept) / size:.1f} on average, {min(kept)} at the fewest; "
        f"masked slots: {reasons or 'none'}"
    ]
    if num_without := kept.count(0):
        lines.append(f"warning: {num_without} of {size} queries have no negative here and teach nothing")
    if 2 * num_few > size:
        lines.append(f"warning: mostly masked: {num_few} of {size} queries keep fewer than half of the negatives")
    if masks.floors:
        floors = ", ".join(f"{floor:.3f} in {domain}" for domain, floor in masks.floors.items())
        lines.append(f"floor of likely answers: {floors}")
    return lines + [f"not known: {line}" for line in masks.missing]


def _slot_lines(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], masks: BatchMasks) -> list[str]:
    lines = [
        f"[{row['slot']:>3}] cluster {row['cluster_id']}  pair {row['pair_id']}  {row['query_prompt']}".rstrip(),
        f"      q: {_shorten(row['query'])}",
        f"      d: {_shorten(row['document'])}",
        *(f"      hard negative: {_shorten(negative)}" for negative in row.get("negatives") or []),
        *(f"      {_shorten(name)}: {_shorten(value)}" for name, value in _extra_values(row)),
    ]
    masked = masks.by_slot[row["slot"]]
    if not masked:
        return lines

    own = "" if masks.own_scores is None else f"; own score {masks.own_scores[row['slot']]:.3f}"
    lines.append(f"      masked: {len(masked)} of {len(rows) - 1}{own}")
    reasons = [mask.reason + (f" {mask.overlap:.2f}" if mask.overlap is not None else "") for mask in masked]
    width = max(map(len, reasons))
    for mask, reason in list(zip(masked, reasons, strict=True))[:_MASKS_LISTED]:
        score = "" if mask.score is None else f"  {mask.score:.3f}"
        score += "" if mask.bound is None else f" ≥ {mask.bound:.3f}"
        text = _shorten(rows[mask.slot]["document"], _MASKED_TEXT_CHARACTERS)
        lines.append(f"        [{mask.slot:>3}] {reason:<{width}}{score}  {text}")
    if rest := masked[_MASKS_LISTED:]:
        lines.append(f"        … and {_count_reasons(rest)}")
    return lines


def _extra_values(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The extra columns of a slot and what they hold."""
    own = (*SHARDS_WITH_NEGATIVES.names, NEGATIVE_PLACES.name)
    return [
        (name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
        for name, value in row.items()
        if name not in own
    ]


def _count_reasons(masks: Sequence[Mask]) -> str:
    """For example `3 known pair, 12 likely`."""
    return ", ".join(f"{number:,} {reason}" for reason, number in Counter(mask.reason for mask in masks).most_common())


def _shorten(text: str, num_characters: int = _TEXT_CHARACTERS) -> str:
    line = "".join(char if char.isprintable() else "\ufffd" for char in " ".join(text.split()))
    return line if len(line) <= num_characters else line[: num_characters - 1] + "…"
