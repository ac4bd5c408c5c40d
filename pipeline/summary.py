"""The counts of a corpus: of each domain, from source rows to batches, and its hardness."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from pipeline import schemas
from pipeline.artifact import read_artifact
from pipeline.errors import InputError
from pipeline.hardness import Bounds
from pipeline.step import Step

_READ_COUNTS = ("rows", "pairs", "held_out", "holdout_target", "quarantined", "texts_cut", "negatives_dropped")


def summarise(step: Step, index: pa.Table, packed: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Counts of the corpus, and of each domain: from source rows to batches, and its hardness."""
    summary: dict[str, Any] = {
        "batch_size": step.config["batch_size"],
        "batches": len(index),
        "packings": 1,
        "domains": {},
    }
    for domain, counts in packed.items():
        rows = index.filter(pa.compute.equal(index["domain"], domain))
        figures: dict[str, Any] = {"batches": counts["batches"], "leftover": counts["leftover"]}
        if domain != schemas.MIXED_DOMAIN:
            read = read_artifact(step.inputs[f"pairs/{domain}"]).manifest.counts
            figures.update({name: read[name] for name in _READ_COUNTS})
            figures["clusters"] = read_artifact(step.inputs[f"clusters/{domain}"]).manifest.counts["clusters"]
        if counts["batches"]:
            hardness = float(np.mean(rows["hardness"].to_numpy()))
            unmasked = 1 - rows["mask_rate"].to_numpy()
            masked_values = np.nan_to_num(rows["masked_hardness"].to_numpy().astype(np.float64))
            masked = float((masked_values * unmasked).sum() / unmasked.sum()) if unmasked.any() else None
            figures["hardness"] = round(hardness, 4)
            figures["masked_hardness"] = None if masked is None else round(masked, 4)
            figures["mask_rate"] = round(float(np.mean(rows["mask_rate"].to_numpy())), 4)
            figures["surrogate_loss"] = round(float(np.mean(rows["surrogate_loss"].to_numpy())), 4)
            if domain != schemas.MIXED_DOMAIN:
                bounds = Bounds(**read_artifact(step.inputs[f"hardness/{domain}"]).manifest.counts)
                figures["hardness_random"], figures["hardness_knn"] = bounds.random, bounds.knn
                figures["share"] = round(bounds.share(hardness), 4)
                figures["masked_share"] = None if masked is None else round(bounds.share(masked), 4)
        summary["domains"][domain] = figures
    return summary


def refuse_empty(step: Step, counts: dict[str, dict[str, Any]]) -> None:
    """Raises InputError: no domain fills a batch, and what to change."""
    size = step.config["batch_size"]
    left = {
        domain: sum(count["leftover"].values()) for domain, count in counts.items() if domain in step.config["domains"]
    }
    found = ", ".join(f"{domain} {number}" for domain, number in left.items())
    mix = " or set pack.remainder to mix" if schemas.MIXED_DOMAIN not in counts and sum(left.values()) >= size else ""
    raise InputError(
        f"no domain fills a batch of {size} pairs (pairs that came through: {found}); lower pack.batch_size, "
        f"add data{',' + mix if mix else ''}"
    )
